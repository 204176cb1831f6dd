"""README.md, the other pages and the exercises are true: every command runs, in its smallest form,
or is made of real flags; files, functions, tests, line counts and figures are real.

    python tests/test_readme.py            # brings line counts and the faults' table up to date
"""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent)]
from conftest import ROOT
from documents import (
    DOCUMENTS,
    EXERCISES,
    commands,
    folder_of,
    foreign,
    help_key,
    helps,
    run,
    script_of,
    why_not,
)

from plumbing import cli
from plumbing.settings import Settings

pytestmark = pytest.mark.usefixtures("few_held_out")

README, MANUAL, BENCH = (
    DOCUMENTS[name] for name in ("README.md", "docs/MANUAL.md", "docs/RESULTS.md"))
ALL = list(dict.fromkeys(c for text in (*DOCUMENTS.values(), *EXERCISES.values())
                         for c in commands(text) if not foreign(c)))
HERE = [c for c in ALL if not why_not(c)]
ELSEWHERE = [c for c in ALL if why_not(c)]

# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a fresh clone, in which one command after another is run."""
    folder = tmp_path_factory.mktemp("clone")
    folder_of(folder)
    return folder


@pytest.mark.parametrize("command", HERE)
def test_the_command_runs(place, monkeypatch, command):
    if ".png" in command:
        pytest.importorskip("matplotlib")                            # pictures alone need it
    monkeypatch.chdir(place)
    code, said = run(command)
    # The exercises are not solved in the repository: their grader says so, and exits with 1.
    wanted = [1] if re.search(r"course/exercises/grade\.py \d", command) else [0]
    assert code in wanted, said


def test_flags_of_commands_that_cannot_be_run_here_are_real():
    shown = helps(sorted({help_key(c) for c in ELSEWHERE} | {"train.py"}))
    shown["course/exercises/break_it.py"] += shown["train.py"]           # a fault's further flags
    for command in ELSEWHERE:
        for word in script_of(command)[1]:
            if word.startswith("--"):
                assert re.search(rf"{word}\b(?!-)", shown[help_key(command)]), command


@pytest.mark.parametrize("command", [c for c in ELSEWHERE if " train.py" in c])
def test_a_training_command_that_cannot_be_run_here_parses(command):
    parser = cli.Parser()
    cli.add_flags(parser, Settings, {})
    parser.parse_args(script_of(command)[1])


def test_each_fault_that_a_command_names_is_one():
    sys.path.append(str(ROOT / "course/exercises"))
    import break_it
    for command in ELSEWHERE:
        if "break_it.py" in command:
            known = [*break_it.FAULTS, *break_it.HOLE, "all", "table"]
            assert script_of(command)[1][0] in known, command


def test_most_commands_are_found_and_most_of_those_without_a_hub_run():
    assert len(ALL) > 50 and len(HERE) > 20
    assert {"python train.py", "python train.py --watch", "python train.py --algo lsp-zero",
            "python train.py --algo grpo --prompts easy"} <= set(HERE)
    assert "python -m pytest" in commands(README)
    assert "\npython -m pytest\n" in (ROOT / ".ci/run").read_text()


def test_the_worked_round_is_what_watch_prints(place, monkeypatch):
    command, block = re.search(r"    (python train.py --watch --queries.*)\n\n((?:    .*\n)+)",
                               README).groups()
    monkeypatch.chdir(place)
    printed = run(command)[1].split("\n")
    for line in block.split("\n"):
        assert line[4:].rstrip() in printed or line.strip() == "...", line


def test_the_memory_table_is_what_dry_run_prints(place, monkeypatch):
    table = re.search(r"    GB  +challenge.*\n(?:    .*\n)+", DOCUMENTS["docs/MANUAL.md"])[0]
    monkeypatch.chdir(place)
    printed = run("python train.py --model llama-3.2-3b --dry-run --gpu-memory 80")[1].split("\n")
    for line in table.rstrip().split("\n"):
        assert line[4:] in printed, line


# ---------------------------------------------------------------- files, names, counts

OTHERS = ("--model_outputs", "--shutdown-timeout")               # alpaca_eval's, torchrun's


