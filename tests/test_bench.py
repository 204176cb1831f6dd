"""The benchmarks run in their smallest form, pair by pair; the slope finds what it looks for."""
import json
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))             # last: its memory.py must not hide the project's

import measure  # noqa: E402
import parity  # noqa: E402

from bench import gpu  # noqa: E402
from bench import memory as bench_memory  # noqa: E402
from plumbing.cli import run_script  # noqa: E402
from plumbing.files import InputError  # noqa: E402

SMALLEST = ["--shape", "tiny", "--threads", "1", "--pairs", "1", "--prompt-tokens", "5",
            "--new-tokens", "7"]
COMMANDS = {
    "sampler": ["--no-memory", "--only", "4 x 8"],
    "step": ["--no-memory", "--grpo-pairs", "1", "--vocabularies", "512"],
    "memory": ["--only", "slope sampler ours", "--vocabularies", "512", "--lengths", "4", "8"],
}


# In one process, so that the peers' libraries are imported once.
PROGRAM = """import json, runpy, sys
sys.path.insert(0, sys.argv[2])
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name='__main__')
    print('next:')
"""
COMMANDS = json.dumps([[str(ROOT / f"bench/{name}.py"), *SMALLEST, *flags]
                       for name, flags in COMMANDS.items()])


@pytest.mark.beside("-c", PROGRAM, COMMANDS, str(ROOT / "bench"))
def test_each_benchmark_runs_in_its_smallest_form(finished):
    assert finished.returncode == 0, finished.stderr
    printed = finished.stdout.split("next:\n")[:3]
    sampler, step, memory = (json.loads(text.strip().split("\n")[-1]) for text in printed)
    assert [row["workload"] for row in sampler["rows"]] == ["4 x 8, 5 + 7"] * 2 + [
        "4 x 8, 5 + 1..7"] * 2
    assert [row["side"] for row in step["rows"]] == [
        "ours", "transformers-full", "transformers-kept", "ours", "trl"]
    for row in sampler["rows"] + step["rows"]:
        assert row.get("skipped") == measure.missing(row["side"])     # else it has its figures
        assert "skipped" in row or row["tokens_per_second"] > 0
        assert "skipped" in row or row["side"] == "ours" or len(row["time_ratios"]) == 1
    assert [p["tokens"] for p in memory["slopes"][0]["points"]] == [64, 128]
    assert "skipped" in finished.stdout or finished.stdout.count("| trl ") == 1


def test_ratios_are_taken_pair_by_pair_and_a_missing_peer_is_named(monkeypatch):
    load, bounds = measure.Load("tiny"), {"read_gb_s": 1.0, "copy_gb_s": 1.0, "gflop_s": 1.0}
    times = {"ours": [(1.0, 0.5), (4.0, 0.5)], "transformers": [(3.0, 0.5), (4.0, 0.5)], "trl": []}
    present = {"transformers": True, "trl": None}
    monkeypatch.setattr(measure.importlib.util, "find_spec", present.get)
    memory = {"ours": {"idle": 1.0, "peak": 2.0}, "transformers": {"idle": 1.0, "peak": 4.0}}
    ours, peer, trl = measure.record("w", load, times, memory, bounds, tokens=10)
    assert peer["time_ratios"] == [3.0, 1.0] and peer["time_ratio"] == 2.0    # not 3.5 / 2.5
    assert peer["memory_ratio"] == 0.5 and ours["tokens_per_second"] == 4.0
    assert "trl is not installed" in trl["skipped"]
    assert "trl is not installed" in measure.table([ours, peer, trl])


@pytest.mark.parametrize("tensors", [0, 1, 3])
def test_the_slope_counts_fp32_tensors_of_tokens_by_vocabulary(monkeypatch, tensors):
    def grown(what, side, load):
        tokens = load.rows * load.new_tokens
        return {"idle": 1.0, "peak": 1.5 + tokens * (5000 + 4 * tensors * load.vocabulary) / 1e9}
    monkeypatch.setattr(measure, "in_child", grown)
    args = Namespace(only=["slope update ours"], vocabularies=[1000, 3000], lengths=[10, 20, 30])
    (result,) = bench_memory.slopes(args, measure.Load("tiny"))
    assert result["per_entry"] == pytest.approx(4 * tensors, abs=1e-6)
    assert result["bytes_per_token"][1000] == pytest.approx(5000 + 4000 * tensors)


@pytest.mark.parametrize("flags", [["--pairs", "0"], ["--out", "FILE/x"]])
def test_bad_flags_are_refused_before_anything_runs(tmp_path, flags):
    (tmp_path / "file").write_text("")
    flags = [flag.replace("FILE", str(tmp_path / "file")) for flag in flags]
    with pytest.raises(InputError, match=flags[0]):
        measure.start(measure.parser("", pairs=5).parse_args(flags))


# ---------------------------------------------------------------- bench/gpu.py

