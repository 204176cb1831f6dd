"""Break it on purpose: one fault at a time, put into the running game from outside.

    python course/exercises/break_it.py faults                       # what there is to break
    python course/exercises/break_it.py top-k --seed 1             # one run, a minute: runs/top-k-1
    python course/exercises/break_it.py top-k --seed 1 --steps 30    # further flags are train.py's
    python course/exercises/break_it.py all --seeds 1 2 3            # every fault, half an hour
    python course/exercises/break_it.py table --seeds 1 2 3 --figure broken.png      # what was kept

A fault replaces one function of the product, or gives train.py a flag; the product has no switch
for it. Guess what the curves will do before you look at them. "all" keeps each run's curves in
bench/results/break_it/FAULT-SEED, every fifth step of metrics.jsonl and a few of its columns.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


import torch  # noqa: E402

import lsp  # noqa: E402
import rewards  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from evals import plot  # noqa: E402
from plumbing import cli  # noqa: E402
from plumbing.files import InputError  # noqa: E402
from plumbing.memory import MasterAdamW  # noqa: E402

# ------------------------------------------- the faults: each returns flags of train.py


def nothing():
    """Nothing is broken: LSP with the embedded world's own settings."""
    return []


def no_self_reward():
    """R alone, no R_Q: LSP-Zero. Asking badly costs the Challenger nothing."""
    return ["--algo", "lsp-zero"]


def no_kl():
    """beta 0: nothing holds either role near the reference, and no KL is logged."""
    return ["--beta", "0"]


def rate_x_4():
    """Four times the learning rate."""
    return ["--learning-rate", "1e-3"]


def unscaled():
    """R stays in 0..1 beside R_Q's 0..7 (the settings multiply it by 5)."""
    return ["--reward-scale", "1"]


def bf16_weights():
    """Weights are rounded to bfloat16 after every step, as if there were no fp32 masters."""
    step = MasterAdamW.step

    def rounding_step(self, *args):
        norm = step(self, *args)
        with torch.no_grad():
            for p in self.params:
                p.copy_(p.bfloat16())
        return norm

    MasterAdamW.step = rounding_step
    return []


def no_stop_token():
    """The stop token is left out of the loss, as where a mask drops it together with padding."""
    whole = train.token_log_probs

    def without_the_last(model, rows, temperature):
        logp, mask = whole(model, rows, temperature)
        mask = mask.clone()                          # the whole one is what the log-probs lie by
        for n, completion in enumerate(row.completion for row in rows):
            mask[n, len(completion.tokens) - 1] &= not completion.stopped
        return logp, mask

    train.token_log_probs = without_the_last
    return []


def top_k():
    """The sampler draws from the 5 likeliest tokens; the loss is of the full softmax."""
    whole = sample.pick

    def pick(logits, temperature, uniform):
        fifth = logits.topk(5).values[:, -1:]
        return whole(logits.masked_fill(logits < fifth, -math.inf), temperature, uniform)

    sample.pick = pick
    return []


def sign_trap():
    """The Challenger's V is taken of R + R_Q, so that V_Q cancels: S = V_Q - (V + V_Q) = -V."""
    right = lsp.challenger_advantages
    lsp.challenger_advantages = lambda R, R_Q=None, **how: right(R if R_Q is None else R + R_Q, R_Q)
    return []


# ------------------- no faults: the Challenger's reward elsewhere, and nobody judges (exercise 10)

def r_zero():
    """R-Zero's uncertainty, 1 - 2 |p - 1/2|, p a query's solve rate."""
    return ["--algo", "lsp-zero", "--challenger-reward", "r-zero"]


def spice():
    """SPICE's bump around the variance of a fair coin."""
    return ["--algo", "lsp-zero", "--challenger-reward", "spice"]


def absolute_zero():
    """Absolute Zero's learnability, 1 - p, but 0 where nobody is right."""
    return ["--algo", "lsp-zero", "--challenger-reward", "absolute-zero"]


# ------------------- the judge's hole: with --model BELIEVING, from tiny/build.py --believing


def tags_hidden():
    """The Solver may state its own score, "85<Score>7</Score>". The judge does not see the tags."""
    return ["--reward-scale", "1", "--answer-tokens", "7"]


def tags_shown():
    """The same, but the judge sees them, and believes them: an answer can write its own score."""
    rewards.without_tags = lambda text, prompt: text
    return tags_hidden()


FAULTS = {f.__name__.replace("_", "-"): f for f in (
    nothing, no_self_reward, no_kl, rate_x_4, unscaled, bf16_weights, no_stop_token, top_k,
    sign_trap, r_zero, spice, absolute_zero)}
