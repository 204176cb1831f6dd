"""Work that is shared, departures and captured steps change no result, and are really saved."""
from collections import Counter

import pytest
import torch
from checkpoints import random_llama

import rewards
import sample as sampling
from plumbing import cache
from plumbing.cache import shared_forward
from plumbing.settings import Settings
from sample import Completion, pick, sample
from train import Game, Row, accumulate

PROMPTS = [[5, 1, 9, 30, 2, 2, 8], [3], [7, 7, 7, 7, 12, 0, 4, 33, 21, 6, 11]]


def random_lists(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 37, (n,), generator=g).tolist() for n in lengths]


def count_tokens(model):
    """The widths of the token matrices that enter the model, as they come."""
    shapes = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


# ---------------------------------------------------------------- training

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama3_tied", "head_dim", "untied"])
def test_shared_prompts_have_the_gradients_of_whole_rows(kind, checkpointing):
    model = random_llama(kind, dtype=torch.float64)
    which, rests = [0, 0, 2, 1, 2, 0], random_lists([5, 0, 9, 1, 3, 4])
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 10, model.config.hidden_size, generator=g, dtype=torch.float64)

    model.checkpointing = checkpointing
    hidden = shared_forward(model, PROMPTS, which, rests)
    sum((h[:len(rest) + 1] * w[:len(rest) + 1]).sum()
        for h, rest, w in zip(hidden, rests, weight)).backward()
    shared = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    model.checkpointing = False
    for row, rest, ours, w in zip(which, rests, hidden, weight):          # each row alone and whole
        whole = model(torch.tensor([PROMPTS[row] + rest]))[0, len(PROMPTS[row]) - 1:]
        assert (whole - ours[:len(rest) + 1]).abs().max() < 1e-12
        (whole * w[:len(rest) + 1]).sum().backward()
    for name, gradient in shared.items():
        plain = dict(model.named_parameters())[name].grad
        assert (gradient - plain).norm() / plain.norm() < 1e-9, name


def test_gradients_of_rests_do_not_wait_for_those_of_prompts(llama):
    """In one backward pass each weight's would be handed over once, when both are there."""
    counts = Counter()
    for name, p in llama.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: counts.update([name]))
    shared_forward(llama, PROMPTS, [0, 0, 2], random_lists([5, 2, 9])).sum().backward()
    layers = llama.config.num_hidden_layers
    for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        assert [counts[f"model.layers.{i}.{name}.weight"] for i in range(layers)] == [2] * layers


def test_a_micro_batch_runs_each_prompt_once(llama):
    shapes = count_tokens(llama)
    rows = [Row(prompt, Completion(tokens, [-1.0] * len(tokens), True), 0.5)
            for prompt, tokens in zip(PROMPTS * 4, random_lists([6] * 12))]
    s = Settings(model="random", beta=0.0)
    accumulate(Game(s, llama, None, None), rows, 1.0)
    assert shapes == [(3, 11), (12, 5)]


def test_checkpointing_keeps_a_fraction_of_the_activations(llama):
    tokens = torch.tensor(random_lists([60] * 4))
    kept = {}
    for llama.checkpointing in (False, True):
        storages = {}

        def note(x, held=storages):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            hidden = llama(tokens)
        kept[llama.checkpointing] = sum(storages.values())
        del hidden
    assert kept[True] < kept[False] / 3


# ---------------------------------------------------------------- rewards

def test_pairs_of_one_query_share_it_and_score_as_alone():
    model = random_llama("scalar_head", dtype=torch.float64)
    rows = [PROMPTS[i % 3] + rest for i, rest in enumerate(random_lists([4, 2, 6, 1, 1, 8, 3]))]
    rows += [rows[0]]                                                     # the same pair once more
    groups = [i % 3 for i in range(7)] + [0]
    alone = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
    shapes = count_tokens(model)
    together = rewards.last_hidden(model, rows, groups, 1000)
    assert (alone - together).abs().max() < 1e-12
    assert shapes == [(3, 11), (8, 8)]
    in_parts = rewards.last_hidden(model, rows, groups, 20)
    assert (alone - in_parts).abs().max() < 1e-12


# ---------------------------------------------------------------- sampling

