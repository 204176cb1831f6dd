"""How much faster a step becomes with more processes (ranks.py), on CPU.

    python bench/scaling.py                                        # the embedded game
    python bench/scaling.py --model DIR/smollm2-135m --pairs 2     # 6 GB, minutes
    python bench/scaling.py --results bench/results/scaling.jsonl

Strong: the same N on W processes. Weak: W times the N. Every process has one thread, so that W
processes have W cores, and one has one. Runs on 1 and on W processes alternate; of each the median
step counts, the first one apart. Prints a table and one JSON line a game.
The large model plays with prompts of a line and a small random reward model: what is measured is
time, not learning.
"""
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import write_checkpoint  # noqa: E402

from plumbing.cli import Parser, run_script  # noqa: E402
from plumbing.files import InputError  # noqa: E402
from plumbing.runs import append_line  # noqa: E402

PHASES = ("challenge", "solve", "reward", "judge", "reference", "update")


def game_of(model: str, folder: Path) -> tuple[list[str], int]:
    """The flags of a game, and its N on one process."""
    if model == "tiny":
        return ["--steps", "13", "--eval-every", "100"], 16
    write_checkpoint(folder / "rm", "scalar_head", max_position_embeddings=8192)
    (folder / "ask.txt").write_text("Ask one short question.")
    (folder / "judge.txt").write_text("Score 0 to 7 this answer to {instruction}: {response}")
    return ["--model", model, "--reward", str(folder / "rm"), "--steps", "3", "--answers", "4",
            "--challenger-prompt", str(folder / "ask.txt"), "--query-tokens", "16",
            "--self-reward-prompt", str(folder / "judge.txt"), "--answer-tokens", "24",
            "--judge-tokens", "16", "--save-every", "1000"], 4


def steps(flags: list[str], queries: int, W: int, out: Path) -> list[dict]:
    """The metrics of a run's steps after its first, played on W processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(W)]
    done = subprocess.run([sys.executable, *(launch if W > 1 else []), ROOT / "train.py", *flags,
                           "--queries", str(queries), "--device", "cpu", "--out", str(out)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise InputError(f"{' '.join(flags)} on {W} processes ended with {done.returncode}: "
                         + done.stderr)
    lines = (out / "metrics.jsonl").read_text().splitlines()[1:]
    subprocess.run(["rm", "-r", out], check=True)
    return [json.loads(line) for line in lines]


def main():
    parser = Parser(description="A step's time on 1 and on W processes.")
    parser.add_argument("--model", default="tiny", help="tiny, or a directory of a larger one")
    parser.add_argument("--processes", type=int, default=2, help="W")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each kind")
    parser.add_argument("--results", type=Path, help="file to append the JSON line to")
    args = parser.parse_args()
    W, found = args.processes, {}
    with tempfile.TemporaryDirectory() as folder:
        flags, N = game_of(args.model, Path(folder))
        kinds = {"one": (N, 1), "strong": (N, W), "weak": (N * W, W)}
        for pair in range(args.pairs):
            for kind, (queries, processes) in kinds.items():
                found.setdefault(kind, []).append(
                    steps(flags, queries, processes, Path(folder) / f"{kind}-{pair}"))
    rows = {}
    print(f"{'':8}{'N':>4}{'W':>4}{'s a step':>10}{'speed-up':>10}{'efficiency':>12}   by phase, s")
    for kind, (queries, processes) in kinds.items():
        middle = [median(m["seconds"] for m in lines) for lines in found[kind]]
        ones = [median(m["seconds"] for m in lines) for lines in found["one"]]
        speedup = median(one / ours * queries / N for one, ours in zip(ones, middle))
        phases = {name: median(m["phase_seconds"].get(name, 0) for run in found[kind] for m in run)
                  for name in PHASES}
        rows[kind] = {"queries": queries, "processes": processes, "seconds": middle,
                      "speedup": round(speedup, 3), "efficiency": round(speedup / processes, 3),
                      "phase_seconds": {name: round(value, 4) for name, value in phases.items()}}
        print(f"{kind:8}{queries:4}{processes:4}{median(middle):10.3f}{speedup:10.2f}"
              f"{speedup / processes:12.2f}   "
              + "  ".join(f"{name} {value:.3f}" for name, value in phases.items()))
    record = {"benchmark": "scaling", "date": str(date.today()), "model": Path(args.model).name,
              "load_average": os.getloadavg()[0], "cores": os.cpu_count(), "rows": rows}
    print(json.dumps(record))
    if args.results:
        append_line(args.results, record)


if __name__ == "__main__":
    run_script(main)