SMALL = ["gpu.py", "--shape", "tiny", "--layers", "1", "--device", "cpu", "--dtype", "bfloat16",
         "--query-tokens", "5", "--answer-tokens", "6", "--judge-tokens", "4", "--mean-tokens", "3",
         "--prompt-tokens", "9", "--new-tokens", "8", "--queries", "2", "--limits", "24"]


def rows_of_gpu(monkeypatch, tmp_path, *flags) -> dict[str, list[dict]]:
    """The rows that bench/gpu.py writes at a small shape, by section."""
    out, rows = tmp_path / "gpu.jsonl", {}
    monkeypatch.setattr(sys, "argv", [*SMALL, *flags, "--out", str(out)])
    gpu.main()
    for line in out.read_text().splitlines():
        row = json.loads(line)
        assert {"date", "torch", "device", "after_seconds"} <= set(row)
        rows.setdefault(row["section"], []).append(row)
    return rows


@pytest.mark.beside(str(ROOT / "bench/gpu.py"), *SMALL[1:])
def test_the_gpu_benchmark_runs_all_sections_on_a_small_shape(finished):
    assert finished.returncode == 0, finished.stderr
    rows = {}
    for row in map(json.loads, finished.stdout.splitlines()):
        rows.setdefault(row["section"], []).append(row)
    assert list(rows) == ["bounds", *gpu.SECTIONS]
    assert not any("failed" in row for section in rows.values() for row in section)
    found = {row["check"]: row for row in rows["parity"]}
    assert set(found) == {check.__name__ for check in parity.CHECKS}
    assert found["graph_is_eager"]["same_tokens"] == 16
    assert found["update_again_and_offloaded"]["offloaded"]["largest"] == 0
    assert rows["game"][0]["same_rewards"] == 8
    assert rows["game"][0]["largest_weight_difference"] == 0
    assert all(row["backends"] for row in rows["attention"])
    for row in rows["decode"]:
        assert row.get("skipped") == measure.missing(row["side"].split(",")[0])
    assert [(row["offload"], row["flops_share"] > 0) for row in rows["update"]] == [
        (False, True), (True, True)]
    assert rows["logp"][0]["tokens"] == 512 and 0 < rows["logp"][0]["mean"] < 0.02
    full, cut = rows["step"]
    assert full["tokens"] == {"challenge": 8 * 5, "solve": 64 * 6, "judge": 64 * 4}
    assert cut["tokens"]["solve"] < 64 * 6 and full["offload"] and not full["faults"]
    assert list(full["phase_seconds"]) == ["challenge", "solve", "reward", "judge", "reference",
                                           "update"]


def test_a_failure_in_any_section_of_the_gpu_benchmark_stops_no_other(
        monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise RuntimeError("planted")
    for name in ("step", "decode", "update", "logp", "attention"):
        monkeypatch.setattr(gpu, f"{name}_section", fail)
    monkeypatch.setattr(parity, "game_section", fail)
    monkeypatch.setattr(gpu, "random_llama", fail)                    # each check's model
    monkeypatch.setattr(gpu, "bounds", fail)
    rows = rows_of_gpu(monkeypatch, tmp_path)
    failed = {name: [row.get("failed") for row in section] for name, section in rows.items()}
    assert failed.pop("parity") == [None] + ["RuntimeError: planted"] * 5 + [None]
    assert failed == {name: ["RuntimeError: planted"] for name in ("bounds", *gpu.SECTIONS)
                      if name != "parity"}
    assert capsys.readouterr().err.count("Traceback") == 12


def test_a_step_that_takes_too_long_or_dies_is_a_row(monkeypatch, tmp_path):
    rows = rows_of_gpu(monkeypatch, tmp_path, "--only", "step", "--child-timeout", "0.01")
    assert rows["step"][0]["failed"] == "not done in 0.01 s"
    monkeypatch.setattr(gpu.sys, "executable", "false")
    rows = rows_of_gpu(monkeypatch, tmp_path, "--only", "step")
    assert rows["step"][1]["failed"] == "killed"


def test_the_gpu_benchmark_says_in_one_line_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        run_script(gpu.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1 and "no GPU" in err


def test_bounds_are_at_least_85_percent_of_the_data_sheet():
    slow = {"copy_gb_s": 1000.0, "tflop_s": 900.0}
    bound = gpu.raised(slow, "NVIDIA H100 80GB HBM3")
    assert bound["copy_gb_s"] == pytest.approx(0.85 * 3350) and bound["tflop_s"] == 900.0
    assert bound["measured"] == slow and gpu.raised(slow, "cpu")["copy_gb_s"] == 1000.0
    assert gpu.raised(slow, "NVIDIA L4")["sheet"] == gpu.SHEETS["L4"]
    assert gpu.raised(slow, "NVIDIA L40S")["sheet"] == gpu.SHEETS["L40S"]
