"""Rewards: a reward model, a judge (two readings, two parsers), and verifiable rewards.

    R = RewardModel(find_model("skywork-v2-3b"))(queries, answers)           # (len,) fp32
    judge = Judge(model, tokenizer, read_prompt("prompts/self_reward.txt"), SELF_REWARD)
    scores, records = judge(queries, answers)                                # (len,) 0..7
    score, reason = parse_self_reward("... <Score>4</Score>")                # (4, None)
    verdict = Judge(model, tokenizer, read_prompt("prompts/verdict.txt"), VERDICT)
    scores, records = verdict(references, predictions)                       # (len,) 0 or 1

Any reward is a function (queries, answers, golds) -> (len,) fp32: yours fits in ten lines.
The self-reward is arXiv 2509.07414's R_Q, 0..7, given by the frozen reference model as a judge.
Left open there and decided here: an unparsed score takes the mean of its query's parsed ones
(fill_unparsed). The verdict is arXiv 2509.19249's, 0 or 1: is a prediction right (rlpt.py)?
Shapes: M pairs of texts, N queries, G answers a query, S possible scores, D hidden size.
"""
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from os.path import commonprefix

import torch
from torch import Tensor

from model import Llama, load_model, read_config
from plumbing.batches import take_batch
from plumbing.cache import shared_forward
from plumbing.chat import Tokenizer, fill, fit, without_tags
from plumbing.cli import RunStopped
from plumbing.data import opening
from plumbing.files import InputError, load_function, read_prompt
from plumbing.latex import math_verify, same_value
from sample import sample, text_of

READINGS = ("generate", "expected")
REASONS = ("no_tag", "unclosed", "not_last", "not_a_score", "out_of_range", "conflict",
           "bad_calculation", "truncated")
VERDICT_REASONS = ("no_score", "not_first", "not_a_score", "out_of_range", "conflict", "truncated")


@torch.no_grad()
def last_hidden(model: Llama, rows: list[list[int]], groups: list, batch_tokens: int) -> Tensor:
    """Hidden state at each row's last token, (len(rows), D), at most batch_tokens padded tokens a
    forward pass. groups: (len(rows),) whose rows begin alike, as the answers to one query do; what
    neighbours of a group share is computed once."""
    out = model.model.embed_tokens.weight.new_empty(len(rows), model.config.hidden_size)
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while waiting:
        batch = take_batch(waiting, lambda ids: len(ids) * len(rows[ids[-1]]), batch_tokens)
        members = {}
        for i in batch:
            members.setdefault(groups[i], []).append(rows[i])
        prompts = [commonprefix(alike) for alike in members.values()]
        which = [list(members).index(groups[i]) for i in batch]
        rests = [rows[i][len(prompts[n]):] for i, n in zip(batch, which)]
        hidden = shared_forward(model, prompts, which, rests)                # (b, 1 + T, D)
        ends = torch.tensor([len(rest) for rest in rests], device=hidden.device)
        out[batch] = hidden.take_along_dim(ends[:, None, None], 1)[:, 0]     # (b, D)
    return out


# ---------------------------------------------------------------- reward model

class RewardModel:
    """A LlamaForSequenceClassification with one label, as Skywork-Reward-V2: the logit at the last
    token of the chat-formatted pair (query as the user's turn, answer as the assistant's).

    A pair that its context does not hold is scored without the end of the answer (chat.fit);
    `truncated_inputs` says for how many pairs of the last call, `tokens` how many these pairs had.
    """

    def __init__(self, path, *, device="cpu", dtype=torch.float32, batch_tokens: int = 16384):
        self.tokenizer = Tokenizer(path)
        self.model = load_model(path, device=device, dtype=dtype)
        self.batch_tokens = batch_tokens
        self.truncated_inputs = self.tokens = 0
        if not self.model.config.scalar_head:
            raise InputError(f"{path}: not a reward model (config.json asks for no "
                             "LlamaForSequenceClassification)")

    def __call__(self, queries: list[str], answers: list[str], golds=None) -> Tensor:
        """(M,) fp32 on the CPU: higher is better, scale and zero are the model's own."""
        turns = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        fitted = fit(self.tokenizer, list(zip(queries, answers)), turns,
                     self.model.config.max_position_embeddings, generation_prompt=False)
        rows = [ids for ids, _, _ in fitted]
        self.truncated_inputs, self.tokens = sum(cut for _, _, cut in fitted), sum(map(len, rows))
        hidden = last_hidden(self.model, rows, queries, self.batch_tokens)   # (M, D)
        with torch.no_grad():
            return self.model.score(hidden).float().cpu()


