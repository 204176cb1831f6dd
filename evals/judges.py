"""Which of two answers is better: a reward model, a local Llama, or an HTTP endpoint decides.

A pair is {"item", "query", "subset", "a", "b"}: a is the measured model's answer, b the baseline's.
Preferences are AlpacaEval's: 2 where a is better, 1 where b is, between them when in doubt, None
where the judge failed. Judges that read both answers favour a position (mostly the first), so each
pair is judged in both orders and the mean counts. Each verdict is written as soon as it is there.
"""
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
TRIES, BACKOFF = 7, 1.0                         # of a question; seconds, doubled with each try
RETRIED, UNFIT = (408, 429), (400, 413, 422)    # and 500 to 599; this question, not the judge


# ---------------------------------------------------------------- what is judged

def read_outputs(path: str) -> dict[tuple[str, int], dict]:
    """A file of AlpacaEval's format: {(instruction, which of equal ones): its entry}."""
    seen, outputs = Counter(), {}
    for where, entry in read_entries(path):
        if not isinstance(entry, dict) or not all(
                isinstance(entry.get(key), str) for key in ("instruction", "output")):
            raise InputError(f"{path}, {where}: expected an object with instruction and output")
        seen[entry["instruction"]] += 1
        outputs[entry["instruction"], seen[entry["instruction"]]] = entry
    if not outputs:
        raise InputError(f"{path}: no outputs in it")
    return outputs


def read_pairs(*files: str) -> tuple[list[dict], list[str]]:
    """Pairs of two files' answers to the same instruction, in the order of the first file, and the
    generators' names. Instructions that one file lacks are left out."""
    ours, theirs = sides = [read_outputs(file) for file in files]
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    if not both:
        raise InputError(f"{files[0]} and {files[1]} share no instruction")
    if len(both) < max(len(ours), len(theirs)):
        print(f"{len(both)} instructions are in both files ({len(ours)} and {len(theirs)})")
    names = [str(next(iter(side.values())).get("generator") or Path(file).stem)
             for side, file in zip(sides, files)]
    return [{"item": i, "query": a["instruction"], "a": a["output"], "b": b["output"],
             "subset": a.get("dataset", b.get("dataset"))} for i, (a, b) in enumerate(both)], names


def read_annotations(path: str, name: str | None = None) -> list[tuple[float | None, str | None]]:
    """Preference - 1 (None: the judge failed) and subset of each of AlpacaEval's annotations.

    1 is for generator_1, 2 for generator_2, between them weighted; 0 and 1.5 are draws. A file with
    several generator_2 (AlpacaEval's own cache) needs the name of one.
    """
    found = {}                                              # generator_2: its values and subsets
    for where, entry in read_entries(path):
        preference = entry.get("preference", "none") if isinstance(entry, dict) else "none"
        if preference is None or preference != preference:                   # NaN: null in pandas
            value = None
        elif type(preference) in (int, float) and (preference == 0 or 1 <= preference <= 2):
            value = preference - 1 if preference else 0.5
        else:
            raise InputError(f"{path}, {where}: expected a preference of 1 to 2, 0 or null")
        found.setdefault(str(entry.get("generator_2")), []).append((value, entry.get("dataset")))
    if not found:
        raise InputError(f"{path}: no annotations in it")
    if name is None and len(found) > 1:
        raise InputError(f"{path} judges {len(found)} models ({', '.join(sorted(found))}): choose "
                         "one with --generator NAME")
    if name is not None and name not in found:
        raise InputError(f"{path}: no generator_2 {name!r} in it")
    return found[name or next(iter(found))]


def questions(pairs: list[dict], done: list[dict]):
    """(pair, whether a is shown first) for each of both orders that has no verdict yet."""
    had = {(r["item"], r["first"]) for r in done if r["preference"] is not None}
    return [(pair, first == "a") for pair in pairs for first in "ab"
            if (pair["item"], first) not in had]