def test_every_script_and_folder_is_in_the_readmes_tables():
    files = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    folders = set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE))
    assert files == {file.name for file in ROOT.glob("*.py")}
    assert folders | {"bench", "tests"} == {
        f.name for f in ROOT.iterdir() if f.is_dir() and any(f.glob("**/*.py")) or f.name in
        ("prompts", "docs")} - {"runs", ".venv"}


@pytest.mark.parametrize("name", [*DOCUMENTS, *EXERCISES])
def test_every_file_flag_function_and_test_that_is_named_exists(name):
    text = (DOCUMENTS | EXERCISES)[name]
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for test in re.findall(r"\b(test_\w+)\b(?!\.py)", text):
        assert f"def {test}(" in tests, test
    for file in re.findall(r"`((?:\w+/)*\w+\.(?:py|txt|png))`", text):
        assert any((ROOT / folder / file).exists() for folder in (".", "tiny")), file
    scripts = "".join(p.read_text() for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")))
    flags = {"--" + f.replace("_", "-") for f in Settings.__dataclass_fields__}
    for flag in re.findall(r"`(--[\w-]+)", text):
        assert flag in flags or f'"{flag}"' in scripts or flag in OTHERS, flag
    names = r"lsp|train|rewards|model|gradient|plumbing\.\w+|evals\.\w+"
    before = r"compare with\s" if name in EXERCISES else "`"
    for module, path in re.findall(rf"{before}({names})\.((?:[A-Z]\w+\.)?\w+)", text):
        if path != "py":
            place = importlib.import_module(module)
            for part in path.split("."):
                place = getattr(place, part)
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith("http")]
    for file, _, anchor in (t.partition("#") for t in targets):
        target = ROOT / Path(name).parent / file if file else ROOT / name
        assert target.exists(), file
        heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads]
        assert not anchor or anchor in anchors, anchor


def test_the_readme_is_a_tour_and_its_defaults_are_the_settings():
    assert README.count("\n") <= 200
    table = re.search(r"## Settings, and why(.*?)\n## ", README, re.DOTALL)[1]
    rows = [row.split(" | ") for row in table.split("\n") if row.startswith("| `")]
    for flags, defaults, *_ in rows:
        names = [f.replace("-", "_") for f in re.findall(r"`--([\w-]+)`", flags)]
        for name, said in zip(names, defaults.split(", ")):
            default = str(getattr(Settings(self_reward="generate"), name))
            assert said == default or said == "the starting model" and default == "None" or (
                float(said) == float(default)), name


# ---------------------------------------------------------------- figures

def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny_seeds():
    """The table that bench/tiny_seeds.py prints of the kept runs, and its means."""
    seeds = re.findall(r"bench/tiny_seeds.py --seeds ([\d ]+?)\s*#", BENCH)[0].split()
    command = [sys.executable, ROOT / "bench/tiny_seeds.py", "--print", "--seeds", *seeds]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return ([line for line in printed.split("\n") if line.startswith("|")],
            json.loads(printed.strip().split("\n")[-1])["means"])


def test_the_embedded_worlds_table_is_what_the_kept_runs_give(tiny_seeds):
    rows, means = tiny_seeds
    assert len(rows) == 16 and all(row in BENCH for row in rows)
    for line in re.findall(r"^\| (?:lsp|grpo)\S*.*\|$", MANUAL, re.MULTILINE):
        name, mean, carry, malformed = [cell.strip() for cell in line.strip("|").split("|")]
        name = name.split(" ")[0]
        cells = next(row for row in rows if row.startswith(f"| {name} |")).strip("|").split("|")
        seeds = [float(cell) for cell in cells[1:6]]
        assert mean == f"{means[name]['carry']:.3f}"
        assert carry == f"{min(seeds):.3f} to {max(seeds):.3f}"
        assert malformed == cells[7].strip()


