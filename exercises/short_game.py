"""A game of the embedded world from start to end, for exercises 9 and 10: about a minute."""
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import train


def play(*flags: str, seed: int = 1) -> dict:
    """train.py with these flags, in this process; returns the last line of its eval.jsonl."""
    print(f"      playing: train.py {' '.join(flags)} --seed {seed} ...", flush=True)
    before = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train.py", "--seed", str(seed), "--out", f"{folder}/run", "--device", "cpu",
                    *flags]
        try:
            with open(f"{folder}/said.txt", "w") as said, contextlib.redirect_stdout(said):
                train.main()
        finally:
            sys.argv = before
        last = json.loads((Path(folder) / "run/eval.jsonl").read_text().splitlines()[-1])
    print(f"      carry accuracy {last['accuracy']['carry']:.3f}", end="")
    print(f", malformed queries {last['challenger']['malformed']:.3f}", flush=True)
    return last
