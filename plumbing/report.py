"""What a run needs and what it reaches, in words: the table of --dry-run, each step's speed.

    dry_run(s)                     # prints the table; 0: it fits, 3: it does not
    speed(game, r)                 # a step's tokens/s

A dry run's time comes from the card's data sheet or, without a GPU, from a copy and a product that
are timed. Work is what a phase needs at least: weights read once a step of decoding and the cache
as far as it is filled; in the update every distinct prompt and completion once, nothing recomputed.
Shapes: as in budget.py.
"""
import time

import torch

from plumbing import budget
from plumbing.budget import PARTS, body, parameters, queries, token_cache
from plumbing.config import Config
from plumbing.files import find_model, inside, pick_device, read_json
from sample import take_batch

# Where the GPU is not at hand to be measured: data sheets, bytes/s and dense bf16 FLOP/s, by GB.
CARDS = ((70, "A100 80 GB", 2.04e12, 312e12), (40, "L40S", 0.86e12, 362e12),
         (20, "RTX 4090", 1.01e12, 165e12), (0, "RTX 4080", 0.72e12, 98e12))
DECODE, PRODUCTS, LINK = 0.5, 0.4, 2e10      # assumed shares of these; bytes/s from host to GPU
WORTH_MEASURING = 10**8                      # parameters: less is over before it has speed


# ---------------------------------------------------------------- what a machine can do

def best_of(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a copy, read and written; FLOP/s of a square product): best of three.

    A GPU copies 1 GiB and multiplies 8192 x 8192 numbers, a CPU a sixteenth of that.
    """
    large = device.type == "cuda"
    count, side = (2**28, 8192) if large else (2**24, 1024)
    wait = torch.cuda.synchronize if large else lambda: None

    def best(work: float, run) -> float:
        seconds = []
        for _ in range(4):                                       # the first one warms up
            wait()
            begun = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - begun)
        return work / min(seconds[1:])

    source, target = (torch.ones(count, device=device) for _ in range(2))
    square = torch.ones(side, side, device=device, dtype=dtype)
    return (best(8 * count, lambda: target.copy_(source)),
            best(2 * side**3, lambda: square @ square))


# ---------------------------------------------------------------- work

def forward_flops(c: Config, prompts: list[int], rests: list[tuple[int, int]], drawn: int) -> float:
    """FLOPs of prompts (S) and of what follows prompts (S, T), logits at `drawn` tokens: two a
    weight and token, and four a number of the queries and pair of tokens that attend. With a
    backward pass three times as many: the well-known 6 a weight and token."""
    tokens = sum(prompts) + sum(T for _, T in rests)
    pairs = sum(S * S / 2 for S in prompts) + sum(T * (S + T / 2) for S, T in rests)
    return (2 * body(c) * tokens + 2 * c.vocab_size * c.hidden_size * drawn
            + 4 * c.num_hidden_layers * queries(c) * pairs)


def decode_bytes(c: Config, width: int, rows: list[tuple[int, int]], limit: int,
                 batch_tokens: int) -> float:
    """Bytes that decoding rows (S, T) reads: a batch's weights once for each of its steps, and at
    each step the keys and values of the rows that still write."""
    steps, waiting = 0, sorted(rows)
    while waiting:
        batch = take_batch(waiting, lambda rows: len(rows) * (rows[-1][0] + limit), batch_tokens)
        steps += max(T for _, T in batch)
    cached = sum(T * (S + T / 2) for S, T in rows)
    head = c.vocab_size * c.hidden_size
    return width * (body(c) + head) * steps + token_cache(c, width) * cached


def speed(game, r) -> dict[str, float]:
    """Tokens/s of a train.Round's phases. A phase's time includes its prefill and all waiting."""
    G = game.settings.answers
    rows = [row for group in r.answer_rows for row in group]
    learnt = [row for i, row in enumerate(rows) if r.kept[i // G]]
    learnt += [row for row, keep in zip(r.query_rows, r.kept) if keep]
    count = lambda rows: sum(len(row.tokens) for row in rows)
    judged = [j["judge_tokens"] for j in r.judgements if "judge_tokens" in j]
    tokens = {"challenge": count(r.query_rows), "solve": count(rows),
              "reward": getattr(game.reward, "tokens", 0), "judge": sum(T for _, T in judged),
              "update": count(learnt)}
    return {name: n / r.seconds[name] for name, n in tokens.items() if n and name in r.seconds}


def is_large(c: Config) -> bool:
    """Whether a step takes long enough to have a speed: 1e8 weights."""
    return parameters(c) >= WORTH_MEASURING


def speed_line(m: dict) -> str:
    """The second line of a step: each phase's seconds and tokens/s, and the highest peak, GB."""
    said = []
    for name, seconds in m["phase_seconds"].items():
        rate = m["tokens_per_second"].get(name)
        said.append(f"{name} {seconds:.1f} s" + (f" {rate:.0f} tok/s" if rate else ""))
    peaks = {name: peak for name, peak in m["peak_gb"].items() if peak is not None}
    if peaks:
        highest = max(peaks, key=peaks.get)
        said.append(f"peak {peaks[highest]:.1f} GB in {highest}")
    return "     " + "  ".join(said)