def test_the_rlpt_table_is_what_the_kept_runs_give():
    sys.path.append(str(ROOT / "bench"))
    import tiny_rlpt_seeds
    kept = {f.name[:-5] for f in (ROOT / "bench/results/tiny-rlpt").iterdir()}
    names = [name for name in tiny_rlpt_seeds.RUNS if name in kept]
    rows = tiny_rlpt_seeds.table(names, range(1001, 1006), ROOT / "bench/results/tiny-rlpt")
    assert all(row in BENCH for row in rows), "\n".join(rows)


def test_what_is_said_about_the_embedded_world_follows_from_the_kept_runs(tiny_seeds):
    means = tiny_seeds[1]
    carry = {name: m["carry"] for name, m in means.items()}
    short = lambda x: f"{x:.3f}".lstrip("0")
    text = re.sub(r"\s+", " ", BENCH)
    for fragment in (
            f"LSP (mean {short(round(carry['lsp'], 4) + 1e-9)})",
            f"easy data ({short(carry['grpo-easy'])})",
            f"and {short(carry['grpo-balanced'] - carry['lsp'])} below GRPO",
            f"balanced data ({short(carry['grpo-balanced'])})",
            f"LSP adds {short(carry['grpo-easy-then-lsp'] - carry['grpo-easy'])} on average",
            f"more GRPO loses {short(carry['grpo-easy'] - carry['grpo-easy-then-grpo-easy'])[:4]}",
            f"easy-data GRPO loses {short(carry['lsp'] - carry['lsp-then-grpo-easy'])}",
            f"more LSP gains {short(carry['lsp-then-lsp'] - carry['lsp'])}"):
        assert fragment in text, fragment
    runs_of = lambda name: [ROOT / f"bench/results/tiny/{name}-{1000 + i}" for i in range(1, 6)]
    evals = [lines(f / "eval.jsonl") for f in runs_of("lsp")]
    lowest = min(e["accuracy"]["none"] for run in evals for e in run)
    distinct = min(m["distinct_queries"]
                   for f in runs_of("lsp") for m in lines(f / "metrics.jsonl"))
    assert f"{lowest:.2f}" == "0.11" and "as low as .11" in text and "as low as .11" in MANUAL
    assert distinct >= 0.75 and "(.75 or more in every step)" in text
    assert min(run[-1]["accuracy"]["none"] for run in evals) > 0.95
    worse = sum(lines(b / "eval.jsonl")[-1]["accuracy"]["carry"]
                < lines(a / "eval.jsonl")[-1]["accuracy"]["carry"]
                for a, b in zip(runs_of("lsp"), runs_of("lsp-then-grpo-easy")))
    assert worse == 5 and "(worse in 5 of 5)" in text
    still = [lines(f / "eval.jsonl")[-1] for f in runs_of("lsp-untrained-challenger")]
    below = [a["accuracy"]["carry"] < b[-1]["accuracy"]["carry"] for a, b in zip(still, evals)]
    assert all(below) and f"the mean is {short(carry['lsp-untrained-challenger'])}" in text
    own = [lines(f / "eval.jsonl")[-1]["challenger"]["malformed"]
           for f in runs_of("grpo-easy-then-lsp-own-judge")]
    assert sum(share > .9 for share in own) == 3 and "three of five seeds end at .97" in text
    hole = lines(ROOT / "bench/results/tiny/open-hole-1/eval.jsonl")[-1]
    assert (f"{hole['challenger']['malformed']:.3f}"[1:], f"{hole['accuracy']['carry']:.3f}"[1:],
            f"{hole['accuracy']['none']:.3f}"[1:]) == (".991", ".767", ".580")
    assert ".991 malformed queries" in text and "carry accuracy .767, no-carry .580" in text


def test_a_majority_strengthens_the_misconception_as_is_said():
    runs = [ROOT / f"bench/results/tiny/majority-{seed}" for seed in range(1001, 1006)]
    last = [lines(run / "eval.jsonl")[-1]["accuracy"] for run in runs]
    R = [[m["reward"] for m in lines(run / "metrics.jsonl")] for run in runs]
    between = lambda values, form: "-".join(
        f"{x:{form}}".removeprefix("0") for x in (min(values), max(values)))
    text = re.sub(r"\s+", " ", BENCH)
    assert f"from .016 to {between([a['carry'] for a in last], '.3f')} (" in text
    assert (f"R goes from {between([r[0] for r in R], '.2f')} in the first step to "
            f"{between([sum(r[-10:]) / 10 for r in R], '.2f')} in the last ten") in text
    assert f"ends at {between([a['none'] for a in last], '.2f')}." in text


