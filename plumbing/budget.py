"""What a run needs of memory, before anything is allocated.

    python train.py --model llama-3.2-3b --dry-run --gpu-memory 24
    plan = Plan(s, models, code)          # models: Config by role, from config.json alone
    s = plan.sized(s, fixed)              # the largest sampler and micro-batches that fit the GPU

Weights, gradients, AdamW's moments and the cache are exact arithmetic. Everything else is measured:
the run's own functions (`code`, from train.py) are executed on meta tensors, which have shapes and
no memory, and Live counts the bytes of all storages that exist at once. Lengths are at their
limits: a run whose texts end early needs less. GB are 1e9 bytes.
Shapes: N queries, G answers, B rows of a pass, S tokens of a prompt, T of a completion.
"""
import math
import os
import weakref
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from plumbing import cache, logprobs
from plumbing.config import Config
from plumbing.files import HERE, InputError, pick_device, read_prompt
from plumbing.memory import BLOCK

CUDA = 0.7e9                 # bytes of CUDA's context, kernels and cuBLAS workspaces
# What must stay free: a fraction of the memory for the allocator's gaps, and a fraction of what is
# measured, for the meta kernels are not the real ones.
SPARE_MEMORY, SPARE_WORK = 0.03, 0.1
BATCH_TOKENS = [2**k for k in range(18, 11, -1)]         # what sized() tries
MICRO_BATCH_TOKENS = [2**k for k in range(13, 8, -1)]
TURN = 40                    # tokens that a chat template adds to a text, Llama 3's date included
LETTERS = 3.5                # of a token. English prose has about 4; our prompts have 3.7 to 4.3
SEGMENT = 64                 # tokens of a long sentence
STATIC = ("policy", "reference", "judge", "reward model", "masters", "gradients", "moments")
MEASURED = {}                # bytes by what was executed: nothing is executed twice


# ---------------------------------------------------------------- bytes that are alive

