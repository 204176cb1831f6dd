"""What the benchmarks share: random models by shape, workloads, interleaved timing, bounds, tables.

bench/sampler.py, bench/step.py and bench/memory.py import it; it is no script. Both sides of a
benchmark get the same random weights (same names, same seed, N(0, .02)), the same token ids, fp32.
Peak memory is taken in fresh processes: bench/memory.py --child.
"""
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))             # before bench/, whose memory.py is not the project's

from model import Llama, parse_config  # noqa: E402
from plumbing.cli import Parser  # noqa: E402
from plumbing.files import InputError, read_json  # noqa: E402
from plumbing.runs import append_line  # noqa: E402


def known(name: str) -> dict:
    """A shape of plumbing/shapes/; what is not its geometry is said by config_of."""
    raw = read_json(ROOT / "plumbing/shapes" / name / "config.json")
    return {key: value for key, value in raw.items() if key not in ("architectures", "dtype")}


SHAPES = {
    "tiny": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    "smollm2-135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "max_position_embeddings": 8192, "rope_theta": 100000.0},
    "llama-3.2-1b": known("llama-3.2-1b"),
    "llama-3.2-3b": known("llama-3.2-3b"),
}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, GB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / 1e9


# ---------------------------------------------------------------- a workload and its model

@dataclass(frozen=True)
class Load:
    """One workload; the whole of what a child process needs to know."""
    shape: str = "smollm2-135m"
    vocabulary: int | None = None      # None: the shape's own
    layers: int | None = None          # None: the shape's own
    prompts: int = 4
    group: int = 8                     # completions a prompt
    prompt_tokens: int = 64
    new_tokens: int = 96               # of each completion
    varied: bool = False               # stops uniform in new_tokens / 12 .. new_tokens instead
    beta: float = 0.05                 # weight of the KL term; 0: no reference model on any side
    micro_rows: int = 16               # rows a forward and backward pass, on all sides
    checkpointing: bool = False        # TRL's gradient checkpointing

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def name(self) -> str:
        length = f"{max(1, self.new_tokens // 12)}..{self.new_tokens}" if self.varied else (
            f"{self.new_tokens}")
        return f"{self.prompts} x {self.group}, {self.prompt_tokens} + {length}"


def config_of(load: Load) -> dict:
    """config.json of the load's model: the shape, with its vocabulary and depth. No pad id: in
    transformers its embedding would get no gradient."""
    changes = {"vocab_size": load.vocabulary, "num_hidden_layers": load.layers}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.02,
            "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None,
            "pad_token_id": None} | SHAPES[load.shape] | {k: v for k, v in changes.items() if v}


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights ~ N(0, .02), norms 1, in the order of their names: equal on both sides, since both
    give a parameter its checkpoint's name."""
    g = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, 0.02, generator=g)
    return model


def our_model(load: Load) -> Llama:
    with torch.device("meta"):
        model = Llama(parse_config(config_of(load)))
    return fill(model.to_empty(device="cpu"))


def their_model(load: Load):
    """The same weights in transformers, attention by scaled_dot_product_attention."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(**config_of(load), attn_implementation="sdpa")
    return fill(LlamaForCausalLM(config)).eval()


def vocabulary_of(load: Load) -> int:
    return config_of(load)["vocab_size"]


def random_tokens(load: Load, rows: int, length: int, seed: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary_of(load), (rows, length), generator=g).tolist()


def stops(load: Load) -> list[int]:
    """Each completion's length, in the order prompt, sample."""
    if not load.varied:
        return [load.new_tokens] * load.rows
    g, low = torch.Generator().manual_seed(3), max(1, load.new_tokens // 12)
    return torch.randint(low, load.new_tokens + 1, (load.rows,), generator=g).tolist()


def missing(side: str) -> str | None:
    """Why a side cannot run here, or None."""
    needs = () if side == "ours" else ("transformers", "trl")[:2 if side.startswith("trl") else 1]
    lacking = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"{lacking[0]} is not installed (requirements-dev.txt)" if lacking else None


# ---------------------------------------------------------------- time

def now() -> np.ndarray:
    """Seconds on the clock, and of this process on all cores: on a busy machine the second pair of
    eyes."""
    return np.array([time.perf_counter(), time.process_time()])


def interleave(runs: dict, pairs: int) -> dict[str, list]:
    """(seconds, CPU seconds) of each side, in `pairs` rounds; every second round goes the other way
    about, so that a machine that slows down or speeds up favours nobody."""
    times = {side: [] for side in runs}
    for pair in range(pairs):
        for side in list(runs)[::1 if pair % 2 == 0 else -1]:
            gc.collect()
            begun = now()
            runs[side]()
            times[side].append(now() - begun)
    return times


def machine_bounds(small: bool) -> dict:
    """What this machine does at best, in the same run with the same threads: GB/s read, GB/s
    copied (read and written), and fp32 GFLOP/s in a large matrix product; best of three."""
    count, side = (2**22, 512) if small else (2**27, 3072)
    a, b = torch.ones(count), torch.zeros(count)
    x, y = torch.randn(side, side), torch.randn(side, side)
    vector = torch.ones(4096)

    def best(work, run):
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begun)
        return work / min(seconds) / 1e9

    # A product with a vector reads every weight once, as decoding one row does.
    return {"read_gb_s": best(4 * count, lambda: a.view(-1, 4096) @ vector),
            "copy_gb_s": best(8 * count, lambda: b.copy_(a)),
            "gflop_s": best(2 * side**3, lambda: x @ y)}


