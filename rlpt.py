"""RLPT (arXiv 2509.19249): plain text as a stream of tasks. Episodes, predictions, verdicts.

    python train.py --algo rlpt                     # the embedded stories, a minute on a CPU
    python train.py --algo rlpt --model llama-3.2-3b --text books/
    draw_episodes(game, step)                         # N prompts, each with what really follows
    extract("... <|startofprediction|>She left.<|endofprediction|>")         # ("She left.", None)

ASR: predict segment s_i from all before it. MSR: predict the masked s_i from those and from s_i+1.
A judge says whether the prediction is, in meaning, how the reference s_i s_i+1 ... begins: reward 1
or 0 (verdicts). All else is GRPO as train.py plays it on given prompts.
Departures: a prediction has at least one whole sentence, since any shorter beginning would be right
too (--min-prediction 0 opens the hole), and so has a target; a text of more than 65,536
characters is read as passages of half as many or more, each with a beginning of its own (texts.py).
"""
import re
import zlib
from bisect import bisect_left
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from plumbing.chat import fill
from plumbing.data import draw, generator, given_turn
from plumbing.files import InputError, prompt_file, read_prompt
from plumbing.texts import LONGEST, Texts, is_whole, segments
from sample import Completion

START, END = "<|startofprediction|>", "<|endofprediction|>"
TAG = re.compile(f"{re.escape(START)}|{re.escape(END)}")
REASONS = ("no_tags", "no_start", "no_end", "nested", "several", "empty", "short")
TRIES = 1000              # passages that may offer nothing before the text is given up


# ---------------------------------------------------------------- episodes

class Episode(NamedTuple):
    query: str              # the prompt: instructions and context
    gold: str               # the reference: what really follows
    kind: str               # "asr" or "msr"
    truncated: bool         # its context lost its beginning


def open_texts(game, start: Path):
    """A run's texts and prompts, into its game. Prompts that the starting model's directory brings
    go before ours. One trial draw, so that an error comes before the weights are loaded."""
    s = game.settings
    if game.world:
        game.texts = game.world.Stories(held=False)
    else:
        game.texts = Texts(s.text, s.min_segment)
    for kind, places in (("asr", ("context",)), ("msr", ("context", "next"))):
        game.episode_prompts[kind] = read_prompt(prompt_file(start, kind), places)
    draw_episodes(game, 0)


def draw_episodes(game, step: int) -> list[Episode]:
    """The step's N episodes. What is random in them depends on the seed and the step alone.

    Each passage comes once an epoch, and the segment to predict is any of those that it offers.
    One that offers none (or whose context does not fit) is replaced by another passage.
    """
    s, random = game.settings, generator(game.settings.seed, step, "episode")
    uniform = lambda: torch.rand((), generator=random, dtype=torch.float64).item()
    episodes = []
    for number in draw(range(len(game.texts)), s.queries, s.seed, step):
        # Of each 1 + lambda rows one is ASR and lambda MSR: J's gradient, up to that factor.
        kind = "msr" if uniform() < s.msr_weight / (1 + s.msr_weight) else "asr"
        for _ in range(TRIES):
            pieces, targets = game.texts.read(number, kind)
            episode = targets and pose(game, kind, pieces, targets[int(uniform() * len(targets))])
            if episode:
                break
            number = int(uniform() * len(game.texts))
        else:
            raise InputError(f"--text {s.text}: of {TRIES} passages none has a sentence to predict "
                             f"({kind}) with a context that fits into --query-tokens")
        episodes.append(episode)
    return episodes


