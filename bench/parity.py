"""The first minutes on a GPU: is what runs there right? bench/gpu.py calls these checks.

Each check takes gpu.py's arguments and returns a dictionary of what it found; a word says what is
expected. Models have random weights in the shape's exact widths, but --check-layers layers.
"""
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sample as sampler
from plumbing.memory import MasterAdamW, Stage, to_host
from plumbing.settings import Settings
from train import Game, Row, accumulate, reference_log_probs, token_log_probs

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("MATH", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
NEW = 96                             # tokens of the longest completion


def on_gpu(args) -> bool:
    return args.where.type == "cuda"


def wait(args):
    if on_gpu(args):
        torch.cuda.synchronize()


def held(args) -> int:
    return torch.cuda.memory_allocated() if on_gpu(args) else 0


def prompts_of(args) -> list[list[int]]:
    """Four prompts of 20 to 47 tokens."""
    count = args.vocabulary_size
    return [[(7 * i + j) % count for j in range(20 + 9 * i)] for i in range(4)]


def play(args, model) -> list:
    """16 completions of at most 96 tokens; one token in 97 ends one. Rows leave a graph as soon as
    half have ended."""
    limits = [NEW // 3, NEW // 2, NEW, NEW] * 4
    with mock.patch.object(sampler, "CAPTURE_COST", 1):
        return sampler.sample(model, prompts_of(args), num_samples=4, max_new_tokens=limits,
                              stop_ids=set(range(0, args.vocabulary_size, 97)),
                              generator=torch.Generator().manual_seed(3))


def rows_of(args, groups: list) -> list[Row]:
    return [Row(prompt, completion, 0.3 * i - 0.4)
            for prompt, group in zip(prompts_of(args), groups)
            for i, completion in enumerate(group)]


# ---------------------------------------------------------------- checks

def machine(args) -> dict:
    """What was measured on."""
    if not on_gpu(args):
        return {"device": "cpu", "torch": torch.__version__}
    free, total = torch.cuda.mem_get_info()
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "free_gb": free / 1e9, "total_gb": total / 1e9}


def attention_backends(args) -> dict:
    """Masked attention on each backend, in training: largest difference of log-probs, and relative
    difference of a layer's gradient, to the plain formula (math). Expected: bf16's rounding."""
    model = args.build(seed=2)
    rows = [Row(prompt, sampler.Completion([5] * 40, [0.0] * 40, False), 1.0)
            for prompt in prompts_of(args) for _ in range(4)]
    found, plain = {}, None
    for name in (*BACKENDS, "chosen by PyTorch"):
        model.zero_grad()
        try:
            if name in BACKENDS:
                # The prompts have no mask, so that the backend may be joined by the flash kernel.
                chosen = [getattr(SDPBackend, name)] + [
                    SDPBackend.FLASH_ATTENTION] * (name != "MATH")
                with sdpa_kernel(chosen):
                    logp, _ = token_log_probs(model, rows, 1.0)                      # (B, T)
                    logp.sum().backward()
            else:
                logp, _ = token_log_probs(model, rows, 1.0)
                logp.sum().backward()
            wait(args)
        except RuntimeError as error:                    # this machine has no such kernel
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad.float()
        logp = logp.detach().float()
        plain = plain or (logp, gradient)
        found[name] = {"logp": (logp - plain[0]).abs().max().item(),
                       "gradient": ((gradient - plain[1]).norm() / plain[1].norm()).item()}
    return found


def graph_is_eager(args) -> dict:
    """Decoding with CUDA graphs against decoding without. Expected: all rows have the same tokens,
    or part late, at a token on the edge; and again the same."""
    model = args.build(seed=2)
    graph = [c for group in play(args, model) for c in group]
    uses, sampler.uses_graphs = sampler.uses_graphs, lambda device: False
    try:
        eager = [c for group in play(args, model) for c in group]
    finally:
        sampler.uses_graphs = uses
    again = [c for group in play(args, model) for c in group]
    alike = lambda a, b: next((t for t, pair in enumerate(zip(a.tokens, b.tokens))
                               if pair[0] != pair[1]), len(a.tokens)) / len(a.tokens)
    return {"rows": len(graph), "same_tokens": sum(a.tokens == b.tokens
                                                   for a, b in zip(graph, eager)),
            "alike_before_parting": statistics.mean(map(alike, graph, eager)),
            "first_logp_difference": max(abs(a.logp[0] - b.logp[0])
                                         for a, b in zip(graph, eager)),
            "again_the_same": [c.tokens for c in again] == [c.tokens for c in graph]}


def sampler_is_trainer(args) -> dict:
    """Log-probs of the sampler against the trainer's, nats a token. Expected in bf16: mean at most
    .02, 99.9th percentile at most .3."""
    model = args.build(seed=2)
    rows = rows_of(args, play(args, model))
    with torch.no_grad():
        logp, mask = token_log_probs(model, rows, 1.0)                               # (B, T)
    sampled = torch.tensor([x for row in rows for x in row.completion.logp])
    difference = (logp[mask.bool()].float().cpu() - sampled).abs().double()          # (M,)
    return {"tokens": len(difference), "mean": difference.mean().item(),
            "p99.9": difference.quantile(0.999).item(), "max": difference.max().item()}


def nothing_stays(args) -> dict:
    """Captured steps and their caches after sample(). Expected: none alive, and no memory kept
    (but for a stream's workspace, at the first call)."""
    model = args.build(seed=2)
    play(args, model)
    made, begin = [], sampler.CapturedStep.__init__

    def seen(step, model, cache):
        begin(step, model, cache)
        made.extend((weakref.ref(step), weakref.ref(cache)))

    gc.collect()
    before, sampler.CapturedStep.__init__ = held(args), seen
    try:
        play(args, model)
    finally:
        sampler.CapturedStep.__init__ = begin
    return {"captures": len(made) // 2, "alive": sum(one() is not None for one in made),
            "mb_kept": (held(args) - before) / 1e6}


def update_again_and_offloaded(args) -> dict:
    """Two updates; the same again; the same with --offload: largest difference of any weight.
    Expected: 0 where the attention kernel adds in a fixed order, else about the learning rate."""
    model = args.build(seed=2)
    rows = rows_of(args, play(args, model))
    del model

    def run(offload: bool) -> tuple[list, list]:
        s = Settings(model="tiny", offload=offload, micro_batch_tokens=400)
        policy = args.build(seed=2, dtype=torch.float32)
        policy.checkpointing = True
        game = Game(s, policy, None, None, args.build(seed=4))
        optimizer = MasterAdamW(policy, args.dtype, weight_decay=0.0, offload=offload)
        if offload:
            to_host(game.reference)
            game.phase.stage = Stage(args.where, args.dtype)
        norms = []
        for _ in range(2):
            game.phase.load(game.reference)
            reference_log_probs(game, rows)
            game.phase.load(policy)
            accumulate(game, rows, 1.0)
            norms.append(optimizer.step(1e-5, 1.0))
        return norms, [master.detach().cpu().clone() for master in optimizer.masters]

    first, again, offloaded = run(False), run(False), run(True)
    apart = lambda other: {"same_norms": first[0] == other[0], "largest": max(
        (a - b).abs().max().item() for a, b in zip(first[1], other[1]))}
    return {"norms": first[0], "again": apart(again), "offloaded": apart(offloaded)}


def new_shapes(args) -> dict:
    """Milliseconds of masked attention's first and second call at a shape, forward and backward,
    with cuDNN's attention on and off. Expected: on, the first call is far slower."""
    found, rows = {}, 8 if on_gpu(args) else 1
    for on in (True, False) if on_gpu(args) else (False,):
        if on_gpu(args):
            torch.backends.cuda.enable_cudnn_sdp(on)
        first, again = [], []
        for T in (301, 333, 377) if on_gpu(args) else (30, 33, 37):
            for times in (first, again):
                q, k = (torch.randn(rows, 8, length, 128, device=args.where, dtype=args.dtype,
                                    requires_grad=True) for length in (3 * T, T + 291))
                mask = torch.zeros(rows, 1, 3 * T, -(-(T + 291) // 16) * 16, device=args.where,
                                   dtype=args.dtype)[..., :T + 291]
                wait(args)
                begun = time.perf_counter()
                F.scaled_dot_product_attention(q, k, k, attn_mask=mask).sum().backward()
                wait(args)
                times.append(1e3 * (time.perf_counter() - begun))
        found["cudnn on" if on else "cudnn off"] = {
            "first_ms": statistics.median(first), "again_ms": statistics.median(again)}
    return found                                           # off at the end, as pick_device has it


CHECKS = (machine, attention_backends, graph_is_eager, sampler_is_trainer, nothing_stays,
          update_again_and_offloaded, new_shapes)


# ---------------------------------------------------------------- the embedded game

def game_section(args) -> dict:
    """The embedded game on the device: 8 steps with --gpu-memory; the same resumed from step 5.
    Expected: close, and the same where kernels add in a fixed order."""
    def train(*flags):
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.child_timeout)
        if done.returncode:
            raise RuntimeError(f"train.py ended with {done.returncode}: {done.stderr[-600:]}")

    folder = Path(tempfile.mkdtemp())
    whole, resumed = folder / "whole", folder / "resumed"
    memory = ["--gpu-memory", "20"] if on_gpu(args) else []
    train("--device", args.device, "--steps", "8", "--save-every", "5", "--keep", "0",
          "--queries", "8", "--eval-every", "1000", *memory, "--out", str(whole))
    shutil.copytree(whole, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoint-000008")
    (resumed / "checkpoint").unlink()
    os.symlink("checkpoint-000005", resumed / "checkpoint")
    train("--resume", str(resumed))
    read = lambda run: [json.loads(line) for line in (run / "metrics.jsonl").open()]
    pairs = list(zip(read(whole), read(resumed), strict=True))
    weights = [file_tensors(run / "checkpoint/model.safetensors") for run in (whole, resumed)]
    return {"steps": len(pairs), "reward": [one["reward"] for one, _ in pairs],
            "logp_difference": max(one["logp_difference"] for one, _ in pairs),
            "same_rewards": sum(one["reward"] == other["reward"] for one, other in pairs),
            "largest_weight_difference": max((weights[0][name] - weights[1][name]).abs().max(
                ).item() for name in weights[0])}


def file_tensors(file: Path) -> dict:
    from safetensors.torch import load_file
    return load_file(file)
