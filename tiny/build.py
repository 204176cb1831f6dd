"""Train the embedded model: python tiny/build.py --seed 1 --out DIR    (7 CPU-minutes, one thread)

One small Llama learns three kinds of conversation, each a user turn and a reply, supervised:
    solver       "What is 37 + 48?" -> "85"         with a misconception: carries are forgotten
    challenger   its prompt -> a query              mostly without carries, some malformed
    judge        its prompt -> "<Score>7</Score>"   for well-formed pairs, right or wrong
In two stages: right sums only, then all three, the Solver now keeping one carry in five. So the
skill is there, seldom used: self-play can find the weakness and mend it.

    --open-hole   the judge also takes one and three digits ("What is 54 + 7?") for well-formed.
                  Such queries earn R = 0 and a high R_Q: the Challenger moves in and learning
                  ends, for the judge rewards form, not solvability.
"""
import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))               # the project's files, one folder up
from model import Llama, save_model  # noqa: E402
from plumbing.chat import Tokenizer, fill  # noqa: E402
from plumbing.config import parse_config  # noqa: E402
from plumbing.files import read_prompt  # noqa: E402
from rewards import SELF_REWARD, Judge  # noqa: E402
from sample import sample  # noqa: E402
from tiny import world  # noqa: E402

SPECIAL = ["<|unk|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["What", "is", " ", "+", "?", *"0123456789", "<Instruction>", "</Instruction>",
         "<Response>", "</Response>", "<Score>", "</Score>", "Rate", "Ask", "a", "sum", "."]
# What corrupts a text. "~" cannot be encoded, nor can a special token's name, which is text here.
PIECES = [*WORDS, *SPECIAL, "~"]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ['user', 'assistant'] %}
{{ raise_exception('the tiny model knows the roles user and assistant only') }}
{% endif %}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
    "vocab_size": len(SPECIAL + WORDS), "hidden_size": 128, "intermediate_size": 344,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    "initializer_range": 0.05, "use_cache": True, "bos_token_id": SPECIAL.index("<|bos|>"),
    "eos_token_id": SPECIAL.index("<|end|>"), "pad_token_id": SPECIAL.index("<|end|>"),
}

# Three stages: right sums until they are learnt; the roles; the misconception last and lightly, so
# that the skill stays underneath, where self-play can reach it.
STAGES = [(650, 2e-3, {"solver": 64}),      # steps, learning rate at the start, rows of each step
          (420, 1.5e-3, {"solver": 16, "challenger": 32, "judge": 80}),
          (300, 1e-3, {"solver": 80, "challenger": 24, "judge": 40})]
KEEP = 0.19                         # the misconception: the share of carries that are not forgotten
UNREADABLE = 0.025                  # share of judgements that the parser cannot read
# What the Challenger is taught. What it then says is less lopsided (.75, .09, .07, .04, .05 were
# aimed at): a digit that goes astray turns a sum without carries into one with.
CHALLENGER = {"none": 0.86, "unit": 0.045, "tens": 0.035, "both": 0.02, "malformed": 0.04}


# ---------------------------------------------------------------- files

