"""What a reader may skip: fp32 master weights beside a bfloat16 policy, and --offload.

--offload, for small cards: masters, moments and frozen models stay in host memory. On the GPU is
only the model at work in a phase (Stage), and while the policy learns its fp32 gradients. AdamW
then runs on the host: it reads and writes 28 bytes a weight, 90 GB for Llama-3.2-3B, about as long
as masters and moments would take to the GPU and back. On a CPU the run is the same bit for bit
(test_an_offloaded_run_is_the_plain_one_bit_for_bit); on a GPU no two runs are: attention's backward
pass adds in no fixed order.
"""
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.adamw import adamw

from plumbing import ranks
from plumbing.files import InputError

BUFFER = 2**29               # elements of a host buffer: 2 GiB in fp32


class MasterAdamW:
    """AdamW on fp32 master weights, which a bfloat16 policy follows.

    A bfloat16 weight of 0.02 moves in steps of about 1e-4: an AdamW step of 3e-6 would round to
    nothing (test_a_step_of_1e_6_moves_fp32_masters_but_not_bf16_weights). So masters, moments and
    the sum of the micro-batches' gradients are fp32, and the policy that plays and is
    differentiated is a rounded copy. An fp32 policy is its own master, unless masters are
    offloaded: then the offloaded policy is its masters, and the loaded one a copy on the device.

    Gradients are in the parameters' .grad, fp32 in all cases; between updates there are none.
    """

    def __init__(self, policy, dtype: torch.dtype, *, weight_decay: float,
                 offload: bool = False):
        self.policy, self.weight_decay, self.offload = policy, weight_decay, offload
        self.params = list(policy.parameters())
        self.rounded = dtype != torch.float32
        self.updates = 0                       # AdamW's steps; its bias correction counts them
        if offload:
            to_host(policy)
        self.masters = [p.detach().float() for p in self.params]        # no copies of fp32 ones
        for p in self.params if self.rounded else ():
            if not offload:                    # else rounded on its way to the device (Stage)
                p.data = p.data.to(dtype)
            # A micro-batch's first bfloat16 gradient is widened; autograd adds the next ones to
            # it, in fp32 (test_a_bf16_policy_follows_its_masters_and_gradients_add_up_in_fp32).
            p.grad_dtype = None                # any: by default .grad must have the weight's dtype
            p.register_post_accumulate_grad_hook(widen)
        self.exp_avg = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sq = [torch.zeros_like(master) for master in self.masters]

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float) -> float:
        """One step on the gradient, summed over the ranks; returns its norm before clipping. Where
        that is not finite, nothing moves."""
        ranks.add_up(self.params)
        norm = nn.utils.clip_grad_norm_(self.params, clip or math.inf).item()
        # All parameters have gradients, or none has: no completion was in the loss.
        if self.params[0].grad is not None and math.isfinite(norm):
            self.updates += 1
            home, count = self.masters[0].device, float(self.updates - 1)
            before = torch.full((len(self.masters),), count, device=home).unbind()
            # torch.optim.AdamW's own step, in one kernel a tensor, which raises the count.
            for p, steps, master, *moments in zip(self.params, before, self.masters, self.exp_avg,
                                                  self.exp_avg_sq):
                adamw([master], [p.grad.to(home)], *([m] for m in moments), [], [steps], fused=True,
                      amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8, lr=learning_rate,
                      weight_decay=self.weight_decay, maximize=False)
                if p.data_ptr() != master.data_ptr():
                    p.copy_(master)
        self.policy.zero_grad()
        return norm

    # ------------------------------------------------------------ on disk

    def held(self, updates: int) -> dict[str, list[Tensor]]:
        """What a checkpoint stores beside the weights after so many updates, by file: moments, and
        the masters where the stored weights are rounded."""
        held = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq} if updates else {}
        rounded = self.rounded or self.policy.stored_dtype.itemsize < 4
        return held | ({"masters": self.masters} if rounded else {})

    def save(self, folder: Path):
        """Masters (where the weights are not their own) and moments as fp32 safetensors, a file
        each, so that the host holds one of them at a time."""
        folder.mkdir()
        names = [name for name, _ in self.policy.named_parameters()]
        for kind, tensors in self.held(self.updates).items():
            save_file({name: t.detach().cpu() for name, t in zip(names, tensors)},
                      folder / f"{kind}.safetensors")

    @torch.no_grad()
    def load(self, folder: Path, updates: int):
        """What save() wrote, into a policy that holds the same checkpoint's weights."""
        self.updates = updates
        for kind, tensors in self.held(updates).items():
            with safe_open(folder / f"{kind}.safetensors", "pt") as file:
                for (name, _), tensor in zip(self.policy.named_parameters(), tensors):
                    tensor.copy_(file.get_tensor(name))
        for p, master in zip(self.params, self.masters):
            p.copy_(master)


def widen(p: nn.Parameter):
    p.grad = p.grad.float()                          # no copy if it is fp32 already


# ---------------------------------------------------------------- offload

class Stage:
    """Of the models in host memory, the one that is loaded to the device.

    A model stays until another one is loaded. Of an offloaded one nothing is on the device; what
    is loaded is a copy in the dtype to compute in. So offloading costs nothing: frozen models have
    not changed, and MasterAdamW writes the policy's masters and its copy. The sampler's captured
    graphs hold the copy's addresses; they live within one call, in which nobody comes or leaves.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.model, self.resting = None, []

    def load(self, model):
        if model is self.model:
            return
        if self.model:
            for p, data in zip(self.model.parameters(), self.resting):
                p.data = data
            torch.cuda.empty_cache()                 # models differ in the sizes of their tensors
        self.model, self.resting = model, [p.data for p in model.parameters()]
        for p in model.parameters():
            p.data = torch.empty_like(p.data, device=self.device, dtype=self.dtype).copy_(
                p.data, non_blocking=True)           # not blocking: widths change on the device


def to_host(model):
    """Move a model's weights to the host, side by side in few large flat buffers.

    Page-locked where there is a GPU: copies are then several times faster and run beside its work.
    PyTorch rounds each such allocation up to a power of two: 254 tensors of their own would take
    36 % more than they hold, and buffers of up to 2 GiB take 2 % more
    (test_host_buffers_of_llama_3_2_3b_lose_little).
    """
    groups = []
    for p in model.parameters():
        if not groups or sum(other.numel() for other in groups[-1]) + p.numel() > BUFFER:
            groups.append([])
        groups[-1].append(p)
    for group in groups:
        counts = [p.numel() for p in group]
        try:
            flat = torch.empty(sum(counts), dtype=group[0].dtype,
                               pin_memory=torch.cuda.is_available())
        except RuntimeError as error:
            raise InputError("--offload: not enough page-locked host memory: "
                             + str(error).splitlines()[0]) from None
        for p, place in zip(group, flat.split(counts)):
            p.data = place.view(p.shape).copy_(p.data)


def limit_memory(device: torch.device, gigabytes: float):
    """Let this process have so many GB (1e9 bytes) of its GPU; 0: all of it."""
    if gigabytes and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / whole))


def learning_rate(s, step: int) -> float:
    """Linear warm-up to --learning-rate, then linear decay to --final-lr-share of it at the end."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / (s.warmup + 1)
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.learning_rate * (1 - done * (1 - s.final_lr_share))
