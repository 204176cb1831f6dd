"""Segmentation on Latin and other scripts, what it is known to get wrong, and files as passages."""
import json
import os
import random
import re
import time

import pytest

from plumbing import texts
from plumbing.files import InputError
from plumbing.texts import Texts, is_whole, segments

# ‖ stands where one segment ends and the next begins.
SEGMENTED = [
    # full stops, question and exclamation marks
    "One thing.‖ Another thing.", "Is it?‖ It is!‖ Good.", "Really?!‖ Yes!!!‖ No...", "One", "",
    "It rained.‖ 40 people came.", "It was 1984.‖ Then it ended.", "Stop! he cried, and she did.",
    "Did he say yes? or no?‖ Nobody knows.", " .‖ Here it is",
    # abbreviations
    "Dr. Li met Mrs. Chen.‖ They spoke.", "St. Paul's, Mt. Everest, Gen. Lee.‖ Done.",
    "Take fruit, e.g. Apples, i.e. Cox.‖ Eat.", "See Fig. 3 and No. 5.‖ No.‖ Not now.",
    "On Jan. 5 it began.‖ In Feb.‖ It ended.", "It was Smith vs. Jones.‖ Smith won.",
    "He works at Acme Inc. Nobody knows.", "He works at Acme Inc.‖ He likes it.",
    "Tea, milk, etc.‖ Then we left.", "Tea, milk, etc. are there.",
    "He is at Acme Co. (Ohio).‖ Go.",
    "At 3 p.m. Monday came.", "It began at 3 p.m.‖ The sun shone.", "It is 5 p.m. now.‖ Go.",
    "The U.S. Senate met.‖ In the U.S.‖ The Senate meets.", "A Ph.D. in physics.‖ He has none.",
    "He lives in Main St.‖ He is 6 ft. tall.", "John Sr. Miller left.",
    "Smith et al. Found it.", "Approx. 5 of them.‖ Cf. Kant.", "(See pp. 3 ff.)‖ Vol. 2 is out.",
    # initials, decimals, versions, numbering
    "J. R. R. Tolkien wrote it.‖ So did C. S. Lewis.", "George W. Bush was there.‖ He left.",
    "So do I.‖ Then he left.", "Choose plan B.‖ It is good.", "Pi is 3.14.‖ Good.",
    ".5 is half.‖ Yes.",
    "It costs $1.50.‖ Buy it.", "Use Python 3.12.1.‖ It works.", "Chapter 2.3.‖ The end",
    "1. First, do this.", "a. Take it.", "2.1. Models are here.",
    "At 10.30 he came.‖ At 11 he left.", "It is 5.‖ Six is more.",
    # ellipses
    "Wait ... what is it?‖ Nothing.", "Well...‖ Then he left.", "Well… maybe.‖ Or not…‖ Who knows?",
    "He came . . . and went.", "So . . .‖ And?", "“...and so it ended.”‖ He smiled.",
    # quotes and brackets
    '"Go."‖ She went.', '"Go!" he said.‖ She went.', "'Why?' she asked.‖ “Because.”‖ He left.",
    'He said, "It is late."‖ Then he left.', "“Stop.‖ Now,” he said.", "He said: “Go.”‖ “Why?”",
    "(It was late.)‖ He left.", "He left (see Fig. 3).‖ Good.", "He left [as always].‖ Good.",
    "Er sagte: „Geh.“‖ Sie ging.", "Il dit : « Va. »‖ Elle partit.", "«Vete.»‖ Se fue.",
    "¿Quién?‖ ¡Nadie!‖ Vale.", "It ended.[12]‖ Then came peace.", "**Stop.**‖ Then go.",
    "*Why?* he asked.", "He left (why?) at noon.‖ So.",
    # URLs, files, code
    "See https://x.org/a.b?q=1.2&r=3!x for it.‖ Good.", "See www.x.org.‖ Good.",
    "Open a.txt or b.tar.gz.‖ Run it.", "Mail a.b@x.org.‖ He answers.", "Yahoo!com is odd.",
    "Call os.path.join(a, b).‖ It returns x.y.", "Use x[1:].copy() now.‖ Done.",
    "Before.‖\n```\nx = 1. Y = 2.\n\nz. A\n```\n‖After.", "~~~ py\na. B\n~~~\n‖After",
    "```\nnever closed. It is code.", "Run `a.b()`.‖ Then stop.",
    # lines
    "A line that\nis wrapped.‖ And more\nof it.", "A title\n\n‖A text.‖ It ends.", "One.\n‖Two.",
    "- one\n‖- two.‖ Two more\n‖* three", "1. one\n‖2. two\n‖3) three", "(a) one\n‖(b) two",
    "# Title\n‖Text goes on\nhere.", "Text:\n‖| a | b |\n‖| c | d |", "— Ja?\n‖— Nein.",
    "One.\r\n\r\n‖Two.\r\n‖Three.", "One\n‖* * *\n‖Two", "• one\n  more\n‖• two", "\n\n \nOne.",
    "A heading\n‖=========\n‖A text.",
    # other scripts
    "他走了。‖她来了。‖好！‖是吗？‖是。", "他说：“我走。”‖她没说话。", "为什么？！‖不知道。",
    "他走了。\n‖她来了。",
    "「行く。」と彼は言った。‖雨だ。", "「行く。」‖雨だ。", "東京に行った（二回）。‖楽しかった。",
    "（雨だ。）‖彼は来た。",
    "圆周率是3.14。‖对。", "他很高兴……但是走了。‖好。", "价格：１．５元。‖好。", "你好!‖我是王。",
    "全角．‖次の文。",
    "他用Python 3.12。‖很好。", "他问：「去吗？」，然后走了。‖好。", "好。。。‖是吗",
    "Он ушёл.‖ Она пришла.", "А. С. Пушкин родился.‖ Он писал.",
    "— Стой! — крикнул он.‖ Все встали.",
    "Ele saiu.‖ Ela ficou.", "Der Hr. Meier kam.‖ Er ging, z.B. Heim.",
    "M. Dupont est là.‖ Il mange.",
    "यह एक है।‖ वह दो है।", "هل جاء؟‖ نعم.", "그는 갔다.‖ 그녀는 왔다.", "Ήρθε.‖ Έφυγε.",
    "Ann has 37.‖ She gets 48.‖ Now Ann has 85.‖ Ann is glad.",
]
# What the rules get wrong, as they do it, and why.
LIMITS = [
    ("IV.‖ The storm began.", "a Roman number looks like a word"),
    ("Dr.‖ No came.", "No is a word that begins sentences, and here it is a name"),
    ("He is a dr. Nobody knew.", "a title is never a sentence's last word"),
    ("Am 3.‖ Oktober kam er.", "a German ordinal looks like the last word of a sentence"),
    ("He has an iPad. iPhones are dear.", "no sentence begins with a small letter"),
    ("he came. he saw.", "the same, where nothing has capitals"),
    ("Eat vitamin C. Apples have it.", "a single letter is an initial, unless a beginner follows"),
    ("In the U.S. Nobody knows.", "the same for an abbreviation with stops in it"),
    ("Meet I.‖ Newton.", "I is taken for the pronoun"),
    ("INTRODUCTION\nIt began.", "a title without a blank line below it is a wrapped line"),
    ("Roses are red\nViolets are blue", "and so is a line of verse"),
    ("def f():\n    return 1", "and a line of code outside of a fence"),
    ("> One\n‖> two.", "but each line of a quoted mail is a segment"),
    ("It is.Here it was.", "a blank is missing"),
    ("He went\n‖– and came.", "a dash at a line's beginning opens a speech or an item"),
    ("สวัสดี ลาก่อน", "Thai ends no sentence with a mark"),
    ("“我走。”‖他说。", "speech and speaker come apart where Chinese has no particle to tell"),
    ("I like Yahoo!‖ Inc. rules apart.", "a mark inside a name"),
]


