"""What one GPU makes of a model in its exact shape, with random weights ~ N(0, .02).

    python bench/gpu.py --part 1 --out gpu.jsonl          # 5 minutes: is it right? a whole step
    python bench/gpu.py --part 2 --out gpu.jsonl          # 7 minutes: 24 and 48 GB, decode, update
    python bench/gpu.py --only step --limits 24           # one whole LSP step in 24 GB
    python bench/gpu.py --shape tiny --device cpu         # the code alone, on any machine

No network is needed. Every row is printed and written as soon as it exists; a section that fails
prints its traceback, and the next one runs; what runs in a process of its own has a time limit.
Sections, in order: parity (bench/parity.py: backends, graphs, log-probs, what stays, offload),
game (the embedded one: 8 steps, resumed), step (a whole LSP step by train.py's play and update at
the paper's settings, for each memory limit in GB = 1e9 bytes, below 80 with --offload; completions
first of full length, then of geometric lengths with mean --mean-tokens, cut at the full length),
decode (batch 1 and 64, beside transformers' generate), update, logp (sampler against trainer, all
layers), attention (which kernels ran). Bounds: best of ten copies of 1 GiB and of ten bf16 products
of 8,192 squared, or 85 % of the data sheet where that is more.
"""
import argparse
import functools
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import measure  # first: it puts the project's folder before bench/
import parity
import torch
from measure import ROOT, Load
from torch.profiler import ProfilerActivity, profile

from model import Llama, parse_config
from plumbing.chat import Tokenizer
from plumbing.cli import Parser, run_script
from plumbing.files import InputError, pick_device
from plumbing.memory import MasterAdamW, Stage, to_host
from plumbing.phases import Phases, out_of_memory
from plumbing.runs import append_line
from plumbing.settings import ALGOS, MODELS, Settings, resolve
from rewards import SELF_REWARD, Judge, RewardModel
from sample import Completion, sample
from train import Game, Row, accumulate, plan_of, play, reference_log_probs, token_log_probs, update

SECTIONS = ("parity", "game", "step", "decode", "update", "logp", "attention")
PARTS = {1: (("parity", "game", "step"), [80.0]),
         2: (("step", "decode", "update", "logp", "attention"), [24.0, 48.0])}
# Data sheets: GB/s, and dense bf16 TFLOP/s with fp32 sums. The first name that fits counts.
SHEETS = {"H200": (4800, 989), "H100 PCIe": (2000, 756), "H100 NVL": (3938, 835),
          "H100": (3350, 989), "A100-SXM4-80GB": (2039, 312), "A100 80GB PCIe": (1935, 312),
          "A100": (1555, 312), "B200": (8000, 2250), "L40S": (864, 362), "L4": (300, 121),
          "A10": (600, 125), "RTX A6000": (768, 155), "RTX 5090": (1792, 209.5),
          "RTX 4090": (1008, 165), "RTX 3090": (936, 71)}
# Tokens of the fixed texts under Llama 3's tokenizer: the Challenger's whole prompt; what a chat
# template adds to a user's turn; the judge's prompt before and after instruction and response.
CHALLENGER, TEMPLATE, RUBRIC = 298, 35, (299, 37)


# ---------------------------------------------------------------- random models

def load(args, **more) -> Load:
    return Load(args.shape, layers=args.layers, vocabulary=args.vocabulary, **more)


def config_of(args, *, head: bool = False) -> dict:
    raw = measure.config_of(load(args)) | {"torch_dtype": "bfloat16"}
    scalar = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    return raw | (scalar if head else {})


@torch.no_grad()
def random_llama(args, *, seed: int, dtype=None, head: bool = False) -> Llama:
    """Built where it computes: norms 1, matrices ~ N(0, .02)."""
    raw = config_of(args, head=head)
    with torch.device("meta"):
        model = Llama(parse_config(raw)).to(dtype or args.dtype)
    model.to_empty(device=args.where)
    g = torch.Generator(args.where).manual_seed(seed)
    for p in model.parameters():
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, 0.02, generator=g)
    model.raw_config, model.carried = raw, {}
    return model