class Live(TorchDispatchMode):
    """Counts the bytes of the meta storages that are made while it is active and still exist."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        self.known = {t.untyped_storage()._cdata for t in held}      # not counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_meta:
                storage = t.untyped_storage()
                if storage._cdata not in self.known:
                    size = -(-storage.nbytes() // 512) * 512               # as CUDA's allocator
                    self.known.add(storage._cdata)
                    weakref.finalize(storage, self.forget, storage._cdata, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out

    def forget(self, key: int, size: int):
        self.known.discard(key)
        self.now -= size


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """The fused CUDA kernels' meta form. Meta tensors would otherwise get the plain formula, with
    the whole (T, S) matrix."""
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    bias = attn_mask.expand(-1, k.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled())[0]


# ---------------------------------------------------------------- what is there

@dataclass(frozen=True)
class Machine:
    device: str                      # cuda, cpu or mps
    width: int                       # bytes per weight in the forward pass
    memory: float                    # bytes that the run may use
    source: str                      # where that figure comes from


def machine(s) -> Machine:
    """The GPU of --gpu-memory (in a dry run it need not exist), the GPU at hand, or this host."""
    if s.gpu_memory:
        width = pick_device("cuda")[1].itemsize if torch.cuda.is_available() else 2
        return Machine("cuda", width, s.gpu_memory * 1e9 - CUDA,
                       f"--gpu-memory {s.gpu_memory:g} less {CUDA / 1e9:g} of CUDA's own")
    device, dtype = pick_device(s.device)
    if device.type == "cuda":
        return Machine("cuda", dtype.itemsize, torch.cuda.mem_get_info()[0],
                       "free on " + torch.cuda.get_device_name())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(device.type, dtype.itemsize, memory, "memory of this host")


def prompt_lengths(s) -> dict[str, int]:
    """Tokens of the prompt files, estimated from their letters: no tokenizer is loaded. "shown":
    what the judge sees beside its instructions and the answer."""
    count = lambda text: math.ceil(len(text) / LETTERS)
    own, judge, shown = 0, "", s.query_tokens
    if s.algo in ("lsp", "lsp-zero"):
        own = TURN + count(read_prompt(s.challenger_prompt))
    if s.self_reward:
        judge = read_prompt(s.self_reward_prompt)
    elif s.verdict:
        judge = read_prompt(HERE / "prompts" / f"verdict{'_strict' * s.strict}.txt")
        shown = SEGMENT * (1 if s.strict else s.reference_segments)
    return {"challenger": own, "judge": TURN + count(judge), "rubric": count(judge.split("{")[0]),
            "shown": shown}


def parameters(c: Config) -> int:
    """How many weights a model has."""
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    block = c.hidden_size * (heads + 3 * c.intermediate_size + 2)
    tables = 1 if c.tie_word_embeddings or c.scalar_head else 2
    return (c.num_hidden_layers * block + c.vocab_size * c.hidden_size * tables
            + c.hidden_size * (1 + c.scalar_head))


def token_cache(c: Config, width: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width


def in_unit(sizes) -> tuple[str, float]:
    """The unit in which these bytes are printed, and its bytes."""
    return ("GB", 1e9) if max(sizes) > 1e9 else ("MB", 1e6)


# ---------------------------------------------------------------- the plan

class Plan:
    """What a run needs. models: Config by role ("policy", "reference", "judge", "reward model").

    code: the functions that are executed on meta tensors: Llama, Row, Completion, pick,
    last_hidden, micro_batches, token_log_probs, batch_loss.
    """

    def __init__(self, s, models: dict[str, Config], code, *, text: dict | None = None,
                 on: Machine | None = None):
        self.settings, self.models, self.code = s, models, code
        self.text, self.machine = text or prompt_lengths(s), on or machine(s)

    # ------------------------------------------------------------ what is executed

    def peak(self, role: str, work, *sizes, **options) -> int:
        """Most bytes that are alive at once in work(model, *sizes), beside the model's weights
        and gradients."""
        c, m = self.models[role], self.machine
        key = (str(c), m.device, m.width, work.__name__, sizes, *options.values())
        if key not in MEASURED:
            with torch.device("meta"):
                model = self.code.Llama(c)
            model.frequencies = model.frequencies.to("meta")
            model.to({2: torch.bfloat16, 4: torch.float32}[m.width])
            for p in model.parameters() if work == self.updating else ():
                p.grad_dtype = None                              # as MasterAdamW has it
                p.grad = torch.empty_like(p, dtype=torch.float32)
            chunks, plain = logprobs.LOGITS_PER_CHUNK, F.scaled_dot_product_attention
            chunks["meta"] = chunks.get(m.device, chunks["cpu"])
            F.scaled_dot_product_attention = attention
            try:
                with Live(model) as live:
                    work(model, *sizes, **options)
            finally:
                F.scaled_dot_product_attention = plain
            MEASURED[key] = live.peak
        return MEASURED[key]

    @torch.inference_mode()
    def sampling(self, model, B: int, P: int, S: int, common: int, T: int):
        """The prefill of P prompts for B rows, and a decode step with its draw."""
        prompts = [[0] * common + [1 + p] * (S - common) for p in range(P)]
        logits, held = cache.prefill(model, prompts, torch.arange(B) * P // B, S + T)
        uniform = torch.empty(B, dtype=torch.float64, device="meta")
        token, _ = self.code.pick(logits, 0.9, uniform)
        self.code.pick(model.logits(model(token[:, None], cache=held)[:, -1]), 0.9, uniform)

    def scoring(self, model, N: int, G: int, S: int, T: int, tokens: int):
        """The reward model's or the judge's passes over N * G pairs of S + T tokens."""
        rows = [[1 + n] * S + [n * G + g] * T for n in range(N) for g in range(G)]
        self.code.last_hidden(model, rows[:max(1, tokens // (S + T))],
                              [n for n in range(N) for _ in range(G)], tokens)

    def batch(self, N: int, G: int, S: int, T: int, tokens: int) -> list:
        """The first micro-batch of N prompts of S tokens with G completions of T tokens each."""
        rows = [self.code.Row([n] * S, self.code.Completion([n * G + g] * T, [0.0] * T, True), 0.0,
                              [0.0] * T) for n in range(N) for g in range(G)]
        return next(self.code.micro_batches(rows, tokens))

    @torch.no_grad()
    def referring(self, model, *sizes):
        self.code.token_log_probs(model, self.batch(*sizes), 0.9)

    def updating(self, model, N: int, G: int, *sizes, checkpointing: bool):
        """Forward and backward pass of a micro-batch, beside the gradients of earlier ones."""
        model.checkpointing = checkpointing
        self.code.batch_loss(model, self.batch(N, G, *sizes), self.settings, N * G)[0].backward()

    # ------------------------------------------------------------ memory

    def static(self, s, role: str, learning: bool) -> dict[str, float]:
        """Bytes by part of weights, gradients and AdamW's state while the model `role` works."""
        count, width = parameters(self.models["policy"]), self.machine.width
        parts = {name: parameters(c) * width for name, c in self.models.items()}
        if s.offload:
            parts = {role: parts[role]}
        else:                                # an fp32 policy has no separate masters
            parts |= ({"masters": 4 * count} if width < 4 else {}) | {"moments": 8 * count}
        return parts | ({"gradients": 4 * count} if learning else {})

    def phases(self, s) -> dict[str, dict]:
        """Bytes by phase and part: {"solve": {"policy": ..., "cache": ..., "activations": ...}}."""
        N, G, text, found = s.queries, s.answers, self.text, {}
        asked, after = TURN + s.query_tokens, s.answer_tokens + TURN // 2
        judge = "judge" if "judge" in self.models else "reference"

        def phase(name: str, role: str, work, *shapes, held=0, **options):
            most = max(self.peak(role, work, *sizes, **options) for sizes in shapes)
            found[name] = self.static(s, role, name == "update") | (
                {"cache": held} if held else {}) | {"activations": most - held}

        def sampling(name: str, role: str, rows: int, each: int, S: int, T: int, common=0):
            B = min(rows, max(1, s.batch_tokens // (S + T)))
            held = B * (S + T) * token_cache(self.models[role], self.machine.width)
            phase(name, role, self.sampling, (B, -(-B // each), S, common, T), held=held)

        if text["challenger"]:
            sampling("challenge", "policy", N, N, text["challenger"], s.query_tokens)
        sampling("solve", "policy", N * G, G, asked, s.answer_tokens)
        if s.eval_prompts:               # as many as there are: as many as the sampler takes
            sampling("eval", "policy", 10**9, 1, asked, s.answer_tokens)
        tokens, pair = min(16384, s.batch_tokens), text["judge"] + text["shown"]
        if "reward model" in self.models:
            phase("reward", "reward model", self.scoring, (N, G, asked, after, tokens))
        if s.reading == "expected":
            phase("judge", judge, self.scoring, (N, G, pair, after, tokens))
        elif s.reading:
            sampling("judge", judge, N * G, 1, pair + s.answer_tokens, s.judge_tokens,
                     common=text["rubric"])
        rows = [(N, G, asked, s.answer_tokens, s.micro_batch_tokens)]
        if text["challenger"]:
            rows.append((1, N, text["challenger"], s.query_tokens, s.micro_batch_tokens))
        if s.beta:
            phase("reference", "reference", self.referring, *rows)
        phase("update", "policy", self.updating, *rows, checkpointing=s.checkpointing)
        if s.offload:                    # MasterAdamW streams two blocks of three tensors
            block = 24 * min(BLOCK, self.models["policy"].vocab_size
                             * self.models["policy"].hidden_size)
            found["update"]["activations"] = max(found["update"]["activations"], block)
        return found

    def host(self, s) -> dict[str, float]:
        """Bytes of host memory by part, beside the process itself, where the run is on a GPU."""
        count, width = parameters(self.models["policy"]), self.machine.width
        if self.machine.device != "cuda":
            return {}
        if not s.offload:
            return {"checkpoint": 4 * count}             # while it is written, a file at a time
        frozen = {r: parameters(c) * width for r, c in self.models.items() if r != "policy"}
        return frozen | {"masters": 4 * count, "moments": 8 * count}

    # ------------------------------------------------------------ what fits

    def spare(self, parts: dict) -> float:
        """Bytes that must stay free beside a phase's tensors."""
        work = sum(size for part, size in parts.items() if part not in STATIC)
        return SPARE_MEMORY * self.machine.memory + SPARE_WORK * work

    def missing(self, s, names=None) -> float:
        """Bytes by which these phases (default: all) exceed the memory, the spare included."""
        return max(sum(parts.values()) + self.spare(parts) - self.machine.memory
                   for name, parts in self.phases(s).items() if names is None or name in names)

    def exact(self, s) -> int:
        """Bytes of weights, gradients and AdamW's state in the update: nothing is executed."""
        return sum(self.static(s, "policy", True).values())

    def largest(self, s, fixed=()):
        """Settings with the largest sizes that fit; those that are fixed stay, and so do all where
        the weights alone do not fit."""
        if self.exact(s) > self.machine.memory:
            return s
        for key, sizes, names in (
                ("micro_batch_tokens", MICRO_BATCH_TOKENS, ("update", "reference")),
                ("batch_tokens", BATCH_TOKENS, ("challenge", "solve", "eval", "reward", "judge"))):
            tries = [replace(s, **{key: size}) for size in sizes if key not in fixed]
            s = next((tried for tried in tries if self.missing(tried, names) <= 0), s)
        return s

    def sized(self, s, fixed):
        """Settings with --batch-tokens and --micro-batch-tokens chosen for the GPU, unless they are
        in `fixed`. On a CPU the defaults stay. InputError where the weights alone do not fit."""
        if self.machine.device != "cuda":
            return s
        if self.exact(s) > self.machine.memory and not s.dry_run:
            raise InputError(f"{self.machine.memory / 1e9:.1f} GB ({self.machine.source}), and "
                             "weights, gradients and moments alone take "
                             f"{self.exact(s) / 1e9:.1f}: {self.advice(s)}")
        return self.largest(s, fixed)

    def advice(self, s) -> str:
        """"fits", or by how much it does not, with the first flags that make it fit."""
        short = self.missing(s)
        if short <= 0:
            return "fits"
        said = f"does not fit, {short / 1e9:.1f} GB short"
        offload = [{"offload": True}, {"offload": True, "checkpointing": True}]
        for change in [{}, {"checkpointing": True}, *offload * (self.machine.device == "cuda")]:
            tried = self.largest(replace(s, **change))
            sizes = ("batch_tokens", "micro_batch_tokens")       # they need not grow
            tried = replace(tried, **{k: min(getattr(tried, k), getattr(s, k)) for k in sizes})
            if self.missing(tried) <= 0:
                flags = [f"--{key.replace('_', '-')}" + f" {value}" * (value is not True)
                         for key, value in vars(tried).items() if value != getattr(s, key)]
                return f"{said}: {' '.join(flags)} would make it fit"
        flags = " ".join(f"--{key}" for key in sorted(change))
        return f"{said}, and with {flags} {self.missing(tried) / 1e9:.1f}"

    # ------------------------------------------------------------ in words

    def table(self, s) -> str:
        """Phases as columns, parts as rows; the last column is host memory."""
        columns = {name: parts | {"to stay free": self.spare(parts)}
                   for name, parts in self.phases(s).items()}
        columns |= {"host": self.host(s)} if self.host(s) else {}
        for parts in columns.values():
            parts["sum"] = sum(parts.values())
        name, unit = in_unit(parts["sum"] for parts in columns.values())
        names = dict.fromkeys(part for parts in columns.values() for part in parts if part != "sum")
        rows = [f"{name:18}" + "".join(f"{column:>10}" for column in columns)]
        for part in [*names, "sum"]:
            sizes = "".join(f"{parts.get(part, 0) / unit:10.2f}" for parts in columns.values())
            rows.append(f"{part:18}{sizes}")
        return "\n".join(rows)

    def opening(self, s) -> str:
        """The table in one line, for the start of a run."""
        peaks = {name: sum(parts.values()) for name, parts in self.phases(s).items()}
        name, unit = in_unit(peaks.values())
        sizes = "  ".join(f"{phase} {size / unit:.2f}" for phase, size in peaks.items())
        return (f"peaks, {name}     {sizes}  of {self.machine.memory / 1e9:.1f} GB "
                f"({self.machine.source}): {self.advice(s)}")

    def dry_run(self, s) -> int:
        """Print what the run would need; the exit code, 0 where it fits and 3 where it does not."""
        m, verdict, c = self.machine, self.advice(s), self.models["policy"]
        roles = ", ".join(f"{role} {parameters(c) / 1e9:.2f}" for role, c in self.models.items())
        switches = "  --checkpointing" * s.checkpointing + "  --offload" * s.offload
        print(f"{s.model}, {s.algo}, {s.queries} queries x {s.answers} answers, "
              f"{'bf16' if m.width == 2 else 'fp32'}; 1e9 parameters: {roles}\n"
              f"--batch-tokens {s.batch_tokens}  --micro-batch-tokens {s.micro_batch_tokens}"
              f"{switches}\n\n{self.table(s)}\n\n{m.memory / 1e9:.1f} GB ({m.source}): {verdict}")
        # Weights as they are stored, moments, and masters where the weights are rounded.
        stored = getattr(torch, c.dtype).itemsize
        checkpoint = parameters(c) * (stored + 8 + 4 * (min(stored, m.width) < 4)) / 1e9
        kept = s.keep + 1 if s.keep else s.steps // s.save_every
        print(f"a checkpoint takes {checkpoint:.1f} GB of disk, the run {kept * checkpoint:.1f} GB")
        return 0 if verdict == "fits" else 3
