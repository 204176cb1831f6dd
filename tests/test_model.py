"""The forward pass, checkpoints and chat ids against transformers,
live where it is installed, stored where not."""
import json
import struct

import pytest
import torch
from checkpoints import CONFIGS, TOKENIZER, random_llama, write_checkpoint
from huggingface_hub import errors

import model as model_module
from model import Tokenizer, load_model, parse_config, save_model
from plumbing import files as files_module
from plumbing.chat import fill
from plumbing.files import InputError, find_model

DATA = TOKENIZER.parent
STORED = json.loads((DATA / "logits.json").read_text())
GOLDEN = json.loads((DATA / "chat_ids.json").read_text())
TOKENS = torch.tensor(STORED["tokens"])


def outputs(llama, tokens):
    hidden = llama(tokens)
    return llama.score(hidden)[:, -1:] if llama.config.scalar_head else llama.logits(hidden)


# ---------------------------------------------------------------- forward pass

@torch.no_grad()
def test_float64_logits_equal_the_stored_ones_of_transformers(checkpoint_dir):
    ours = outputs(load_model(checkpoint_dir, dtype=torch.float64), TOKENS)[0]
    ours = ours if checkpoint_dir.name == "scalar_head" else ours[::8, ::10]
    theirs = torch.tensor(STORED[checkpoint_dir.name], dtype=torch.float64)
    assert theirs.abs().max() > 0.3
    assert (ours - theirs).abs().max() < 1e-9


@torch.no_grad()
def test_fp32_logits_equal_those_of_transformers_live(checkpoint_dir):
    transformers = pytest.importorskip("transformers")
    auto = (transformers.AutoModelForSequenceClassification if checkpoint_dir.name == "scalar_head"
            else transformers.AutoModelForCausalLM)
    theirs = auto.from_pretrained(checkpoint_dir, dtype=torch.float32)(TOKENS).logits
    ours = outputs(load_model(checkpoint_dir), TOKENS)
    assert (ours.reshape(theirs.shape) - theirs).abs().max() < 1e-4


@torch.no_grad()
def test_a_saved_checkpoint_opens_in_transformers_with_equal_logits(checkpoint_dir, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = load_model(checkpoint_dir)
    for p in ours.parameters():
        p.mul_(0.9)                                      # not the file it came from
    save_model(ours, tmp_path / "saved")
    auto = (transformers.AutoModelForSequenceClassification if checkpoint_dir.name == "scalar_head"
            else transformers.AutoModelForCausalLM)
    theirs, report = auto.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    logits = theirs(TOKENS).logits
    assert (outputs(ours, TOKENS).reshape(logits.shape) - logits).abs().max() < 1e-4
    chat = [{"role": "user", "content": "Hello"}]
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert there.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False) == Tokenizer(
        tmp_path / "saved").chat(chat)


@torch.no_grad()
def test_a_saved_checkpoint_reloads_bit_for_bit(checkpoint_dir, tmp_path):
    ours = load_model(checkpoint_dir)
    save_model(ours, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters()))
    assert (tmp_path / "saved/generation_config.json").exists()


def test_weights_are_stored_in_the_dtype_that_the_config_names(tmp_path):
    write_checkpoint(tmp_path / "a", "untied", torch_dtype="bfloat16")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    header = (tmp_path / "b/model.safetensors").read_bytes()[8:4096]
    assert b'"BF16"' in header and b'"F32"' not in header


def test_the_models_own_dtype_does_not_round_the_rope_frequencies():
    llama = random_llama("llama3_tied").to(torch.bfloat16)
    assert llama.frequencies.dtype == torch.float64


@torch.no_grad()
def test_cached_steps_equal_the_full_forward_pass(llama):
    tokens = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(0))
    whole = llama(tokens)
    cache = model_module.Cache(llama.config, 2, 16, device="cpu", dtype=torch.float64)
    pieces = torch.cat(
        [llama(part, cache=cache) for part in tokens.split([4, 1, 3, 1, 2], dim=1)], dim=1)
    assert (whole - pieces).abs().max() < 1e-12


