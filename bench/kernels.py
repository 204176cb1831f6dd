"""How many kernels a GPU runs for a decode step, counted without a GPU.

    python bench/kernels.py

The step is executed on meta tensors, in bfloat16. Each operation that makes or writes a tensor is
one kernel; views are none. F.rms_norm and attention count once: CUDA has a kernel for each.
"""
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from model import Llama, parse_config, read_json  # noqa: E402
from plumbing.budget import attention  # noqa: E402
from plumbing.cache import Cache  # noqa: E402
from plumbing.files import HERE  # noqa: E402
from sample import pick  # noqa: E402


class Kernels(TorchDispatchMode):
    """Counts the operations whose result is no view."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = [r.alias_info is not None and not r.alias_info.is_write
                 for r in func._schema.returns]
        if not any(views) and func is not torch.ops.aten._unsafe_view.default:
            self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def decode_step(layers: int) -> tuple[Counter, Counter]:
    """Kernels of the forward pass of one token for 64 rows, and of drawing the next."""
    raw = read_json(HERE / "plumbing/shapes/llama-3.2-3b/config.json")
    F.rms_norm = lambda x, shape, weight, eps: x.clone()                     # one kernel
    F.scaled_dot_product_attention = attention
    with torch.device("meta"), torch.no_grad():
        model = Llama(parse_config(raw | {"num_hidden_layers": layers})).bfloat16()
        model.frequencies = model.frequencies.float().to("meta")
        cache = Cache(model.config, 64, 512, device="meta", dtype=torch.bfloat16)
        cache.used, cache.fixed = 256, True
        token = torch.zeros(64, 1, dtype=torch.long)
        uniform = torch.zeros(64, dtype=torch.float64)
        with Kernels() as forward:
            logits = model.logits(model(token, cache=cache)[:, -1])          # (B, V)
        with Kernels() as draw:
            pick(logits, 1.0, uniform)
    return forward.count, draw.count


def main():
    (two, draw), (three, _) = decode_step(2), decode_step(3)
    layer = three - two
    print(f"a layer: {layer.total()}  {dict(layer)}")
    print(f"around the layers: {two.total() - 2 * layer.total()}")
    print(f"drawing a token: {draw.total()}")
    print(f"28 layers: {two.total() + 26 * layer.total() + draw.total()} kernels a step")


if __name__ == "__main__":
    main()
