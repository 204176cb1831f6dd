"""Curves: what is read, what is drawn, and what is said when something is missing."""
import builtins
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as eval_script
from files import InputError
from runs import run_script


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
    assert eval_script.series(records, "a", "b") == ([0, 4], [1, 3])


def test_smoothing_is_a_running_mean_that_keeps_constants_and_length():
    assert eval_script.smooth([2.0] * 20) == [2.0] * 20
    assert eval_script.smooth([0, 3, 6], width=3) == [1.5, 3, 4.5]


def test_a_half_written_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"step": 1}\n{"ste')
    assert eval_script.read_lines(file) == [{"step": 1}]
    file.write_text('{"ste\n{"step": 1}\n')
    with pytest.raises(InputError, match="x.jsonl, line 1"):
        eval_script.read_lines(file)


def test_plot_draws_one_colour_a_setting_and_only_panels_with_something_in_them(tmp_path, capsys,
                                                                               monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("lsp-1", "lsp-2", "zero-1"):
        make_run(tmp_path / name)
    out = tmp_path / "curves.png"
    folders = [str(tmp_path / n) for n in ("lsp-1", "lsp-2", "zero-1")]
    monkeypatch.setattr(sys, "argv", ["eval.py", "plot", *folders, "--out", str(out)])
    eval_script.main()
    assert out.read_bytes()[:4] == b"\x89PNG" and "5 panels, 3 runs" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["plot", "nowhere"], "nowhere: no metrics.jsonl"), (["plot"], "runs"), ([], "command"),
    (["draw", "x"], "draw")])
def test_bad_input_ends_in_one_line(monkeypatch, capsys, arguments, message):
    if "nowhere" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(eval_script.main)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1


def test_without_matplotlib_plot_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match="pip install matplotlib"):
        eval_script.plot([str(tmp_path)], str(tmp_path / "x.png"))


def test_win_rate_counts_ties_half_and_cut_off_answers_as_wrong(monkeypatch):
    game = SimpleNamespace(settings=SimpleNamespace(reward="exact"),
                           reward=lambda q, a, g: torch.tensor([1.0, 1.0, 0.0, 1.0]))
    held_out = [("q", "1")] * 4
    ends = torch.tensor([True, True, True, False])           # the last one was cut off
    monkeypatch.setattr(eval_script, "greedy", lambda game, queries: (["a"] * 4, ends))
    start = [{"reward": r} for r in (0.0, 1.0, 1.0, 0.0)]
    figures, answered = eval_script.evaluate(game, held_out, start)      # win, tie, loss, tie
    assert figures == {"reward": 0.5, "win_rate": 0.5, "n": 4}
    assert [a["reward"] for a in answered] == [1, 1, 0, 0]
    assert eval_script.evaluate(game, held_out, None)[0]["win_rate"] == 0.5
