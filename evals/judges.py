"""Which of two answers is better: a reward model, a local Llama, or an HTTP endpoint decides.

A pair is {"item", "query", "subset", "a", "b"}: a is the measured model's answer, b the baseline's.
Preferences are AlpacaEval's: 2 where a is better, 1 where b is, between them when in doubt, None
where the judge failed. Judges that read both answers favour a position (mostly the first), so each
pair is judged in both orders and the mean counts. Each verdict is written as soon as it is there.
"""
import contextlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evals.benchmarks import read_problems
from evals.results import in_batches
from model import Llama
from plumbing.chat import Tokenizer, fill, without_tags
from plumbing.data import read_entries
from plumbing.files import InputError
from rewards import RewardModel, last_hidden

KEY = "JUDGE_API_KEY"            # not OPENAI_API_KEY, which must go to no other host than OpenAI's
TRIES, BACKOFF = 7, 1.0                         # of a question; seconds, doubled with each try
RETRIED, UNFIT = (408, 429), (400, 413, 422)    # and 500 to 599; this question, not the judge


# ---------------------------------------------------------------- what is judged

def read_outputs(path: str) -> dict[str, dict]:
    """A file of AlpacaEval's format: {instruction: its entry}, of equal instructions the last."""
    entries = (problem["problem"] for problem in read_problems("outputs", path, None)[0])
    return {entry["instruction"]: entry for entry in entries}


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
        try:
            value = None if entry["preference"] is None else (entry["preference"] or 1.5) - 1
        except (LookupError, TypeError):
            value = math.inf
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{path}, {where}: expected a preference of 1 to 2, 0 or null")
        found.setdefault(str(entry.get("generator_2")), []).append((value, entry.get("dataset")))
    if name is None and len(found) == 1:
        (name,) = found
    if name not in found:
        raise InputError(f"{path} has annotations of {', '.join(sorted(found)) or 'no model'}: "
                         "choose one with --generator NAME")
    return found[name]


# A question: a pair, and which answer is shown first, "a" or "b" (None: each is read alone).
Question = tuple[dict, str | None]


def questions(pairs: list[dict], orders, done: list[dict]) -> list[Question]:
    """The questions that have no verdict yet. orders: which answers are to be shown first."""
    had = {(r["item"], r["first"]) for r in done if r["preference"] is not None}
    return [(pair, first) for pair in pairs for first in orders
            if (pair["item"], first) not in had]


def asked(prompt: str, pair: dict, first: str) -> str:
    """The judge's question. first: "a" or "b", the answer that is shown first."""
    second = "b" if first == "a" else "a"
    texts = {"instruction": pair["query"], "first": pair[first], "second": pair[second]}
    return fill(prompt, **{name: without_tags(text, prompt) for name, text in texts.items()})


def verdict(pair: dict, first: str | None, share: float | None, **more) -> dict:
    """A record of the file of verdicts. share: 1 if the answer shown first is better (or a, where
    first is None), 0 if the other one is, None where the judge failed."""
    share = 1 - share if first == "b" and share is not None else share
    return {"item": pair["item"], "query": pair["query"], "subset": pair["subset"], "first": first,
            "orders": 2 if first else 1, "preference": None if share is None else 1 + share} | more


def report(records: list[dict]):
    """Print how many questions have no verdict, how often both orders of a pair gave the same one,
    and whether the judge favours a position."""
    latest = {(r["item"], r["first"]): r for r in records}              # some were asked again
    failed = [r.get("reply") or r.get("refused") or "" for r in latest.values()
              if r["preference"] is None]
    if failed:
        print(f"{len(failed)} questions have no verdict, for example {failed[0][-100:]!r}; the "
              "same command asks again")
    masses = [r["mass"] for r in latest.values() if "mass" in r]
    if masses and sum(masses) < len(masses) / 2:
        print(f"the judge wanted to say something else than 1 or 2: together they had a "
              f"probability of {sum(masses) / len(masses):.2f} on average")
    judged = {key: r["preference"] for key, r in latest.items() if r["preference"] is not None}
    both = [(value, judged[item, "b"]) for (item, first), value in judged.items()
            if first == "a" and (item, "b") in judged]
    if both:
        a_first, b_first = np.transpose(both) - 1.5         # (n,) above 0: a is preferred
        agree = (np.sign(a_first) == np.sign(b_first)).sum()
        share = 0.5 + (a_first - b_first).mean() / 2
        print(f"the two orders agree on {agree} of {len(both)} pairs; the answer shown first is "
              f"preferred in {share:.0%}" + ("" if abs(share - 0.5) < 0.15 else
              ": this judge goes by the place, and its win-rate says little"))


# ---------------------------------------------------------------- judges on this machine

def by_reward(judge: RewardModel, left: list[Question], write, batch: int):
    """The higher reward wins. The answers are read one by one: there is no order."""
    for some in in_batches([pair for pair, _ in left], batch, "judging"):
        a, b = (judge([p["query"] for p in some], [p[side] for p in some]).tolist()
                for side in "ab")
        for pair, ours, theirs in zip(some, a, b):
            share = None if math.isnan(ours + theirs) else ((ours > theirs) + (ours >= theirs)) / 2
            write(verdict(pair, None, share, reward_a=ours, reward_b=theirs))


