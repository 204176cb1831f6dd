"""Exercise 3, 20 minutes: the ratio whose value is always 1.

Read first: PyTorch's Tensor.detach. README.md and lsp.py show the solution: close them.

Eq. 4 without its KL term, for B sequences of at most T tokens:

    loss = -1/B sum_b  pi(a_b) / sg(pi(a_b)) * A_b             sg: stop-gradient

pi(a_b) is the probability of the whole sequence: the product over the tokens inside the mask.

    logp        (B, T)   log-probs of the sampled tokens; outside the mask they mean nothing
    advantages  (B,)
    mask        (B, T)   bool, True on the sequence's own tokens
    returns     the loss, a scalar

Leave ref_logp and beta aside (here None and 0). Afterwards compare with lsp.policy_loss.
"""
import torch


def policy_loss(logp, ref_logp, advantages, mask, *, beta):
    raise NotImplementedError("return the loss, a scalar")


# ---------------------------------------------------------------- the check

def check(policy_loss=policy_loss):
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(3, 5, generator=generator, dtype=torch.float64)               # (B, T)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]                        # (B, T)
    A = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)                          # (B,)
    logp.requires_grad_()
    loss = policy_loss(logp, None, A, mask, beta=0.0)
    loss = loss[0] if isinstance(loss, tuple) else loss            # the product's has statistics
    assert loss.dim() == 0, f"the loss is one number, found shape {tuple(loss.shape)}"
    assert loss.requires_grad, (
        "no gradient reaches logp: only the denominator of the ratio is to be detached")
    (gradient,) = torch.autograd.grad(loss, logp)
    wanted = -(A[:, None] * mask) / 3
    assert gradient.abs().max() > 0, (
        "the gradient is zero: the ratio's two halves cancel. Detach one of them, the denominator")
    assert not gradient[~mask].any(), (
        "tokens outside the mask have a gradient: padding is being trained")
    assert torch.allclose(gradient.sign(), wanted.sign()), (
        "the gradient has the wrong sign: the optimiser goes down, a good answer must become "
        "likelier, so the loss carries a minus, and it is the denominator that is detached")
    assert not torch.allclose(gradient, wanted / mask.sum(-1, keepdim=True)), (
        "the gradient is divided by the sequence's length: log pi(a) is the sum over the tokens, "
        "not their mean")
    assert not torch.allclose(gradient, -(A[:, None] * mask) / mask.sum()), (
        "a mean over all tokens of the batch, as many GRPO codes take it: Eq. 4 sums over tokens "
        "and takes the mean over sequences")
    assert not torch.allclose(gradient * 3, wanted), "divided by B twice"
    assert not torch.allclose(gradient, 3 * wanted), "a sum over sequences: take the mean"
    assert torch.allclose(gradient, wanted), (
        f"d loss / d logp must be -A / B on every token of the sequence; for the first one, with "
        f"A = 1, that is -0.333, found {gradient[0, 0]:.3f}")
    assert not torch.allclose(loss, -(A * mask.sum(-1)).mean()), (
        "the gradient is right and the value is not: this is one ratio a token. Eq. 4 has one "
        "ratio a sequence")
    assert torch.allclose(loss, -A.mean()), (
        f"the gradient is right and the value is not: the ratio is 1, so the loss is -mean(A) = "
        f"{-A.mean():.3f}, found {loss:.3f}")
    long = torch.full((1, 1000), -1.0, dtype=torch.float64, requires_grad=True)
    loss = policy_loss(long, None, A[:1], torch.ones_like(long).bool(), beta=0.0)
    loss = loss[0] if isinstance(loss, tuple) else loss
    assert loss.isfinite(), (
        "right, but not for an answer of 1,000 tokens: its probability, e^-1000, is 0 to a float, "
        "and 0 / 0 is no number. Subtract the logs before you take exp")
    return "value -mean(A), which is 0 for group advantages; gradient -A/B grad log pi(a)"