def pieces(text):
    return [piece.strip() for piece in segments(text)]


def expected(marked):
    """What stands between the bars, on one line unless it is fenced code."""
    parts = [part.strip() for part in marked.split("‖") if part.strip()]
    return [part if re.search("^(```|~~~)", part) else " ".join(part.split()) for part in parts]


@pytest.mark.parametrize("marked", SEGMENTED)
def test_a_text_is_cut_where_its_sentences_end(marked):
    assert pieces(marked.replace("‖", "")) == expected(marked)


@pytest.mark.parametrize("marked, why", LIMITS)
def test_what_the_rules_get_wrong_is_known(marked, why):
    assert pieces(marked.replace("‖", "")) == expected(marked), why


def test_the_two_tables_are_as_large_as_is_said_and_hold_both_kinds_of_script():
    cjk = [marked for marked in SEGMENTED if any(map(texts.wide, marked))]
    assert len(SEGMENTED) >= 100 and len(cjk) >= 15 and len(LIMITS) >= 15


@pytest.mark.parametrize("text, joined", [
    ("One.  Two\nlines.\n\nThree.\r\n- four", "One. Two lines.\n\nThree.\n- four"),
    ("他走了。她\n来了。\n\nOK.", "他走了。她来了。\n\nOK."),
    ("a:\n```\n x  = 1\n```\nb", "a:\n```\n x  = 1\n```\nb"), (" \n\n ", "")])
