"""What a reader may skip: fp32 master weights beside a bfloat16 policy."""
import math
from functools import partial

import torch
from torch import nn

from model import Llama


class MasterAdamW:
    """AdamW on fp32 master weights, which a bfloat16 policy follows.

    A bfloat16 weight of 0.02 moves in steps of about 1e-4: an AdamW step of 3e-6 would round to
    nothing (test_a_step_of_1e_6_moves_fp32_masters_but_not_bf16_weights). So masters, moments and
    the sum of the micro-batches' gradients are fp32, and the policy that plays and is
    differentiated is a rounded copy. An fp32 policy is its own master.
    """

    def __init__(self, policy: Llama, dtype: torch.dtype, *, weight_decay: float):
        self.params = list(policy.parameters())
        self.masters = self.params
        if dtype != torch.float32:
            self.masters = [nn.Parameter(p.detach().float()) for p in self.params]
            for p, master in zip(self.params, self.masters):
                p.data = p.data.to(dtype)
                master.grad = torch.zeros_like(master)
                # Once a micro-batch's bfloat16 gradient is whole, it is added in fp32 and freed.
                p.register_post_accumulate_grad_hook(partial(self._collect, master))
        self.adamw = torch.optim.AdamW(self.masters, betas=(0.9, 0.999), weight_decay=weight_decay,
                                       fused=True)

    @staticmethod
    def _collect(master: nn.Parameter, p: nn.Parameter):
        master.grad += p.grad
        p.grad = None

    def step(self, learning_rate: float, clip: float) -> float:
        """One step; returns the gradient's norm before clipping. Not finite: nothing moves."""
        norm = nn.utils.clip_grad_norm_(self.masters, clip or math.inf).item()
        if math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = learning_rate
            self.adamw.step()
            with torch.no_grad():
                for p, master in zip(self.params, self.masters):
                    if p is not master:
                        p.copy_(master)
        self.adamw.zero_grad(set_to_none=self.masters is self.params)
        return norm
