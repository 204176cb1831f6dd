"""From completions and advantages to the policy's gradient: rows, micro-batches, log-probs.

    rows = [Row(prompt, completion, advantage), ...]
    refer(game, rows)                                  # log-probs under the reference, for the KL
    sums = accumulate(game, rows, weight)              # Eq. 4 or Eq. 5

What train.py's update() calls twice, once for the Solver's rows and once for the Challenger's.
Shapes: B rows of a micro-batch, T tokens of its longest completion, M of all completions, D hidden
size.
"""
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import lsp
from game import Game
from model import Llama
from plumbing.cache import pad, shared_forward
from plumbing.logprobs import log_probs
from plumbing.memory import MasterAdamW
from sample import Completion, take_batch


@dataclass
class Row:
    """A completion on its way into the loss; equal ones travel as one."""
    prompt: list[int]
    completion: Completion
    advantage: float         # the sum over its copies
    copies: int = 1
    ref_logp: list[float] | None = None      # one a token, from refer()

    @property
    def text(self) -> tuple:
        return tuple(self.prompt), tuple(self.completion.tokens)


def merge(rows: list[Row]) -> list[Row]:
    """Equal rows as one, with their number and summed advantage: the same gradient, once."""
    merged = {}
    for row in rows:
        first = merged.setdefault(row.text, Row(row.prompt, row.completion, 0.0, 0, row.ref_logp))
        first.advantage += row.advantage
        first.copies += row.copies
    return list(merged.values())


def completion_logp(model: Llama, rows: list[Row], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the rows' completion tokens (B, T), 0 beyond their ends, and the mask (B, T)."""
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
    which = [prompts.index(tuple(row.prompt)) for row in rows]
    # The last token, a stop token or where the limit cut, predicts nothing that is asked for.
    rests = [row.completion.tokens[:-1] for row in rows]
    hidden = shared_forward(model, prompts, which, rests)                                # (B, T, D)
    tokens, lengths = pad([row.completion.tokens for row in rows], "cpu")                  # (B, T)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]                                # (B, T)
    # Chosen by number, and counted on the host: a mask on the GPU would have to be waited for.
    at = mask.flatten().nonzero()[:, 0].to(hidden.device)                                  # (M,)
    logp = log_probs(model, hidden.flatten(0, 1)[at], tokens[mask].to(hidden.device),
                     temperature=temperature)                                              # (M,)
    padded = logp.new_zeros(mask.numel()).scatter(0, at, logp).view(mask.shape)            # (B, T)
    return padded, mask.to(hidden.device)


def room(rows: list[Row]) -> int:
    """The padded tokens of a pass over rows: distinct prompts, and completions."""
    prompts = {tuple(row.prompt) for row in rows}
    return (len(prompts) * max(map(len, prompts))
            + len(rows) * max(len(row.completion.tokens) for row in rows))


def micro_batches(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    """The rows, equal ones merged, in passes of so many padded tokens. Completions of like length
    go together, for little padding; those of one prompt stay neighbours and share it."""
    waiting = sorted(merge(rows), key=lambda row: len(row.completion.tokens))
    while waiting:
        yield take_batch(waiting, room, tokens)


@torch.no_grad()
def refer(game: Game, rows: list[Row]):
    """Note in each row its completion's log-probs under the reference.

    A pass of its own before the update's, so that the reference need not be on the GPU with the
    gradients; in the same micro-batches, so that both sides of the KL round alike.
    """
    batches = list(micro_batches(rows, game.settings.micro_batch_tokens))
    scored = [completion_logp(game.reference, batch, game.settings.temperature)[0]         # (B, T)
              for batch in batches]
    known = {row.text: line[:len(row.completion.tokens)]
             for batch, logp in zip(batches, scored) for row, line in zip(batch, logp.tolist())}
    for row in rows:
        row.ref_logp = known[row.text]


def accumulate(game: Game, rows: list[Row], weight: float, count: int | None = None) -> Counter:
    """Add the gradient of weight * (Eq. 4 or 5) over these rows to the policy's; return sums.

    With beta above 0, refer() has been here before. The loss is normalised by the number of all
    rows before it is cut into micro-batches, so that their size changes nothing
    (test_micro_batch_size_changes_no_gradient). count: all rows of the step, where these are one
    rank's (default: these are all).
    """
    s, sums = game.settings, Counter()
    count = len(rows) if count is None else count
    for batch in micro_batches(rows, s.micro_batch_tokens):
        logp, mask = completion_logp(game.policy, batch, s.temperature)                    # (B, T)
        ref_logp = None
        if s.beta:
            ref_logp, _ = pad([row.ref_logp for row in batch], logp.device, logp.dtype)    # (B, T)
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
        sums.update(statistics | {"gap": gap, "loss": loss.detach()})
    if not sums:
        return sums
    values = torch.stack(list(sums.values())).tolist()       # the only wait for the GPU's results
    return Counter(dict(zip(sums, values)))


# ---------------------------------------------------------------- numbers that are not finite

def unsound(r) -> list[dict]:
    """Samples of a train.Round with a reward or log-prob that is not finite.

    A sample is a query of the step and an answer to it (None: the query itself), counted from 1 in
    the order of samples.jsonl.
    """
    faults = []
    finite = lambda row: math.isfinite(sum(row.logp))
    for n in r.kept.nonzero()[:, 0].tolist():
        if r.query_rows and not finite(r.query_rows[n]):
            faults.append({"query": n + 1, "answer": None, "what": "log-prob"})
        for g, (row, reward) in enumerate(zip(r.answer_rows[n], r.R[n].tolist()), 1):
            if not math.isfinite(reward) or not finite(row):
                what = "log-prob" if math.isfinite(reward) else "reward"
                faults.append({"query": n + 1, "answer": g, "what": what})
    return faults


def culprits(game: Game, optimizer: MasterAdamW, kept: list[int], solver: list[Row],
             challenger: list[Row]) -> list[dict]:
    """Which samples made the loss or the gradient non-finite: each differentiated alone.
    There may be none: it can be their sum that overflows."""
    G, faults = game.settings.answers, []
    samples = [(kept[i // G], i % G + 1, row) for i, row in enumerate(solver)]
    samples += [(n, None, row) for n, row in zip(kept, challenger)]
    for n, answer, row in samples:
        optimizer.discard()
        sums = accumulate(game, [row], 1.0)
        finite = {"log-prob": sums["logp"], "loss": sums["loss"],
                  "gradient": optimizer.gradient_norm()}
        what = next((what for what, value in finite.items() if not math.isfinite(value)), None)
        if what:
            faults.append({"query": n + 1, "answer": answer, "what": what})
    optimizer.discard()
    return faults
