"""Which of two answers is better: a reward model, a local Llama, or an endpoint decides.

A pair is {"item", "query", "subset", "a", "b"}: a is the measured model's answer, b the baseline's.
Preferences are AlpacaEval's: 2 where a is better, 1 where b is, between them when in doubt, None
where the judge failed. Judges that read both answers favour a place (mostly the first), so each
pair is asked in both orders and the mean counts. A verdict is handed over as soon as it is there.
"""
import email.utils
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from model import Llama
from plumbing.chat import Tokenizer, fill, without_tags
from plumbing.data import read_entries
from plumbing.files import InputError
from rewards import RewardModel, last_hidden

KEY = "JUDGE_API_KEY"            # not OPENAI_API_KEY, which must go to no other host than OpenAI's
TRIES, BACKOFF, LONGEST_WAIT = 6, 1.0, 600.0                        # a question; seconds; seconds
RETRIED = (408, 409, 425, 429)                                      # and 500 to 599
UNFIT = (400, 413, 422)                                             # this question, not the judge
IN_A_ROW = 5                                                        # failed questions: then give up


# ---------------------------------------------------------------- what is judged

def read_outputs(path: str) -> list[dict]:
    """Answers in AlpacaEval's format: objects with instruction and output, at least."""
    outputs = []
    for where, entry in read_entries(path):
        if not isinstance(entry, dict) or not all(
                isinstance(entry.get(key), str) for key in ("instruction", "output")):
            raise InputError(f"{path}, {where}: expected an object with instruction and output")
        outputs.append(entry)
    if not outputs:
        raise InputError(f"{path}: no outputs in it")
    return outputs


def read_pairs(ours_file: str, theirs_file: str) -> tuple[list[dict], tuple[str, str]]:
    """The pairs of two files, and their generators' names (the file's where it names none)."""
    ours, theirs = read_outputs(ours_file), read_outputs(theirs_file)
    pairs = pair_outputs(ours, theirs)
    if not pairs:
        raise InputError(f"{ours_file} and {theirs_file} share no instruction")
    if len(pairs) < max(len(ours), len(theirs)):
        print(f"{len(pairs)} instructions are in both files ({len(ours)} and {len(theirs)})")
    name = lambda outputs, file: str(outputs[0].get("generator") or Path(file).stem)
    return pairs, (name(ours, ours_file), name(theirs, theirs_file))


def pair_outputs(ours: list[dict], theirs: list[dict]) -> list[dict]:
    """Pairs of answers to the same instruction, in the order of ours; equal instructions in turn.

    Instructions that one side lacks are left out.
    """
    def by_instruction(outputs):
        seen, found = Counter(), {}
        for entry in outputs:
            seen[entry["instruction"]] += 1
            found[entry["instruction"], seen[entry["instruction"]]] = entry
        return found

    theirs = by_instruction(theirs)
    both = [(entry, theirs[key]) for key, entry in by_instruction(ours).items() if key in theirs]
    return [{"item": i, "query": a["instruction"], "a": a["output"], "b": b["output"],
             "subset": a.get("dataset", b.get("dataset"))} for i, (a, b) in enumerate(both)]


def read_annotations(path: str, name: str | None = None) -> list[tuple[float | None, str | None]]:
    """Preference - 1 (None: the judge failed) and subset of each of AlpacaEval's annotations.

    1 is for generator_1, 2 for generator_2, between them weighted; 0 and 1.5 are draws. A file with
    several generator_2 (AlpacaEval's own cache) needs the name of one.
    """
    values, entries = [], read_entries(path)
    names = sorted({str(e.get("generator_2")) for _, e in entries if isinstance(e, dict)})
    if name is None and len(names) > 1:
        raise InputError(f"{path} judges {len(names)} models ({', '.join(names[:5])}"
                         f"{', ...' * (len(names) > 5)}): choose one with --generator NAME")
    if name is not None and name not in names:
        raise InputError(f"{path}: no generator_2 {name!r} in it")
    for where, entry in entries:
        if name is not None and isinstance(entry, dict) and str(entry.get("generator_2")) != name:
            continue
        preference = entry.get("preference", "none") if isinstance(entry, dict) else "none"
        number = isinstance(preference, (int, float)) and not isinstance(preference, bool)
        if preference is not None and not (number and (preference == 0 or 1 <= preference <= 2)):
            if not (number and preference != preference):                    # NaN: null in pandas
                raise InputError(f"{path}, {where}: expected a preference of 1 to 2, 0 or null")
            preference = None
        value = None if preference is None else 0.5 if preference == 0 else preference - 1
        values.append((value, entry.get("dataset")))
    if not values:
        raise InputError(f"{path}: no annotations in it")
    return values