def as_rewards(values, count: int) -> Tensor:
    """What a reward returned, as (count,) fp32 on the CPU; infinite numbers become NaN.

    A NaN that reaches the update skips it, and is counted. Anything but one number for each answer
    stops the run.
    """
    wanted = f"the reward must return {count} numbers, one for each answer"
    try:
        R = torch.as_tensor(values, dtype=torch.float32).cpu()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RunStopped(f"{wanted}; found {values!r:.40}: {error}") from None
    if R.shape != (count,):
        raise RunStopped(f"{wanted}; found a tensor of shape {tuple(R.shape)}")
    return torch.where(R.isfinite(), R, float("nan"))


def score(reward, queries: list[str], answers: list[str], golds: list, stopped: Tensor, *,
          rates: bool = False) -> Tensor:
    """R of pairs, (len,) fp32 on the CPU. stopped: (len,) bool, False where it was truncated.
    rates: whether their mean must be a solve rate; then RunStopped for one outside of 0..1.

    A check f of a truncated answer counts min(f(text), f("")): being cut off never pays, and half
    of an answer is none ("#### 4" may be half of 42). Where answers vote, a truncated one does not.
    A reward that is a model is asked as it is.
    """
    if reward is majority:
        answers = [answer if whole else "" for answer, whole in zip(answers, stopped.tolist())]
    R = as_rewards(reward(queries, answers, golds), len(queries))
    cut = (~stopped).nonzero()[:, 0].tolist()
    if cut and not hasattr(reward, "model"):
        empty = reward([queries[i] for i in cut], [""] * len(cut), [golds[i] for i in cut])
        R[cut] = R[cut].minimum(as_rewards(empty, len(cut)))
    if rates and ((R < 0) | (R > 1)).any():
        raise RunStopped("--challenger-reward needs rewards between 0 and 1 for a solve rate; "
                         f"found {R.min():g} to {R.max():g}")
    return R


# ---------------------------------------------------------------- a judge

@dataclass(frozen=True)
class Scale:
    """What a judge is asked for: the two texts that its prompt shows, how its score begins (with a
    place for the nonce), the highest score (the lowest is 0), and the parser of its reply."""
    places: tuple[str, str]
    opening: str
    highest: int
    parse: Callable[..., tuple[int | None, str | None]]