def random_rows(args, prompts: int, group: int, prompt: int, new: int) -> list[Row]:
    asked = measure.random_tokens(load(args), prompts, prompt, seed=1)
    said = measure.random_tokens(load(args), prompts * group, new, seed=2)
    g = torch.Generator().manual_seed(2)
    return [Row(asked[i // group], Completion(ids, [-1.0] * new, False),
                torch.randn((), generator=g).item()) for i, ids in enumerate(said)]


def words(folder: Path, args) -> Tokenizer:
    """Words w0, w1, ..., one token each, so that a text has as many tokens as it was written with;
    the chat template adds TEMPLATE words. No word ends a turn."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers
    count = config_of(args)["vocab_size"]
    made = Words(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "</s>", "chat_template": f"{{{{ 'w1 ' * {TEMPLATE} }}}}"
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"}))
    (folder / "config.json").write_text(json.dumps(config_of(args)))
    return Tokenizer(folder)


# ---------------------------------------------------------------- time, memory, bounds

def wait(args):
    if args.where.type == "cuda":
        torch.cuda.synchronize()


def seconds(args, run, times: int = 1, *inputs) -> float:
    """The least of `times` runs of run(*inputs)."""
    spent = []
    for _ in range(times):
        wait(args)
        begun = time.perf_counter()
        run(*inputs)
        wait(args)
        spent.append(time.perf_counter() - begun)
    return min(spent)


def bounds(args) -> dict:
    """GB/s read and written by a copy, and matrix-product TFLOP/s, to measure against."""
    small = args.where.type == "cpu"
    count, side = (2**20, 256) if small else (2**30, 8192)
    a, b = (torch.ones(count, dtype=torch.uint8, device=args.where) for _ in range(2))
    x = torch.randn(side, side, device=args.where).to(args.dtype)
    found = {"copy_gb_s": 2 * count / seconds(args, lambda: b.copy_(a), 10) / 1e9,
             "tflop_s": 2 * side**3 / seconds(args, lambda: x @ x, 10) / 1e12}
    return raised(found, "cpu" if small else torch.cuda.get_device_name())


def raised(found: dict, name: str) -> dict:
    """A machine that does little for us shall not make us look fast: at least 85 % of the sheet."""
    sheet = next((sheet for key, sheet in SHEETS.items() if key in name), None)
    return {"measured": found, "sheet": sheet} | {
        key: max(value, 0.85 * of_sheet)
        for (key, value), of_sheet in zip(found.items(), sheet or (0, 0))}


class Measured(Phases):
    """Phases that wait for the GPU at their end, and note what PyTorch kept from others, GB."""

    def __init__(self, args):
        super().__init__()
        self.args, self.reserved = args, {}

    @contextmanager
    def __call__(self, name: str, model=None):
        with super().__call__(name, model):
            yield
            wait(self.args)
        self.reserved[name] = torch.cuda.max_memory_reserved() / 1e9 if (
            self.args.where.type == "cuda") else None


# ---------------------------------------------------------------- step

def step_settings(args, limit: float) -> Settings:
    """Those of train.py --model SHAPE --gpu-memory LIMIT --offload, with the sizes that the budget
    chooses; of a shape without a preset the defaults."""
    sizes = ("query_tokens", "answer_tokens", "judge_tokens", "batch_tokens", "micro_batch_tokens")
    given = {key: getattr(args, key) for key in sizes if getattr(args, key)}
    given |= {"model": args.shape, "offload": limit < 80}
    if args.shape in MODELS:
        given |= {"gpu_memory": limit, "dry_run": True}
        s, preset = resolve(given)
        return plan_of(s).sized(s, preset | given)
    return Settings(checkpointing=True, **ALGOS["lsp"], **given)


def step_game(args, s: Settings, folder: Path) -> tuple[Game, MasterAdamW]:
    """What train.set_up() makes, around random models; frozen ones leave the device at once."""
    offload, tokenizer = s.offload, words(folder, args)
    text = lambda count: " ".join(["w2"] * count)
    game = Game(s, None, tokenizer, phase=Measured(args), challenger_prompts=[[2] * CHALLENGER])
    scorer = object.__new__(RewardModel)           # __init__ reads files
    scorer.tokenizer, scorer.truncated_inputs = tokenizer, 0
    scorer.batch_tokens, game.reward = min(16384, s.batch_tokens), scorer
    scorer.model = random_llama(args, head=True, seed=1)
    if offload:
        to_host(scorer.model)                         # before the next one is made
    game.reference = random_llama(args, seed=2)
    prompt = f"{text(RUBRIC[0])} {{instruction}} {{response}} {text(RUBRIC[1])}"
    game.judge = Judge(game.reference, tokenizer, prompt, SELF_REWARD, s.self_reward,
                       s.judge_temperature, s.judge_tokens, s.batch_tokens)
    if offload:
        to_host(game.reference)
    game.policy = random_llama(args, seed=2, dtype=torch.float32)
    game.policy.checkpointing = s.checkpointing
    if offload:
        game.phase.stage = Stage(args.where, args.dtype)
    optimizer = MasterAdamW(game.policy, args.dtype, weight_decay=0.0, offload=offload)
    return game, optimizer


def step_child(args):
    """A warm-up step, then the two that are measured, under the limit of this process: each prints
    its row."""
    limit = args.limits[0]
    if args.where.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total))
    with tempfile.TemporaryDirectory() as folder:
        s = step_settings(args, limit)
        game, optimizer = step_game(args, s, Path(folder))
    estimated = {name: sum(parts.values()) / 1e9 for name, parts in plan_of(s).phases(
        s).items()} if args.shape in MODELS else None
    every = max(1, round(args.mean_tokens))
    ends = set(range(0, config_of(args)["vocab_size"], every))        # each token: 1 in `every`
    for step, (lengths, stops, temperature) in enumerate((
            ("warm-up", ends, 1.0), ("full", set(), 0.0),
            (f"geometric, mean {every}", ends, 1.0))):
        game.tokenizer.stop_ids, game.judge.temperature = stops, temperature
        begun = time.perf_counter()
        r = play(game, step)
        m = update(game, optimizer, r, step)
        wait(args)
        whole = time.perf_counter() - begun
        count = lambda rows: sum(len(row.tokens) for row in rows)
        tokens = {"challenge": count(r.query_rows), "solve": sum(map(count, r.answer_rows)),
                  "judge": sum(len(j["judgement"].split()) for j in r.judgements)}
        if step:
            print(json.dumps({
                "limit_gb": limit, "offload": s.offload, "lengths": lengths, "step_seconds": whole,
                "tokens_per_second": {name: count / game.phase.seconds[name]
                                      for name, count in tokens.items()
                                      if game.phase.seconds.get(name)},
                "phase_seconds": dict(game.phase.seconds), "peak_gb": dict(game.phase.peak_gb),
                "reserved_gb": dict(game.phase.reserved), "budget_gb": estimated, "tokens": tokens,
                "logp_difference": m["logp_difference"], "faults": m["faults"],
                "batch_tokens": s.batch_tokens, "micro_batch_tokens": s.micro_batch_tokens}),
                  flush=True)


def step_section(args, bound, write):
    """One child process for each memory limit: it writes a row for each kind of lengths."""
    for limit in args.limits:
        flags = {"shape": args.shape, "layers": args.layers, "vocabulary": args.vocabulary,
                 "device": args.device,
                 "dtype": str(args.dtype).removeprefix("torch."),
                 "micro-batch-tokens": args.micro_batch_tokens, "batch-tokens": args.batch_tokens,
                 "query-tokens": args.query_tokens, "answer-tokens": args.answer_tokens,
                 "judge-tokens": args.judge_tokens, "mean-tokens": args.mean_tokens}
        command = [sys.executable, str(ROOT / "bench/gpu.py"), "--child", "--limits", f"{limit:g}",
                   *(f"--{key}={value}" for key, value in flags.items() if value is not None)]
        try:
            done = subprocess.run(command, capture_output=True, text=True,
                                  timeout=args.child_timeout)
            reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        except subprocess.TimeoutExpired:
            write({"limit_gb": limit, "failed": f"not done in {args.child_timeout} s"})
            continue
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                write(json.loads(line))
        if done.returncode:
            print(done.stderr[-3000:], flush=True)
            write({"limit_gb": limit, "failed": reason})


# ---------------------------------------------------------------- decode

def decode_section(args, bound, write):
    """Prefill and graph capture included, as in play; step_ms is what a further step costs."""
    prompt, new = args.prompt_tokens, args.new_tokens
    for batch in (1, 64):
        group, ours = min(8, batch), None
        prompts = measure.random_tokens(load(args), batch // group, prompt, seed=1)
        for side in ("ours", "transformers", *(["ours, compiled"] if args.compile else [])):
            if measure.missing(side.split(",")[0]):
                write({"batch": batch, "side": side, "skipped": measure.missing(side)})
                continue
            run, size = decoder(args, side, prompts, group)
            run(min(new, 16))                                         # warm-up
            short, long = seconds(args, run, 2, new // 4), seconds(args, run, 2, new)
            step, ours = (long - short) / (new - new // 4), ours or long
            cache = batch * (prompt + new * 0.625) * cache_bytes(args)       # mean held in between
            write({"batch": batch, "side": side, "whole_seconds": long, "step_ms": 1e3 * step,
                   "tokens_per_second": batch * new / long, "time_over_ours": long / ours,
                   "bandwidth_share": (size + cache) / step / 1e9 / bound["copy_gb_s"],
                   "weights_share": size / step / 1e9 / bound["copy_gb_s"]})
            del run
            release(args)


def cache_bytes(args) -> int:
    """Of one token: keys and values of all layers."""
    c = parse_config(config_of(args))
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * args.dtype.itemsize


def decoder(args, side: str, prompts: list[list[int]], group: int):
    """A function of the number of new tokens, and the bytes of the weights."""
    if side == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM
        measure.quiet(1)
        config = LlamaConfig(**config_of(args), attn_implementation="sdpa")
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(args.dtype)
        rotary = type(model.model.rotary_emb)(config)         # its table is no parameter
        model.to_empty(device=args.where)
        model.model.rotary_emb = rotary.to(args.where)
        model.tie_weights()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, 0.02)
        tokens = torch.tensor(prompts, device=args.where)
        model.eval()

        @torch.inference_mode()
        def run(new):
            model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True,
                           temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=group,
                           use_cache=True, pad_token_id=0, min_new_tokens=new, max_new_tokens=new)
    else:
        model = random_llama(args, seed=2)
        if side == "ours, compiled":
            for module in model.modules():           # what is many small kernels between products
                if type(module).__name__ in ("RMSNorm", "MLP"):
                    module.compile(backend=args.compile)
        g = torch.Generator().manual_seed(0)
        run = lambda new: sample(model, prompts, num_samples=group, max_new_tokens=new, generator=g)
    return run, sum(p.numel() * p.itemsize for p in model.parameters())


# ---------------------------------------------------------------- update

def update_section(args, bound, write):
    """A whole step's rows, N 8 and G 8: the gradient, and AdamW's pass, plain and offloaded.

    FLOPs: 2 a weight and token forward, 4 backward, logits for completions alone, attention's
    products left out; with_recomputation counts the checkpointed forward pass a second time.
    """
    rows = random_rows(args, args.queries, args.queries, args.query_tokens + TEMPLATE,
                       args.answer_tokens)
    body, head = measure.sizes(load(args))
    said = len(rows) * args.answer_tokens
    read = said - len(rows) + args.queries * (args.query_tokens + TEMPLATE)
    forward = 2.0 * (body * read + head * said)
    for offload in (False, True):
        try:
            r = {"offload": offload} | one_update(args, rows, offload)
            rate = bound["tflop_s"] * 1e12 * r["gradient_seconds"]
            write(r | {"flops_share": 3 * forward / rate, "with_recomputation": 4 * forward / rate})
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            write({"offload": offload, "skipped": "out of memory"})
        release(args)


def one_update(args, rows: list[Row], offload: bool) -> dict:
    s = Settings(model=args.shape, offload=offload, checkpointing=True,
                 micro_batch_tokens=args.micro_batch_tokens or 8192)
    policy = random_llama(args, seed=2, dtype=torch.float32)
    policy.checkpointing = True
    optimizer = MasterAdamW(policy, args.dtype, weight_decay=0.0, offload=offload)
    game = Game(s, policy, None, None, random_llama(args, seed=3))
    if offload:
        to_host(game.reference)
        game.phase.stage = Stage(args.where, args.dtype)
    found = {}
    for _ in range(2):                               # the first is warm-up
        game.phase.load(game.reference)
        found["reference_seconds"] = seconds(args, lambda: reference_log_probs(game, rows))
        game.phase.load(policy)
        found["gradient_seconds"] = seconds(args, lambda: accumulate(game, rows, 1.0))
        found["adamw_seconds"] = seconds(args, lambda: optimizer.step(3e-6, 1.0))
    return found


# ---------------------------------------------------------------- log-probs, attention

def logp_section(args, bound, write):
    """The sampler's log-probs against the trainer's, at temperature 1: |difference|, nats a token.
    Beside them a second pass of the trainer's in batches of another make-up, which rounds anew."""
    model = random_llama(args, seed=2)
    prompts = measure.random_tokens(load(args), 8, args.prompt_tokens, seed=1)
    groups = sample(model, prompts, num_samples=8, max_new_tokens=args.new_tokens,
                    generator=torch.Generator().manual_seed(0))
    rows = [Row(p, c, 1.0) for p, group in zip(prompts, groups) for c in group]
    by_size = {}
    with torch.no_grad():
        for size in (16, 1):
            parts = [token_log_probs(model, rows[i:i + size], 1.0)[0].flatten()
                     for i in range(0, len(rows), size)]
            by_size[size] = torch.cat(parts).float().cpu()
    sampled = torch.tensor([x for row in rows for x in row.completion.logp])
    for name, gap in (("sampler - trainer", (sampled - by_size[16]).abs()),
                      ("trainer - trainer, row by row", (by_size[1] - by_size[16]).abs())):
        write({"what": name, "tokens": len(gap), "mean": gap.mean().item(),
               "p99.9": gap.double().quantile(0.999).item(), "max": gap.max().item()})


def attention_section(args, bound, write):
    """Which of scaled_dot_product_attention's backends the profiler saw, in each kind of pass."""
    model = random_llama(args, seed=2)
    model.checkpointing = True
    rows = random_rows(args, 2, 2, args.prompt_tokens, args.new_tokens)
    judged = [[2] * RUBRIC[0] + row.prompt + row.completion.tokens for row in rows]
    passes = {
        "training, prompts": lambda: model(torch.tensor([row.prompt for row in rows[::2]],
                                                        device=args.where)).sum().backward(),
        "training, prompts and completions": lambda: token_log_probs(
            model, rows, 1.0)[0].sum().backward(),
        "prefill of judge's prompts": lambda: sample(model, judged, max_new_tokens=1),
        "prefill and decode": lambda: sample(model, [judged[0]] * 2, max_new_tokens=12)}
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.where.type == "cuda")
    for name, run in passes.items():
        model.zero_grad()
        with profile(activities=kinds) as seen:
            run()
            wait(args)
        backends = {e.key.removeprefix("aten::_scaled_dot_product_"): e.count
                    for e in seen.key_averages() if "_scaled_dot_product_" in e.key}
        kernels = {e.key: e.count for e in seen.key_averages()
                   if any(word in e.key for word in ("fmha", "flash_fwd", "flash_bwd", "cudnn"))
                   and "aten" not in e.key}
        write({"pass": name, "backends": backends, "kernels": kernels})


