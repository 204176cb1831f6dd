"""Exercise 10, 60 minutes: your own reward for the Challenger.

Read first: exercise 5, docs/MANUAL.md (the embedded world); the check plays for a minute.

LSP pays its Challenger -V + V_Q. Others ask no judge; p is the fraction of the G answers to a query
that are right:
    R-Zero           1 - 2 |p - 1/2|           uncertainty (and a penalty for repetition)
    SPICE            a bump around Var R = 1/4 the same thought, rounder
    Absolute Zero    1 - p, but 0 if p = 0     learnability
(train.py plays them as --challenger-reward r-zero, spice, absolute-zero.)
Write one of these or, better, one of your own: the advantages of N queries, (N,), from R (N, G),
which is 0 or 5 in this world, and R_Q (N, G), 0..7. The check looks at six queries. Then it plays
train.py --algo lsp with your function in place of lsp.challenger_advantages. The run is kept: read
what was asked in its samples.jsonl. (lsp.challenger_advantages itself passes the check, too.) FLAGS
may also hold "--seed", "2".

Then compare with the three above, played without any judge; their runs are kept:

    python course/exercises/break_it.py table
    python course/exercises/break_it.py spice --seed 1

And reopen the hole: a world whose judge takes "What is 52 + 4?" for well-formed, though nothing
asks the Solver for such sums and R is 0 for them (8 minutes):

    python tiny/build.py --seed 1 --open-hole --out HOLE
    python train.py --model HOLE --seed 1

Which rewards survive it, and why does LSP not? (Put "--model", "HOLE" into FLAGS and grade again.)
"""
import torch
from short_game import play

import lsp

FLAGS = ["--algo", "lsp"]               # "lsp-zero": nobody judges, R_Q is None


def challenger_advantages(R, R_Q=None):
    raise NotImplementedError("decide what a query is worth, from R and R_Q, and return that less "
                              "its mean over the queries, (N,)")


# ---------------------------------------------------------------- the check

def check(challenger_advantages=challenger_advantages, play=play):
    right = torch.tensor([8, 6, 4, 1, 0, 0])                                 # of 8 answers
    R = 5.0 * (torch.arange(8) < right[:, None])                             # (N, G)
    R_Q = torch.full((6, 8), 7.0)
    R_Q[-1] = 0                                                              # malformed
    A = challenger_advantages(R, R_Q)
    assert A.shape == (6,), f"one advantage a query: (6,) is wanted, found {tuple(A.shape)}"
    assert A.isfinite().all(), f"not finite: {A}"
    assert abs(A.sum()) < 1e-3, "take off the mean over queries: the advantages must sum to 0"
    assert A.abs().max() > 0, "all queries are worth the same: the Challenger has nothing to learn"
    assert A[0] < A.max(), (
        "the query that every answer solved is worth most: there is nothing to learn from it")
    assert A[5] < A[1:4].max(), (
        "a malformed query, which nobody can solve and the judge gave 0, is worth as much as any "
        "that can be solved: the Challenger will ask for nothing else, as LSP-Zero's does")
    before = lsp.challenger_advantages
    lsp.challenger_advantages = lambda R, R_Q, **how: challenger_advantages(R, R_Q)
    try:
        last = play(*FLAGS)
    finally:
        lsp.challenger_advantages = before
    malformed, carry = last["challenger"]["malformed"], last["accuracy"]["carry"]
    assert malformed < 0.3, (
        f"your Challenger ended at {malformed:.2f} malformed queries: nonsense pays")
    assert carry > 0.7, (
        f"carry accuracy ended at {carry:.2f}: the queries are sound, and the Solver does not "
        "learn from them what it lacks")
    return f"carry accuracy {carry:.3f}; with LSP's own reward .956 (and .947 at seed 2)"
