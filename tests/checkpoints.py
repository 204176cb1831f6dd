"""Small random checkpoints whose weights any numpy makes alike,
so that only logits need to be stored."""
import json
import shutil

import numpy as np
import torch
from safetensors.torch import save_file

from model import Llama, parse_config
from plumbing.files import HERE

TOKENIZER = HERE / "tests/data/tokenizer"
PLAIN = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2,
}
# Short, so that kept, blended and stretched pairs all occur.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
CONFIGS = {
    "untied": PLAIN,
    "llama3_tied": PLAIN | {
        "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "new_spelling": {k: v for k, v in PLAIN.items() if k != "rope_theta"} | {
        "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "tie_word_embeddings": True},
    "head_dim": PLAIN | {"head_dim": 16},
    "sharded": PLAIN,
    "scalar_head": PLAIN | {"architectures": ["LlamaForSequenceClassification"],
                            "id2label": {"0": "score"}, "label2id": {"score": 0}},
}


def random_weights(config: dict, seed: int = 1) -> dict[str, torch.Tensor]:
    """Float64 weights in the order of their names: matrices ~ N(0, .25), norms around 1,
    never all ones."""
    with torch.device("meta"):
        shapes = {
            name: p.shape for name, p in sorted(Llama(parse_config(config)).named_parameters())}
    random = np.random.RandomState(seed)     # the legacy generator: its numbers are frozen for good
    return {name: torch.from_numpy(random.randn(*shape) * 0.25 + (len(shape) == 1))
            for name, shape in shapes.items()}


def random_llama(kind: str, *, dtype=torch.float32, **changes) -> Llama:
    config = CONFIGS[kind] | {"vocab_size": 37} | changes
    model = Llama(parse_config(config))
    model.load_state_dict(random_weights(config))
    model.raw_config, model.carried = config, {}
    return model.to(dtype)


def write_checkpoint(path, kind: str, **changes):
    """A Hugging Face directory, tokenizer included; "sharded" in two files with an index."""
    path.mkdir(parents=True)
    config = CONFIGS[kind] | changes
    weights = {name: w.float() for name, w in random_weights(config).items()}
    (path / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER.iterdir():
        shutil.copy(file, path)
    if kind != "sharded":
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: weights[n] for n in part}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