@dataclass
class Judge:
    """A frozen model that scores pairs of texts on a scale: SELF_REWARD or VERDICT, below.

    prompt: its instructions, with the scale's two places to fill, and perhaps {nonce}: a number of
    this step that no text can know, which the tags of the reply then carry (<Score-7>).
    reading generate: the judge writes, and the scale's parser reads what ended by itself.
    reading expected: the judge's turn is started with the scale's opening. The score is the
    expectation over the next token among the scores, renormalised: one forward pass, no parsing.
    """
    model: Llama
    tokenizer: Tokenizer
    prompt: str
    scale: Scale
    reading: str = "generate"
    temperature: float = 0.0
    max_new_tokens: int = 256
    batch_tokens: int = 65536

    def __call__(self, firsts: list[str], seconds: list[str], *, seeds: list[int] | None = None,
                 nonce: str = "") -> tuple[Tensor, list[dict]]:
        """(M,) fp32 scores of M pairs, NaN where unparsed, and a record of each for the logs.

        seeds: a random stream for each pair, where the judge samples; equal pairs with equal
        streams (or none) are judged once. Texts are shown without the judge's
        own tags (chat.without_tags). A pair that the context does not hold loses the end of its
        second text (chat.fit). Records: truncated_inputs and tags say whether these two happened;
        judge_tokens counts the tokens read and written; generate adds judgement (the reply) and
        reason (None, or why it is unparsed); expected adds mass, the probability of all scores
        together (below .5 the judge wanted to say something else).
        """
        if not firsts:
            return torch.zeros(0), []
        asked = list(zip(firsts, seconds, seeds or [None] * len(firsts)))
        distinct = {key: i for i, key in enumerate(dict.fromkeys(asked))}
        prompt, tag = fill(self.prompt, nonce=nonce), f"-{nonce}" * ("{nonce}" in self.prompt)
        turn = lambda *texts: [{"role": "user", "content": fill(
            prompt, **dict(zip(self.scale.places, texts)))}]
        shown = [[without_tags(text, prompt) for text in key[:2]] for key in distinct]
        context = self.model.config.max_position_embeddings
        fitted = fit(self.tokenizer, shown, turn, context - self.max_new_tokens)
        read = self.expected if self.reading == "expected" else self.generate
        scores, records = read([ids for ids, _, _ in fitted], list(distinct), tag)
        for record, key, texts, (_, _, cut) in zip(records, distinct, shown, fitted):
            record |= {"input_truncated": cut, "tags": texts != list(key[:2])}
        at = [distinct[key] for key in asked]
        return torch.tensor(scores)[at], [records[i] for i in at]

    def generate(self, prompts: list, keys: list, tag: str) -> tuple[list[float], list[dict]]:
        seeds = [seed for _, _, seed in keys] if keys[0][2] is not None else None
        written = sample(self.model, prompts, max_new_tokens=self.max_new_tokens,
                         temperature=self.temperature, stop_ids=self.tokenizer.stop_ids,
                         seeds=seeds, batch_tokens=self.batch_tokens)
        scores, records = [], []
        for ids, (reply,) in zip(prompts, written):
            text = text_of(self.tokenizer, reply)
            score, reason = self.scale.parse(text, stopped=reply.stopped, nonce=tag)
            scores.append(float("nan") if score is None else float(score))
            records.append({"judgement": text, "reason": reason,
                            "judge_tokens": [len(ids), len(reply.tokens)]})
        return scores, records

    @torch.no_grad()
    def expected(self, prompts: list, keys: list, tag: str) -> tuple[list[float], list[dict]]:
        opening = self.scale.opening.format(tag)
        ids = [self.tokenizer.encode(opening + str(k)) for k in range(self.scale.highest + 1)]
        start = commonprefix(ids)
        if any(len(one) != len(start) + 1 for one in ids):
            raise InputError(f"{self.tokenizer.path}: the reading expected needs a tokenizer with "
                             f"one token for each of the digits 0..{self.scale.highest}")
        hidden = last_hidden(self.model, [p + start for p in prompts],
                             [first for first, _, _ in keys], min(16384, self.batch_tokens))
        p = self.model.logits(hidden).softmax(-1)[:, [one[-1] for one in ids]].cpu()    # (M, S)
        mass = p.sum(-1)                                                                # (M,)
        scores = ((p * torch.arange(len(ids)).float()).sum(-1) / mass).tolist()         # (M,)
        reasons = [{"reason": "not_finite"} if math.isnan(score) else {} for score in scores]
        return scores, [{"mass": m, "judge_tokens": [len(ids), 0]} | reason
                        for m, ids, reason in zip(mass.tolist(), prompts, reasons)]


def open_judge(path, file, scale: Scale, **how) -> Judge:
    """A Judge whose model is still to be loaded; InputError where its prompt file lacks a place, or
    does not fit into the context of the model at `path`. how: the fields of Judge behind scale."""
    judge = Judge(None, Tokenizer(path), read_prompt(file, scale.places), scale, **how)
    opening(judge.tokenizer, file, judge.max_new_tokens, read_config(path).max_position_embeddings,
            **dict.fromkeys(scale.places, ""))
    return judge


def fill_unparsed(scores: Tensor) -> Tensor:
    """(N, G) scores with NaN where unparsed -> the same without: the mean of the query's parsed
    ones, which leaves the answers' advantages alone.

    Where none of a query's scores can be parsed they are 0, the lowest: a query that breaks the
    judge's format must not gain by it. (This also punishes failures of the judge.)
    """
    per_query = scores.nanmean(dim=1, keepdim=True).nan_to_num(0.0)          # (N, 1)
    return torch.where(scores.isnan(), per_query, scores)                    # (N, G)


