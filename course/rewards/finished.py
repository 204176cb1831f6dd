"""A reward without any model or gold answer: short answers that end, and do not repeat themselves.

    python train.py --model smollm2-135m --reward course/rewards/finished.py:finished

A truncated answer earns what the empty answer earns, so 0: train.py sees to that for every reward
that is a function.
"""


def finished(queries: list[str], answers: list[str], golds: list) -> list[float]:
    """1 for each answer of 8 to 60 words in which no four words in a row occur twice, else 0."""
    return [float(8 <= len(answer.split()) <= 60 and not repeats(answer.split()))
            for answer in answers]


def repeats(words: list[str]) -> bool:
    """Whether any four words in a row occur twice, in upper or lower case."""
    grams = [tuple(word.lower() for word in words[i:i + 4]) for i in range(len(words) - 3)]
    return len(set(grams)) < len(grams)
