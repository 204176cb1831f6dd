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

# ---------------------------------------------------------------- curves

def series(records: list[dict], *keys: str) -> tuple[list, list]:
    """Steps and values of a nested entry, where there is one."""
    steps, values = [], []
    for record in records:
        value = record
        for key in keys:
            value = (value or {}).get(key)
        if value is not None:
            steps.append(record["step"])
            values.append(value)
    return steps, values


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Running mean over `width` steps, fewer at the ends."""
    half = width // 2
    return [sum(v := values[max(0, i - half):i + half + 1]) / len(v) for i in range(len(values))]


# Panel: title, file, entries with their line styles. Curves of metrics.jsonl are smoothed.
PANELS = [
    ("held-out carry accuracy", "eval", {"accuracy.carry": "-"}),
    ("held-out no-carry accuracy", "eval", {"accuracy.none": "-"}),
    ("accuracy, hard (ASR -, MSR :)", "eval", {"accuracy.asr_hard": "-", "accuracy.msr_hard": ":"}),
    ("accuracy, easy (ASR -, MSR :)", "eval", {"accuracy.asr_easy": "-", "accuracy.msr_easy": ":"}),
    ("held-out reward", "eval", {"reward": "-"}),
    ("win-rate against the start", "eval", {"win_rate": "-"}),
    ("malformed share of the queries", "eval", {"challenger.malformed": "-"}),
    ("class shares of the queries (none : unit -- tens -. both -)", "eval",
     {"challenger.none": ":", "challenger.unit": "--", "challenger.tens": "-.",
      "challenger.both": "-"}),
    ("R", "metrics", {"reward": "-"}),
    ("R_Q", "metrics", {"quality": "-"}),
    ("KL, nats (Solver -, Challenger :)", "metrics", {"kl_solver": "-", "kl_challenger": ":"}),
    ("truncated share of the predictions", "metrics", {"truncated_predictions": "-"}),
    ("distinct share of the queries", "metrics", {"distinct_queries": "-"}),
]


def pyplot():
    """matplotlib, drawing into files."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise InputError("plot needs matplotlib: pip install matplotlib") from None
    pyplot.switch_backend("Agg")
    return pyplot


def save(figure, out: str):
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: {error}") from None


def plot(paths: list[str], out: str):
    """Curves of run folders; bars where the paths are result files or folders with some."""
    runs = {(Path(path) / "metrics.jsonl").exists() or (Path(path) / "eval.jsonl").exists()
            for path in paths}
    if len(runs) > 1:
        raise InputError("plot draws run folders as curves, or result files as bars, not both")
    draw = curves if True in runs else bars
    draw(paths, out)


def curves(folders: list[str], out: str):
    """Draw every panel that the runs have something for."""
    plt, groups = pyplot(), {}
    for folder in map(Path, folders):
        run = {kind: read_lines(folder / f"{kind}.jsonl") for kind in ("eval", "metrics")}
        groups.setdefault(re.sub(r"-\d+$", "", folder.name), []).append(run)
    drawn = []                                  # title, {(label, style): [(steps, values), ...]}
    for title, kind, entries in PANELS:
        lines = {(label, style): [series(run[kind], *entry.split(".")) for run in runs]
                 for label, runs in groups.items() for entry, style in entries.items()}
        if any(steps for found in lines.values() for steps, _ in found):
            drawn.append((title, kind, lines))
    if not drawn:
        raise InputError(f"{', '.join(folders)}: nothing has been recorded yet")
    rows = -(-len(drawn) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(15, 3.2 * rows), squeeze=False)
    colors = {label: f"C{number}" for number, label in enumerate(groups)}
    for axis, (title, kind, lines) in zip(axes.flat, drawn):
        for (label, style), found in lines.items():
            found = [(x, smooth(y) if kind == "metrics" else y) for x, y in found if x]
            for x, y in found if len(lines) < 3 * len(groups) else []:       # else too many lines
                axis.plot(x, y, style, color=colors[label], linewidth=0.6, alpha=0.5)
            tables = [dict(zip(x, y)) for x, y in found]
            steps = sorted(set.intersection(*map(set, tables))) if tables else []
            mean = [sum(table[step] for table in tables) / len(tables) for step in steps]
            axis.plot(steps, mean, style, color=colors[label], linewidth=1.8)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if any(word in title for word in ("accuracy", "share", "win-rate")):
            axis.set_ylim(-0.03, 1.03)
    for axis in axes.flat[len(drawn):]:
        axis.axis("off")
    for label, runs in groups.items():
        axes.flat[0].plot([], [], color=colors[label], label=f"{label} ({len(runs)})")
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, out)
    print(f"{out}: {len(drawn)} panels, {len(folders)} runs")


# ---------------------------------------------------------------- bars

def bars(paths: list[str], out: str):
    """A group of bars for each measure, a bar for each path: means with 95 % intervals.

    Where there is a single measure, its subsets (AlpacaEval's five, carry classes) follow it.
    """
    plt = pyplot()
    names = [Path(path).name.removesuffix(".jsonl") for path in paths]
    if len(set(names)) < len(names):                         # A/gsm8k.jsonl and B/gsm8k.jsonl
        names = paths
    groups = {}                                              # label: {name: values}
    sides = dict(zip(names, map(read_results, paths)))
    labels = sorted({label for side in sides.values() for label in side})
    for label in labels:
        for name, side in sides.items():
            if label in side:
                found = side[label]["values"]
                groups.setdefault(label, {})[name] = [value for value, _ in found.values()]
                for value, subset in found.values() if len(labels) == 1 else ():
                    if subset:
                        groups.setdefault(subset, {}).setdefault(name, []).append(value)
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
    axis.set_xticks(range(len(groups)), [textwrap.fill(label, 16) for label in groups], fontsize=8)
    axis.set_ylabel("per cent, 95 % interval")
    if any(label.startswith("win-rate") for label in labels):
        axis.axhline(50, color="black", linewidth=0.8, linestyle="--")       # neither is preferred
    axis.margins(y=0.15)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))         # beside the bars
    figure.tight_layout()
    save(figure, out)
    print(f"{out}: {len(groups)} groups of bars, {len(sides)} bars each")
