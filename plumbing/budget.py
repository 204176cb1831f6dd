"""What a run needs, told before anything is allocated: memory phase by phase, time, disk.

    python train.py --model llama-3.2-3b --dry-run --gpu-memory 24     # nothing is allocated
    sized(s, fixed)              # settings whose sampler and micro-batches fit the GPU at hand

Read from config.json files alone. GB are 1e9 bytes of tensors, as torch.cuda.max_memory_allocated
counts them; what libraries take (CUDA some 0.5 GB) is not in them. Lengths are at their limits: a
run whose texts end early needs less. bench/budget.py holds the figures against measured ones.
Shapes: N queries, G answers, B rows of a pass, P distinct prompts in it, S tokens of a prompt, T of
what follows, D hidden size, H query heads, K key-value heads, d head size, V vocabulary.
"""
import math
import os
from bisect import bisect_right
from dataclasses import dataclass, replace

import torch

import rewards
from model import read_config
from plumbing.cache import PREFILL_TOKENS
from plumbing.config import Config
from plumbing.files import HERE, InputError, find_model, pick_device, read_prompt
from plumbing.logprobs import chunk_width
from plumbing.memory import BLOCK

# What must stay free: a share of the memory for the allocator's gaps, and of what is estimated (all
# but weights, gradients and moments, which are exact) a share for the estimate's error.
SPARE_MEMORY, SPARE_WORK = 0.03, 0.1
BATCH_TOKENS = [2**k for k in range(18, 11, -1)]         # what sized() tries
MICRO_BATCH_TOKENS = [2**k for k in range(13, 8, -1)]
TURN = 40                    # tokens that a chat template adds to a text, Llama 3's date included
LETTERS = 3.5                # a token of English prose has about 4; our two prompts have 3.7 to 4.3
SEGMENT = 64                 # tokens of a long sentence
PARTS = ("policy", "reference", "judge", "reward model", "masters", "gradients", "moments",
         "cache", "activations", "logits", "head's gradient")
STATIC = PARTS[:7]


# ---------------------------------------------------------------- what is there

@dataclass(frozen=True)
class Machine:
    device: str                      # cuda, cpu or mps
    width: int                       # bytes of a number in play
    memory: float                    # bytes that the run may have
    source: str                      # where that figure is from


def machine(s) -> Machine:
    """The GPU at hand, or the one that --gpu-memory imagines for a dry run, or this host."""
    given = f"--gpu-memory {s.gpu_memory:g}"
    if s.dry_run and s.gpu_memory and not (s.device in ("auto", "cuda")
                                           and torch.cuda.is_available()):
        return Machine("cuda", 2, s.gpu_memory * 1e9, given)
    device, dtype = pick_device(s.device)
    if device.type == "cuda":
        if s.gpu_memory:
            return Machine("cuda", dtype.itemsize, s.gpu_memory * 1e9, given)
        return Machine("cuda", dtype.itemsize, torch.cuda.mem_get_info(device)[0],
                       "free on " + torch.cuda.get_device_name(device))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(device.type, dtype.itemsize, memory, "memory of this host")


def read_models(s) -> dict[str, Config]:
    """The shape of each model that the run holds; what two roles share is there once."""
    path = lambda name: find_model(name, weights=False)
    policy = path(s.model)
    reference = path(s.reference) if s.reference else policy
    judge = path(s.judge) if s.judge else reference
    shared = bool(s.reading) and judge == reference
    found = {"policy": policy}
    if s.beta or shared:
        found["reference"] = reference
    if s.reading and not shared:
        found["judge"] = judge
    if s.reward not in rewards.CHECKS and not s.verdict:
        found["reward model"] = path(s.reward)
    return {role: read_config(folder) for role, folder in found.items()}


def prompt_lengths(s) -> dict[str, int]:
    """Tokens of the prompt files, guessed from their letters: no tokenizer is read. `shown`: what
    the judge sees beside its instructions and the answer."""
    count = lambda text: math.ceil(len(text) / LETTERS)
    challenged, judge, shown = s.algo not in ("grpo", "rlpt"), "", s.query_tokens
    if s.self_reward:
        judge = read_prompt(s.self_reward_prompt)
    elif s.verdict:
        judge = read_prompt(HERE / "prompts" / f"verdict{'_strict' * s.strict}.txt")
        shown = SEGMENT * (1 if s.strict else s.reference_segments)
    return {"challenger": TURN + count(read_prompt(s.challenger_prompt)) if challenged else 0,
            "judge": TURN + count(judge), "rubric": count(judge.split("{")[0]), "shown": shown}