# Possessive quantifiers (*+) never back up: a megabyte of "<   <   <" is read in linear time.
TAG = re.compile(r"<[ \t\r\n]*+(/?)[ \t\r\n]*+(score|calculation)(-[0-9]++)?[ \t\r\n]*+>",
                 re.IGNORECASE | re.ASCII)
SUM = re.compile(r"([01](?:[ \t]*+\+[ \t]*+[01]){6})[ \t]*+(?:=[ \t]*+([0-7]))?")


def parse_self_reward(text: str, *, stopped: bool = True,
                      nonce: str = "") -> tuple[int | None, str | None]:
    """A judgement's score 0..7 and None, or None and the reason, one of REASONS.
    Total: any string, linear time.

    Valid is a whole <Score>k</Score>, k one ASCII digit 0..7, the tags in any case, blanks allowed;
    several must agree; a <Calculation>, where there is one, holds seven terms of 0 or 1 that sum to
    k. Nothing is guessed: a judge that does not keep to the form is counted, not repaired.
    stopped=False: the token limit cut the judgement off, and the score that it would have come to
    is not known. nonce: what the tags must carry behind their name ("-7": <Score-7>); others are
    text. After the last score stands nothing: what was quoted on the way is not the verdict.
    """
    if not stopped:
        return None, "truncated"
    inside = {"score": [], "calculation": []}
    broken = set()                                                 # kinds whose tags do not pair up
    opened = None
    last = 0                                                       # where the last tag ends
    for tag in TAG.finditer(text):
        if (tag[3] or "") != nonce:
            continue
        closing, kind, last = bool(tag[1]), tag[2].lower(), tag.end()
        if not closing:
            if opened:
                broken.add(opened[0])
            opened = (kind, tag.end())
        elif opened and opened[0] == kind:
            inside[kind].append(text[opened[1]:tag.start()].strip(" \t\r\n"))
            opened = None
        else:
            broken |= {kind} | ({opened[0]} if opened else set())
            opened = None
    if opened:
        broken.add(opened[0])

    if "score" in broken or not inside["score"]:
        return None, "unclosed" if "score" in broken else "no_tag"
    if text[last:].strip():
        return None, "not_last"
    for value in inside["score"]:
        if not re.fullmatch(r"[0-7]", value):
            return None, ("out_of_range" if re.fullmatch(r"-[0-9]+|[89]|[1-9][0-9]+", value)
                          else "not_a_score")
    if len(set(inside["score"])) > 1:
        return None, "conflict"
    score = int(inside["score"][0])
    for value in inside["calculation"]:
        terms = SUM.fullmatch(value)
        if not terms or terms[1].count("1") != score or terms[2] not in (None, str(score)):
            return None, "bad_calculation"
    if "calculation" in broken:
        return None, "bad_calculation"
    return score, None


LINE = r"^[ \t]*+Score{}[ \t]*+:(.*+)$"


def parse_verdict(text: str, *, stopped: bool = True,
                  nonce: str = "") -> tuple[int | None, str | None]:
    """A judgement's verdict 0 or 1 and None, or None and the reason, one of VERDICT_REASONS.
    Total: any string, linear time.

    Valid is a judgement whose first line is "Score: 0" or "Score: 1" and nothing else (blanks
    allowed); below it may stand words, but no other score. First, because a judge that quotes what
    it was shown before it decides could be made to quote a score.
    stopped=False: the token limit cut the judgement off. nonce: what must stand behind "Score"
    ("-7": "Score-7: 1").
    """
    if not stopped:
        return None, "truncated"
    text, line = text.strip(" \t\r\n"), re.compile(LINE.format(nonce), re.MULTILINE | re.ASCII)
    values = [value.strip(" \t\r") for value in line.findall(text)]
    if not values:
        return None, "no_score"
    if not line.match(text):
        return None, "not_first"
    for value in values:
        if not re.fullmatch(r"[01]", value):
            return None, ("out_of_range" if re.fullmatch(r"-[0-9]+|[2-9]|[1-9][0-9]+", value)
                          else "not_a_score")
    return (int(values[0]), None) if len(set(values)) == 1 else (None, "conflict")


SELF_REWARD = Scale(("instruction", "response"), "<Score{}>", 7, parse_self_reward)
VERDICT = Scale(("reference", "prediction"), "Score{}: ", 1, parse_verdict)


# ---------------------------------------------------------------- verifiable rewards

