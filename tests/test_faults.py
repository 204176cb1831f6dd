"""Runs that are killed, starved, corrupted or handed nonsense, and what they say about it."""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import random_llama, write_checkpoint
from conftest import ROOT

import rewards
import train
import train as players
from plumbing import cli, log, phases, runs
from plumbing.files import InputError
from plumbing.logprobs import log_probs
from plumbing.memory import MasterAdamW

spec = importlib.util.spec_from_file_location("campaign", ROOT / "bench/faults.py")
campaign = importlib.util.module_from_spec(spec)
spec.loader.exec_module(campaign)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    campaign.make_world(folder)
    return folder


@pytest.fixture
def play(world, monkeypatch):
    """train.py's main() with a short game's flags, in this process; runs lie in world/NAME."""
    monkeypatch.chdir(world)

    def main(*flags, game="grpo", steps=4):
        more = ["--steps", str(steps)] * ("--resume" not in flags)
        short = campaign.COMMON if more else []
        monkeypatch.setattr(sys, "argv", [
            "train.py", *short, *(campaign.GAMES[game] if more else []), *more, *flags])
        train.main()
    return main


def stopped(main, *flags, **options) -> cli.RunStopped:
    with pytest.raises(cli.RunStopped) as reason:
        main(*flags, **options)
    return reason.value


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def saved(out: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in runs.Run(out).checkpoints()]


# ---------------------------------------------------------------- the campaign, in short

@pytest.mark.beside(ROOT / "bench/faults.py", "--quick")
def test_four_kills_and_every_other_fault_leave_no_difference(finished):
    assert finished.returncode == 0, finished.stderr
    table = json.loads(finished.stdout.splitlines()[-1])["table"]
    assert len(table) == len(campaign.CAMPAIGN) and sum(row["trials"] for row in table[:2]) == 4
    assert all(row["recovered"] == row["trials"] and not row["differences"] for row in table)


def test_the_campaign_sees_a_changed_bit_a_missing_step_and_another_sample(play, world):
    play("--out", "seen")
    for name, change in {
            "checkpoint/state/masters.safetensors": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
            "metrics.jsonl": lambda b: b[b.index(b"\n") + 1:],
            "samples.jsonl": lambda b: b.replace(b"What is", b"What was", 1)}.items():
        shutil.copytree("seen", "other", symlinks=True)
        assert campaign.differences(world / "other", world / "seen") == []
        (world / "other" / name).write_bytes(change((world / "other" / name).read_bytes()))
        assert campaign.differences(world / "other", world / "seen")
        shutil.rmtree("other")


def test_the_readmes_table_is_the_stored_campaigns():
    stored = json.loads((ROOT / "bench/results/faults.json").read_text())["table"]
    text = (ROOT / "docs/RESULTS.md").read_text()
    assert [row["fault"] for row in stored] == list(campaign.CAMPAIGN)
    assert all(campaign.line(row) in text for row in stored)


# ---------------------------------------------------------------- resume: what is said, refused

def test_resuming_a_finished_run_does_nothing_and_more_steps_are_warned_of(play, world, capsys):
    play("--out", "done")
    before = campaign.left(world / "done")
    play("--resume", "done")
    assert campaign.left(world / "done") == before
    capsys.readouterr()
    play("--resume", "done", "--steps", "5", "--eval-every", "2", "--keep", "1")
    assert "resuming with --steps 5, was 4" in capsys.readouterr().out
    assert steps(world / "done") == [1, 2, 3, 4, 5]
    assert json.loads((world / "done/config.json").read_text())["steps"] == 5
    assert saved(world / "done") == [5]


