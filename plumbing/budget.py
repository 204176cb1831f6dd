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
from dataclasses import replace
from functools import cache
from unittest.mock import patch
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from plumbing import logprobs
from plumbing.cache import prefill
from plumbing.config import Config
from plumbing.files import HERE, InputError, find_model, pick_device, prompt_file, read_prompt
from plumbing.log import wrapped

CUDA = 0.7e9                 # bytes of CUDA's context, kernels and cuBLAS workspaces
# What must stay free: a fraction of the memory for the allocator's gaps, and a fraction of what is
# measured, for the meta kernels are not the real ones.
SPARE_MEMORY, SPARE_WORK = 0.03, 0.1
# Where the batch sizes are chosen, they are halved from the largest as long as they do not fit.
LARGEST, LEAST = {"batch_tokens": 2**18, "micro_batch_tokens": 2**13}, 2**9
TURN = 40                    # tokens that a chat template adds to a text, Llama 3's date included
LETTERS = 3.5                # of a token. English prose has about 4; our prompts have 3.7 to 4.3
SEGMENT = 64                 # tokens of a long sentence


# ---------------------------------------------------------------- bytes that are alive

class Live(TorchDispatchMode):
    """Counts the bytes of the meta storages that are made while it is active and still exist."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakSet(p.untyped_storage() for p in model.parameters())    # not counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) and t.is_meta else None
            if storage is not None and storage not in self.known:
                size = -(-storage.nbytes() // 512) * 512                   # as CUDA's allocator
                self.known.add(storage)
                self.count(size)
                weakref.finalize(storage, self.count, -size)
        return out

    def count(self, size: int):
        self.now += size
        self.peak = max(self.peak, self.now)


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """The fused CUDA kernels' meta form. Meta tensors would otherwise get the plain formula, with
    the whole (T, S) matrix."""
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    bias = attn_mask.expand(-1, k.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled())[0]


# ---------------------------------------------------------------- sizes from arithmetic

def machine(s) -> tuple[str, torch.dtype, float, str]:
    """The device's type, the dtype to compute in, the bytes that the run may use, and where that
    number comes from. In a dry run the GPU of --gpu-memory need not exist."""
    if s.gpu_memory:
        dtype = pick_device("cuda")[1] if torch.cuda.is_available() else torch.bfloat16
        return ("cuda", dtype, s.gpu_memory * 1e9 - CUDA,
                f"--gpu-memory {s.gpu_memory:g} less {CUDA / 1e9:g} of CUDA's own")
    device, dtype = pick_device(s.device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        return "cuda", dtype, torch.cuda.mem_get_info()[0], f"free on {name}"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return device.type, dtype, memory, "memory of this host"


def prompt_lengths(s) -> dict[str, int]:
    """Tokens of the prompt files, estimated from their letters: no tokenizer is loaded. "shown":
    what the judge sees beside its instructions and the answer."""
    count = lambda text: math.ceil(len(text) / LETTERS)
    own, judge, shown, path = 0, "", s.query_tokens, find_model(s.model, weights=False)
    if s.algo in ("lsp", "lsp-zero"):
        own = TURN + count(read_prompt(s.challenger_prompt or prompt_file(path, "challenger")))
    if s.self_reward:
        judge = read_prompt(s.self_reward_prompt or prompt_file(path, "self_reward"))
    elif s.verdict:
        judge = read_prompt(HERE / "prompts" / f"verdict{'_strict' * s.strict}.txt")
        shown = SEGMENT * (1 if s.strict else s.reference_segments)
    return {"challenger": own, "judge": TURN + count(judge), "rubric": count(judge.split("{")[0]),
            "shown": shown}


# ---------------------------------------------------------------- the plan

class Plan:
    """What a run needs. models: Config by role ("policy", "reference", "judge", "reward model").

    code: the functions that are executed on meta tensors: Llama, Row, Completion, pick,
    last_hidden, micro_batches, token_log_probs, batch_loss.
    text: prompt_lengths(), where they are known better.
    """

    def __init__(self, s, models: dict[str, Config], code, text: dict | None = None):
        self.settings, self.models, self.code = s, models, code
        self.text = text or prompt_lengths(s)
        self.device, self.dtype, self.memory, self.source = machine(s)
        self.counts = {role: sum(p.numel() for p in self.meta(role).parameters())
                       for role in models}                                   # of weights
        self.weights = {role: n * self.dtype.itemsize for role, n in self.counts.items()}
        self.count = self.counts["policy"]
        self.measure = cache(self.measure)           # nothing is executed twice

    # ------------------------------------------------------------ what is executed

    def meta(self, role: str):
        """A model of this role on the meta device."""
        with torch.device("meta"):
            return self.code.Llama(self.models[role]).to(self.dtype)

    def measure(self, role: str, work, *sizes) -> dict[str, int]:
        """Bytes of work(model, *sizes) by part, beside the model's weights: what `work` returns as
        its own, and the rest of the peak as activations."""
        model, chunks = self.meta(role), logprobs.LOGITS_PER_CHUNK
        with (patch.dict(chunks, meta=chunks.get(self.device, chunks["cpu"])),
              patch.object(F, "scaled_dot_product_attention", attention), Live(model) as live):
            held = work(model, *sizes) or {}
        return held | {"activations": live.peak - sum(held.values())}

    @torch.inference_mode()
    def sampling(self, model, B: int, P: int, S: int, common: int, T: int) -> dict[str, int]:
        """The prefill of P prompts for B rows, and a decode step with its draw."""
        prompts = [[0] * common + [1 + p] * (S - common) for p in range(P)]
        logits, held = prefill(model, prompts, torch.arange(B) * P // B, S + T)
        uniform = torch.empty(B, dtype=torch.float64, device="meta")
        token, _ = self.code.pick(logits, 0.9, uniform)
        self.code.pick(model.logits(model(token[:, None], cache=held)[:, -1]), 0.9, uniform)
        return {"cache": sum(t.nbytes for t in held.k + held.v)}

    def rows(self, N: int, G: int, S: int, T: int) -> list:
        """N prompts of S tokens with G completions of T tokens each."""
        return [self.code.Row([n] * S, self.code.Completion([n * G + g] * T, [0.0] * T, True), 0.0,
                              [0.0] * T) for n in range(N) for g in range(G)]

    def scoring(self, model, tokens: int, N: int, G: int, S: int, T: int):
        """The first pass of the reward model or the judge, with at most so many tokens."""
        rows = self.rows(N, G, S, T)[:max(1, tokens // (S + T))]
        self.code.last_hidden(model, [row.prompt + row.completion.tokens for row in rows],
                              [row.prompt[0] for row in rows], tokens)

    @torch.no_grad()
    def referring(self, model, tokens: int, *sizes):
        """The reference's log-probs of a micro-batch."""
        self.code.token_log_probs(
            model, next(self.code.micro_batches(self.rows(*sizes), tokens)), 0.9)

    def updating(self, model, checkpointing: bool, tokens: int, *sizes) -> dict[str, int]:
        """Forward and backward pass of a micro-batch, beside the gradients of earlier ones."""
        model.checkpointing = checkpointing
        for p in model.parameters():
            p.grad_dtype = None                                  # as MasterAdamW has it
            p.grad = torch.empty_like(p, dtype=torch.float32)
        batch = next(self.code.micro_batches(self.rows(*sizes), tokens))
        self.code.batch_loss(model, batch, self.settings, 1)[0].backward()
        return {"gradients": sum(p.grad.nbytes for p in model.parameters())}

    # ------------------------------------------------------------ memory

    def static(self, s, role: str) -> dict[str, int]:
        """Bytes by part of weights and AdamW's state while the model `role` works."""
        if s.offload:
            return {role: self.weights[role]}
        apart = {"masters": 4 * self.count} if self.dtype != torch.float32 else {}
        return self.weights | apart | {"moments": 8 * self.count}

    def host(self, s) -> dict[str, int]:
        """Bytes of host memory by part, beside the process itself, of a run on a GPU."""
        if not s.offload:
            return {"checkpoint": 4 * self.count}        # while it is written, a file at a time
        frozen = {role: size for role, size in self.weights.items() if role != "policy"}
        return frozen | {"masters": 4 * self.count, "moments": 8 * self.count}

    def phases(self, s) -> dict[str, dict]:
        """Bytes by phase and part: {"solve": {"policy": ..., "cache": ..., "activations": ...}}."""
        N, G, text, found = s.queries, s.answers, self.text, {}
        asked, after = TURN + s.query_tokens, s.answer_tokens + TURN // 2
        tokens, pair = min(16384, s.batch_tokens), text["judge"] + text["shown"]
        judge = "judge" if "judge" in self.models else "reference"
        rows = [(s.micro_batch_tokens, N, G, asked, s.answer_tokens)]

        def add(name: str, role: str, work, *shapes):
            most = max((self.measure(role, work, *sizes) for sizes in shapes),
                       key=lambda parts: sum(parts.values()))
            found[name] = self.static(s, role) | most

        def sampling(name: str, role: str, count: int, each: int, S: int, T: int, common: int = 0):
            """The sampler's first batch of `count` rows, of which `each` begin with one prompt."""
            B = min(count, max(1, s.batch_tokens // (S + T)))
            add(name, role, self.sampling, (B, -(-B // each), S, common, T))

        if text["challenger"]:
            sampling("challenge", "policy", N, N, text["challenger"], s.query_tokens)
            rows.append((s.micro_batch_tokens, 1, N, text["challenger"], s.query_tokens))
        if s.algo != "sft":
            sampling("solve", "policy", N * G, G, asked, s.answer_tokens)
        if s.eval_prompts:               # as many as there are: as many as the sampler takes
            sampling("eval", "policy", 10**9, 1, asked, s.answer_tokens)
        if "reward model" in self.models:
            add("reward", "reward model", self.scoring, (tokens, N, G, asked, after))
        if s.reading == "expected":
            add("judge", judge, self.scoring, (tokens, N, G, pair, after))
        elif s.reading:
            sampling("judge", judge, N * G, 1, pair + s.answer_tokens, s.judge_tokens,
                     text["rubric"])
        if s.beta:
            add("reference", "reference", self.referring, *rows)
        add("update", "policy", self.updating, *[(s.checkpointing, *sizes) for sizes in rows])
        return found

    def checkpoint_bytes(self) -> int:
        """Bytes on disk of the weights as they are stored, moments, and masters where the weights
        are rounded: 6.4 + 38.6 GB for Llama-3.2-3B, stored in bf16."""
        stored = getattr(torch, self.models["policy"].dtype).itemsize
        rounded = stored < 4 or self.dtype != torch.float32
        return self.count * (stored + 8 + 4 * rounded)

    # ------------------------------------------------------------ what fits

    def needs(self, s) -> dict[str, dict]:
        """phases() with the bytes that must stay free in each."""
        needs = self.phases(s)
        for parts in needs.values():
            work = parts.get("cache", 0) + parts["activations"]
            parts["to stay free"] = SPARE_MEMORY * self.memory + SPARE_WORK * work
        return needs

    def missing(self, s) -> dict[str, float]:
        """Bytes by which phases exceed the memory, of those that do."""
        sums = {name: sum(parts.values()) for name, parts in self.needs(s).items()}
        return {name: size - self.memory for name, size in sums.items() if size > self.memory}

    def exact(self, s) -> int:
        """Bytes of weights, gradients and AdamW's state in the update: nothing is executed."""
        return sum(self.static(s, "policy").values()) + 4 * self.count

    def shrink(self, s, fixed=()):
        """Settings with the batch sizes halved until all phases fit. Those that are `fixed` stay,
        and so do all where the weights alone do not fit."""
        while self.exact(s) <= self.memory:
            keys = {"micro_batch_tokens" if name in ("reference", "update") else "batch_tokens"
                    for name in self.missing(s)}
            smaller = {key: getattr(s, key) // 2 for key in keys.difference(fixed)
                       if getattr(s, key) > LEAST}
            if not smaller:
                break
            s = replace(s, **smaller)
        return s

    def sized(self, s, fixed):
        """Settings with the largest batch sizes that fit the GPU, unless they are in `fixed`. On a
        CPU the defaults stay. InputError where the weights alone do not fit."""
        if self.device != "cuda":
            return s
        if self.exact(s) <= self.memory:
            chosen = {key: size for key, size in LARGEST.items() if key not in fixed}
            return self.shrink(replace(s, **chosen), fixed)
        if not s.dry_run:
            raise InputError(self.verdict(s))
        return s

    def advice(self, s) -> str:
        """"fits", or by how much it does not, with the first flags that make it fit."""
        if not self.missing(s):
            return "fits"
        short = lambda s: f"{max(self.missing(s).values()) / 1e9:.1f}"
        said = f"does not fit, {short(s)} GB short"
        changes = [{}, {"checkpointing": True}, {"checkpointing": True, "offload": True}]
        for change in changes[:3 if self.device == "cuda" else 2]:
            tried = self.shrink(replace(s, **change))
            if not self.missing(tried):
                flags = [f"--{key.replace('_', '-')}" + f" {value}" * (value is not True)
                         for key, value in vars(tried).items() if value != getattr(s, key)]
                return f"{said}: {' '.join(flags)} would make it fit"
        flags = " ".join(f"--{key}" for key in change)
        return f"{said}, and with {flags} {short(tried)}"

    def verdict(self, s) -> str:
        """The memory that there is, and whether the run fits."""
        return f"{self.memory / 1e9:.1f} GB ({self.source}): {self.advice(s)}"

    # ------------------------------------------------------------ in words

    def table(self, s) -> str:
        """Phases as columns, parts as rows; the last column is host memory."""
        columns = self.needs(s)
        if self.device == "cuda":
            columns["host"] = self.host(s)
        names = dict.fromkeys(part for parts in columns.values() for part in parts)
        lines = [f"{'GB':18}" + "".join(f"{column:>10}" for column in columns)]
        for part in [*names, "sum"]:
            sizes = [sum(parts.values()) if part == "sum" else parts.get(part, 0)
                     for parts in columns.values()]
            lines.append(f"{part:18}" + "".join(f"{size / 1e9:10.2f}" for size in sizes))
        return "\n".join(lines)

    def opening(self, s) -> str:
        """The phases' peaks, for the start of a run."""
        peaks = "  ".join(f"{phase} {sum(parts.values()) / 1e9:.2f}"
                          for phase, parts in self.phases(s).items())
        return wrapped(f"{peaks}  of {self.verdict(s)}", "peaks, GB     ")

    def dry_run(self, s) -> int:
        """Print what the run would need; the exit code, 0 where it fits and 3 where it does not."""
        roles = ", ".join(f"{role} {n / 1e9:.2f}" for role, n in self.counts.items())
        print(f"{s.model}, {s.algo}, {s.queries} queries x {s.answers} answers, "
              f"{'fp32' if self.dtype == torch.float32 else 'bf16'}; 1e9 parameters: {roles}")
        print(f"--batch-tokens {s.batch_tokens}  --micro-batch-tokens {s.micro_batch_tokens}"
              + "  --checkpointing" * s.checkpointing + "  --offload" * s.offload)
        print(f"\n{self.table(s)}\n\n{self.verdict(s)}")
        checkpoint = self.checkpoint_bytes() / 1e9
        kept = s.keep + 1 if s.keep else s.steps // s.save_every
        print(f"a checkpoint takes {checkpoint:.1f} GB of disk, the run {kept * checkpoint:.1f} GB")
        return 3 if self.missing(s) else 0