# ---------------------------------------------------------------- what a workload needs at least

def sizes(load: Load) -> tuple[int, int]:
    """Weights of the blocks' matrices, and of the head."""
    c = parse_config(config_of(load))
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    block = attention + 3 * c.hidden_size * c.intermediate_size
    return block * c.num_hidden_layers, c.hidden_size * c.vocab_size


def sampler_work(load: Load) -> tuple[float, float]:
    """(bytes, FLOPs) that sampling needs at least: all weights read at each step; every prompt
    once, every token once, its logits where one is drawn. Attention is not counted."""
    body, head = sizes(load)
    tokens = sum(stops(load))
    return (4.0 * (body + head) * max(stops(load)),
            2.0 * (body * (load.prompts * load.prompt_tokens + tokens) + head * tokens))


def update_work(load: Load) -> float:
    """FLOPs that a gradient needs at least: prompts once, logits of completions alone, nothing
    computed twice; with beta also the reference's forward pass. Attention is not counted."""
    body, head = sizes(load)
    tokens = load.rows * load.new_tokens
    forward = 2.0 * (body * (load.prompts * load.prompt_tokens + tokens) + head * tokens)
    return forward * (3 + (load.beta > 0))


# ---------------------------------------------------------------- memory, in a process of its own

def in_child(what: str, side: str, load: Load) -> dict | None:
    """{"libraries", "idle", "peak" (GB), "seconds"} of one run in a fresh process."""
    if missing(side):
        return None
    child = [sys.executable, str(ROOT / "bench/memory.py"), "--child",
             json.dumps({"what": what, "side": side, "threads": torch.get_num_threads(),
                         "load": asdict(load)})]
    done = subprocess.run(child, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what}, {side}: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def curves(args, what: str, sides, base: Load, growth: dict, bounds: dict):
    """Report seconds and memory of one run in a fresh process, for each point of each curve: one
    quantity grows, the others stay as in `base`. These are single runs without pairs. They show
    shapes and support no claim about speed."""
    points = []
    for key in filter(lambda key: chosen(args, key), growth):
        for value in growth[key]:
            for side in sides:
                at = replace(base, **{key: value})
                figures = in_child(what, side, at) or {"skipped": missing(side)}
                points.append({"curve": key, "value": value, "side": side} | figures)
    print(curve_table(points))
    finish(args, f"{what}-curves", bounds, {"points": points})


def curve_table(points: list[dict]) -> str:
    """A line a point; growth is peak over idle."""
    lines = [(p["curve"], p["value"], p["side"], *([f"skipped: {p['skipped']}", "", ""]
             if "skipped" in p else [f"{p['seconds']:.3g}", f"{p['idle']:.2f}",
                                     f"{p['peak'] - p['idle']:.3f}"])) for p in points]
    return markdown(("grows", "to", "side", "seconds", "GB idle", "GB over idle"), lines)


# ---------------------------------------------------------------- the report

def parser(description: str, *, pairs: int) -> Parser:
    p = Parser(description=description)
    p.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    p.add_argument("--layers", type=int, help="cut the shape's depth (default: all)")
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=96)
    p.add_argument("--pairs", type=int, default=pairs, help=f"rounds of all sides ({pairs})")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--only", nargs="+", metavar="TEXT",
                   help="workloads whose name has one of these")
    p.add_argument("--no-memory", action="store_true", help="time alone: no child processes")
    p.add_argument("--out", help="file to which the JSON line is appended")
    return p


