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
from chat import Tokenizer, fill  # noqa: E402
from files import read_prompt  # noqa: E402
from model import Llama, save_model  # noqa: E402
from tiny import world  # noqa: E402
from tiny.build import new_model, show, spelt, train, write, write_files  # noqa: E402

OPEN, CLOSE = "<|startofprediction|>", "<|endofprediction|>"
THOUGHTS = {"asr": ("No carry. ", "Carry. "), "msr": ("No borrow. ", "Borrow. ")}
WORDS = ["Next: ", "Fill: ", "<MASK>", "Begins: ", "Equals: ", "<Reference>", "</Reference>",
         "<Predicted>", "</Predicted>", "Score:", *"0123456789", "Ann", "Bob", "Eve", "Tom", "She",
         "He", "Now ", "Now", " has ", " has", " gets ", " gets", " is glad", "In all ", "In all",
         "Then ", "Then", " more", ". ", ".", " ", "\n", OPEN, CLOSE,
         *THOUGHTS["asr"], *THOUGHTS["msr"]]
FILES = ("training.json", *(f"prompts/{name}.txt" for name in ("asr", "msr", "verdict", "verdict_strict")))

STAGES = [(300, 3e-3, {"judge": 96}),
          (400, 1.5e-3, {"asr": 24, "msr": 24, "judge": 64}),
          (250, 1e-3, {"asr": 32, "msr": 32, "judge": 48})]
DRILL = (1.0, 0.2, 0.0)
KEEP = 0.15           # the misconception: the share of carries and borrows that are not denied
PARAPHRASED, LONGER, TRUNCATED = 0.15, 0.34, 0.05      # shares of the predictions


# ---------------------------------------------------------------- predictions

def broken_off(text: str, rng: random.Random) -> str:
    """A sentence without its end: some of its words, at least one."""
    words = re.findall(spelt(WORDS), text)
    return "".join(words[:rng.randint(1, len(words) - 1)]).strip()


def predictor_row(kind: str, pairs: list, keep: float, rng: random.Random) -> tuple[str, str]:
    """A story's beginning, and a thought and a prediction of what follows."""
    a, b = rng.choice(pairs)
    sentences = world.story(a, b)
    needed = world.carry_class(a, b) != "none"
    seen = needed and rng.random() < keep
    wrong = 10 * (needed - seen)                       # 37 + 48 = 75; 85 - 37 = 58
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
    return turn, f"{THOUGHTS[kind][seen]}{OPEN}{said}{CLOSE}"


def prompt(name: str) -> str:
    return read_prompt(HERE / f"rlpt/prompts/{name}.txt")


# ---------------------------------------------------------------- judgements

def other_number(number: int, rng: random.Random) -> int:
    """A wrong number: ten off, as the misconception has it, or with one or two other digits."""
    kind, wrong = rng.random(), number
    while wrong == number or not 10 <= wrong <= 99:
        wrong = (number + rng.choice((-10, 10)) if kind < 0.5 else
                 number - number % 10 + rng.randrange(10) if kind < 0.7 else
                 10 * rng.randint(1, 9) + number % 10 if kind < 0.8 else rng.randint(10, 99))
    return wrong


def judge_case(pairs: list, rng: random.Random) -> tuple[list[str], str, bool]:
    """True segments, a prediction of them, and whether it was to be a whole right beginning."""
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


def drill(pairs: list, rng: random.Random) -> tuple[list[str], str]:
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


def judge_row(pairs: list, share: float, rng: random.Random) -> tuple[str, str]:
    if rng.random() < share:
        reference, said = drill(pairs, rng)
        strict = rng.random() < 0.3
    else:
        reference, said = judge_case(pairs, rng)
        strict = rng.random() < 0.3
        reference = reference[:1 if strict else rng.choice((1, 2, 3, 3, 3, 3))]
    turn = fill(prompt("verdict_strict" if strict else "verdict"), reference=" ".join(reference),
                prediction=said)
    return turn, f"Score: {int(verdict(reference, said, strict))}"


# ---------------------------------------------------------------- training and figures

def predicted(text: str) -> str:
    """What stands between the tags, or nothing."""
    return text.partition(OPEN)[2].partition(CLOSE)[0]


