"""What a reader may skip: the phases of a step, and what can end one.

Signals are handled between phases. Out of memory is reported with the phase's name. Each phase
records its seconds and its peak memory.
"""
import os
import re
import signal
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from plumbing import ranks
from plumbing.cli import RunStopped

# ---------------------------------------------------------------- signals


class StopRequest:
    """SIGINT and SIGTERM, while it is entered: the phase in hand is finished, then check() raises.

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
            with suppress(OSError):              # not print(), which may be what it interrupted
                os.write(2, f"\n{signal.Signals(number).name}: finishing this phase, then saving "
                            "(again: stop at once)\n".encode())

    def check(self):
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
    """Whether memory ran out: PyTorch raises a RuntimeError that says so, Python a MemoryError."""
    return (isinstance(error, MemoryError) or "out of memory" in str(error)
            or "can't allocate memory" in str(error))


def resident(field: str) -> int | None:
    """Bytes of this process in memory: VmRSS, now, or VmHWM, the most since forget_peak(). None
    where there is no /proc (only Linux has it)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) * 1024


def forget_peak():
    """From here on peak() counts anew. A GPU's tensors are counted by torch, a host's pages by the
    kernel; where it does not let us reset them, peaks are those of the whole run so far."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(idle: int | None) -> float | None:
    """GB of tensors at most since forget_peak(): on a GPU, or, beside what the process had when it
    was idle, on the host. None where nobody counts."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    most = resident("VmHWM")
    return None if most is None or idle is None else (most - idle) / 1e9


class Phases:
    """Times and weighs the phases of a step, names the one that ran out of memory, stops between
    them. Made before the models are: what is resident then is idle.

    A phase names the model that works in it; where models are offloaded, `stage` loads that one.
    """

    def __init__(self):
        self.stop, self.seconds, self.peak_gb = StopRequest(), {}, {}
        self.idle = resident("VmRSS")
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
        forget_peak()
        begun = time.perf_counter()
        try:
            self.load(model)
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)    # the pass's tensors, before the saving
            lower = SWITCHES.get(name, "--batch-tokens or --answer-tokens")
            raise RunStopped(f"out of memory in phase {name} (lower {lower}): "
                             + (str(error) or "MemoryError").splitlines()[0]) from None
        self.seconds[name] = time.perf_counter() - begun
        self.peak_gb[name] = peak(self.idle)