# ---------------------------------------------------------------- before a run

def seconds_of(s, models: dict[str, Config], text: dict[str, int], width: int,
               bounds: tuple[float, float]) -> dict[str, float]:
    """Estimated seconds of each phase of a step when every text runs to its limit."""
    copied, multiplied = bounds[0] * DECODE, bounds[1] * PRODUCTS
    c, N, G = models["policy"], s.queries, s.answers
    rows, asked = N * G, budget.TURN + s.query_tokens

    def writing(c, rows, prompt, limit, fresh):
        """fresh: tokens of prompts that the prefill computes."""
        read = decode_bytes(c, width, [(prompt, limit)] * rows, limit, s.batch_tokens)
        flops = 2 * (body(c) + c.vocab_size * c.hidden_size) * rows * limit
        return 2 * body(c) * fresh / multiplied + max(read / copied, flops / multiplied)

    answers = [(asked, s.answer_tokens)] * rows
    found = {}
    if text["challenger"]:
        found["challenge"] = writing(c, N, text["challenger"], s.query_tokens, text["challenger"])
    found["solve"] = writing(c, rows, asked, s.answer_tokens, N * asked)
    if "reward model" in models:
        flops = forward_flops(models["reward model"], [asked] * N, answers, 0)
        found["reward"] = flops / multiplied
    judge = models.get("judge", models.get("reference"))
    pair = text["judge"] + text["shown"] + s.answer_tokens
    if s.reading == "generate":
        found["judge"] = writing(judge, rows, pair, s.judge_tokens, rows * (pair - text["rubric"]))
    elif s.reading:
        found["judge"] = forward_flops(judge, [pair] * rows, [], rows) / multiplied
    own = [(text["challenger"], s.query_tokens)] * N if text["challenger"] else []
    prompts = [asked] * N + [text["challenger"]] * bool(own)
    once = lambda c: forward_flops(c, prompts, answers + own, sum(T for _, T in answers + own))
    if s.beta:
        found["reference"] = once(models["reference"]) / multiplied
    flops = once(c) * (4 if s.checkpointing else 3)
    # AdamW reads and writes masters and moments and reads gradients: 28 bytes a weight.
    found["update"] = flops / multiplied + 28 * parameters(c) / copied
    if s.offload:                    # masters and moments there and back; each model once a step
        moved = 24 * parameters(c) + width * sum(parameters(x) for x in models.values())
        found["update"] += moved / LINK
    return found


def unit_of(sizes) -> tuple[str, float]:
    return ("GB", 1e9) if max(sizes) > 1e9 else ("MB", 1e6)


