"""Result files that are resumed, intervals against known numbers, paired comparisons."""
import json
import math
import random
import sys

import numpy as np
import pytest

from evals import results
from plumbing.files import InputError

HEADER = {"measure": "gsm8k", "model": "/m", "samples": 1, "max_new_tokens": 9, "command": "c1"}


def write_results(path, right, *, queries=None, subsets=None, **changes):
    """A benchmark's result file: right[i] is a list of flags, one a sample."""
    path.parent.mkdir(exist_ok=True)
    lines = [HEADER | changes] + [
        {"item": i, "query": queries[i] if queries else f"q{i}", "correct": list(map(bool, flags)),
         "subset": subsets[i] if subsets else None} for i, flags in enumerate(right)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# ---------------------------------------------------------------- files

def test_a_file_is_resumed_after_its_last_whole_line(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    assert results.resume(path, HEADER) == []
    with open(path, "a") as file:
        file.write('{"item": 0}\n{"item": 1}')              # whole, but for the line's end
    assert results.resume(path, HEADER | {"command": "another"}) == [{"item": 0}]
    assert path.read_text() == json.dumps(HEADER) + '\n{"item": 0}\n'
    with open(path, "ab") as file:
        file.write('{"item": 1, "query": "ü'.encode()[:-1])       # cut within a character
    assert results.resume(path, HEADER) == [{"item": 0}] and path.read_bytes().endswith(b"0}\n")


def test_a_file_made_otherwise_is_refused_and_stays(tmp_path):
    path = tmp_path / "r.jsonl"
    results.resume(path, HEADER)
    assert results.resume(path, HEADER | {"model": "/other"}) == []       # nothing to lose in it
    path.write_text(json.dumps(HEADER) + '\n{"item": 0}\n{"ite')
    before = path.read_text()
    with pytest.raises(InputError, match=r"r.jsonl was made with another model \('/m', now '/n'\)"):
        results.resume(path, HEADER | {"model": "/n"})
    assert path.read_text() == before
    path.write_text(before.replace('{"item": 0}', '{"item'))
    with pytest.raises(InputError, match="r.jsonl, line 2: not JSON"):
        results.resume(path, HEADER)


@pytest.mark.parametrize("content", [
    "notes of mine", "notes\n", "[]\n", '{"a": 1}\n{"b": 2}\n', ""])
def test_somebody_elses_file_is_not_touched(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="r.jsonl"):
        results.resume(path, HEADER)
    assert path.read_text() == content


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_how_far_an_evaluation_is(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(results.in_batches([1, 2, 3], 2, "answering")) == [[1, 2], [3]]
    assert ("answering: 100%" in capsys.readouterr().err) == terminal


# ---------------------------------------------------------------- figures

def test_the_standard_error_is_the_sample_deviation_over_root_n():
    mean, error = results.mean_error([1.0, 0.0, 0.5, 0.5, 0.25])
    assert mean == 0.45 and error == pytest.approx(math.sqrt(0.55 / 4) / math.sqrt(5), abs=1e-15)
    assert results.mean_error([0.3]) == (0.3, None)


def test_the_interval_of_shares_is_wilsons():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, to four digits.
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        found = results.interval([1.0] * right + [0.0] * (n - right))
        assert found == pytest.approx([low, high], abs=1e-4)
    # Other values: mean +- 1.96 errors, here .9 +- 1.96 * .1 / sqrt(3), clipped to what can be.
    assert results.interval([0.8, 0.9, 1.0]) == pytest.approx([0.9 - 0.196 / math.sqrt(3), 1.0])
    assert results.interval([0.5]) == [0.0, 1.0]                     # one value says nothing


def test_the_paired_interval_is_that_of_the_differences():
    draw = random.Random(0)
    base = [draw.random() for _ in range(400)]
    run = [min(1.0, x + 0.1 * draw.random()) for x in base]
    change, low, high = results.paired(base, run)
    difference = np.subtract(run, base)
    error = difference.std(ddof=1) / 20
    assert change == pytest.approx(difference.mean())
    assert [low, high] == pytest.approx([change - 1.96 * error, change + 1.96 * error])
    means = [difference[[draw.randrange(400) for _ in range(400)]].mean() for _ in range(2000)]
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.25 * error)
    _, low_shuffled, high_shuffled = results.paired(base, draw.sample(run, 400))
    assert high_shuffled - low_shuffled > 5 * (high - low)
    # No difference in 400: it can still be as frequent as 1 - .05^(1/400).
    assert results.paired(base, base) == pytest.approx((0, -0.00746, 0.00746), abs=1e-5)


# ---------------------------------------------------------------- comparison

def test_the_table_pairs_by_question_and_shows_every_command(tmp_path, capsys):
    right = [[1], [0], [0], [1], [0], [0]]
    base = write_results(tmp_path / "base" / "gsm8k.jsonl", right, subsets="xxxyyy")
    shuffled = write_results(
        tmp_path / "run" / "g.jsonl", [[1], [1], [1], [0], [1]], command="c2", model="/n",
        queries=["q4", "q3", "q2", "q1", "q9"], subsets="yyxxx")
    results.compare(base, [shuffled])
    lines = capsys.readouterr().out.split("\n")
    # Common are q1 to q4: right at first 0, 0, 1, 0; later 0, 1, 1, 1: two turned right.
    assert lines[2].split()[:5] == ["gsm8k", "4", "25.00", "75.00", "50.00"]
    assert lines[3].split()[:5] == ["x", "2", "0.00", "50.00", "50.00"]
    assert lines[4].split()[:5] == ["y", "2", "50.00", "100.00", "50.00"]
    assert f"{base}: gsm8k: c1" in lines and f"{shuffled}: gsm8k: c2" in lines


def table(base, run) -> dict:
    """The rows of every measure that two paths both have."""
    base, run = results.read_results(base), results.read_results(run)
    return {label: list(results.rows(base[label], run[label])) for label in base if label in run}


def test_folders_are_compared_measure_by_measure(tmp_path, capsys):
    for side, flags in (("base", [[0], [1]]), ("run", [[1], [1]])):
        write_results(tmp_path / side / "gsm8k.jsonl", flags)
        (tmp_path / side / "metrics.jsonl").write_text('{"step": 1}\n')          # not a result file
    write_results(tmp_path / "run" / "math.jsonl", [[1, 0], [0, 0]], measure="math", samples=2)
    (row,) = table(tmp_path / "base", tmp_path / "run")["gsm8k"]
    assert row[:5] == (None, 2, 0.5, 1.0, 0.5)
    results.compare(str(tmp_path / "base"), [str(tmp_path / "run")])
    lines = capsys.readouterr().out.split("\n")
    assert lines[3] == "" and f"{tmp_path / 'run'}: math: c1" in lines      # 1 row, all commands
    write_results(tmp_path / "run" / "again.jsonl", [[1]])
    with pytest.raises(InputError, match="gsm8k is in .*again.jsonl already"):
        results.read_results(tmp_path / "run")


def test_win_rates_are_paired_by_their_baseline_and_judge(tmp_path):
    def verdicts(name, preferences, judge="j"):
        head = {"measure": "win-rate", "generator": name, "against": "b", "judge": judge}
        lines = [{"item": i, "query": f"q{i}", "preference": p, "orders": 2, "first": first,
                  "subset": None} for i, both in enumerate(preferences)
                 for first, p in zip("ab", both)]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in (head, *lines)))
        return tmp_path / f"{name}.jsonl"
    # Both orders are averaged; a failed one (None) or a missing one takes the item out.
    base = verdicts("one", [(1, 1), (1, 2), (2, 2), (2, None), (2,)])
    run = verdicts("two", [(2, 2), (2, 2), (1.5, 2), (2, 2), (2, 2)])
    (row,) = table(base, run)["win-rate against b, judge j"]
    assert row[:5] == (None, 3, 0.5, pytest.approx(2.75 / 3), pytest.approx(1.25 / 3))
    assert table(base, verdicts("three", [(2, 2)], judge="k")) == {}


@pytest.mark.parametrize("changes, message", [
    ({"max_new_tokens": 10}, "max_new_tokens 10, .* with 9: not comparable"),
    ({"samples": 2}, "samples 2"), ({"prompt": "other"}, "prompt 'other'")])
def test_what_was_measured_otherwise_is_not_compared(tmp_path, changes, message):
    base = write_results(tmp_path / "a.jsonl", [[1]])
    run = write_results(tmp_path / "b.jsonl", [[1]], **changes)
    with pytest.raises(InputError, match=message):
        results.compare(base, [run])


def test_nothing_in_common_and_nothing_there_is_said(tmp_path):
    base = write_results(tmp_path / "a.jsonl", [[1]])
    run = write_results(tmp_path / "b.jsonl", [[1]], queries=["another"])
    with pytest.raises(InputError, match="no question in common"):
        results.compare(base, [run])
    with pytest.raises(InputError, match="nowhere: no result files"):
        results.compare(base, ["nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no result files"):
        results.compare(base, [str(tmp_path / "empty")])
