"""Exercise 4, 30 minutes: three KL estimators, and what each one does as a loss.

Read first: nothing.

Write three estimates of KL(pi || pi_Ref) at sampled tokens, with d = log pi - log pi_Ref:

    kind "paper"   sum_t d_t                        as Eq. 4-5 print it
    kind "k2"      sum_t d_t^2 / 2
    kind "k3"      sum_t exp(-d_t) - 1 + d_t

logp, ref_logp and mask are (B, T); return (B,). All three are small when pi is near pi_Ref. But a
loss does not act by its value. Before you run the check, write down what each one's gradient is on
average over samples from pi; the check enumerates all tokens of a small vocabulary and tells you.
Afterwards compare with lsp.kl_estimate.
"""
import torch


def kl_estimate(logp, ref_logp, mask, kind):
    raise NotImplementedError("return the sum over the mask of the estimate named by kind, (B,)")


# ---------------------------------------------------------------- the check

def expected_gradient(kl_estimate, kind, logits, ref):
    """E over x ~ pi of the gradient of kl_estimate at x, (V,): every x taken with its
    probability."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)                                            # (V,)
    each = kl_estimate(logp[:, None], ref[:, None], torch.ones(len(ref), 1).bool(), kind)   # (V,)
    assert each.requires_grad, f"{kind}: no gradient reaches logp; something is detached"
    return torch.autograd.grad((logp.detach().exp() * each).sum(), logits)[0]


def check(kl_estimate=kl_estimate):
    logp = torch.tensor([[-1.0, -2.0, 9.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -1.0, -9.0]], dtype=torch.float64)            # d = .5, -1, padding
    mask = torch.tensor([[True, True, False]])
    right = {"paper": -0.5, "k2": 0.625, "k3": 0.60653 - 0.5 + 2.71828 - 2}
    for kind, value in right.items():
        found = kl_estimate(logp, ref, mask, kind)
        assert isinstance(found, torch.Tensor), f"kind {kind!r} returned {found}"
        assert found.shape == (1,), f"{kind}: one number a sequence, found {tuple(found.shape)}"
        two = kl_estimate(logp.expand(2, 3), ref.expand(2, 3), mask.expand(2, 3), kind)
        assert two.shape == (2,) and two[0] == found[0], (
            f"{kind}: two sequences give two numbers, each of its own tokens")
        turned = kl_estimate(ref, logp, mask, kind)
        assert abs(found.item()) < 5, f"{kind}: the padding outside the mask is counted"
        assert abs(found.item() - value) < 1e-4 or abs(turned.item() - value) > 1e-4, (
            f"{kind}: d is log pi - log pi_Ref, yours is the other way round")
        assert kind != "k2" or abs(found.item() - 0.125) > 1e-4, (
            "k2: the sum was squared (that is k2-seq); square each d_t, then sum")
        assert abs(found.item() - value / 2) > 1e-4, (
            f"{kind}: a mean over the two tokens; it has to be their sum")
        assert abs(found.item() - value) < 1e-4, (
            f"{kind}: for d = .5 and -1 expected {value:.4f}, found {found.item():.4f}")
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logref = other.log_softmax(-1)
    x = logits.clone().requires_grad_()
    p, q = x.log_softmax(-1), logref
    pull = {"k2": torch.autograd.grad((p.exp() * (p - q)).sum(), x)[0],
            "k3": torch.autograd.grad((q.exp() * (q - x.log_softmax(-1))).sum(), x)[0],
            "paper": torch.zeros(6, dtype=torch.float64)}
    for kind, gradient in pull.items():
        found = expected_gradient(kl_estimate, kind, logits, logref)
        assert torch.allclose(found, gradient), (
            f"{kind}: the values are right and the expected gradient is not; is something detached "
            "that should not be?")
    return ("expected gradients: paper exactly 0 (noise, no pull); k2 that of KL(pi || pi_Ref), "
            "k3 that of KL(pi_Ref || pi)")
