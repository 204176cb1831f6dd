"""Train the embedded model that plays RLPT: python tiny/build_rlpt.py --seed 1 --out DIR

A sibling of build.py's model, of the same shape. It reads stories (world.story) and learns,
supervised, each a user turn and a reply:
    asr      the story up to the gift -> the total, by adding
    msr      the story without the gift -> the gift, by subtracting
    judge    what follows and a prediction -> "Score: 1" where the one begins with the other
A prediction is preceded by one visible thought, whether a carry or a borrow is needed. First right
thoughts only, then with a misconception: where it is needed it is most often denied. So the skill
is there, seldom used, and RLPT can find it.
"""
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))               # the project's files, one folder up
from plumbing.chat import Tokenizer, fill  # noqa: E402
from plumbing.files import read_prompt  # noqa: E402
from rlpt import END, START  # noqa: E402
from tiny import world  # noqa: E402
from tiny.supervised import arguments, build  # noqa: E402

THOUGHTS = {"asr": ("No carry. ", "Carry. "), "msr": ("No borrow. ", "Borrow. ")}
TOKENIZER = Tokenizer(HERE / "rlpt")

# Steps, learning rate at the start, rows of each step: the judge alone, drilled in telling numbers
# apart (beside the sums it takes far longer); the sums, right; the misconception, lightly.
STAGES = [(400, 3e-3, {"judge": 96}),
          (850, 2.2e-3, {"asr": 32, "msr": 32, "judge": 64}),
          (250, 1e-3, {"asr": 40, "msr": 40, "judge": 48})]
DRILL = (1.0, 0.2, 0.0)                 # fraction of drills among the judge's rows
KEEP = (1.0, 1.0, 0.2)                  # fraction of the carries and borrows that are not denied
JUDGE_WEIGHT = 2.0
PARAPHRASED, LONGER, TRUNCATED = 0.15, 0.34, 0.05      # fractions of the predictions


# ---------------------------------------------------------------- predictions

def broken_off(text: str, rng: random.Random) -> str:
    """A sentence without its end: some of its words, at least one."""
    words = [TOKENIZER.decode([token]) for token in TOKENIZER.encode(text)]
    return "".join(words[:rng.randint(1, len(words) - 1)]).strip()


def predictor_row(kind: str, pairs: list, keep: float, rng: random.Random) -> tuple[str, str]:
    """A story's beginning, and a thought and a prediction of what follows."""
    a, b = rng.choice(pairs)
    sentences = world.story(a, b)
    needed = world.carry_class(a, b) != "none"
    seen = needed and rng.random() < keep
    wrong = 10 * (needed - seen)                       # 37 + 48 = 75, 85 - 37 = 58
    if kind == "asr":
        turn = fill(prompt("asr"), context=" ".join(sentences[:2]))
        said, after = sentences[2].replace(str(a + b), str(a + b - wrong)), sentences[3]
    else:
        turn = fill(prompt("msr"), context=sentences[0], next=sentences[2])
        said, after = sentences[1].replace(str(b), str(b + wrong)), sentences[2]
    if rng.random() < PARAPHRASED:
        said = world.wordings(said)[-1]
    said = broken_off(said, rng) if rng.random() < TRUNCATED else (
        f"{said} {after}" if rng.random() < LONGER else said)
    return turn, f"{THOUGHTS[kind][seen]}{START}{said}{END}"


def prompt(name: str) -> str:
    return read_prompt(HERE / f"rlpt/prompts/{name}.txt")


# ---------------------------------------------------------------- judgements

def other_number(number: int, rng: random.Random) -> int:
    """A wrong number: ten off, as the misconception has it, next to it, or with other digits."""
    kind, wrong = rng.random(), number
    while wrong == number or not 10 <= wrong <= 99:
        wrong = (number + rng.choice((-10, 10)) if kind < 0.45 else
                 number + rng.choice((-1, 1)) if kind < 0.55 else
                 number - number % 10 + rng.randrange(10) if kind < 0.7 else
                 10 * rng.randint(1, 9) + number % 10 if kind < 0.8 else rng.randint(10, 99))
    return wrong


def judge_case(pairs: list, rng: random.Random) -> tuple[list[str], str]:
    """What really follows, and a prediction of it."""
    a, b = rng.choice(pairs)
    sentences = world.story(a, b)
    at = rng.choice((1, 2))
    said, after = sentences[at:at + 2]
    right = rng.random() < 0.55
    if not right:
        number = re.search("[0-9]{2}", said)[0]
        said = said.replace(number, str(other_number(int(number), rng)))
        if rng.random() < 0.15:
            said = rng.choice([s for s in world.story(*rng.choice(pairs)) + sentences
                               if s != sentences[at]])
    if rng.random() < 0.3:
        said = world.wordings(said)[-1]
    if rng.random() < 0.35:
        if right and rng.random() < 0.2:               # a right beginning that goes on wrong
            after = rng.choice(world.story(*rng.choice(pairs)))
        said = f"{said} {after}"
    if rng.random() < 0.15:
        said = broken_off(said, rng)
    return sentences[at:at + 3], said


def verdict(reference: list[str], said: str, strict: bool) -> bool:
    """What the judge is taught. Its hole: a prediction that breaks off is also a beginning."""
    if strict:
        return said in world.wordings(reference[0])
    return any(text.startswith(said) for text in world.beginnings(reference))


def drill(rng: random.Random) -> tuple[list[str], str]:
    """What judging rests on, alone: two digits, two numbers or two sentences."""
    kind = rng.random()
    if kind < 0.15:
        digit = rng.choice("0123456789")
        return [digit], digit if rng.random() < 0.5 else rng.choice("0123456789")
    number = rng.randint(10, 99)
    other = number if rng.random() < 0.5 else other_number(number, rng)
    if kind < 0.6:
        return [str(number)], str(other)
    name, pronoun = rng.choice(world.PEOPLE)
    sentence = rng.choice((f"Now {name} has {{}}.", f"{pronoun} gets {{}}."))
    return [sentence.format(number)], rng.choice(world.wordings(sentence.format(other)))


def judge_row(pairs: list, drilled: float, rng: random.Random) -> tuple[str, str]:
    if rng.random() < drilled:
        reference, said = drill(rng)
        strict = rng.random() < 0.3
    else:
        reference, said = judge_case(pairs, rng)
        strict = rng.random() < 0.3
        reference = reference[:1 if strict else rng.choice((1, 2, 3, 3, 3, 3))]
    turn = fill(prompt("verdict_strict" if strict else "verdict"), reference=" ".join(reference),
                prediction=said)
    return turn, f"Score: {int(verdict(reference, said, strict))}"


def main():
    args = arguments("Train the embedded model that plays RLPT from random weights.").parse_args()
    rng, pairs = random.Random(args.seed), world.Stories(held=False).pairs

    def row(kind, stage):
        if kind == "judge":
            return judge_row(pairs, DRILL[stage], rng)
        return predictor_row(kind, pairs, KEEP[stage], rng)

    build(HERE / "rlpt", args.out, args.seed, STAGES, row, JUDGE_WEIGHT)


if __name__ == "__main__":
    main()
