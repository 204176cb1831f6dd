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
from contextlib import contextmanager
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
        self.known = {t.untyped_storage()._cdata for t in held}

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


@contextmanager
def on_meta(device: str):
    """Attention and the chunks of logits are those of `device`."""
    plain, chunks = F.scaled_dot_product_attention, logprobs.LOGITS_PER_CHUNK
    F.scaled_dot_product_attention = attention
    logprobs.LOGITS_PER_CHUNK = {"meta": chunks.get(device, chunks["cpu"])}
    try:
        yield
    finally:
        F.scaled_dot_product_attention, logprobs.LOGITS_PER_CHUNK = plain, chunks


# ---------------------------------------------------------------- what is there

@dataclass(frozen=True)
class Machine:
    device: str                      # cuda, cpu or mps
    width: int                       # bytes of a number in play
    memory: float                    # bytes that the run may have
    source: str                      # where that figure is from


def machine(s) -> Machine:
    """The GPU at hand, or the one that --gpu-memory imagines for a dry run, or this host."""
    given = f"--gpu-memory {s.gpu_memory:g} less {CUDA / 1e9:g} of CUDA's own"
    if s.dry_run and s.gpu_memory and not (s.device in ("auto", "cuda")
                                           and torch.cuda.is_available()):
        return Machine("cuda", 2, s.gpu_memory * 1e9 - CUDA, given)
    device, dtype = pick_device(s.device)
    if device.type == "cuda" and s.gpu_memory:
        return Machine("cuda", dtype.itemsize, s.gpu_memory * 1e9 - CUDA, given)
    if device.type == "cuda":
        return Machine("cuda", dtype.itemsize, torch.cuda.mem_get_info()[0],
                       "free on " + torch.cuda.get_device_name())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(device.type, dtype.itemsize, memory, "memory of this host")


