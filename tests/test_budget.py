"""The budget: hand-worked sizes, what fits and what would make it, dry runs from config.json alone,
measured peaks, work counted against PyTorch's own counter."""
import dataclasses
import gc
import importlib.util
import json
import re
import sys
from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
from checkpoints import CONFIGS, write_checkpoint
from conftest import ROOT
from huggingface_hub import errors
from torch.profiler import ProfilerActivity, profile

import train
from model import read_config
from plumbing import budget, cli, files, log, logprobs, phases
from plumbing.files import InputError, read_json
from plumbing.settings import resolve

sys.path.append(str(ROOT / "bench"))             # last: its budget.py must not hide the project's

import measure  # noqa: E402

spec = importlib.util.spec_from_file_location("bench_budget", ROOT / "bench/budget.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

GB = 1e9
WORK = ("cache", "activations")                  # what depends on the batch sizes
PLANS = {}                                       # by model


def dry(**given):
    """Settings of a dry run on an imagined GPU, with sizes chosen, and their plan. The 1B model has
    four layers here: 0.506e9 weights."""
    given = {"model": "llama-3.2-1b", "dry_run": True, "gpu_memory": 80.0} | given
    s, preset = resolve(given)
    models = {role: read_config(path) for role, path in
              train.model_paths(s, weights=False).items()}
    if s.model == "llama-3.2-1b":
        models = {role: dataclasses.replace(c, num_hidden_layers=4) for role, c in models.items()}
    plan = PLANS.setdefault(s.model, budget.Plan(s, models, train.MEASURED))    # measured once
    plan.memory = s.gpu_memory * GB - budget.CUDA
    return plan.sized(s, preset | given), plan


def peak(parts: dict) -> float:
    return sum(parts.values()) / GB


# ---------------------------------------------------------------- sizes, worked by hand

def test_llama_3_2_3b_takes_what_was_worked_out_by_hand():
    """3.2127e9 weights, 28 layers of 8 key heads of 128: 114,688 bytes of cache a token."""
    s, plan = dry(model="llama-3.2-3b", batch_tokens=65536, micro_batch_tokens=8192)
    assert plan.count == 3_212_749_824
    found = plan.phases(s)
    assert list(found) == ["challenge", "solve", "reward", "judge", "reference", "update"]
    static = {part: size / GB for part, size in found["update"].items() if part not in WORK}
    assert static["masters"] + static["moments"] == pytest.approx(38.6, abs=.06)
    assert static["gradients"] == pytest.approx(12.9, abs=.06)
    for role in ("policy", "reference", "reward model"):
        assert static[role] == pytest.approx(6.4, abs=.03)
    assert plan.exact(s) / GB == pytest.approx(sum(static.values())) == pytest.approx(70.7, abs=.05)
    # Sampling needs no gradients: they begin with the update.
    assert "gradients" not in found["solve"]
    # 64 rows of 40 + 256 + 512 tokens; of the judge's rows 65,536 tokens hold 44.
    assert found["solve"]["cache"] == 64 * 808 * 114_688
    length = plan.text["judge"] + 256 + 512
    assert found["judge"]["cache"] == 44 * (length + 256) * 114_688
    # The update: log-probs of 2^26 logits, in bf16 and in fp32, and their bf16 gradient (0.5 GB); a
    # bf16 gradient of the head (0.8); a block's input for 8,192 tokens and 28 layers (1.4).
    assert 1.4 < found["update"]["activations"] / GB < 4
    assert 72 < peak(found["update"]) < 75.7 and plan.advice(s) == "fits"


def test_of_an_offloaded_run_only_the_working_model_is_on_the_gpu():
    s, plan = dry(gpu_memory=16.0, offload=True)
    there = {name: [part for part in parts if part not in WORK]
             for name, parts in plan.phases(s).items()}
    assert there == {"challenge": ["policy"], "solve": ["policy"], "reward": ["reward model"],
                     "judge": ["reference"], "reference": ["reference"],
                     "update": ["policy", "gradients"]}
    host = plan.host(s)
    assert sum(host.values()) == pytest.approx((4 + 8 + 2 + 2) * 0.506e9, rel=1e-3)


def test_without_bf16_the_policy_is_its_own_master():
    s, _ = resolve({"model": "llama-3.2-1b", "dry_run": True, "device": "cpu"})
    plan = train.plan_of(s)
    parts, bytes_each = plan.static(s, "policy"), 4 * plan.count
    assert "masters" not in parts and parts["policy"] == bytes_each
    # Three models, two moments and the gradients; a reward model has one row more.
    assert plan.exact(s) == pytest.approx(6 * bytes_each, rel=1e-6)


def test_bytes_are_counted_while_a_storage_lives_and_views_cost_nothing():
    """Live against sums that are done by hand."""
    with torch.device("meta"):
        model = torch.nn.Linear(256, 256, bias=False)
    with budget.Live(model) as live:
        x = torch.empty(4, 256, device="meta")               # 4 KB
        y = model(x)                                          # 4 KB
        z = y.view(2, 2, 256)[0]
        w = model.weight.t() + 0                              # 256 KB; the weight itself is known
        del w
        assert live.now == 8192 and live.peak == 8192 + 256 * 256 * 4 and z is not None
        del x, y, z
    assert live.now == 0


def test_models_in_two_roles_count_once_and_another_judge_counts(tmp_path):
    write_checkpoint(tmp_path / "m", "untied")
    write_checkpoint(tmp_path / "j", "head_dim")
    m, j = str(tmp_path / "m"), str(tmp_path / "j")
    roles = lambda **given: list(train.model_paths(resolve(
        {"model": m, "reward": m, "device": "cpu"} | given)[0]))
    assert roles() == roles(judge=m) == ["policy", "reference", "reward model"]
    assert roles(judge=j) == ["policy", "reference", "judge", "reward model"]
    assert roles(judge=j, beta=0.0) == ["policy", "judge", "reward model"]
    assert roles(judge=j, reference=j) == ["policy", "reference", "reward model"]
    assert roles(reward="tiny", beta=0.0, algo="lsp-zero") == ["policy"]
    s, _ = resolve({"model": m, "reward": m, "judge": j, "device": "cpu"})
    assert "\njudge " in train.plan_of(s).table(s)


# ---------------------------------------------------------------- against tensors that were made

class Weighed(phases.Phases):
    """Phases whose peak is that of the bytes that PyTorch's CPU allocator gave out: exact."""

    @contextmanager
    def __call__(self, name, model=None):
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            with super().__call__(name, model):
                yield
        events = sorted((e.start_ns(), e.nbytes())
                        for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
        self.peak_gb[name] = max(accumulate(size for _, size in events)) / GB


SHAPE = {"vocab_size": 3000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


@pytest.mark.parametrize("changes, chunk", [
    ({}, 2**24), ({"checkpointing": True, "self_reward": "expected"}, 2**17)])
def test_every_phases_estimate_is_within_15_percent_of_the_bytes_it_took(
        monkeypatch, changes, chunk):
    monkeypatch.setattr(bench, "CHALLENGER", 60)
    monkeypatch.setattr(bench, "RUBRIC", 50)
    monkeypatch.setitem(measure.SHAPES, "small", SHAPE)
    monkeypatch.setitem(logprobs.LOGITS_PER_CHUNK, "cpu", chunk)
    game, optimizer = bench.set_up(measure.Load("small"), bench.GAME | {
        "queries": 4, "answers": 3, "query_tokens": 48, "answer_tokens": 64, "judge_tokens": 4,
        "micro_batch_tokens": 256} | changes)
    game.phase = Weighed()
    r = train.play(game, 0)
    train.update(game, optimizer, r, 0)
    for name, parts in bench.estimates(game).items():
        work = sum(parts.get(part, 0) for part in bench.WORK)
        assert 0.85 < work / GB / game.phase.peak_gb[name] < 1.15, name


# ---------------------------------------------------------------- what fits

@pytest.mark.parametrize("memory, given, wanted", [
    (40, {}, "fits"), (9, {}, "--offload would make it fit"), (9, {"offload": True}, "fits"),
    (4, {}, "and with --checkpointing --offload"),
    (16, {"checkpointing": False, "micro_batch_tokens": 8192}, "--micro-batch"),
])
def test_the_first_switch_that_makes_it_fit_is_named_and_does(memory, given, wanted):
    s, plan = dry(gpu_memory=float(memory), **given)
    said = plan.advice(s)
    assert wanted in said
    flags = re.findall(r"--([a-z-]+)(?: (\d+))?", said) if "would make it fit" in said else []
    changes = {key.replace("-", "_"): int(value) if value else True for key, value in flags}
    if "and with" not in said:
        tried = dataclasses.replace(s, **changes)
        assert not plan.missing(tried)
        assert not changes or plan.missing(s)


def test_the_largest_powers_of_two_that_fit_are_chosen():
    s, plan = dry(gpu_memory=14.0, queries=64)
    chosen, most = (s.batch_tokens, s.micro_batch_tokens), (2**18, 2**13)
    assert not plan.missing(s) and all(size & (size - 1) == 0 for size in chosen)
    for key, size, limit in zip(("batch_tokens", "micro_batch_tokens"), chosen, most):
        assert size == limit or plan.missing(dataclasses.replace(s, **{key: 2 * size}))
    assert chosen != most
    kept, _ = dry(gpu_memory=14.0, queries=64, batch_tokens=5000, micro_batch_tokens=300)
    assert (kept.batch_tokens, kept.micro_batch_tokens) == (5000, 300)


def test_held_out_prompts_may_fill_the_sampler_and_are_counted():
    """An evaluation takes all that it is given."""
    s, plan = dry(eval_prompts="many.jsonl", batch_tokens=2**15)
    cache = plan.phases(s)["eval"]["cache"]
    assert cache > .97 * 2**15 * 8192             # 4 layers of 8 key heads of 64, in bf16


def test_a_cpu_keeps_the_defaults_and_a_gpu_that_cannot_hold_the_weights_is_refused(
        tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m", "untied")
    given = {"model": str(tmp_path / "m"), "reward": str(tmp_path / "m")}
    s, _ = resolve(given | {"device": "cpu"})
    s = train.plan_of(s).sized(s, ())
    assert (s.batch_tokens, s.micro_batch_tokens) == (65536, 2048)
    with pytest.raises(InputError, match="--gpu-memory is not used here: it needs a GPU"):
        resolve(given | {"device": "cpu", "gpu_memory": 8.0})
    cuda = (torch.device("cuda"), torch.bfloat16)
    for module in ("plumbing.budget", "plumbing.settings"):
        monkeypatch.setattr(sys.modules[module], "pick_device", lambda name: cuda)
    s, _ = resolve(given | {"gpu_memory": 8.0})
    s = train.plan_of(s).sized(s, ())
    assert (s.batch_tokens, s.micro_batch_tokens) == (2**18, 2**13)
    s, _ = resolve(given | {"gpu_memory": 1e-5})
    with pytest.raises(InputError, match=r"GB \(--gpu-memory 1e-05 less .*: does not fit"):
        train.plan_of(s).sized(s, ())


# ---------------------------------------------------------------- dry runs

def script(monkeypatch, capsys, *flags) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as end:
        cli.run_script(train.main)
    return end.value.code, *capsys.readouterr()


def test_a_dry_run_reads_config_json_alone_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "m").mkdir()
    shape = read_json(ROOT / "plumbing/shapes/llama-3.2-1b/config.json")
    (tmp_path / "m/config.json").write_text(json.dumps(shape | {"num_hidden_layers": 4}))
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "m", "--reward", "skywork-v2-1b", "--dry-run", "--checkpointing"]
    for memory, code, word in (("40", 0, "fits"), ("11", 3, "--offload would make it fit")):
        found, out, err = script(monkeypatch, capsys, *flags, "--gpu-memory", memory)
        assert (found, err) == (code, "") and f"(--gpu-memory {memory} less" in out
        assert word in out
        # Columns add up.
        lines = [line.split() for line in out.split("\n\n")[1].split("\n")]
        sums = [sum(float(line[-6:][k]) for line in lines[1:-1]) for k in range(6)]
        assert sums == pytest.approx(list(map(float, lines[-1][-6:])), abs=.05)
        # 0.506e9 weights in bf16, with masters and moments: 14 bytes each.
        assert "a checkpoint takes 7.1 GB of disk" in out
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "config.json"]


@pytest.mark.parametrize("flags, message", [
    (["--resume", "x"], "--dry-run"), (["--overwrite"], "--dry-run"),
    (["--requeue", "--out", "x"], "--dry-run"), (["--watch"], "--dry-run"),
    (["--model", "nobody"], "'nobody': no such directory"),
    (["--reward", "nobody"], "'nobody': no such directory"),
    (["--judge", "empty"], "empty/config.json: no such file"),
])
def test_a_dry_run_that_makes_no_sense_is_refused(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, out, err = script(monkeypatch, capsys, "--dry-run", *flags)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_of_a_hub_repository_a_dry_run_fetches_no_weights(tmp_path, monkeypatch, capsys):
    asked = []
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["untied"]))
    monkeypatch.setattr(files, "snapshot_download", lambda repo, **options: (
        asked.append((repo, options)), str(tmp_path))[1])
    code, _, err = script(monkeypatch, capsys, "--dry-run", "--model", "smollm2-135m",
                          "--reward", "some/body", "--device", "cpu")
    assert (code, err) == (0, "")
    assert {repo for repo, _ in asked} == {files.NAMES["smollm2-135m"], "some/body"}
    for _, options in asked:
        assert not any("safetensors" in kind or "*" in kind for kind in options["allow_patterns"])