def test_joined_the_segments_are_the_text_with_its_line_breaks_evened_out(text, joined):
    assert "".join(segments(text)) == joined
    assert segments(joined) == segments(text)                            # nothing is left to even


def test_short_segments_are_left_out_and_the_wider_gap_stays():
    assert segments("A long one. No.\n\nAnother one.", 5) == ["A long one.\n\n", "Another one."]
    assert segments("No. Yes.", 5) == []


@pytest.mark.parametrize("text, whole", [
    ("It is so.", True), ("It is so", False), ("It is so. \n", True), ('"Is it?"', True), ("是。」",
    True),
    ("It is so,", False), ("", False), ("- one", False), ("...", True), ("(so.)", True)])
def test_a_whole_sentence_ends_with_a_mark(text, whole):
    assert is_whole(text) == whole


def test_segmentation_never_raises_and_loses_no_letter_on_random_text():
    pick = random.Random(0)
    parts = ["a", "A", ".", "!", "?", "…", " ", "\n", "\n\n", "```", "~~~", "1", ",", '"', "”", "»",
    " »", "。", "」", "と",
             "好", "Dr", "etc", "U.S", "- ", "# ", "|", "* ", "[1]", "\r", "\t", "\x00", "\u2028",
             "\ud7ff", "é"]
    for _ in range(3000):
        text = "".join(pick.choices(parts, k=pick.randrange(30)))
        letters = lambda t: "".join(t.split())
        assert letters("".join(segments(text))) == letters(text)


@pytest.mark.parametrize("junk", [
    ".", ". ", "a. ", '."', "。", "」", "a.b", "A. ", "1. ", "\n", "```\n", "```a\n", "- a\n", "* ",
    " »", ".[1]", "…»",
    "Dr. ", "好\n", "a\n", ") ", "#", "_"])
def test_segmentation_takes_linear_time(junk):
    def seconds(size):
        text = (junk * size)[:size] + "x"
        best = float("inf")
        for _ in range(2):
            start = time.process_time()
            segments(text)
            best = min(best, time.process_time() - start)
        return best
    # Quadratic time would make it 64 times as long; the bound leaves room for a noisy machine.
    assert seconds(80_000) < 24 * max(seconds(10_000), 1e-3)


# ---------------------------------------------------------------- files

def every_piece(texts, kind="asr"):
    return [piece.strip() for n in range(len(texts)) for piece in texts.read(n, kind)[0]]


