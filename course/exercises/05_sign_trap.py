"""Exercise 5, 15 minutes: the Challenger's advantages, and a trap.

Read first: nothing. README.md and lsp.py show the solution: close them.

The Challenger earns more for a query that the Solver answers badly. Its advantage compares a query
with the other queries of the step. With a self-reward, it also earns more for a query of high
quality: V_Q, the mean of R_Q over the answers to the query, joins its reward. Take care which
rewards go into V.

R and R_Q are (N, G); return (N,). Afterwards compare with lsp.challenger_advantages, and see what
the trap does to a whole run:

    python course/exercises/break_it.py sign-trap --seed 1
"""
import torch


def challenger_advantages(R, R_Q=None):
    raise NotImplementedError("return the Challenger's advantage of each query, (N,)")


# ---------------------------------------------------------------- the check

def check(challenger_advantages=challenger_advantages):
    R = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    wanted = torch.tensor([-0.25, 1.25, -1.0]) / 3                           # V = .5, 0, .75
    A = challenger_advantages(R)
    assert A.shape == (3,), f"one advantage a query: (3,) is wanted, found {tuple(A.shape)}"
    assert A[1] > A[0] > A[2], (
        "the query that nobody could answer must have the highest advantage, the easiest the "
        "lowest: the Challenger minimises R")
    assert abs(A.sum()) < 1e-5, "the advantages do not sum to 0: take off the mean over queries"
    assert torch.allclose(challenger_advantages(10 * R), 10 * A, atol=1e-4), (
        "divided by the standard deviation, or the like: the paper divides by nothing")
    assert torch.allclose(A, wanted, atol=1e-5), f"for V = .5, 0, .75 expected {wanted}, found {A}"
    R_Q = torch.tensor([[7.0] * 4, [0.0] * 4, [6.0, 6.0, 7.0, 5.0]])         # V_Q = 7, 0, 6
    A = challenger_advantages(R, R_Q)
    used = challenger_advantages(R, R_Q * torch.nan).isnan().any()           # nan passes through
    assert used, "V_Q is forgotten: R_Q has no effect on the advantages"
    assert not torch.allclose(A, wanted, atol=1e-5), (
        "R_Q is used, but the advantages are the same as without it: it has cancelled. V is the "
        "mean of R alone. With V of R + R_Q, -V + V_Q is -mean R again, and nonsense pays")
    assert abs(A.sum()) < 1e-4, (
        "with R_Q the advantages do not sum to 0: the mean of the whole reward -V + V_Q is taken "
        "off")
    assert A[0] > A[1], (
        "wrong sign: the malformed query, whose quality is 0, has the higher advantage. V_Q is "
        "added, not taken off; and V is the mean of R alone, not of R + R_Q")
    assert torch.allclose(A, torch.tensor([6.5, 0.0, 5.25]) - 11.75 / 3, atol=1e-5), (
        f"rewards -V + V_Q are 6.5, 0 and 5.25, less their mean; found {A}")
    return "V is of R alone: what the judge thinks has to reach the Challenger with its own sign"
