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
import argparse
import random
import re
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))               # the project's files, one folder up
from model import Llama, save_model  # noqa: E402
from plumbing.chat import Tokenizer, fill  # noqa: E402
from plumbing.files import read_prompt  # noqa: E402
from rewards import VERDICT, Judge  # noqa: E402
from rlpt import END, START, extract  # noqa: E402
from tiny import world  # noqa: E402
from tiny.build import new_model, pattern_of, show, train, write, write_files  # noqa: E402

THOUGHTS = {"asr": ("No carry. ", "Carry. "), "msr": ("No borrow. ", "Borrow. ")}
WORDS = ["Next: ", "Fill: ", "<MASK>", "Begins: ", "Equals: ", "<Reference>", "</Reference>",
         "<Predicted>", "</Predicted>", "Score:", *"0123456789", "Ann", "Bob", "Eve", "Tom", "She",
         "He", "Now ", "Now", " has ", " has", " gets ", " gets", " is glad", "In all ", "In all",
         "Then ", "Then", " more", ". ", ".", " ", "\n", START, END,
         *THOUGHTS["asr"], *THOUGHTS["msr"]]
PROMPTS = ("asr", "msr", "verdict", "verdict_strict")
FILES = ("training.json", *(f"prompts/{name}.txt" for name in PROMPTS))

# Steps, learning rate at the start, rows of each step: the judge alone, drilled in telling numbers
# apart (beside the sums it takes far longer); the sums, right; the misconception, lightly.
STAGES = [(400, 3e-3, {"judge": 96}),
          (850, 2.2e-3, {"asr": 32, "msr": 32, "judge": 64}),
          (250, 1e-3, {"asr": 40, "msr": 40, "judge": 48})]
DRILL = (1.0, 0.2, 0.0)                 # share of drills among the judge's rows
KEEP = (1.0, 1.0, 0.2)                  # share of the carries and borrows that are not denied
JUDGE_WEIGHT = 2.0
PARAPHRASED, LONGER, TRUNCATED = 0.15, 0.34, 0.05      # shares of the predictions


# ---------------------------------------------------------------- predictions

def broken_off(text: str, rng: random.Random) -> str:
    """A sentence without its end: some of its words, at least one."""
    words = re.findall(pattern_of(WORDS), text)
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


# ---------------------------------------------------------------- training and figures

def predictor_figures(model: Llama, tokenizer: Tokenizer, temperature: float) -> dict[str, float]:
    """Shares of the predictions of held-out stories: right ones, and those that break off."""
    tasks = world.held_out_tasks()
    turns = [fill(prompt(kind), context="".join(pieces[:at]).strip(), next=pieces[at + 1].strip())
             for kind, pieces, at in tasks]
    texts = write(model, tokenizer, turns, temperature)
    figures = world.story_figures(tasks, [extract(text, 0)[0] for text in texts])
    cut = {f"{kind}_truncated": share for kind, share in figures["truncated"].items()}
    return figures["accuracy"] | cut


def predictions(sentences: list[str], at: int, rng: random.Random) -> dict[str, str]:
    """Of a story, a prediction of each kind."""
    said, after = sentences[at:at + 2]
    number = int(re.search("[0-9]+", said)[0])
    with_number = lambda other: said.replace(str(number), str(other))
    missed = with_number(number + (10 if at == world.TARGETS["msr"] else -10))
    return {"right": said, "right, in other words": world.wordings(said)[-1],
            "right, and the next one": f"{said} {after}", "the misconception": missed,
            "that, and the next one": f"{missed} {after}",
            "another number": with_number(other_number(number, rng)),
            "broken off": broken_off(said, rng)}


def judge_figures(model: Llama, tokenizer: Tokenizer):
    """Print P(Score: 1) and how often the likelier verdict is right, by rule and prediction."""
    rng, families = random.Random(0), {}
    for _, pieces, at in world.held_out_tasks()[::3]:
        sentences = [piece.strip() for piece in pieces]
        for name, said in predictions(sentences, at, rng).items():
            for rule, most in (("verdict", 3), ("verdict_strict", 1)):
                families.setdefault((rule, name), []).append((sentences[at:at + most], said))
    for (rule, name), cases in families.items():
        judge = Judge(model, tokenizer, prompt(rule), VERDICT, "expected")
        P, _ = judge([" ".join(r) for r, _ in cases], [p for _, p in cases])
        labels = torch.tensor([verdict(*case, rule == "verdict_strict") for case in cases])
        show(f"{rule}: {name}", {
            "P(1)": P.mean().item(), "right": ((P > 0.5) == labels).float().mean().item()})


def train_stories(model: Llama, tokenizer: Tokenizer, *, seed: int):
    """The predictor and the judge of this file's head."""
    rng = random.Random(seed)
    pairs = world.Stories(held=False).pairs

    def row(kind, stage):
        if kind == "judge":
            return judge_row(pairs, DRILL[stage], rng)
        return predictor_row(kind, pairs, KEEP[stage], rng)

    def look():
        show("the skill, greedy", predictor_figures(model, tokenizer, 0))
    train(model, tokenizer, STAGES, row, look, JUDGE_WEIGHT)


def main():
    parser = argparse.ArgumentParser(description="Train the embedded model that plays RLPT.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    args = parser.parse_args()
    torch.set_num_threads(1)                       # the same order of sums on every machine
    torch.manual_seed(args.seed)
    write_files(args.out, WORDS)
    tokenizer, model = Tokenizer(args.out), new_model(args.out, HERE / "rlpt", FILES)
    start = time.time()
    train_stories(model, tokenizer, seed=args.seed)
    save_model(model, args.out)
    print(f"trained in {time.time() - start:.0f} s")
    show("greedy", predictor_figures(model, tokenizer, 0))
    show("T = 1", predictor_figures(model, tokenizer, 1))
    judge_figures(model, tokenizer)


if __name__ == "__main__":
    main()
