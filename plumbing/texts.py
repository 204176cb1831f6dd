"""Plain text for rlpt.py: files as passages, and passages as segments.

    segments("Dr. Li came at 3.15. She left.")             # ["Dr. Li came at 3.15. ", "She left."]
    texts = Texts("books/")                                # .txt, or JSON lines with `text`
    pieces, targets = texts.read(0, "asr")                 # a passage's segments

Rules and short lists of words, no model: deterministic, linear time, every script whose sentences
end with a mark; the words are English, with a few French, German and Spanish ones.
tests/test_texts.py lists what they get right, and what they do not.
"""
import re
from collections.abc import Iterator
from pathlib import Path

from plumbing.data import read_entries
from plumbing.files import InputError, read_small

PASSAGE = 2**15           # characters: then a passage ends at a blank line, or by twice as many
BLANK = re.compile(r"\n[ \t\r]*+\n")
LONGEST = 1000            # characters of a segment to predict


# ---------------------------------------------------------------- segments

# Marks that end a sentence, then what closes with it: quotes, brackets, emphasis, footnote numbers.
# Possessive (++, *+), so that a megabyte of dots is read in linear time.
MARKS = re.compile(r"([.!?…‽؟۔।॥։።]++|[。！？｡．]++)"
                   r"((?:[\"'”’“»›)\]}*_」』）》】〉]| ?»|\[[0-9]{1,3}\])*+)")
ENDING, CLOSING = ".!?…‽؟۔।॥։。！？｡．", "\"'”’“»›)]}*_」』）》】〉"
OPENING = "\"'“‘„«‹([{¿¡*_「『（《【〈"
WIDE_MARKS = "。！？｡．"
GOES_ON = ".,;:!?…)]}»–—-"                # a mark before one of these has not ended the sentence
ABBREVIATIONS = set("""mr mrs ms mx dr prof gen col maj capt lt sgt gov sen rep rev hon messrs mme
    mlle sra srta hr fr vs cf viz ca approx bzw vgl evtl al inc ltd co corp bros jr sr esq etc dept
    univ est st ave blvd rd mt ft usw""".split())
BEFORE_NUMBERS = set("""no nos nr fig figs eq eqs sec secs ch chap vol vols p pp art par ver ed tab
    jan feb mar apr jun jul aug sep sept oct nov dec""".split())
# Words that begin sentences, and no names: after an abbreviation, the sentence has ended.
BEGINNERS = set("""The A An This That These Those There Here He She It We They You I His Her Its
    Our Their My Your But And Or So Then Now Yet In On At As If When While After Before Because
    Although However Once Some Many Most All Every What Who Why How Where No Not Yes For From With
    By To Only Let Do Did Is Are Was Were""".split())
INITIALS = re.compile(r"(?:[^\W\d_]{1,2}\.)*[^\W\d_]{1,2}")           # J, U.S, Ph.D, e.g
# Lines that begin a new segment, and lines that are one by themselves.
ITEM = re.compile(r"(?:[-*+•‣◦▪·–—]|\(?[0-9]{1,3}[.)]|\(?[a-z]\))\s|>")
ALONE = re.compile(r"#{1,6}\s|\||```|~~~|[\W_]+\Z")
FENCE = re.compile(r"\s*(?:```|~~~)")


def wide(c: str) -> bool:
    """Whether a character is of a script written without blanks: Chinese, Japanese."""
    return "\u2e80" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" or "\uff00" <= c <= "\uffef" or (
        "\U00020000" <= c <= "\U0003ffff")


