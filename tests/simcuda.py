"""A pretend cuda:0 on a CPU build of PyTorch: tensors that say cuda:0 and compute on the CPU.

    install(monkeypatch, library(folder))        # torch.cuda as far as the product uses it
    with Mode():                                 # .to("cuda") makes pretend tensors
        train.set_up(settings)

The whole program runs, values and all. Operations on mixed devices raise, and so does what a graph
capture forbids: waits for the GPU (item, nonzero, copies to the host, boolean masks).
"""
import contextlib
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default,
         aten.masked_select.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
            aten._index_put_impl_.default)
MOVES = (aten._to_copy.default, aten.copy_.default)
state = {"capturing": False, "backward": False}


def library(folder: Path) -> Path:
    """guard.cpp compiled, a second's work; skips where there is no g++."""
    if not shutil.which("g++"):
        pytest.skip("the pretend GPU needs g++")
    torch_folder, out = Path(torch.__file__).parent, folder / "guard.so"
    source = Path(__file__).parent / "guard.cpp"
    done = subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", out, "-I", torch_folder / "include",
         "-L", torch_folder / "lib", "-lc10", f"-Wl,-rpath,{torch_folder / 'lib'}"],
        capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the pretend GPU does not compile: {done.stderr[-200:]}")
    return out


class Sim(torch.Tensor):
    """A tensor that computes on the CPU (`inner`) and says that it is on `where`."""

    @staticmethod
    def __new__(cls, real, where="cuda"):
        sim = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), dtype=real.dtype, device=CPU)
        sim.inner, sim.where = real, where
        return sim

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        other = other if isinstance(other, Sim) else Sim(other, "cpu")
        torch.Tensor.data.__set__(self, other)
        self.inner, self.where = other.inner, other.where

    @property
    def device(self):
        return CUDA if self.where == "cuda" else CPU

    @property
    def is_cuda(self):
        return self.where == "cuda"

    def cpu(self):
        wait("cpu")
        return self.inner.detach().clone()

    def to(self, *args, **kwargs):
        target = kwargs.get("device", next(
            (x for x in args if isinstance(x, (torch.device, str))), None))
        if self.is_cuda and target is not None and torch.device(target).type == "cpu":
            return self.cpu().to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def new_tensor(self, data, dtype=None, **kwargs):
        return Sim(torch.tensor(data, dtype=dtype or self.dtype), self.where)

    def tolist(self):
        wait("tolist")
        return self.inner.tolist()


def wait(what: str):
    assert not state["capturing"], f"{what} waits for the GPU: a capture forbids it"


def on_gpu(t) -> bool:
    return isinstance(t, Sim) and t.is_cuda


def unwrap(x):
    return x.inner if isinstance(x, Sim) else x


def fp32_product(a, b, out_dtype, out=None):
    """torch.mm(..., out_dtype=), which PyTorch has for CUDA alone."""
    return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)


def run(func, args, kwargs):
    """One operation on the tensors inside, checked as a GPU would check it."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    gpu, target = [on_gpu(t) for t in tensors], kwargs.get("device")
    to_gpu = target is not None and torch.device(target).type == "cuda"
    if any(gpu) and not all(gpu) and func not in MOVES:
        hosts = [t for t in tensors if not on_gpu(t) and t.dim()]
        allowed = func in INDEXING and on_gpu(args[0]) or "_fused_adam" in func.name()
        if hosts and not allowed and not state["backward"]:
            raise RuntimeError(f"mixed devices in {func.name()}: "
                               f"{[(tuple(t.shape), str(t.device)) for t in tensors]}")
    if any(gpu) and (func in WAITS or func in INDEXING and any(
            t is not None and t.dtype == torch.bool for t in args[1])):
        wait(func.name())
    options = {key: tree_map(unwrap, value) for key, value in kwargs.items() if key != "pin_memory"}
    if to_gpu:
        options["device"] = CPU
    compute = fp32_product if func in (aten.mm.dtype, aten.mm.dtype_out) else func
    out = compute(*tree_map(unwrap, args), **options)
    if func is aten._to_copy.default:
        return Sim(out) if to_gpu or gpu[0] else out     # .to("cpu") is Sim.to's; C++ means itself
    if func in (aten._local_scalar_dense.default, aten.equal.default):
        return out
    writes = lambda a: a.alias_info is not None and a.alias_info.is_write
    written = [i for i, a in enumerate(func._schema.arguments) if writes(a)]
    if len(func._schema.returns) == 1 and writes(func._schema.returns[0]):
        name = func._schema.arguments[written[0]].name
        return args[written[0]] if written[0] < len(args) else kwargs[name]

    def wrap(t):
        if isinstance(t, torch.Tensor) and (to_gpu or target is None and any(gpu)):
            with torch.inference_mode(False):
                return Sim(t)
        host = func in (aten.detach.default, aten.alias.default) and isinstance(args[0], Sim)
        return Sim(t, "cpu") if host else t
    return tree_map(wrap, out)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Stream:
    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass


class Graph:
    """A replay runs nothing here: a test that decodes replaces CapturedStep.__call__."""


@contextlib.contextmanager
def capture(graph, *, stream):
    state["capturing"] = True
    try:
        yield
    finally:
        state["capturing"] = False


def install(monkeypatch, guard: Path):
    """torch.cuda's functions that the product calls, for one test."""
    ctypes.CDLL(str(guard))
    torch._C._set_only_lift_cpu_tensors(True)
    plain = torch.autograd.backward

    def backward(*args, **kwargs):
        # Autograd makes zeros on the wrapper's own device, the host: not the program's doing.
        before, state["backward"] = state["backward"], True
        try:
            return plain(*args, **kwargs)
        finally:
            state["backward"] = before
    properties = type("Properties", (), {"total_memory": 80 * 10**9})
    for name, value in {
            "is_available": lambda: True, "is_initialized": lambda: False,
            "is_bf16_supported": lambda **_: True, "_lazy_init": lambda: None,
            "current_device": lambda: 0, "mem_get_info": lambda *_: (79 * 10**9, 80 * 10**9),
            "get_device_name": lambda *_: "pretend", "get_device_properties": lambda *_: properties,
            "Stream": Stream, "current_stream": lambda *_: Stream(), "CUDAGraph": Graph,
            "stream": lambda _: contextlib.nullcontext(), "graph": capture,
            "empty_cache": lambda: None, "synchronize": lambda *_: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.autograd, "backward", backward)


def to_gpu(module, dtype=None):
    """The module with its parameters on the pretend GPU."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(Sim(p.detach().to(dtype or p.dtype)))
    return module
