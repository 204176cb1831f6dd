"""A page to watch a game: one HTML file without any network access.

    python eval.py show runs/A [runs/B] --out game.html

page.html holds the layout and the script. What a model wrote travels as JSON and is inserted as
text, so that nothing in it can become markup or run.
"""
import json
from pathlib import Path

from plumbing.files import InputError, read_json
from plumbing.runs import read_lines

CURVES = ("step", "reward", "quality", "kl_solver", "kl_challenger", "distinct_queries", "overlap")
SHOWN = ("step", "query", "gold", "kind", "query_stopped", "trained_on", "challenger_advantage")
OF_ANSWERS = ("answer", "stopped", "reward", "quality", "advantage", "judgement", "reason",
              "failure")


def page(folders: list[Path], most: int = 20 * 10**6) -> str:
    """The page of one run or two, of at most `most` bytes: samples of only every k-th step where
    all would not fit. InputError for a folder that holds no run."""
    runs, samples = [], []
    for folder in folders:
        settings = read_json(folder / "config.json")
        metrics = read_lines(folder / "metrics.jsonl")
        if not metrics:
            raise InputError(f"{folder / 'metrics.jsonl'}: no step has been recorded yet")
        by_step = {}
        for line in read_lines(folder / "samples.jsonl"):
            record = {key: line.get(key) for key in SHOWN} | {"answers": [
                {key: a[key] for key in OF_ANSWERS if key in a} for a in line["answers"]]}
            by_step.setdefault(line["step"], []).append(record)
        samples.append(by_step)
        runs.append({"name": folder.name, "algo": settings["algo"],
                     "metrics": {key: [m.get(key) for m in metrics] for key in CURVES},
                     "evals": read_lines(folder / "eval.jsonl")})
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # "<" and the line separators would end the script element or the string.
    text = lambda value: json.dumps(value).replace("<", "\\u003c")
    last = max((step for by_step in samples for step in by_step), default=1)
    for every in range(1, last + 1):
        for run, by_step in zip(runs, samples):
            run["samples"] = {step: records for step, records in by_step.items()
                              if step % every == 0 or step == last}
        note = "" if every == 1 else (f"Samples of every {every}th step are shown: all of them "
                                      f"would exceed {most / 1e6:g} MB.")
        filled = template.replace("{DATA}", text({"runs": runs, "note": note}))
        if len(filled.encode()) <= most or every == last:
            return filled
