"""Prompts from files, with their gold answers, and the order in which training draws them."""
import gzip
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch

from plumbing.chat import Tokenizer, fill
from plumbing.files import InputError, check_regular, read_prompt

SURROGATE = re.compile("[\ud800-\udfff]")     # half a character: JSON can hold it, UTF-8 cannot
FIELDS = ("instruction", "question", "problem", "prompt")


def read_data(path: str, *, gold: tuple | None = None,
              boxed=lambda text: None) -> list[tuple[str, str | None]]:
    """Queries with their gold answers (None without one) from a JSON list or JSON lines.

    A query is `instruction` (with `input` below it), `question`, `problem` or `prompt`; the gold
    answer is `answer`, or what `boxed` finds in MATH's `solution`. InputError names the line, or
    the entry of a list; with gold, what an answer must be in a word and a check of it, also where
    an answer is missing or is not that.
    """
    data = []
    for where, entry in read_entries(path):
        if not isinstance(entry, dict):
            raise InputError(f"{path}, {where}: expected an object, found {type(entry).__name__}")
        prompt = entry.get("prompt")               # TRL's other form: a list of messages
        if isinstance(prompt, list):
            message = prompt[0] if len(prompt) == 1 and isinstance(prompt[0], dict) else {}
            if message.get("role") != "user" or not isinstance(message.get("content"), str):
                raise InputError(f"{path}, {where}: prompt must be a text or one user message")
            entry = entry | {"prompt": message["content"]}
        key = next((k for k in FIELDS if isinstance(entry.get(k), str)), None)
        if key is None:
            raise InputError(f"{path}, {where}: no field instruction, question, problem or prompt "
                             f"(fields found: {', '.join(entry) or 'none'})")
        answer = entry.get("answer", entry.get("output"))
        if answer is None and isinstance(entry.get("solution"), str):
            answer = boxed(entry["solution"])
        answer = None if answer is None else str(answer)
        if gold and (answer is None or not gold[1](answer)):
            raise InputError(f"{path}, {where}: the reward needs a gold answer with {gold[0]} "
                             "in `answer`")
        data.append((query_of(entry, key), answer))
    if not data:
        raise InputError(f"{path}: no prompts in it")
    return data


def query_of(entry: dict, key: str) -> str:
    """What is asked: the field's text, and below an instruction its `input`."""
    below = entry.get("input") if key == "instruction" else None
    return entry[key] + (f"\n\n{below}" if below else "")


def check_data(path: str, data: list, tokenizer: Tokenizer, limit: int):
    """InputError with the line of a query that the tokenizer cannot encode, or whose prompt has
    more than `limit` tokens.

    path: the file that `data` came from, or a name for what came from none.
    """
    def refuse(n, reason):
        where = f", {read_entries(path)[n][0]}" if Path(path).is_file() else ""
        raise InputError(f"{path}{where}: {reason}")

    for n, (query, _) in enumerate(data):
        if (strange := tokenizer.unencodable(query)) is not None:
            refuse(n, f"the model's tokenizer cannot encode {strange!r}")
        ids = tokenizer.chat([{"role": "user", "content": query}])
        if len(ids) > limit:
            refuse(n, f"the prompt has {len(ids)} tokens; the model's context, less the answer's, "
                   f"holds {limit}")


def given_turn(tokenizer: Tokenizer, query: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt with a user's query, and of the assistant's turn with this answer and its
    stop token. InputError where the chat template does not put the one behind the other."""
    turns = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    prompt, ids = tokenizer.chat(turns[:1]), tokenizer.chat(turns, generation_prompt=False)
    ends = [t + 1 for t in range(len(prompt), len(ids)) if ids[t] in tokenizer.stop_ids]
    if ids[:len(prompt)] != prompt or not ends:
        raise InputError(f"{tokenizer.path}: its chat template has no place for a given answer")
    return prompt, ids[len(prompt):ends[0]]


def opening(tokenizer: Tokenizer, name: str, new: int, context: int, **values: str) -> list[int]:
    """Chat ids of a prompt file filled with these values ("None": no value, so that its place need
    not be there); InputError if it cannot be encoded, or leaves no place for `new` more tokens."""
    given = [key for key, value in values.items() if value != "None"]
    prompt = fill(read_prompt(name, given), **values)
    if (strange := tokenizer.unencodable(prompt)) is not None:
        raise InputError(f"{name}: the tokenizer of {tokenizer.path} cannot encode {strange!r}")
    ids = tokenizer.chat([{"role": "user", "content": prompt}])
    if not 1 <= len(ids) <= context - new:
        raise InputError(f"{name}: the prompt has {len(ids)} tokens: with {new} new ones it must "
                         f"be at least 1 and fit into the context of {context}")
    return ids


def read_entries(path: str) -> list[tuple[str, object]]:
    """What a JSON list or JSON lines, gzipped or not, hold, each with its place ("line 3")."""
    check_regular(Path(path))
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    listed = text.lstrip().startswith("[")
    entries = []
    # split("\n"), not splitlines(): JSON strings may hold U+2028, a line's end to splitlines().
    for number, piece in enumerate([text] if listed else text.split("\n"), 1):
        if not piece.strip():
            continue
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1) if listed else number
            why = getattr(error, "msg", error)
            raise InputError(f"{path}, line {line}: not JSON: {why}") from None
        entries += [(f"entry {i}", v) for i, v in enumerate(value, 1)] if listed else [
            (f"line {number}", value)]
    for where, value in entries if r"\ud" in text.lower() else ():
        if half := SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise InputError(f"{path}, {where}: {half[0]!r} is half a character")
    return entries


# What random numbers are drawn for.
PURPOSES = ("challenge", "solve", "judge", "order", "evaluate", "episode", "nonce")


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A fresh generator for each step and purpose: no state to save, and none to restore."""
    sequence = np.random.SeedSequence([seed, step, PURPOSES.index(purpose)])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def seeds(seed: int, step: int, purpose: str, count: int) -> list[int]:
    """Seeds of a step's completions: each depends on the seed, the step, the purpose and its own
    number alone, and not on how many processes there are."""
    return torch.randint(2**63 - 1, (count,), generator=generator(seed, step, purpose)).tolist()


def draw(data: list, count: int, seed: int, step: int) -> list:
    """The step's `count` entries: each once an epoch, every epoch in an order of its own."""
    places = range(step * count, (step + 1) * count)
    orders = {epoch: torch.randperm(len(data), generator=generator(seed, epoch, "order")).tolist()
              for epoch in {i // len(data) for i in places}}
    return [data[orders[i // len(data)][i % len(data)]] for i in places]
