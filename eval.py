"""Measure and look at runs: held-out figures while they train (train.py calls those), and curves.

    python eval.py plot runs/tiny-lsp-* --out curves.png     # needs matplotlib

Runs whose folders differ only in a last number (tiny-lsp-1, tiny-lsp-2) are seeds of one setting:
thin lines, and their mean as a thick one.
"""
import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

import rewards
from data import EVALUATE, generator
from files import InputError
from runs import Parser, run_script
from sample import sample, text_of

CLASSES = {"none": ":", "unit": "--", "tens": "-.", "both": "-"}       # line styles


# ---------------------------------------------------------------- during a run

def greedy(game, queries: list[str]) -> tuple[list[str], Tensor]:
    """The Solver's likeliest answers, and whether each came to its end, (len,) bool."""
    prompts = [game.tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    rows = sample(game.policy, prompts, max_new_tokens=game.settings.answer_tokens, temperature=0,
                  stop_ids=game.tokenizer.stop_ids, batch_tokens=game.settings.batch_tokens)
    texts = [text_of(game.tokenizer, row) for (row,) in rows]
    return texts, torch.tensor([row.stopped for (row,) in rows])


def evaluate(game, held_out: list, start: list[dict] | None) -> tuple[dict, list[dict]]:
    """Greedy answers to held-out prompts: mean reward, win-rate against the start's answers.

    A win is a higher reward for the same prompt, a tie counts half. The reward is the run's own, so
    a rise here can still be a weakness of the reward. Returns the figures, and what was answered:
    a record a prompt. start: those records of the starting model; None: this is the start.
    """
    queries, golds = map(list, zip(*held_out))
    answers, stopped = greedy(game, queries)
    ours = rewards.as_rewards(game.reward(queries, answers, golds), len(queries))          # (len,)
    if game.settings.reward in rewards.VERIFIABLE:         # as in training: cut off is not answered
        ours = ours * stopped
    answered = [{"query": q, "answer": a, "reward": r}
                for q, a, r in zip(queries, answers, ours.tolist())]
    theirs = torch.tensor([math.nan if record["reward"] is None else record["reward"]
                           for record in start or answered])                               # (len,)
    wins = (ours > theirs).float() + (ours == theirs).float() / 2
    figures = {"reward": ours.mean().item(), "win_rate": wins.mean().item(), "n": len(held_out)}
    return figures, answered


def evaluate_world(game) -> dict:
    """The embedded world: greedy accuracy on all held-out sums; what 1,000 sampled queries are."""
    s, queries = game.settings, game.world.held_out_queries()
    accuracy = game.world.accuracy(queries, greedy(game, queries)[0])
    record = {"accuracy": accuracy, "challenger": None}
    if game.challenger_prompt:
        (rows,) = sample(game.policy, [game.challenger_prompt], num_samples=1000,
                         temperature=s.temperature, max_new_tokens=s.query_tokens,
                         stop_ids=game.tokenizer.stop_ids, batch_tokens=s.batch_tokens,
                         generator=generator(s.seed, 0, EVALUATE))
        asked = [text_of(game.tokenizer, row) for row in rows]
        record["challenger"] = game.world.challenger_shares(asked)
    return record


# ---------------------------------------------------------------- curves

def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file, if there is one; a half-written last line is left out."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(lines := path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            records += [json.loads(line)] if line else []
        except ValueError:
            if number != len(lines):
                raise InputError(f"{path}, line {number}: not JSON") from None
    return records


def series(records: list[dict], *keys: str) -> tuple[list, list]:
    """Steps and values of a nested entry, where there is one."""
    points = []
    for record in records:
        value = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            points.append((record["step"], value))
    return [p[0] for p in points], [p[1] for p in points]


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Running mean over `width` steps, fewer at the ends."""
    half = width // 2
    return [sum(v := values[max(0, i - half):i + half + 1]) / len(v) for i in range(len(values))]


# Panel: title, file, entries with their line styles, whether to smooth.
PANELS = [
    ("held-out carry accuracy", "eval", {("accuracy", "carry"): "-"}, False),
    ("held-out no-carry accuracy", "eval", {("accuracy", "none"): "-"}, False),
    ("held-out reward", "eval", {("reward",): "-"}, False),
    ("win-rate against the start", "eval", {("win_rate",): "-"}, False),
    ("malformed share of the queries", "eval", {("challenger", "malformed"): "-"}, False),
    ("class shares of the queries (none : unit -- tens -. both -)", "eval",
     {("challenger", name): style for name, style in CLASSES.items()}, False),
    ("R", "metrics", {("reward",): "-"}, True),
    ("R_Q", "metrics", {("quality",): "-"}, True),
    ("KL, nats a sequence (Solver -, Challenger :)", "metrics",
     {("kl_solver",): "-", ("kl_challenger",): ":"}, True),
    ("distinct share of the queries", "metrics", {("distinct_queries",): "-"}, True),
]


def plot(folders: list[str], out: str):
    """Draw every panel that the runs have something for."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    groups = {}
    for folder in map(Path, folders):
        run = {kind: read_lines(folder / f"{kind}.jsonl") for kind in ("eval", "metrics")}
        if not any(run.values()):
            raise InputError(f"{folder}: no metrics.jsonl or eval.jsonl with anything in it")
        groups.setdefault(re.sub(r"-\d+$", "", folder.name), []).append(run)
    everything = [run for runs in groups.values() for run in runs]
    drawn = [(title, kind, entries, smoothed) for title, kind, entries, smoothed in PANELS
             if any(series(run[kind], *keys)[0] for run in everything for keys in entries)]
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False)
    for axis, (title, kind, entries, smoothed) in zip(axes.flat, drawn):
        for color, (label, runs) in enumerate(groups.items()):
            for keys, style in entries.items():
                curves = [series(run[kind], *keys) for run in runs]
                curves = [(x, smooth(y) if smoothed else y) for x, y in curves if x]
                for x, y in curves if len(entries) < 3 else []:          # else too many lines
                    axis.plot(x, y, style, color=f"C{color}", linewidth=0.6, alpha=0.5)
                tables = [dict(zip(x, y)) for x, y in curves]
                steps = sorted(set.intersection(*map(set, tables))) if tables else []
                mean = [sum(table[step] for table in tables) / len(tables) for step in steps]
                axis.plot(steps, mean, style, color=f"C{color}", linewidth=1.8)
            axis.plot([], [], color=f"C{color}", label=f"{label} ({len(runs)})")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        if any(word in title for word in ("accuracy", "share", "win-rate")):
            axis.set_ylim(-0.03, 1.03)
    for axis in axes.flat[len(drawn):]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"{out}: {len(drawn)} panels, {sum(map(len, groups.values()))} runs")


def main():
    parser = Parser(description="Look at what runs did.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("plot", help="draw training curves")
    drawing.add_argument("runs", nargs="+", help="run folders")
    drawing.add_argument("--out", default="curves.png", help="the picture (png, pdf or svg)")
    args = parser.parse_args()
    plot(args.runs, args.out)


if __name__ == "__main__":
    run_script(main)