def pose(game, kind: str, pieces: list[str], i: int) -> Episode | None:
    """The episode that asks for segment i, with as many of those before it as fit into
    --query-tokens; None if not even the last one does. InputError for what cannot be encoded."""
    s = game.settings

    def query(count):
        return fill(game.episode_prompts[kind], context="".join(pieces[i - count:i]).rstrip(),
                    next=pieces[i + 1].rstrip() if kind == "msr" else "")

    def fits(count):
        turn = [{"role": "user", "content": query(count)}]
        return len(game.tokenizer.chat(turn)) <= s.query_tokens
    kept = bisect_left(range(1, i + 1), True, key=lambda count: not fits(count))     # segments
    if not kept:
        return None
    if (strange := game.tokenizer.unencodable(query(kept))) is not None:
        raise InputError(f"--text {s.text}: the model's tokenizer cannot encode {strange!r}")
    following = pieces[i:i + (1 if s.strict else s.reference_segments)]
    # Nothing that is no sentence, such as a table, which would fill the judge's context.
    reference = takewhile(lambda piece: len(piece) <= LONGEST, following)
    return Episode(query(kept), "".join(reference).rstrip(), kind, kept < i)


def given_answers(game, step: int) -> tuple[list, list, list, list]:
    """--algo sft, RLPT's cold start: the step's N queries, their given answers, and as token ids
    prompts and Completions, in groups of one."""
    s = game.settings
    queries, answers = map(list, zip(*draw(game.data, s.queries, s.seed, step)))
    turns = [given_turn(game.tokenizer, *pair) for pair in zip(queries, answers)]
    rows = [Completion(ids[:s.answer_tokens], [0.0] * len(ids[:s.answer_tokens]),
                       len(ids) <= s.answer_tokens) for _, ids in turns]
    return queries, answers, [prompt for prompt, _ in turns], [[row] for row in rows]


# ---------------------------------------------------------------- predictions

def extract(answer: str, min_prediction: int = 1, least: int = 0) -> tuple[str | None, str | None]:
    """The prediction in an answer and None, or None and the reason, one of REASONS.
    Total: any string, linear time.

    It stands between the two tags, once, or several times the same; it has at least min_prediction
    whole sentences of `least` characters or more. Nothing is guessed.
    """
    found, begin = [], None
    for tag in TAG.finditer(answer):
        if tag[0] == START:
            if begin is not None:
                return None, "nested"
            begin = tag.end()
        elif begin is None:
            return None, "no_start"
        else:
            found.append(answer[begin:tag.start()].strip())
            begin = None
    if begin is not None:
        return None, "no_end"
    if not found:
        return None, "no_tags"
    if len(set(found)) > 1:
        return None, "several"
    if not found[0]:
        return None, "empty"
    whole = sum(map(is_whole, segments(found[0], least)))
    return (found[0], None) if whole >= min_prediction else (None, "short")


def verdicts(game, golds: list[str], answers: list[str], nonce: str) -> tuple[Tensor, list[dict]]:
    """The rewards of M answers to episodes, (M,) fp32, and a record of each.

    1 if the judge finds the answer's prediction right (with the reading expected: the probability
    that it does); 0 if not, or if prediction or verdict cannot be parsed. golds: the references.
    Where the embedded world gives the reward, it decides, and no model is asked. The random stream
    of a judge that samples depends on the pair, so equal predictions have equal verdicts.
    """
    s = game.settings
    extracted = [extract(answer, s.min_prediction, s.min_segment) for answer in answers]
    at = [m for m, (prediction, _) in enumerate(extracted) if prediction is not None]
    pairs = [(golds[m], extracted[m][0]) for m in at]
    if game.judge:
        streams = [zlib.crc32(repr((s.seed, *pair)).encode()) for pair in pairs]
        scores, judged = game.judge([gold for gold, _ in pairs], [said for _, said in pairs],
                                    seeds=streams if s.judge_temperature else None, nonce=nonce)
    else:
        scores = torch.tensor([float(game.world.verdict(*pair)) for pair in pairs])
        judged = [{"input_truncated": False} for _ in pairs]
    R = torch.zeros(len(answers))
    R[at] = scores.nan_to_num(0.0)
    records = [{"prediction": prediction, "failure": failure} for prediction, failure in extracted]
    for m, record in zip(at, judged):
        records[m] |= record | {"whole": is_whole(extracted[m][0])}
    return R, records