def verdict(pair: dict, preference: float | None, **more) -> dict:
    return {"item": pair["item"], "query": pair["query"], "subset": pair["subset"],
            "preference": preference} | more


def asked(prompt: str, pair: dict, a_first: bool) -> str:
    """The judge's question."""
    first, second = (pair["a"], pair["b"]) if a_first else (pair["b"], pair["a"])
    texts = {"instruction": pair["query"], "first": first, "second": second}
    return fill(prompt, **{name: without_tags(text, prompt) for name, text in texts.items()})


def report(records: list[dict]):
    """Print how many replies could not be parsed, how often both orders of a pair gave the same
    verdict, and whether the judge favours a position."""
    latest = {(r["item"], r["first"]): r for r in records}.values()     # some were asked again
    for key, what in (("reply", "replies could not be parsed"),
                      ("refused", "questions were not answered")):
        texts = [r[key] or "" for r in latest if r["preference"] is None and key in r]
        if texts:
            print(f"{len(texts)} {what}, for example {texts[0][-100:]!r}; the same command asks "
                  "again")
    masses = [r["mass"] for r in latest if "mass" in r]
    if masses and sum(masses) < len(masses) / 2:
        print(f"the judge wanted to say something else than 1 or 2: together they had a "
              f"probability of {sum(masses) / len(masses):.2f} on average")
    values, first = {}, []
    for record in latest:
        if record["preference"] is not None and record["first"]:
            values.setdefault(record["item"], []).append(record["preference"])
            x = record["preference"] - 1                                # 1: a is preferred
            first.append(x if record["first"] == "a" else 1 - x)
    both = [pair for pair in values.values() if len(pair) == 2]
    if both:
        agree = sum((x > 1.5) - (x < 1.5) == (y > 1.5) - (y < 1.5) for x, y in both)
        share = sum(first) / len(first)
        print(f"the two orders agree on {agree} of {len(both)} pairs; the answer shown first is "
              f"preferred in {share:.0%}" + ("" if abs(share - 0.5) < 0.15 else
              ": this judge goes by the place, and its win-rate says little"))


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
    """The judge's turn is started with "Better: ", and the preference is the probability of 1
    against 2 as the next token. Nothing has to be parsed; mass is what these two had together."""
    one, two = tokenizer.encode("Better: 1"), tokenizer.encode("Better: 2")
    if len(one) != len(two) or one[:-1] != two[:-1]:
        raise InputError(f"{tokenizer.path}: as a judge it needs a token each for 1 and 2")
    left = questions(pairs, done)
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

# ---------------------------------------------------------------- a judge behind HTTP

class Refused(Exception):
    """The server does not accept this question (too long, mostly)."""