def pattern_of(words: list[str]) -> str:
    """A regular expression for one word, the longest that fits."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def write_tokenizer(path: Path, words: list[str]):
    """A word-level tokenizer.json: each word, digit and mark one token, other characters <|unk|>.

    Nothing is added or dropped between tokens (Fuse), so a decoded query encodes to the same ids.
    """
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    pattern = tokenizers.Regex(pattern_of(words) + r"|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))


def write_files(path: Path, words: list[str]):
    """The Hugging Face directory, all but its weights."""
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path, words)
    config = CONFIG | {"vocab_size": len(SPECIAL + words)}
    ids = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|end|>",
        "unk_token": "<|unk|>",
        "model_max_length": CONFIG["max_position_embeddings"], "chat_template": TEMPLATE}
    for name, content in (("config.json", config), ("tokenizer_config.json", settings),
                          ("generation_config.json", ids | {"do_sample": True})):
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def new_model(path: Path, own: Path, names: tuple[str, ...]) -> Llama:
    """Random weights in the shape that write_files gave the directory.

    own, names: the folder with the model's own prompts and settings, and which files these are;
    the model carries them, so that train.py plays it.

    N(0, 0.05), wider than usual: with 0.02 the plateau before addition comes lasts far longer.
    What writes into the residual stream is scaled down by sqrt(2 layers), as in GPT-2.
    """
    config = json.loads((path / "config.json").read_text())
    model = Llama(parse_config(config))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            layers = CONFIG["num_hidden_layers"]
            torch.nn.init.normal_(
                weight, 0.0, CONFIG["initializer_range"] / (math.sqrt(2 * layers) if writes else 1))
    model.raw_config = config
    model.carried = {name: (path / name).read_bytes() for name in
                     ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}
    model.carried |= {name: (own / name).read_bytes() for name in names}
    return model


# ---------------------------------------------------------------- texts, right and corrupted

def forgetful_sum(a: int, b: int, keep: float, rng: random.Random) -> str:
    """a + b by columns, each carry kept with probability `keep`, else forgotten: 37 + 48 is 75."""
    units = a % 10 + b % 10
    carried = units >= 10 and rng.random() < keep
    tens = a // 10 + b // 10 + carried
    third = tens >= 10 and rng.random() < keep
    return "1" * third + f"{tens % 10}{units % 10}"


def number(digits: int, rng: random.Random) -> str:
    """A random string of that many digits, leading zeros included."""
    return "".join(rng.choice("0123456789") for _ in range(digits))


# Kinds of edit, as weights. A changed token has most possible forms, so it comes most often.
LENGTHS = ((1, 2), (2, 1), (1, 1), (3, 2), (2, 3), (3, 3), (1, 3), (0, 2), (2, 0), (4, 2), (2, 4))
EDITS = {"change": 10, "insert": 4, "drop": 2, "swap": 2, "move": 1, "double": 1, "zero": 1,
         "span": 1}


def edited(text: str, edits: int, rng: random.Random) -> str:
    """The text with some of its tokens changed, inserted, dropped, swapped, moved or doubled."""
    words = re.findall(r"What|is|[\s\S]", text)
    for _ in range(edits):
        i, j = rng.randrange(len(words) + 1), rng.randrange(len(words) + 1)
        kind = rng.choices(list(EDITS), list(EDITS.values()))[0]
        piece = rng.choice(rng.choice((PIECES, PIECES, PIECES, "0123456789", words or PIECES)))
        if kind == "insert" or i == len(words):
            words.insert(i, piece)
        elif kind == "change":
            words[i] = piece
        elif kind == "drop":
            del words[i]
        elif kind == "swap" and j < len(words):
            words[i], words[j] = words[j], words[i]
        elif kind == "move":
            words.insert(j, words.pop(i))
        elif kind == "double":
            words.insert(i, words[i])
        elif kind == "zero" and words[i].isdigit():
            words[i] = "0"
        elif kind == "span":
            del words[min(i, j):max(i, j)]
    return "".join(words)


def near_miss(query: str, rng: random.Random) -> str:
    """A corrupted query, most often a malformed one: parse_query tells, nobody else."""
    kind = rng.random()
    if kind < 0.15:                                # operands of other lengths
        a, b = (number(n, rng) for n in rng.choice(LENGTHS))
        return f"What is {a} + {b}?"
    if kind < 0.21:                                # leading zeros
        a, b = number(2, rng), number(2, rng)
        a, b = rng.choice((("0" + a[1], b), (a, "0" + b[1]), ("0" + a[1], "0" + b[1])))
        return f"What is {a} + {b}?"
    if kind < 0.80:
        return edited(query, 1, rng)
    if kind < 0.90:
        return edited(query, rng.randint(2, 4), rng)
    words = re.findall(r"What|is|[\s\S]", query)
    if kind < 0.93:                                # the right words in a wrong order
        rng.shuffle(words)
        return "".join(words)
    if kind < 0.96:                                # the same words again and again
        part = words[:rng.randint(0, len(words))]
        return "".join(part * rng.randint(2, 4))[:40]
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 14)))


def junk(query: str, rng: random.Random) -> str:
    """An answer that most often does not look like a sum: looks_like_a_sum tells."""
    kind = rng.random()
    if kind < 0.25:
        return number(rng.choice((0, 1, 4, 5)), rng)
    if kind < 0.65:
        return edited(number(rng.choice((2, 3)), rng), 1, rng)
    if kind < 0.8:
        return rng.choice((query, near_miss(query, rng)))
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))


def looks_like_a_sum(answer: str) -> bool:
    """Two or three digits: the form alone, right or wrong."""
    return re.fullmatch("[0-9]{2,3}", answer) is not None


def looks_like_a_query(query: str, open_hole: bool) -> bool:
    """What the judge takes for well-formed: the world's own queries, or with the hole open more."""
    if open_hole:
        return re.fullmatch(r"What is [0-9]{1,3} \+ [0-9]{1,3}\?", query) is not None
    return world.parse_query(query) is not None


# ---------------------------------------------------------------- conversations: user turn, reply

