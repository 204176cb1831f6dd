"""A plain Llama: forward pass, and safetensors in and out in the Hugging Face layout.

    path = files.find_model("smollm2-135m")              # a known name, a directory, or a hub id
    model, tokenizer = load_model(path), Tokenizer(path)
    hidden = model(torch.tensor([tokenizer.chat([{"role": "user", "content": "Hello"}])]))
    logits = model.logits(hidden)

Llama-3.1/3.2, SmolLM2 and Skywork-Reward-V2-Llama open as they are, and what save_model writes
opens in transformers.
Shapes: B rows, T tokens, S cached tokens, D hidden size, H query heads, K key-value heads,
d head size, V vocabulary, M completion tokens of all rows laid end to end.
"""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plumbing.cache import Cache, Continuation, Prompts

# A checkpoint is weights and tokenizer: one room opens both.
from plumbing.chat import Tokenizer  # noqa: F401
from plumbing.config import Config, dtype_name, parse_config
from plumbing.files import POINTER, PROMPTS, InputError, check_regular, read_json
from plumbing.logprobs import wide

# What save_model carries over from the source directory,
# so that a checkpoint is complete by itself.
CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "chat_template.jinja", "generation_config.json", "training.json", *PROMPTS)


# ---------------------------------------------------------------- forward pass