def parameters(c: Config) -> int:
    """Numbers in the weights of a model."""
    return body(c) + c.vocab_size * c.hidden_size * (
        1 if c.tie_word_embeddings or c.scalar_head else 2) + c.hidden_size * c.scalar_head


def body(c: Config) -> int:
    """Numbers in its blocks and last norm: all but embedding and head."""
    block = 2 * c.hidden_size * (queries(c) + keys(c)) + 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * (block + 2 * c.hidden_size) + c.hidden_size


def queries(c: Config) -> int:
    return c.num_attention_heads * c.head_dim


def keys(c: Config) -> int:
    return c.num_key_value_heads * c.head_dim


# ---------------------------------------------------------------- memory
#
# Each phase is a few moments at which memory stands high; its peak is the highest of them. All of
# them follow the code, line by line: a tensor that is made there is counted here.

def token_cache(c: Config, width: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * c.num_hidden_layers * keys(c) * width


def block_pass(c: Config, width: int) -> int:
    """A token's numbers in a block without gradients, at most: the MLP's gate, up, silu(gate) and
    product beside the block's input, what attention made of it, and its norm."""
    return (3 * c.hidden_size + 4 * c.intermediate_size) * width


def mask(c: Config, rows: int, new: int, seen: int, width: int) -> int:
    """Llama.additive."""
    return rows * new * seen * width * c.num_attention_heads // c.num_key_value_heads


def sampling(c: Config, width: int, *, rows: int, each: int, prompt: int, common: int, limit: int,
             batch_tokens: int) -> list[dict]:
    """sample.sample on prompts of equal length, `common` tokens of which all share."""
    size = prompt + limit
    B = min(rows, max(1, batch_tokens // size))
    P = math.ceil(B / each)
    common = common if common >= 32 and P > 1 else 0
    count = min(P, max(1, PREFILL_TOKENS // (prompt - common)))      # prompts in a pass
    new, token, V = count * (prompt - common), token_cache(c, width), c.vocab_size
    passing = new * block_pass(c, width)
    if common:
        passing += mask(c, count, prompt - common, prompt, width)
    buffers = rows * limit * 12 + B * limit * 8          # tokens and log-probs; uniform numbers
    cache = B * size * token
    return [{"cache": cache + (common + count * prompt) * token, "activations": passing + buffers,
             "logits": 4 * V * P},
            # sample.pick: logits of this step and the next, or their softmax
            {"cache": cache, "activations": B * block_pass(c, width) + buffers,
             "logits": (8 + 4 * (width == 2) + 4) * B * V}]


def head_logits(c: Config, width: int, tokens: int, device: str) -> int:
    """Bytes of logprobs.log_probs: a chunk's logits in fp32; beside them in bfloat16 as the product
    that they are made of, and, on the way back, the last chunk's gradient."""
    return tokens * chunk_width(tokens, c.vocab_size, device) * (4 + 4 * (width == 2))


def scoring(c: Config, width: int, *, B: int, P: int, prompt: int, rest: int,
            device: str | None = None) -> list[dict]:
    """cache.shared_forward without gradients: prompts, whose keys and values are kept, then what
    follows them; then, given the device, log-probs."""
    logits = head_logits(c, width, B * rest, device) if device else 0
    held = P * prompt * token_cache(c, width)
    hidden = P * prompt * c.hidden_size * width
    joined = (2 * B * (prompt + rest) * keys(c) * width      # Continuation.write, one layer's
              + mask(c, B, rest, prompt + rest, width))
    return [{"cache": held, "activations": P * prompt * block_pass(c, width)},
            {"cache": held, "activations": hidden + joined + B * rest * block_pass(c, width)},
            {"logits": logits, "activations": 2 * B * (1 + rest) * c.hidden_size * width}]


def last_hidden(rows: int, each: int, prompt: int, rest: int, tokens: int) -> dict:
    """The largest batch of rewards.last_hidden, `tokens` a pass."""
    B = min(rows, max(1, tokens // (prompt + rest)))
    # Sorted by length, groups are torn apart: a group's only row in a batch is a prompt itself.
    return {"B": B, "P": min(math.ceil(rows / each), B), "rest": rest,
            "prompt": prompt if B == rows else prompt + rest}


def micro_batch(rows: int, each: int, prompt: int, rest: int, tokens: int) -> dict:
    """The largest of gradient.micro_batches."""
    room = lambda B: math.ceil(B / each) * prompt + B * rest
    B = max(1, bisect_right(range(1, rows + 1), tokens, key=room))
    return {"B": B, "P": math.ceil(B / each), "prompt": prompt, "rest": rest}


def differentiating(c: Config, width: int, *, B: int, P: int, prompt: int, rest: int, device: str,
                    checkpointing: bool) -> list[dict]:
    """gradient.accumulate, one micro-batch: activations that wait for the backward pass; beside
    them the head's passes, then a block's backward one."""
    D, V, inner = c.hidden_size, c.vocab_size, c.intermediate_size
    tokens, pairs = P * prompt + B * rest, P * prompt + B * (prompt + rest)   # pairs: keys, values
    # A block keeps its input, two norms and attention's output for the next products (4 D); q, k,
    # v, and attention's result, twice; gate, up and their product. Norms are recomputed.
    kept = lambda n, pairs: ((4 * D + 3 * queries(c) + 3 * inner) * n + 2 * keys(c) * pairs) * width
    longest, block = max(P * prompt, B * rest), 0
    if checkpointing:
        waiting = c.num_hidden_layers * (D * tokens + 2 * keys(c) * P * prompt) * width
        block = kept(longest, B * (prompt + rest))
    else:
        waiting = c.num_hidden_layers * kept(tokens, pairs)
    waiting += mask(c, B, rest, prompt + rest, width) + 3 * D * tokens * width
    # The head's gradient waits for the embedding's.
    logits = head_logits(c, width, B * rest, device)
    return [{"activations": waiting, "logits": logits, "head's gradient": D * V * width},
            {"activations": waiting + block + longest * 4 * inner * width,
             "head's gradient": D * V * width},
            {"activations": waiting * P * prompt / tokens, "head's gradient": 2 * D * V * width}]


def budget(s, models: dict[str, Config], text: dict[str, int], m: Machine) -> dict[str, dict]:
    """Bytes by phase and part: {"solve": {"policy": ..., "cache": ...}, ...}, each at its peak."""
    c, width, N, G = models["policy"], m.width, s.queries, s.answers
    reference, scorer = models.get("reference"), models.get("reward model")
    judge = models.get("judge", reference)
    count = parameters(c)
    asked = TURN + s.query_tokens                                   # a Solver's prompt
    frozen = {role: parameters(x) * width for role, x in models.items() if role != "policy"}
    policy = {"policy": count * width}
    # An fp32 policy is its own master.
    state = ({"masters": 4 * count} if width < 4 else {}) | {"moments": 8 * count}

    def resident(role: str) -> dict:
        work = {"gradients": 4 * count} if role == "update" else {}
        if not s.offload:
            return policy | frozen | state | work
        return {role: frozen[role]} if role in frozen else policy | work

    play = dict(batch_tokens=s.batch_tokens)
    found = {}

    def phase(name: str, role: str, moments: list[dict]):
        found[name] = resident(role) | max(moments, key=lambda parts: sum(parts.values()))

    if text["challenger"]:
        phase("challenge", "policy", sampling(c, width, rows=N, each=N, prompt=text["challenger"],
                                              common=0, limit=s.query_tokens, **play))
    phase("solve", "policy", sampling(c, width, rows=N * G, each=G, prompt=asked, common=0,
                                      limit=s.answer_tokens, **play))
    if s.eval_prompts:               # as many as there are: as many as the sampler takes
        together = max(1, s.batch_tokens // (asked + s.answer_tokens))
        phase("eval", "policy", sampling(c, width, rows=together, each=1, prompt=asked, common=0,
                                         limit=s.answer_tokens, **play))
    tokens = min(16384, s.batch_tokens)
    if scorer:
        phase("reward", "reward model", scoring(
            scorer, width, **last_hidden(N * G, G, asked, s.answer_tokens, tokens)))
    if s.reading:
        role = "judge" if "judge" in models else "reference"
        pair = text["judge"] + text["shown"]
        if s.reading == "expected":
            phase("judge", role, scoring(
                judge, width, **last_hidden(N * G, G, pair, s.answer_tokens, tokens)))
        else:
            phase("judge", role, sampling(
                judge, width, rows=N * G, each=1, prompt=pair + s.answer_tokens,
                common=text["rubric"], limit=s.judge_tokens, **play))
    batches = [micro_batch(N * G, G, asked, s.answer_tokens, s.micro_batch_tokens)]
    if text["challenger"]:
        batches.append(micro_batch(N, N, text["challenger"], s.query_tokens, s.micro_batch_tokens))
    if s.beta:
        phase("reference", "reference", [moment for batch in batches for moment in scoring(
            reference, width, **batch, device=m.device)])
    moments = [moment for batch in batches for moment in differentiating(
        c, width, **batch, device=m.device, checkpointing=s.checkpointing)]
    if s.offload:                    # MasterAdamW._stream: two blocks of three tensors on their way
        largest = c.vocab_size * c.hidden_size
        moments.append({"activations": 2 * 3 * 4 * min(BLOCK, largest)})
    phase("update", "update", moments)
    return found


def on_host(s, models: dict[str, Config], m: Machine) -> dict[str, float]:
    """Bytes of host memory by part, beside the process itself; a run on the host has no others."""
    count = parameters(models["policy"])
    if m.device != "cuda":
        return {}
    if not s.offload:
        return {"checkpoint": 4 * count}             # while it is written, a file at a time
    frozen = {role: parameters(c) * m.width for role, c in models.items() if role != "policy"}
    return frozen | {"masters": 4 * count, "moments": 8 * count}


# ---------------------------------------------------------------- what fits

def lacking(found: dict[str, dict], memory: float, names=None) -> float:
    """Bytes by which these phases (default: all) go over the memory, spare room included."""
    over = [sum(parts.values()) - (1 - SPARE_MEMORY) * memory + SPARE_WORK * sum(
        size for part, size in parts.items() if part not in STATIC)
        for name, parts in found.items() if names is None or name in names]
    return max(over)


def largest(s, plan, fixed=()):
    """Settings with the largest sizes that fit; those that are fixed stay, and where none fits."""
    for key, sizes, mine in (("batch_tokens", BATCH_TOKENS, False),
                             ("micro_batch_tokens", MICRO_BATCH_TOKENS, True)):
        for size in sizes if key not in fixed else ():
            tried = replace(s, **{key: size})
            found = budget(tried, *plan)
            names = [name for name in found if (name in ("update", "reference")) == mine]
            if lacking(found, plan[-1].memory, names) <= 0:
                s = tried
                break
    return s


def plan(s) -> tuple[dict[str, Config], dict[str, int], Machine]:
    """What budget() needs beside the settings."""
    return read_models(s), prompt_lengths(s), machine(s)


def sized(s, fixed):
    """Settings with --batch-tokens and --micro-batch-tokens chosen for the GPU, where nobody chose
    them (`fixed`: what the command line or a preset has). On a CPU the defaults stay."""
    if not (s.dry_run and s.gpu_memory) and pick_device(s.device)[0].type != "cuda":
        return s
    needed = plan(s)
    s = largest(s, needed, fixed)
    exact = max(sum(parts.get(part, 0) for part in STATIC)
                for parts in budget(s, *needed).values())
    if exact > needed[-1].memory and not s.dry_run:
        raise InputError(f"{needed[-1].memory / 1e9:.1f} GB ({needed[-1].source}), and weights, "
                         f"gradients and moments alone take {exact / 1e9:.1f}: "
                         + advice(s, needed))
    return s


def advice(s, plan) -> str:
    """Whether the run fits; if not, the first switches that make it, the cheapest first."""
    m, found = plan[-1], budget(s, *plan)
    short = lacking(found, m.memory)
    if short <= 0:
        return "fits"
    tries = [{}, {"checkpointing": True}] + [{"offload": True}, {
        "offload": True, "checkpointing": True}] * (m.device == "cuda")
    for change in tries:
        tried = largest(replace(s, **change), plan)
        # Sizes that were chosen and need not shrink stay as they are.
        for key in ("batch_tokens", "micro_batch_tokens"):
            if getattr(tried, key) > getattr(s, key):
                tried = replace(tried, **{key: getattr(s, key)})
        if lacking(budget(tried, *plan), m.memory) <= 0:
            flags = [f"--{key.replace('_', '-')}" + f" {value}" * (value is not True)
                     for key, value in vars(tried).items() if value != getattr(s, key)]
            return f"does not fit, {short / 1e9:.1f} GB short: {' '.join(flags)} would make it fit"
    least = replace(tried, batch_tokens=BATCH_TOKENS[-1], micro_batch_tokens=MICRO_BATCH_TOKENS[-1])
    return (f"does not fit, {short / 1e9:.1f} GB short; with every switch ("
            f"{' '.join('--' + key for key in tries[-1])}, least sizes) still "
            f"{lacking(budget(least, *plan), m.memory) / 1e9:.1f} short")
