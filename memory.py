"""What a reader may skip: fp32 master weights beside a bfloat16 policy."""
import math
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from model import Llama, stored_dtype


class MasterAdamW:
    """AdamW on fp32 master weights, which a bfloat16 policy follows.

    A bfloat16 weight of 0.02 moves in steps of about 1e-4: an AdamW step of 3e-6 would round to
    nothing (test_a_step_of_1e_6_moves_fp32_masters_but_not_bf16_weights). So masters, moments and
    the sum of the micro-batches' gradients are fp32, and the policy that plays and is
    differentiated is a rounded copy. An fp32 policy is its own master.
    """

    def __init__(self, policy: Llama, dtype: torch.dtype, *, weight_decay: float):
        self.policy = policy
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
        self.discard()
        return norm

    def discard(self):
        """Forget the gradients that have been added up."""
        self.adamw.zero_grad(set_to_none=self.masters is self.params)
        if self.masters is not self.params:
            self.policy.zero_grad()                  # an error may have come before _collect

    def gradient_norm(self) -> float:
        return nn.utils.clip_grad_norm_(self.masters, math.inf).item()

    # ------------------------------------------------------------ on disk

    @property
    def updates(self) -> int:
        """How many steps AdamW has taken; its bias correction counts them."""
        held = self.adamw.state.get(self.masters[0])
        return int(held["step"]) if held else 0

    @property
    def masters_apart(self) -> bool:
        """Whether the stored weights are rounded: then the masters are stored beside them."""
        return self.masters is not self.params or stored_dtype(self.policy).itemsize < 4

    def bytes_on_disk(self) -> int:
        """A checkpoint's size with the weights: 6.4 + 38.6 GB for Llama-3.2-3B, stored in bf16."""
        count = sum(p.numel() for p in self.params)
        carried = sum(map(len, self.policy.carried.values()))
        state = 8 + 4 * self.masters_apart
        return count * (stored_dtype(self.policy).itemsize + state) + carried + 2**20

    def save(self, folder: Path):
        """Masters (where the weights are not their own) and moments as fp32 safetensors, a file
        each, so that the host holds one of them at a time."""
        folder.mkdir()
        moments = ("exp_avg", "exp_avg_sq") if self.updates else ()
        held = {kind: [self.adamw.state[m][kind] for m in self.masters] for kind in moments}
        if self.masters_apart:
            held["masters"] = self.masters
        names = [name for name, _ in self.policy.named_parameters()]
        for kind, tensors in held.items():
            save_file({name: t.detach().cpu() for name, t in zip(names, tensors)},
                      folder / f"{kind}.safetensors")

    @torch.no_grad()
    def load(self, folder: Path, updates: int):
        """What save() wrote, into a policy that holds the same checkpoint's weights."""
        state = {i: {"step": torch.tensor(float(updates))} for i in range(len(self.masters))}
        for kind in ["masters"] * self.masters_apart + ["exp_avg", "exp_avg_sq"] * (updates > 0):
            with safe_open(folder / f"{kind}.safetensors", "pt") as file:
                for i, (name, _) in enumerate(self.policy.named_parameters()):
                    if kind == "masters":
                        self.masters[i].copy_(file.get_tensor(name))
                    else:
                        state[i][kind] = file.get_tensor(name).to(self.masters[i].device, copy=True)
        for p, master in zip(self.params, self.masters):
            if p is not master:
                p.copy_(master)
        if updates:
            groups = self.adamw.state_dict()["param_groups"]
            self.adamw.load_state_dict({"state": state, "param_groups": groups})
