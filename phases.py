"""What a reader may skip: the phases of a step, and what can end one.

Signals are heeded between phases, and out of memory is told by the phase's name.
"""
import os
import signal
import time
import traceback
from contextlib import contextmanager

import torch

import ranks
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
        if ranks.rank() == 0:
            os.write(2, f"\n{signal.Signals(number).name}: finishing this phase, then saving "
                        "(again: stop at once)\n".encode())  # print() may be what it interrupted

    def heed(self):
        if self.signal:
            raise RunStopped(f"{signal.Signals(self.signal).name}: stopped", 128 + self.signal)


# ---------------------------------------------------------------- phases, memory

# What lowers each phase's peak. Batch tokens change nothing that is learnt, so that a run may be
# resumed with fewer; the token limits are another run's.
SWITCHES = {"challenge": "--batch-tokens or --query-tokens",
            "judge": "--batch-tokens or --judge-tokens",
            "reference": "--micro-batch-tokens or --answer-tokens",
            "update": "--micro-batch-tokens or --answer-tokens"}


def out_of_memory(error: Exception) -> bool:
    """CUDA raises torch.OutOfMemoryError; MPS and the CPU a RuntimeError that says so."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        word in str(error) for word in words)


class Phases:
    """Times the phases of a step, names the one that ran out of memory, stops between them.

    A phase is told which model works in it; where models are offloaded, `stage` brings it.
    """

    def __init__(self):
        self.stop, self.seconds = StopRequest(), {}
        self.stage = None                      # memory.Stage, with --offload

    def call(self, model):
        """This model works next (None: no model does)."""
        if self.stage and model:
            self.stage.call(model)

    @contextmanager
    def __call__(self, name: str, model=None):
        self.stop.heed()
        begun = time.perf_counter()
        try:
            self.call(model)
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)    # the pass's tensors, before the saving
            lower = SWITCHES.get(name, "--batch-tokens or --answer-tokens")
            raise RunStopped(f"out of memory in phase {name} (lower {lower}): "
                             + (str(error) or "MemoryError").splitlines()[0]) from None
        self.seconds[name] = time.perf_counter() - begun