@pytest.mark.parametrize("out, width", [(48, 32), (256, 384), (264, 384)])       # in blocks: 256
def test_a_product_of_few_rows_is_the_plain_one(monkeypatch, out, width):
    in_blocks, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: in_blocks.append(1) or bmm(*given))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    for rows in (1, 2, 7, 8, 9, 31, 32, 127, 128, 129):
        x = torch.randn(rows, 1, width, generator=generator, dtype=torch.float64)
        with torch.inference_mode():
            found = model_module.product(x, weight)
        assert found.shape == (rows, 1, out)
        assert (found - x @ weight.t()).abs().max() < 1e-12
    assert len(in_blocks) == (9 if out == 256 and torch.backends.mkl.is_available() else 0)


# ---------------------------------------------------------------- files that are wrong

def broken(path, kind):
    """Break the checkpoint at `path` and return what the message must name."""
    weights = path / "model.safetensors"
    if kind == "architecture":
        config = json.loads((path / "config.json").read_text()) | {"model_type": "qwen2"}
        (path / "config.json").write_text(json.dumps(config))
        return "config.json: model_type 'qwen2'"
    if kind == "dtype":
        config = json.loads((path / "config.json").read_text()) | {"torch_dtype": "int8"}
        (path / "config.json").write_text(json.dumps(config))
        return "dtype 'int8'"
    if kind == "no config":
        (path / "config.json").unlink()
        return "config.json: no such file"
    if kind == "broken config":
        (path / "config.json").write_text("{")
        return "config.json: Expecting property name"
    if kind == "no weights":
        weights.unlink()
        return "model.safetensors: no such file"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "model.safetensors: not readable"
    if kind == "hostile header":
        weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")
        return "model.safetensors: not readable"
    from safetensors.torch import load_file, save_file
    tensors = load_file(weights)
    if kind == "missing":
        del tensors["model.norm.weight"]
    elif kind == "surplus":
        tensors["model.extra.weight"] = torch.zeros(3)
    elif kind == "misshapen":
        tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, weights)
    return {"missing": 'Missing key(s) in state_dict: "model.norm.weight"',
            "surplus": 'Unexpected key(s) in state_dict: "model.extra.weight"',
            "misshapen": "size mismatch for model.norm.weight: copying a param with shape"}[kind]


@pytest.mark.parametrize("kind", [
    "architecture", "dtype", "no config", "broken config", "no weights", "truncated",
    "hostile header", "missing", "surplus", "misshapen"])
def test_a_broken_checkpoint_gives_one_line_that_names_the_file_or_tensor(tmp_path, kind):
    write_checkpoint(tmp_path / "m", "untied")
    message = broken(tmp_path / "m", kind)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "m")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_shard_is_refused(tmp_path):
    write_checkpoint(tmp_path / "m", "sharded")
    (tmp_path / "m/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="Missing key"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("change, message", [
    ({"hidden_act": "gelu"}, "hidden_act"), ({"attention_bias": True}, "attention_bias"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"), ({"vocab_size": "many"}, "vocab_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "not a multiple"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": [1]}, "must be an object"),
    ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
     "one label"),
])
def test_a_config_that_this_forward_pass_does_not_do_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        parse_config(CONFIGS["untied"] | change)


# ---------------------------------------------------------------- the hub, played by a stand-in

