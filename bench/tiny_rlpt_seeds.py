"""RLPT in the embedded world over many seeds: every run of README.md's figure and table.

    python bench/tiny_rlpt_seeds.py --seeds 1001 1002 1003 1004 1005          # 20 minutes
    python bench/tiny_rlpt_seeds.py --seeds 1001 1002 1003 1004 1005 --print  # what is there
    python bench/tiny_rlpt_seeds.py --seeds 1 2 --only both hole --results /tmp/tuning

Each run is a plain `python train.py --algo rlpt ...`, one thread; its config.json, metrics.jsonl
and eval.jsonl are kept in bench/results/tiny-rlpt/NAME-SEED. Prints a table of means with the range
over the seeds.
"""
import statistics
from pathlib import Path

from tiny_seeds import arguments, lines, run, run_all

RUNS = {
    "both": [],
    "hole": ["--min-prediction", "0"],
    "asr": ["--msr-weight", "0"],
    "msr": ["--msr-weight", "1e9"],
    "strict": ["--strict"],
    "programmatic": ["--reward", "tiny"],
    "sampled": ["--judge-temperature", "1"],
    "expected": ["--verdict", "expected"],
}
HEADS = ("asr_hard", "msr_hard", "asr_easy", "msr_easy", "R", "truncated", "tokens")


def figures(folder: Path) -> dict:
    """What the table shows of a run: greedy accuracy on held-out stories at its end; over its last
    ten steps the mean reward, share of predictions that break off and tokens of an answer."""
    last = lines(folder / "eval.jsonl")[-1]["accuracy"]
    metrics = lines(folder / "metrics.jsonl")[-10:]
    mean = lambda key: statistics.mean(m[key] for m in metrics)
    return last | {"R": mean("reward"), "truncated": mean("truncated_predictions"),
                   "tokens": mean("answer_length")}


def table(names: list[str], seeds: list[int], results: Path) -> list[str]:
    """README.md's table, a line a setting: the mean, and from least to most over the seeds."""
    start = lines(results / f"{names[0]}-{seeds[0]}" / "eval.jsonl")[0]["accuracy"]
    out = [f"| setting | {' | '.join(HEADS)} |", "|---" * (len(HEADS) + 1) + "|",
           f"| the base | {' | '.join(f'{start[k]:.2f}' if k in start else '-' for k in HEADS)} |"]
    for name in names:
        rows = [figures(results / f"{name}-{seed}") for seed in seeds]
        columns = [[row[key] for row in rows] for key in HEADS]
        cells = [f"{statistics.mean(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        out.append(f"| {name} | {' | '.join(cells)} |")
    return out


def main():
    args = arguments("RLPT in the embedded world over many seeds.", list(RUNS), "tiny-rlpt")
    run_all(args, [list(RUNS)], lambda name, seed, work, results: run(
        name, seed, ["--algo", "rlpt", *RUNS[name]], work, results))
    print("\n".join(table(args.only, args.seeds, args.results)))


if __name__ == "__main__":
    main()
