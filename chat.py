"""A checkpoint's tokenizer and its own chat template: text to token ids and back.

    tokenizer = Tokenizer(find_model("smollm2-135m"))
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])
"""
import json
import re
from datetime import datetime
from pathlib import Path

import tokenizers
from jinja2 import TemplateError  # comes with torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from files import InputError, read_json, read_prompt


def fill(prompt: str, **values: str) -> str:
    """Replace each {name} among `values`, in one pass:
    braces inside a value are text, never filled again."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), prompt)


class Tokenizer:
    """A checkpoint's tokenizer.json and its own chat template; needs no weights.

    stop_ids: config's eos ids, generation_config's,
    and the token with which the template ends a turn.
    """

    def __init__(self, path):
        self.path = Path(path)
        file = self.path / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:                                # tokenizers raises bare Exception
            reason = ("no such file" if isinstance(error, FileNotFoundError)
                      else str(error).splitlines()[0])
            raise InputError(f"{file}: {reason}") from None
        settings = read_json(self.path / "tokenizer_config.json")
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        by_length = sorted(self.special, key=len, reverse=True)
        self._special_name = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        named = {
            key: settings.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self._names = {key: value.get("content") if isinstance(value, dict) else value
                       for key, value in named.items() if value}
        self._template = self._compile(settings)
        self.stop_ids = self._find_stop_ids()

    def encode(self, text: str) -> list[int]:
        """Plain text to ids: no BOS, and a special token's name is spelt out in ordinary tokens."""
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def unspelt(self, text: str) -> str | None:
        """The first piece of a text without a token, or None; only small vocabularies lack any."""
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self.tokenizer.encode_special_tokens = True
        pieces = self.tokenizer.encode(text, add_special_tokens=False) if unknown else None
        return next((text[a:b] for token, (a, b) in zip(pieces.tokens, pieces.offsets)
                     if token == unknown), None) if unknown else None

    def decode(self, ids: list[int]) -> str:
        """Ids to text; special tokens show by name, so that nothing a model wrote is hidden."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def chat(self, messages: list[dict], *, generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation [{"role": ..., "content": ...}, ...]
        under the checkpoint's chat template.

        The template writes the BOS, the encoder adds none: exactly one. Contents are text: a
        special token's name inside one is swapped for a private mark before rendering and encoded
        apart, in ordinary tokens; contents without such names get the ids of transformers'
        apply_chat_template.
        """
        names = sorted({n for m in messages for n in self._special_name.findall(m["content"])})
        used = {c for m in messages for c in m["content"]}
        # Private-use characters.
        free = (chr(c) for c in range(0xE000, 0xF900) if chr(c) not in used)
        marks = dict(zip(names, free))                                # name -> one unused character
        swapped = [m | {"content": self._special_name.sub(lambda n: marks[n[0]], m["content"])}
                   for m in messages]
        text = self._render(swapped, generation_prompt)
        names_of = {mark: name for name, mark in marks.items()}
        ids = []
        for piece in re.split(f"([{''.join(names_of)}])", text) if marks else [text]:
            if piece in names_of:
                ids += self.encode(names_of[piece])
            else:
                self.tokenizer.encode_special_tokens = False
                ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def _compile(self, settings: dict):
        """The chat template, in jinja2's sandbox with the few functions that templates expect
        (as transformers)."""
        file = self.path / "chat_template.jinja"
        source = read_prompt(file) if file.exists() else settings.get("chat_template")
        if isinstance(source, list):                              # several by name: the default one
            source = {t.get("name"): t.get("template")
                      for t in source if isinstance(t, dict)}.get("default")
        if not isinstance(source, str):
            raise InputError(f"{self.path}: no chat template; take an Instruct checkpoint")

        def raise_exception(message):
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda x, **options: json.dumps(
            x, ensure_ascii=False, **options)
        # Prompts must not change by the day.
        environment.globals |= {"raise_exception": raise_exception, "date_string": "26 Jul 2024",
                                "strftime_now": datetime(2024, 7, 26).strftime}
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"{self.path}: chat template: {error}") from None

    def _render(self, messages: list[dict], generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=generation_prompt, **self._names)
        except Exception as error:               # a template is a program: it can fail in any way
            raise InputError(f"{self.path}: chat template: {error}") from None

    def _find_stop_ids(self) -> set[int]:
        ids = set()
        for file in ("config.json", "generation_config.json"):
            if (self.path / file).exists():
                eos = read_json(self.path / file).get("eos_token_id")
                ids |= {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
        mark = "\ue000"                          # a private-use character: in no token's name
        turn = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        end = self._render(turn, False).rpartition(mark)[2]                # what follows the answer
        first = self._special_name.search(end)
        return ids | ({self.special[first[0]]} if first else set())