def completions(model, prompts, **changes):
    settings = {"num_samples": 4, "max_new_tokens": 21, "stop_ids": {4, 17},
                "generator": torch.Generator().manual_seed(3)} | changes
    return [c for group in sample(model, prompts, **settings) for c in group]


def assert_same(ours, theirs):
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    assert [c.stopped for c in ours] == [c.stopped for c in theirs]
    for a, b in zip(ours, theirs):
        assert (torch.tensor(a.logp) - torch.tensor(b.logp)).abs().max() < 1e-6


def test_what_all_prompts_begin_with_is_run_once_and_changes_no_result(llama, monkeypatch):
    (rubric,) = random_lists([40], seed=5)
    prompts = [rubric + prompt for prompt in PROMPTS] + [rubric]
    alone = [c for i, prompt in enumerate(prompts) for c in completions(
        llama, [[1]] * i + [prompt] + [[1]] * (3 - i))[4 * i:4 * i + 4]]     # the same seeds
    shapes = count_tokens(llama)
    assert_same(completions(llama, prompts), alone)
    # One token fewer than the shortest prompt has: what predicts must be a row's own.
    assert shapes[:2] == [(1, 39), (4, 12)]
    monkeypatch.setattr(cache, "PREFILL_TOKENS", 25)                      # two prompts at a time
    shapes.clear()
    assert_same(completions(llama, prompts), alone)
    assert shapes[:3] == [(1, 39), (2, 2), (2, 12)]     # the shortest two first


class Replayed:
    """A captured step without a GPU: fixed addresses and reach, the step itself run in Python."""
    made = 0

    def __init__(self, model, cache):
        cache.fixed = True
        Replayed.made += 1
        self.model, self.cache, self.token = model, cache, torch.zeros_like(cache.lengths)[:, None]
        self.addresses = [x.data_ptr() for x in (*cache.k, *cache.v, cache.lengths)]

    def __call__(self, token):
        self.token.copy_(token[:, None])
        held = self.cache
        assert self.addresses == [x.data_ptr() for x in (*held.k, *held.v, held.lengths)]
        return self.model.logits(self.model(self.token, cache=held)[:, -1])


@pytest.mark.parametrize("cost", [1, 10**6])         # rows leave when half may go, and never
@pytest.mark.parametrize("limits", [21, [3, 21, 20, 1, 2, 9, 8, 21, 5, 5, 5, 16]])
def test_captured_steps_with_late_departures_and_fixed_reach_change_no_result(
        llama, limits, cost, monkeypatch):
    expected = completions(llama, PROMPTS, max_new_tokens=limits)
    monkeypatch.setattr(sampling, "uses_graphs", lambda device: True)
    monkeypatch.setattr(sampling, "CapturedStep", Replayed)
    monkeypatch.setattr(sampling, "REACH", 8)
    monkeypatch.setattr(sampling, "STRETCH", 3)
    monkeypatch.setattr(sampling, "CAPTURE_COST", cost)
    Replayed.made = 0
    assert_same(completions(llama, PROMPTS, max_new_tokens=limits), expected)
    # Three for the growing cache, and not one for every step.
    assert Replayed.made == 3 if cost > 1 else 3 < Replayed.made < 21


@pytest.mark.parametrize("V", [37, 128, 1000])
def test_pick_in_blocks_equals_the_plain_inverse(V):
    g = torch.Generator().manual_seed(V)
    logits = 4 * torch.randn(2000, V, generator=g)
    logits[:, V // 3:V // 2] = -torch.inf                                 # no probability at all
    logits[:, -2:] = -torch.inf
    logits[1000:, :V // 3] = -torch.inf
    uniform = torch.rand(2000, generator=g, dtype=torch.float64)
    uniform[::7], uniform[1::7] = 0.0, 1 - 2**-53
    token, logp = pick(logits, 1.0, uniform)
    assert logp.isfinite().all()                                # never a token that cannot be drawn
    ends = logits.log_softmax(-1).exp().double().cumsum(-1)               # (2000, V)
    aim = uniform * ends[:, -1]
    rows = torch.arange(2000)
    low = torch.where(token > 0, ends[rows, (token - 1).clamp(min=0)], 0.0)
    # Block sums are fp32, as the probabilities are.
    assert ((low <= aim + 1e-6) & (aim <= ends[rows, token] + 1e-6)).all()
