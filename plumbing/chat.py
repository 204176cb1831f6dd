"""A checkpoint's tokenizer and its own chat template: text to token ids and back.

    tokenizer = Tokenizer(find_model("smollm2-135m"))
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])
"""
import json
import re
from datetime import datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plumbing.files import InputError, read_json, read_small

PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def fill(prompt: str, **values: str) -> str:
    """Replace each {name} among `values`, in one pass:
    braces inside a value are text, never filled again."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), prompt)


def without_tags(text: str, prompt: str) -> str:
    """A text that a judge is shown, without what could pass for a part of the judge's prompt or of
    the reply that it asks for: of tags that the prompt uses (and <Score>, <Calculation>) the "<"
    becomes "(", and "Score:" becomes "Score -" where the prompt asks for a line "Score: 1"."""
    names = {"score", "calculation", *re.findall(r"</?(\w+)", prompt.lower())}
    text = re.sub(rf"<(?=\s*+/?\s*+(?:{'|'.join(sorted(names))}))", "(", text, flags=re.IGNORECASE)
    words = "|".join(re.findall(r"^(\w+):", prompt, re.MULTILINE))
    return re.sub(rf"\b({words})(\s*+):", r"\1\2 -", text, flags=re.IGNORECASE) if words else text


def fit(tokenizer: "Tokenizer", rows: list[tuple[str, ...]], messages, limit: int, *,
        generation_prompt: bool = True) -> list[tuple[list[int], list[str], bool]]:
    """For each row of texts: chat ids of messages(*texts), at most `limit`, the texts in them, and
    whether these were cut.

    Where they do not fit, the last text loses its end, as many tokens as there are too many; if it
    is then empty, the one before it loses its own. InputError where even empty texts are too long.
    """
    chat = lambda texts: tokenizer.chat(messages(*texts), generation_prompt=generation_prompt)
    fitted = []
    for row in rows:
        texts, ids = list(row), chat(row)
        cut = len(ids) > limit
        while len(ids) > limit:
            last = max((i for i, text in enumerate(texts) if text), default=None)
            if last is None:
                raise InputError(f"{tokenizer.path}: the prompt has {len(ids)} tokens before any "
                                 f"text is filled in, and {limit} fit")
            texts[last] = tokenizer.without_end(texts[last], len(ids) - limit)
            ids = chat(texts)
        fitted.append((ids, texts, cut))
    return fitted


@lru_cache(maxsize=8)
def compiled(source: str, date: str) -> Template:
    """A chat template with the few functions that templates expect, as transformers renders it; the
    day is not today's, for prompts must not change by the day."""
    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, **options: json.dumps(
        x, ensure_ascii=False, **options)
    day = datetime.strptime(date, "%d %b %Y")
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": day.strftime}
    return environment.from_string(source)


