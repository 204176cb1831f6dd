"""Language Self-Play (arXiv 2509.07414): the advantages of Eq. 2-3 and the losses of Eq. 4-5.
Nothing else.

    solver_advantages(R, R_Q)                    Eq. 3, left
    challenger_advantages(R, R_Q)                Eq. 3, right
    policy_loss(logp, ref_logp, A, mask, ...)    Eq. 4 for the Solver's rows,
                                                 Eq. 5 for the Challenger's

Departure: the KL term. Eq. 4-5 print log(pi / pi_Ref) at the sampled tokens, whose gradient is zero
on average: it adds noise and no pull towards pi_Ref. The default here is k2, which does pull;
kl="paper" is the printed one.
Shapes: N queries, G answers a query, B rows (completions), T tokens of the longest one.
"""
import torch
from torch import Tensor

KL_ESTIMATORS = ("k2", "k2-seq", "k3", "paper")
CHALLENGER_REWARDS = ("lsp", "r-zero", "spice", "absolute-zero")


def solver_advantages(R: Tensor, R_Q: Tensor | None = None) -> Tensor:
    """How much better each answer was than its group: (N, G) rewards in, (N, G) advantages out.

    Eq. 2-3; with a self-reward R_Q (N, G) the Solver's reward is R + R_Q. As in the paper and in
    Dr. GRPO (arXiv 2503.20783), nothing is divided by the standard deviation. ValueError when
    G < 2: every advantage would be zero.
    """
    total = R if R_Q is None else R + R_Q                                    # (N, G)
    if total.dim() != 2 or total.shape[1] < 2:
        raise ValueError(f"rewards must be (N, G) with G >= 2, found {tuple(total.shape)}")
    return total - total.mean(dim=1, keepdim=True)             # Eq. 3: A_sol[n, g] = R[n, g] - V[n]


def challenger_advantages(R: Tensor, R_Q: Tensor | None = None, *, kind: str = "lsp",
                          scale: float = 1.0, penalty: Tensor | float = 0.0) -> Tensor:
    """How much better than average each query was for the Challenger:
    (N, G) rewards in, (N,) advantages out.

    Eq. 3, and with a self-reward R_Q the reward -V + V_Q of section 3. V is the mean of R alone:
    with R + R_Q the self-reward would cancel (test_self_reward_does_not_cancel_for_the_challenger).
    kind: another reward than -V, from the solve rate (challenger_reward); V_Q is added to it, too.
    scale: the factor by which R was multiplied (--reward-scale). With another kind, R must have
    been in 0..1 before that; its reward is multiplied by the same factor.
    penalty: (N,), subtracted from the rewards, as for queries that repeat each other.
    ValueError when N < 2.
    """
    if R.dim() != 2 or R.shape[0] < 2:
        raise ValueError(f"rewards must be (N, G) with N >= 2, found {tuple(R.shape)}")
    V = R.mean(dim=1)                                          # (N,)   Eq. 2: V[n] = mean_g R[n, g]
    reward = -V if kind == "lsp" else scale * challenger_reward(R / (scale or 1), kind)      # (N,)
    if R_Q is not None:
        reward = R_Q.mean(dim=1) + reward                              # (N,)   S[n] = V_Q[n] - V[n]
    reward = reward - penalty                                                # (N,)
    return reward - reward.mean()                                  # Eq. 3: A_ch[n] = mean(V) - V[n]


def challenger_reward(R: Tensor, kind: str) -> Tensor:
    """The reward of a query in other papers: (N, G) rewards in 0..1 in, (N,) in 0..1 out.

    p is the mean of a query's rewards: its solve rate where these are 0 or 1.
      r-zero         1 - 2 |p - 1/2|                  arXiv 2508.05004. Adapted: no penalty for
                                                      repetition, and p is the fraction of right
                                                      answers, not of those that agree.
      spice          exp(-(Var R - 1/4)^2 / 0.02)     arXiv 2510.24684. It is largest where the
                                                      variance is that of a fair coin.
      absolute-zero  1 - p, but 0 where p is 0        arXiv 2505.03335.
    test_other_challenger_rewards_equal_hand_worked_numbers.
    """
    p = R.mean(dim=1)                                                        # (N,)
    if kind == "r-zero":
        return 1 - 2 * (p - 0.5).abs()
    if kind == "spice":
        return torch.exp(-(R.var(dim=1, correction=0) - 0.25).square() / 0.02)
    if kind == "absolute-zero":
        return (1 - p) * (p > 0)
    raise ValueError(f"kind must be one of {', '.join(CHALLENGER_REWARDS)}, found {kind!r}")


