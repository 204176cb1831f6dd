"""Pictures: what is read, what is drawn, and what is said when something is missing."""
import json
import re
import sys

import pytest
from conftest import ROOT

import eval as eval_script
from evals import plot
from plumbing.files import InputError


def make_run(folder, steps=3, world=True):
    folder.mkdir()
    seed = int(folder.name.rsplit("-", 1)[-1])
    (folder / "config.json").write_text(json.dumps({"algo": "lsp", "seed": seed}))
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
    for name in ("lsp-1", "lsp-2", "zero-1", "slow-1", "lsp-1-2"):
        make_run(tmp_path / name)
    (tmp_path / "lsp-1-2/config.json").write_text('{"algo": "lsp", "seed": 1}')
    (tmp_path / "zero-1/config.json").write_text('{"algo": "lsp-zero", "seed": 1}')
    out, shown, save = tmp_path / "curves.png", [], plot.save
    folders = [str(tmp_path / n) for n in ("lsp-1", "lsp-2", "zero-1", "slow-1", "lsp-1-2")]
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
        assert texts == ["lsp (2)", "zero (1)", "slow (1)", "lsp-1-2 (1)"]
    means = [(line.get_color(), line.get_linestyle()) for line in panels[0].lines
             if line.get_linewidth() > 1]
    lsp, zero = plot.COLORS["lsp"], plot.COLORS["lsp-zero"]
    assert means == [(lsp, "-"), (zero, "-"), (lsp, "--"), (lsp, ":")]


def test_the_page_gives_each_algorithm_the_same_colour():
    page = (ROOT / "evals" / "page.html").read_text()
    (colors,) = re.findall(r"const COLORS = (\{.*?\});", page, re.DOTALL)
    assert json.loads(colors) == plot.COLORS


def test_without_matplotlib_plot_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    make_run(tmp_path / "lsp-1")
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot.plot([str(tmp_path / "lsp-1")], str(tmp_path / "x.png"))
