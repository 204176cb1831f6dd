"""What a run measures of itself: held-out prompts, and the embedded worlds' held-out tasks.

    look(game, run, step)                         # evaluates, and appends to the run's eval.jsonl
"""
import math

import torch
from torch import Tensor

import rewards
import rlpt
from evals.results import in_batches
from plumbing import log, ranks
from plumbing.data import generator
from plumbing.runs import read_lines
from sample import sample, text_of

ASKED = 1000                 # queries that show what the embedded world's Challenger asks


def greedy(game, queries: list[str], at_once: int) -> tuple[list[str], Tensor]:
    """The Solver's likeliest answers, and whether each came to its end, (len,) bool. Between so
    many `at_once` a progress bar moves on, and a signal can end the run."""
    prompts = [game.tokenizer.chat([{"role": "user", "content": q}]) for q in queries]

    def answer(part):
        rows = []
        for some in in_batches(part, at_once, "held-out prompts"):
            game.phase.stop.check()
            rows += sample(game.policy, some, max_new_tokens=game.settings.answer_tokens,
                           temperature=0, stop_ids=game.tokenizer.stop_ids,
                           batch_tokens=game.settings.batch_tokens)
        return rows
    rows = ranks.spread(answer, prompts)
    texts = [text_of(game.tokenizer, row) for (row,) in rows]
    return texts, torch.tensor([row.stopped for (row,) in rows])


def look(game, run, step: int):
    """Evaluate the policy, append a record to the run's eval.jsonl, and print its line. Nothing
    happens where there are neither held-out prompts nor an embedded world."""
    record = {"step": step}
    if game.held_out:
        known = read_lines(run.folder / "eval_samples.jsonl")
        start = [line["reward"] for line in known if line["step"] == 0]
        figures, answered = evaluate(game, game.held_out, start)
        record |= figures
        run.append("eval_samples.jsonl", [{"step": step} | line for line in answered])
    if game.world:
        record |= evaluate_world(game)
    if len(record) > 1:
        run.append("eval.jsonl", [record])
        print(log.eval_lines(game.settings, record), flush=True)


def evaluate(game, held_out: list, start: list[float | None]) -> tuple[dict, list[dict]]:
    """Greedy answers to held-out prompts: mean reward, win-rate against the start's answers.

    A win is a higher reward for the same prompt, a tie counts half. The reward is the run's own, so
    a rise here can still be a weakness of the reward. Returns the figures, and what was answered:
    a record a prompt. start: the starting model's rewards (None: not a number); []: this is it.
    """
    queries, golds = map(list, zip(*held_out))
    answers, stopped = greedy(game, queries, 64)
    game.phase.load(getattr(game.reward, "model", None))
    ours = rewards.score(game.reward, queries, answers, golds, stopped)                    # (len,)
    answered = [{"query": q, "answer": a, "reward": r}
                for q, a, r in zip(queries, answers, ours.tolist())]
    theirs = torch.tensor([math.nan if r is None else r for r in start or ours.tolist()])  # (len,)
    wins = (ours > theirs).float() + (ours == theirs).float() / 2
    figures = {"reward": ours.mean().item(), "win_rate": wins.mean().item(), "n": len(held_out)}
    return figures, answered


def evaluate_world(game) -> dict:
    """The embedded world: greedy accuracy on all held-out sums; what ASKED sampled queries are.
    In rlpt: greedy accuracy on all held-out stories; the fraction of predictions that break off."""
    s, world = game.settings, game.world
    if game.texts:
        tasks = world.held_out_tasks()
        answers, _ = greedy(game, [rlpt.pose(game, *task).query for task in tasks], len(tasks))
        return world.story_figures(tasks, [rlpt.extract(answer, 0)[0] for answer in answers])
    queries = world.held_out_queries()
    answers, _ = greedy(game, queries, len(queries))
    record = {"accuracy": world.accuracy(queries, answers), "challenger": None}
    if game.challenger_prompts:
        (rows,) = sample(game.policy, game.challenger_prompts[:1], num_samples=ASKED,
                         temperature=s.temperature, max_new_tokens=s.query_tokens,
                         stop_ids=game.tokenizer.stop_ids, batch_tokens=s.batch_tokens,
                         generator=generator(s.seed, 0, "evaluate"))
        record["challenger"] = world.challenger_shares([text_of(game.tokenizer, r) for r in rows])
    return record


@torch.no_grad()
def is_finite(game) -> bool:
    """Whether the policy's logits are finite: no other model is worth a checkpoint."""
    game.phase.load(game.policy)
    ids = game.tokenizer.chat([{"role": "user", "content": "a"}])
    tokens = torch.tensor([ids], device=game.policy.model.embed_tokens.weight.device)
    return game.policy.logits(game.policy(tokens)[:, -1]).isfinite().all().item()
