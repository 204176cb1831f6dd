"""Log-probs of given tokens, without the logits of a whole batch: what the losses are made of.

    logp = log_probs(model, model(tokens)[rows, columns], targets)                         # (M,)

Shapes: M tokens of all completions laid end to end, D hidden size, V vocabulary.
"""
import math

import torch
from torch import Tensor

# Logits that log_probs holds at once: 67 MB in fp32 on a CPU, 268 MB on a GPU, which likes large
# products.
LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**26}


def wide(x: Tensor) -> Tensor:
    """fp32 where rounding matters (norms, RoPE, softmax);
    float64 stays, so that tests tell bugs from rounding."""
    return x if x.dtype == torch.float64 else x.float()


def log_probs(model, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the targets: (M, D), (M,) -> (M,) fp32."""
    width = chunk_width(len(targets), model.config.vocab_size, hidden.device.type)
    return ChunkedLogProbs.apply(hidden, model.head, targets, temperature, width)


def chunk_width(tokens: int, vocabulary: int, device: str) -> int:
    """Entries of the vocabulary whose logits for so many tokens are held at once."""
    fitting = LOGITS_PER_CHUNK.get(device, 2**24) // max(1, tokens)
    return min(vocabulary, -(-fitting // 64) * 64 or 64)                     # 64: aligned products


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(logits / temperature) at the targets, logits = hidden W^T, (M, D) -> (M,).

    The (M, V) logits of a step would be gigabytes (64 answers of 512 tokens, V 128,256: 16.8 GB in
    fp32). Here those of a chunk of the vocabulary are made, reduced to two numbers a token and
    overwritten by the next; the backward pass makes them again and turns them, in place, into the
    gradient, which is known: d logp / d logits[v] = ((v == target) - softmax[v]) / temperature.
    With the vocabulary cut and not the tokens, each row of W is read once and its gradient written
    once. Same values and gradients as in one piece:
    test_chunked_log_probs_equal_the_plain_ones.
    """

    @staticmethod
    def chunks(hidden, weight, targets, temperature, width):
        """Of each chunk of the vocabulary: its slice, the logits / temperature (M, width), where in
        it the targets are (M, 1), and of which tokens they are there (M, 1)."""
        # One piece of memory for all: new pages would cost a CPU a tenth of the time.
        memory = torch.empty(len(hidden), width, dtype=wide(hidden[:0]).dtype, device=hidden.device)
        for first in range(0, len(weight), width):
            chunk = slice(first, first + width)
            w = weight[chunk]                                                # (width, D)
            logits = memory[:, :len(w)]                                      # (M, width)
            if logits.dtype == hidden.dtype:
                torch.mm(hidden, w.t(), out=logits)
            elif hidden.is_cuda:         # sums of bfloat16 products, kept in fp32: Llama.logits
                torch.mm(hidden, w.t(), out_dtype=logits.dtype, out=logits)
            else:
                logits.copy_(hidden @ w.t())
            if temperature != 1:
                logits.div_(temperature)
            at = targets[:, None] - first                                    # (M, 1)
            yield chunk, logits, at.clamp(0, len(w) - 1), (0 <= at) & (at < len(w))

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, width):
        ctx.temperature, ctx.width = temperature, width
        chosen = wide(hidden.new_zeros(len(hidden), 1))                      # (M, 1)
        total = torch.full_like(chosen, -math.inf)                           # (M, 1)
        for _, x, at, here in ChunkedLogProbs.chunks(hidden, weight, targets, temperature, width):
            chosen = torch.where(here, x.gather(-1, at), chosen)
            top = x.amax(-1, keepdim=True)                                   # (M, 1)
            more = top + x.sub_(top).exp_().sum(-1, keepdim=True).log()      # logsumexp, in place
            total = torch.logaddexp(total, more)
        ctx.save_for_backward(hidden, weight, targets, total)
        return (chosen - total)[:, 0]                                        # (M,)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, total = ctx.saved_tensors
        grad_hidden = torch.zeros_like(wide(hidden))                         # (M, D), a sum: fp32
        grad_weight = torch.empty_like(weight)                               # (V, D)
        for chunk, x, at, here in ChunkedLogProbs.chunks(hidden, weight, targets, ctx.temperature,
                                                         ctx.width):
            # (M, width)   softmax - (v == target)
            p = x.sub_(total).exp_().scatter_add_(-1, at, -here.to(x.dtype))
            by_logits = p.mul_(-grad[:, None] / ctx.temperature).to(hidden.dtype)    # (M, width)
            grad_hidden += by_logits @ weight[chunk]
            torch.mm(by_logits.t(), hidden, out=grad_weight[chunk])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None
