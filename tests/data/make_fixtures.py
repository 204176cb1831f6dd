"""Makes the stored references of tests/data with transformers:
python tests/data/make_fixtures.py (requirements-dev).

logits.json      float64 logits of each random checkpoint of tests/checkpoints.py
tokenizer/       a byte-level BPE tokenizer of 300 tokens with a Llama-3-like chat template
chat_ids.json    apply_chat_template's ids for conversations without special names; also for the
                 two real tokenizers when their folder is given:
                 python tests/data/make_fixtures.py ASSETS
"""
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

TEMPLATE = """{{- bos_token }}{%- for message in messages %}
{{- '<|start|>' + message['role'] + '<|end_of_role|>\\n\\n' + message['content'] | trim \
+ '<|end_of_turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end_of_role|>\\n\\n' }}{%- endif %}
"""
CONVERSATIONS = [
    [{"role": "user", "content": "What is 37 + 48?"}],
    [{"role": "user", "content": "  blanks\n\n\taround, 12345 digits and 3.14  "}],
    [{"role": "system", "content": "Be brief."},
     {"role": "user", "content": "Größe, 你好, naïve — ok?"},
     {"role": "assistant", "content": "Sure.\nYes."}, {"role": "user", "content": ""}],
    [{"role": "user",
      "content": "tags <that> are | not <|special|> {braces} {{ jinja }} {% if %}"}],
]


def make_tokenizer():
    special = ["<|begin|>", "<|start|>", "<|end_of_text|>", "<|end_of_role|>", "<|end_of_turn|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in special])
    tokenizer.train_from_iterator(
        ["user assistant system What is the answer to this question? Score"] * 5, trainer)
    out = HERE / "tokenizer"
    out.mkdir(exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
        "eos_token": "<|end_of_turn|>",
        "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE}, indent=2) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": [2]}) + "\n")


def make_chat_ids(assets):
    from transformers import AutoTokenizer
    folders = {"tokenizer": HERE / "tokenizer"}
    if assets:
        folders |= {name: Path(assets) / name for name in ("smollm2-135m", "llama3-tokenizer")}
    file = HERE / "chat_ids.json"
    golden = json.loads(file.read_text()) if file.exists() else {}
    golden["conversations"] = CONVERSATIONS
    for name, folder in folders.items():
        theirs = AutoTokenizer.from_pretrained(folder)
        golden[name] = [[theirs.apply_chat_template(c, add_generation_prompt=g, return_dict=False,
                                                    date_string="26 Jul 2024")
                         for g in (True, False)] for c in CONVERSATIONS]
    file.write_text(json.dumps(golden, ensure_ascii=False) + "\n")


def make_logits():
    """transformers computes norms and RoPE in fp32 whatever the weights:
    here every such cast becomes float64."""
    from checkpoints import CONFIGS, write_checkpoint
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    tokens = torch.tensor([[(7 * i * i + 3 * i + 5) % 300 for i in range(40)]])
    stored = {"tokens": tokens.tolist()}
    for kind in sorted(CONFIGS):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder) / kind, kind)
            auto = (AutoModelForSequenceClassification if kind == "scalar_head"
                    else AutoModelForCausalLM)
            loaded = auto.from_pretrained(Path(folder) / kind, dtype=torch.float32)
        with mock.patch("torch.float32", torch.float64), mock.patch("torch.float", torch.float64), \
                mock.patch.object(torch.Tensor, "float", torch.Tensor.double), torch.no_grad():
            theirs = type(loaded)(loaded.config).double()
            theirs.load_state_dict({name: w.double() for name, w in loaded.state_dict().items()})
            logits = theirs(tokens).logits[0]
        stored[kind] = logits.tolist() if kind == "scalar_head" else logits[::8, ::10].tolist()
    (HERE / "logits.json").write_text(json.dumps(stored) + "\n")


if __name__ == "__main__":
    make_tokenizer()
    make_chat_ids(sys.argv[1] if len(sys.argv) > 1 else None)
    make_logits()