def rope_frequencies(config: Config) -> Tensor:
    """Rotation in radians per position of each pair of coordinates, (d/2,) float64.

    With llama3 scaling, wavelengths beyond the original context are stretched by `factor`, those
    well inside it are kept, and those between are blended (the released Llama 3.1 code).
    """
    exponent = torch.arange(
        0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    frequency = config.rope_theta ** -exponent                               # (d/2,)
    if config.rope_scaling is None:
        return frequency
    s = config.rope_scaling
    # Turns within the original context.
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    keep = keep.clamp(0, 1)                                                  # 1: keep, 0: stretch
    return keep * frequency + (1 - keep) * frequency / s["factor"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (B, heads, T, d): (a, b) -> (a cos - b sin, b cos + a sin). As in Hugging Face
    checkpoints, a pair is coordinates i and i + d/2. cos and sin (B, 1, T, d) are those of the
    negative angles in the first half, so that one product serves both halves."""
    y = wide(x)
    a, b = y.chunk(2, dim=-1)                                              # (B, heads, T, d/2) each
    return (y * cos + torch.cat((b, a), dim=-1) * sin).to(x.dtype)


def recomputed(f, *inputs: Tensor) -> Tensor:
    """f(*inputs), keeping its inputs alone: the backward pass computes f again. For what costs next
    to nothing, norms and the MLP's product: a quarter of a block's activations on a CPU, a third in
    bfloat16, whose norms keep fp32 copies. Same values, same gradients."""
    if not torch.is_grad_enabled():
        return f(*inputs)
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean x^2 + eps) * weight, in fp32 inside: (..., D) -> (..., D)."""
        return recomputed(super().forward, x)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (..., in), (out, in) -> (..., out).

    On a CPU the few rows that a decode comes down to are multiplied with 64 of W's rows at a time,
    each a product of its own. In one large product MKL first copies all of W into a layout that it
    likes, and for a single row starts no second thread: decoding one row takes little more than
    half the time, 32 an eighth less. W is left alone where a core's cache holds it. The same sums
    in another order: test_a_product_of_few_rows_is_the_plain_one.
    """
    rows = x.numel() // x.shape[-1]
    if (not 1 <= rows <= 128 or len(weight) % 64 or weight.numel() <= 2**16
            or x.device.type != "cpu" or torch.is_grad_enabled()
            or not torch.backends.mkl.is_available()):
        return F.linear(x, weight)
    blocks = weight.unflatten(0, (-1, 64))                                   # (out/64, 64, in)
    each = x.reshape(1, rows, -1).expand(len(blocks), -1, -1)                # (out/64, rows, in)
    if rows == 1:                                        # matrix times vector: faster this way
        y = torch.bmm(blocks, each.mT)                                       # (out/64, 64, 1)
    else:
        y = torch.bmm(each, blocks.mT).transpose(0, 1)                       # (rows, out/64, 64)
    return y.reshape(*x.shape[:-1], -1)                                      # (..., out)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, slots, mask, cache, layer):
        # (B, T, heads * d) -> (B, heads, T, d)
        split = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        # Both at once: half as many kernels, of which a decode step is made.
        q, k = rotate(torch.cat((q, k), 1), cos, sin).split((q.shape[1], k.shape[1]), 1)
        if cache is not None:
            k, v = cache.write(layer, k, v, slots)                           # (B, K, S, d)
        if mask is None:         # plain causal attention: without a mask the fused kernels stay on
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # The H/K query heads that read one key head stand as further queries of it: no key is
            # copied, and kernels that take a mask but no grouped heads serve as well.
            grouped = q.reshape(len(q), k.shape[1], -1, self.head_dim)       # (B, K, H/K * T, d)
            y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
            y = y.reshape(q.shape)       # not view: some kernels return (B, T, heads, d) memory
        return self.o_proj(y.transpose(1, 2).flatten(2))                     # (B, T, D)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        product = recomputed(lambda a, b: F.silu(a) * b, self.gate_proj(x), self.up_proj(x))
        return self.down_proj(product)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, *attention_inputs):
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class ScalarHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(wide(hidden), wide(self.weight))[..., 0]                 # (..., D) -> (...)


class Llama(nn.Module):
    """The decoder; its parameters carry the checkpoint's own names
    (model.layers.0.self_attn.q_proj.weight, ...)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if config.scalar_head:
            self.score = ScalarHead(config.hidden_size, 1, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

        self.checkpointing = False           # in forward
        self.raw_config, self.carried = {}, {}       # what checkpoints bring and save_model writes
        # No parameter and no buffer: .to(bfloat16) must not round it.
        frequencies = rope_frequencies(config)
        self.frequencies = torch.cat((-frequencies, frequencies))            # (d,), for rotate

    def forward(self, tokens: Tensor, *, positions: Tensor | None = None,
                cache: Cache | Prompts | Continuation | None = None) -> Tensor:
        """Final hidden states (B, T, D), after the last norm, of tokens (B, T).

        Without a cache, attention is causal: rows padded on the right need no mask, since padding
        comes after everything that is read. With one, the tokens go on from what it holds
        (cache.py). `positions` (B, T) default to counting on from there.
        """
        if cache is None:
            slots, mask = torch.arange(tokens.shape[1], device=tokens.device)[None], None  # (1, T)
        else:
            slots, seen = cache.place(tokens.shape[1])             # (B, T), (B, T, S) or None
            mask = None if seen is None else self.additive(seen)
        x = self.model.embed_tokens(tokens)                                  # (B, T, D)
        precision = wide(x[:0]).dtype
        if self.frequencies.device != x.device:
            self.frequencies = self.frequencies.to(precision).to(x.device)
        where = slots if positions is None else positions
        angles = where[:, None, :, None].to(precision) * self.frequencies.to(precision)
        cos, sin = angles.cos(), angles.sin()                                # (B, 1, T, d) each
        for layer, block in enumerate(self.model.layers):
            inputs = (x, cos, sin, slots, mask, cache, layer)
            # Checkpointed, a block keeps only its input and is computed again in the backward pass:
            # a third more work, and a few numbers a token and layer in place of a hundred thousand.
            x = recomputed(block, *inputs) if self.checkpointing else block(*inputs)     # (B, T, D)
        return self.model.norm(x)                                            # (B, T, D)

    def additive(self, seen: Tensor) -> Tensor:
        """Attention's mask, made once for all layers: 0 where a token sees a key, else -inf.

        The H/K query heads of a key head come one after another: (B, T, S) -> (B, 1, H/K * T, S).
        With an explicit mask flash attention is off; the memory-efficient kernel takes one of the
        queries' dtype whose rows begin at multiples of 16, and copies any other in every layer:
        hence rows of a rounded width (test_the_mask_is_as_the_memory_efficient_kernel_wants_it).
        """
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        dtype = self.model.embed_tokens.weight.dtype
        B, T, S = seen.shape
        mask = torch.zeros(B, group, T, -(-S // 16) * 16, dtype=dtype, device=seen.device)
        mask = mask.flatten(1, 2)[..., :S]                                   # (B, H/K * T, S)
        mask.view(B, group, T, S).masked_fill_(~seen[:, None], -math.inf)
        return mask[:, None]

    @property
    def head(self) -> Tensor:
        """What hidden states are multiplied with for logits, (V, D)."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that the model's own config.json names: checkpoints keep it."""
        return getattr(torch, dtype_name(self.raw_config))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), fp32. A GPU sums products of bfloat16 numbers in fp32: the sums are
        kept as they are, not rounded to bfloat16 (torch has no gradient of this product)."""
        if hidden.is_cuda and hidden.dtype.itemsize == 2 and not torch.is_grad_enabled():
            y = torch.mm(hidden.flatten(0, -2), self.head.t(), out_dtype=torch.float32)
            return y.view(*hidden.shape[:-1], -1)                            # (..., V)
        return wide(product(hidden, self.head))


# ---------------------------------------------------------------- files

def weight_files(path: Path) -> list[Path]:
    """The model's safetensors: model.safetensors, or its shards, model-00001-of-00002.safetensors
    and so on."""
    files = sorted(path.glob("model*.safetensors"))
    others = {"adapter_config.json": "a LoRA adapter, not a model: merge it into its base with "
              "peft's merge_and_unload and save_pretrained",
              "pytorch_model*.bin": "no model.safetensors, only pytorch_model.bin, which can run "
              "code: convert it with transformers' from_pretrained and save_pretrained"}
    for name, advice in others.items():
        if list(path.glob(name)) and not files:
            raise InputError(f"{path}: {advice}")
    return files or [path / "model.safetensors"]


def read_config(path) -> Config:
    """What a directory's config.json says; InputError for what this forward pass does not do."""
    file = Path(path) / "config.json"
    return parse_config(read_json(file), str(file))


def load_model(path, *, device="cpu", dtype=torch.float32, writes: bool = False) -> Llama:
    """A Llama from a directory with config.json and *.safetensors (one file or shards).

    Each tensor goes straight to its device and dtype: nothing is held twice. InputError names the
    file or the tensor for an unsupported architecture, a missing or truncated file, a missing,
    surplus or misshapen tensor; with writes, for a reward model.
    """
    path = Path(path)
    raw, config = read_json(path / "config.json"), read_config(path)
    if config.dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise InputError(f"{path / 'config.json'}: dtype {config.dtype!r} is not supported")
    if writes and config.scalar_head:
        raise InputError(f"{path} is a reward model, which cannot write")
    with torch.device("meta"):                                              # shapes only, no memory
        model = Llama(config)
    state = {}
    for file in weight_files(path):
        check_regular(file)
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    if not name.endswith("rotary_emb.inv_freq"):     # RoPE's table, of old ones
                        state[name] = tensors.get_tensor(name).to(device, dtype, copy=True)
        except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
            reason = ("no such file" if isinstance(error, FileNotFoundError)
                      else f"not readable: {error}")
            if isinstance(error, SafetensorError) and (
                    file.stat().st_size < 1000 and file.read_bytes().startswith(POINTER.encode())):
                reason = "a git-lfs pointer, not the file: run git lfs pull there"
            raise InputError(f"{file}: {reason}") from None
    head = None if hasattr(model, "lm_head") else state.pop("lm_head.weight", None)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:                      # a missing, surplus or misshapen tensor
        raise InputError(f"{path}: {' '.join(str(error).split())[:400]}") from None
    if head is not None and not torch.equal(head, model.model.embed_tokens.weight):
        raise InputError(f"{path}: tie_word_embeddings is true, but the file holds another "
                         "lm_head.weight: set it to false in config.json, which is what "
                         "transformers then does by itself")
    model.raw_config = raw
    model.carried = {
        name: (path / name).read_bytes() for name in CARRIED if (path / name).exists()}
    return model


def save_model(model: Llama, path, *, dtype: torch.dtype | None = None):
    """Write a directory that load_model and transformers open:
    config, one safetensors file, tokenizer files.

    dtype: of the stored weights (default: model.stored_dtype).
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    key = "dtype" if "dtype" in model.raw_config else "torch_dtype"
    dtype = dtype or model.stored_dtype
    config = model.raw_config | {key: str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in model.carried.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    weights = {
        name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
