"""Exercise 7, 30 minutes: log-probs without the logits' memory.

Read first: torch.utils.checkpoint, and recomputed in model.py. In this file that function is called
llama.recomputed, because `model` is the Llama at hand.

A step of 64 answers of 512 tokens with Llama's vocabulary of 128,256 has 16.8 GB of logits in fp32,
and the loss needs one number a token of them. Make the logits of at most 1,000 tokens at a time,
reduce them to their log-probs, drop them, and make them again in the backward pass.

    model.logits(hidden)    (m, D) -> (m, V) fp32
    hidden                  (M, D), M is large
    targets                 (M,)
    returns                 log softmax(logits / temperature) at the targets, (M,)

Afterwards compare with plumbing.logprobs.log_probs, which cuts the vocabulary in place of the
tokens, and writes the backward pass out.
"""
import torch

import model as llama
from plumbing.files import find_model


def log_probs(model, hidden, targets, *, temperature=1.0):
    raise NotImplementedError("return the log-probs of 2,500 tokens, and never hold the logits of "
                              "more than 1,000")


# ---------------------------------------------------------------- the check

def check(log_probs=log_probs):
    model = llama.load_model(find_model("tiny"))
    V, D, sizes, saved = model.config.vocab_size, model.config.hidden_size, [], []
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2500, D, generator=generator)                       # (M, D)
    targets = torch.randint(0, V, (2500,), generator=generator)              # (M,)
    plain = hidden.clone().requires_grad_()
    wanted = (model.logits(plain) / 0.7).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    wanted.sum().backward()
    by_head, model.head.grad = model.head.grad, None                         # (V, D)

    def counted(x, weight):                  # what all logits come from: how many tokens at once?
        sizes.append(len(x) if len(weight) == V else 0)
        return multiply(x, weight)

    multiply, llama.product = llama.product, counted
    hidden.requires_grad_()
    try:
        keep = lambda x: saved.append(x.numel() if x.shape[-1:] == (V,) else 0) or x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            found = log_probs(model, hidden, targets, temperature=0.7)
        assert found.requires_grad, "no gradient reaches hidden: something is detached"
        assert found.shape == (2500,), f"(2500,) is wanted, found {tuple(found.shape)}"
        most = max(sizes, default=0)         # 0: they came by another way
        assert most <= 1000, f"logits of {most} tokens at once: at most 1,000"
        at_one = log_probs(model, hidden[:5], targets[:5])
        assert not torch.allclose(found[:5], at_one), (
            "the temperature has no effect: logits / temperature, before the softmax")
        assert torch.allclose(found, wanted, atol=1e-4), (
            "not the log-probs of the targets; log softmax(x)[t] = x[t] - logsumexp(x)")
        assert sum(saved) < V * 900, (
            "the logits are kept for the backward pass, so that in the end all of them are held: "
            "wrap the work on a chunk in llama.recomputed")
        found.sum().backward()
    finally:
        llama.product = multiply
    assert torch.allclose(hidden.grad, plain.grad, atol=1e-4), (
        "right values, wrong gradient: is something detached?")
    assert model.head.grad is not None and torch.allclose(model.head.grad, by_head, atol=1e-3), (
        "the gradient of hidden is right, that of the head is not: is it detached?")
    return "the same values and gradients; memory for 1,000 tokens' logits, however many there are"
