"""What attention reads besides the tokens at hand: the sampler's cache, and shared prompts.

    logits, cache = prefill(model, prompts, which, size)       # sampling: written in place,
    hidden = model(tokens, cache=cache)                        # again and again, appending
    hidden = shared_forward(model, prompts, which, rests)      # training: gradients flow

Each is given to Llama.forward, which asks it where tokens go and what they may see (place), and in
every layer for the keys and values to attend to (write).
Shapes: P prompts (p of them in a pass), B rows, T tokens at hand, S keys and values, D hidden size,
K key-value heads, d head size, V vocabulary.
"""
from os.path import commonprefix

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad(rows: list, device, dtype=torch.long) -> tuple[Tensor, Tensor]:
    """Lists as one tensor padded on the right
    (with 0: masks come from lengths) and their lengths."""
    lengths = torch.tensor([len(row) for row in rows], device=device)        # (B,)
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return pad_sequence(tensors, batch_first=True).to(device), lengths       # (B, T), (B,)


class Cache:
    """Keys and values of all layers, allocated once:
    row b holds lengths[b] tokens from the left."""

    def __init__(self, config, rows: int, size: int, *, device, dtype):
        # Zeros: a masked NaN would still be NaN.
        shape = (rows, config.num_key_value_heads, size, config.head_dim)
        zeros = lambda _: torch.zeros(shape, device=device, dtype=dtype)
        self.k = list(map(zeros, range(config.num_hidden_layers)))
        self.v = list(map(zeros, range(config.num_hidden_layers)))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)    # (B,)
        self.used = 0            # no row is longer: attention reads no further
        self.fixed = False       # a captured step always reads `used`, which its caller looks after

    def place(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Slots of T further tokens a row, (B, T), and what they may see, (B, T, S) bool; None:
        plain causal attention."""
        device = self.lengths.device
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]            # (B, 1)
        slots = self.lengths[:, None] + torch.arange(T, device=device)                 # (B, T)
        self.lengths += T                    # in place: a captured step finds it where it was
        fresh = self.used == 0
        self.used += 0 if self.fixed else T
        if fresh:
            return slots, None               # nothing held yet
        return slots, torch.arange(self.used, device=device) <= slots[..., None]

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, d) at slots (B, T) and return all keys and values so far, (B, K, S, d).

        After a ragged prefill the caller sets `lengths` to the true ones; what padding left behind
        is then overwritten, and never seen.
        """
        self.k[layer][self.rows, :, slots] = k.transpose(1, 2)
        self.v[layer][self.rows, :, slots] = v.transpose(1, 2)
        return self.k[layer][:, :, :self.used], self.v[layer][:, :, :self.used]

    def select(self, rows: Tensor):
        """Make rows[i] the row i and forget the others; only rows that change place are copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        self.lengths = self.lengths[rows]
        for held in (self.k, self.v):
            for layer, old in enumerate(held):
                old[moved] = old[rows[moved]]
                held[layer] = old[:len(rows)]

    def fill(self, rows: Tensor, other: "Cache", which: Tensor):
        """Copy another cache's rows `which` (repeats allowed) into `rows`."""
        for mine, theirs in zip(self.k + self.v, other.k + other.v):
            mine[rows, :, :other.used] = theirs[which, :, :other.used]
        self.lengths[rows] = other.lengths[which]
        self.used = max(self.used, other.used)


PREFILL_TOKENS = 8192        # in one pass: its activations stay small beside the cache


@torch.inference_mode()
def prefill(model, prompts: list, which: Tensor, size: int) -> tuple[Tensor, Cache]:
    """Run P ragged prompts for B rows, row b beginning with prompt which[b] (on the host): the
    logits after each row's prompt (B, V), and a cache for rows of `size` tokens.

    Every prompt is run once, a few thousand tokens at a time; what all of them begin with, such as
    the judge's instructions, only once at all. Below some 32 tokens a pass of its own costs more
    than it saves.
    """
    embedding = model.model.embed_tokens.weight
    new = lambda rows, size: Cache(model.config, rows, size, device=embedding.device,
                                   dtype=embedding.dtype)
    common = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)     # the rest is not empty
    common = common if common >= 32 and len(prompts) > 1 else 0
    if common:
        head = new(1, common)
        model(torch.tensor([prompts[0][:common]], device=embedding.device), cache=head)
    cache, logits = new(len(which), size), []
    count = max(1, PREFILL_TOKENS // (max(map(len, prompts)) - common))      # prompts in one pass
    for first in range(0, len(prompts), count):
        rests = [prompt[common:] for prompt in prompts[first:first + count]]
        tokens, lengths = pad(rests, embedding.device)                       # (p, T), (p,)
        every = torch.arange(len(rests), device=embedding.device)
        part = new(len(rests), common + tokens.shape[1])
        if common:
            part.fill(every, head, torch.zeros_like(every))
        hidden = model(tokens, cache=part)                                   # (p, T, D)
        part.lengths = common + lengths
        logits.append(model.logits(hidden[every, lengths - 1]))              # (p, V)
        rows = ((first <= which) & (which < first + count)).nonzero()[:, 0]
        cache.fill(rows.to(every.device), part, (which[rows] - first).to(every.device))
    return torch.cat(logits)[which.to(every.device)], cache


class Prompts:
    """Keys and values of P prompts as a forward pass makes them, gradients attached."""

    def __init__(self, lengths: Tensor):
        self.lengths = lengths               # (P,)
        self.k, self.v = [], []              # a layer each, (P, K, S, d)

    def place(self, T: int) -> tuple[Tensor, None]:
        return torch.arange(T, device=self.lengths.device).expand(len(self.lengths), T), None

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.k):             # not again when a checkpointed block is recomputed
            self.k.append(k)
            self.v.append(v)
        return k, v


