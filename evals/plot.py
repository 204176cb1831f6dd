"""Figures: training curves of runs.

What `python eval.py plot` calls; needs matplotlib. Runs whose folders differ only in their seed
at the end (tiny-lsp-1, tiny-lsp-2) are one setting: thin lines, and their mean as a thick one. A
second run with the same seed (tiny-lsp-0-2) is a setting of its own. A figure has at most four
panels, so that a projector can show it. Further panels go to curves-2.png, ...
"""
from functools import reduce
from pathlib import Path

from plumbing.files import InputError, read_json
from plumbing.runs import read_lines

# Okabe and Ito's colours, which colour-blind people can tell apart; an algorithm has the same one
# in page.html.
COLORS = {"lsp": "#0072B2", "lsp-zero": "#D55E00", "grpo": "#009E73", "rlpt": "#AA4499",
          "sft": "#666666"}
DASHES = ["-", "--", ":", "-."]                             # of settings of the same algorithm

# Title, name of the y-axis, file and entry of each panel. Curves of metrics.jsonl are smoothed.
PANELS = [
    ("Held-out sums with carries", "accuracy", "eval", "accuracy.carry"),
    ("Held-out sums without carries", "accuracy", "eval", "accuracy.none"),
    ("Held-out hard cases, ASR", "accuracy", "eval", "accuracy.asr_hard"),
    ("Held-out hard cases, MSR", "accuracy", "eval", "accuracy.msr_hard"),
    ("Held-out easy cases, ASR", "accuracy", "eval", "accuracy.asr_easy"),
    ("Held-out easy cases, MSR", "accuracy", "eval", "accuracy.msr_easy"),
    ("Held-out reward", "reward", "eval", "reward"),
    ("Held-out win-rate against the start", "win-rate", "eval", "win_rate"),
    ("Malformed queries", "fraction", "eval", "challenger.malformed"),
    ("Reward R", "mean R", "metrics", "reward"),
    ("Quality R_Q", "mean R_Q, 0 to 7", "metrics", "quality"),
    ("KL of the Solver", "nats per sequence", "metrics", "kl_solver"),
    ("KL of the Challenger", "nats per sequence", "metrics", "kl_challenger"),
    ("Distinct queries", "fraction", "metrics", "distinct_queries"),
    ("Truncated predictions", "fraction", "metrics", "truncated_predictions"),
]


def series(records: list[dict], *keys: str) -> tuple[list, list]:
    """Steps and values of a nested entry, where there is one."""
    entry = lambda record: reduce(lambda value, key: (value or {}).get(key), keys, record)
    found = [(record["step"], entry(record)) for record in records if entry(record) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Running mean over `width` steps, fewer at the ends."""
    half = width // 2
    return [sum(v := values[max(0, i - half):i + half + 1]) / len(v) for i in range(len(values))]


def pyplot():
    """matplotlib, drawing into files."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise InputError("plot needs matplotlib: pip install matplotlib") from None
    pyplot.switch_backend("Agg")
    pyplot.rcParams.update({"font.size": 14, "axes.grid": True, "axes.axisbelow": True,
                            "grid.alpha": 0.3, "lines.linewidth": 2.5})
    return pyplot


def save(figure, out: Path):
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: {error}") from None


def plot(folders: list[str], out: str):
    """Draw every panel that the runs have something for."""
    groups, styles, panels = {}, {}, []
    for folder in map(Path, folders):
        run = {kind: read_lines(folder / f"{kind}.jsonl") for kind in ("eval", "metrics")}
        config = read_json(folder / "config.json")
        label = folder.name.removesuffix(f"-{config['seed']}")
        groups.setdefault(label, []).append(run)
        color = COLORS[config["algo"]]
        earlier = sum(style["color"] == color for style in styles.values())
        styles.setdefault(label, {"color": color, "linestyle": DASHES[earlier % len(DASHES)]})
    for title, name, kind, entry in PANELS:
        lines = []                                          # (label or None, steps, values, style)
        for label, runs in groups.items():
            thin, thick = styles[label] | {"linewidth": 0.7, "alpha": 0.4}, styles[label]
            found = [series(run[kind], *entry.split(".")) for run in runs]
            found = [(x, smooth(y) if kind == "metrics" else y) for x, y in found if x]
            lines += [(None, x, y, thin) for x, y in found]
            tables = [dict(zip(x, y)) for x, y in found]
            steps = sorted(set.intersection(*map(set, tables))) if tables else []
            mean = [sum(table[step] for table in tables) / len(tables) for step in steps]
            lines += [(f"{label} ({len(runs)})", steps, mean, thick)] if steps else []
        if lines:
            panels.append((title, name, lines))
    if not panels:
        raise InputError(f"{', '.join(folders)}: nothing has been recorded yet")
    draw_panels(panels, out)


def draw_panels(panels: list[tuple], out: str):
    """Draw panels, four a figure: each has a title, the y-axis's name and lines over the steps.

    A line has a label or None, steps, values, and the arguments of its style.
    """
    plt, path = pyplot(), Path(out)
    for first in range(0, len(panels), 4):
        page = panels[first:first + 4]
        rows, columns = -(-len(page) // 2), min(len(page), 2)
        figure = plt.figure(figsize=(6.5 * columns, 4 * rows + 0.6), layout="constrained")
        labels = {}
        for place, (title, name, lines) in enumerate(page, 1):
            axis = figure.add_subplot(rows, columns, place)
            for label, x, y, style in lines:
                labels[label], = axis.plot(x, y, **style)
            axis.set(title=title, xlabel="step", ylabel=name)
            if name in ("accuracy", "fraction", "win-rate"):
                axis.set_ylim(-0.03, 1.03)
        labels.pop(None, None)
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=2)
        file = path.with_stem(f"{path.stem}-{first // 4 + 1}") if first else path
        save(figure, file)
        print(f"{file}: {', '.join(title for title, *_ in page)}")
