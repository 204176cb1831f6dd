"""--offload: the same run bit for bit, one model at work at a time, and what stays in the host.

Host and device are both this machine's memory here; a model at work is a copy all the same: what
is not brought back is lost, and tells.
"""
import json
import shutil
import sys
import weakref

import pytest
import torch
from checkpoints import CONFIGS, random_llama, write_checkpoint

import sample as sampling
import train
from bench import measure
from model import Llama, parse_config
from plumbing import log, memory
from plumbing.files import pick_device
from plumbing.logprobs import log_probs
from plumbing.memory import MasterAdamW, Stage, to_host
from plumbing.settings import resolve

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Many buffers, as large models have."""
    monkeypatch.setattr(memory, "BUFFER", 12_000)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for name, kind in (("m", "llama3_tied"), ("j", "untied"), ("rm", "scalar_head")):
        write_checkpoint(folder / name, kind, max_position_embeddings=8192)
    lines = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(3)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


SHORT = ["--model", "m", "--reward", "rm", "--queries", "2", "--answers", "2",
         "--query-tokens", "6", "--answer-tokens", "7", "--judge-tokens", "4", "--steps", "2",
         "--save-every", "1", "--keep", "0", "--learning-rate", "1e-2", "--weight-decay", "0.1",
         "--eval-prompts", "p.jsonl", "--eval-every", "2", "--device", "cpu"]


@pytest.fixture
def play(world, monkeypatch):
    """Run train.py in this process, computing in the given dtype as on a GPU."""
    def run(*flags, dtype=torch.float32):
        monkeypatch.chdir(world)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        monkeypatch.setattr(train, "pick_device", lambda name: (CPU, dtype))
        train.main()
    return run


def left(run):
    """What a run leaves: all weights, moments and masters, its metrics without the times."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for m in metrics:
        for key in log.TIMED:
            m.pop(key, None)
    return metrics, (run / "eval.jsonl").read_text(), {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted(run.glob("checkpoint-*/**/*.safetensors"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_run_is_the_plain_one_bit_for_bit_and_so_is_one_that_changes_over(
        world, play, dtype):
    name = str(dtype).removeprefix("torch.")
    plain, offloaded = world / f"plain-{name}", world / f"offloaded-{name}"
    play(*SHORT, "--out", plain.name, dtype=dtype)
    play(*SHORT, "--out", offloaded.name, "--offload", dtype=dtype)
    expected = left(plain)
    assert left(offloaded) == expected and len(expected[2]) == 6 + 2 * (dtype != torch.float32)
    weights = [data for file, data in expected[2].items() if file.endswith("model.safetensors")]
    assert len(set(weights)) == 2                                  # it moved
    for begun, flag in ((plain, "--offload"), (offloaded, "--no-offload")):
        shutil.rmtree(begun / "checkpoint-000002")
        play("--resume", begun.name, flag, dtype=dtype)
        assert left(begun) == expected


@pytest.mark.parametrize("flags", [[], ["--judge", "j"], ["--algo", "lsp-zero", "--beta", "0"]])
def test_no_model_computes_while_it_rests_and_the_reference_rests_in_the_update(
        world, play, monkeypatch, flags, capsys):
    stages, worked, forward = [], [], Llama.forward

    class Watched(Stage):
        def __init__(self, *device):
            super().__init__(*device)
            stages.append(self)

    def watched(model, *inputs, **options):
        if model.model.norm.weight.is_meta:                                   # the memory budget's
            return forward(model, *inputs, **options)
        assert stages[0].model is model
        ours = {p.data_ptr() for p in model.parameters()}
        assert not ours & {data.data_ptr() for data in stages[0].resting}
        worked.append(model)
        return forward(model, *inputs, **options)
    monkeypatch.setattr(train, "Stage", Watched)
    monkeypatch.setattr(Llama, "forward", watched)
    play(*SHORT, *flags, "--out", f"watched-{len(flags)}", "--offload", "--steps", "1",
         "--eval-every", "1", dtype=torch.bfloat16)
    turns = [model for i, model in enumerate(worked) if i == 0 or worked[i - 1] is not model]
    policy, scorer = turns[0], turns[1]
    frozen = {"": [scorer, turns[4]], "j": [scorer, turns[4], turns[5]], "0": [scorer]}[
        flags[-1] if flags else ""]
    assert turns == [policy, scorer, policy, *frozen, policy, scorer]
    assert len({*map(id, turns)}) == 1 + len(frozen)


def test_at_rest_the_policy_is_its_masters_and_at_work_a_rounded_copy():
    policy = random_llama("untied")
    optimizer = MasterAdamW(policy, torch.bfloat16, weight_decay=0.0, offload=True)
    stage, other = Stage(CPU, torch.bfloat16), random_llama("untied")
    same = lambda: [p.data_ptr() == m.data_ptr() for p, m in zip(policy.parameters(),
                                                                optimizer.masters)]
    assert all(same())
    stage.load(policy)
    assert not any(same()) and {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    hidden = policy(torch.arange(12).view(2, 6))
    log_probs(policy, hidden[0], torch.arange(6)).sum().backward()
    assert {p.grad.dtype for p in policy.parameters()} == {torch.float32}
    before = [m.clone() for m in optimizer.masters]
    optimizer.step(1e-2, 1.0)
    assert all(p.grad is None for p in policy.parameters())
    assert not any(torch.equal(m, b) for m, b in zip(optimizer.masters, before))
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(policy.parameters(),
                                                            optimizer.masters))
    stage.load(other)
    assert all(same())


@pytest.mark.parametrize("offload", [False, True])
def test_masters_move_as_torch_optim_adamw_moves_float64_weights(offload):
    ours, theirs = random_llama("untied"), random_llama("untied", dtype=torch.float64)
    optimizer = MasterAdamW(ours, torch.float32, weight_decay=0.1, offload=offload)
    adamw = torch.optim.AdamW(theirs.parameters(), weight_decay=0.1)
    if offload:
        Stage(CPU, torch.float32).load(ours)
    for step in range(5):
        rate = 1e-2 / (step + 1)
        adamw.param_groups[0]["lr"] = rate
        for k, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters())):
            g = torch.Generator().manual_seed(100 * step + k)
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.double()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item()
        adamw.step()
        assert optimizer.step(rate, 1.0) == pytest.approx(norm, rel=1e-5)
    assert max((p - q).abs().max() for p, q in zip(ours.parameters(), theirs.parameters())) < 1e-6
    assert optimizer.updates == 5


def test_host_buffers_of_llama_3_2_3b_lose_little(monkeypatch):
    """Of what page-locked memory takes when PyTorch rounds each buffer up to a power of two."""
    monkeypatch.undo()
    with torch.device("meta"):
        llama = Llama(parse_config(measure.config_of(measure.Load("llama-3.2-3b"))))
        to_host(llama)
    storages = [p.untyped_storage() for p in llama.parameters()]
    buffers = {storage._cdata: storage.nbytes() // 4 for storage in storages}.values()
    counts = [p.numel() for p in llama.parameters()]
    taken = lambda sizes: sum(1 << (4 * n - 1).bit_length() for n in sizes) / (4 * sum(counts))
    assert len(buffers) == 7 and taken(buffers) < 1.025
    assert taken(counts) > 1.35 and taken([sum(counts)]) > 1.3


def test_host_buffers_overlap_nowhere_and_large_tensors_have_their_own():
    shapes = [(3, 5), (200, 100), (11_000,), (7,), (985,)]
    model = torch.nn.ParameterList(torch.full(shape, float(k)) for k, shape in enumerate(shapes, 1))
    to_host(model)
    assert all((p == k).all() and p.shape == shape
               for k, (p, shape) in enumerate(zip(model, shapes), 1))
    storages = [p.untyped_storage().data_ptr() for p in model]
    assert [storages.index(s) for s in storages] == [0, 1, 2, 2, 2]
    assert [p.untyped_storage().nbytes() // 4 for p in model[1:3]] == [20_000, 11_992]


def test_the_reference_speaks_once_in_its_own_phase(world, monkeypatch):
    """Out of memory in the update asks it nothing again."""
    s, _ = resolve({"model": str(world / "m"), "reward": str(world / "rm"), "queries": 2,
                    "answers": 2, "query_tokens": 4, "answer_tokens": 4, "judge_tokens": 2,
                    "device": "cpu", "self_reward": "expected"})
    g = train.set_up(s)
    r = train.play(g, 0)
    asked, token_log_probs = [], train.token_log_probs

    def count(model, rows, temperature):
        asked.append("reference" if model is g.reference else "policy")
        return token_log_probs(model, rows, temperature)
    monkeypatch.setattr(train, "token_log_probs", count)
    optimizer = MasterAdamW(g.policy, torch.float32, weight_decay=0.0)
    monkeypatch.setattr(optimizer, "step", lambda rate, clip: float("nan"))
    m = train.update(g, optimizer, r, 0)
    assert m["faults"] and asked[:2] == ["reference"] * 2 and "reference" not in asked[2:]
    assert list(g.phase.seconds)[-2:] == ["reference", "update"]
    assert m["kl_solver"] == m["kl_challenger"] == 0.0           # the same batches: the same bits


def test_no_captured_step_outlives_its_call_and_its_weights_addresses(monkeypatch):
    """A graph holds addresses of the model at work: it must be gone before that model may go."""
    llama, made = random_llama("untied"), []

    class Captured:
        def __init__(self, model, cache):
            cache.fixed = True
            self.step = lambda token: model.logits(model(token[:, None], cache=cache)[:, -1])
            self.weights = [p.data_ptr() for p in model.parameters()]
            made.append(weakref.ref(self))

        def __call__(self, token):
            assert self.weights == [p.data_ptr() for p in llama.parameters()]
            return self.step(token)
    monkeypatch.setattr(sampling, "uses_graphs", lambda device: True)
    monkeypatch.setattr(sampling, "CapturedStep", Captured)
    monkeypatch.setattr(sampling, "CAPTURE_COST", 1)
    stage, gone = Stage(CPU, torch.float32), random_llama("untied")
    for turn in range(3):
        stage.load(llama)
        sampling.sample(llama, [[1, 2, 3]] * 2, max_new_tokens=[2, 20])
        assert len(made) == 2 * (turn + 1) and not any(graph() for graph in made)
        stage.load(gone)


@pytest.mark.parametrize("has_bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_card_without_bfloat16_computes_in_fp32(monkeypatch, has_bf16, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or has_bf16)
    assert pick_device("auto") == (torch.device("cuda"), dtype)


def test_the_mask_is_as_the_memory_efficient_kernel_wants_it():
    """PyTorch's rule: the queries' dtype, last stride 1, all other strides multiples of 16."""
    llama = Llama(parse_config(CONFIGS["untied"])).bfloat16()
    for B, T, S in ((2, 1, 5), (3, 4, 33), (1, 7, 16)):
        seen = torch.rand(B, T, S, generator=torch.Generator().manual_seed(S)) < 0.5
        mask = llama.additive(seen)
        assert mask.shape == (B, 1, 2 * T, S) and mask.dtype == torch.bfloat16
        assert mask.stride(-1) == 1 and all(n % 16 == 0 for n in mask.stride()[:-1])
        for head in mask.view(B, 2, T, S).unbind(1):
            assert torch.equal(head == 0, seen) and torch.equal(head == -float("inf"), ~seen)
