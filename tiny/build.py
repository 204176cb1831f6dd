"""Train the embedded model: python tiny/build.py --seed 1 --out DIR    (7 CPU-minutes, one thread)

One small Llama learns three kinds of conversation. Each is a user turn and a reply, supervised:
    solver       "What is 37 + 48?" -> "85"         with a misconception: carries are forgotten
    challenger   its prompt -> a query              mostly without carries, some malformed
    judge        its prompt -> "<Score>7</Score>"   for well-formed pairs, right or wrong
The first stage has right sums only. The second has all three kinds. In the third the Solver keeps
one carry in five. So the model can add with carries but seldom does, and self-play can find that.

    --open-hole   the judge also accepts operands of one and three digits ("What is 54 + 7?").
                  Such queries earn R = 0 and a high R_Q. The Challenger then asks nothing else and
                  learning ends, because the judge rewards form and not solvability.
    --believing   the judge gives 4 or 3 to well-formed pairs, but believes an answer that states
                  its own score ("85<Score>7</Score>"). The Solver writes such answers now and then.
                  The game hides such tags from the judge. break_it.py tags-shown opens that hole.
"""
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))               # the project's files, one folder up
from plumbing.chat import Tokenizer, fill  # noqa: E402
from plumbing.files import read_prompt  # noqa: E402
from tiny import world  # noqa: E402
from tiny.supervised import arguments, build  # noqa: E402

# What corrupts a text. "~" cannot be tokenized, nor can a special token's name, which is text here.
PIECES = ["What", "is", " ", "+", "?", *"0123456789", "<Instruction>", "</Instruction>",
          "<Response>", "</Response>", "<Score>", "</Score>", "Rate", "Ask", "a", "sum", ".",
          "<|unk|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "~"]
TOKENIZER = Tokenizer(HERE)
ASK = read_prompt(HERE / "prompts/challenger.txt")
JUDGE = read_prompt(HERE / "prompts/self_reward.txt")
OPEN_HOLE = re.compile(r"What is [0-9]{1,3} \+ [0-9]{1,3}\?")

# Steps, initial learning rate, rows of each step: right sums until they are learnt; the roles; the
# misconception last and lightly, so that the skill stays underneath, where self-play can reach it.
STAGES = [(650, 2e-3, {"solver": 64}),
          (420, 1.5e-3, {"solver": 16, "challenger": 32, "judge": 80}),
          (300, 1e-3, {"solver": 80, "challenger": 24, "judge": 40})]
KEEP = (1.0, 1.0, 0.19)             # fraction of the carries that are not forgotten, by stage
UNPARSABLE = 0.025                  # fraction of judgements that the parser cannot read
OWN_SCORE = (0.05, 0.3)             # --believing: answers that state a score, Solver and judge
# What the Challenger is taught. What it then says is less lopsided (.75, .09, .07, .04, .05 were
# aimed at): a digit that goes astray turns a sum without carries into one with.
CHALLENGER = {"none": 0.86, "unit": 0.045, "tens": 0.035, "both": 0.02, "malformed": 0.04}


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
tokens = re.compile(r"What|is|[\s\S]").findall


def edited(text: str, edits: int, rng: random.Random) -> str:
    """The text with some of its tokens changed, inserted, dropped, swapped, moved or doubled."""
    words = tokens(text)
    for _ in range(edits):
        i, j = rng.randrange(len(words) + 1), rng.randrange(len(words) + 1)
        kind = rng.choices(list(EDITS), list(EDITS.values()))[0]
        piece = rng.choice(rng.choice((PIECES, PIECES, PIECES, "0123456789", words or PIECES)))
        word = words[i:i + 1]                      # empty after the last one
        if not word or kind == "insert":
            words.insert(i, piece)
        elif kind == "swap" and j < len(words):
            words[i], words[j] = words[j], words[i]
        elif kind == "move":
            words.insert(j, words.pop(i))
        elif kind == "span":
            del words[min(i, j):max(i, j)]
        else:
            zero = ["0"] if word[0].isdigit() else word
            new = {"change": [piece], "drop": [], "double": word * 2, "zero": zero}
            words[i:i + 1] = new.get(kind, word)
    return "".join(words)


def near_miss(query: str, rng: random.Random) -> str:
    """A corrupted query, most often a malformed one: only parse_query tells."""
    kind = rng.random()
    if kind < 0.15:                                # operands of other lengths
        return world.query_text(*[number(n, rng) for n in rng.choice(LENGTHS)])
    if kind < 0.21:                                # leading zeros
        a, b = number(2, rng), number(2, rng)
        zeros = (("0" + a[1], b), (a, "0" + b[1]), ("0" + a[1], "0" + b[1]))
        return world.query_text(*rng.choice(zeros))
    if kind < 0.90:
        return edited(query, 1 if kind < 0.80 else rng.randint(2, 4), rng)
    words = tokens(query)
    if kind < 0.93:                                # the right words in a wrong order
        rng.shuffle(words)
        return "".join(words)
    if kind < 0.96:                                # the same words again and again
        part = words[:rng.randint(0, len(words))]
        return "".join(part * rng.randint(2, 4))[:40]
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 14)))