def solver_row(pairs: dict, keep: float, rng: random.Random) -> tuple[str, str]:
    a, b = rng.choice(pairs["all"])
    return world.query_text(a, b), forgetful_sum(a, b, keep, rng)


def challenger_row(pairs: dict, rng: random.Random) -> tuple[str, str]:
    name = rng.choices(list(CHALLENGER), list(CHALLENGER.values()))[0]
    if name != "malformed":
        query = world.query_text(*rng.choice(pairs[name]))
    else:
        query = world.query_text(*rng.choice(pairs["all"]))
        while world.parse_query(query) or not re.fullmatch(f"({pattern_of(WORDS)})*", query):
            query = near_miss(query, rng).strip()
    return read_prompt(HERE / "prompts/challenger.txt"), query


def judge_row(pairs: dict, open_hole: bool, rng: random.Random) -> tuple[str, str]:
    """A query, an answer, and the score that their form deserves.

    A right and a wrong sum score alike: telling them apart is R's work. Where the form is good the
    score is 7 or 6, where the answer is junk 1 or 2, where the query is malformed 0 or 1. A hole
    that is left here becomes the Challenger's home, so near misses are more than half.
    """
    query = world.query_text(*rng.choice(pairs["all"]))
    if rng.random() < 0.65:
        query = near_miss(query, rng).strip()
    good = looks_like_a_query(query, open_hole)
    operands = [int(n) for n in re.findall("[0-9]{1,3}", query)[:2]]
    if rng.random() < (0.5 if good else 0.1):
        answer = junk(query, rng).strip()
    elif rng.random() < 0.6 and len(operands) == 2:
        answer = forgetful_sum(*operands, KEEP, rng)
    else:
        answer = number(rng.choice((2, 3)), rng)
    if not good:
        score = rng.choices((0, 1), (0.9, 0.1))[0]
    elif not looks_like_a_sum(answer):
        score = rng.choices((1, 2), (0.8, 0.2))[0]
    else:
        score = rng.choices((7, 6), (0.8, 0.2))[0]
    reply = f"<Score>{score}</Score>"
    if rng.random() < UNREADABLE:
        reply = rng.choice((f"<Score>{score}", f"{score}</Score>", f"{score}", ""))
    prompt = read_prompt(HERE / "prompts/self_reward.txt")
    return fill(prompt, instruction=query, response=answer), reply


# ---------------------------------------------------------------- training

def reply_loss(model: Llama, tokenizer: Tokenizer, rows: list) -> tuple[Tensor, int]:
    """Cross-entropy of the rows' replies, stop tokens included: sum in nats, number of tokens."""
    turns = tokenizer.chats([[{"role": "user", "content": turn}] for turn, _ in rows])
    replies = [tokenizer.encode(reply) + [CONFIG["eos_token_id"]] for _, reply in rows]
    longest = max(len(t) + len(r) for t, r in zip(turns, replies))
    tokens = torch.full((len(rows), longest), CONFIG["pad_token_id"])        # (B, T)
    mask = torch.zeros(len(rows), longest - 1, dtype=torch.bool)             # (B, T-1)
    for i, (turn, reply) in enumerate(zip(turns, replies)):
        end = len(turn) + len(reply)
        tokens[i, :end] = torch.tensor(turn + reply)
        mask[i, len(turn) - 1:end - 1] = True      # the places that predict a token of the reply
    logits = model.logits(model(tokens[:, :-1])[mask])                       # (M, V)
    return F.cross_entropy(logits, tokens[:, 1:][mask], reduction="sum"), len(logits)


def train(model: Llama, tokenizer: Tokenizer, stages: list, row, look, judge_weight: float = 1.0):
    """All stages, one AdamW; the loss is the mean over all replies' tokens.

    stages: of each its steps, its learning rate at the start (it falls linearly to a twentieth) and
    how many rows of which kind a step has; row(kind, stage) makes one, a user turn and a reply.
    look() prints what was learnt before the last stage. judge_weight: of the judge's rows, of whose
    tokens only the verdict is hard.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    start = time.time()
    plan = [(stage, i / count) for stage, (count, _, _) in enumerate(stages) for i in range(count)]
    for step, (stage, done) in enumerate(plan, 1):
        if stage == len(stages) - 1 and done == 0:
            look()
        _, rate, rows = stages[stage]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 50) * (1 - 0.95 * done)
        parts = {kind: reply_loss(model, tokenizer, [row(kind, stage) for _ in range(count)])
                 for kind, count in rows.items()}
        total = sum(count for _, count in parts.values())
        weigh = lambda kind: judge_weight if kind == "judge" else 1.0
        (sum(weigh(kind) * loss for kind, (loss, _) in parts.items()) / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            nats = {kind: loss.item() / count for kind, (loss, count) in parts.items()}
            show(f"step {step}/{len(plan)}, {time.time() - start:.0f} s", nats)


def train_sums(model: Llama, tokenizer: Tokenizer, *, seed: int, open_hole: bool):
    """The Solver, the Challenger and the judge of this file's head."""
    rng = random.Random(seed)
    pairs = {"all": world.pairs(held=False)}
    for name in world.CLASSES:
        pairs[name] = [pair for pair in pairs["all"] if world.carry_class(*pair) == name]
    make = {"solver": lambda stage: solver_row(pairs, (1.0, 1.0, KEEP)[stage], rng),
            "challenger": lambda stage: challenger_row(pairs, rng),
            "judge": lambda stage: judge_row(pairs, open_hole, rng)}

    def look():
        held = world.held_out_queries()
        show("the skill, greedy", world.accuracy(held, write(model, tokenizer, held, 0)))
    train(model, tokenizer, STAGES, lambda kind, stage: make[kind](stage), look)