def test_speed_and_soak_figures_are_the_stored_ones():
    rows = {}                            # of the AVX-512 machine, all runs of a workload together
    for file in ("sampler", "step"):
        for report in lines(ROOT / f"bench/results/{file}.jsonl"):
            for row in report.get("rows", []) if report["cpu"] == "AVX512" else []:
                all_runs = rows.setdefault((row["workload"], row["side"]), row)
                if all_runs is not row:
                    all_runs["seconds"] += row["seconds"]
                    all_runs["time_ratios"] = (all_runs.get("time_ratios", [])
                                               + row.get("time_ratios", []))
    for row in rows.values():
        row["median_seconds"] = median(row["seconds"])
        row["time_ratio"] = median(row["time_ratios"]) if row.get("time_ratios") else None
    table = re.findall(r"^\| (?:generate|update|the same|whole) .*", BENCH, re.MULTILINE)
    assert len(table) == 8
    peers = [row for row in rows.values() if row["side"] != "ours"]
    for line, peer in zip(table, peers):
        ours = rows[peer["workload"], "ours"]
        ratios = peer["time_ratios"]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"{ours['median_seconds']:.1f}"
        assert cells[2].endswith(f" {peer['median_seconds']:.1f}")
        spread = f"{peer['time_ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        assert cells[3] == spread and cells[4] == str(len(ratios)), spread
    times = {name: row["time_ratio"] for (name, side), row in rows.items() if side != "ours"}
    assert (f"needs {times['grpo 4 x 8, 64 + 96']:.2f} times our time for a GRPO step; "
            f"transformers' `generate` needs {times['4 x 8, 64 + 96']:.2f} times our time for "
            f"4 x 8 answers and {times['1 x 1, 64 + 48']:.2f} for one answer (") in README
    soak = json.loads((ROOT / "bench/results/soak.json").read_text())
    assert f"{soak['resident_mb_200']} MB resident after 200" in BENCH
    assert f"{soak['resident_mb_2000']} MB after 2,000" in BENCH
    assert [f"{x:.0f} ms" in BENCH for x in soak["cpu_ms_a_step"]] == [True, True]


def test_growth_figures_are_the_stored_ones():
    words = {"group": "G", "prompt_tokens": "prompt", "new_tokens": "completion",
             "vocabulary": "vocabulary"}
    for file, what in (("sampler", "sampling, 2 prompts"),
                       ("step", "update, 1 prompt, completions' logits")):
        (points,) = [report["points"] for report in lines(ROOT / f"bench/results/{file}.jsonl")
                     if "points" in report]
        for ours, theirs in zip(points[::2], points[1::2]):
            assert (ours["curve"], ours["value"]) == (theirs["curve"], theirs["value"])
            more = [p["peak"] - p["idle"] for p in (ours, theirs)]
            assert (f"| {what}: {words[ours['curve']]} {ours['value']:,} | {ours['seconds']:.1f} | "
                    f"{theirs['seconds']:.1f} | {more[0]:.2f} | {more[1]:.2f} |") in BENCH


def test_memory_and_scaling_figures_are_the_stored_ones():
    peak = {}
    for report in lines(ROOT / "bench/results/memory.jsonl"):
        peak |= {(row["workload"].split(",")[-1].strip(), row["side"]): row["memory"]["peak"]
                 for row in report["rows"]}
    for work, vocabulary in (("V 49152", "49,152"), ("V 128256", "128,256")):
        ours, theirs = peak[work, "ours"], peak[work, "transformers-full"]
        assert (f"| update, vocabulary {vocabulary} | {ours:.2f} | transformers, all logits "
                f"{theirs:.2f} | {ours / theirs:.2f} |") in BENCH
    ours, theirs = peak["64 + 96", "ours"], peak["64 + 96", "trl"]
    assert f"| {ours:.2f} | TRL {theirs:.2f} | {ours / theirs:.2f} |" in BENCH
    for report in lines(ROOT / "bench/results/scaling.jsonl"):
        for kind, row in report["rows"].items():
            assert (f"| {report['model']} | {kind} | {row['queries']} | {row['processes']} | "
                    f"{median(row['seconds']):.2f} | {row['speedup']:.2f} | "
                    f"{row['efficiency']:.2f} |") in DOCUMENTS["docs/MANUAL.md"]