@pytest.mark.parametrize("flags, message", [
    (["--resume", "kept", "--learning-rate", "0.5"], "--learning-rate 0.5 would change the run"),
    (["--resume", "kept", "--seed", "7"], "--seed 7 would change the run"),
    (["--resume", "kept", "--out", "x"], "--resume goes on in its own folder"),
    (["--resume", "kept", "--overwrite"], "give one of"), (["--requeue"], "--requeue needs --out"),
    (["--resume", "nowhere"], "nowhere/config.json: no such file"),
    (["--resume", "m"], "m/config.json: architectures is no setting"),
    (["--out", "kept"], "exists already"), (["--out", "strange", "--overwrite"], "exists already"),
    (["--out", "strange", "--requeue"], "exists already"),
])
def test_what_would_change_or_overwrite_a_run_is_refused_and_nothing_is_touched(
        play, world, flags, message):
    if not (world / "kept").exists():
        play("--out", "kept", steps=1)
        (world / "strange").mkdir()
        (world / "strange/thesis.tex").write_text("years of work")
    state = lambda: {p: p.stat().st_mtime_ns for p in world.rglob("*") if p.name != "lock"}
    before = state()
    with pytest.raises(InputError, match=message):
        play(*flags)
    assert state() == before


def test_overwrite_begins_anew_and_leaves_what_is_not_the_runs(play, world):
    play("--out", "again")
    (world / "again/notes.txt").write_text("mine")
    play("--out", "again", "--overwrite", "--seed", "1", steps=2)
    assert steps(world / "again") == [1, 2] and (world / "again/notes.txt").read_text() == "mine"
    assert saved(world / "again") == [2]


def test_a_second_run_in_a_folder_is_refused_until_the_first_process_is_gone(play, world):
    play("--out", "held", steps=1)
    command = [sys.executable, "-c", "import pathlib, time; from plumbing import runs; "
               "run = runs.Run(pathlib.Path('held')); print('locked', flush=True); time.sleep(60)"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=world,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match="held is in use by another process"):
            play("--resume", "held")
    finally:
        other.kill()
        other.wait()
    play("--resume", "held")


# ---------------------------------------------------------------- checkpoints

def test_only_the_newest_checkpoints_are_kept_and_zero_keeps_all(play, world):
    play("--out", "some", "--save-every", "1", "--keep", "2")
    play("--out", "all", "--save-every", "1", "--keep", "0")
    assert saved(world / "some") == [3, 4] and saved(world / "all") == [1, 2, 3, 4]
    assert str((world / "some/checkpoint").readlink()) == "checkpoint-000004"


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(play, world, capsys):
    play("--out", "hurt", "--save-every", "2")
    shutil.copytree("hurt", "untouched", symlinks=True)
    weights = world / "hurt/checkpoint-000004/model.safetensors"
    os.truncate(weights, 1000)
    assert "model.safetensors: bytes and crc32 are [1000, " in runs.damage(weights.parent)
    play("--resume", "hurt")
    said = capsys.readouterr().out
    assert "checkpoint-000004 is not whole (model.safetensors: bytes and" in said
    assert "resuming hurt after step 2" in said
    assert campaign.differences(world / "hurt", world / "untouched") == []
    for path in runs.Run(world / "hurt").checkpoints():
        (path / "manifest.json").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        play("--resume", "hurt")


def test_records_that_lost_lines_do_not_stop_the_run(play, world):
    play("--out", "torn", "--save-every", "2")
    shutil.copytree("torn", "mended", symlinks=True)
    shutil.rmtree("torn/checkpoint-000004")
    lines = (world / "torn/metrics.jsonl").read_bytes().splitlines(True)
    (world / "torn/metrics.jsonl").write_bytes(lines[0] + lines[1][:9])
    play("--resume", "torn")
    assert steps(world / "torn") == [1, 3, 4]
    assert campaign.differences(world / "torn", world / "mended") == ["metrics.jsonl"]