class Endpoint:
    """Chat completions of an OpenAI-compatible server. fields: further ones of a request, where
    None leaves one out; seconds: how long a whole reply may take."""

    def __init__(self, url: str, model: str, *, max_tokens: int = 1024, seconds: float = 120,
                 fields: dict | None = None):
        self.key = os.environ.get(KEY, "").strip()
        # A key in the URL would be printed, and one with a line break be shown by the error.
        if not re.fullmatch(r"https?://(\[[\w:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w.~%/-]*)?", url, re.A):
            raise InputError("--judge: a plain URL as http://localhost:8000/v1 is needed; the key "
                             f"comes from the environment variable {KEY} alone")
        if not re.fullmatch(r"[!-~]*", self.key):
            raise InputError(f"{KEY} holds characters that no key has")
        suffix = "/chat/completions"
        self.url = url.rstrip("/").removesuffix(suffix) + suffix
        self.seconds, self.stop = seconds, threading.Event()         # set: nobody waits any more
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens} | (fields or {})
        self.body = {key: value for key, value in body.items() if value is not None}

    def ask(self, text: str) -> str | None:
        """The reply to a message; None where the server sent none (filtered).

        Refused for this message alone; InputError where no question can work (wrong key or
        address), and after TRIES tries. No text that is returned or raised holds the key.
        """
        body = self.body | {"messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"}
        for attempt in range(TRIES):
            try:
                request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
                if self.key:
                    request.add_unredirected_header("Authorization", f"Bearer {self.key}")
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    return self.hidden(content_of(self.whole(response)))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {self.said(error)}"
                if error.code in UNFIT:
                    raise Refused(reason) from None
                if error.code < 500 and error.code not in RETRIED:
                    break
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                reason = self.hidden(f"{type(error).__name__}: {error}")
            if attempt == TRIES - 1 or self.stop.wait(BACKOFF * 2 ** attempt):
                break
        self.stop.set()
        raise InputError(f"{self.url}: {reason} (the verdicts so far are kept: the same command "
                         "goes on)")

    def whole(self, response) -> bytes:
        """A whole reply; TimeoutError where it takes longer than it may (a server can trickle)."""
        deadline, text = time.monotonic() + self.seconds, b""
        while piece := response.read1(2 ** 16):
            text += piece
            if time.monotonic() > deadline or len(text) > 2 ** 22:
                raise TimeoutError(f"no whole reply in {self.seconds:g} s")
        return text

    def said(self, error: urllib.error.HTTPError) -> str:
        """The beginning of an error's body. The key is hidden before the cut could halve it."""
        try:
            return self.hidden(self.whole(error).decode(errors="replace"))[:200]
        except (OSError, http.client.HTTPException):
            return ""

    def hidden(self, text: str | None) -> str | None:
        """A server's words without our key; one of few letters is a local server's stand-in."""
        return text.replace(self.key, "[key]") if text and len(self.key) >= 8 else text


def content_of(reply: bytes) -> str | None:
    """A chat completion's text, None where the server gave none; ValueError if it is no reply."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
        # UTF-8 has no half characters, which JSON may hold.
        return None if content is None else content.encode(errors="replace").decode()
    except (LookupError, TypeError, AttributeError):
        said = reply[:200].decode(errors="replace")
        raise ValueError(f"no chat completion: {said}") from None


LINE = re.compile(r"^[ \t*_>#-]*better[ \t*_]*:[ \t*_\"']*(1|2|tie)[ \t*_.\"']*$", re.I | re.M)


def parse_preference(reply: str | None) -> str | None:
    """"1", "2" or "tie" where the reply's lines "Better: ..." agree on it, else None."""
    said = {match.lower() for match in LINE.findall(reply or "")}
    return said.pop() if len(said) == 1 else None


def json_object(text: str) -> dict:
    """The value of --judge-fields."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def by_endpoint(endpoint: Endpoint, prompt: str, pairs: list[dict], done: list[dict], write,
                concurrency: int):
    """Ask what has no verdict yet, `concurrency` at a time. A reply that cannot be parsed has no
    verdict, and the next command asks again. A server that fails ends the command."""
    lock = threading.Lock()

    def work(pair, a_first):
        if endpoint.stop.is_set():                                  # another one failed for good
            return
        record = dict(orders=2, first="a" if a_first else "b")
        if pair["a"] == pair["b"]:                                  # nothing to ask
            preference = 1.5
        else:
            try:
                record["reply"] = endpoint.ask(asked(prompt, pair, a_first))
            except Refused as error:
                record["refused"] = str(error)
            ours = {"1": 2, "2": 1, "tie": 1.5} if a_first else {"1": 1, "2": 2, "tie": 1.5}
            preference = ours.get(parse_preference(record.get("reply")))
        with lock:
            write(verdict(pair, preference, **record))

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            futures = [pool.submit(work, *question) for question in questions(pairs, done)]
            for future in tqdm(as_completed(futures), total=len(futures), desc="judging"):
                future.result()
        finally:                        # Ctrl-C too: what is under way is still written
            endpoint.stop.set()
