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
from checkpoints import CONFIGS, random_llama, write_checkpoint
from conftest import ROOT
from huggingface_hub import errors
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import train
from model import Llama, parse_config, read_config
from plumbing import budget, cli, files, logprobs, phases, report
from plumbing.budget import Machine
from plumbing.cache import Cache
from plumbing.files import InputError, pick_device, read_json
from plumbing.settings import resolve

sys.path.append(str(ROOT / "bench"))             # last: its budget.py must not hide the project's

import measure  # noqa: E402

spec = importlib.util.spec_from_file_location("bench_budget", ROOT / "bench/budget.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

GB = 1e9
LINUX = phases.resident("VmRSS") is not None


def dry(**given):
    """Settings of a dry run on an imagined GPU."""
    return resolve({"model": "llama-3.2-3b", "dry_run": True, "gpu_memory": 80.0} | given)[0]


def peaks(s) -> dict:
    return {name: sum(parts.values()) / GB
            for name, parts in budget.budget(s, *budget.plan(s)).items()}


# ---------------------------------------------------------------- sizes, worked by hand

def test_parameters_are_as_many_as_the_model_has():
    shapes = [read_json(file) for file in (ROOT / "plumbing/shapes").glob("*/config.json")]
    assert len(shapes) == 4
    for raw in [*CONFIGS.values(), *shapes]:
        c = parse_config(raw)
        with torch.device("meta"):
            assert budget.parameters(c) == sum(p.numel() for p in Llama(c).parameters())


def test_llama_3_2_3b_takes_what_was_worked_out_by_hand():
    """3.2127e9 weights, 28 layers of 8 key heads of 128: 114,688 bytes of cache a token."""
    c = read_config(ROOT / "plumbing/shapes/llama-3.2-3b")
    assert budget.parameters(c) == 3_212_749_824 and budget.token_cache(c, 2) == 114_688
    s = dry(batch_tokens=65536, micro_batch_tokens=8192)
    found = budget.budget(s, *budget.plan(s))
    assert list(found) == ["challenge", "solve", "reward", "judge", "reference", "update"]
    assert all(sum(parts.get(part, 0) for part in ("masters", "moments")) == pytest.approx(
        38.6 * GB, rel=2e-3) for parts in found.values())
    static = {part: size / GB for part, size in found["update"].items() if part in budget.STATIC}
    assert static["gradients"] == pytest.approx(12.9, abs=.06)
    for role in ("policy", "reference", "reward model"):
        assert static[role] == pytest.approx(6.4, abs=.03)
    assert sum(static.values()) == pytest.approx(70.7, abs=.05)
    # Sampling needs no gradients: they begin with the update.
    assert "gradients" not in found["solve"]
    # 64 rows of 40 + 256 + 512 tokens, and the 8 prompts' own while they are being prefilled; of
    # the judge's rows 65,536 tokens hold 44, and some ten of their prompts go into a pass.
    assert found["solve"]["cache"] in (64 * 808 * 114_688, (64 * 808 + 8 * 296) * 114_688)
    text = budget.plan(s)[1]
    length, common = text["judge"] + 256 + 512, text["rubric"]
    assert 65536 // (length + 256) == 44
    count = 8192 // (length - common)
    assert found["judge"]["cache"] == (44 * (length + 256) + common + count * length) * 114_688
    # Log-probs: 2^26 logits, in bf16 as they are made and in fp32, and their bf16 gradient. The
    # update: a bf16 gradient of the head; a block's input for each of 8,192 tokens and 28 layers,
    # 1.4 GB, beside one whole block.
    assert budget.head_logits(c, 2, 8192, "cuda") == (2 + 4 + 2) * 2**26
    assert found["update"]["head's gradient"] == 2 * 128256 * 3072
    assert 1.4 < found["update"]["activations"] / GB < 4
    assert 72 < peaks(s)["update"] < 75.7 and budget.advice(s, budget.plan(s)) == "fits"


@pytest.mark.parametrize("kind", ["untied", "llama3_tied", "head_dim"])
def test_the_caches_bytes_are_those_that_a_cache_allocates(kind):
    model = random_llama(kind)
    cache = Cache(model.config, 5, 7, device="cpu", dtype=torch.float32)
    taken = sum(t.nbytes for t in cache.k + cache.v)
    moments = budget.sampling(model.config, 4, rows=5, each=5, prompt=4, common=0, limit=3,
                              batch_tokens=35)
    assert moments[-1]["cache"] == taken == 5 * 7 * budget.token_cache(model.config, 4)
    # One token less in the sampler's budget, and only four rows go together.
    fewer = budget.sampling(model.config, 4, rows=5, each=5, prompt=4, common=0, limit=3,
                            batch_tokens=34)
    assert fewer[-1]["cache"] == taken * 4 // 5


def test_of_an_offloaded_run_only_the_working_model_is_on_the_gpu():
    s = dry(gpu_memory=24.0, offload=True)
    needed = budget.plan(s)
    found = budget.budget(s, *needed)
    there = {name: [part for part in parts if part in budget.STATIC]
             for name, parts in found.items()}
    assert there == {"challenge": ["policy"], "solve": ["policy"], "reward": ["reward model"],
                     "judge": ["reference"], "reference": ["reference"],
                     "update": ["policy", "gradients"]}
    assert 19.3 < peaks(s)["update"] < 23.3 and budget.advice(s, needed) == "fits"
    host = budget.on_host(s, *needed[::2])
    assert sum(host.values()) == pytest.approx((4 + 8 + 2 + 2) * 3.2127e9, rel=1e-3)


def test_without_bf16_the_policy_is_its_own_master():
    s = dry(checkpointing=False)
    models, text, _ = budget.plan(s)
    found = budget.budget(s, models, text, Machine("cpu", 4, 1e12, ""))
    assert "masters" not in found["update"]
    assert found["update"]["policy"] == found["update"]["gradients"] == 4 * 3_212_749_824


def test_models_in_two_roles_count_once_and_another_judge_counts(tmp_path):
    write_checkpoint(tmp_path / "m", "untied")
    write_checkpoint(tmp_path / "j", "head_dim")
    m, j = str(tmp_path / "m"), str(tmp_path / "j")
    roles = lambda **given: list(budget.read_models(resolve(
        {"model": m, "reward": m, "device": "cpu"} | given)[0]))
    assert roles() == roles(judge=m) == ["policy", "reference", "reward model"]
    assert roles(judge=j) == ["policy", "reference", "judge", "reward model"]
    assert roles(judge=j, beta=0.0) == ["policy", "judge", "reward model"]
    assert roles(judge=j, reference=j) == ["policy", "reference", "reward model"]
    assert roles(reward="tiny", beta=0.0, algo="lsp-zero") == ["policy"]
    s, _ = resolve({"model": m, "reward": m, "judge": j, "device": "cpu"})
    assert "\njudge " in report.table(budget.budget(s, *budget.plan(s)), {})


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


SHAPE = {"vocab_size": 3000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5,
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
        work = sum(size for part, size in parts.items() if part in (
            "gradients", *set(budget.PARTS) - set(budget.STATIC)))
        assert 0.85 < work / GB / game.phase.peak_gb[name] < 1.15, name


# ---------------------------------------------------------------- what fits

@pytest.mark.parametrize("memory, given, wanted", [
    (80, {}, "fits"), (48, {}, "--offload would make it fit"), (48, {"offload": True}, "fits"),
    (24, {}, "--offload "), (24, {"offload": True}, "fits"), (20, {}, "still"),
    (16, {"model": "llama-3.2-1b"}, "--offload would make it fit"),
    (16, {"model": "llama-3.2-1b", "offload": True}, "fits"),
    (80, {"checkpointing": False, "micro_batch_tokens": 8192}, "--micro-batch-tokens"),
    (76, {"batch_tokens": 2**18, "queries": 32}, "--batch-tokens"),
    (48, {"offload": True, "checkpointing": False, "micro_batch_tokens": 2**16}, "--micro"),
])
def test_the_first_switch_that_makes_it_fit_is_named_and_does(memory, given, wanted):
    s = dry(gpu_memory=float(memory), **given)
    needed = budget.plan(s)
    said = budget.advice(s, needed)
    assert wanted in said
    flags = re.findall(r"--([a-z-]+)(?: (\d+))?", said) if "would make it fit" in said else []
    changes = {key.replace("-", "_"): int(value) if value else True for key, value in flags}
    if "still" not in said:
        tried = dataclasses.replace(s, **changes)
        assert budget.lacking(budget.budget(tried, *needed), memory * GB) <= 0
        assert not changes or budget.lacking(budget.budget(s, *needed), memory * GB) > 0


@pytest.mark.parametrize("memory", [76, 80])
def test_the_largest_powers_of_two_that_fit_are_chosen(memory):
    s = dry(gpu_memory=float(memory), queries=64)
    needed, chosen = budget.plan(s), (s.batch_tokens, s.micro_batch_tokens)
    fits = lambda s: budget.lacking(budget.budget(s, *needed), memory * GB) <= 0
    assert fits(s) and all(size & (size - 1) == 0 for size in chosen)
    for key, size, most in zip(("batch_tokens", "micro_batch_tokens"), chosen, (2**18, 2**13)):
        assert size == most or not fits(dataclasses.replace(s, **{key: 2 * size}))
    assert chosen != (2**18, 2**13)
    kept = dry(gpu_memory=float(memory), queries=64, batch_tokens=5000, micro_batch_tokens=300)
    assert (kept.batch_tokens, kept.micro_batch_tokens) == (5000, 300)


def test_held_out_prompts_may_fill_the_sampler_and_are_counted():
    """The game's own rows need 94,000 tokens at most; an evaluation takes all it is given."""
    plain, evaluated = dry(), dry(eval_prompts="many.jsonl")
    assert plain.batch_tokens == 2**18 > evaluated.batch_tokens == 2**17
    found = budget.budget(evaluated, *budget.plan(evaluated))
    assert found["eval"]["cache"] > .99 * 2**17 * 114_688


def test_a_cpu_keeps_the_defaults_and_a_gpu_that_cannot_hold_the_weights_is_refused(
        tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m", "untied")
    given = {"model": str(tmp_path / "m"), "reward": str(tmp_path / "m")}
    s, _ = resolve(given | {"device": "cpu"})
    assert (s.batch_tokens, s.micro_batch_tokens) == (65536, 2048)
    with pytest.raises(InputError, match="--gpu-memory is not used here: it needs a GPU"):
        resolve(given | {"device": "cpu", "gpu_memory": 8.0})
    cuda = (torch.device("cuda"), torch.bfloat16)
    for module in ("plumbing.budget", "plumbing.settings"):
        monkeypatch.setattr(sys.modules[module], "pick_device", lambda name: cuda)
    s, _ = resolve(given | {"gpu_memory": 8.0})
    assert (s.batch_tokens, s.micro_batch_tokens) == (2**18, 2**13)
    with pytest.raises(InputError, match=r"0.0 GB \(--gpu-memory 1e-05\), and weights, gradients"):
        resolve(given | {"gpu_memory": 1e-5})


def test_a_card_without_bf16_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, has=has: has)
        assert pick_device("auto") == (torch.device("cuda"), dtype)


# ---------------------------------------------------------------- dry runs

def script(monkeypatch, capsys, *flags) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as end:
        cli.run_script(train.main)
    return end.value.code, *capsys.readouterr()


def test_a_dry_run_reads_config_json_alone_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "m").mkdir()
    shape = (ROOT / "plumbing/shapes/llama-3.2-1b/config.json").read_text()
    (tmp_path / "m/config.json").write_text(shape)
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "m", "--reward", "skywork-v2-1b", "--dry-run"]
    for memory, code, word in (("40", 0, "fits"), ("16", 3, "--offload would make it fit")):
        found, out, err = script(monkeypatch, capsys, *flags, "--gpu-memory", memory)
        assert (found, err) == (code, "") and f"(--gpu-memory {memory}): " in out and word in out
        # Columns add up to their peak.
        lines = [line.split() for line in out.split("\n\n")[1].replace("-", "0").split("\n")]
        sums = [sum(float(line[-6:][k]) for line in lines[1:-1]) for k in range(6)]
        assert sums == pytest.approx(list(map(float, lines[-1][-6:])), abs=.05)
        # 1.236e9 weights in bf16, with masters and moments: 14 bytes each.
        assert "a checkpoint takes 17.3 GB of disk" in out and "h for 500 steps" in out
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
    monkeypatch.setattr(report, "WORTH_MEASURING", 0)
    play(world, monkeypatch, *SHORT, "--steps", "1", "--out", "told")
    out = capsys.readouterr().out
    (m,) = metrics(world, "told")
    phases_of = ["challenge", "solve", "reward", "judge", "reference", "update"]
    assert list(m["phase_seconds"]) == list(m["peak_gb"]) == list(m["budget_gb"]) == phases_of
    assert all(isinstance(peak, float) == LINUX for peak in m["peak_gb"].values())
    rates = m["tokens_per_second"]
    assert set(rates) == {"challenge", "solve", "reward", "judge", "update"}
    # 4 answers of 7 tokens, 2 queries of 6, all different.
    assert rates["update"] == pytest.approx(40 / m["phase_seconds"]["update"])
    assert rates["judge"] == pytest.approx(16 / m["phase_seconds"]["judge"])
    opening = out[out.index("memory, MB"):out.index("step 1/1")]
    assert f"peaks, MB     challenge {1000 * m['budget_gb']['challenge']:.2f}  solve" in opening
    assert "memory of this host): fits" in opening
    line = out.split("\n")[[i for i, line in enumerate(out.split("\n"))
                            if line.startswith("step 1/1")][0] + 1]
    assert re.search(r"^ +challenge .*solve .* tok/s.*update .* tok/s  peak", line)