@pytest.mark.parametrize("name", ["GatedRepoError", "LocalEntryNotFoundError"])
def test_a_gated_model_or_no_network_is_told_in_a_line_and_known_shapes_need_neither(
        monkeypatch, capsys, name):
    error = getattr(errors, name)

    def refuse(repo, **options):
        raise error.__new__(error)
    monkeypatch.setattr(files, "snapshot_download", refuse)
    code, out, err = script(monkeypatch, capsys, "--dry-run", "--model", "smollm2-1.7b")
    word = "is gated: accept" if name == "GatedRepoError" else "the hub could not be reached"
    assert code == 2 and out == "" and word in err and err.count("\n") == 1
    monkeypatch.setattr(budget.Plan, "measure", lambda *_: {"activations": 0})
    assert script(monkeypatch, capsys, "--dry-run", "--model", "llama-3.2-3b", "--gpu-memory",
                  "80")[0] == 0


# ---------------------------------------------------------------- a run's own figures

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "m", "llama3_tied", max_position_embeddings=8192)
    write_checkpoint(folder / "rm", "scalar_head", max_position_embeddings=8192)
    return folder


SHORT = ["--model", "m", "--reward", "rm", "--queries", "2", "--answers", "2", "--query-tokens",
         "6", "--answer-tokens", "7", "--judge-tokens", "4", "--device", "cpu"]


