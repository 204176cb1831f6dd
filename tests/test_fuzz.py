"""The short form of bench/fuzz.py: parsers on mutated strings, loaders on mutated files."""
import json
import math
import os
import sys
import time

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import fuzz  # noqa: E402


def test_parsers_take_any_string_and_give_a_value_or_a_reason():
    for name, row in fuzz.strings(3000, seed=3).items():
        assert row["failures"] == 0, (name, row["first_failures"])


def test_the_campaign_would_see_a_parser_that_raises(monkeypatch):
    monkeypatch.setitem(fuzz.PARSERS, "int", (int, lambda value: True))
    assert fuzz.strings(50, seed=3)["int"]["failures"] > 10


@pytest.mark.parametrize("name", list(fuzz.PARSERS))
def test_parsers_take_linear_time(name):
    def seconds(junk, size):
        text, best = fuzz.filled(junk, size), math.inf
        for _ in range(3):
            start = time.process_time()
            fuzz.PARSERS[name][0](text)
            best = min(best, time.process_time() - start)
        return best
    # Quadratic time would make it 64 times as long; the bound leaves room for a noisy machine.
    for junk in fuzz.JUNK:
        assert seconds(junk, 160_000) < 24 * max(seconds(junk, 20_000), 1e-3), junk


@pytest.mark.parametrize("name", list(fuzz.FILES))
def test_a_mutated_file_loads_or_is_refused_in_one_line(name):
    row = fuzz.loaders(name, 12 if name == "chat_template.jinja" else 40, seed=4)
    assert row["failures"] == 0, row["first_failures"]
    assert row["refused"] and (row["loaded"] or name == "chat_template.jinja")
    assert row["peak_mb"] < 512


@pytest.mark.parametrize("fault", [
    lambda: os.kill(os.getpid(), 9), lambda: time.sleep(60), lambda: bytearray(2**30),
    lambda: os.write(2, b"!"), lambda: 1 / 0])
def test_the_campaign_would_see_a_crash_a_hang_a_hunger_and_noise(monkeypatch, fault):
    calls = []

    def use(folder):
        calls.append(folder)
        if len(calls) == 3:                       # the sound file, one that was mutated, another
            fault()
    monkeypatch.setattr(fuzz, "SECONDS", 2)
    monkeypatch.setitem(fuzz.FILES, "config.json", (use, 1))
    row = fuzz.loaders("config.json", 2, seed=1)
    assert (row["loaded"], row["failures"]) == (1, 1)


def test_the_readmes_tables_are_the_stored_campaigns():
    report = json.loads((ROOT / "bench/results/fuzz.json").read_text())
    assert all(line in (ROOT / "docs/RESULTS.md").read_text() for line in fuzz.table(report))
    assert sum(row["files"] for row in report["files"].values()) == 9_700
    assert sum(row["strings"] for row in report["strings"].values()) >= 100_000
    rows = report["files"] | report["strings"]
    assert [name for name, row in rows.items() if row["failures"]] == ["tokenizer.json"]
    assert report["files"]["tokenizer.json"]["failures"] == 29      # known: docs/RESULTS.md
    assert all(row["ratio"] < 3 for row in report["linear"].values())