def kl_estimate(logp: Tensor, ref_logp: Tensor, mask: Tensor, kind: str) -> Tensor:
    """KL(pi || pi_Ref) of each sequence, estimated at its own tokens:
    three (B, T) in, (B,) nats out.

    With d_t = log pi_t - log pi_Ref,t. Used as a *loss* on samples from pi, what counts is the
    expected gradient (arXiv 2510.01555, 2506.09477; tests/test_lsp.py enumerates all sequences of
    two tokens):
      paper   sum_t d_t                  The expected gradient is zero, since E[grad log pi] = 0:
                                         noise, no pull. (Schulman's k1, Eq. 4-5 as printed.)
      k2      sum_t d_t^2 / 2            It is the gradient of the reverse KL of each next-token
                                         distribution, at the prefixes that were sampled.
      k2-seq  (sum_t d_t)^2 / 2          It is exactly the gradient of the whole sequence's reverse
                                         KL, with more variance.
      k3      sum_t exp(-d_t) - 1 + d_t  It is the gradient of each next-token distribution's
                                         *forward* KL. As a value, k3 is unbiased for the sequence's
                                         reverse KL and never negative. So k3 is logged.
    """
    d = (logp - ref_logp).masked_fill(mask == 0, 0.0)              # (B, T)   a 0 adds nothing below
    if kind == "paper":
        return d.sum(-1)
    if kind == "k2":
        return (d.square() / 2).sum(-1)
    if kind == "k2-seq":
        return d.sum(-1).square() / 2
    if kind == "k3":
        return (torch.exp(-d) - 1 + d).sum(-1)
    raise ValueError(f"kl must be one of {', '.join(KL_ESTIMATORS)}, found {kind!r}")


def policy_loss(logp: Tensor, ref_logp: Tensor | None, advantages: Tensor, mask: Tensor, *,
                beta: float, kl: str = "k2",
                count: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4 (Solver's rows) or Eq. 5 (Challenger's rows):
    the loss, a scalar, and statistics as sums over sequences.

    logp, ref_logp: log-probs of the sampled tokens (B, T) under the policy and the reference
    (None where beta is 0).
    advantages: (B,). mask: (B, T), 1 on the completion's tokens, its stop token included,
    0 elsewhere.
    count: sequences in the whole step, over all micro-batches and ranks (default B), so that the
    micro-batches' losses add up to the step's.
    Statistics: kl (k3, nats), logp (sum over tokens: -logp / tokens estimates the entropy),
    tokens, sequences.
    """
    B = len(advantages)
    count = B if count is None else count
    # The stop-gradient ratio pi / sg(pi). Its value is always 1; its gradient is grad log pi, so
    # ratio * A carries the policy gradient A * grad log pi
    # (test_stop_gradient_ratio_has_the_policy_gradient). The printed loss is therefore about 0 by
    # design: watch reward and KL instead. There is one ratio for a sequence: log pi(a|q) is
    # the *sum* over its tokens, not their mean. No answer is weighted by its length.
    s = logp.masked_fill(mask == 0, 0.0).sum(-1)                             # (B,)   log pi(a|q)
    ratio = torch.exp(s - s.detach())                                        # (B,)
    objective = ratio * advantages                                           # (B,)
    nats = torch.zeros_like(s)
    if ref_logp is not None:
        nats = kl_estimate(logp.detach(), ref_logp, mask, "k3")              # (B,)   for the log
    if beta != 0:
        objective = objective - beta * kl_estimate(logp, ref_logp, mask, kl)
    loss = -objective.sum() / count             # Eq. 4: -1/(NG) sum_ij [ratio_ij A_ij - beta KL_ij]
    return loss, {"kl": nats.sum(), "logp": s.detach().sum(), "tokens": mask.sum().to(s.dtype),
                  "sequences": torch.full_like(loss, B)}