class Continuation:
    """B rows that go on from prompts: row b from prompt which[b]."""

    def __init__(self, prompts: Prompts, which: Tensor):
        self.prompts, self.which = prompts, which

    def place(self, T: int) -> tuple[Tensor, Tensor]:
        """Slots (B, T), and what they may see: their prompt without its padding, and no later
        token of their own, (B, T, S + T) bool."""
        start = self.prompts.lengths[self.which][:, None]                                # (B, 1)
        own = torch.arange(T, device=start.device)                                       # (T,)
        prompt = torch.arange(self.prompts.k[0].shape[2], device=start.device) < start   # (B, S)
        seen = torch.cat((prompt[:, None].expand(-1, T, -1),
                          (own <= own[:, None]).expand(len(start), -1, -1)), dim=-1)
        return start + own, seen

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        held_k, held_v = self.prompts.k[layer], self.prompts.v[layer]
        return torch.cat((held_k[self.which], k), 2), torch.cat((held_v[self.which], v), 2)


class Apart(torch.autograd.Function):
    """Tensors cut off from their graph, which has a backward pass of its own when their gradients
    are whole: Apart.apply(anchor, tensors), anchor being any tensor that requires a gradient.

    Autograd hands a weight's gradient over when all its parts have been added up. In one backward
    pass the parts from the rests would wait, for all weights, until the prompts' come: 5.6 GB for
    Llama-3.2-3B in bfloat16 (test_gradients_of_rests_do_not_wait_for_those_of_prompts). `tensors`
    is a list, and so no input that autograd would follow.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, tensors: list[Tensor]):
        ctx.tensors = tensors
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        torch.autograd.backward(ctx.tensors, grads)
        return None, None


def shared_forward(model, prompts: list, which: list[int], rests: list) -> Tensor:
    """Hidden states of B rows, each a prompt and a rest of its own, every prompt computed once.

    prompts: P lists of token ids. which: (B,) each row's prompt. rests: B lists, which may be
    empty. Returns (B, 1 + T, D): after the prompt's last token, and after each token of the rest,
    padded on the right; what predicts the rest's token t is at t.
    Prompts and rests are two forward passes: the second attends to the first's keys and values,
    repeated for the rows of each prompt, so that autograd sums their gradients. Values and
    gradients are those of whole rows (test_shared_prompts_have_the_gradients_of_whole_rows), for
    P + B * rest tokens' work in place of B * whole.
    """
    device = model.model.embed_tokens.weight.device
    tokens, lengths = pad(prompts, device)                                   # (P, S), (P,)
    held = Prompts(lengths)
    hidden = model(tokens, cache=held)                                       # (P, S, D)
    which = torch.tensor(which, device=device)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]    # (P, D)
    rest, _ = pad(rests, device)                                             # (B, T)
    if rest.shape[1] == 0:
        return last[which][:, None]
    if last.requires_grad:
        last, *cut = Apart.apply(last.new_zeros(0, requires_grad=True), [last, *held.k, *held.v])
        held.k, held.v = cut[:len(held.k)], cut[len(held.k):]
    after = model(rest, cache=Continuation(held, which))                     # (B, T, D)
    return torch.cat((last[which][:, None], after), dim=1)                   # (B, 1 + T, D)
