"""From completions and advantages to the policy's gradient: rows, micro-batches, log-probs.

    sums = accumulate(game, [Row(prompt, completion, advantage), ...], weight)    # Eq. 4 or Eq. 5

What train.py's update() calls twice, once for the Solver's rows and once for the Challenger's.
Shapes: B rows of a micro-batch, L tokens of its longest row, T of its longest completion, M of all,
D hidden size.
"""
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

import lsp
from model import Llama
from sample import Completion, pad, take_batch


@dataclass
class Row:
    """A completion on its way into the loss; equal ones travel as one."""
    prompt: list[int]
    completion: Completion
    advantage: float         # the sum over its copies
    copies: int = 1


def merge(rows: list[Row]) -> list[Row]:
    """Equal rows as one, with their number and summed advantage: the same gradient, once."""
    merged = {}
    for row in rows:
        first = merged.setdefault((tuple(row.prompt), tuple(row.completion.tokens)),
                                  Row(row.prompt, row.completion, 0.0, 0))
        first.advantage += row.advantage
        first.copies += row.copies
    return list(merged.values())


def completion_logp(model: Llama, rows: list[Row], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the rows' completion tokens (B, T), 0 beyond their ends, and the mask (B, T)."""
    device = model.model.embed_tokens.weight.device
    tokens, lengths = pad([row.prompt + row.completion.tokens for row in rows], device)    # (B, L)
    start = torch.tensor([len(row.prompt) for row in rows], device=device)                 # (B,)
    longest = max(len(row.completion.tokens) for row in rows)
    mask = torch.arange(longest, device=device) < (lengths - start)[:, None]               # (B, T)
    b, t = mask.nonzero(as_tuple=True)                                                   # both (M,)
    at = start[b] + t                                          # (M,)   the token's place in its row
    hidden = model(tokens)[b, at - 1]                          # (M, D) the state before predicts it
    logp = model.log_probs(hidden, tokens[b, at], temperature=temperature)                 # (M,)
    return logp.new_zeros(mask.shape).index_put((b, t), logp), mask


def accumulate(game, rows: list[Row], weight: float) -> Counter:
    """Add the gradient of weight * (Eq. 4 or 5) over these rows to the policy's; return sums.

    The loss is normalised by the number of all rows before it is cut into micro-batches, so that
    their size changes nothing (test_micro_batch_size_changes_no_gradient).
    """
    s, sums = game.settings, Counter()
    count, rows = len(rows), merge(rows)
    length = lambda i: len(rows[i].prompt) + len(rows[i].completion.tokens)
    waiting = sorted(range(len(rows)), key=length)
    while waiting:
        taken = take_batch(waiting, length, [0] * len(rows), s.micro_batch_tokens)
        batch = [rows[i] for i in taken]
        logp, mask = completion_logp(game.policy, batch, s.temperature)                    # (B, T)
        ref_logp = None
        if s.beta:
            with torch.no_grad():
                ref_logp, _ = completion_logp(game.reference, batch, s.temperature)        # (B, T)
        advantages = logp.new_tensor([row.advantage for row in batch])                     # (B,)
        copies = logp.new_tensor([row.copies for row in batch])                            # (B,)
        if s.mask_truncated:
            stopped = logp.new_tensor([row.completion.stopped for row in batch])           # (B,)
            advantages, mask = advantages * stopped, mask & stopped.bool()[:, None]
            copies = copies * stopped
        loss, statistics = lsp.policy_loss(logp, ref_logp, advantages, mask, beta=s.beta, kl=s.kl,
                                           count=count, copies=copies)
        (weight * loss).backward()
        sampled, _ = pad([row.completion.logp for row in batch], logp.device, logp.dtype)  # (B, T)
        gap = ((logp.detach() - sampled).abs() * mask * copies[:, None]).sum()
        sums.update({k: v.item() for k, v in statistics.items()} | {
            "gap": gap.item(), "loss": loss.item()})
    return sums