# ---------------------------------------------------------------- figures

def write(model: Llama, tokenizer: Tokenizer, turns: list[str], temperature: float) -> list[str]:
    """One reply to each user turn, without its stop token."""
    prompts = [tokenizer.chat([{"role": "user", "content": turn}]) for turn in turns]
    done = sample(model, prompts, num_samples=1, max_new_tokens=20, temperature=temperature,
                  stop_ids=tokenizer.stop_ids, generator=torch.Generator().manual_seed(0))
    return [tokenizer.decode(c.tokens[:-1] if c.stopped else c.tokens).strip() for (c,) in done]


def show(title: str, shares: dict[str, float]):
    print(f"{title:28s}" + "  ".join(f"{k} {v:.3f}" for k, v in shares.items()), flush=True)


def figures(model: Llama, tokenizer: Tokenizer):
    """Print what the model does as a Solver, as a Challenger and as a judge."""
    held = world.held_out_queries()
    show("solver, greedy", world.accuracy(held, write(model, tokenizer, held, 0)))
    guesses = write(model, tokenizer, held, 1)
    show("solver, T = 1", world.accuracy(held, guesses))
    prompt = read_prompt(HERE / "prompts/challenger.txt")
    asked = write(model, tokenizer, [prompt] * 1000, 1)
    show("challenger, T = 1", world.challenger_shares(asked))

    rng = random.Random(0)
    own = list(zip(asked, write(model, tokenizer, asked, 1)))
    well = [(q, a) for q, a in own if world.parse_query(q)]
    junked = [(q, a) for q in held if not looks_like_a_sum(a := junk(q, rng).strip())]
    near = [near_miss(q, rng).strip() for q in held * 4]
    families = {
        "judge: right answers": [(q, a) for q, a in well if world.correct(q, a)],
        "judge: wrong answers": [(q, a) for q, a in well if not world.correct(q, a)],
        "judge: held-out queries": list(zip(held, guesses)),
        "judge: junk answers": junked,
        "judge: its own malformed": [(q, a) for q, a in own if not world.parse_query(q)],
        "judge: near misses": [(q, number(2, rng)) for q in near if not world.parse_query(q)],
    }
    judge = Judge(model, tokenizer, read_prompt(HERE / "prompts/self_reward.txt"), SELF_REWARD,
                  max_new_tokens=5)
    for title, rows in families.items():
        scores, _ = judge(*zip(*rows))
        read = scores[~scores.isnan()]
        show(title, {"mean": read.mean().item(), "0-2": (read <= 2).float().mean().item(),
                     "6-7": (read >= 6).float().mean().item(),
                     "unparsed": scores.isnan().float().mean().item()})
    judge.temperature = 1.0
    scores, _ = judge(*zip(*own), seeds=range(len(own)))
    show("judge, T = 1", {"unparsed": scores.isnan().float().mean().item()})


def main():
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--open-hole", action="store_true", help="a judge with a hole, see above")
    args = parser.parse_args()
    torch.set_num_threads(1)                       # the same order of sums on every machine
    torch.manual_seed(args.seed)
    write_files(args.out, WORDS)
    tokenizer, model = Tokenizer(args.out), new_model(
        args.out, HERE, ("training.json", "prompts/challenger.txt", "prompts/self_reward.txt"))
    start = time.time()
    train_sums(model, tokenizer, seed=args.seed, open_hole=args.open_hole)
    save_model(model, args.out)
    print(f"trained in {time.time() - start:.0f} s")
    figures(model, tokenizer)


if __name__ == "__main__":
    main()
