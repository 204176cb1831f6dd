"""What config.json says about a Llama, and what this forward pass refuses."""
from dataclasses import dataclass

from plumbing.files import InputError


@dataclass(frozen=True)
class Config:
    """The part of config.json that the forward pass needs, under its Hugging Face names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None          # None, or the llama3 frequency scaling's four numbers
    tie_word_embeddings: bool
    scalar_head: bool                # LlamaForSequenceClassification with one label: a reward model
    dtype: str = "float32"           # of its checkpoints


def dtype_name(raw: dict) -> str:
    """The dtype that a config.json names; float32 for none and for "auto"."""
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    return "float32" if name == "auto" else name


def parse_config(raw: dict, name: str = "config.json") -> Config:
    """config.json's dictionary as a Config; InputError says what this forward pass does not do."""
    def need(condition, message):
        if not condition:
            raise InputError(f"{name}: {message}")

    def number(source, key, kind=int, default=None):
        value = source.get(key)
        value = default if value is None else value
        good = (isinstance(value, (int, float) if kind is float else int)
                and not isinstance(value, bool))
        need(good and 0 < value < (1e15 if kind is float else 2**23),
             f"{key} must be a positive {kind.__name__} of a usual size, found {value!r}")
        return kind(value)

    names = raw.get("architectures") or ["LlamaForCausalLM"]
    architecture = names[0] if isinstance(names, list) else names
    known = ("LlamaForCausalLM", "LlamaForSequenceClassification")
    need(raw.get("model_type") == "llama" and architecture in known,
         f"model_type {raw.get('model_type')!r}, architecture {architecture!r} "
         "is not supported (only Llama)")
    for key, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
                       ("quantization_config", None)):
        need(raw.get(key) in (plain, None), f"{key} = {raw.get(key)!r} is not supported")
    scalar_head = architecture == known[1]
    labels = (len(raw["id2label"]) if isinstance(raw.get("id2label"), dict)
              else raw.get("num_labels", 2))
    need(not scalar_head or labels == 1, f"a reward model has one label, found {labels}")

    heads = number(raw, "num_attention_heads")
    width = number(raw, "hidden_size")
    # Two spellings: rope_scaling beside rope_theta,
    # and since transformers 5 both in rope_parameters.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    need(isinstance(rope, dict), "rope_parameters / rope_scaling must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind in ("default", "llama3"), f"rope_type {kind!r} is not supported (default, llama3)")
    scaling = None if kind == "default" else {key: number(rope, key, float) for key in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    need(not scaling or scaling["low_freq_factor"] < scaling["high_freq_factor"],
         "low_freq_factor must be below high_freq_factor")
    need(not scaling or scaling["factor"] >= 1, "the rope scaling's factor must be at least 1")
    tied = raw.get("tie_word_embeddings")
    need(tied in (True, False, None), f"tie_word_embeddings must be true or false, found {tied!r}")
    config = Config(
        vocab_size=number(raw, "vocab_size"), hidden_size=width,
        intermediate_size=number(raw, "intermediate_size"),
        num_hidden_layers=number(raw, "num_hidden_layers"), num_attention_heads=heads,
        num_key_value_heads=number(raw, "num_key_value_heads", default=heads),
        head_dim=number(raw, "head_dim", default=width // heads),
        max_position_embeddings=number(raw, "max_position_embeddings", default=2048),
        rms_norm_eps=number(raw, "rms_norm_eps", float, 1e-6),
        rope_theta=number(rope if "rope_theta" in rope else raw, "rope_theta", float, 10000.0),
        rope_scaling=scaling, tie_word_embeddings=bool(tied), scalar_head=scalar_head,
        dtype=dtype_name(raw))
    layers, width = config.num_hidden_layers, heads * config.head_dim
    need(layers < 1000 and width < 2**23, f"num_hidden_layers {layers}, and {width} numbers in a "
         "token's heads, cannot be meant")
    need(heads % config.num_key_value_heads == 0, f"num_attention_heads {heads} is not a multiple "
         f"of num_key_value_heads {config.num_key_value_heads}")
    need(config.head_dim % 2 == 0, f"head_dim must be even, found {config.head_dim}")
    return config
