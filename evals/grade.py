"""Grade programs: HumanEval's and MBPP's answers, by running their tests in a sandbox.

    passed, reason = run_program(mbpp_program(problem, answer), seconds=10)
"""
import functools
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from math import comb
from pathlib import Path

# ---------------------------------------------------------------- programs

SANDBOX = str(Path(__file__).with_name("sandbox.py"))
FENCE = re.compile(r"^([^\n`~]*+)(`{3,}+|~{3,}+)[^\n`]*+\n(.*?)(?:^[ \t]*+\2|\Z)",
                   re.DOTALL | re.MULTILINE)
DEFINES = re.compile(r"^(?:async def|def|class) +(\w+)", re.MULTILINE)
IMPORT = re.compile(r"^(?:import|from) .*", re.MULTILINE)
ASSIGNED = re.compile(r"^(\w+) *=(?!=)", re.MULTILINE)
FUTURE = re.compile(r"^from __future__ import .*\n", re.MULTILINE)
PROBE = {"answer": "import collections, decimal, heapq, math, re, typing\nf = lambda: 1",
         "helpers": "", "tests": "assert f() == 1", "names": ["f"]}
ISOLATION = {                                   # sandbox.py's containments, for the reader
    "namespaces": "programs run in Linux namespaces with limits, without network and home folder",
    "limits": "programs run with limits alone: this stops accidents, not attackers",
}


def code_of(answer: str, wanted: str = "") -> str:
    """The program in a chat answer: of its fenced blocks the last one that defines what is wanted.

    wanted: names or tests; a block counts that defines a function or class named there, else one
    that defines anything, else any. The last one, because first tries and pieces stand before it;
    examples of use and the model's own tests, which may follow, define nothing that is wanted.
    Without a fence it is the whole answer, with its leading blanks (the rest of a function may be
    all there is), or from the first line of code on where prose stands before it. A block that
    is never closed ends with the answer.
    """
    names = set(re.findall(r"\w+", wanted))
    blocks = [re.sub(f"^{' ' * len(before)}", "", block, flags=re.MULTILINE)
              for before, _, block in FENCE.findall(answer) if block.strip()]
    if not blocks:
        bare = re.sub(r"^ *```.*\n?", "", answer, flags=re.MULTILINE)        # a closing fence alone
        first = re.search(r"^(?:from|import|async def|def|class|@)\s*\S.*", bare, re.MULTILINE)
        prose = first and not re.match(r"[ \t]|\w+ *=", bare)
        return bare[first.start():] if prose else bare
    defining = [block for block in blocks if DEFINES.search(block)]
    named = [block for block in defining if names & set(DEFINES.findall(block))]
    return (named or defining or blocks)[-1]


def as_body(code: str) -> str:
    """The rest of a function, indented: its first line, or all of them, may have lost that."""
    first, _, rest = code.strip().partition("\n")
    lost = re.match(r"\n*\S", code) and re.search(r"^\S", rest, re.MULTILINE)
    return f"    {first}\n{textwrap.indent(rest, '    ') if lost else rest}"


def humaneval_program(problem: dict, answer: str) -> dict:
    """A HumanEval problem's start, an answer's code and the problem's tests, to be run.

    The start stands there even when the answer repeats it: it has the imports and helper functions.
    It ends inside the function: an answer with only the rest of the function goes on from there.
    """
    code, entry = code_of(answer, problem["entry_point"]), problem["entry_point"]
    code = code if DEFINES.search(code) else as_body(code)
    code = FUTURE.sub("", code)                              # could only be a program's first line
    return {"answer": f"from __future__ import annotations\n{problem['prompt']}{code}\n",
            "helpers": problem["prompt"], "names": [entry],
            "tests": f"{problem['test']}\ncheck({entry})\n"}


def mbpp_program(problem: dict, answer: str) -> dict:
    """An answer's code and an MBPP problem's tests (sanitised or full data set), to be run.

    The tests may call what the reference solution defines, and nothing else of the answer.
    """
    tests, setup = "\n".join(problem["test_list"]), problem.get("test_setup_code", "")
    imports = "\n".join(problem.get("test_imports", []))
    used = set(re.findall(r"\w+", f"{tests}\n{setup}"))
    names = sorted(used & set(DEFINES.findall(problem["code"])))
    code = f"{code_of(answer, tests)}\n{imports}\n{setup}\n"
    if set(names) & set(re.findall(r"\w+", setup)):          # it builds objects: the answer's stay
        built = ", ".join(dict.fromkeys(ASSIGNED.findall(setup)))
        code += f"_set_up = lambda: ({built},)\n"
        setup, names = f"{built}, = _set_up()", [*names, "_set_up"]
    return {"answer": code, "helpers": "\n".join(IMPORT.findall(problem["code"])), "names": names,
            "tests": f"{imports}\n{setup}\n{tests}"}


@functools.cache
def containment() -> str:
    """The better of sandbox.py's containments: namespaces, where a harmless program passes."""
    return "namespaces" if run_program(PROBE, seconds=30, kind="namespaces")[0] else "limits"


def run_program(program: dict, *, seconds: float = 10,
                kind: str | None = None) -> tuple[bool, str]:
    """Run a program with its tests in a contained child; whether it passed, and why or why not.

    program: what humaneval_program or mbpp_program made. seconds: of wall time; the data sets'
    programs take milliseconds. kind: the containment; by default the better one that works here.
    The reason is one of sandbox.REASONS: passed; failed (an assertion); error (any other exception,
    syntax included); memory; timeout; ended (before its last line: an exit, a signal, a crash);
    sandbox (it could not be started: nothing was measured).
    """
    command = [sys.executable, "-s", "-S", SANDBOX, kind or containment(), str(seconds)]
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as scratch:
        keeper = subprocess.run(command, input=json.dumps(program), cwd=scratch, text=True,
                                env={"PYTHONHASHSEED": "0"},        # a set's order is the same
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                start_new_session=True)
    reason = keeper.stdout.strip() or ("ended" if keeper.returncode < 0 else "sandbox")
    return reason == "passed", reason


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k answers passes, drawn from n of which c do: arXiv 2107.03374, Eq. 1."""
    return 1 - comb(n - c, k) / comb(n, k)