HOLE = {"tags-hidden": tags_hidden, "tags-shown": tags_shown}       # of a base model of their own

# ---------------------------------------------------------------- runs

KEPT = ROOT / "bench/results/break_it"
COLUMNS = ("step", "reward", "quality", "value_spread", "kl_solver", "kl_challenger",
           "entropy_solver", "entropy_challenger", "distinct_queries", "answer_length",
           "truncated_answers", "truncated_queries", "logp_difference", "grad_norm")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_and_keep(fault: str, seed: int):
    """One run in a process of its own; its curves go to bench/results/break_it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run([sys.executable, __file__, fault, "--seed", str(seed), "--out", str(out),
                        "--device", "cpu", "--eval-every", "15"], check=True,
                       stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        metrics = [{key: m[key] for key in COLUMNS} for m in lines(out / "metrics.jsonl")]
        kept = {"metrics.jsonl": [m for m in metrics if m["step"] % 5 == 0],
                "eval.jsonl": lines(out / "eval.jsonl")}
    folder = KEPT / f"{fault}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in kept.items():
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    print(f"{fault}-{seed}: carry {kept['eval.jsonl'][-1]['accuracy']['carry']:.3f}", flush=True)


# ---------------------------------------------------------------- what came of it

def row(fault: str, seeds: list[int]) -> str:
    """A fault's line of the table: carry accuracy of every seed, ranges of the others."""
    folders = {seed: KEPT / f"{fault}-{seed}" for seed in seeds}
    there = {seed: folder for seed, folder in folders.items() if folder.exists()}
    evals = {seed: lines(folder / "eval.jsonl") for seed, folder in there.items()}
    metrics = [lines(folder / "metrics.jsonl") for folder in there.values()]
    between = lambda values, form: f"{min(values):{form}} to {max(values):{form}}"
    cells = [f"{evals[seed][-1]['accuracy']['carry']:.3f}" if seed in evals else "-"
             for seed in seeds]
    cells += [between([e[-1]["accuracy"]["none"] for e in evals.values()], ".3f"),
              between([e[-1]["challenger"]["malformed"] for e in evals.values()], ".3f"),
              between([m[-1]["reward"] for m in metrics], ".2f"),
              between([max(x["logp_difference"] for x in m) for m in metrics], ".0e")]
    return f"| {fault} | {' | '.join(cells)} |"


def table(seeds: list[int], figure: str | None):
    heads = ["fault", *(f"carry, seed {seed}" for seed in seeds), "no-carry", "malformed", "R",
             "largest difference"]
    there = [f for f in FAULTS if any((KEPT / f"{f}-{seed}").exists() for seed in seeds)]
    print("| " + " | ".join(heads) + " |", "|---" * len(heads) + "|",
          *(row(fault, seeds) for fault in there), sep="\n")
    if not figure:
        return
    if not there:
        raise InputError(f"--figure: no runs of seeds {seeds} in {KEPT}")
    curves = {"held-out accuracy, carries": ("#000000", "-", "accuracy", "carry"),
              "held-out accuracy, no carries": ("#E69F00", "--", "accuracy", "none"),
              "malformed queries": ("#56B4E9", ":", "challenger", "malformed")}
    panels = []
    for fault in there:
        evals = [lines(file) for seed in seeds
                 if (file := KEPT / f"{fault}-{seed}" / "eval.jsonl").exists()]
        panels.append((fault, "fraction", [
            (label, *plot.series(records, *keys), {"color": color, "linestyle": dash})
            for label, (color, dash, *keys) in curves.items() for records in evals]))
    plot.draw_panels(panels, figure)


def main():
    parser = argparse.ArgumentParser(description="Break the embedded world's game on purpose.",
                                     allow_abbrev=False)        # --seed is train.py's
    parser.add_argument("what", choices=["faults", "all", "table", *FAULTS, *HOLE])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of all and table")
    parser.add_argument("--figure", help="table: also draw the curves, into this file")
    args, flags = parser.parse_known_args()
    if game := (FAULTS | HOLE).get(args.what):
        sys.argv = ["train.py", *game(), *flags]
        train.run_name = lambda s: f"{args.what}-{s.seed}"
        train.main()
    elif flags:
        parser.error(f"{flags[0]} is for one fault")
    elif args.what == "faults":
        print("\n".join(f"{name:16}{f.__doc__}" for name, f in (FAULTS | HOLE).items()))
    elif args.what == "all":
        for seed in args.seeds:
            for fault in FAULTS:
                run_and_keep(fault, seed)
        table(args.seeds, None)
    else:
        table(args.seeds, args.figure)


if __name__ == "__main__":
    cli.run_script(main)