def questions(pairs: list[dict], done: list[dict]):
    """(pair, whether a is shown first) for each of both orders that has no verdict yet."""
    had = {(r["item"], r["first"]) for r in done if r["preference"] is not None}
    return [(pair, first == "a") for pair in pairs for first in "ab" if (pair["item"], first)
            not in had]


def verdict(pair: dict, preference: float | None, **more) -> dict:
    return {"item": pair["item"], "query": pair["query"], "subset": pair["subset"],
            "preference": preference} | more


def asked(prompt: str, pair: dict, a_first: bool) -> str:
    """The judge's question."""
    first, second = (pair["a"], pair["b"]) if a_first else (pair["b"], pair["a"])
    texts = {"instruction": pair["query"], "first": first, "second": second}
    return fill(prompt, **{name: without_tags(text, prompt) for name, text in texts.items()})


# ---------------------------------------------------------------- judges on this machine

def by_reward(judge: RewardModel, pairs: list[dict], done: list[dict], write, batch: int):
    """The higher reward wins. The answers are read one by one: there is no order."""
    had = {record["item"] for record in done}
    left = [pair for pair in pairs if pair["item"] not in had]
    for start in tqdm(range(0, len(left), batch), desc="judging", unit=f" x {batch}"):
        some = left[start:start + batch]
        a, b = (judge([p["query"] for p in some], [p[side] for p in some]).tolist()
                for side in "ab")
        for pair, ours, theirs in zip(some, a, b):
            preference = 1.5 + (ours > theirs) / 2 - (ours < theirs) / 2
            preference = None if math.isnan(ours + theirs) else preference
            write(verdict(pair, preference, orders=1, first=None, reward_a=ours, reward_b=theirs))


def by_llama(judge: Llama, tokenizer: Tokenizer, prompt: str, pairs: list[dict], done: list[dict],
             write, batch: int):
    """Weighted: the judge's turn is started with "Better: ", and the preference is the probability
    of 1 against 2 as the next token. Nothing to parse; mass is what these two had together."""
    one, two = tokenizer.encode("Better: 1"), tokenizer.encode("Better: 2")
    if len(one) != len(two) or one[:-1] != two[:-1]:
        raise InputError(f"{tokenizer.path}: as a judge it needs a token each for 1 and 2")
    left, masses = questions(pairs, done), []
    turns = [[{"role": "user", "content": asked(prompt, *question)}] for question in left]
    rows = [tokenizer.chat(turn) + one[:-1] for turn in turns]
    longest, context = max(map(len, rows), default=0), judge.config.max_position_embeddings
    if longest > context:
        raise InputError(f"a question of {longest} tokens does not fit into the judge's context of "
                         f"{context}")
    for start in tqdm(range(0, len(left), batch), desc="judging", unit=f" x {batch}"):
        some = left[start:start + batch]
        with torch.no_grad():
            hidden = last_hidden(judge, rows[start:start + batch],
                                 [pair["item"] for pair, _ in some], 16384)  # (b, D)
            p = judge.logits(hidden).softmax(-1)                             # (b, V)
        p = p[:, [one[-1], two[-1]]].cpu()                                   # (b, 2)
        mass = p.sum(-1)                                                     # (b,)
        for (pair, a_first), share, m in zip(some, (p[:, 0] / mass).tolist(), mass.tolist()):
            write(verdict(pair, 1 + (share if a_first else 1 - share), orders=2,
                          first="a" if a_first else "b", mass=m))
        masses += mass.tolist()
    if masses and sum(masses) < len(masses) / 2:
        print(f"the judge wanted to say something else than 1 or 2: together they had a "
              f"probability of {sum(masses) / len(masses):.2f} on average")


