"""2,000 steps of the embedded game: memory flat, step time flat, files whole.

    python bench/soak.py                       # minutes are in its JSON line; Linux

A small game (2 queries, 2 answers) at a learning rate too low to change how it is played, so that
every step does the same work; an evaluation, which takes the most memory, every 100 steps. Memory
is the process's resident set, time its CPU time, both from /proc, read as metrics.jsonl grows. On a
machine that others use too, CPU time itself swings (shared caches, two threads a core): a fixed
piece of work is timed beside the run all along, and a step's time is also given in that unit.
Prints a table and one JSON line.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from plumbing import runs  # noqa: E402

FLAGS = ["--queries", "2", "--answers", "2", "--learning-rate", "1e-6", "--eval-every", "100",
         "--device", "cpu"]


def look(pid: int) -> tuple[float, float]:
    """Resident megabytes and CPU seconds of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    spent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK"))


def unit(weight=torch.ones(128, 344)) -> float:        # noqa: B008
    """CPU seconds of a fixed piece of work, made of what a step is made of: small products."""
    begun = time.process_time()
    for _ in range(100):
        (torch.ones(16, 128) @ weight).softmax(-1)
    return time.process_time() - begun


def main():
    parser = argparse.ArgumentParser(description="Many steps of the embedded game.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--results", type=Path, help="also write the JSON line into this file")
    args = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), *FLAGS, "--steps", str(args.steps),
                   "--out", str(out)]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
        every, seen, metrics, units = args.steps // 20, {}, out / "metrics.jsonl", []
        print(" step   resident MB   CPU ms a step   in units", flush=True)
        while run.poll() is None:
            time.sleep(0.1)
            units.append(unit())
            steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            step = steps - steps % every
            if step and step not in seen:
                resident, spent = look(run.pid)
                pace = (spent - seen[step - every][1]) / every if step > every else float("nan")
                relative = pace / statistics.mean(units)
                seen[step], units = (resident, spent, pace, relative), []
                print(f"{step:5}{resident:14.1f}{1e3 * pace:16.1f}{relative:11.2f}", flush=True)
        assert run.returncode == 0
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        whole = [line["step"] for line in lines] == list(range(1, args.steps + 1)) and all(
            runs.damage(path) is None for path in runs.Run(out).checkpoints())
    early, late = sorted(seen)[1:6], sorted(seen)[-5:]       # 5 of 20 windows each
    mean = lambda steps, column: statistics.mean(seen[step][column] for step in steps)
    record = {"steps": args.steps, "files_whole": whole,
              f"resident_mb_{2 * every}": round(seen[2 * every][0], 1),
              f"resident_mb_{args.steps}": round(seen[args.steps][0], 1),
              "cpu_ms_a_step": [round(1e3 * mean(steps, 2), 1) for steps in (early, late)],
              "units_a_step": [round(mean(steps, 3), 2) for steps in (early, late)],
              "windows": [[early[0] - every, early[-1]], [late[0] - every, late[-1]]],
              "minutes": round((time.perf_counter() - begun) / 60, 1)}
    print(json.dumps(record))
    if args.results:
        args.results.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
