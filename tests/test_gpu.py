"""What a GPU does otherwise than a CPU: layouts, graphs, streams, memory; on a pretend device."""
import argparse
import contextlib
import gc
import json
import sys
import weakref

import pytest
import simcuda
import torch
import torch.nn.functional as F
from checkpoints import random_llama, write_checkpoint
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))             # last: as in test_bench.py
import rewards
import sample as sampling
import train as game
from bench import gpu, parity  # noqa: E402
from plumbing import ranks
from plumbing.files import find_model, pick_device
from plumbing.logprobs import log_probs
from plumbing.memory import MasterAdamW
from plumbing.settings import Settings, resolve
from sample import sample
from train import Row, accumulate, reference_log_probs

PROMPTS = [[5, 6, 7], [9] * 5, [5, 6]]
LIMITS = [3, 20, 12, 20] * 3


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    return simcuda.library(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def cuda(monkeypatch, guard):
    simcuda.install(monkeypatch, guard)

    def step_again(self, token):                 # a replay of a recorded step is the step
        self.token.copy_(token[:, None])
        return self.step()
    record = sampling.CapturedStep.__init__

    def record_only(self, model, cache):         # a real capture runs nothing
        start = cache.lengths.clone()
        record(self, model, cache)
        cache.lengths.copy_(start)
    monkeypatch.setattr(sampling.CapturedStep, "__call__", step_again)
    monkeypatch.setattr(sampling.CapturedStep, "__init__", record_only)
    monkeypatch.setattr(sampling, "CAPTURE_COST", 1)
    sampling.capture_stream.cache_clear()
    yield
    sampling.capture_stream.cache_clear()


def completions(model):
    return sample(model, PROMPTS, num_samples=4, max_new_tokens=LIMITS, stop_ids={3, 11},
                  generator=torch.Generator().manual_seed(0))


def rows_of(groups):
    return [Row(p, c, 0.3 * (i - 1)) for p, group in zip(PROMPTS, groups)
            for i, c in enumerate(group)]


def step_on(model, reference, rows):
    """Reference log-probs, gradient and AdamW: the weights after one update."""
    optimizer = MasterAdamW(model, torch.float32, weight_decay=0.1)
    g = game.Game(Settings(model="tiny", micro_batch_tokens=60), model, None, None, reference)
    reference_log_probs(g, rows)
    accumulate(g, rows, 1.0)
    optimizer.step(1e-2, 1.0)
    return torch.cat([simcuda.unwrap(p.detach()).reshape(-1) for p in model.parameters()])


# ---------------------------------------------------------------- layouts of attention's output

def test_attention_whose_output_lies_by_tokens_changes_no_result(monkeypatch):
    """CUDA's memory-efficient kernel returns (B, T, H, d) memory, seen as (B, H, T, d)."""
    plain = F.scaled_dot_product_attention

    def by_tokens(*args, **kwargs):
        return plain(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)
    found = []
    for kernel in (plain, by_tokens):
        monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
        model, reference = random_llama("llama3_tied"), random_llama("llama3_tied")
        groups = completions(model)                                          # sampling
        hidden = rewards.last_hidden(model, [[1, 2, 3, 4], [1, 2, 5]], [0, 0], 64)     # scoring
        found.append((groups, hidden, step_on(model, reference, rows_of(groups))))     # update
    (groups, hidden, weights), (groups2, hidden2, weights2) = found
    assert groups == groups2 and torch.equal(hidden, hidden2) and torch.equal(weights, weights2)


# ---------------------------------------------------------------- graphs

def stand_ins(monkeypatch):
    """torch.cuda's streams and graphs, for a model that is on the CPU."""
    for name, value in {"Stream": simcuda.Stream, "current_stream": lambda *_: simcuda.Stream(),
                        "stream": lambda _: contextlib.nullcontext(), "CUDAGraph": simcuda.Graph,
                        "graph": simcuda.capture}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(sampling, "uses_graphs", lambda device: True)


def test_nothing_of_a_call_outlives_it_and_the_old_graph_goes_before_the_next(monkeypatch):
    stand_ins(monkeypatch)
    made, caches, streams = [], [], set()
    record = sampling.CapturedStep.__init__

    def watched(self, model, cache):
        assert not any(step() for step in made), "two graphs at once"
        made.append(weakref.ref(self))
        caches.append(weakref.ref(cache))
        streams.add(sampling.capture_stream())
        start = cache.lengths.clone()
        record(self, model, cache)
        cache.lengths.copy_(start)

    def step_again(self, token):
        self.token.copy_(token[:, None])
        return self.step()
    monkeypatch.setattr(sampling.CapturedStep, "__init__", watched)
    monkeypatch.setattr(sampling.CapturedStep, "__call__", step_again)
    monkeypatch.setattr(sampling, "REACH", 8)
    monkeypatch.setattr(sampling, "CAPTURE_COST", 1)
    model = random_llama("untied")
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            completions(model)
            assert len(made) > 2 and not any(held() for held in made + caches)
    finally:
        gc.enable()
    assert len(streams) == 1                     # one for the whole run


# ---------------------------------------------------------------- the pretend device

def test_sampling_scoring_and_an_update_on_the_pretend_gpu_are_those_of_the_cpu(cuda):
    plain, reference = random_llama("llama3_tied"), random_llama("llama3_tied")
    expected = completions(plain)
    hidden = rewards.last_hidden(plain, PROMPTS, [0, 1, 2], 64)
    weights = step_on(plain, reference, rows_of(expected))
    with simcuda.Mode():
        model, other = (simcuda.to_gpu(random_llama("llama3_tied")) for _ in range(2))
        groups = completions(model)
        said = lambda groups: [[c.tokens for c in group] for group in groups]
        assert said(groups) == said(expected)
        found = rewards.last_hidden(model, PROMPTS, [0, 1, 2], 64)
        assert torch.equal(simcuda.unwrap(found), hidden)
        assert (step_on(model, other, rows_of(expected)) - weights).abs().max() < 1e-6


def test_bfloat16_logits_on_a_gpu_are_not_rounded_to_bfloat16(cuda):
    """In sampling and in the loss; with gradients the plain product, for torch has no other."""
    plain = random_llama("llama3_tied").bfloat16()
    hidden = torch.randn(2, 5, plain.config.hidden_size).bfloat16()                  # (B, T, D)
    targets = torch.randint(plain.config.vocab_size, (10,))
    expected = hidden.float() @ plain.head.detach().float().t()                      # (B, T, V)
    logp = expected.flatten(0, 1).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    with simcuda.Mode():
        model = simcuda.to_gpu(plain)
        hidden, targets = hidden.to("cuda"), targets.to("cuda")
        rounded = simcuda.unwrap(model.logits(hidden).detach())
        with torch.no_grad():
            found = simcuda.unwrap(model.logits(hidden))
        found_logp = simcuda.unwrap(log_probs(model, hidden.flatten(0, 1), targets).detach())
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-6
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(found, rounded)
    assert (found_logp - logp).abs().max() < 1e-5


def test_the_first_checks_of_the_gpu_benchmark_pass_on_the_pretend_gpu(cuda, monkeypatch):
    """bench/parity.py, which a real card sees first."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70e9, 80e9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    monkeypatch.setattr(parity, "NEW", 15)
    monkeypatch.setattr(sampling, "REACH", 16)
    args = argparse.Namespace(where=simcuda.CUDA, dtype=torch.float32, vocabulary_size=37)

    def build(seed, dtype=torch.float32):
        torch.manual_seed(seed)
        return simcuda.to_gpu(random_llama("llama3_tied"))
    args.build = build
    with simcuda.Mode():
        found = {check.__name__: check(args) for check in parity.CHECKS
                 if check is not parity.new_shapes}
    assert found["graph_is_eager"]["same_tokens"] == 16 and found["nothing_stays"]["alive"] == 0
    assert found["nothing_stays"]["captures"] > 1 and found["sampler_is_trainer"]["max"] < 1e-4
    assert found["update_again_and_offloaded"]["again"]["largest"] == 0
    assert "logp" in found["attention_backends"]["chosen by PyTorch"]


def test_the_gpu_benchmarks_steps_and_updates_run_on_the_pretend_gpu(cuda, monkeypatch, capsys):
    """A whole step in 80 GB and, offloaded, in 24; the update both ways; log-probs."""
    sizes = {"queries": 2, "query_tokens": 5, "answer_tokens": 6, "judge_tokens": 4,
             "prompt_tokens": 9, "new_tokens": 8, "mean_tokens": 3}
    args = argparse.Namespace(shape="tiny", layers=1, vocabulary=None, where=simcuda.CUDA,
                              dtype=torch.bfloat16, batch_tokens=None, micro_batch_tokens=None,
                              **sizes)
    made, rows = gpu.random_llama, []
    host = argparse.Namespace(**vars(args) | {"where": torch.device("cpu")})
    monkeypatch.setattr(gpu, "random_llama", lambda _, **how: simcuda.to_gpu(made(host, **how)))
    for name in ("set_per_process_memory_fraction", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    with simcuda.Mode():
        for args.limits in ([80.0], [24.0]):
            gpu.step_child(args)
        for section in (gpu.update_section, gpu.logp_section):
            section(args, {"tflop_s": 1.0}, rows.append)
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["offload"] for row in steps] == [False, False, True, True]
    assert not any(row["faults"] for row in steps) and steps[0]["tokens"]["solve"] == 64 * 6
    assert max(row["logp_difference"] for row in steps) < 0.05 and rows[2]["mean"] < 0.05
    assert [row["offload"] for row in rows[:2]] == [False, True]


def test_set_up_on_a_gpu_limits_its_memory_and_loads_every_model_there(cuda, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m", "untied", max_position_embeddings=4096)
    write_checkpoint(tmp_path / "rm", "scalar_head")
    limits = []
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda f, n: limits.append((f, n)),
                        raising=False)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", limits.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    s, _ = resolve({"model": str(tmp_path / "m"), "reward": str(tmp_path / "rm"),
                    "gpu_memory": 24.0, "query_tokens": 8, "answer_tokens": 8, "judge_tokens": 8})
    with simcuda.Mode():
        g = game.set_up(s)
        models = (g.policy, g.reference, g.reward.model)
        assert all(p.device == simcuda.CUDA for m in models for p in m.parameters())
    assert (0.3, 0) in limits and False in limits      # 24 of 80 GB; cuDNN's attention is off


def test_every_rank_takes_its_gpu_before_free_memory_is_read(monkeypatch):
    """together() makes it current; the budget then reads the current GPU."""
    taken = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(ranks.dist, "rendezvous", lambda *_, **__: iter([(None, 1, 2)]))
    monkeypatch.setattr(ranks.dist, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(ranks.os, "_exit", taken.append)
    ranks.together(lambda: taken.append("main"))
    assert taken == [1, "main", 0]


@pytest.mark.parametrize("given, device", [({}, "cpu"), ({"device": "auto"}, "cuda"),
                                           ({"algo": "rlpt"}, "cpu")])
def test_the_embedded_worlds_run_on_the_cpu_unless_the_flag_says_otherwise(
        monkeypatch, given, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (80e9, 80e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretend")
    s, _ = resolve(given)
    assert pick_device(s.device)[0].type == device
    path = find_model(s.model)
    assert pick_device("auto", path) == (torch.device("cpu"), torch.float32)
    assert pick_device("cuda", path)[0].type == "cuda"