# ---------------------------------------------------------------- a judge behind HTTP

class Unanswered(Exception):
    """A question that got no reply, after all tries."""


class Endpoint:
    """Chat completions of an OpenAI-compatible server. The key goes into one header and no further:
    not through redirects (all are refused), not into messages, not into what is stored."""

    def __init__(self, url: str, model: str, *, max_tokens: int = 1024, seconds: float = 120,
                 fields: dict | None = None):
        if not re.fullmatch(r"https?://(\[[\w:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w.~%/-]*)?", url, re.A):
            raise InputError("--judge: a plain URL as http://localhost:8000/v1 is needed; the key "
                             f"comes from the environment variable {KEY} alone")
        self.key = os.environ.get(KEY, "").strip()
        if not re.fullmatch(r"[!-~]*", self.key):
            raise InputError(f"{KEY} holds characters that no key has")
        suffix = "/chat/completions"
        self.url = url.rstrip("/").removesuffix(suffix) + suffix
        self.model, self.max_tokens, self.seconds = model, max_tokens, seconds
        self.fields = fields or {}                                  # of a request; None: left out
        self.stop = threading.Event()                               # ends waiting
        self.opener = urllib.request.build_opener(NoRedirect)

    def ask(self, text: str) -> str | None:
        """The reply to a message; None where the server sent none (refused, filtered).

        Unanswered after TRIES tries, or at once where the server finds this question unfit.
        InputError where no question can work: wrong key, wrong address, a redirect.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": text}],
                "temperature": 0, "max_tokens": self.max_tokens} | self.fields
        body = {key: value for key, value in body.items() if value is not None}
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(TRIES):
            wait = BACKOFF * 2 ** attempt
            try:
                with self.opener.open(request, timeout=self.seconds) as response:
                    content = content_of(json.loads(self._read(response)))
                    return None if content is None else self._hide(content)
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code} {self._said(error)}"
                if error.code in UNFIT:
                    break
                if error.code not in RETRIED and error.code < 500:
                    self.stop.set()
                    raise InputError(f"{self.url}: {reason}") from None
                wait = max(wait, retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                reason = self._hide(f"{type(error).__name__}: {error}")
            if attempt == 2:                    # else a minute would pass without a word
                tqdm.write(f"still trying: {' '.join(reason.split())}")
            if wait > LONGEST_WAIT or attempt == TRIES - 1 or self.stop.wait(wait):
                break
        raise Unanswered(f"{self.url}: {' '.join(reason.split())}")

    def _read(self, response) -> bytes:
        """A whole reply; TimeoutError where it takes longer than it may (a server can trickle)."""
        deadline, text = time.monotonic() + self.seconds, b""
        while piece := response.read1(2 ** 16):
            text += piece
            if time.monotonic() > deadline or len(text) > 2 ** 22:
                raise TimeoutError(f"no whole reply in {self.seconds:g} s")
        return text

    def _hide(self, text: str) -> str:
        """What a server said, fit to be written down: without our key, without half characters."""
        text = text.encode(errors="replace").decode()
        # A shorter one is a local server's stand-in ("x"), no secret, and part of common words.
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            said = self._read(error)[:2000].decode(errors="replace")
            return " ".join(self._hide(said).split())[:200]
        except (OSError, http.client.HTTPException):
            return ""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the Authorization header on to any host that a redirect names."""

    def redirect_request(self, *args):
        return None


