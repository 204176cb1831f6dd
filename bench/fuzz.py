"""Random and mutated input: parsers that never raise, loaders that load or say why not.

    python bench/fuzz.py                        # the whole campaign, about 20 minutes
    python bench/fuzz.py --strings 3000 --files 300 --out /tmp/fuzz.json        # a short one
    python bench/fuzz.py --strings 0 --only config.json               # one row of it, again

Strings go through the self-reward parser, the answer extractor and the world's query parser.
Mutated files go through the loaders in a child process that may take 512 MB more than it has when
idle and a minute a file, so that a crash, a hang and a hunger are seen and counted. (A template may
take 1 s of processor time here, not 5, for the campaign's own sake.) An outcome is `loaded` (and
used: a forward pass, a chat), `refused` (an InputError of one line), or a failure: another
exception, a death, a hang, or words on standard error. Exit code 1 if there is a failure.
"""
import argparse
import copy
import json
import os
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import write_checkpoint  # noqa: E402

import rewards  # noqa: E402
from model import load_model  # noqa: E402
from plumbing.chat import Tokenizer  # noqa: E402
from plumbing.data import check_data, opening, read_data  # noqa: E402
from plumbing.files import InputError, prompt_file  # noqa: E402
from plumbing.settings import resolve  # noqa: E402
from tiny import world  # noqa: E402

SECONDS, MEMORY = 60, 512 * 2**20          # a file may take

# ---------------------------------------------------------------- strings

PARSERS = {
    "rewards.parse_self_reward": (rewards.parse_self_reward, lambda v: (
        v[0] in range(8) and v[1] is None or v[0] is None and v[1] in rewards.REASONS)),
    "rewards.final_number": (rewards.final_number, lambda v: v is None or v.is_finite()),
    "world.classify": (world.classify, lambda v: v in (*world.CLASSES, "malformed")),
}
SEEDS = ["<Calculation>1+0+1+0+1+1+0=4</Calculation>\n<Score>4</Score>", "What is 37 + 48?",
         "So the total is $1,234.50.\n#### 1,234.5", "\\boxed{-3{,}000}", "<score> 7 </Score>", ""]
PIECES = ["<", ">", "/", "Score", "<Score>", "</Score>", "<Calculation>", "</Calculation>", "1+0+",
          "=4", "-", "$", ",", ".", "{,}", "\u2212", "#### ", "What is ", " + ", "?", "0", "123",
          "9" * 50, "\x00", "\n", "\u2028", "\ud800", "４", "٤", "é", "\U0001f600", " ", "\\"]
# Repeated up to a megabyte; 9999 follows, which spoils what is good up to its end.
JUNK = ["the answer is 12, ", "<", "< ", "<Score>", "<Score>4", "<Score>4</Score>", "</Score>",
        "<Calculation>1+0", "1+", ",123", "1,234,567,", "1,", "-", "-$", "1.", "-1", "1{,}234", "9",
        "What is 1", " ", "\n", "\u2212", "é"]


def random_string(pick: random.Random) -> str:
    if pick.random() < 0.3:                                     # anything at all
        return "".join(chr(pick.randrange(pick.choice([128, 0x3000, 0x110000])))
                       for _ in range(pick.randrange(80)))
    text = list(pick.choice(SEEDS))
    for _ in range(pick.randrange(8)):
        at = pick.randrange(len(text) + 1)
        text[at:at + pick.randrange(4)] = pick.choice(PIECES) * pick.choice([1, 1, 1, 2, 30])
    return "".join(text)