@pytest.fixture
def small_passages(monkeypatch):
    monkeypatch.setattr("plumbing.texts.PASSAGE", 64)


def test_a_folder_is_read_in_order_of_names_and_only_its_texts(tmp_path):
    (tmp_path / "b.txt").write_text("Third one. Fourth one.")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/z.jsonl").write_text(
        '{"text": "First one."}\n\n{"text": ""}\n{"text": "Second one.", "id": 3}\n')
    (tmp_path / "c.md").write_text("Not read.")
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "empty.txt").touch()
    texts = Texts(tmp_path)
    assert len(texts) == 3 and every_piece(texts) == ["First one.", "Second one.", "Third one.",
    "Fourth one."]


def test_targets_are_whole_sentences_after_the_first_and_for_msr_before_the_last(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("One is here. Two is here.\n\nA heading\n\nThree is here. " + "A" * 1000
                    + ". Four is here.")
    texts = Texts(file)
    pieces, targets = texts.read(0, "asr")
    assert [pieces[i].strip() for i in targets] == ["Two is here.", "Three is here.",
    "Four is here."]
    assert texts.read(0, "msr")[1] == targets[:-1]


@pytest.mark.parametrize("text", [
    "It is so. " * 60, "It is so.\n" * 60, "It is so.\n\n" * 60, "好。" * 300, "é" * 700,
    "\U0001f600" * 300,
    "no end\n\n \n\nat all " * 40, "a" * 63 + "\n\n" + "b" * 200, "\n\n\n" * 100 + "It is."])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_passages_are_of_the_stated_size_and_hold_every_character_once(
        tmp_path, small_passages, text, suffix):
    file = tmp_path / f"t.{suffix}"
    file.write_text(text if suffix == "txt" else "\n".join(
        json.dumps({"text": t}) for t in (text, "Next one.")))
    texts = Texts(file)
    assert all(len(passage) <= 128 for passage in texts.passages)
    own = texts.passages[:-1] if suffix == "jsonl" else texts.passages
    assert all(len(passage) >= 64 for passage in own[:-1])                # all but the last one
    read = "".join(every_piece(texts)).removesuffix("Next one.")
    assert "".join(read.split()) == "".join(text.split())


def test_a_passage_ends_at_a_blank_line_where_one_comes_in_time(tmp_path, small_passages):
    file = tmp_path / "t.txt"
    file.write_text(("It is so, and it was so before.\n" * 3 + "\n") * 9)
    texts = Texts(file)
    assert len(texts) == 9
    assert all(len(texts.read(n, "asr")[0]) == 3 for n in range(9))


@pytest.mark.parametrize("name, content, message", [
    ("t.txt", b"One.\nTwo \xff three.\n", r"t.txt: 'utf-8' codec can't decode byte 0xff"),
    ("t.txt", b"", "no text in it"), ("t.txt", b" \n \n", "no text in it"),
    ("t.jsonl", b'{"text": "a"}\n{"txt": "a"}\n',
    "t.jsonl, line 2: expected an object with a field"),
    ("t.jsonl", b'{"text": "a"}\n\n{"text": 3}\n',
    "t.jsonl, line 3: expected an object with a field"),
    ("t.jsonl", b"[1]\n", "t.jsonl, entry 1: expected an object"), ("t.jsonl", b"{\n",
    "t.jsonl, line 1: "),
    ("t.jsonl", b"\n\xff\n", "t.jsonl: "), ("t.jsonl", b"[" * 10**5, "t.jsonl, line 1: "),
    ("t.jsonl", b'{"text": "\\ud83d"}', "is half a character"), ("t.jsonl", b"\n\n",
    "no text in it")])
def test_a_bad_file_is_refused_by_name_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Texts(tmp_path / name)
    with pytest.raises(InputError, match=message):
        Texts(tmp_path)


def test_what_is_no_file_or_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "none", tmp_path / "pipe.txt", tmp_path):
        with pytest.raises(InputError, match="no such file or folder|no text in it"):
            Texts(path)