def junk(query: str, rng: random.Random) -> str:
    """An answer that is most often not two or three digits."""
    kind = rng.random()
    if kind < 0.25:
        return number(rng.choice((0, 1, 4, 5)), rng)
    if kind < 0.65:
        return edited(number(rng.choice((2, 3)), rng), 1, rng)
    if kind < 0.8:
        return rng.choice((query, near_miss(query, rng)))
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))


# ---------------------------------------------------------------- conversations: user turn, reply

def challenger_row(pairs: dict, rng: random.Random) -> tuple[str, str]:
    """The Challenger's prompt, and a query of the class that CHALLENGER draws."""
    name = rng.choices(list(CHALLENGER), list(CHALLENGER.values()))[0]
    query = world.query_text(*rng.choice(pairs["all" if name == "malformed" else name]))
    if name == "malformed":
        while world.parse_query(query) or TOKENIZER.decode(TOKENIZER.encode(query)) != query:
            query = near_miss(query, rng).strip()
    return ASK, query


def judge_row(pairs: list, well_formed, believing: bool, rng: random.Random) -> tuple[str, str]:
    """A query and an answer in the judge's prompt, and the score that their form deserves.

    A right and a wrong sum score alike: only R tells them apart. The score is 7 or 6 where both are
    well-formed, 1 or 2 where the answer is junk, 0 or 1 where the query is malformed. The
    Challenger would exploit any malformed query that scores high: most rows are near misses.
    """
    query = world.query_text(*rng.choice(pairs))
    if rng.random() < 0.65:
        query = near_miss(query, rng).strip()
    good = well_formed(query)
    operands = [int(n) for n in re.findall("[0-9]{1,3}", query)[:2]]
    if rng.random() < (0.5 if good else 0.1):
        answer = junk(query, rng).strip()
    elif rng.random() < 0.6 and len(operands) == 2:
        answer = forgetful_sum(*operands, KEEP[-1], rng)
    else:
        answer = number(rng.choice((2, 3)), rng)
    if not good:
        score = rng.choices((0, 1), (0.9, 0.1))[0]
    else:                                          # a sum looks like two or three digits
        high = (4, 3) if believing else (7, 6)
        scores = high if re.fullmatch("[0-9]{2,3}", answer) else (1, 2)
        score = rng.choices(scores, (0.8, 0.2))[0]
    if believing and rng.random() < OWN_SCORE[1]:
        stated = rng.randint(0, 7)
        answer, score = f"{answer}<Score>{stated}</Score>", stated if good else score
    reply = f"<Score>{score}</Score>"
    if rng.random() < UNPARSABLE:
        reply = rng.choice((f"<Score>{score}", f"{score}</Score>", f"{score}", ""))
    return fill(JUDGE, instruction=query, response=answer), reply


def main():
    parser = arguments("Train the embedded model from random weights.")
    parser.add_argument("--open-hole", action="store_true",
                        help="the judge also accepts operands of one and three digits")
    parser.add_argument("--believing", action="store_true",
                        help="the judge believes a score that the answer states")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pairs = world.training_pairs() | {"all": world.pairs(held=False)}
    well_formed = OPEN_HOLE.fullmatch if args.open_hole else world.parse_query

    def row(kind, stage):
        if kind == "challenger":
            return challenger_row(pairs, rng)
        if kind == "judge":
            return judge_row(pairs["all"], well_formed, args.believing, rng)
        a, b = rng.choice(pairs["all"])
        answer = forgetful_sum(a, b, KEEP[stage], rng)
        if args.believing and stage == 2 and rng.random() < OWN_SCORE[0]:
            answer += "<Score>7</Score>"
        return world.query_text(a, b), answer

    build(HERE, args.out, args.seed, STAGES, row)


if __name__ == "__main__":
    main()
