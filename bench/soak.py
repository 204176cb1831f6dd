"""2,000 steps of the embedded game: memory flat, step time flat, files whole.

    python bench/soak.py                       # minutes are in its JSON line; Linux

A small game (4 queries, 4 answers) at a learning rate too low to change how it is played, so that
every step does the same work. Memory is the process's resident set, time its CPU time, both from
/proc, read as metrics.jsonl grows. Prints a table and one JSON line.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runs  # noqa: E402

FLAGS = ["--queries", "4", "--answers", "4", "--learning-rate", "1e-6", "--eval-every", "1000",
         "--device", "cpu"]


def look(pid: int) -> tuple[float, float]:
    """Resident megabytes and CPU seconds of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    spent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK"))


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
        every, seen, metrics = args.steps // 20, {}, out / "metrics.jsonl"
        print(" step   resident MB   CPU ms a step", flush=True)
        while run.poll() is None:
            time.sleep(0.1)
            steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            step = steps - steps % every
            if step and step not in seen:
                seen[step] = look(run.pid)
                before = seen.get(step - every)
                pace = f"{(seen[step][1] - before[1]) / every * 1e3:16.1f}" if before else ""
                print(f"{step:5}{seen[step][0]:14.1f}{pace}", flush=True)
        assert run.returncode == 0
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        whole = [line["step"] for line in lines] == list(range(1, args.steps + 1)) and all(
            runs.damage(path) is None for path in runs.Run(out).checkpoints().values())
    first, last = 2 * every, args.steps                      # the first tenth, and the end
    pace = lambda step: (seen[step][1] - seen[step - every][1]) / every
    record = {"steps": args.steps, f"resident_mb_{first}": round(seen[first][0], 1),
              f"resident_mb_{last}": round(seen[last][0], 1), "files_whole": whole,
              f"cpu_ms_a_step_to_{first}": round(1e3 * pace(first), 1),
              f"cpu_ms_a_step_to_{last}": round(1e3 * pace(last), 1),
              "minutes": round((time.perf_counter() - begun) / 60, 1)}
    print(json.dumps(record))
    if args.results:
        args.results.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