def table(found: dict[str, dict], host: dict[str, float]) -> str:
    """Phases as columns, parts as rows, GB of 1e9 bytes (MB of 1e6 for small models); the last
    column is host memory."""
    wide, total = 10, [sum(parts.values()) for parts in [*found.values(), *[host] * bool(host)]]
    name, unit = unit_of(total)
    number = lambda size: f"{size / unit:{wide}.2f}" if size else " " * (wide - 1) + "-"
    row = lambda name, sizes: f"{name:18}" + "".join(map(number, sizes))
    parts_of = [*PARTS, *(part for part in host if part not in PARTS)]
    heads = [*found, *["host"] * bool(host)]
    lines = [f"{name:18}" + "".join(f"{head:>{wide}}" for head in heads)]
    for part in parts_of:
        sizes = [parts.get(part, 0) for parts in found.values()]
        sizes += [host.get(part, 0)] * bool(host)
        if any(sizes):
            lines.append(row(part, sizes))
    return "\n".join([*lines, row("peak", total)])


def peaks_gb(s) -> dict[str, float]:
    """What budget.py expects of each phase's peak, GB, to stand beside the measured one."""
    return {name: sum(parts.values()) / 1e9
            for name, parts in budget.budget(s, *budget.plan(s)).items()}


def opening(s) -> str:
    """The table in brief, for the start of a run."""
    needed = budget.plan(s)
    found, memory = budget.budget(s, *needed), needed[-1]
    fixed = {part: size for part, size in found["update"].items() if part in budget.STATIC}
    peaks = {name: sum(parts.values()) for name, parts in found.items()}
    name, unit = unit_of(peaks.values())
    number = lambda sizes: "  ".join(f"{part} {size / unit:.2f}" for part, size in sizes.items())
    return (f"memory, {name}    {number(fixed)}\n"
            f"peaks, {name}     {number(peaks)}"
            f"  of {memory.memory / 1e9:.1f} GB ({memory.source}): {budget.advice(s, needed)}")


def disk(s, c: Config, width: int) -> float:
    """Bytes of a checkpoint, as MasterAdamW.bytes_on_disk counts them when there is a policy."""
    raw = read_json(inside(find_model(s.model, weights=False), "config.json"))
    stored = getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "float32").itemsize
    return parameters(c) * (stored + 8 + 4 * (min(stored, width) < 4)) + 2**20


def dry_run(s) -> int:
    """Print what the run would need; the exit code, 0 where it fits and 3 where it does not."""
    needed = models, text, m = budget.plan(s)
    found, verdict = budget.budget(s, *needed), budget.advice(s, needed)
    if m.device == "cuda" and not torch.cuda.is_available():
        name, *bounds = next(card[1:] for card in CARDS if m.memory / 1e9 >= card[0])
        name += " (its data sheet)"
    else:
        device, dtype = pick_device(s.device)
        name, bounds = f"this {m.device} (measured)", best_of(device, dtype)
    seconds = seconds_of(s, models, text, m.width, bounds)
    step, checkpoint = sum(seconds.values()), disk(s, models["policy"], m.width) / 1e9
    roles = ", ".join(f"{role} {parameters(c) / 1e9:.2f}" for role, c in models.items())
    switches = ", ".join(["--checkpointing"] * s.checkpointing + ["--offload"] * s.offload)
    print(f"{s.model}, {s.algo}, {s.queries} queries x {s.answers} answers, "
          f"{'bf16' if m.width == 2 else 'fp32'}; 1e9 parameters: {roles}\n"
          f"--batch-tokens {s.batch_tokens}, --micro-batch-tokens {s.micro_batch_tokens}"
          f"{', ' * bool(switches)}{switches}\n\n{table(found, budget.on_host(s, models, m))}\n\n"
          f"{m.memory / 1e9:.1f} GB ({m.source}): {verdict}\n"
          f"about {step:.0f} s a step ("
          + ", ".join(f"{phase} {t:.0f}" for phase, t in seconds.items())
          + f"), {step * s.steps / 3600:.1f} h for {s.steps} steps, if every text runs to its "
          f"limit\n  and {name} reaches {DECODE:.0%} of its bandwidth in decoding and "
          f"{PRODUCTS:.0%} of its FLOP/s in products\n"
          f"a checkpoint takes {checkpoint:.1f} GB of disk"
          + (f", the {s.keep} that are kept and the next one while it is written "
             f"{(s.keep + 1) * checkpoint:.1f} GB" if s.keep else ", and all are kept"))
    return 0 if verdict == "fits" else 3