def play(world, monkeypatch, *flags):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()


def metrics(world, name) -> list[dict]:
    return [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]


def test_a_run_opens_with_its_budget_and_each_step_holds_peaks_and_speed(
        world, monkeypatch, capsys):
    monkeypatch.setattr(log, "LARGE", 0)
    play(world, monkeypatch, *SHORT, "--steps", "1", "--out", "told")
    out = capsys.readouterr().out
    (m,) = metrics(world, "told")
    phases_of = ["challenge", "solve", "reward", "judge", "reference", "update"]
    assert list(m["phase_seconds"]) == list(m["peak_gb"]) == list(m["budget_gb"]) == phases_of
    assert not any(m["peak_gb"].values())                       # measured on a GPU only
    rates = m["tokens_per_second"]
    assert set(rates) == {"challenge", "solve", "reward", "judge", "update"}
    # 4 answers of 7 tokens, 2 queries of 6, all different.
    assert rates["update"] == pytest.approx(40 / m["phase_seconds"]["update"])
    assert rates["judge"] == pytest.approx(16 / m["phase_seconds"]["judge"])
    opening = out[out.index("peaks, GB"):out.index("\n     step  ")]
    assert f"peaks, GB     challenge {m['budget_gb']['challenge']:.2f}  solve" in opening
    assert "memory of this host): fits" in " ".join(opening.split())
    assert max(map(len, opening.splitlines())) <= 100
    below = out[out.index("\n      1/1  "):]
    assert re.search(r"\n +challenge .*solve .* tok/s[^$]*update .* tok/s", below)


def test_a_run_whose_settings_lack_one_is_resumed_with_its_default(world, monkeypatch):
    play(world, monkeypatch, *SHORT, "--steps", "1", "--out", "old")
    file = world / "old/config.json"
    config = json.loads(file.read_text())
    assert config.pop("repetition_penalty") == 0                 # as in a run of an older version
    file.write_text(json.dumps(config))
    play(world, monkeypatch, "--resume", "old", "--steps", "2")
    assert json.loads(file.read_text())["repetition_penalty"] == 0


def test_the_steps_lines_say_what_there_is():
    m = {"phase_seconds": {"solve": 2.0, "update": 4.0}, "tokens_per_second": {"solve": 512.0},
         "peak_gb": {"solve": 70.1, "update": 75.04}}
    assert log.speed_line(m).strip().split("  ") == [
        "solve 2.0 s 512 tok/s", "update 4.0 s", "peak 75.0 GB in update"]
    nothing = {"tokens_per_second": {}, "peak_gb": {"solve": None, "update": None}}
    assert log.speed_line(m | nothing).strip().split("  ") == ["solve 2.0 s", "update 4.0 s"]