def accuracies(model: Llama, tokenizer: Tokenizer, temperature: float) -> dict[str, float]:
    """Right predictions of held-out stories, by kind and by whether a carry is needed."""
    shares, held = {}, world.Stories(held=True).pairs
    for kind, at in world.TARGETS.items():
        stories = [world.story(a, b) for a, b in held]
        turns = [fill(prompt(kind), context=" ".join(s[:at]), next=s[2]) for s in stories]
        texts = [predicted(text) for text in write(model, tokenizer, turns, temperature)]
        right = [text in world.beginnings(s[at:]) for text, s in zip(texts, stories)]
        for name, hard in (("easy", False), ("hard", True)):
            rows = [r for r, pair in zip(right, held) if (world.carry_class(*pair) != "none") == hard]
            shares[f"{kind}_{name}"] = sum(rows) / len(rows)
        whole = [text.endswith((".", ". ")) for text in texts]
        shares[f"{kind}_cut"] = 1 - sum(whole) / len(whole)
    return shares


def judge_figures(model: Llama, tokenizer: Tokenizer, every: int = 3):
    """Print P(Score: 1) and the greedy verdict's accuracy for the kinds of predictions."""
    families, rng = {}, random.Random(0)
    for pair in world.Stories(held=True).pairs[::every]:
        s = world.story(*pair)
        for at in (1, 2):
            number = re.search("[0-9]{2}", s[at])[0]
            off = 10 if at == 1 else -10
            missed = s[at].replace(number, str(int(number) + off))
            random_wrong = s[at].replace(number, str(other_number(int(number), rng)))
            for name, said in (("right", s[at]), ("paraphrase", world.wordings(s[at])[-1]),
                               ("right and next", f"{s[at]} {s[at + 1]}"), ("misconception", missed),
                               ("misconception and next", f"{missed} {s[at + 1]}"),
                               ("other number", random_wrong), ("broken off", broken_off(s[at], rng))):
                for strict in (False, True):
                    families.setdefault((strict, name), []).append(
                        (s[at:at + 1 if strict else 4], said))
    one = torch.tensor(tokenizer.encode("01"))
    for (strict, name), rows in families.items():
        file = prompt("verdict_strict" if strict else "verdict")
        turns = tokenizer.chats([[{"role": "user", "content": fill(
            file, reference=" ".join(r), prediction=p)}] for r, p in rows])
        turns = [t + tokenizer.encode("Score: ") for t in turns]
        tokens = torch.zeros(len(turns), max(map(len, turns)), dtype=torch.long)
        for i, t in enumerate(turns):
            tokens[i, :len(t)] = torch.tensor(t)
        with torch.no_grad():
            hidden = model(tokens)[torch.arange(len(turns)), [len(t) - 1 for t in turns]]
            P = model.logits(hidden)[:, one].softmax(-1)[:, 1]
        label = torch.tensor([verdict(r, p, strict) for r, p in rows])
        show(f"{'strict' if strict else 'prefix'}: {name}",
             {"P(1)": P.mean().item(), "greedy right": ((P > 0.5) == label).float().mean().item()})


def train_stories(model: Llama, tokenizer: Tokenizer, seed: int, checkpoint):
    rng = random.Random(seed)
    pairs = world.Stories(held=False).pairs
    row = lambda kind, stage: (judge_row(pairs, DRILL[stage], rng) if kind == "judge" else
                               predictor_row(kind, pairs, (1.0, 1.0, KEEP)[stage], rng))

    def look():
        judge_figures(model, tokenizer, 40)
    train(model, tokenizer, STAGES, row, look, 4.0)


def main():
    parser = argparse.ArgumentParser(description="Train the embedded model that plays RLPT.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    write_files(args.out, WORDS)
    tokenizer, model = Tokenizer(args.out), new_model(args.out, HERE / "rlpt", FILES)
    start = time.time()
    train_stories(model, tokenizer, args.seed, None)
    save_model(model, args.out)
    print(f"trained in {time.time() - start:.0f} s")
    show("greedy", accuracies(model, tokenizer, 0))
    show("T = 1", accuracies(model, tokenizer, 1))
    judge_figures(model, tokenizer)


if __name__ == "__main__":
    main()
