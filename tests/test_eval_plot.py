"""Pictures: what is read, what is drawn, and what is said when something is missing."""
import json
import re
import sys

import pytest
from conftest import ROOT

import eval as eval_script
from evals import plot, results
from plumbing.files import InputError


def make_run(folder, steps=3, world=True):
    folder.mkdir()
    metrics = [{"step": i, "reward": i / 9, "quality": None, "kl_solver": 0.1 * i,
                "kl_challenger": None, "distinct_queries": 1.0} for i in range(1, steps + 1)]
    evals = [{"step": i, "accuracy": {"carry": i / 9, "none": 1.0}, "challenger": None}
             for i in (0, steps)]
    for name, records in (("metrics", metrics), ("eval", evals if world else [])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_series_follow_nested_entries_and_leave_gaps_out(tmp_path):
    records = [{"step": 0, "a": {"b": 1}}, {"step": 2, "a": None}, {"step": 4, "a": {"b": 3}},
               {"step": 5}]
    assert plot.series(records, "a", "b") == ([0, 4], [1, 3])


def test_smoothing_is_a_running_mean_that_keeps_constants_and_length():
    assert plot.smooth([2.0] * 20) == [2.0] * 20
    assert plot.smooth([0, 3, 6], width=3) == [1.5, 3, 4.5]


def test_plot_draws_an_algorithms_colour_in_panels_with_something_in_them(tmp_path, capsys,
                                                                         monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("lsp-1", "lsp-2", "zero-1", "slow-1"):
        make_run(tmp_path / name)
        algo = "lsp-zero" if name == "zero-1" else "lsp"
        (tmp_path / name / "config.json").write_text(json.dumps({"algo": algo}))
    out, shown, save = tmp_path / "curves.png", [], plot.save
    folders = [str(tmp_path / n) for n in ("lsp-1", "lsp-2", "zero-1", "slow-1")]
    monkeypatch.setattr(sys, "argv", ["eval.py", "plot", *folders, "--out", str(out)])
    monkeypatch.setattr(plot, "save", lambda *given: (shown.append(given[0]), save(*given)))
    eval_script.main()
    assert "curves-2.png: Distinct queries\n" in capsys.readouterr().out
    for file in (out, tmp_path / "curves-2.png"):
        assert file.read_bytes()[:4] == b"\x89PNG"
    panels = [axis for figure in shown for axis in figure.axes if axis.lines]
    assert [len(figure.axes) <= 4 for figure in shown] == [True, True] and len(panels) == 5
    assert all(axis.get_xlabel() and axis.get_ylabel() and not axis.get_legend() for axis in panels)
    for figure in shown:
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert texts == ["lsp (2)", "zero (1)", "slow (1)"]
    means = [(line.get_color(), line.get_linestyle()) for line in panels[0].lines
             if line.get_linewidth() > 1]
    lsp, zero = plot.COLORS["lsp"], plot.COLORS["lsp-zero"]
    assert means == [(lsp, "-"), (zero, "-"), (lsp, "--")]


def test_the_page_gives_each_algorithm_the_same_colour():
    page = (ROOT / "evals" / "page.html").read_text()
    (colors,) = re.findall(r"const COLORS = (\{.*?\});", page, re.DOTALL)
    assert json.loads(colors) == plot.COLORS


def test_without_matplotlib_plot_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot.plot([str(tmp_path)], str(tmp_path / "x.png"))


def write_measure(path, right, **changes):
    path.parent.mkdir(exist_ok=True)
    header = {"measure": "gsm8k", "samples": 1, "command": "c"} | changes
    records = [{"item": i, "query": f"q{i}", "subset": "xy"[i % 2], "correct": [bool(r)]}
               for i, r in enumerate(right)]
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *records)))


def test_plot_draws_results_as_bars_with_their_intervals(tmp_path, capsys, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    write_measure(tmp_path / "base" / "gsm8k.jsonl", [1, 0, 0, 0])
    write_measure(tmp_path / "run" / "gsm8k.jsonl", [1, 1, 0, 0])
    write_measure(tmp_path / "run" / "math.jsonl", [1, 1], measure="math")
    shown = []
    monkeypatch.setattr(plot, "save", lambda figure, out: shown.append(figure))
    plot.plot([str(tmp_path / "base"), str(tmp_path / "run")], "bars.png")
    (axis,) = shown[0].axes
    heights = [patch.get_height() for patch in axis.patches]
    assert heights == [25.0, 50.0, 100.0] and "2 groups of bars" in capsys.readouterr().out
    lines = [segment for group in axis.collections for segment in group.get_segments()]
    ends = [[low[1] / 100, high[1] / 100] for low, high in lines]
    assert ends == [pytest.approx(results.interval([1.0] * k + [0.0] * (n - k)))
                    for k, n in ((1, 4), (2, 4), (2, 2))]
    pyplot.close("all")


def test_the_bars_of_a_single_measure_are_followed_by_its_subsets(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    write_measure(tmp_path / "base.jsonl", [1, 0, 0, 0])
    shown = []
    monkeypatch.setattr(plot, "save", lambda figure, out: shown.append(figure))
    plot.plot([str(tmp_path / "base.jsonl")], "bars.png")
    (axis,) = shown[0].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["gsm8k", "x", "y"]
    assert [patch.get_height() for patch in axis.patches] == [25.0, 50.0, 0.0]
    pyplot.close("all")


def test_a_low_win_rate_leaves_the_50_per_cent_line_in_view_and_two_judges_apart(tmp_path,
                                                                               monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for judge in "ab":
        (tmp_path / f"{judge}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
            {"measure": "win-rate", "against": "base", "judge": judge, "command": "c"},
            *({"item": i, "query": f"q{i}", "subset": None, "orders": 1, "first": None,
               "preference": 1.0} for i in range(50)))))
    shown = []
    monkeypatch.setattr(plot, "save", lambda figure, out: shown.append(figure))
    plot.plot([str(tmp_path)], "bars.png")
    (axis,) = shown[0].axes
    assert axis.get_ylim()[1] > 50
    labels = [label.get_text().replace("\n", " ") for label in axis.get_xticklabels()]
    assert labels == [f"win-rate against base, judge {judge}" for judge in "ab"]
    pyplot.close("all")


def test_plot_does_not_mix_runs_and_results(tmp_path):
    make_run(tmp_path / "lsp-1")
    write_measure(tmp_path / "base" / "gsm8k.jsonl", [1])
    with pytest.raises(InputError, match="lsp-1: no result files"):
        plot.plot([str(tmp_path / "lsp-1"), str(tmp_path / "base")], str(tmp_path / "x.png"))
