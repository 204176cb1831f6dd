"""Supervised training from random weights, which build.py and build_rlpt.py share.

The builders train the weights only. The config, the tokenizer, the prompts and the settings are the
files of the shipped model; save_model copies them.
"""
import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import Llama, Tokenizer, load_model, save_model


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of both builders."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=1, help="random seed (default 1)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    return parser


def new_model(shipped: Path, seed: int) -> Llama:
    """A model with random weights and everything else as in the shipped model's directory.

    Weights are drawn from N(0, 0.05), which is wider than usual: with 0.02 the plateau before the
    model learns addition is far longer. Weights that write into the residual stream are divided by
    sqrt(2 layers), as in GPT-2.
    """
    source = load_model(shipped)
    torch.manual_seed(seed)
    model = Llama(source.config)
    model.raw_config, model.carried = source.raw_config, source.carried
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = math.sqrt(2 * model.config.num_hidden_layers) if writes else 1
            torch.nn.init.normal_(weight, 0.0, model.raw_config["initializer_range"] / scale)
    return model


def reply_loss(model: Llama, tokenizer: Tokenizer, rows: list) -> tuple[Tensor, int]:
    """Cross-entropy of the rows' replies, stop tokens included: sum in nats, number of tokens."""
    end = model.raw_config["eos_token_id"]
    turns = [tokenizer.chat([{"role": "user", "content": turn}]) for turn, _ in rows]
    replies = [tokenizer.encode(reply) + [end] for _, reply in rows]
    tokens = pad_sequence([torch.tensor(t + r) for t, r in zip(turns, replies)],
                          batch_first=True, padding_value=end)               # (B, T)
    labels = pad_sequence([torch.tensor([-1] * len(t) + r) for t, r in zip(turns, replies)],
                          batch_first=True, padding_value=-1)[:, 1:]         # (B, T-1)
    mask = labels >= 0                             # the positions that predict a token of the reply
    logits = model.logits(model(tokens[:, :-1])[mask])                       # (M, V)
    return F.cross_entropy(logits, labels[mask], reduction="sum"), len(logits)


def build(shipped: Path, out: Path, seed: int, stages: list, row, judge_weight: float = 1.0):
    """Train a model from random weights and save it.

    stages: for each its number of steps, its initial learning rate (it falls linearly to a
    twentieth) and how many rows of which kind a step has. row(kind, stage) returns one row, a user
    turn and a reply. The loss is the mean over the tokens of all replies. judge_weight multiplies
    the loss of the judge's rows, of whose tokens only the verdict is hard.
    """
    torch.set_num_threads(1)                       # the same order of sums on every machine
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = new_model(shipped, seed), Tokenizer(shipped)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    start, step = time.time(), 0
    for stage, (steps, rate, rows) in enumerate(stages):
        for i in range(steps):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, step / 50) * (1 - 0.95 * (i / steps))
            parts = {kind: reply_loss(model, tokenizer, [row(kind, stage) for _ in range(count)])
                     for kind, count in rows.items()}
            total = sum(count for _, count in parts.values())
            loss = sum(part * (judge_weight if kind == "judge" else 1.0)
                       for kind, (part, _) in parts.items())
            (loss / total).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                losses = "  ".join(f"{kind} {part.item() / count:.3f}"
                                   for kind, (part, count) in parts.items())
                print(f"step {step}, {time.time() - start:.0f} s  {losses}", flush=True)
    save_model(model, out)
    print(f"{out}: python train.py --model {out} shows what it does, and plays")