@torch.no_grad()
def by_llama(judge: Llama, tokenizer: Tokenizer, prompt: str, left: list[Question], write,
             batch: int):
    """The judge's turn is started with "Better: ", and the preference is the probability of 1
    against 2 as the next token. Nothing has to be parsed; mass is what these two had together."""
    *start, one = tokenizer.encode("Better: 1")
    *_, two = tokenizer.encode("Better: 2")
    rows = [(tokenizer.chat([{"role": "user", "content": asked(prompt, *question)}]) + start,
             *question) for question in left]
    longest = max((len(ids) for ids, _, _ in rows), default=0)
    if longest > judge.config.max_position_embeddings:
        raise InputError(f"a question of {longest} tokens does not fit into the judge's context of "
                         f"{judge.config.max_position_embeddings}")
    for some in in_batches(rows, batch, "judging"):
        hidden = last_hidden(judge, [ids for ids, _, _ in some],
                             [pair["item"] for _, pair, _ in some], 16384)       # (b, D)
        p = judge.logits(hidden).softmax(-1)[:, [one, two]].cpu()                # (b, 2)
        mass = p.sum(-1)                                                         # (b,)
        for (_, pair, first), share, m in zip(some, (p[:, 0] / mass).tolist(), mass.tolist()):
            write(verdict(pair, first, share, mass=m))


# ---------------------------------------------------------------- a judge behind HTTP

class Endpoint:
    """Chat completions of an OpenAI-compatible server. fields: further ones of a request, where
    None leaves one out; seconds: how long a whole reply may take."""

    def __init__(self, url: str, model: str, *, max_tokens: int = 1024, seconds: float = 120,
                 fields: dict | None = None):
        self.key = os.environ.get(KEY, "").strip()
        suffix = "/chat/completions"
        self.url = url.rstrip("/").removesuffix(suffix) + suffix
        self.seconds, self.stop = seconds, threading.Event()         # set: no more tries
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens} | (fields or {})
        self.body = {key: value for key, value in body.items() if value is not None}

    def ask(self, text: str) -> dict:
        """{"reply": the answer to a message, None where the server gave none (filtered)}, or
        {"refused": why} where the server rejects only this message (mostly: it is too long).

        InputError where no question can work (wrong key or address), and after TRIES tries.
        """
        for attempt in range(TRIES):
            if attempt and self.stop.wait(BACKOFF * 2 ** (attempt - 1)):
                break
            try:
                code, reply = self.send(text)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            reason = f"HTTP {code} {reply[:200]}"
            if code in UNFIT:
                return {"refused": reason}
            if code < 500 and code not in (200, *RETRIED):
                break
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                content = json.loads(reply)["choices"][0]["message"]["content"]
                # UTF-8 has no half characters, which JSON may hold.
                return {"reply": content and content.encode(errors="replace").decode()}
        self.stop.set()
        raise InputError(f"{self.url}: {reason} (the verdicts so far are kept: the same command "
                         "goes on)")

    def send(self, text: str) -> tuple[int, str]:
        """Status and body of the server's response to a message."""
        body = self.body | {"messages": [{"role": "user", "content": text}]}
        request = urllib.request.Request(self.url, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            response = urllib.request.urlopen(request, timeout=self.seconds)
        except urllib.error.HTTPError as error:
            response = error
        deadline, read = time.monotonic() + self.seconds, b""
        with response:
            while piece := response.read1(2**16):
                read += piece
                if time.monotonic() > deadline:              # a server may send byte by byte
                    raise TimeoutError(f"no whole reply in {self.seconds:g} s")
        return response.code, read.decode(errors="replace")


LINE = re.compile(r"^[ \t*_>#-]*better[ \t*_]*:[ \t*_\"']*(1|2|tie)[ \t*_.\"']*$", re.I | re.M)
SHARES = {"1": 1.0, "2": 0.0, "tie": 0.5}       # of the answer shown first


def parse_preference(reply: str | None) -> str | None:
    """"1", "2" or "tie" where the reply's lines "Better: ..." agree on it, else None."""
    said = {match.lower() for match in LINE.findall(reply or "")}
    return said.pop() if len(said) == 1 else None


def json_object(text: str) -> dict:
    """The value of --judge-fields; else a ValueError or TypeError, which argparse reports."""
    return dict(json.loads(text))


def by_endpoint(endpoint: Endpoint, prompt: str, left: list[Question], write, concurrency: int):
    """Ask a server, `concurrency` questions at a time. A reply that cannot be parsed gives no
    preference, and the next command asks again. A server that fails ends the command."""
    lock = threading.Lock()

    def work(pair, first):
        same = pair["a"] == pair["b"]                                   # nothing to ask
        record = {} if same else endpoint.ask(asked(prompt, pair, first))
        share = 0.5 if same else SHARES.get(parse_preference(record.get("reply")))
        with lock:
            write(verdict(pair, first, share, **record))

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            futures = [pool.submit(work, *question) for question in left]
            for future in tqdm(as_completed(futures), "judging", len(futures), disable=None):
                future.result()
        finally:                        # Ctrl-C too: what is under way is still written
            endpoint.stop.set()
            pool.shutdown(cancel_futures=True)
