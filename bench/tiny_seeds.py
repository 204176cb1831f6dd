"""The embedded world over many seeds: every run of its figure and its table in docs/RESULTS.md.

    python bench/tiny_seeds.py --seeds 1001 1002 1003 1004 1005       # about an hour on two cores
    python bench/tiny_seeds.py --seeds 1001 1002 1003 1004 1005 --print     # what is there
    python bench/tiny_seeds.py --seeds 1 2 --only lsp lsp-zero --results /tmp/tuning

Each run is a plain `python train.py ... --eval-every 15`, two at a time, one thread each; its
config.json, metrics.jsonl and eval.jsonl are kept in bench/results/tiny/NAME-SEED. Prints a table
with every seed and, last, one JSON line with the means.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECOND = ["--steps", "50", "--warmup", "10"]                          # of the second stages
GRPO_EASY = ["--algo", "grpo", "--prompts", "easy"]
# name: (first stage that it starts from, flags)
RUNS = {
    "lsp": (None, []),
    "lsp-zero": (None, ["--algo", "lsp-zero"]),
    "lsp-untrained-challenger": (None, ["--alpha-ch", "0"]),
    "grpo-easy": (None, GRPO_EASY),
    "grpo-balanced": (None, ["--algo", "grpo", "--prompts", "balanced"]),
    "sft-balanced": (None, ["--algo", "sft", "--prompts", "balanced", "--steps", "30"]),
    "lsp-penalty": (None, ["--repetition-penalty", "5"]),
    "lsp-alpha": (None, ["--alpha-ch", "1.5"]),
    "lsp-alpha-penalty": (None, ["--alpha-ch", "1.5", "--repetition-penalty", "5"]),
    "grpo-easy-then-lsp": ("grpo-easy", ["--judge", "tiny", *SECOND]),
    "grpo-easy-then-lsp-own-judge": ("grpo-easy", SECOND),        # the judge is the GRPO model
    "grpo-easy-then-grpo-easy": ("grpo-easy", [*GRPO_EASY, *SECOND]),
    "lsp-then-grpo-easy": ("lsp", [*GRPO_EASY, *SECOND]),
    "lsp-then-lsp": ("lsp", ["--judge", "tiny", *SECOND]),
}


def run(name: str, seed: int, flags: list[str], work: Path, results: Path):
    """One run; its records are kept, its checkpoint lies in `work` for a second stage."""
    kept = results / f"{name}-{seed}"
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--seed", str(seed), "--out",
               str(work / f"{name}-{seed}"), "--device", "cpu", "--eval-every", "15"]
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    shutil.rmtree(kept, ignore_errors=True)    # only now: a failed run must not cost the old
    kept.mkdir(parents=True)
    for file in ("config.json", "metrics.jsonl", "eval.jsonl"):
        text = (work / f"{name}-{seed}" / file).read_text()
        (kept / file).write_text(text.replace(f"{ROOT}/", "").replace(f"{work}/", ""))
    (kept / "seconds.txt").write_text(f"{time.perf_counter() - begun:.1f}\n")
    print(f"{name}-{seed}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


def play(name: str, seed: int, work: Path, results: Path):
    """A run of the table, from its first stage's checkpoint if it has one."""
    first, flags = RUNS[name]
    start = ["--model", str(work / f"{first}-{seed}" / "checkpoint")] if first else []
    run(name, seed, [*start, *flags], work, results)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def figures(folder: Path) -> dict:
    """What the table shows of a run."""
    evals, metrics = lines(folder / "eval.jsonl"), lines(folder / "metrics.jsonl")
    first, last = evals[0]["accuracy"], evals[-1]["accuracy"]
    row = {"carry_before": first["carry"], "carry": last["carry"], "no_carry": last["none"],
           "lowest_no_carry": min(e["accuracy"]["none"] for e in evals),
           "R": statistics.mean(m["reward"] for m in metrics[-10:]),
           "lowest_distinct": min(m["distinct_queries"] for m in metrics)}
    asked = [e["challenger"] for e in evals if e["challenger"]]
    if asked:
        busy = metrics[20:60]                              # steps 21 to 60
        row |= {"malformed": asked[-1]["malformed"],
                "overlap": statistics.mean(m["overlap"] or 0 for m in busy),
                "distinct": statistics.mean(m["distinct_queries"] for m in busy),
                "peak_carry_share": max(a["unit"] + a["tens"] + a["both"] for a in asked)}
    held = [m["held_out_queries"] for m in metrics]
    return row | {"held_out_dropped": statistics.mean(held),
                  "seconds": float((folder / "seconds.txt").read_text())}


def span(rows: list[dict], key: str) -> str:
    """Least to most over the seeds."""
    values = [row[key] for row in rows if key in row]
    return f"{min(values):.3f} to {max(values):.3f}" if values else "-"


def table(names: list[str], seeds: list[int], results: Path) -> tuple[list[str], dict]:
    """docs/RESULTS.md's table, a line a setting, and the means of all figures."""
    heads = [*map(str, seeds), "no-carry", "malformed", "peak carry share", "R"]
    lines = [f"| setting | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    means = {}
    for name in names:
        rows = [figures(results / f"{name}-{seed}") for seed in seeds]
        means[name] = {k: round(statistics.mean(row[k] for row in rows), 4) for k in rows[0]}
        cells = [f"{row['carry']:.3f}" for row in rows] + [
            span(rows, key) for key in ("no_carry", "malformed", "peak_carry_share", "R")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines, means


def arguments(description: str, names: list[str], results: str) -> argparse.Namespace:
    """The flags of this script and of tiny_rlpt_seeds.py."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--only", nargs="+", choices=names, default=names,
                        help="settings to run and print (default: all)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results" / results,
                        help=f"directory of the kept records (default bench/results/{results})")
    parser.add_argument("--work", type=Path, help="directory of whole runs (default: temporary)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    return parser.parse_args()


def run_all(args: argparse.Namespace, stages: list[list[str]], play):
    """play(name, seed, work, results) for the chosen runs, a later stage after the earlier ones."""
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        for names in stages if not args.print else []:
            jobs = [(name, seed) for name in args.only for seed in args.seeds if name in names]
            list(pool.map(
                lambda job: play(*job, args.work or Path(temporary), args.results), jobs))


def main():
    args = arguments("The embedded world over many seeds.", list(RUNS), "tiny")
    first = [name for name in RUNS if RUNS[name][0] is None]
    run_all(args, [first, [name for name in RUNS if name not in first]], play)
    for name in args.only:
        rows = {seed: figures(args.results / f"{name}-{seed}") for seed in args.seeds}
        keys = list(rows[args.seeds[0]])
        print(f"\n{name:26}" + "".join(f"{k:>17}" for k in keys))
        for seed, row in rows.items():
            print(f"  {seed:<24}" + "".join(f"{row[k]:17.3f}" for k in keys))
    lines, means = table(args.only, args.seeds, args.results)
    print("", *lines, "", sep="\n")
    print(json.dumps({"seeds": args.seeds, "means": means}))


if __name__ == "__main__":
    main()