NUMBER = re.compile(r"(?<![0-9A-Za-z)])-\$?(?=[.]?[0-9])"
                    # A lookahead after each group: one after all of them reads ",123" * n in n^2.
                    r"|[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++(?:\.[0-9]+)?"
                    r"|[0-9]++(?:\.[0-9]+)?|\.[0-9]+")


def numbers(text: str) -> Iterator[str]:
    """The numbers of a text as GSM8K writes them ($1,234.50, -3, 42., \\boxed{7}), in order."""
    minus = None
    # LaTeX's thousands comma, the minus sign.
    for match in NUMBER.finditer(text.replace("{,}", ",").replace("\u2212", "-")):
        if match[0][0] == "-":             # a match of its own, and the number follows at once
            minus = match.end()
            continue
        yield "-" * (minus == match.start()) + match[0]


def final_number(text: str) -> Decimal | None:
    """The number that a text gives as its answer, or None: the first one behind the first "####",
    which is GSM8K's own rule, whatever comes after it; without that marker the last one in the last
    \\boxed{}, else the last one of the text."""
    _, marker, answer = text.partition("####")
    last = lambda text: next(iter(deque(numbers(text), maxlen=1)), None)
    found = next(numbers(answer), None) if marker else last(boxed(text) or "") or last(text)
    return None if found is None else Decimal(found.replace(",", ""))


BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{)?|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
    """What the last whole \\boxed{...} or \\fbox{...} holds, braces nested, and the word
    behind a \\boxed without braces; None without one."""
    opened, last = [], (-1, -1)
    for match in BOX.finditer(text):
        if match[0] == "}":
            start = opened.pop() if opened else None
            last = max(last, (start, match.start())) if start is not None else last
        elif match[0] == "{" or match[1]:
            opened.append(match.end() if match[1] else None)
        elif match[0][1:4] in ("box", "fbo") and (word := re.match(r"\S+", text[match.end():])):
            last = max(last, (match.end(), match.end() + word.end()))
    return text[last[0]:last[1]].strip() if last[0] >= 0 else None


def exact(queries: list[str], answers: list[str], golds: list[str]) -> Tensor:
    """1.0 where the answer's final number equals the gold answer's, else 0.0: (M,) fp32."""
    right = [(n := final_number(a)) is not None and n == final_number(g)
             for a, g in zip(answers, golds)]
    return torch.tensor(right, dtype=torch.float32)


def majority(queries: list[str], answers: list[str], golds: list | None = None) -> Tensor:
    """1.0 where an answer's final number is the most frequent one of its query's, else 0.0:
    (M,) fp32. No gold answer and no model is needed.

    Answers without a number do not vote, and earn 0; where two numbers share the first place, all
    earn 0. Equal answers vote each. It can only strengthen what the Solver mostly says already.
    """
    numbers = [final_number(answer) for answer in answers]
    votes = {query: Counter() for query in queries}
    for query, number in zip(queries, numbers):
        votes[query].update([number] if number is not None else [])
    first = {query: max(count.values(), default=0) for query, count in votes.items()}
    alone = {query: list(votes[query].values()).count(most) == 1 for query, most in first.items()}
    return torch.tensor([float(number is not None and alone[query]
                               and votes[query][number] == first[query])
                         for query, number in zip(queries, numbers)])


def math_answers(queries: list[str], answers: list[str], golds: list[str]) -> Tensor:
    """1.0 where what the answer boxes has the gold answer's value, else 0.0: (M,) fp32."""
    right = [(said := boxed(a)) is not None and same_value(said, g) for a, g in zip(answers, golds)]
    return torch.tensor(right, dtype=torch.float32)


# By name; train.py adds the embedded world's.
CHECKS = {"exact": exact, "math": math_answers, "majority": majority}


def open_reward(name: str, path, **how):
    """The reward of a name: a check, FILE:FUNCTION, else the RewardModel at `path` (how: its
    arguments)."""
    if name in CHECKS:
        return CHECKS[name]
    return load_function(name) if ":" in name else RewardModel(path, **how)


# Which need a gold answer, and what one must be.
NEED_GOLD = {"exact": ("a number", lambda gold: final_number(gold) is not None),
             "math": ("a text", lambda gold: math_verify() and gold.strip() != "")}
