"""What a reader may skip: what can end or spoil a step, and how it is told.

Signals are heeded between phases, out of memory is told by the phase's name, and numbers that are
not finite by the sample that they came from.
"""
import math
import os
import signal
import time
import traceback
from contextlib import contextmanager

import torch

from gradient import Row, accumulate
from memory import MasterAdamW
from runs import RunStopped

# ---------------------------------------------------------------- signals


class StopRequest:
    """SIGINT and SIGTERM, while it is entered: the phase in hand is finished, then heed() raises.

    A second signal kills at once, as the system does by default: all that can then happen to a
    run's folder, kill -9 does too (tests/test_faults.py).
    """

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self.before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number, frame):
        self.signal = number
        for n in self.before:
            signal.signal(n, signal.SIG_DFL)
        os.write(2, f"\n{signal.Signals(number).name}: finishing this phase, then saving "
                    "(again: stop at once)\n".encode())      # print() may be what it interrupted

    def heed(self):
        if self.signal:
            raise RunStopped(f"{signal.Signals(self.signal).name}: stopped", 128 + self.signal)


# ---------------------------------------------------------------- phases, memory

# What lowers each phase's peak. Batch tokens change nothing that is learnt, so that a run may be
# resumed with fewer; the token limits are another run's.
SWITCHES = {"challenge": "--batch-tokens or --query-tokens",
            "judge": "--batch-tokens or --judge-tokens",
            "update": "--micro-batch-tokens or --answer-tokens"}


def out_of_memory(error: Exception) -> bool:
    """CUDA raises torch.OutOfMemoryError; MPS and the CPU a RuntimeError that says so."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        word in str(error) for word in words)


class Phases:
    """Times the phases of a step, names the one that ran out of memory, stops between them."""

    def __init__(self):
        self.stop, self.seconds = StopRequest(), {}

    @contextmanager
    def __call__(self, name: str):
        self.stop.heed()
        begun = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)    # the pass's tensors, before the saving
            lower = SWITCHES.get(name, "--batch-tokens or --answer-tokens")
            raise RunStopped(f"out of memory in phase {name} (lower {lower}): "
                             + (str(error) or "MemoryError").splitlines()[0]) from None
        self.seconds[name] = time.perf_counter() - begun


# ---------------------------------------------------------------- numbers that are not finite

def unsound(r) -> list[dict]:
    """Samples of a train.Round with a reward or log-prob that is not finite.

    A sample is a query of the step and an answer to it (None: the query itself), counted from 1 in
    the order of samples.jsonl.
    """
    faults = []
    finite = lambda row: math.isfinite(sum(row.logp))
    for n in r.kept.nonzero()[:, 0].tolist():
        if r.query_rows and not finite(r.query_rows[n]):
            faults.append({"query": n + 1, "answer": None, "what": "log-prob"})
        for g, (row, reward) in enumerate(zip(r.answer_rows[n], r.R[n].tolist()), 1):
            if not math.isfinite(reward) or not finite(row):
                what = "log-prob" if math.isfinite(reward) else "reward"
                faults.append({"query": n + 1, "answer": g, "what": what})
    return faults


def culprits(game, optimizer: MasterAdamW, kept: list[int], solver: list[Row],
             challenger: list[Row]) -> list[dict]:
    """Which samples made the loss or the gradient non-finite: each differentiated alone."""
    G, faults = game.settings.answers, []
    samples = [(kept[i // G], i % G + 1, row) for i, row in enumerate(solver)]
    samples += [(n, None, row) for n, row in zip(kept, challenger)]
    for n, answer, row in samples:
        optimizer.discard()
        sums = accumulate(game, [row], 1.0)
        finite = {"log-prob": sums["logp"], "loss": sums["loss"],
                  "gradient": optimizer.gradient_norm()}
        what = next((what for what, value in finite.items() if not math.isfinite(value)), None)
        if what:
            faults.append({"query": n + 1, "answer": answer, "what": what})
    optimizer.discard()
    return faults or [{"query": None, "answer": None, "what": "gradient of all samples together"}]
