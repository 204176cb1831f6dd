"""The embedded toy world: sums of two two-digit numbers, "What is 37 + 48?" answered by "85".

For RLPT the same sums come as stories: "Ann has 37. She gets 48. Now Ann has 85. Ann is glad."

    from tiny import world
    world.reward(["What is 37 + 48?"], ["85"], [None])             # tensor([1.])
    world.accuracy(queries, answers)                               # {"none": ..., "carry": ...}

Pure functions: nothing here samples from a model. A pair (a, b) has both operands in 10..99. Its
class says which columns carry when it is added by hand, a carry out of the units being counted in
the tens. Every pair is in exactly one class:
    none   neither column reaches 10                                     23 + 45
    unit   the units do, the tens (with that carry) do not               37 + 48
    tens   the units do not, the tens do: the sum has a third digit      72 + 54
    both   both do                                                       57 + 68
"""
import random
import re
import zlib
from itertools import product

import torch

CLASSES = ("none", "unit", "tens", "both")
# Weights of the classes among GRPO's training queries. "easy" has the weights with which the base
# Challenger asks.
MIXES = {"easy": (0.75, 0.09, 0.07, 0.04), "balanced": (0.25, 0.25, 0.25, 0.25)}
PEOPLE = (("Ann", "She"), ("Bob", "He"), ("Eve", "She"), ("Tom", "He"))
PARAPHRASES = {r"Now [A-Z][a-z]+ has ([0-9]+)\.": "In all {}.",
               r"S?[Hh]e gets ([0-9]+)\.": "Then {} more."}
STORIES = "stories"                 # what train.py's --text calls them
TARGETS = {"asr": 2, "msr": 1}      # of a story's sentences, the one to predict


# ---------------------------------------------------------------- queries

def query_text(a: int, b: int) -> str:
    """The one way to ask for a + b."""
    return f"What is {a} + {b}?"


def parse_query(text: str) -> tuple[int, int] | None:
    """(a, b) if the whole text is a query of this world, to the character; else None."""
    # [0-9] and not \d, which also takes digits of other scripts.
    match = re.fullmatch(r"What is ([1-9][0-9]) \+ ([1-9][0-9])\?", text)
    return (int(match[1]), int(match[2])) if match else None


def carry_class(a: int, b: int) -> str:
    """none, unit, tens or both: which columns of a + b carry (see the head of this file)."""
    unit = a % 10 + b % 10 >= 10
    tens = a // 10 + b // 10 + unit >= 10                          # the same as a + b >= 100
    return CLASSES[unit + 2 * tens]


def classify(query: str) -> str:
    """A query's class, or "malformed"."""
    pair = parse_query(query)
    return carry_class(*pair) if pair else "malformed"


# ---------------------------------------------------------------- the held-out split

def held_out(a: int, b: int) -> bool:
    """Whether no training touches a pair: 12 % of all, by a hash that never changes.

    a + b and b + a are on the same side: training on the one would give the other away.
    """
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 1000 < 120


def is_held_out(query: str) -> bool:
    """Whether a query asks for a held-out pair; a malformed one asks for none."""
    pair = parse_query(query)
    return pair is not None and held_out(*pair)


def pairs(*, held: bool) -> list[tuple[int, int]]:
    """All pairs on one side of the split, in order."""
    return [(a, b) for a in range(10, 100) for b in range(10, 100) if held_out(a, b) == held]


def held_out_queries() -> list[str]:
    """Every held-out query, in order; `classify` tells its class."""
    return [query_text(a, b) for a, b in pairs(held=True)]


def training_pairs() -> dict[str, list[tuple[int, int]]]:
    """For each class, its pairs that are not held out, in order."""
    return {name: [pair for pair in pairs(held=False) if carry_class(*pair) == name]
            for name in CLASSES}


def prompts(mix: str, count: int, *, seed: int) -> list[tuple[str, str]]:
    """`count` training (query, gold) for GRPO, classes drawn from MIXES[mix], none held out.

    Deterministic from the seed, and a longer list begins with the shorter one.
    """
    generator, by_class = random.Random(seed), training_pairs()
    out = []
    for _ in range(count):
        name = generator.choices(CLASSES, MIXES[mix])[0]
        a, b = generator.choice(by_class[name])
        out.append((query_text(a, b), str(a + b)))
    return out


# ---------------------------------------------------------------- reward and evaluation

def correct(query: str, answer: str) -> bool:
    """Whether the query parses and the answer is exactly its sum, in digits."""
    pair = parse_query(query)
    return pair is not None and answer == str(sum(pair))