def test_the_budget_beside_what_was_measured_is_the_stored_one():
    (report,) = lines(ROOT / "bench/results/budget.jsonl")
    found = report["generate"]
    for key, idle in (("estimate", found["idle_estimate"]), ("measured", found["idle"])):
        cells = [idle, *(phase[key] for phase in found["phases"].values())]
        assert " | ".join(f"{x:.3f}" for x in cells) in DOCUMENTS["docs/MANUAL.md"]


def test_what_stops_the_collapse_is_what_the_kept_runs_did():
    kept = {tuple(r["flags"][2:]): r for r in lines(ROOT / "bench/results/stop_the_collapse.jsonl")}
    found = {key: (round(r["challenger"]["malformed"], 2), round(r["accuracy"]["carry"], 2))
             for key, r in kept.items()}
    assert found == {("--alpha-ch", "0.05"): (0.98, 0.21), ("--alpha-ch", "0.003"): (0.20, 0.84),
                     ("--alpha-ch", "0"): (0.09, 0.85), ("--beta", "2"): (0.26, 0.41)}
    assert "not stopped by alpha_Ch .05; .003 stops it, as 0 does" in MANUAL
    exercise = (ROOT / "course/exercises/09_stop_the_collapse.py").read_text()
    assert "carry accuracy ends at .85" in exercise


def test_the_faults_table_and_what_is_said_about_it_are_the_kept_runs():
    sys.path.append(str(ROOT / "course/exercises"))
    import break_it
    for fault in break_it.FAULTS:
        assert break_it.row(fault, [1, 2, 3]) in BENCH, fault
    sound = [lines(break_it.KEPT / f"nothing-{seed}/eval.jsonl")[-1]["accuracy"]["carry"]
             for seed in (1, 2)]
    last = {}
    for folder in break_it.KEPT.iterdir():
        last.setdefault(folder.name[:-2], []).append(lines(folder / "eval.jsonl")[-1])
    every = lambda names, f: [f(e) for name in names.split() for e in last[name]]
    carry = lambda e: e["accuracy"]["carry"]
    malformed = lambda e: e["challenger"]["malformed"]
    assert max(every("rate-x-4", lambda e: e["accuracy"]["none"])) < 0.6
    assert max(every("rate-x-4 no-self-reward sign-trap", carry)) < 0.6
    assert min(every("no-self-reward sign-trap", malformed)) > 0.85
    assert max(every("top-k", carry)) < 0.8 and min(every("nothing", carry)) > 0.946
    assert min(every("no-kl bf16-weights no-stop-token", carry)) > 0.89
    assert all(0.85 < x < 0.95 for x in every("unscaled", carry))
    assert all(0.02 < x < 0.06 for x in every("r-zero spice absolute-zero", malformed))
    means = [f"{mean(every(name, carry)):.3f}"[1:] for name in (
        "r-zero", "spice", "absolute-zero", "nothing")]
    assert ("end at {}, {} and {} on average (LSP: {})".format(*means)) in BENCH
    one, two = (f"{x:.3f}"[1:] for x in sound)
    text = (ROOT / "course/exercises/10_own_reward.py").read_text()
    assert f"LSP's own reward {one} (and {two} at seed 2)" in text


if __name__ == "__main__":
    sys.path.append(str(ROOT / "course/exercises"))
    import break_it
    for name in break_it.FAULTS:
        BENCH = re.sub(rf"^\| {name} \|.*$", break_it.row(name, [1, 2, 3]), BENCH, flags=re.M)
    (ROOT / "docs/RESULTS.md").write_text(BENCH)