class Tokenizer:
    """A checkpoint's tokenizer.json and its own chat template; needs no weights.

    stop_ids: config's eos ids, generation_config's,
    and the token with which the template ends a turn.
    """

    date_string = "26 Jul 2024"     # what Llama 3's template calls today: prompts must not change

    def __init__(self, path):
        self.path = Path(path)
        file = self.path / "tokenizer.json"
        if not file.exists() and (self.path / "tokenizer.model").exists():
            raise InputError(f"{file}: no such file, only tokenizer.model; to make one: python -c "
                             "\"from transformers import AutoTokenizer as T; T.from_pretrained("
                             f"'{self.path}').save_pretrained('{self.path}')\"")
        source, settings = read_small(file), read_json(self.path / "tokenizer_config.json")
        self._names = self._find_names(settings)
        self.tokenizer = self._open(source)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items()
                        if token.special and token.content}
        by_length = sorted(self.special, key=len, reverse=True)
        self._special_name = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self._template = self._find_template(settings)
        self.stop_ids = self._find_stop_ids()

    def _open(self, source: str) -> tokenizers.Tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(source)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:              # a panic in Rust is no Exception
            raise InputError(f"{self.path / 'tokenizer.json'}: {error}") from None
        tokenizer.no_truncation()                   # a text is never cut or filled up unasked
        tokenizer.no_padding()
        return tokenizer

    def _find_names(self, settings: dict) -> dict[str, str]:
        """What templates call bos_token and so on: tokenizer_config.json, else
        special_tokens_map.json, else what the tokenizer's class stands for."""
        file = self.path / "special_tokens_map.json"
        older = read_json(file) if file.exists() else {}
        if settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
            older = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | older
        named = {key: settings.get(key) or older.get(key)
                 for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        names = {key: value.get("content") if isinstance(value, dict) else value
                 for key, value in named.items()}
        return {key: name for key, name in names.items() if isinstance(name, str) and name}

    def encode(self, text: str) -> list[int]:
        """Plain text to ids: no BOS, and a special token's name becomes ordinary tokens."""
        return self._encode(text, special=False).ids

    def without_end(self, text: str, count: int) -> str:
        """A text without its last `count` tokens."""
        begins = [begin for begin, _ in self._encode(text, special=False).offsets]
        return text[:begins[-count]] if count < len(begins) else ""

    def _encode(self, text: str, *, special: bool):
        """special: whether special tokens' names become them."""
        self.tokenizer.encode_special_tokens = not special
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:
            raise InputError(f"{self.path / 'tokenizer.json'} fails on the text {text[:40]!r}: "
                             f"{error}") from None

    def unencodable(self, text: str) -> str | None:
        """The first piece of a text without a token, or None; only small vocabularies lack any."""
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        if not unknown:
            return None
        pieces = self._encode(text, special=False)
        return next((text[a:b] for token, (a, b) in zip(pieces.tokens, pieces.offsets)
                     if token == unknown), None)

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
        hidden, marks = self._hide_names(messages)
        names, ids = {mark: name for name, mark in marks.items()}, []
        text = self._render(hidden, generation_prompt)
        for piece in re.split(f"([{''.join(names)}])", text) if names else [text]:
            ids += (self.encode(names[piece]) if piece in names
                    else self._encode(piece, special=True).ids)
        return ids

    def _hide_names(self, messages: list[dict]) -> tuple[list[dict], dict]:
        """The messages with a mark for each special token's name in them, and the marks."""
        names = sorted({n for m in messages for n in self._special_name.findall(m["content"])})
        used = {c for m in messages for c in m["content"]}
        free = (chr(c) for c in chain(*PRIVATE) if chr(c) not in used)
        marks = dict(zip(names, free))                                # name -> one unused character
        return [m | {"content": self._special_name.sub(lambda n: marks[n[0]], m["content"])}
                for m in messages], marks

    def _find_template(self, settings: dict) -> str:
        file = self.path / "chat_template.jinja"
        source = read_small(file) if file.exists() else settings.get("chat_template")
        if isinstance(source, list):                              # several by name: the default one
            source = next((t.get("template") for t in source
                           if isinstance(t, dict) and t.get("name") == "default"), None)
        if not isinstance(source, str):
            raise InputError(f"{self.path}: no chat template; take an Instruct checkpoint")
        return source

    def _render(self, messages: list[dict], generation_prompt: bool) -> str:
        """A conversation under the checkpoint's template, in jinja2's sandbox."""
        variables = self._names | {"add_generation_prompt": generation_prompt, "tools": None,
                                   "documents": None, "date_string": self.date_string}
        try:
            template = compiled(self._template, self.date_string)
            return template.render(variables, messages=messages)
        except Exception as error:                 # a template may fail in any way
            reason = (str(error).strip() or type(error).__name__)[:300]
            raise InputError(f"{self.path}: chat template: {reason}") from None

    def _find_stop_ids(self) -> set[int]:
        added = {token.content: i for i, token in
                 self.tokenizer.get_added_tokens_decoder().items()}
        ids = {added[eos]} if (eos := self._names.get("eos_token")) in added else set()
        for name in ("config.json", "generation_config.json"):
            file = self.path / name
            eos = read_json(file).get("eos_token_id") if file.exists() else None
            for i in eos if isinstance(eos, list) else [] if eos is None else [eos]:
                if type(i) is not int or not 0 <= i < 2**31:
                    raise InputError(f"{file}: eos_token_id must be a token's id, or a list of "
                                     f"them, found {i!r}")
                ids.add(i)
        mark = "\ue000"                          # a private-use character: in no token's name
        turn = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        text = self._render(turn, False)
        if text.count(mark) < 2:
            raise InputError(f"{self.path}: the chat template leaves out what is said")
        first = self._special_name.search(text.rpartition(mark)[2])        # what follows the answer
        ids |= {self.special[first[0]]} if first else set()
        if not ids:
            raise InputError(f"{self.path}: no token ends an answer; name it as eos_token_id in "
                             "generation_config.json")
        return ids