def start(args):
    """Refuse what cannot work, before the first minutes are spent; set the threads."""
    for flag in ("pairs", "threads", "prompt_tokens", "new_tokens"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1")
    if args.out:
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            open(args.out, "a").close()
        except OSError as error:
            raise InputError(f"--out {args.out}: {error.strerror}") from None
    torch.set_num_threads(args.threads)
    quiet(args.threads)


def quiet(threads: int):
    """Children's threads; the peers' libraries silent and offline."""
    warnings.simplefilter("ignore", FutureWarning)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
                   "TRL_EXPERIMENTAL_SILENCE": "1"}


def chosen(args, name: str) -> bool:
    return not args.only or any(text in name for text in args.only)


def record(name: str, load: Load, times: dict, memory: dict, bounds: dict, *, tokens: int,
           bytes_read: float = 0.0, flops: float = 0.0) -> list[dict]:
    """A workload's rows, a side each; ratios are taken pair by pair, peer over ours."""
    rows = []
    seconds = {side: [float(wall) for wall, _ in pairs] for side, pairs in times.items()}
    for side in seconds | memory:
        row = {"workload": name, "side": side, "tokens": tokens, "load": asdict(load)}
        if missing(side):
            rows.append(row | {"skipped": missing(side)})
            continue
        if seconds.get(side):
            middle = median(seconds[side])
            bandwidth = max(bounds["read_gb_s"], bounds["copy_gb_s"])
            row |= {"seconds": seconds[side], "median_seconds": middle,
                    "cpu_seconds": [float(cpu) for _, cpu in times[side]],
                    "tokens_per_second": tokens / middle,
                    "bandwidth_share": bytes_read / middle / 1e9 / bandwidth or None,
                    "flops_share": flops / middle / 1e9 / bounds["gflop_s"] or None}
        row |= {"memory": memory[side]} if memory.get(side) else {}
        if side != "ours" and seconds.get(side):
            ratios = [peer / own for peer, own in zip(seconds[side], seconds["ours"])]
            row |= {"time_ratios": ratios, "time_ratio": median(ratios)}
        if side != "ours" and memory.get(side) and memory.get("ours"):
            row["memory_ratio"] = memory["ours"]["peak"] / memory[side]["peak"]
        rows.append(row)
    return rows


HEADS = ("workload", "side", "seconds", "CPU s", "tokens/s", "% GB/s", "% FLOP/s", "GB idle",
         "GB peak", "their time / ours", "our peak / theirs")


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table: medians, with least to most."""
    lines = []
    for r in rows:
        if "skipped" in r:
            lines.append((r["workload"], r["side"], f"skipped: {r['skipped']}", *[""] * 8))
            continue
        percent = lambda x: f"{100 * x:.0f}" if x else "-"
        s, m, ratios = r.get("seconds"), r.get("memory"), r.get("time_ratios")
        lines.append((
            r["workload"], r["side"],
            f"{r['median_seconds']:.3g} ({min(s):.3g} to {max(s):.3g})" if s else "-",
            f"{median(r['cpu_seconds']):.3g}" if s else "-",
            f"{r['tokens_per_second']:.0f}" if s else "-",
            percent(r.get("bandwidth_share")), percent(r.get("flops_share")),
            f"{m['idle']:.2f}" if m else "-", f"{m['peak']:.2f}" if m else "-",
            f"{r['time_ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "",
            f"{r['memory_ratio']:.2f}" if r.get("memory_ratio") else ""))
    return markdown(HEADS, lines)


def markdown(heads, lines) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(heads, *lines)]
    lay = lambda cells: "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths)) + " |"
    return "\n".join([lay(heads), "|" + "|".join("-" * (w + 2) for w in widths) + "|",
                      *map(lay, lines)])


def finish(args, benchmark: str, bounds: dict, results: dict):
    """One JSON line: printed, and appended to --out."""
    if not any(results.values()):
        raise InputError(f"--only {' '.join(args.only)}: no workload's name has that")
    installed = {name: version(name) for name in ("torch", "transformers", "trl")
                 if importlib.util.find_spec(name)}
    line = {"benchmark": benchmark, "date": str(date.today()), "shape": args.shape,
            "threads": args.threads, "pairs": args.pairs, "versions": installed,
            "cpu": torch.backends.cpu.get_cpu_capability(), "bounds": bounds} | results
    line = json.loads(json.dumps(line), parse_float=lambda x: float(f"{float(x):.5g}"))
    print(json.dumps(line))
    if args.out:
        append_line(Path(args.out), line)
