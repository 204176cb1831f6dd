"""A checkpoint's tokenizer and its own chat template: text to token ids and back.

    tokenizer = Tokenizer(find_model("smollm2-135m"))
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])
"""
import re
from itertools import chain
from pathlib import Path

import tokenizers

import contain
from files import InputError, inside, read_json, read_small

SURROGATE = re.compile("[\ud800-\udfff]")     # half a character: JSON can hold it, UTF-8 cannot
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


def fit(tokenizer: "Tokenizer", rows: list[tuple[str, ...]], messages, room: int, *,
        generation_prompt: bool = True) -> list[tuple[list[int], list[str], bool]]:
    """For each row of texts: chat ids of messages(*texts), at most `room`, the texts in them, and
    whether these were cut.

    Where they do not fit, the last text loses its end, as much as it must; if it is then empty, the
    one before it loses its own. InputError where even empty texts are too long.
    """
    chats = lambda rows: tokenizer.chats([messages(*texts) for texts in rows],
                                         generation_prompt=generation_prompt)
    fitted = []
    for texts, ids in zip(map(list, rows), chats(rows)):
        cut = len(ids) > room
        for i in reversed(range(len(texts))):
            if len(ids) <= room:
                break
            whole, fits, too_long = texts[i], 0, len(texts[i])
            while too_long - fits > 1:                             # bisection on where to cut
                middle = (fits + too_long) // 2
                texts[i] = whole[:middle]
                good = len(chats([texts])[0]) <= room
                fits, too_long = (middle, too_long) if good else (fits, middle)
            texts[i] = whole[:fits]
            (ids,) = chats([texts])
        if len(ids) > room:
            raise InputError(f"{tokenizer.path}: the prompt has {len(ids)} tokens before any text "
                             f"is filled in, and {room} fit")
        fitted.append((ids, texts, cut))
    return fitted


class Tokenizer:
    """A checkpoint's tokenizer.json and its own chat template; needs no weights.

    stop_ids: config's eos ids, generation_config's,
    and the token with which the template ends a turn.
    """

    def __init__(self, path):
        self.path = Path(path)
        file = inside(self.path, "tokenizer.json")
        source = read_small(file)
        if failure := contain.try_tokenizer(file):
            raise InputError(f"{file}: {failure}")
        self.tokenizer = tokenizers.Tokenizer.from_str(source)
        self.tokenizer.no_truncation()         # a text is never cut or filled up behind our back
        self.tokenizer.no_padding()
        settings = read_json(inside(self.path, "tokenizer_config.json"))
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items()
                        if token.special and token.content}
        by_length = sorted(self.special, key=len, reverse=True)
        self._special_name = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        named = {
            key: settings.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self._names = {key: value.get("content") if isinstance(value, dict) else value
                       for key, value in named.items() if value}
        self._template = self._find_template(settings)
        self.stop_ids = self._find_stop_ids()

    def encode(self, text: str) -> list[int]:
        """Plain text to ids: no BOS, and a special token's name is spelt out in ordinary tokens."""
        return self._encode(text, special=False).ids

    def _encode(self, text: str, *, special: bool):
        """special: whether special tokens' names become them. A tokenizer that the trial did not
        break (contain.py) can still break on a text: that is bad input, too."""
        self.tokenizer.encode_special_tokens = not special
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:              # a panic in Rust is no Exception
            raise InputError(f"{self.path / 'tokenizer.json'} fails on the text {text[:40]!r}: "
                             f"{error}") from None

    def unspelt(self, text: str) -> str | None:
        """The first piece of a text without a token, or None; only small vocabularies lack any."""
        if half := SURROGATE.search(text):
            return half[0]
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
        return self.chats([messages], generation_prompt=generation_prompt)[0]

    def chats(self, conversations: list[list[dict]], *,
              generation_prompt: bool = True) -> list[list[int]]:
        """chat() of several conversations: the template's process is asked once for many."""
        hidden = [self._hide_names(messages) for messages in conversations]
        texts = self._render([swapped for swapped, _ in hidden], generation_prompt)
        return [self._ids(text, marks) for text, (_, marks) in zip(texts, hidden)]

    def _hide_names(self, messages: list[dict]) -> tuple[list[dict], dict]:
        """The messages with a mark for each special token's name in them, and the marks."""
        names = sorted({n for m in messages for n in self._special_name.findall(m["content"])})
        used = {c for m in messages for c in m["content"]}
        free = (chr(c) for c in chain(*PRIVATE) if chr(c) not in used)
        marks = dict(zip(names, free))                                # name -> one unused character
        if len(marks) < len(names):
            raise InputError("a text that holds every private-use character cannot be read")
        return [m | {"content": self._special_name.sub(lambda n: marks[n[0]], m["content"])}
                for m in messages], marks

    def _ids(self, text: str, marks: dict) -> list[int]:
        """A rendered conversation's ids; what a mark stands for is spelt out."""
        names_of, ids = {mark: name for name, mark in marks.items()}, []
        for piece in re.split(f"([{''.join(names_of)}])", text) if marks else [text]:
            ids += (self.encode(names_of[piece]) if piece in names_of
                    else self._encode(piece, special=True).ids)
        return ids

    def _find_template(self, settings: dict) -> str:
        file = inside(self.path, "chat_template.jinja")
        source = read_small(file) if file.exists() else settings.get("chat_template")
        if isinstance(source, list):                              # several by name: the default one
            source = next((t.get("template") for t in source
                           if isinstance(t, dict) and t.get("name") == "default"), None)
        if not isinstance(source, str):
            raise InputError(f"{self.path}: no chat template; take an Instruct checkpoint")
        return source

    def _render(self, conversations: list, generation_prompt: bool) -> list[str]:
        """Conversations under the checkpoint's template, which runs apart (contain.py)."""
        reply = contain.render(self._template, conversations, self._names | {
            "add_generation_prompt": generation_prompt})
        if isinstance(reply, str):
            raise InputError(f"{self.path}: chat template: {reply}")
        return reply

    def _find_stop_ids(self) -> set[int]:
        ids = set()
        for name in ("config.json", "generation_config.json"):
            file = inside(self.path, name)
            eos = read_json(file).get("eos_token_id") if file.exists() else None
            for i in eos if isinstance(eos, list) else [] if eos is None else [eos]:
                if type(i) is not int or not 0 <= i < 2**31:
                    raise InputError(f"{file}: eos_token_id must be a token's id, or a list of "
                                     f"them, found {i!r}")
                ids.add(i)
        mark = "\ue000"                          # a private-use character: in no token's name
        turn = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        (text,) = self._render([turn], False)
        if text.count(mark) < 2:
            raise InputError(f"{self.path}: the chat template leaves out what is said")
        self._check_ids(text)
        first = self._special_name.search(text.rpartition(mark)[2])        # what follows the answer
        return ids | ({self.special[first[0]]} if first else set())

    def _check_ids(self, chat: str):
        """Every id that a text or the template can give has a row in the model's embedding."""
        file = inside(self.path, "config.json")
        rows = read_json(file).get("vocab_size") if file.exists() else None
        if not isinstance(rows, int):
            return
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        names = [name for name in vocabulary if name not in self.special]
        highest = max([vocabulary[name] for name in names] + self._encode(chat, special=True).ids)
        if highest >= rows:
            raise InputError(f"{self.path}: tokenizer.json has a token {highest}, config.json a "
                             f"vocab_size of {rows}")
