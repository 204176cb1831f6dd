"""One game on several processes: the same round, the same gradient, and all stop together."""
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import random_llama
from conftest import ROOT

import rewards
import train
import train as players
from plumbing import cli, log, ranks, runs
from plumbing.memory import MasterAdamW
from plumbing.settings import resolve

spec = importlib.util.spec_from_file_location("campaign", ROOT / "bench/faults.py")
campaign = importlib.util.module_from_spec(spec)
spec.loader.exec_module(campaign)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    campaign.make_world(folder)
    return folder


@pytest.fixture(autouse=True)
def here(world, monkeypatch):
    monkeypatch.chdir(world)


def on_ranks(W: int, main, said: Path) -> list[int]:
    """main(rank) on W processes that know of each other as torchrun's do; their exit codes.

    Forked, so that they need not import torch again.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lives = []
    for number in range(W):
        lives.append(os.fork())
        if lives[-1]:
            continue
        code = 1
        try:
            for fd in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            os.environ |= {"RANK": str(number), "WORLD_SIZE": str(W), "LOCAL_RANK": str(number),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            cli.run_script(partial(ranks.together, partial(main, number)))
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]) for life in lives]


def play(W: int, *flags, game="lsp", steps=4, common=campaign.COMMON,
         spoil=None) -> tuple[list[int], str]:
    """train.py on W processes; spoil(rank) may break things in each. Exit codes, and what they said
    on both streams."""
    said = Path("said.log")
    said.unlink(missing_ok=True)
    more = [*common, *campaign.GAMES[game], "--steps", str(steps), "--save-every", "2"]

    def main(number):
        sys.argv = ["train.py", *(more if "--resume" not in flags else []), *flags]
        if spoil:
            spoil(number)
        train.main()
    return on_ranks(W, main, said), said.read_text()


@pytest.fixture(scope="module")
def calm(world):
    """A game on two processes that nothing disturbs, as others are compared with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        codes, said = play(2, "--out", "calm", game="grpo")
    assert codes == [0, 0], said
    return campaign.left(world / "calm")


# ---------------------------------------------------------------- the same gradient

def gradient_of_a_round(queries: int) -> dict:
    """A round and its gradient before clipping and AdamW, and what is logged of both."""
    s, _ = resolve({"model": "m", "reward": "rm", "queries": queries, "answers": 3, "beta": 0.3,
                    "query_tokens": 5, "answer_tokens": 6, "judge_tokens": 2, "device": "cpu"})
    g = players.set_up(s)
    torch.manual_seed(0)
    for p in g.policy.parameters():                   # away from the reference: KL is not 0
        p.data += 0.02 * torch.randn(p.shape)
    optimizer, taken = MasterAdamW(g.policy, torch.float32, weight_decay=0.0), []

    def step(rate, clip):
        ranks.add_up(optimizer.params)
        taken.append(torch.cat([p.grad.flatten() for p in optimizer.params]))
        return taken[0].norm().item()
    optimizer.step = step
    r = train.play(g, 0)
    metrics = train.update(g, optimizer, r, 0)
    return {"gradient": taken[0], "metrics": metrics | log.measure(s, r),
            "samples": list(log.samples(r, 1))}


def gradients(W: int, cases: list[int], spoil=lambda: None) -> list[dict]:
    def main(number):
        spoil()
        found = [gradient_of_a_round(queries) for queries in cases]
        assert all(torch.equal(ours["gradient"], theirs["gradient"])
                   for other in ranks.exchange(found) for ours, theirs in zip(found, other))
        if number == 0:
            torch.save(found, "found.pt")
    said = Path("said.log")
    assert on_ranks(W, main, said) == [0] * W, said.read_text()
    return torch.load("found.pt", weights_only=False)


def far(ours: dict, alone: dict) -> float:
    """Relative error of the gradient."""
    return ((ours["gradient"] - alone["gradient"]).norm() / alone["gradient"].norm()).item()


accumulate = train.accumulate


def own_count(game, rows, weight, count):
    return accumulate(game, rows, weight)


def average(params):
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
        p.grad /= ranks.world()


