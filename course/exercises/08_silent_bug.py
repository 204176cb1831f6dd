"""Exercise 8, 30 minutes: find the silent bug.

Read first: sample.py (Completion). A row is a prompt's token ids and a completion.

The function below runs, its log-probs agree with the sampler's, and training with it looks well.
One line is wrong. Delete the line that raises, and grade: the check tells you a symptom. Find the
cause and mend it, then compare with train.token_log_probs. It is a bug that
public code has shipped.
"""
import torch

from model import load_model
from plumbing.chat import Tokenizer
from plumbing.files import find_model
from plumbing.logprobs import log_probs
from sample import Completion, sample
from train import Row


def token_log_probs(model, rows, temperature):
    """Log-probs of the rows' completion tokens (B, T), and the mask (B, T) of those that are in
    the loss. Rows are padded on the right."""
    raise NotImplementedError("delete this line, grade again, and find the wrong line")
    eos = model.raw_config["eos_token_id"]
    whole = [row.prompt + row.completion.tokens for row in rows]
    tokens = torch.full((len(rows), max(map(len, whole))), eos)              # (B, S)
    for line, ids in zip(tokens, whole):
        line[:len(ids)] = torch.tensor(ids)
    hidden, targets = model(tokens[:, :-1]), tokens[:, 1:]                   # what predicts what
    logp = log_probs(model, hidden.flatten(0, 1), targets.flatten(), temperature=temperature)
    logp = logp.view(targets.shape)                                          # (B, S - 1)
    T = max(len(row.completion.tokens) for row in rows)
    out, mask = logp.new_zeros(len(rows), T), torch.zeros(len(rows), T, dtype=torch.bool)
    for n, row in enumerate(rows):
        start = len(row.prompt) - 1                  # predicts the completion's first token
        part = targets[n, start:start + T]
        out[n, :len(part)] = logp[n, start:start + T]
        mask[n, :len(part)] = part != eos
    return out * mask, mask


# ---------------------------------------------------------------- the check

def check(token_log_probs=token_log_probs):
    path = find_model("tiny")
    model, tokenizer = load_model(path), Tokenizer(path)
    queries = ["What is 37 + 48?", "What is 99 + 99?", "What"]
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    said = sample(model, prompts, max_new_tokens=[8, 2, 8], stop_ids=tokenizer.stop_ids,
                  generator=torch.Generator().manual_seed(0))
    rows = [Row(prompt, completion, 1.0) for prompt, (completion,) in zip(prompts, said)]
    logp, mask = token_log_probs(model, rows, 1.0)
    for n, row in enumerate(rows):
        length = len(row.completion.tokens)
        sampled = torch.tensor(row.completion.logp)
        assert mask[n].sum() >= length, (
            f"the answer to {queries[n]!r} was sampled as {length} tokens, "
            f"{tokenizer.decode(row.completion.tokens)!r}, of which {mask[n].sum()} are in the "
            "loss. A token that is never in the loss is never learnt. Which one, and why?")
        assert mask[n].sum() == length, (
            f"{mask[n].sum() - length} tokens of padding after the answer to {queries[n]!r} are in "
            "the loss: padding looks like a stop token, and is none")
        assert torch.allclose(logp[n, :length], sampled, atol=1e-4), (
            "the log-probs of the completion are no longer the sampler's")
    assert logp.requires_grad, "the log-probs carry no gradient any more"
    every = Completion(list(range(model.config.vocab_size)), [], False)
    _, mask = token_log_probs(model, [Row(prompts[0], every, 1.0), rows[0]], 1.0)
    assert mask[0].all() and mask[1].sum() == len(rows[0].completion.tokens), (
        f"of a completion of all {mask.shape[1]} tokens that there are {mask[0].sum()} are in the "
        "loss: no token's number may decide, since a model can say any of them")
    colder, _ = token_log_probs(model, rows, 0.5)
    assert not torch.allclose(colder, logp), "the temperature has no effect any more"
    return "masks come from lengths: the stop token is part of the answer, padding is not"
