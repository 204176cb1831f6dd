"""What a reader may skip: one game on W processes, for when one GPU is not enough.

    torchrun --nproc-per-node 8 train.py --model llama-3.2-3b --out runs/A --requeue

Every process (rank) holds all models and plays its slice of the queries. gather() gives every rank
the whole round, so the advantages are those of one process. Each rank differentiates its slice, the
gradients are summed, and all ranks take the same step: their weights stay equal bit for bit. Only
rank 0 prints and writes files. Without torchrun these functions change nothing.

All ranks meet in exchange(). A rank that must stop (a signal, no memory, a full disk) sends its
reason with the next exchange(); then all ranks stop for that reason.
"""
import os
import sys
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from plumbing.cli import RunStopped
from plumbing.files import InputError

# How long the ranks wait for one that hangs. It must be longer than the writing of a checkpoint and
# the largest difference between ranks in a phase. torchrun notices at once when one has ended.
PATIENCE = timedelta(minutes=30)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def together(main):
    """Call main() on each of torchrun's processes. If one stops, all do, and rank 0 prints why."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return main()
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store after a restart, with the addresses of the ended processes.
        # (Several machines count restarts apart; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps there.)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            store=store, rank=number, world_size=count, timeout=PATIENCE)
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():      # before its memory is read
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        main()
        exchange(None)                       # rank 0 may still be writing
        # The process ends here and now: at Python's own end a thread of gloo's can abort it.
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)
    except (InputError, RunStopped) as error:
        reason = agreed(error)
        if rank():
            sys.exit(getattr(reason, "code", 2))
        raise reason from None


def check(device: torch.device, queries: int):
    """InputError where this rank has no query, or no GPU of its own."""
    if world() > queries:
        raise InputError(f"{world()} processes and {queries} queries a step: each process needs a "
                         "query, --queries")
    if device.type == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise InputError("torchrun --nproc-per-node: more processes than the machine has GPUs, "
                         f"{torch.cuda.device_count()}")


# ---------------------------------------------------------------- meetings

@contextmanager
def peers():
    """End the run if a rank does not take part; what was saved before stays whole."""
    try:
        yield
    except RuntimeError as error:
        lost = RunStopped(f"another rank has ended, or was silent for {PATIENCE.seconds // 60} "
                          "minutes; to go on from the newest whole checkpoint: --resume "
                          f"({str(error).splitlines()[0]})", can_save=False)
        lost.reported = True               # there is nobody left to meet
        raise lost from None


def exchange(value, error: Exception | None = None) -> list:
    """Each rank's value, in rank order. If a rank passes an error, all raise the first one."""
    brought = [(value, error)] * world()
    if world() > 1:
        with peers():
            dist.all_gather_object(brought, (value, error))
    for number, (_, reason) in enumerate(brought):
        if reason:
            if number:
                reason.args = (f"rank {number}: {reason}",)
            reason.reported = True
            raise reason
    return [value for value, _ in brought]


def agreed(error: Exception) -> Exception:
    """The error for which all ranks stop; sends this rank's own unless all know it already."""
    try:
        if not getattr(error, "reported", False):
            exchange(None, error)
    except (InputError, RunStopped) as reason:
        return reason
    return error


def first(function):
    """Call function() on rank 0 only; returns its value on every rank. If it raises, rank 0 sends
    the error from agreed(), and the other ranks raise it here."""
    if rank():
        return exchange(None)[0]
    value = function()
    exchange(value)
    return value


# ---------------------------------------------------------------- parts

def slice_of(count: int, each: int = 1) -> slice:
    """This rank's contiguous part of `count` queries, or of their count * each answers."""
    W, n = world(), rank()
    return slice(each * (count * n // W), each * (count * (n + 1) // W))


def gather(part):
    """All ranks' instances of a dataclass as one: lists and tensors are concatenated, counts are
    summed, other fields are rank 0's."""
    def join(values: list):
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], list):
            return sum(values, [])
        return added(values) if isinstance(values[0], dict) else values[0]
    parts = exchange(part)
    return type(part)(**{name: join([getattr(p, name) for p in parts]) for name in vars(part)})


def added(counts: list[dict]) -> Counter:
    """The sum of each key's numbers."""
    found = Counter()
    for one in counts:
        found.update(one)
    return found


def total(sums: dict[str, Tensor]) -> Counter:
    """All ranks' sums, scalars on the device, added up."""
    values = torch.stack(list(sums.values())).tolist() if sums else ()     # waits for the GPU
    return added(exchange(dict(zip(sums, values))))


def spread(function, items: list) -> list:
    """The list function(items); each rank computes its slice of it."""
    return sum(exchange(function(items[slice_of(len(items))])), [])


def add_up(params: list[Tensor]):
    """Sum each parameter's gradient over the ranks, in fp32 and in place. A rank without rows adds
    zeros."""
    if world() == 1:
        return
    for p in params:
        p.grad = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad
    with peers():
        for work in [dist.all_reduce(p.grad, async_op=True) for p in params]:
            work.wait()
