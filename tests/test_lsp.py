"""The equations of lsp.py against hand-worked numbers, finite differences and exact enumeration."""
import ast
from pathlib import Path

import pytest
import torch

import lsp

V = 5                               # vocabulary of the enumerated world: 25 sequences of two tokens


# ---------------------------------------------------------------- advantages, Eq. 2-3

def test_advantages_equal_hand_worked_numbers():
    # V = .5, 0, .75
    R = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert torch.allclose(lsp.solver_advantages(R), torch.tensor(
        [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, -0.75]]))
    mean = (0.5 + 0.0 + 0.75) / 3
    assert torch.allclose(
        lsp.challenger_advantages(R), torch.tensor([mean - 0.5, mean, mean - 0.75]))


def test_self_reward_is_added_for_the_solver_and_set_against_the_reward_for_the_challenger():
    R = torch.tensor([[1.0, 3.0], [0.0, 0.0]])                               # V   = 2, 0
    R_Q = torch.tensor([[7.0, 4.0], [2.0, 0.0]])                             # V_Q = 5.5, 1
    assert torch.allclose(lsp.solver_advantages(R, R_Q), torch.tensor([[0.5, -0.5], [1.0, -1.0]]))
    # S = 3.5, 1
    assert torch.allclose(lsp.challenger_advantages(R, R_Q), torch.tensor([1.25, -1.25]))


def test_self_reward_does_not_cancel_for_the_challenger():
    R, R_Q = torch.zeros(3, 2), torch.tensor([[7.0, 7.0], [3.0, 3.0], [0.0, 0.0]])
    assert lsp.challenger_advantages(R, R_Q)[0] > 3                # with V of R + R_Q it would be 0


def test_advantages_sum_to_zero_and_are_not_divided_by_the_standard_deviation():
    R = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert lsp.solver_advantages(R).sum(1).abs().max() < 1e-5
    assert lsp.challenger_advantages(R).sum().abs() < 1e-5
    assert torch.allclose(lsp.solver_advantages(10 * R), 10 * lsp.solver_advantages(R), atol=1e-5)


def test_one_answer_or_one_query_is_refused():
    with pytest.raises(ValueError, match="G >= 2"):
        lsp.solver_advantages(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="N >= 2"):
        lsp.challenger_advantages(torch.zeros(1, 4))


# ---------------------------------------------------------------- the loss, Eq. 4-5

