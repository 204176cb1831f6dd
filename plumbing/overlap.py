"""What a reader may skip: how alike a step's queries are, by the 3-grams of their words."""
from collections import Counter

import torch
from torch import Tensor

NEAR = 0.5               # a query is a near-copy of one that holds more of its 3-grams than this


def grams(query: str) -> set[tuple[str, ...]]:
    """The 3-grams of a query's words; of fewer than three words, all of them as one."""
    words = query.split()
    return {tuple(words[i:i + 3]) for i in range(max(1, len(words) - 2))}


def overlap(queries: list[str]) -> float | None:
    """Mean fraction of a query's 3-grams that another query of the list holds too; None for fewer
    than two queries."""
    if len(queries) < 2:
        return None
    own = [grams(query) for query in queries]
    counts = Counter(gram for held in own for gram in held)
    return sum(sum(counts[gram] > 1 for gram in held) / len(held) for held in own) / len(own)


def near_copies(queries: list[str]) -> Tensor:
    """Of each query, the fraction of the other queries that hold more than NEAR of its 3-grams:
    (N,) fp32 in 0..1."""
    own = [grams(query) for query in queries]
    near = [[len(held & other) > NEAR * len(held) for other in own] for held in own]
    return (torch.tensor(near).float().sum(1) - 1) / max(1, len(own) - 1)            # (N,)
