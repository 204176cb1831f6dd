"""Exercise 2, 10 minutes: the Solver's advantages.

Read first: nothing. README.md and lsp.py show the solution: close them.

Each of N queries got G answers. Write the Solver's advantages, Eq. 2-3 of the paper. They say how
much better an answer is than the others to the same query. With a self-reward R_Q, the reward of an
answer is R + R_Q. R and R_Q are (N, G). The result is (N, G), too.
Afterwards compare with lsp.solver_advantages.
"""
import torch


def solver_advantages(R, R_Q=None):
    raise NotImplementedError("return the advantage of each answer, (N, G)")


# ---------------------------------------------------------------- the check

def check(solver_advantages=solver_advantages):
    R = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    wanted = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [0.25, 0.25, 0.25, -0.75]])
    A = solver_advantages(R)
    assert isinstance(A, torch.Tensor) and A.shape == R.shape, (
        f"one advantage an answer: a tensor of shape {tuple(R.shape)} is wanted")
    assert not torch.allclose(A, R - R.mean(0), atol=1e-4), (
        "the mean is over the queries (dim 0); it has to be over the answers to a query (dim 1)")
    assert not A.isnan().any(), (
        "a group whose answers all earned the same gives nan: 0 / 0. Nothing is to be divided here")
    assert not torch.allclose(A, R - R.mean(), atol=1e-4), (
        "the mean is over all answers of the step; it has to be over the answers to the same "
        "query, or else answers to easy queries look good whatever they say")
    tens = solver_advantages(10 * R)
    assert torch.allclose(tens, 10 * A, atol=1e-4), (
        "rewards ten times as large gave advantages that are not ten times as large: they are "
        "divided by something, the standard deviation perhaps. GRPO does that, LSP does not: it "
        "would blow up groups that hardly differ (arXiv 2503.20783)")
    assert torch.allclose(A, wanted), f"for R[0] = 1, 0, 0, 1 expected .5, -.5, -.5, .5: {A[0]}"
    R_Q = torch.tensor([[7.0, 3.0, 3.0, 3.0], [4.0, 0.0, 4.0, 0.0], [1.0] * 4])
    assert torch.allclose(solver_advantages(R, R_Q), wanted + R_Q - R_Q.mean(1, keepdim=True)), (
        "right without the self-reward, not with it: the reward is then R + R_Q, its group mean "
        "taken off")
    return "only differences within a group count: where all answers earn the same, nothing moves"