def ends_sentence(text: str, begin: int, mark: re.Match) -> bool:
    """Whether the sentence that began at `begin` ends with this match of MARKS."""
    marks, closing, after = mark[1], mark[2], text[mark.end():mark.end() + 24]
    if not after:
        return True
    following = after.lstrip(" " + OPENING)
    if marks[0] in WIDE_MARKS:             # 「行く。」と言った goes on; ３．１４ is a number
        return not (after[0] in "、，。！？…" or closing and after[0] in "とっ"
                    or marks == "．" and after[0].isdigit())
    if after[0] != " ":                    # 3.14, a.b, https://x.org/?q=1; but 好!我
        return marks[-1] in "!?" and wide(after[0])
    if after[1] in GOES_ON or following[:1].islower():
        return False
    if marks != ".":
        return True
    before = text[max(begin, mark.start() - 24):mark.start()]
    word = before.rpartition(" ")[2].lstrip(OPENING)
    if mark.start() - begin < 10 and before.replace(".", "").strip().isdigit():
        return False                       # "1. First", "2.1. Models"
    if word.lower() in BEFORE_NUMBERS:
        return not following[:1].isdigit()
    if word.lower() in ABBREVIATIONS or word != "I" and INITIALS.fullmatch(word) and (
            len(word) == 1 or "." in word):
        return re.match(r"\w*", following)[0] in BEGINNERS
    return True


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Paragraphs, list items, headings, table rows and fenced code, each with the lines' ends that
    follow it. A paragraph's own line breaks are blanks; fenced code keeps them."""
    found, going, lines = [], False, iter(text.splitlines())   # going: a paragraph is not over
    for raw in lines:
        line = " ".join(raw.split())
        if FENCE.match(raw):
            code = [raw]
            for other in lines:                                # to the next fence, or to the end
                code.append(other)
                if FENCE.match(other):
                    break
            found.append(["\n".join(code), "\n"])
        elif not line:
            if found:
                found[-1][-1] = "\n\n"
        elif going and not (ALONE.match(line) or ITEM.match(line)):
            found[-1][-1:] = ["" if wide(found[-1][-2][-1]) and wide(line[0]) else " ", line, "\n"]
        else:
            found.append([line, "\n"])
        going = bool(line) and not ALONE.match(line)
    for *pieces, gap in found:
        yield "".join(pieces), gap


def sentence_ends(block: str) -> Iterator[int]:
    begin = 0
    for mark in MARKS.finditer(block):
        if ends_sentence(block, begin, mark):
            begin = mark.end()
            yield begin
    if begin < len(block):
        yield len(block)


def segments(text: str, least: int = 0) -> list[str]:
    """A text's sentences, list items, headings and blocks of code, in linear time.

    Each is followed by the blank that stood after it, so that "".join() is the text again (with
    its line breaks evened out). Those of fewer than `least` characters are left out.
    """
    found = []
    for block, gap in blocks(text):
        begin = 0
        for end in [len(block)] if FENCE.match(block) else sentence_ends(block):
            piece = block[begin:end].lstrip(" ")
            space = gap if end == len(block) else " " * (block[end] == " ")
            if len(piece) >= max(1, least):
                found.append([piece, space])
            elif found:
                found[-1][1] = max(found[-1][1], space, key=len)
            begin = end
    return [piece + space for piece, space in found[:-1]] + [piece for piece, _ in found[-1:]]


def is_whole(segment: str) -> bool:
    """Whether a segment is a whole sentence: it ends with a mark."""
    return segment.rstrip(CLOSING + " \n").endswith(tuple(ENDING))


# ---------------------------------------------------------------- texts

class Texts:
    """The texts of a file or of a folder's .txt and .jsonl files, held in memory as passages.

    InputError names the file, and of JSON lines the line that holds no text.
    """

    def __init__(self, path: str, least: int = 0):
        self.least, path = least, Path(path)
        if not path.is_dir() and not path.is_file():
            raise InputError(f"--text {path}: no such file or folder (a pipe is none, either)")
        files = [path] if path.is_file() else sorted(
            file for file in path.rglob("*")
            if file.suffix in (".txt", ".jsonl") and file.is_file())
        self.passages = [passage for file in files for text in texts_of(file)
                         for passage in passages(text)]
        if not self.passages:
            raise InputError(f"--text {path}: no text in it (of a folder .txt and .jsonl files are "
                             "read)")

    def __len__(self) -> int:
        return len(self.passages)

    def read(self, number: int, kind: str) -> tuple[list[str], list[int]]:
        """A passage's segments, and the places of those that an episode of this kind can ask for:
        whole sentences, neither the first, nor, where the next one is shown, the last."""
        pieces = segments(self.passages[number], self.least)
        return pieces, [i for i in range(1, len(pieces) - (kind == "msr"))
                        if is_whole(pieces[i]) and len(pieces[i]) <= LONGEST]


def texts_of(file: Path) -> list[str]:
    """A file's texts: the whole of a .txt, `text` of each JSON line."""
    if file.suffix not in (".jsonl", ".json"):
        return [read_small(file)]
    texts = []
    for where, entry in read_entries(file):
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{file}, {where}: expected an object with a field text, a string")
        texts.append(text)
    return texts


def passages(text: str) -> Iterator[str]:
    """A text in passages of PASSAGE to 2 * PASSAGE characters: they end at the first blank line,
    else at the last line's end, else anywhere."""
    begin = 0
    while len(text) - begin > 2 * PASSAGE:
        window = begin + PASSAGE, begin + 2 * PASSAGE
        blank = BLANK.search(text, *window)
        end = blank.end() if blank else text.rfind("\n", *window) + 1 or window[1]
        yield text[begin:end]
        begin = end
    if text[begin:].strip():
        yield text[begin:]
