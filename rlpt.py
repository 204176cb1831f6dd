"""RLPT (arXiv 2509.19249): plain text as a stream of tasks. Episodes, predictions, verdicts.

    python train.py --algo rlpt                     # the embedded stories, a minute on a CPU
    python train.py --algo rlpt --model llama-3.2-3b --text books/
    draw_episodes(game, step)                         # N prompts, each with what really follows
    extract("... <|startofprediction|>She left.<|endofprediction|>")         # ("She left.", None)

ASR: predict segment s_i from all before it. MSR: predict the masked s_i from those and from s_i+1.
A judge says whether the prediction is, in meaning, how the reference s_i s_i+1 ... begins: reward 1
or 0 (Verdict). All else is GRPO as train.py plays it on given prompts.
Departures: a prediction has at least one whole sentence, since any shorter beginning would be right
too (--min-prediction 0 opens the hole), and so has a target; a text of more than 64 KB is read as
passages of 32 KB or more, each with a beginning of its own (texts.py).
"""
import re
import zlib
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import rewards
from model import Llama
from plumbing.chat import Tokenizer, fill
from plumbing.data import EPISODE, draw, generator
from plumbing.files import InputError, prompt_file, read_prompt
from plumbing.texts import LONGEST, Texts, is_whole, segments

START, END = "<|startofprediction|>", "<|endofprediction|>"
TAG = re.compile(f"{re.escape(START)}|{re.escape(END)}")
REASONS = ("no_tags", "no_start", "no_end", "nested", "several", "empty", "short")
TRIES = 1000              # passages that may offer nothing before the text is given up


# ---------------------------------------------------------------- episodes

class Episode(NamedTuple):
    query: str              # the prompt: instructions and context
    gold: str               # the reference: what really follows
    kind: str               # "asr" or "msr"
    shortened: bool         # its context lost its beginning


def open_texts(game, start: Path, context: int):
    """A run's texts and prompts, into its game. Prompts that the starting model's directory brings
    go before ours. One trial draw, so that an error comes before the weights are loaded."""
    s = game.settings
    if s.query_tokens + s.answer_tokens > context:
        raise InputError(f"--query-tokens {s.query_tokens} and --answer-tokens {s.answer_tokens}: "
                         f"the model's context holds {context} in all")
    if game.world:
        game.texts = game.world.Stories(held=False)
    else:
        game.texts = game.sources["--text"] = Texts(s.text, s.min_segment)
    for kind, places in (("asr", ("context",)), ("msr", ("context", "next"))):
        file = game.sources[f"prompts/{kind}.txt"] = prompt_file(start, kind)
        game.episode_prompts[kind] = read_prompt(file, places)
    draw_episodes(game, 0)


def draw_episodes(game, step: int) -> list[Episode]:
    """The step's N episodes. What is random in them depends on the seed and the step alone.

    Each passage comes once an epoch, and the segment to predict is any of those that it offers.
    One that offers none (or whose context does not fit) is replaced by another passage.
    """
    s, random = game.settings, generator(game.settings.seed, step, EPISODE)
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
    --query-tokens; None if not even the last one does. InputError for text that cannot be spelt."""
    s = game.settings

    def query(count):
        return fill(game.episode_prompts[kind], context="".join(pieces[i - count:i]).rstrip(),
                    next=pieces[i + 1].rstrip() if kind == "msr" else "")

    def fits(count):
        turn = [{"role": "user", "content": query(count)}]
        return len(game.tokenizer.chat(turn)) <= s.query_tokens
    kept, over = 0, 1                      # segments that fit, and one more than may be tried
    while over <= i and fits(over):
        kept, over = over, 2 * over
    over = min(over, i + 1)
    while over - kept > 1:
        middle = (kept + over) // 2
        kept, over = (middle, over) if fits(middle) else (kept, middle)
    if not kept:
        return None
    if (strange := game.tokenizer.unspelt(query(kept))) is not None:
        raise InputError(f"--text {s.text}: the model's tokenizer cannot spell {strange!r}")
    following = pieces[i:i + (1 if s.strict else s.reference_segments)]
    # Nothing that is no sentence, such as a table, which would fill the judge's context.
    reference = takewhile(lambda piece: len(piece) <= LONGEST, following)
    return Episode(query(kept), "".join(reference).rstrip(), kind, kept < i)


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


@dataclass
class Verdict:
    """The reward of an episode's answer: 1 if the judge finds its prediction right (with the
    reading expected, the probability that it does), 0 if not, or if one of them cannot be read.

    records: one for each answer of the last call. Answers with the same prediction have the same
    verdict, also where the judge samples.
    """
    model: Llama                            # the judge
    tokenizer: Tokenizer
    prompt: str                             # with {reference} and {prediction} to fill
    reading: str = "generate"
    temperature: float = 0.0
    max_new_tokens: int = 16
    batch_tokens: int = 65536
    min_prediction: int = 1
    least: int = 0
    world: ModuleType | None = None         # knows what is right itself: nobody is asked
    seed: int = 0                           # of a judge that samples
    nonce: str = ""
    records: list[dict] = ()
    shortened: int = 0

    def __call__(self, queries: list[str], answers: list[str], golds: list[str]) -> Tensor:
        """(M,) fp32; golds are the references."""
        extracted = [extract(a, self.min_prediction, self.least) for a in answers]
        pairs = [(gold, p) for gold, (p, _) in zip(golds, extracted) if p is not None]
        number = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        scores, judged = torch.zeros(0), []
        if number and self.world:
            scores = torch.tensor([float(self.world.verdict(*pair)) for pair in number])
            judged = [{"shortened": False} for _ in number]
        elif number:
            scores, judged = rewards.verdicts(
                self.model, self.tokenizer, *map(list, zip(*number)), prompt=self.prompt,
                reading=self.reading, temperature=self.temperature,
                max_new_tokens=self.max_new_tokens, seeds=[
                    zlib.crc32(repr((self.seed, *pair)).encode()) for pair in number],
                batch_tokens=self.batch_tokens, nonce=self.nonce)
        self.shortened = sum(record["shortened"] for record in judged)
        R, self.records = torch.zeros(len(answers)), []
        for m, (gold, (prediction, failure)) in enumerate(zip(golds, extracted)):
            record = {"prediction": prediction, "failure": failure}
            if prediction is not None:
                i = number[gold, prediction]
                R[m] = scores[i].nan_to_num(0.0)
                record |= judged[i] | {"whole": is_whole(prediction)}
            self.records.append(record)
        return R