# ---------------------------------------------------------------- command line

def release(args):
    gc.collect()
    if args.where.type == "cuda":
        torch.cuda.empty_cache()


def main():
    parser = Parser(description="One GPU, exact shapes, random weights.")
    parser.add_argument("--shape", choices=list(measure.SHAPES), default="llama-3.2-3b")
    parser.add_argument("--layers", type=int, help="cut the shape's depth (default: all)")
    parser.add_argument("--vocabulary", type=int, help="cut the shape's (default: all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the device's")
    parser.add_argument("--part", type=int, choices=PARTS, help="1: about 5 minutes, 2: about 7")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--limits", type=float, nargs="+", default=[80.0, 24.0, 48.0],
                        help="step: GB of GPU memory; below 80 with --offload")
    parser.add_argument("--check-layers", type=int, default=4, help="parity: layers of its models")
    parser.add_argument("--child-timeout", type=float, default=150,
                        help="game and step: seconds that a process may take")
    parser.add_argument("--compile", nargs="?", const="inductor",
                        help="decode: also with torch.compile on norms and MLPs")
    for name, default, text in (
            ("queries", 8, "update: N and G"), ("query-tokens", 256, "a query"),
            ("answer-tokens", 512, "an answer"), ("judge-tokens", 256, "a judgement"),
            ("mean-tokens", 160, "step: mean of the geometric lengths"),
            ("prompt-tokens", 128, "decode, logp, attention: a prompt"),
            ("new-tokens", 256, "decode, logp, attention: a completion"),
            ("batch-tokens", None, "step: as train.py's (default: the budget's choice)"),
            ("micro-batch-tokens", None, "step: the same; update: 8192")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--out", help="file to which the JSON lines are appended")
    parser.add_argument("--child", action="store_true", help="step: one limit, in this process")
    args = parser.parse_args()
    if args.part:
        args.only, args.limits = PARTS[args.part]
    if args.new_tokens < 4:
        raise InputError("--new-tokens must be at least 4")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here: nothing measured (the code alone runs with "
                         "--device cpu --shape tiny)")
    args.where, args.dtype = pick_device(args.device)[0], getattr(
        torch, args.dtype) if args.dtype else pick_device(args.device)[1]
    if args.child:
        step_child(args)
        return
    about = {"benchmark": "gpu", "date": str(date.today()), "shape": args.shape,
             "layers": args.layers, "vocabulary": args.vocabulary, "torch": torch.__version__,
             "dtype": str(args.dtype),
             "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name()}
    bound = {}
    for name in ("bounds", *args.only):
        begun = time.perf_counter()
        write = functools.partial(write_row, args, about | {"section": name}, begun)
        for what, run in jobs(args, name, bound, write):
            try:
                row = run()
            except Exception as error:             # the next one runs
                traceback.print_exc()
                row = {"failed": f"{type(error).__name__}: {error}"[:600]}
            if row:
                write(what | row)
            release(args)


def jobs(args, name: str, bound: dict, write) -> list[tuple[dict, Callable]]:
    """What a section calls, each with the beginning of its row. A function returns a row, or it
    writes its rows itself."""
    if name == "bounds":
        return [({}, lambda: bound.update(bounds(args)) or bound)]
    if name == "parity":
        return [({"check": check.__name__}, functools.partial(check, checked(args)))
                for check in parity.CHECKS]
    if name == "game":
        return [({}, functools.partial(parity.game_section, args))]
    run = {"step": step_section, "decode": decode_section, "update": update_section,
           "logp": logp_section, "attention": attention_section}[name]
    return [({}, functools.partial(run, args, bound, write))]


def write_row(args, about: dict, begun: float, row: dict):
    """Print a row, and append it to --out; numbers with five digits."""
    row = about | row | {"after_seconds": time.perf_counter() - begun}
    line = json.loads(json.dumps(row, default=str), parse_float=lambda x: float(f"{float(x):.5g}"))
    print(json.dumps({key: value for key, value in line.items() if key not in about
                      or key == "section"}), flush=True)
    if args.out:
        append_line(Path(args.out), line)


def checked(args):
    """The arguments with what parity.py needs: build() and the vocabulary's size, few layers."""
    few = argparse.Namespace(**vars(args) | {"layers": min(args.check_layers, args.layers or 99)})
    few.vocabulary_size = config_of(few)["vocab_size"]
    few.build = functools.partial(random_llama, few)
    return few


if __name__ == "__main__":
    run_script(main)