def content_of(reply) -> str | None:
    """A chat completion's text, None where the server gave none; ValueError if it is no reply."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        error = reply.get("error") if isinstance(reply, dict) else None
        said = error.get("message") if isinstance(error, dict) else error
        raise ValueError(f"no chat completion{f', but: {said}' if said else ''}") from None
    if content is not None and not isinstance(content, str):
        raise ValueError("no chat completion")
    return content


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks to wait (a number or a date), 0 if it says nothing."""
    if value is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


LINE = re.compile(r"^[ \t*_>#-]*better[ \t*_]*:[ \t*_\"']*(1|2|tie)[ \t*_.\"']*$", re.I | re.M)


def parse_preference(reply: str | None) -> str | None:
    """"1", "2" or "tie" where the reply's lines "Better: ..." agree on it, else None."""
    said = {match.lower() for match in LINE.findall(reply or "")}
    return said.pop() if len(said) == 1 else None


def read_fields(text: str | None) -> dict:
    """--judge-fields: further fields of a request."""
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise InputError(f"--judge-fields: {error}") from None
    if not isinstance(fields, dict):
        raise InputError("--judge-fields must be a JSON object")
    return fields


def latest(records: list[dict]) -> list[dict]:
    """Of each question the last record: one that was asked again counts once."""
    return list({(record["item"], record["first"]): record for record in records}.values())


def report_unparsed(records: list[dict]):
    """How many replies could not be parsed, and one of them."""
    unparsed = [r for r in latest(records) if r["preference"] is None]
    if unparsed:
        said = unparsed[0].get("reply")
        print(f"{len(unparsed)} replies could not be parsed, for example "
              f"{'an empty one' if not said else repr(said[-100:])}; the same command asks again")


def report_orders(records: list[dict]):
    """How often both orders of a pair gave the same verdict, and whether the place decided."""
    by_item, first = {}, []
    for record in latest(records):
        if record["preference"] is not None and record["first"]:
            by_item.setdefault(record["item"], []).append(record["preference"])
            x = record["preference"] - 1                            # 1: a is preferred
            first.append(x if record["first"] == "a" else 1 - x)
    both = [values for values in by_item.values() if len(values) == 2]
    if not both:
        return
    agree = sum((x > 1.5) - (x < 1.5) == (y > 1.5) - (y < 1.5) for x, y in both)
    share = sum(first) / len(first)
    print(f"the two orders agree on {agree} of {len(both)} pairs; the answer shown first is "
          f"preferred in {share:.0%}" + ("" if abs(share - 0.5) < 0.15 else
          ": this judge goes by the place, and its win-rate says little"))


def by_endpoint(endpoint: Endpoint, prompt: str, pairs: list[dict], done: list[dict], write,
                concurrency: int) -> int:
    """Ask what has no verdict yet, `concurrency` at a time; returns how many got no reply.

    A reply that cannot be parsed has no verdict, and the next command asks again, as it does where
    there was no reply. IN_A_ROW questions without a reply end the command.
    """
    lock, row = threading.Lock(), 0

    def work(pair, a_first):
        if endpoint.stop.is_set():                                  # another one failed for good
            return
        record = dict(orders=2, first="a" if a_first else "b")
        if pair["a"] == pair["b"]:                                  # nothing to ask
            preference = 1.5
        else:
            record["reply"] = endpoint.ask(asked(prompt, pair, a_first))
            said = parse_preference(record["reply"])
            ours = {"1": 2, "2": 1, "tie": 1.5} if a_first else {"1": 1, "2": 2, "tie": 1.5}
            preference = ours.get(said)
        with lock:
            write(verdict(pair, preference, **record))

    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(work, *question) for question in questions(pairs, done)]
        failed = 0
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="judging"):
                error = future.exception()
                if error and not isinstance(error, Unanswered):
                    raise error
                failed, row = failed + bool(error), row + 1 if error else 0
                if row == IN_A_ROW:
                    raise InputError(f"{row} questions in a row got no reply, the last: {error}; "
                                     "the verdicts so far are kept: run the same command to go on")
        except BaseException:                    # Ctrl-C too: what is under way still gets written
            endpoint.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            tqdm.write("stopping once the questions under way are answered")
            raise
    return failed
