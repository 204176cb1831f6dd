"""COURSE.md: its times add up, and what it expects of a run is what the kept runs did."""
import json
import re

from conftest import ROOT

COURSE = (ROOT / "course/COURSE.md").read_text()
FLAT = re.sub(r"\s+", " ", COURSE)


def evals(name):
    return [[json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted((ROOT / "bench/results/tiny").glob(f"{name}-100?/eval.jsonl"))]


def test_the_minutes_of_each_table_add_up_to_its_hours():
    tables = re.findall(r"\| minutes \|.*?\n\n", COURSE, re.DOTALL)
    sums = [sum(map(int, re.findall(r"^\| (\d+) \|", table, re.MULTILINE))) for table in tables]
    assert sums == [90, 90, 120] and "90-minute lecture and a two-hour lab" in COURSE
    assert len(COURSE.split("\n")) <= 150


def test_the_homework_takes_as_long_as_its_exercises_say():
    numbers, minutes = re.search(r"exercises ([\d, ]+) \((\d+) minutes\)", FLAT).groups()
    folder = ROOT / "course/exercises"
    files = [next(folder.glob(f"{int(n):02}_*.py")) for n in numbers.split(", ")]
    said = [int(re.search(r"Exercise \d+, (\d+) minutes", f.read_text())[1]) for f in files]
    assert sum(said) == int(minutes)


def test_the_curves_that_lectures_expect_are_those_of_the_kept_runs():
    lsp, zero = evals("lsp"), evals("lsp-zero")
    assert len(lsp) == len(zero) == 5
    last = lambda runs, kind, key: [run[-1][kind][key] for run in runs]
    between = lambda values: (f"{min(values):.2f}"[1:], f"{max(values):.2f}"[1:])
    assert between(last(lsp, "accuracy", "carry")) == (".93", ".97") and ".93 to .97 (.02" in FLAT
    assert between(last(zero, "accuracy", "carry")) == (".29", ".75") and ".29 to .75" in FLAT
    assert max(last(lsp, "challenger", "malformed")) < 0.04 and "| below .04 |" in FLAT
    assert min(last(zero, "challenger", "malformed")) > 0.96 and "| above .96 |" in FLAT
    assert min(last(lsp, "accuracy", "none")) > 0.95 and "returns to .95 or more" in FLAT
    dips = [min(e["accuracy"]["none"] for e in run) for run in lsp]
    assert [f"{dip:.2f}" for dip in dips if dip < 0.36] == ["0.11"] and "(to .11 in one" in FLAT
    balanced = min(e["accuracy"]["none"] for run in evals("grpo-balanced") for e in run)
    assert f"{balanced:.2f}" == "0.82" and "it falls to .82 in one seed" in FLAT
    sound = [json.loads(f.read_text().splitlines()[-1])["challenger"]["malformed"]
             for f in (ROOT / "bench/results/break_it").glob("nothing-?/eval.jsonl")]
    assert max(sound) == 0.036 and "malformed fraction reaches .036 in seeds 1 to 3" in FLAT
    assert all(e["challenger"]["malformed"] > 0.5 for run in zero for e in run if e["step"] >= 30)


def test_the_start_answers_carries_rightly_now_and_then():
    """The figures are those that tiny/build.py printed, kept in docs/RESULTS.md."""
    bench = (ROOT / "docs/RESULTS.md").read_text()
    assert "at temperature 1 .964, .255, .185, .023" in bench and "1, 2 to 26 %" in FLAT


def test_the_exercises_that_the_lab_grades_exist_and_fit_its_time():
    files = [next((ROOT / "course/exercises").glob(f"{n:02}_*.py")) for n in (2, 3, 5)]
    minutes = [int(re.search(r", (\d+) minutes", f.read_text())[1]) for f in files]
    slot = int(re.search(r"\| (\d+) \| exercises 2, 3 and 5", COURSE)[1])
    assert sum(minutes) <= slot + 10