@pytest.mark.skipif(not LINUX, reason="peaks on the host are read from /proc")
def test_a_phases_peak_is_its_own():
    phase = phases.Phases()
    for name, size in (("small", 10), ("large", 300), ("after", 10)):
        with phase(name):
            torch.ones(size * 250_000)                           # size MB
    assert 0.29 < phase.peak_gb["large"] < 0.4
    assert phase.peak_gb["small"] < 0.1 and phase.peak_gb["after"] < 0.1


def test_a_run_from_before_these_settings_goes_on(world, monkeypatch):
    play(world, monkeypatch, *SHORT, "--steps", "1", "--out", "old")
    file = world / "old/config.json"
    config = json.loads(file.read_text())
    for key in ("offload", "gpu_memory", "dry_run"):
        del config[key]
    file.write_text(json.dumps(config))
    play(world, monkeypatch, "--resume", "old", "--steps", "2")
    assert len(metrics(world, "old")) == 2
    del config["seed"]                                           # this one nobody may guess
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="seed is missing"):
        play(world, monkeypatch, "--resume", "old", "--steps", "3")


# ---------------------------------------------------------------- work

def test_forward_flops_are_those_that_pytorch_counts():
    """Products alone: its counter takes attention's unmasked pairs, and kernels differ."""
    model = random_llama("llama3_tied")
    c = model.config
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            model.logits(model(torch.arange(22).view(2, 11) % 37))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "attention" not in str(op))
    norms = (2 * c.num_hidden_layers + 1) * c.hidden_size        # are weights, but no products
    pairs = 2 * 11 * 11 / 2
    attention = 4 * c.num_hidden_layers * budget.queries(c) * pairs
    found = report.forward_flops(c, [11, 11], [], 22)
    assert found == products + attention + 2 * norms * 22
    # A prompt of 4 and a rest of 7 attend to as many pairs as a row of 11.
    assert report.forward_flops(c, [4, 11], [(4, 7)], 22) == found


def test_decoding_reads_weights_once_a_step_and_what_the_cache_holds():
    c = parse_config(CONFIGS["untied"])
    weights = budget.body(c) + c.vocab_size * c.hidden_size
    token = budget.token_cache(c, 4)
    # Two batches of limit 4: rows of 3 + 4 and 5 + 4 tokens; then the longest, alone.
    rows = [(5, 1), (9, 2), (3, 4)]
    found = report.decode_bytes(c, 4, rows, 4, batch_tokens=18)
    assert found == 4 * weights * (4 + 2) + token * (4 * (3 + 2) + 1 * 5.5 + 2 * (9 + 1))


def test_the_steps_lines_say_what_there_is():
    m = {"phase_seconds": {"solve": 2.0, "update": 4.0}, "tokens_per_second": {"solve": 512.0},
         "peak_gb": {"solve": 70.1, "update": 75.04}}
    assert report.speed_line(m).strip().split("  ") == [
        "solve 2.0 s 512 tok/s", "update 4.0 s", "peak 75.0 GB in update"]
    nothing = {"tokens_per_second": {}, "peak_gb": {"solve": None, "update": None}}
    assert report.speed_line(m | nothing).strip().split("  ") == ["solve 2.0 s", "update 4.0 s"]