def test_too_little_free_disk_is_told_before_anything_is_written(play, world, monkeypatch):
    monkeypatch.setattr(runs, "free_bytes", lambda path: 1000)
    with pytest.raises(InputError, match=r"a checkpoint takes 0.00 GB, the disk has 0.00 GB free"):
        play("--out", "small")
    assert not (world / "small").exists()


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before(
        play, world, monkeypatch):
    write, calls = train.save_model, []

    def fills(model, folder):
        write(model, folder)
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "save_model", fills)
    reason = stopped(play, "--out", "small", "--save-every", "1")
    assert reason.code == 3 and "checkpoint-000002 could not be written: No space" in str(reason)
    assert "newest whole checkpoint: checkpoint-000001" in str(reason)
    assert not list((world / "small").glob("*.tmp"))
    assert runs.damage(world / "small/checkpoint-000001") is None


def test_a_rounded_policy_goes_on_from_its_fp32_masters_bit_for_bit(tmp_path):
    def step(llama, optimizer, seed):
        hidden = llama(torch.arange(12).view(2, 6) + seed)
        log_probs(llama, hidden[0], torch.arange(6)).sum().backward()
        optimizer.step(1e-3, 1.0)

    def fresh():
        llama = random_llama("untied", torch_dtype="bfloat16")
        return llama, MasterAdamW(llama, torch.bfloat16, weight_decay=0.1)
    llama, optimizer = fresh()
    for seed in range(3):
        step(llama, optimizer, seed)
    optimizer.save(tmp_path / "state")
    assert sorted(f.stem for f in (tmp_path / "state").iterdir()) == [
        "exp_avg", "exp_avg_sq", "masters"]
    other, again = fresh()
    again.load(tmp_path / "state", optimizer.updates)
    for pair in ((llama, optimizer), (other, again)):
        step(*pair, 5)
    assert optimizer.updates == again.updates == 4
    for ours, theirs in ((optimizer.masters, again.masters), (optimizer.params, again.params)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_a_checkpoint_is_as_large_on_disk_as_was_asked_for(play, world):
    play("--out", "size", steps=1)
    s, _ = train.resolve({"model": str(world / "size/checkpoint"), "device": "cpu"})
    asked = train.plan_of(s).checkpoint_bytes()
    held = sum(f.stat().st_size for f in (world / "size/checkpoint").rglob("*.safetensors"))
    assert asked <= held <= asked + 20_000                                    # headers


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_phase_saves_and_the_run_goes_on_from_there(
        play, world, monkeypatch, capfd, number):
    name = number.name
    if not (world / "calm").exists():
        play("--out", "calm", game="lsp")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    score, calls = rewards.RewardModel.__call__, []

    def interrupted(self, queries, *rest):
        calls.append(len(queries))
        if len(calls) == 4:                          # the 3rd step's; the 1st is the evaluation's
            os.kill(os.getpid(), number)
        return score(self, queries, *rest)
    monkeypatch.setattr(rewards.RewardModel, "__call__", interrupted)
    reason = stopped(play, "--out", f"cut-{name}", game="lsp")
    assert reason.code == 128 + number
    assert str(reason) == (f"{name}: stopped; newest whole checkpoint: checkpoint-000002; to go on:"
                           f" train.py --resume cut-{name}")
    said = f"{name}: finishing this phase, then saving (again: stop at once)"
    assert said in capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    play("--resume", f"cut-{name}")
    cut, calm = (campaign.left(world / run)["metrics.jsonl"] for run in (f"cut-{name}", "calm"))
    assert cut == calm


# ---------------------------------------------------------------- numbers that are not finite

def test_five_skipped_updates_in_a_row_stop_the_run_with_a_checkpoint(play, world, monkeypatch):
    nan = float("nan")
    bad = lambda queries, answers, golds: torch.tensor([1.0, *[nan] * (len(queries) - 1)])
    monkeypatch.setitem(rewards.CHECKS, "exact", bad)
    before = players.load_model(world / "m")
    reason = stopped(play, "--out", "nan", "--reward", "exact", steps=9)
    assert reason.code == 3 and "checkpoint-000005" in str(reason)
    assert ("5 updates in a row were skipped, the last one: reward of query 1, answer 2 not finite"
            in str(reason))
    after = players.load_model(world / "nan/checkpoint")
    assert all(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in
               zip(before.parameters(), after.parameters()))
    first = json.loads((world / "nan/metrics.jsonl").read_text().splitlines()[0])
    assert first["skipped"] and first["reward"] is first["loss"] is first["grad_norm"] is None
    monkeypatch.undo()
    os.chdir(world)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "nan"])
    train.main()
    assert steps(world / "nan") == list(range(1, 10))