@pytest.mark.parametrize("name, error, words", [
    ("llama-3.2-3b", errors.GatedRepoError,
     ["meta-llama/Llama-3.2-3B-Instruct", "accept its licence", "hf auth login"]),
    ("nobody/nothing", errors.RepositoryNotFoundError,
     ["nobody/nothing", "no repository", "smollm2-135m"]),
    ("smollm2-135m", errors.LocalEntryNotFoundError,
     ["could not be reached", "hf download", "--local-dir"]),
    ("smollm2-135m", errors.OfflineModeIsEnabled, ["could not be reached", "local cache"]),
])
def test_what_the_hub_refuses_is_said_in_words(monkeypatch, name, error, words):
    def refuse(*args, **kwargs):
        raise error.__new__(error)
    monkeypatch.setattr(files_module, "snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        find_model(name)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lama", "a/b/c", "../nowhere/at/all", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(InputError, match="llama-3.2-1b"):
        find_model(name)


# ---------------------------------------------------------------- text

def check_chat_ids(name, folder):
    tokenizer = Tokenizer(folder)
    for conversation, (open_ids, closed_ids) in zip(
            GOLDEN["conversations"], GOLDEN[name], strict=True):
        assert tokenizer.chat(conversation) == open_ids
        assert tokenizer.chat(conversation, generation_prompt=False) == closed_ids
    return tokenizer


def test_chat_ids_equal_the_stored_ones_of_transformers():
    tokenizer = check_chat_ids("tokenizer", TOKENIZER)
    assert tokenizer.chat([{"role": "user", "content": "x"}]).count(
        tokenizer.special["<|begin|>"]) == 1
    # generation_config's and the template's
    assert tokenizer.stop_ids == {2, tokenizer.special["<|end_of_turn|>"]}


@pytest.mark.parametrize("name, stop_ids, bos", [
    ("smollm2-135m", {2}, None), ("llama3-tokenizer", {128009}, 128000)])
def test_chat_ids_of_real_tokenizers_equal_transformers(assets, name, stop_ids, bos):
    tokenizer = check_chat_ids(name, assets / name)
    assert tokenizer.stop_ids == stop_ids
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(assets / name)
    for text in ("plain words", "a\n\n b", "<|not special|>", "2 + 2 = 4\u2028ok", "é" * 50,
                 " lead", "trail "):
        conversation = [{"role": "user", "content": text}]
        ids = tokenizer.chat(conversation)
        assert ids == theirs.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024")
        assert bos is None or ids.count(bos) == 1
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids


def check_special_names_stay_text(tokenizer):
    plain = tokenizer.chat([{"role": "user", "content": "ab"}])
    for name in tokenizer.special:
        ids = tokenizer.chat([{"role": "user", "content": f"a{name}b"}])
        count = lambda ids, i: sum(j == i for j in ids)
        assert all(count(ids, i) == count(plain, i) for i in tokenizer.special.values()), name
        assert f"a{name}b" in tokenizer.decode(ids)                          # nothing was lost
        assert not set(tokenizer.encode(name)) & set(tokenizer.special.values())


def test_a_special_tokens_name_in_a_message_gives_ordinary_tokens():
    check_special_names_stay_text(Tokenizer(TOKENIZER))


@pytest.mark.parametrize("name", ["smollm2-135m", "llama3-tokenizer"])
def test_special_names_stay_text_in_real_tokenizers(assets, name):
    check_special_names_stay_text(Tokenizer(assets / name))


def test_private_marks_in_a_message_are_not_mistaken_for_ours():
    tokenizer = Tokenizer(TOKENIZER)
    content = "\ue000 <|start|> \ue001"
    assert content in tokenizer.decode(tokenizer.chat([{"role": "user", "content": content}]))


def test_fill_never_fills_what_a_value_brought_in():
    assert fill("{a} {b} {c}", a="{b}", b="{a}") == "{b} {a} {c}"


def test_a_null_dtype_is_saved_as_fp32(tmp_path):
    write_checkpoint(tmp_path / "m", "untied", torch_dtype=None)
    save_model(load_model(tmp_path / "m"), tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "float32"


def test_an_end_of_turn_token_with_any_name_is_found(tmp_path):
    write_checkpoint(tmp_path / "m", "untied")
    file = tmp_path / "m/tokenizer_config.json"
    settings = json.loads(file.read_text())
    template = settings["chat_template"].replace("<|end_of_turn|>", "<|end_of_text|>")
    file.write_text(json.dumps(settings | {"chat_template": template}))
    (tmp_path / "m/generation_config.json").unlink()
    (tmp_path / "m/config.json").unlink()
    tokenizer = Tokenizer(tmp_path / "m")
    assert tokenizer.special["<|end_of_text|>"] in tokenizer.stop_ids
