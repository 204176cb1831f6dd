"""What a reader may skip: how rows of different lengths are put into batches of a token budget."""
from bisect import bisect_right
from collections.abc import Iterator


def take_batch(waiting: list, size, budget: int) -> list:
    """Remove from the head of `waiting` as many rows as the budget holds, at least one, and return
    them. size(rows): the tokens that rows take up, which further rows never make fewer."""
    count = bisect_right(range(1, len(waiting) + 1), budget, key=lambda n: size(waiting[:n]))
    rows = waiting[:max(1, count)]
    del waiting[:max(1, count)]
    return rows


def micro_batches(rows: list, tokens: int) -> Iterator[list]:
    """The rows in passes of so many padded tokens: distinct prompts, and completions. Completions
    of like length go together, for little padding; those of one prompt share it."""
    def padded(rows: list) -> int:
        prompts = {tuple(row.prompt) for row in rows}
        return (len(prompts) * max(map(len, prompts))
                + len(rows) * max(len(row.completion.tokens) for row in rows))
    waiting = sorted(rows, key=lambda row: len(row.completion.tokens))
    while waiting:
        yield take_batch(waiting, padded, tokens)
