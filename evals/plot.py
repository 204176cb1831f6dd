"""Pictures: training curves of runs, and what was measured as bars with their intervals.

What `python eval.py plot` calls; needs matplotlib. Runs whose folders differ only in a last number
(tiny-lsp-1, tiny-lsp-2) are seeds of one setting: thin lines, and their mean as a thick one.
"""
import re
import textwrap
from pathlib import Path

from evals.results import interval, mean_error, read_results
from plumbing.files import InputError
from plumbing.runs import read_lines

CLASSES = {"none": ":", "unit": "--", "tens": "-.", "both": "-"}       # line styles


# ---------------------------------------------------------------- curves

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
    ("held-out accuracy, hard (ASR -, MSR :)", "eval",
     {("accuracy", "asr_hard"): "-", ("accuracy", "msr_hard"): ":"}, False),
    ("held-out accuracy, easy (ASR -, MSR :)", "eval",
     {("accuracy", "asr_easy"): "-", ("accuracy", "msr_easy"): ":"}, False),
    ("held-out reward", "eval", {("reward",): "-"}, False),
    ("win-rate against the start", "eval", {("win_rate",): "-"}, False),
    ("malformed share of the queries", "eval", {("challenger", "malformed"): "-"}, False),
    ("class shares of the queries (none : unit -- tens -. both -)", "eval",
     {("challenger", name): style for name, style in CLASSES.items()}, False),
    ("R", "metrics", {("reward",): "-"}, True),
    ("R_Q", "metrics", {("quality",): "-"}, True),
    ("KL, nats a sequence (Solver -, Challenger :)", "metrics",
     {("kl_solver",): "-", ("kl_challenger",): ":"}, True),
    ("truncated share of the predictions", "metrics", {("truncated_predictions",): "-"}, True),
    ("distinct share of the queries", "metrics", {("distinct_queries",): "-"}, True),
]


def pyplot():
    """matplotlib, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save(figure, out: str):
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: {error}") from None


def plot(paths: list[str], out: str):
    """Curves of run folders; bars where the paths are result files or folders with some."""
    runs = [Path(path) for path in paths
            if any((Path(path) / f"{kind}.jsonl").exists() for kind in ("eval", "metrics"))]
    if 0 < len(runs) < len(paths):
        raise InputError("plot draws run folders as curves, or result files as bars, not both")
    if runs or not any(Path(path).exists() for path in paths):
        curves(paths, out)
    else:
        bars(paths, out)


def curves(folders: list[str], out: str):
    """Draw every panel that the runs have something for."""
    plt = pyplot()
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
            name = label.replace("$", r"\$")
            axis.plot([], [], color=f"C{color}", label=f"{name} ({len(runs)})")
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
    save(figure, out)
    print(f"{out}: {len(drawn)} panels, {sum(map(len, groups.values()))} runs")


# ---------------------------------------------------------------- bars

def bars(paths: list[str], out: str):
    """A group of bars for each measure, a bar for each path: means with 95 % intervals.

    Where there is a single measure, its subsets (AlpacaEval's five, carry classes) follow it.
    """
    plt = pyplot()
    names = [Path(path).name.removesuffix(".jsonl") for path in paths]
    if len(set(names)) < len(names):                         # A/gsm8k.jsonl and B/gsm8k.jsonl
        names = [Path(path).absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        raise InputError("two of the paths have the same name, which the legend needs")
    sides = {name.replace("$", r"\$"): read_results(path) for name, path in zip(names, paths)}
    labels = sorted({label for side in sides.values() for label in side})
    groups = {label: {name: list(side[label]["values"].values())
                      for name, side in sides.items() if label in side} for label in labels}
    if len(labels) == 1:
        for name, side in sides.items():
            values, subsets = side[labels[0]]["values"], side[labels[0]]["subsets"]
            for key in (key for key in values if subsets[key]):
                groups.setdefault(subsets[key], {}).setdefault(name, []).append(values[key])
    figure, axis = plt.subplots(figsize=(2.5 + 1.1 * len(groups) * len(sides) ** 0.5, 4))
    width = 0.8 / len(sides)
    for number, name in enumerate(sides):
        drawn = [(i, group[name]) for i, group in enumerate(groups.values()) if group.get(name)]
        at = [i + (number - (len(sides) - 1) / 2) * width for i, _ in drawn]
        means = [100 * mean_error(values)[0] for _, values in drawn]
        ends = [[100 * x for x in interval(values)] for _, values in drawn]
        reach = [[m - low for m, (low, _) in zip(means, ends)],
                 [high - m for m, (_, high) in zip(means, ends)]]
        axis.bar(at, means, width, yerr=reach, capsize=3, label=name, color=f"C{number}")
        for x, mean, (_, high) in zip(at, means, ends):
            axis.text(x, high + 1, f"{mean:.1f}", ha="center", fontsize=8)
    short = [label.partition(" against ")[0] for label in groups]
    short = [(label if short.count(brief) > 1 else brief).replace("$", r"\$")      # two judges
             for label, brief in zip(groups, short)]
    axis.set_xticks(range(len(groups)), [textwrap.fill(label, 16) for label in short], fontsize=8)
    axis.set_ylabel("per cent, 95 % interval")
    tops = [100 * interval(values)[1] for group in groups.values() for values in group.values()]
    compared = any(label.startswith("win-rate") for label in labels)
    axis.set_ylim(0, 1.15 * max(tops + [50] * compared))
    if compared:
        axis.axhline(50, color="black", linewidth=0.8, linestyle="--")       # neither is preferred
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))         # beside the bars
    figure.tight_layout()
    save(figure, out)
    print(f"{out}: {len(groups)} groups of bars, {len(sides)} bars each")