def test_two_or_three_ranks_play_the_same_round_and_find_the_gradient_of_one():
    cases = [3, 5]                    # 5 are uneven
    alone = [gradient_of_a_round(queries) for queries in cases]
    assert all(a["metrics"]["kl_challenger"] > 1e-4 and a["metrics"]["grad_norm"] > 1e-3
               for a in alone)
    for W in (2, 3):
        for ours, theirs in zip(gradients(W, cases), alone):
            assert far(ours, theirs) < 1e-5
            for a, b in zip(ours["samples"], theirs["samples"]):
                assert a["query"] == b["query"]
                assert [x["answer"] for x in a["answers"]] == [x["answer"] for x in b["answers"]]
            assert ours["metrics"].keys() == theirs["metrics"].keys()
            for key, value in theirs["metrics"].items():
                if isinstance(value, float):
                    assert ours["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
                else:
                    assert ours["metrics"][key] == value, key


@pytest.mark.parametrize("name, broken", [("add_up", average), ("accumulate", own_count)])
def test_that_comparison_sees_an_average_in_place_of_a_sum_and_each_ranks_own_count(name, broken):
    def spoil():
        setattr(ranks if name == "add_up" else train, name, broken)
    (ours,) = gradients(2, [5], spoil)
    assert far(ours, gradient_of_a_round(5)) > 0.1


def test_a_rank_without_rows_adds_zeros_to_a_rounded_policys_fp32_gradient():
    def main(number):
        llama = random_llama("untied")
        optimizer = MasterAdamW(llama, torch.bfloat16, weight_decay=0.0)
        if number != 1:
            (llama.model.norm.weight * (1 + number * 2.0**-8)).sum().backward()
        ranks.add_up(optimizer.params)
        # 2 + 2^-7, which bf16 would round to 2
        assert all(p.grad.dtype == torch.float32 for p in optimizer.params)
        assert torch.all(llama.model.norm.weight.grad == 2 + 2.0**-7)
        assert torch.all(llama.model.embed_tokens.weight.grad == 0)
    said = Path("said.log")
    assert on_ranks(3, main, said) == [0] * 3, said.read_text()


@pytest.mark.parametrize("W", [1, 2, 3, 7])
def test_the_slices_are_neighbours_and_together_the_whole(monkeypatch, W):
    monkeypatch.setattr(ranks, "world", lambda: W)
    for count in (0, 1, 2, 23):
        found, each = [], []
        for number in range(W):
            monkeypatch.setattr(ranks, "rank", lambda number=number: number)
            found.append(list(range(count))[ranks.slice_of(count)])
            each.append(list(range(3 * count))[ranks.slice_of(count, 3)])
        assert sum(found, []) == list(range(count)) and sum(each, []) == list(range(3 * count))
        assert max(map(len, found)) - min(map(len, found)) <= 1
        assert all(len(many) == 3 * len(few) for few, many in zip(found, each))


def test_more_processes_than_queries_are_refused():
    codes, said = play(3, "--out", "few", "--queries", "2")
    assert codes == [2] * 3 and "3 processes and 2 queries a step" in said


# ---------------------------------------------------------------- whole runs

def metrics(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_three_ranks_is_that_of_one_and_each_can_go_on_with_the_other(world):
    codes, _ = play(1, "--out", "one", "--queries", "3")
    assert codes == [0]
    codes, said = play(3, "--out", "three", "--queries", "3")
    assert codes == [0] * 3 and said.count("\n      4/4  ") == 1 and "Traceback" not in said
    for one, three in zip(metrics("one"), metrics("three")):
        assert one.keys() == three.keys()
        for key in ("reward", "quality", "kl_solver", "grad_norm", "answer_length", "unparsed"):
            assert three[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key
    assert sorted(p.name for p in Path("three").iterdir()) == sorted(
        p.name for p in Path("one").iterdir())
    assert all(runs.damage(p) is None for p in Path("three").glob("checkpoint-*"))
    for out, W in (("one", 2), ("three", 1)):
        whole = metrics(out)
        shutil.rmtree(f"{out}/checkpoint-000004")
        codes, said = play(W, "--resume", out)
        assert codes == [0] * W and f"resuming {out} after step 2" in said
        assert f"resuming with ranks {W}, was" in said and "not the same bit for bit" in said
        assert [m["step"] for m in metrics(out)] == [1, 2, 3, 4]
        assert metrics(out)[3]["grad_norm"] == pytest.approx(whole[3]["grad_norm"], rel=1e-3)


def test_watch_and_bad_flags_speak_once():
    codes, said = play(2, "--watch", common=campaign.COMMON[:-4])         # no evaluation
    assert codes == [0, 0] and said.count("query 1/2") == 1
    codes, said = play(2, "--beta", "-1")
    assert codes == [2, 2] and said.count("\n") == 1 and "--beta must be" in said


# ---------------------------------------------------------------- all stop together

def at_step(module, name, when: int, what):
    """The when-th call of module.name from now on does what() first."""
    original, calls = getattr(module, name), []

    def spoilt(*args, **options):
        calls.append(1)
        if len(calls) == when:
            what()
        return original(*args, **options)
    setattr(module, name, spoilt)


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("phase, module, name, call", [
    ("reward", rewards, "last_hidden", 4),                 # the 3rd step's; 1st: evaluation
    ("update", train, "accumulate", 5)])                   # two a step: the 3rd step's
def test_a_rank_without_memory_stops_all_with_a_checkpoint_of_the_last_whole_step(
        phase, module, name, call):
    codes, said = play(2, "--out", phase, game="grpo", spoil=lambda number: number and at_step(
        module, name, call, no_memory))
    assert codes == [3, 3] and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"train.py: rank 1: out of memory in phase {phase}")
    assert "newest whole checkpoint: checkpoint-000002" in said
    assert runs.damage(Path(phase, "checkpoint-000002")) is None


def test_a_disk_that_is_full_stops_all_whether_a_line_or_a_checkpoint_could_not_be_written():
    def no_room():
        raise OSError(28, "No space left on device")
    def no_line():
        Path("no-line/samples.jsonl").mkdir()
    for out, spoil, reason in (
            ("no-room", (train, "save_model", 2, no_room), "No space left on device"),
            ("no-line", (train, "learning_rate", 1, no_line), "Is a directory")):
        codes, said = play(2, "--out", out, game="grpo", spoil=lambda number, spoil=spoil: (
            number == 0 and at_step(*spoil)))
        assert codes == [3, 3] and "Traceback" not in said, said
        assert f"could not be written: {reason}" in said.splitlines()[-1]


def test_a_signal_to_one_rank_ends_the_phase_and_saves(calm):
    codes, said = play(2, "--out", "signal", game="grpo", spoil=lambda number: number and at_step(
        rewards, "last_hidden", 4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert codes == [143, 143] and "Traceback" not in said
    assert "rank 1: SIGTERM: stopped; newest whole checkpoint: checkpoint-00000" in said
    assert play(2, "--resume", "signal")[0] == [0, 0]
    left = campaign.left(Path("signal"))
    for name in ("metrics.jsonl", "checkpoint-000004/model.safetensors"):
        assert left[name] == calm[name]


def test_a_number_that_is_not_finite_on_one_rank_skips_the_step_on_all_and_is_named():
    nan = float("nan")

    def spoil(number):
        original = train.accumulate

        def spoilt(game, rows, weight, count=None):
            sums = original(game, rows, weight, count)
            if ranks.rank() == 1 and rows:
                next(game.policy.parameters()).grad[0, 0] = nan
            return sums
        train.accumulate = spoilt
    codes, said = play(2, "--out", "nan", game="grpo", steps=1, spoil=spoil)
    assert codes == [0, 0], said
    (m,) = metrics("nan")
    assert m["skipped"] and m["faults"][0]["what"] == "gradient of all samples together"


# ---------------------------------------------------------------- kills

@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_at_once_with_a_whole_checkpoint(dead):
    out = f"dead-{dead}"

    def die():
        Path(f"{out}.died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    codes, said = play(2, "--out", out, game="grpo", spoil=lambda number: (
        number == dead and at_step(train, "learning_rate", 3, die)))
    seconds = time.time() - Path(f"{out}.died").stat().st_mtime
    assert codes == ([-9, 3] if dead == 0 else [3, -9]) and "Traceback" not in said
    assert seconds < 10, "of which this machine's load is most"
    assert dead == 0 or said.splitlines()[-1].startswith("train.py: another rank has ended")
    assert [p.name for p in Path(out).glob("checkpoint-*")] == ["checkpoint-000002"]
    assert runs.damage(Path(out, "checkpoint-000002")) is None


LIVES = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
from plumbing import cli, ranks
life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
rate, save = train.learning_rate, train.save_model

def die():
    with open("deaths.log", "a") as file:
        print(f"life {life} rank {rank}", file=file)
    os.kill(os.getpid(), signal.SIGKILL)

def in_a_step(s, step):
    return die() if (life, rank, step) == (0, 1, 2) else rate(s, step)

def in_a_save(policy, folder):
    save(policy, folder)
    if (life, rank) == (1, 0):
        die()

train.learning_rate, train.save_model = in_a_step, in_a_save
cli.run_script(lambda: ranks.together(train.main))
"""


def test_torchrun_restarts_a_run_whose_ranks_are_killed_in_a_step_and_in_a_save(calm):
    Path("lives.py").write_text(LIVES)
    command = [*campaign.COMMON, *campaign.GAMES["grpo"], "--steps", "4", "--save-every", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts",
         "2", "--standalone", "lives.py", ROOT, *command, "--out", "killed", "--requeue"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert Path("deaths.log").read_text() == "life 0 rank 1\nlife 1 rank 0\n"
    assert result.stdout.count("resuming killed after step 2") == 2
    assert campaign.left(Path("killed")) == calm