def test_json_never_holds_nan():
    value = {"a": [1.0, float("nan"), {"b": float("-inf")}], "c": "NaN", "d": (2, None)}
    assert runs.plain(value) == {"a": [1.0, None, {"b": None}], "c": "NaN", "d": [2, None]}


@pytest.mark.parametrize("values", campaign.RUBBISH, ids=repr)
def test_a_reward_that_is_not_one_number_for_each_answer_stops_the_run_in_a_line(values):
    with pytest.raises(cli.RunStopped, match="must return 2 numbers, one for each answer") as e:
        rewards.as_rewards(values, 2)
    assert str(e.value).count("\n") == 0 and e.value.can_save


def test_numbers_that_are_not_finite_become_nan():
    R = rewards.as_rewards([1, float("-inf"), float("nan")], 3)
    assert R.dtype == torch.float32 and R[0] == 1 and R[1:].isnan().all()


def test_a_judge_whose_logits_are_nan_is_unparsed_and_counted(play, world, monkeypatch):
    write_checkpoint(world / "broken", "llama3_tied", max_position_embeddings=8192)
    load = players.load_model

    def spoilt(path, **options):
        llama = load(path, **options)
        if Path(path).name == "broken":
            llama.model.norm.weight.data.fill_(float("nan"))
        return llama
    monkeypatch.setattr(players, "load_model", spoilt)
    play("--out", "judged", "--judge", "broken", "--self-reward", "expected", game="lsp", steps=1)
    m = json.loads((world / "judged/metrics.jsonl").read_text())
    assert m["parse_failures"] == {"not_finite": 4} and m["unparsed"] == 1
    assert m["judge_mass"] is None
    assert m["quality"] == 0 and not m["skipped"]


# ---------------------------------------------------------------- out of memory

def test_out_of_memory_in_the_update_ends_the_run_and_it_goes_on_with_less(
        play, world, monkeypatch):
    accumulate = train.accumulate

    def tight(game, rows, weight, count):
        if game.settings.micro_batch_tokens > 1024:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return accumulate(game, rows, weight, count)
    monkeypatch.setattr(train, "accumulate", tight)
    reason = stopped(play, "--out", "tight", steps=1)
    assert reason.code == 3 and str(reason).startswith(
        "out of memory in phase update (lower --micro-batch-tokens or --answer-tokens): CUDA out")
    assert "checkpoint-000000" in str(reason)
    play("--resume", "tight", "--micro-batch-tokens", "1024")
    assert steps(world / "tight") == [1]


@pytest.mark.parametrize("name, error, switches", [
    ("challenge", RuntimeError("MPS backend out of memory"), "--batch-tokens or --query-tokens"),
    ("solve", MemoryError(), "--batch-tokens or --answer-tokens"),
    ("judge", RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     "--batch-tokens or --judge-tokens")])
def test_out_of_memory_names_its_phase_and_two_switches(name, error, switches):
    with pytest.raises(cli.RunStopped, match=rf"phase {name} \(lower {switches}\)"):
        with phases.Phases()(name):
            raise error
    with pytest.raises(RuntimeError, match="shape"):
        with phases.Phases()(name):
            raise RuntimeError("shape mismatch")


def test_a_skipped_update_is_told_on_the_steps_line():
    assert log.fault_text([{"query": 3, "answer": None, "what": "log-prob"}]) == (
        "log-prob of query 3 not finite")
