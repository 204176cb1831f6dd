"""Peak memory of sampler, update and whole step: its growth with completion tokens, and the peers'.

    python bench/memory.py --out bench/results/memory.jsonl
    python bench/memory.py --only slope
    python bench/memory.py --only peers --checkpointing

Each figure is one run in a fresh process: resident memory once models and AdamW's moments are
there (idle), then the kernel's high-water mark over the run (VmHWM, reset in between). CPU and
Linux only. glibc gives blocks above 32 MB back at once and may keep smaller ones, so that a peak
can lie a little above what the tensors need; that holds for all sides alike.
"""
import gc
import json
import time
from dataclasses import replace
from pathlib import Path

import measure  # first: it puts the project's folder before bench/
import numpy as np
import sampler
import step
import torch
from measure import Load, resident

from plumbing.cli import run_script

PREPARE = {"sampler": sampler.prepare, "update": step.prepare_update, "grpo": step.prepare_grpo}
# A peer beside ours: in it the (B, T, V) tensors must show, else the measurement is blind.
SLOPES = [("sampler", "ours"), ("update", "ours"), ("grpo", "ours"),
          ("update", "transformers-kept")]


def child(what: str, side: str, load: Load) -> dict:
    """One measured run, in this process."""
    if side != "ours":
        from transformers import LlamaForCausalLM  # noqa: F401
    if side.startswith("trl"):
        from trl import GRPOTrainer  # noqa: F401
    libraries = resident("VmRSS")
    run = PREPARE[what](side, load)
    gc.collect()
    idle = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")        # the high-water mark starts anew
    begun = time.perf_counter()
    run()
    return {"libraries": libraries, "idle": idle, "peak": resident("VmHWM"),
            "seconds": time.perf_counter() - begun}


def slopes(args, base: Load) -> list[dict]:
    """Growth over idle against completion tokens, at each vocabulary; least squares.

    All rows go in one pass, so that nothing but the length of the completions changes. A tensor of
    (B, T, V) in fp32 costs 4 bytes a token and vocabulary entry: `per_entry` is the slope's growth
    from the least to the greatest vocabulary in that unit. The body is --slope-shape, a small one:
    a real one's activations would hide such a term, and do not depend on V (bench/step.py --curves
    has them). Lengths begin where log-probs fill a chunk (logprobs.LOGITS_PER_CHUNK): up to there
    logits grow with the tokens, then no more.
    """
    results, vocabularies, lengths = [], args.vocabularies, args.lengths
    for what, side in SLOPES:
        if not measure.chosen(args, f"slope {what} {side}"):
            continue
        points, slope = [], {}
        for V in vocabularies:
            for length in lengths:
                load = replace(base, vocabulary=V, new_tokens=length, micro_rows=1024)
                figures = measure.in_child(what, side, load) or {}
                if figures:
                    points.append({"vocabulary": V, "tokens": load.rows * length,
                                   "growth": figures["peak"] - figures["idle"]} | figures)
            at = [p for p in points if p["vocabulary"] == V]
            if at:
                slope[V] = np.polyfit([p["tokens"] for p in at], [p["growth"] for p in at], 1)[0]
        result = {"what": what, "side": side, "points": points}
        if not points:
            results.append(result | {"skipped": measure.missing(side)})
            continue
        small, great = min(slope), max(slope)
        results.append(result | {
            "bytes_per_token": {V: value * 1e9 for V, value in slope.items()},
            "per_entry": (slope[great] - slope[small]) * 1e9 / max(1, great - small)})
    return results


def slope_table(results: list[dict]) -> str:
    lines = []
    for r in results:
        if "skipped" in r:
            lines.append((r["what"], r["side"], f"skipped: {r['skipped']}", "", "", ""))
            continue
        for V, bytes_per_token in r["bytes_per_token"].items():
            growth = [f"{p['growth']:.3f}" for p in r["points"] if p["vocabulary"] == V]
            entry = f"{r['per_entry']:.2f}" if V == max(r["bytes_per_token"]) else ""
            lines.append((r["what"], r["side"], V, ", ".join(growth),
                          f"{bytes_per_token / 1e3:.0f}", entry))
    return measure.markdown(("what", "side", "V", "GB over idle", "kB a token",
                             "bytes a token and entry of V (one fp32 (B, T, V): 4)"), lines)


def compared(args, base: Load) -> list[tuple]:
    """(name, what, sides, load) of the workloads whose peak memory stands beside the peers'."""
    whole = replace(base, prompts=4, checkpointing=args.checkpointing)
    return [*((f"update {base.name}, V {V}", "update", ("ours", *step.PEERS),
               replace(base, vocabulary=V)) for V in args.vocabularies),
            (f"grpo {whole.name}", "grpo", ("ours", "trl"), whole)]


def main():
    parser = measure.parser("Peak memory, ours and the peers'.", pairs=1)
    parser.add_argument("--child", help="JSON: measure one run in this process and print it")
    parser.add_argument("--slope-shape", choices=list(measure.SHAPES), default="tiny",
                        help="body of the slope's model (default tiny)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[96, 192, 288],
                        help="completion tokens of the slope's points")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 128256])
    parser.add_argument("--micro-rows", type=int, default=16, help="rows a pass, all sides (16)")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's, in the whole step")
    args = parser.parse_args()
    if args.child:
        task = json.loads(args.child)
        measure.quiet(task["threads"])
        torch.set_num_threads(task["threads"])
        print(json.dumps(child(task["what"], task["side"], Load(**task["load"]))))
        return
    measure.start(args)
    base = Load(args.shape, layers=args.layers, prompts=2, prompt_tokens=args.prompt_tokens,
                new_tokens=args.new_tokens, micro_rows=args.micro_rows)
    results = {"slopes": slopes(args, replace(base, shape=args.slope_shape)), "rows": []}
    if results["slopes"]:
        print(slope_table(results["slopes"]), flush=True)
    for name, what, sides, load in compared(args, base):
        if measure.chosen(args, f"peers {name}"):
            memory = {side: measure.in_child(what, side, load) for side in sides}
            results["rows"] += measure.record(name, load, {}, memory, {}, tokens=0)
            print(measure.table(results["rows"][-len(sides):]), flush=True)
    measure.finish(args, "memory", {}, results)


if __name__ == "__main__":
    run_script(main)
