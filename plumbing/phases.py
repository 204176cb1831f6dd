"""What a reader may skip: the phases of a step, and what can end one.

Signals are handled between phases. Out of memory is reported with the phase's name. Each phase
records its seconds and, on a GPU, its peak memory.
"""
import signal
import sys
import time
import traceback
from contextlib import contextmanager

import torch

from plumbing import ranks
from plumbing.cli import RunStopped


class StopRequest:
    """SIGINT and SIGTERM while it is entered: the running phase is finished, then check() raises.

    A second signal ends the process at once, as by default. It can leave nothing in a run's folder
    that kill -9 cannot (tests/test_faults.py).
    """

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number, frame):
        self.signal = signal.Signals(number)
        for n in self.before:
            signal.signal(n, signal.SIG_DFL)
        if ranks.rank() == 0:
            print(f"\n{self.signal.name}: finishing this phase, then saving (again: stop at once)",
                  file=sys.stderr)

    def check(self):
        if self.signal:
            raise RunStopped(f"{self.signal.name}: stopped", 128 + self.signal)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: PyTorch raises a RuntimeError that says so, Python a MemoryError."""
    return (isinstance(error, MemoryError) or "out of memory" in str(error)
            or "can't allocate memory" in str(error))


class Phases:
    """Measures the phases of a step, reports the one that ran out of memory, stops between them.

    A phase names the model that works in it; where models are offloaded, `stage` loads that one.
    seconds: by phase. peak_gb: GB of tensors at most, by phase; None where there is no CUDA.
    """

    def __init__(self):
        self.stop, self.seconds, self.peak_gb = StopRequest(), {}, {}
        self.stage = None                      # memory.Stage, with --offload

    def reset(self):
        """A step begins."""
        self.seconds, self.peak_gb = {}, {}

    def load(self, model):
        """This model works next (None: no model does)."""
        if self.stage and model:
            self.stage.load(model)

    @contextmanager
    def __call__(self, name: str, model=None):
        self.stop.check()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        try:
            self.load(model)
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)    # frees the pass's tensors before saving
            # A run may be resumed with fewer batch tokens; with another length it is another run.
            batch = "--micro-batch-tokens" if name in ("reference", "update") else "--batch-tokens"
            length = {"challenge": "query", "judge": "judge"}.get(name, "answer")
            raise RunStopped(f"out of memory in phase {name} (lower {batch} or --{length}-tokens): "
                             + (str(error) or "MemoryError").splitlines()[0]) from None
        self.seconds[name] = time.perf_counter() - begun
        self.peak_gb[name] = (torch.cuda.max_memory_allocated() / 1e9
                              if torch.cuda.is_initialized() else None)