def prompt_lengths(s) -> dict[str, int]:
    """Tokens of the prompt files, estimated from their letters: no tokenizer is read. `shown`: what
    the judge sees beside its instructions and the answer."""
    count = lambda text: math.ceil(len(text) / LETTERS)
    challenger, judge, shown = "", "", s.query_tokens
    if s.algo in ("lsp", "lsp-zero"):
        challenger = read_prompt(s.challenger_prompt)
    if s.self_reward:
        judge = read_prompt(s.self_reward_prompt)
    elif s.verdict:
        judge = read_prompt(HERE / "prompts" / f"verdict{'_strict' * s.strict}.txt")
        shown = SEGMENT * (1 if s.strict else s.reference_segments)
    return {"challenger": TURN + count(challenger) if challenger else 0,
            "judge": TURN + count(judge), "rubric": count(judge.split("{")[0]), "shown": shown}


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
        self.built = {}                  # models on meta, by role

    # ------------------------------------------------------------ what is executed

    def peak(self, role: str, work, *sizes) -> int:
        """Most bytes that are alive at once in work(model, *sizes), beside the model's weights."""
        c, m = self.models[role], self.machine
        key = (str(c), m.device, m.width, work.__name__, sizes)
        if key not in MEASURED:
            with on_meta(m.device):
                if role not in self.built:
                    with torch.device("meta"):
                        model = self.code.Llama(c)
                    model.frequencies = model.frequencies.to("meta")
                    self.built[role] = model.to({2: torch.bfloat16, 4: torch.float32}[m.width])
                model = self.built[role]
                for p in model.parameters() if work == self.updating else ():
                    p.grad_dtype = None                          # as MasterAdamW has it
                    p.grad = torch.empty_like(p, dtype=torch.float32)
                with Live(model) as live:
                    work(model, *sizes)
            MEASURED[key] = live.peak
        return MEASURED[key]

    @torch.inference_mode()
    def sampling(self, model, B: int, P: int, S: int, common: int, T: int):
        """The prefill of P prompts for B rows, and a decode step."""
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

    def rows(self, N: int, G: int, S: int, T: int) -> list:
        said = lambda i: self.code.Completion([i] * T, [0.0] * T, True)
        return [self.code.Row([n] * S, said(n * G + g), 0.0, [0.0] * T)
                for n in range(N) for g in range(G)]

    @torch.no_grad()
    def referring(self, model, N: int, G: int, S: int, T: int, tokens: int):
        batch = next(self.code.micro_batches(self.rows(N, G, S, T), tokens))
        self.code.token_log_probs(model, batch, 0.9)

    def updating(self, model, N: int, G: int, S: int, T: int, tokens: int, checkpointing: bool):
        """Forward and backward pass of a micro-batch, beside the gradients of earlier ones."""
        model.checkpointing = checkpointing
        batch = next(self.code.micro_batches(self.rows(N, G, S, T), tokens))
        self.code.batch_loss(model, batch, self.settings, N * G)[0].backward()

    # ------------------------------------------------------------ memory

    def phases(self, s) -> dict[str, dict]:
        """Bytes by phase and part: {"solve": {"policy": ..., "cache": ..., "activations": ...}}."""
        N, G, width, text, models = s.queries, s.answers, self.machine.width, self.text, self.models
        asked, count = TURN + s.query_tokens, parameters(models["policy"])
        frozen = {role: parameters(c) * width for role, c in models.items() if role != "policy"}
        policy = {"policy": count * width}
        # An fp32 policy is its own master.
        state = ({"masters": 4 * count} if width < 4 else {}) | {"moments": 8 * count}
        judge = "judge" if "judge" in models else "reference"
        found = {}

        def phase(name: str, role: str, *works: tuple, held=0):
            gradients = {"gradients": 4 * count} if name == "update" else {}
            if not s.offload:
                resident = policy | frozen | state | gradients
            else:
                resident = {role: frozen[role]} if role in frozen else policy | gradients
            most = max(self.peak(role, work, *sizes) for work, *sizes in works)
            work = {"cache": held} if held else {}
            found[name] = resident | work | {"activations": most - held}

        def sampling(name: str, role: str, rows: int, each: int, S: int, T: int, common=0):
            B = min(rows, max(1, s.batch_tokens // (S + T)))
            held = B * (S + T) * token_cache(models[role], width)
            phase(name, role, (self.sampling, B, -(-B // each), S, common, T), held=held)

        if text["challenger"]:
            sampling("challenge", "policy", N, N, text["challenger"], s.query_tokens)
        sampling("solve", "policy", N * G, G, asked, s.answer_tokens)
        if s.eval_prompts:               # as many as there are: as many as the sampler takes
            sampling("eval", "policy", 10**9, 1, asked, s.answer_tokens)
        tokens, pair = min(16384, s.batch_tokens), text["judge"] + text["shown"]
        after = s.answer_tokens + TURN // 2              # with what the template puts behind it
        if "reward model" in models:
            phase("reward", "reward model", (self.scoring, N, G, asked, after, tokens))
        if s.reading == "expected":
            phase("judge", judge, (self.scoring, N, G, pair, after, tokens))
        elif s.reading:
            sampling("judge", judge, N * G, 1, pair + s.answer_tokens, s.judge_tokens,
                     common=text["rubric"])
        rows = [(N, G, asked, s.answer_tokens)]
        if text["challenger"]:
            rows.append((1, N, text["challenger"], s.query_tokens))
        size = s.micro_batch_tokens
        if s.beta:
            phase("reference", "reference", *((self.referring, *row, size) for row in rows))
        phase("update", "policy", *((self.updating, *row, size, s.checkpointing) for row in rows))
        if s.offload:                    # MasterAdamW streams two blocks of three tensors
            block = 24 * min(BLOCK, models["policy"].vocab_size * models["policy"].hidden_size)
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

    def exact(self, s) -> int:
        """Bytes of weights, gradients and AdamW's state on the GPU at most: nothing is executed."""
        count, width = parameters(self.models["policy"]), self.machine.width
        frozen = [parameters(c) * width for role, c in self.models.items() if role != "policy"]
        working = count * (width + 4)                            # the policy and its gradients
        if s.offload:
            return max(working, *frozen, 0)
        return working + sum(frozen) + count * (8 + 4 * (width < 4))

    def missing(self, s, names=None) -> float:
        """Bytes by which these phases (default: all) exceed the memory, the spare included."""
        phases = self.phases(s)
        return max(sum(phases[name].values()) + self.spare(phases[name]) - self.machine.memory
                   for name in phases if names is None or name in names)

    def spare(self, parts: dict) -> float:
        """Bytes that must stay free beside a phase's tensors."""
        work = sum(size for part, size in parts.items() if part not in STATIC)
        return SPARE_MEMORY * self.machine.memory + SPARE_WORK * work

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
        s = self.largest(s, fixed)
        if self.exact(s) > self.machine.memory and not s.dry_run:
            raise InputError(f"{self.machine.memory / 1e9:.1f} GB ({self.machine.source}), and "
                             "weights, gradients and moments alone take "
                             f"{self.exact(s) / 1e9:.1f}: {self.advice(s)}")
        return s

    def advice(self, s) -> str:
        """"fits", or by how much it does not, with the first flags that make it fit."""
        short = self.missing(s)
        if short <= 0:
            return "fits"
        said = f"does not fit, {short / 1e9:.1f} GB short"
        for change in ({}, {"checkpointing": True}, {"offload": True},
                       {"offload": True, "checkpointing": True}):
            tried = self.largest(replace(s, **change))
            sizes = ("batch_tokens", "micro_batch_tokens")       # they need not grow
            tried = replace(tried, **{k: min(getattr(tried, k), getattr(s, k)) for k in sizes})
            if self.missing(tried) <= 0:
                flags = [f"--{key.replace('_', '-')}" + f" {value}" * (value is not True)
                         for key, value in vars(tried).items() if value != getattr(s, key)]
                return f"{said}: {' '.join(flags)} would make it fit"
        return f"{said}, and with --checkpointing --offload {self.missing(tried) / 1e9:.1f}"

    # ------------------------------------------------------------ in words

    def checkpoint_bytes(self) -> int:
        """Weights as they are stored, moments, and masters where the weights are rounded ones."""
        c = self.models["policy"]
        stored = getattr(torch, c.dtype).itemsize
        masters = 4 * (min(stored, self.machine.width) < 4)
        return parameters(c) * (stored + 8 + masters) + 2**20

    def table(self, s) -> str:
        """Phases as columns, parts as rows; the last column is host memory."""
        columns = {name: parts | {"to stay free": self.spare(parts)}
                   for name, parts in self.phases(s).items()}
        columns |= {"host": self.host(s)} if self.host(s) else {}
        unit, name = (1e9, "GB") if self.machine.memory > 1e9 else (1e6, "MB")
        names = [*dict.fromkeys(part for parts in columns.values() for part in parts), "sum"]
        rows = [f"{name:18}" + "".join(f"{column:>10}" for column in columns)]
        for part in names:
            sizes = [sum(parts.values()) if part == "sum" else parts.get(part, 0)
                     for parts in columns.values()]
            rows.append(f"{part:18}" + "".join(f"{size / unit:10.2f}" for size in sizes))
        return "\n".join(rows)

    def opening(self, s) -> str:
        """The table in one line, for the start of a run."""
        peaks = {name: sum(parts.values()) for name, parts in self.phases(s).items()}
        name, unit = ("GB", 1e9) if max(peaks.values()) > 1e9 else ("MB", 1e6)
        sizes = "  ".join(f"{phase} {size / unit:.2f}" for phase, size in peaks.items())
        return (f"peaks, {name}     {sizes}  of {self.machine.memory / 1e9:.1f} GB "
                f"({self.machine.source}): {self.advice(s)}")

    def dry_run(self, s) -> int:
        """Print what the run would need; the exit code, 0 where it fits and 3 where it does not."""
        m, verdict, checkpoint = self.machine, self.advice(s), self.checkpoint_bytes() / 1e9
        roles = ", ".join(f"{role} {parameters(c) / 1e9:.2f}" for role, c in self.models.items())
        switches = "  --checkpointing" * s.checkpointing + "  --offload" * s.offload
        print(f"{s.model}, {s.algo}, {s.queries} queries x {s.answers} answers, "
              f"{'bf16' if m.width == 2 else 'fp32'}; 1e9 parameters: {roles}\n"
              f"--batch-tokens {s.batch_tokens}  --micro-batch-tokens {s.micro_batch_tokens}"
              f"{switches}\n\n{self.table(s)}\n\n{m.memory / 1e9:.1f} GB ({m.source}): {verdict}")
        kept = s.keep + 1 if s.keep else s.steps // s.save_every
        print(f"a checkpoint takes {checkpoint:.1f} GB of disk, the run {kept * checkpoint:.1f} GB")
        return 0 if verdict == "fits" else 3
