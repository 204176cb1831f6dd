"""Exercise 1, 30 minutes: the KV cache.

Read first: Attention.forward in model.py, and plumbing/cache.py as far as the head of Cache.write.

A decoder that writes one token at a time would compute the keys and values of the whole text anew
for each token. The cache keeps them. Write the method that stores the new ones and returns all:

    self.k[layer], self.v[layer]    (B, K, size, d), allocated once, zeros at first
    k, v                            (B, K, T, d), of the T tokens at hand
    slots                           (B, T), the place of each token in its row; rows may differ
    self.used                       number of places in use, with these T tokens already counted
    returns                         a tuple: keys and values of the first `used` places,
                                    (B, K, used, d) each

Afterwards compare with plumbing.cache.Cache.write.
"""
import torch

from model import load_model
from plumbing.cache import Cache
from plumbing.files import find_model


def write(self, layer, k, v, slots):
    raise NotImplementedError("store k and v in self.k[layer] and self.v[layer] at their slots, "
                              "and return what they hold up to self.used")


# ---------------------------------------------------------------- the check

@torch.no_grad()
def check(write=write):
    model = load_model(find_model("tiny"), dtype=torch.float64)
    tokens = torch.randint(5, 29, (2, 9), generator=torch.Generator().manual_seed(0))    # (B, T)
    whole = model(tokens)                                                    # (B, T, D)
    same = lambda x, y: (x - y).abs().max() < 1e-9

    def new():
        cache = Cache(model.config, 2, 9, device="cpu", dtype=torch.float64)
        cache.write = lambda *inputs: checked(cache, *inputs)
        return cache

    def checked(cache, layer, k, v, slots):
        kept = write(cache, layer, k, v, slots)
        wanted = (*k.shape[:2], cache.used, k.shape[3])
        assert isinstance(kept, tuple) and len(kept) == 2, (
            f"return a tuple of two tensors, keys and values; found {type(kept).__name__}")
        assert [tuple(x.shape) for x in kept] == [wanted] * 2, (
            f"keys and values of shape {wanted} are wanted, all places up to self.used, found "
            f"{[tuple(x.shape) for x in kept]}: the new tokens must see all earlier ones, too")
        return kept

    cache = new()
    assert same(model(tokens[:, :4], cache=cache), whole[:, :4]), (
        "the first four tokens already get other hidden states than without a cache. Look at the "
        "index first: slots[b, t] is the place of row b's token t in self.k[layer][b] (an index "
        "like [rows, :, slots] has the shape (B, T, K, d), so k has to be transposed for it). "
        "Then look at what is returned: keys first, then values, in the order of the places")
    one_by_one = [model(tokens[:, t:t + 1], cache=cache) for t in range(4, 9)]
    assert same(torch.cat(one_by_one, 1), whole[:, 4:]), (
        "the first pass is right, and the tokens after it are not: they must see the keys and "
        "values of all tokens so far, each in its place")
    # Rows of 3 and 5 tokens, the first padded: its next token belongs into place 3, not 5.
    ragged, padded = new(), tokens[:, :5].clone()
    padded[0, 3:] = 0
    model(padded, cache=ragged)
    ragged.lengths = torch.tensor([3, 5])
    after = model(torch.stack([tokens[0, 3:4], tokens[1, 5:6]]), cache=ragged)
    assert same(after[1, 0], whole[1, 5]) and same(after[0, 0], whole[0, 3]), (
        "rows of equal length are right, rows of unequal length are not: each row has slots of its "
        "own, so that a short row's next token overwrites its padding")
    return "a cached decode gives the hidden states of the full forward pass, ragged rows included"