def reward(queries: list[str], answers: list[str], golds: list | None = None) -> torch.Tensor:
    """R(q, a): 1 where the query parses strictly and the answer is its sum, else 0; (len,) fp32.

    The gold answers are not needed: the query holds its own.
    """
    return torch.tensor([float(correct(q, a)) for q, a in zip(queries, answers, strict=True)])


def fraction(flags: list[bool]) -> float:
    """The fraction of true ones; nan of none."""
    return sum(flags) / len(flags) if flags else float("nan")


def accuracy(queries: list[str], answers: list[str]) -> dict[str, float]:
    """Fraction of right answers by class, and "carry", the plain mean of unit, tens and both.

    Every query must be well-formed. The fraction of a class without queries is nan.
    """
    answered = list(zip(queries, answers, strict=True))
    right = {name: fraction([correct(q, a) for q, a in answered if classify(q) == name])
             for name in CLASSES}
    return right | {"carry": (right["unit"] + right["tens"] + right["both"]) / 3}


def challenger_shares(queries: list[str]) -> dict[str, float]:
    """Fraction of each class, and of "malformed", among the Challenger's queries."""
    names = [classify(query) for query in queries]
    return {name: names.count(name) / max(1, len(names)) for name in (*CLASSES, "malformed")}


# ---------------------------------------------------------------- stories, for RLPT

def story(a: int, b: int) -> list[str]:
    """The four sentences of the one story about a pair; a hash of the pair names the person."""
    name, pronoun = PEOPLE[zlib.crc32(f"{a} {b}".encode()) % len(PEOPLE)]
    return [f"{name} has {a}.", f"{pronoun} gets {b}.", f"Now {name} has {a + b}.",
            f"{name} is glad."]


class Stories:
    """A text for RLPT: the stories of one side of the split whose sum has two digits.

    Each is a passage; what can be predicted of it is the total (ASR), by adding, or the gift (MSR),
    by subtracting. The rest is a guess or always the same.
    """

    def __init__(self, *, held: bool):
        self.pairs = [(a, b) for a, b in pairs(held=held) if a + b < 100]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, number: int, kind: str) -> tuple[list[str], list[int]]:
        """A story's sentences, each with the blank that follows it, and the place of the target."""
        return [f"{sentence} " for sentence in story(*self.pairs[number])], [TARGETS[kind]]


def wordings(sentence: str) -> list[str]:
    """The sentences that say the same as this one, itself first."""
    matches = {other: re.fullmatch(start, sentence) for start, other in PARAPHRASES.items()}
    return [sentence, *(other.format(match[1]) for other, match in matches.items() if match)]


def beginnings(reference: list[str]) -> list[str]:
    """Every way to say what the first of these sentences say: the right predictions."""
    return [" ".join(said) for count in range(1, len(reference) + 1)
            for said in product(*map(wordings, reference[:count]))]


def held_out_tasks() -> list[tuple[str, list[str], int]]:
    """Every held-out story, for ASR and for MSR: kind, sentences, place of the target."""
    held = Stories(held=True)
    return [(kind, held.read(n, kind)[0], at) for kind, at in TARGETS.items()
            for n in range(len(held))]


def verdict(reference: str, prediction: str) -> bool:
    """Whether a prediction says, in any wording, what the reference's first sentences say."""
    return prediction in beginnings(re.findall(r"[^ .][^.]*\.", reference))


def story_figures(tasks: list, predictions: list[str | None]) -> dict[str, dict[str, float]]:
    """Figures of the predictions (None: nothing was predicted) for held_out_tasks.

    "accuracy": the fraction of right predictions where no column carries (easy), where one does
    (hard), and of all. "truncated": the fraction that does not end with a whole sentence.
    """
    right = {f"{kind}_{name}": [] for kind in TARGETS for name in ("easy", "hard")}
    truncated = {kind: [] for kind in TARGETS}
    for (kind, pieces, at), prediction in zip(tasks, predictions, strict=True):
        a, b = (int(re.search("[0-9]+", sentence)[0]) for sentence in pieces[:2])
        name = "easy" if carry_class(a, b) == "none" else "hard"
        right[f"{kind}_{name}"].append(verdict("".join(pieces[at:]), prediction or ""))
        truncated[kind].append(bool(prediction) and not prediction.endswith("."))
    right["all"] = sum(right.values(), [])
    return {"accuracy": {name: fraction(flags) for name, flags in right.items()},
            "truncated": {kind: fraction(flags) for kind, flags in truncated.items()}}
