"""Result files: what eval.py measured, one JSON object a line, written as it comes.

    {"measure": "gsm8k", "model": ..., "command": "python eval.py ..."}     the header: made how
    {"item": 0, "query": ..., "correct": [true], ...}                       then items

A command that was interrupted goes on where its file ends. Two files of the same measure are
compared item by item: on the same questions differences are far steadier than the figures.
"""
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.files import InputError
from plumbing.runs import read_lines

# What may differ between two files that are compared.
FREE = ("command", "model", "generator", "questions", "seed", "judge_at")


# ---------------------------------------------------------------- files

def resume(path: Path, header: dict) -> list[dict]:
    """The records that an earlier, interrupted command left; a new file begins with the header.

    A last line that was half written is cut off: its item is done again. InputError where the file
    was made in another way, or is something else: then it stays as it is.
    """
    records = []
    if path.exists():
        found, *records = read_lines(path) or [{}]
        if "measure" not in found:
            raise InputError(f"{path} exists and is no result file; nothing is overwritten")
        for key in header if records else ():
            if key != "command" and header[key] != found.get(key):
                raise InputError(f"{path} was made with another {key} ({found.get(key)!r:.60}, "
                                 f"now {header[key]!r:.60}): choose another --out")
    try:
        if records:
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    return records


def in_batches(items: list, size: int, what: str) -> Iterator[list]:
    """Slices of `size` items. Where there are several, a terminal shows a progress bar of them
    (disable=None: a file does not)."""
    starts = range(0, len(items), size)
    for start in tqdm(starts, what, unit="batch", disable=None if len(starts) > 1 else True):
        yield items[start:start + size]


def digest(texts: list[str]) -> str:
    """A short fingerprint of a list of texts: the same questions, or not."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- figures

def mean_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error (sample standard deviation / sqrt(n)); None for a single value."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def interval(values: list[float]) -> list[float]:
    """A 95 % interval of the mean of values in 0..1.

    Right or wrong: Wilson's, which keeps its width where all are right, or all wrong. Anything else
    (win-rates, pass@k): mean +- 1.96 standard errors.
    """
    n, (mean, error) = len(values), mean_error(values)
    if set(values) <= {0.0, 1.0}:
        square = 1.96 ** 2
        middle = (mean + square / (2 * n)) / (1 + square / n)
        width = 1.96 * math.sqrt(mean * (1 - mean) / n + square / (4 * n * n)) / (1 + square / n)
    else:
        middle, width = mean, 1.96 * (1.0 if error is None else error)
    return [max(0.0, middle - width), min(1.0, middle + width)]


def percent(values: list[float], name: str) -> dict:
    """Mean, standard error and 95 % interval of values in 0..1, in per cent; their number n."""
    mean, error = mean_error(values) if values else (None, None)
    return {name: None if mean is None else 100 * mean,
            "standard_error": None if error is None else 100 * error,
            "interval": [100 * x for x in interval(values)] if values else None,
            "n": len(values)}


def paired(base: list[float], run: list[float]) -> tuple[float, float, float]:
    """Mean difference run - base over the same items, and its 95 % interval: +- 1.96 standard
    errors. Where all items differ alike, what was never seen in n can be as frequent as `width`."""
    mean, error = mean_error(np.subtract(run, base))
    width = 1.96 * error if error else 1 - 0.05 ** (1 / len(base))
    return mean, mean - width, mean + width


def show(figures: dict, found: list[tuple[float, str | None]], name: str):
    """A line for each subset of the (value, subset) found; last the overall figures as JSON."""
    subsets = {}
    for value, subset in found:
        subsets.setdefault(str(subset), []).append(value)
    for subset, values in sorted(subsets.items()) if len(subsets) > 1 else ():
        f = percent(values, name)
        print(f"{subset:24} {f[name]:6.2f}   95 % [{f['interval'][0]:.2f}, {f['interval'][1]:.2f}]"
              f"   n {f['n']}")
    print(json.dumps(figures))


# ---------------------------------------------------------------- before and after

def read_results(path: str) -> dict[str, dict]:
    """A result file, or a folder of some: {measure's label: header, file, item_values()}."""
    path, measures = Path(path), {}
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        header, *records = read_lines(file) or [{}]
        if "measure" not in header:
            continue
        label = header["measure"]
        if label == "win-rate":
            label += f" against {header['against']}, judge {header['judge']}"
        if label in measures:
            raise InputError(f"{file}: {label} is in {measures[label]['file']} already")
        measures[label] = {"header": header, "file": file, "values": item_values(header, records)}
    if not measures:
        raise InputError(f"{path}: no result files of eval.py")
    return measures


def item_values(header: dict, records: list[dict]) -> dict[str, tuple[float, str | None]]:
    """{query: (value in 0..1, subset)}, of equal queries the last one's.

    A benchmark's value is the share of right samples. A win-rate's is the mean preference - 1 over
    the asked orders, and an item with a failed or missing one is left out.
    """
    by_item, values = {}, {}
    for record in records:                 # of a question that was asked again, the last one
        by_item.setdefault(record["item"], {})[record.get("first")] = record
    for _, group in sorted(by_item.items()):
        first, *others = group.values()
        if header["measure"] != "win-rate":
            value = sum(first["correct"]) / len(first["correct"])
        else:
            preferences = [record["preference"] for record in (first, *others)]
            if len(preferences) < first["orders"] or None in preferences:
                continue
            value = sum(preferences) / len(preferences) - 1
        values[first["query"]] = value, first.get("subset")
    return values


def rows(base: dict, run: dict) -> Iterator[tuple]:
    """The table of two measures, row by row: subset (None: all), n, base, run, difference,
    its interval's ends; over the items that both have.

    InputError where the files were made so differently that pairing them would mislead.
    """
    for key in sorted(base["header"].keys() | run["header"].keys()):
        one, other = base["header"].get(key), run["header"].get(key)
        if key not in FREE and one != other:
            raise InputError(f"{run['file']} was made with {key} {other!r:.60}, {base['file']} "
                             f"with {one!r:.60}: not comparable")
    pairs = [(subset, value, run["values"][key][0])
             for key, (value, subset) in base["values"].items() if key in run["values"]]
    if not pairs:
        raise InputError(f"{run['file']}: no question in common with {base['file']}")
    names = sorted({subset for subset, *_ in pairs} - {None})
    for name in [None] + (names if len(names) > 1 else []):
        one, other = zip(*(values for subset, *values in pairs if name in (None, subset)))
        yield name, len(one), np.mean(one), np.mean(other), *paired(one, other)


def compare(base_path: str, run_paths: list[str]):
    """Print one table of the base against each run, and below it the command of each figure."""
    sides = {path: read_results(path) for path in (base_path, *run_paths)}
    base = sides[base_path]
    print(f"{'':42} {'n':>5} {'base':>7} {'run':>7} {'run - base':>11} {'95 % interval':>17}")
    for path in run_paths:
        print(path)
        for label in sorted(base.keys() & sides[path].keys()):
            for name, n, *figures in rows(base[label], sides[path][label]):
                one, other, change, low, high = (f"{100 * x:.2f}" for x in figures)
                print(f"  {label if name is None else f'  {name}':40} {n:5} {one:>7} {other:>7} "
                      f"{change:>11} {f'[{low}, {high}]':>17}")
    print("\nPer cent, over what both sides have measured and asked. Interval: of the difference.")
    for path, side in sides.items():
        for label, measured in sorted(side.items()):
            print(f"{path}: {label}: {measured['header']['command']}")