def rows(seed=0, B=4, T=6):
    """Logits (B, T, V) in float64, tokens, a ragged mask, reference log-probs and advantages."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=g, dtype=torch.float64)
    tokens = torch.randint(0, V, (B, T, 1), generator=g)
    mask = torch.arange(T) < torch.tensor([6, 1, 4, 3])[:B, None]
    ref = torch.randn(B, T, V, generator=g, dtype=torch.float64).log_softmax(-1).gather(
        -1, tokens)[..., 0]
    return logits, tokens, mask, ref, torch.randn(B, generator=g, dtype=torch.float64)


def logp_of(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens)[..., 0]


@pytest.mark.parametrize("kl", lsp.KL_ESTIMATORS)
def test_without_advantages_the_loss_is_beta_times_the_kl(kl):
    """Its sign, its weight and its kind; and that what is logged is k3."""
    logits, tokens, mask, ref, A = rows()
    logp = logp_of(logits, tokens)
    loss, sums = lsp.policy_loss(logp, ref, 0 * A, mask, beta=0.3, kl=kl)
    assert torch.allclose(loss, 0.3 * lsp.kl_estimate(logp, ref, mask, kl).mean())
    assert torch.allclose(sums["kl"], lsp.kl_estimate(logp, ref, mask, "k3").sum())


def test_stop_gradient_ratio_has_the_policy_gradient():
    logits, tokens, mask, _, A = rows()
    logits.requires_grad_()
    loss, _ = lsp.policy_loss(logp_of(logits, tokens), None, A, mask, beta=0.0)
    assert torch.allclose(loss, -A.mean())                               # every ratio is 1 in value
    loss.backward()
    # The policy gradient -1/B sum_b A_b grad log pi(a_b), log pi the sum over the tokens,
    # by central differences.
    expected, step = torch.zeros_like(logits), 1e-5
    objective = lambda x: -(A * (logp_of(x, tokens) * mask).sum(-1)).mean()
    with torch.no_grad():
        for i in range(logits.numel()):
            shift = torch.zeros(logits.numel(), dtype=torch.float64)
            shift[i] = step
            shift = shift.view_as(logits)
            expected.view(-1)[i] = (
                objective(logits + shift) - objective(logits - shift)) / (2 * step)
    assert (logits.grad - expected).abs().max() < 1e-8
    assert logits.grad[~mask].abs().max() == 0                               # padding moves nothing


def test_the_loss_is_not_normalised_by_length():
    logits, tokens, mask, _, _ = rows()
    logits.requires_grad_()
    A = torch.ones(4, dtype=torch.float64)
    lsp.policy_loss(logp_of(logits, tokens), None, A, mask, beta=0.0)[0].backward()
    # |d log pi / d its own logit|
    per_token = 1 - logits.detach().softmax(-1).gather(-1, tokens)[..., 0]
    own = logits.grad.gather(-1, tokens)[..., 0]
    assert torch.allclose(own, -per_token * mask / 4)  # 1/B for every token, in long rows and short


@pytest.mark.parametrize("kl", lsp.KL_ESTIMATORS)
def test_micro_batches_add_up_to_the_whole_batch(kl):
    logits, tokens, mask, ref, A = rows()
    gradients = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]):
        x = logits.clone().requires_grad_()
        for part in parts:
            lsp.policy_loss(logp_of(x, tokens)[part], ref[part], A[part], mask[part], beta=0.3,
                            kl=kl, count=4)[0].backward()
        gradients.append(x.grad)
    assert all(torch.allclose(gradients[0], g, rtol=0, atol=1e-14) for g in gradients[1:])


@pytest.mark.parametrize("kind, earned", [
    ("r-zero", [0.0, 0.5, 1.0, 0.0]), ("absolute-zero", [0.0, 0.25, 0.5, 0.0]),
    ("spice", [0.04394, 0.82258, 1.0, 0.04394])])   # exp(-(3/16 - 1/4)^2 / .02) = exp(-.1953125)
def test_other_challenger_rewards_equal_hand_worked_numbers(kind, earned):
    R = torch.tensor([[1.0] * 4, [1, 1, 1, 0], [1, 0, 1, 0], [0] * 4])      # p = 1, 3/4, 1/2, 0
    assert lsp.challenger_reward(R, kind).tolist() == pytest.approx(earned, abs=1e-5)
    earned, R_Q = 5 * torch.tensor(earned), torch.tensor([[7.0], [6], [7], [0]]).expand(4, 4)
    assert torch.allclose(lsp.challenger_advantages(5 * R, None, kind=kind, scale=5.0),
                          earned - earned.mean(), atol=1e-4)
    judged = earned + R_Q[:, 0]                                              # V_Q is added
    assert torch.allclose(lsp.challenger_advantages(5 * R, R_Q, kind=kind, scale=5.0),
                          judged - judged.mean(), atol=1e-4)


def test_a_penalty_is_subtracted_from_the_challengers_reward_before_the_baseline():
    R = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])                  # -V: -.5, 0, -1
    A = lsp.challenger_advantages(R, penalty=torch.tensor([0.0, 1.5, 0.0]))      # -.5, -1.5, -1
    assert torch.allclose(A, torch.tensor([0.5, -0.5, 0.0]))


def test_what_lies_beyond_a_rows_end_is_never_read():
    logits, tokens, mask, ref, A = rows()
    logp = logp_of(logits, tokens)
    junk = torch.where(mask, logp, torch.nan), torch.where(mask, ref, -torch.inf)
    for kl in lsp.KL_ESTIMATORS:
        clean = lsp.policy_loss(logp, ref, A, mask, beta=0.3, kl=kl)[0]
        assert torch.equal(clean, lsp.policy_loss(*junk, A, mask, beta=0.3, kl=kl)[0])


def test_statistics_are_sums_over_sequences():
    logits, tokens, mask, ref, A = rows()
    logp = logp_of(logits, tokens)
    _, sums = lsp.policy_loss(logp, ref, A, mask, beta=0.1)
    d = (logp - ref)[mask]
    assert torch.allclose(sums["kl"], (torch.exp(-d) - 1 + d).sum())
    assert torch.allclose(sums["logp"], logp[mask].sum())
    assert (sums["tokens"].item(), sums["sequences"].item()) == (14, 4)


# ---------------------------------------------------------------- KL estimators
# All sequences of two tokens.

class World:
    """A policy over sequences (x, y) with free logits for x and for y after each x,
    and a reference."""

    def __init__(self):
        g = torch.Generator().manual_seed(3)
        self.first, self.second = (
            torch.randn(*n, V, generator=g, dtype=torch.float64).requires_grad_()
            for n in ((1,), (V,)))
        self.ref_first, self.ref_second = (
            torch.randn(*n, V, generator=g, dtype=torch.float64).log_softmax(-1)
            for n in ((1,), (V,)))
        self.x, self.y = (
            i.reshape(-1) for i in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))

    def logp(self):                                                # (V * V, 2): every sequence once
        return torch.stack([self.first.log_softmax(-1)[0, self.x],
                            self.second.log_softmax(-1)[self.x, self.y]], -1)

    def ref_logp(self):
        return torch.stack([self.ref_first[0, self.x], self.ref_second[self.x, self.y]], -1)

    def gradient(self, scalar):
        return torch.cat([
            g.reshape(-1) for g in torch.autograd.grad(scalar, (self.first, self.second))])

    def expected(self, kind):
        """E_{sequence ~ pi}[estimate] with the sampling probabilities held fixed:
        what the loss sees."""
        logp = self.logp()
        weight = logp.sum(-1).exp().detach()                                 # pi(x, y)
        return (weight * lsp.kl_estimate(logp, self.ref_logp(), torch.ones_like(logp), kind)).sum()

    def sequence_kl(self):                                     # exact, differentiable in everything
        logp = self.logp()
        return (logp.sum(-1).exp() * (logp - self.ref_logp()).sum(-1)).sum()

    def fixed_prefix_kl(self, forward):
        """Sum over prefixes of pi(prefix), held fixed,
        times the KL of the next-token distributions."""
        total = 0
        prefix = torch.cat([torch.ones(1), self.first.softmax(-1)[0].detach()])
        for weight, ours, theirs in zip(
                prefix, torch.cat([self.first, self.second]).log_softmax(-1),
                torch.cat([self.ref_first, self.ref_second])):
            kl = ((theirs.exp() * (theirs - ours)).sum() if forward
                  else (ours.exp() * (ours - theirs)).sum())
            total = total + weight * kl
        return total


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_printed_kl_term_has_zero_expected_gradient():
    world = World()
    assert world.gradient(world.expected("paper")).abs().max() < 1e-15
    # While there is something to pull back.
    assert world.gradient(world.sequence_kl()).abs().max() > 0.05


def test_k2_seq_has_the_gradient_of_the_sequences_reverse_kl():
    world = World()
    assert relative(
        world.gradient(world.expected("k2-seq")), world.gradient(world.sequence_kl())) < 1e-12


def test_k2_has_the_gradient_of_the_next_token_reverse_kl_at_fixed_prefixes_and_no_other():
    world = World()
    k2 = world.gradient(world.expected("k2"))
    assert relative(k2, world.gradient(world.fixed_prefix_kl(forward=False))) < 1e-12
    assert relative(k2, world.gradient(world.sequence_kl())) > 0.1


def test_k3_has_the_gradient_of_the_next_token_forward_kl_at_fixed_prefixes():
    world = World()
    k3 = world.gradient(world.expected("k3"))
    assert relative(k3, world.gradient(world.fixed_prefix_kl(forward=True))) < 1e-12
    assert relative(k3, world.gradient(world.fixed_prefix_kl(forward=False))) > 0.1


def test_paper_and_k3_are_unbiased_values_of_the_sequences_reverse_kl():
    world = World()
    exact = world.sequence_kl()
    for kind in ("paper", "k3"):
        assert abs(world.expected(kind) - exact) < 1e-12
    logp = world.logp()
    assert (lsp.kl_estimate(logp, world.ref_logp(), torch.ones_like(logp), "k3") >= 0).all()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k2-seq"):
        lsp.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "k1")


def test_lsp_imports_torch_only():
    imported = set()
    for node in ast.walk(ast.parse(Path(lsp.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
    assert imported == {"torch"}