def strings(count: int, seed: int) -> dict:
    """`count` strings through each parser: {name: {strings, failures, seconds, worst_ms}}."""
    table = {}
    for name, (parse, good) in PARSERS.items():
        pick, failures, worst, begun = random.Random(f"{seed} {name}"), [], 0.0, time.perf_counter()
        for _ in range(count):
            text = random_string(pick)
            start = time.process_time()
            try:
                if not good(parse(text)):
                    failures.append(text)
            except Exception as error:
                failures.append(f"{text!r}: {error!r}")
            worst = max(worst, time.process_time() - start)
        table[name] = {"strings": count, "failures": len(failures), "first_failures": failures[:3],
                       "seconds": round(time.perf_counter() - begun, 1),
                       "worst_ms": round(1e3 * worst, 2)}
    return table


def filled(junk: str, size: int) -> str:
    return (junk * (size // len(junk) + 1))[:size - 4] + "9999"


def linear(size: int = 10**6) -> dict:
    """Milliseconds of each parser on `size` characters, and how much longer than on half of them.

    ms and ratio are the worst over JUNK; plain_ms is that of its first entry, ordinary words."""
    def milliseconds(parse, text):
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            parse(text)
            best = min(best, time.process_time() - start)
        return 1e3 * best

    table = {}
    for name, (parse, _) in PARSERS.items():
        times = {}
        for junk in JUNK:
            times[junk] = [milliseconds(parse, filled(junk, n)) for n in (size // 2, size)]
        slowest = max(times, key=lambda junk: times[junk][1])
        # Below ten milliseconds one compares a busy machine's clock.
        ratios = [whole / half for half, whole in times.values() if half > 10]
        table[name] = {"plain_ms": round(times[JUNK[0]][1], 1), "ms": round(times[slowest][1], 1),
                       "slowest_on": slowest, "ratio": round(max(ratios, default=1.0), 2)}
    return table


# ---------------------------------------------------------------- mutated files

HOSTILE = [None, True, False, -1, 0, 1, 3, 2**31, 10**12, 10**30, 1e308, float("nan"), 0.5, "", "x",
           "false", "\ud800", "\x00", "x" * 10_000, [], {}, [[]], [1, 2], {"a": 1}, "../x",
           "llama3", "yarn", "int8", "{{ 1 }}", "/etc/passwd", 10**400]
TEMPLATES = [
    "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ 'x' * 10**10 }}", "{{ 10**(10**8) }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x'|center(10**10) }}", "{{ [1] * 10**9 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}", "{{ messages[9]['role'] }}", "{{ '%0999999999d' % 1 }}",
    "{{ raise_exception('no') }}", "{% include '/etc/passwd' %}", "{{ (" * 500, "{%", "", "\x00",
    "{{ strftime_now('%Y' * 9) }}", "{{ messages|tojson(indent=9) }}", "{% if %}", "{{ 1/0 }}",
    "{{ messages.append(1) }}", "{{ lipsum() }}", "{{ lipsum(n=10**7) }}",
]
# Well-formed parts of a tokenizer.json that misbehave when they are used.
PARTS = {
    "padding": [{"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}],
    "truncation": [{"max_length": 2, "strategy": "LongestFirst", "stride": k, "direction": "Right"}
                   for k in (0, 5)],
    "pre_tokenizer": [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                       "invert": False}
                      for pattern in ("(a+)+$", "", "(", "(a{1,1000}){1,1000}", "(?i)(x+x+)+y")],
    "normalizer": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000},
                   {"type": "Sequence", "normalizers": [{"type": "Replace", "content": "aaaaaaaaaa",
                                                         "pattern": {"String": "a"}}] * 9},
                   {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Lowercase"},
                   {"type": "Replace", "pattern": {"Regex": "(1+)+$"}, "content": ""}],
    "post_processor": [{"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                        "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}]}],
    "model": [{"type": "WordLevel", "unk_token": "zz", "vocab": {"q": 0}},
              {"type": "WordLevel", "unk_token": "q", "vocab": {"q": 2**32 - 1}},
              {"type": "Unigram", "unk_id": None, "vocab": [["zz", 0.0]]},
              {"type": "BPE", "vocab": {}, "merges": []}],
    "added_tokens": [[{"id": i, "content": f"<{i}>", "single_word": False, "lstrip": False,
                       "rstrip": False, "normalized": i % 2 == 0, "special": True}
                      for i in ids] for ids in ([2**32 - 1], range(300, 20_000), [7, 7, 7])],
    "decoder": [{"type": "Sequence", "decoders": []}, None],
}
TURN = [{"role": "user", "content": "Two <|end_of_turn|> words, 3!\n"}]


def mutate_json(pick: random.Random, value):
    """The value with one of its nodes replaced, removed, repeated or renamed."""
    if isinstance(value, (dict, list)) and value and pick.random() < 0.85:
        key = pick.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if pick.random() < 0.7:
            value[key] = mutate_json(pick, value[key])
        elif pick.random() < 0.5:
            del value[key]
        elif isinstance(value, dict):
            value[pick.choice(["x", "", "dtype", "type", key + "s"])] = value[key]
        else:
            value.append(value[key])
        return value
    return copy.deepcopy(pick.choice(HOSTILE))


def mutate_bytes(pick: random.Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(pick.choice([1, 1, 2, 8])):
        at = pick.randrange(len(data) + 1)
        piece = pick.choice([b"", b"\x00", b"\xff", b"{", b"}", b"[", b'"', b",", b"9" * 20, b"-",
                             b"[" * 10_000, data[at:at + 40], bytes([pick.randrange(256)])])
        data[at:at + pick.choice([0, 1, 1, 3, 200])] = piece
    return bytes(data[:pick.randrange(len(data) + 1)] if pick.random() < 0.2 else data)


def mutate_weights(pick: random.Random, data: bytes) -> bytes:
    """safetensors: eight bytes of header length, a JSON header, the tensors' bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    name = pick.choice([key for key in header if key != "__metadata__"])
    kind = pick.randrange(8)
    if kind == 7:                                                # other weights
        at = pick.randrange(len(body) - 3)
        return data[:8 + length] + body[:at] + b"\xff\xff\x7f" + body[at + 3:]
    if kind == 0:
        length = pick.choice([0, 1, length - 1, length + 1, 2**31, 2**63])
        return struct.pack("<Q", length) + data[8:]
    if kind == 1:
        header[name]["data_offsets"] = [pick.choice([-1, 0, 64, 10**6, 2**63, 2**64 - 1, 10**30])
                                        for _ in range(pick.choice([1, 2, 2, 2, 3]))]
    elif kind == 2:
        header[name]["dtype"] = pick.choice(["I64", "F64", "BF16", "F8_E4M3", "BOOL", "F4", "", 3])
    elif kind == 3:
        header[name]["shape"] = pick.choice([[], [-1], [2**63], [2**32, 2**32], [1], "x", [0]])
    elif kind == 4:                                              # a key twice
        text = json.dumps(header)
        text = text[:-1] + f', "{name}": {json.dumps(header[pick.choice(list(header))])}}}'
        return struct.pack("<Q", len(text)) + text.encode() + body
    elif kind == 5:
        header = mutate_json(pick, header)
    text = mutate_bytes(pick, json.dumps(header).encode()) if kind == 6 else (
        json.dumps(header).encode())
    return struct.pack("<Q", len(text)) + text + body


def mutated(pick: random.Random, name: str, data: bytes) -> bytes:
    if name == "chat_template.jinja":
        parts = pick.sample(TEMPLATES, pick.choice([1, 1, 2]))
        return "".join(parts).encode() if pick.random() < 0.8 else mutate_bytes(pick, data)
    if name == "model.safetensors" and pick.random() < 0.7:
        return mutate_weights(pick, data)
    if name == "tokenizer.json" and pick.random() < 0.2:
        key = pick.choice(list(PARTS))
        return json.dumps(json.loads(data) | {key: pick.choice(PARTS[key])}).encode()
    if name.endswith(".json") and pick.random() < 0.7:
        value = json.loads(data)
        for _ in range(pick.choice([1, 1, 1, 3])):
            value = mutate_json(pick, value)
        return json.dumps(value).encode()
    return mutate_bytes(pick, data)


def use_model(folder: Path):
    load_model(folder)(torch.tensor([[5, 6, 7]]))


def use_tokenizer(folder: Path):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.chat(TURN)
    tokenizer.decode(ids)
    assert all(0 <= i < 300 for i in [*ids, *tokenizer.encode("a<|start|>b")])
    assert tokenizer.unencodable("ab") is None or "ab"


def use_prompts(folder: Path):
    file = str(folder / "prompts.jsonl")
    gold = rewards.NEED_GOLD["exact"] if len(file) % 2 else None
    check_data(file, read_data(file, gold=gold), Tokenizer(folder), 400)


def use_prompt(folder: Path):
    file = prompt_file(folder, "challenger")
    opening(Tokenizer(folder), file, 16, 512, task="sums")


# File: what uses it, and how many of 10,000.
FILES = {
    "config.json": (use_model, 2200), "model.safetensors": (use_model, 2300),
    "tokenizer.json": (use_tokenizer, 2000),
    "tokenizer_config.json": (use_tokenizer, 1500),
    "generation_config.json": (use_tokenizer, 400), "prompts.jsonl": (use_prompts, 600),
    "prompts/challenger.txt": (use_prompt, 200),
    "training.json": (lambda folder: resolve({"model": str(folder)}), 500),
}


def model_folder(folder: Path, name: str):
    """A small checkpoint with every kind of file in it."""
    write_checkpoint(folder, "untied")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if name == "chat_template.jinja":
        (folder / name).write_text(settings["chat_template"])
    (folder / "prompts").mkdir()
    (folder / "prompts/challenger.txt").write_text("Write one question about {task}, please.\n")
    preset = {"queries": 4, "beta": 0.1, "kl": "k3", "task": "Sums", "reward": "tiny", "steps": 9}
    (folder / "training.json").write_text(json.dumps(preset))
    lines = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(5)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


def spoil(pick: random.Random, folder: Path, name: str, whole: bytes):
    """Put a mutated file there; now and then a link, a folder or a pipe in its place."""
    file = folder / name
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    file.unlink(missing_ok=True)
    kind = pick.random()
    if kind < 0.01:
        file.symlink_to("/etc/passwd")
    elif kind < 0.015:
        file.symlink_to(file.name)
    elif kind < 0.02 and name != "prompts.jsonl":                # the user's own may be a pipe
        os.mkfifo(file)
    elif kind < 0.025:
        file.mkdir()
    else:
        file.write_bytes(mutated(pick, name, whole))


def outcome(use, folder: Path) -> str:
    try:
        use(folder)
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"more than one line: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
    return "loaded"


def memory_now(field: str) -> int:
    """VmSize or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def child(name: str, todo: range, seed: int, out: int):
    """In a forked process: a line for each file: number, seconds, peak memory, outcome."""
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryFile() as errors:
        os.dup2(errors.fileno(), 2)
        folder = Path(temporary) / "m"
        model_folder(folder, name)
        whole = (folder / name).read_bytes()
        FILES[name][0](folder)                 # the sound file, and a warm start
        idle = memory_now("VmHWM")
        limit = memory_now("VmSize") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for i in todo:
            spoil(random.Random(f"{seed} {name} {i}"), folder, name, whole)
            begun, said = time.perf_counter(), os.fstat(2).st_size
            result = outcome(FILES[name][0], folder)
            if os.fstat(2).st_size > said:
                result = f"{result}, with words on standard error"
            record = [i, time.perf_counter() - begun, memory_now("VmHWM") - idle, result]
            os.write(out, (json.dumps(record) + "\n").encode())


def loaders(name: str, count: int, seed: int) -> dict:
    """`count` mutations of a file: how many loaded, were refused, failed; seconds and memory."""
    counts, failures, worst, peak, done, begun = Counter(), [], 0.0, 0, 0, time.perf_counter()
    while done < count:
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(name, range(done, count), seed, send)
            except BaseException:              # of this campaign's own: a death that says why
                traceback.print_exc(file=sys.stdout)
            finally:
                os._exit(0)
        os.close(send)
        with os.fdopen(receive) as lines:
            fate = None
            while fate is None and done < count:
                ready, _, _ = select.select([lines], [], [], SECONDS + 60 * (done == 0))
                line = lines.readline() if ready else None
                if not line:
                    fate = "hang" if line is None else "death"
                    break
                i, seconds, memory, result = json.loads(line)
                done, worst, peak = i + 1, max(worst, seconds), max(peak, memory)
                counts[result if result in ("loaded", "refused") else "failed"] += 1
                if result not in ("loaded", "refused"):
                    failures.append(f"{i}: {result}")
        if fate == "hang":
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if fate:
            counts["failed"] += 1
            failures.append(f"{done}: {fate} ({status})")
            done += 1
    return {"files": count, "loaded": counts["loaded"], "refused": counts["refused"],
            "failures": counts["failed"], "first_failures": failures[:20],
            "seconds": round(time.perf_counter() - begun, 1), "worst_s": round(worst, 2),
            "peak_mb": round(peak / 2**20)}


# ---------------------------------------------------------------- the campaign

def table(report: dict) -> list[str]:
    """docs/RESULTS.md's two tables."""
    lines = ["| parser | strings | failures | worst, ms | 1 MB of words, ms | worst 1 MB, ms "
             "| twice the input, times |", "|---" * 7 + "|"]
    for name, row in report.get("strings", {}).items():
        line = report["linear"][name]
        lines.append(f"| {name} | {row['strings']} | {row['failures']} | {row['worst_ms']} | "
                     f"{line['plain_ms']} | {line['ms']} | {line['ratio']} |")
    lines += ["", "| mutated file | files | loaded | refused | failures | worst, s "
              "| MB above idle |", "|---" * 7 + "|"]
    rows = {name: report["files"][name] for name in FILES if name in report["files"]}
    for name, row in rows.items():
        lines.append(f"| {name} | {row['files']} | {row['loaded']} | {row['refused']} "
                     f"| {row['failures']} | {row['worst_s']} | {row['peak_mb']} |")
    total = lambda key: sum(row[key] for row in rows.values())
    worst = [max((row[key] for row in rows.values()), default=0) for key in ("worst_s", "peak_mb")]
    return [*lines, f"| all | {total('files')} | {total('loaded')} | {total('refused')} "
            f"| {total('failures')} | {worst[0]} | {worst[1]} |"]


def main():
    parser = argparse.ArgumentParser(description="Fuzz the parsers and the loaders.")
    parser.add_argument("--strings", type=int, default=50_000, help="through each parser")
    parser.add_argument("--files", type=int, default=10_000, help="mutated files, all kinds")
    parser.add_argument("--only", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/fuzz.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {"seed": args.seed, "date": time.strftime("%Y-%m-%d"), "files": {}}
    if args.out.exists() and not args.strings:
        report = json.loads(args.out.read_text()) | {"seed": args.seed}
    if args.strings:
        report |= {"strings": strings(args.strings, args.seed), "linear": linear()}
    for name in args.only:
        row = loaders(name, max(1, FILES[name][1] * args.files // 10_000), args.seed)
        report["files"][name] = row
        print(f"{name}: {row}", file=sys.stderr, flush=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    print(json.dumps(report))
    failed = any(row["failures"] for part in ("strings", "files")
                 for row in report.get(part, {}).values())
    slow = any(row["ratio"] >= 3 for row in report.get("linear", {}).values())
    sys.exit(1 if failed or slow else 0)


if __name__ == "__main__":
    main()
