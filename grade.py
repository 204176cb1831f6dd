"""Grade answers of the benchmarks: MATH answers by form, HumanEval and MBPP by running their tests.

    same_answer(r"\\dfrac12", boxed(answer))                      # True for ... \\boxed{0.5}
    passed, reason = run_program(mbpp_program(problem, answer), seconds=10)
    python grade.py sanitized-mbpp.json                           # its reference solutions pass

MATH: the data set's own grader (hendrycks/math) compares two strings after rewriting; MATH-500's
(openai/prm800k) also compares values with sympy. Here: the rewriting of both, and the values of
numbers, without sympy. Sums in another order are therefore different answers.
"""
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from fractions import Fraction
from math import comb
from pathlib import Path

from cli import Parser, run_script
from data import read_entries
from files import InputError

# ---------------------------------------------------------------- MATH answers

LATEX = re.compile(r"\\[A-Za-z]+|\\.|\S", re.DOTALL)
BOX = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
ARGUMENTS = {r"\frac": 2, r"\sqrt": 1, "^": 1, "_": 1}
SPELLINGS = {"\u2212": "-", "\u03c0": r"\pi ", "\u00b0": " ", "\u221e": r"\infty ",
             "\u00d7": r"\cdot ", "\u222a": r"\cup ", r"\times": r"\cdot", "{,}": ",", r"\!": "",
             r"\dfrac": r"\frac", r"\tfrac": r"\frac", "bmatrix}": "pmatrix}"}
# Layout, dollars, percent and degree signs. The lookbehind spares a matrix's "\\ ".
DROPPED = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|q?quad|degree)(?![A-Za-z])"
                     r"|(?<!\\)(?:\\[,;: $%]|[~$%])|\^\{?\\circ(?![A-Za-z])\}?")
TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|mathrm|mathbf)\{([^{}]*)\}")
LAST_TEXT = re.compile(r"(?<![_^])" + TEXT.pattern + r"(?:\^\{?[23]\}?)?$")
# Units behind a number that no \text{...} marks: those of MATH-500's grader and a few more.
UNIT = re.compile(
    r"(?<=[0-9)}]) ?(?:(?:square |cubic )?(?:[ckm]m|kg|ft|feet|foot|(?:inch|(?:centi|kilo)?meter|"
    r"mile|yard|second|minute|hour|day|week|month|year|degree|unit|dollar|cent)(?:e?s)?)"
    r"(?:\^\{?[23]\}?)?)$")
THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
NAMED = re.compile(r"[A-Za-z](?:=|\\in(?![A-Za-z]))(?=[^=]+$)")
QUOTIENT = re.compile(r"(?<![0-9A-Za-z)}\]\\/])([0-9]*(?:\\[a-z]+|[A-Za-z])?)/([0-9]+|[A-Za-z])"
                      r"(?![0-9A-Za-z/])")
MINUS_INSIDE = re.compile(r"(?:(?<=[(,\[={])|^)\\frac\{-([^{}]*)\}")
DECIMAL = re.compile(r"(?<![0-9.])([0-9]{0,20}\.[0-9]{1,20})(?![0-9.])")
MIXED = re.compile(r"(?<![0-9A-Za-z.)}^_])([0-9]{1,20})\\frac\{([0-9]{1,20})\}\{([0-9]{1,20})\}")


def normal_form(answer: str) -> str:
    """A MATH answer in one spelling. Total: any string, in time about linear in its length.

    Layout, units, degree, dollar and percent signs, thousands commas and a leading "x =" go; \\frac
    and \\sqrt get their braces; decimals and mixed numbers become fractions in lowest terms. A
    fraction stays as it is written: both graders ask for lowest terms. Order and brackets stay.
    """
    for old, new in SPELLINGS.items():
        answer = answer.replace(old, new)
    answer = " ".join(DROPPED.sub(" ", answer).split()).rstrip(" .")
    answer = answer.split(r"\approx")[0].strip() or answer
    unit = LAST_TEXT.search(answer)
    if unit and unit.start() and unit[1].strip(" .").lower() not in ("am", "pm"):
        answer = answer[:unit.start()]
    answer = " ".join(TEXT.sub(r" \1 ", answer).split())
    answer = answer.replace(" and ", ",").replace(" or ", ",")
    answer = UNIT.sub("", answer).strip()
    if THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "")
    answer = WORD.sub(lambda word: word[0].lower(), answer)
    answer = re.sub(r"([\^_])([0-9]{2,})", r"\1{\2}", answer)          # x^12 is meant as x^{12}
    answer = brace_arguments(LATEX.findall(answer))
    answer = re.sub(r"(?<=[0-9])\\cdot(?=\\(?!frac))", "", answer)
    answer = NAMED.sub("", answer, count=1) if NAMED.match(answer) else answer
    answer = re.sub(r"^\(([A-Z])\)$", r"\1", answer)                   # a choice: (A)
    answer = QUOTIENT.sub(r"\\frac{\1}{\2}", answer)
    answer = MINUS_INSIDE.sub(r"-\\frac{\1}", answer)
    answer = DECIMAL.sub(lambda number: fraction(Fraction(number[0])), answer)
    return MIXED.sub(mixed_number, answer)


def brace_arguments(tokens: list[str]) -> str:
    """LaTeX tokens joined, with braces round arguments that had none: \\frac12, \\sqrt2, x^2."""
    out, outer, owed = [], [], 0                       # owed: arguments that the last command wants
    for token in tokens:
        if token == "{":
            outer.append(owed)
            owed = 0
        elif token == "}":
            owed = max(0, outer.pop() - 1) if outer else 0
        elif token in ARGUMENTS:
            owed = ARGUMENTS[token]
        elif owed:
            token = "{" + token + "}"
            owed -= 1
        out.append(token)
    return "".join(out)


def fraction(value: Fraction) -> str:
    """A value as the normal form writes it."""
    n, d = value.numerator, value.denominator
    return str(n) if d == 1 else rf"\frac{{{n}}}{{{d}}}"


def mixed_number(match: re.Match) -> str:
    """4\\frac{2}{3} as 14/3; anything but a proper fraction behind the number is left alone."""
    whole, n, d = map(int, match.groups())
    return fraction(whole + Fraction(n, d)) if 0 < n < d else match[0]


def same_answer(a: str, b: str) -> bool:
    """Whether two MATH answers are the same, as normal_form writes them; an empty one never is."""
    a, b = normal_form(a), normal_form(b)
    return a == b and a != ""


def boxed(text: str) -> str | None:
    """What the last whole \\boxed{...} holds, braces nested as they come; None without one."""
    opened, last = [], (-1, -1)
    for match in BOX.finditer(text):
        if match[0] == "}":
            start = opened.pop() if opened else None
            last = max(last, (start, match.start())) if start is not None else last
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append(match.end() if match[0] != "{" else None)
    return text[last[0]:last[1]].strip() if last[0] >= 0 else None


# ---------------------------------------------------------------- programs

SANDBOX = str(Path(__file__).with_name("sandbox.py"))
FENCE = re.compile(r"^([ \t]*+)(`{3,}+|~{3,}+)[^\n`]*+\n(.*?)(?:^[ \t]*+\2|\Z)",
                   re.DOTALL | re.MULTILINE)
DEFINES = re.compile(r"^(?:async def|def|class) +(\w+)", re.MULTILINE)
IMPORT = re.compile(r"^(?:import|from) .*", re.MULTILINE)
FUTURE = re.compile(r"^from __future__ import .*\n", re.MULTILINE)
PROBE = {"answer": "import collections, decimal, heapq, math, re, typing\nf = lambda: 1",
         "helpers": "", "tests": "assert f() == 1", "names": ["f"]}
ISOLATION = {
    "namespaces": "programs run in Linux namespaces (process, mount, network, IPC, and {user}): "
                  "without network and home folder, with read-only libraries and limits",
    "user": "programs run under a user id of their own with limits, without namespaces: "
            "this stops accidents, not attackers",
    "limits": "programs run with limits alone: this stops accidents, not attackers",
}


def code_of(answer: str, wanted: str = "") -> str:
    """The program in a chat answer: of its fenced blocks the last one that defines what is wanted.

    wanted: names or tests; a block counts that defines a function or class named there, else one
    that defines anything, else any. The last one, because first tries and pieces stand before it;
    examples of use and the model's own tests, which may follow, define nothing that is wanted.
    Without a fence it is the whole answer, with its leading blanks (the rest of a function may be
    all there is). A block that is never closed ends with the answer.
    """
    names = set(re.findall(r"\w+", wanted))
    blocks = [re.sub(f"^{indent}", "", block, flags=re.MULTILINE)
              for indent, _, block in FENCE.findall(answer)]
    defining = [block for block in blocks if DEFINES.search(block)]
    wanted = [block for block in defining if names & set(DEFINES.findall(block))]
    return (wanted or defining or blocks or [answer])[-1]


def humaneval_program(problem: dict, answer: str) -> dict:
    """A HumanEval problem's start, an answer's code and the problem's tests, to be run.

    The start stands there even when the answer repeats it: it has the imports and helper functions.
    It ends inside the function: an answer with only the rest of the function goes on from there.
    """
    code, entry = code_of(answer, problem["entry_point"]), problem["entry_point"]
    future = "".join(FUTURE.findall(code))                   # has to be a program's first line
    return {"answer": f"{future}{problem['prompt']}{FUTURE.sub('', code)}\n",
            "helpers": problem["prompt"], "names": [entry],
            "tests": f"{problem['test']}\ncheck({entry})\n"}


def mbpp_program(problem: dict, answer: str) -> dict:
    """An answer's code and an MBPP problem's tests (sanitised or full data set), to be run.

    The tests may call what the reference solution defines; without one, what the answer does.
    """
    tests = "\n".join(problem["test_list"])
    code = code_of(answer, tests)
    setup = "\n".join([*problem.get("test_imports", []), problem.get("test_setup_code", "")])
    reference = problem.get("code") or code
    defined, imports = DEFINES.findall(reference), "\n".join(IMPORT.findall(reference))
    return {"answer": f"{code}\n{setup}\n", "helpers": f"{imports}\n{setup}\n", "tests": tests,
            "names": sorted(set(defined) & set(re.findall(r"\w+", tests)))}


@functools.cache
def containment() -> str:
    """The best of sandbox.py's containments in which a harmless program passes here."""
    kinds = ["namespaces", "user", "limits"] if sys.platform == "linux" else ["limits"]
    if os.geteuid():
        kinds = [kind for kind in kinds if kind != "user"]
    for kind in kinds:
        if run_contained(PROBE, kind, 30) == "passed":
            return kind
    raise InputError("generated programs cannot be run here: not even a harmless one passes "
                     f"(python {SANDBOX})")


def isolation() -> str:
    """One line for the reader: how programs are contained on this machine."""
    root = os.geteuid() == 0
    line = ISOLATION[containment()].format(user="a user id of their own" if root else "user")
    if root and containment() == "limits":
        line += "; as root not even the number of processes is limited"
    return line


def run_program(program: dict | str, *, seconds: float = 10) -> tuple[bool, str]:
    """Run a program with its tests in a contained child; whether it passed, and why or why not.

    seconds: of CPU time, rounded up, and three times as many of wall time, so that other work on
    the machine does not decide. The reason is one of sandbox.REASONS: passed; failed (an
    assertion); error (any other exception, syntax included); memory; timeout; ended (before its
    last line: an exit, a signal, a crash); sandbox (it could not be started: nothing was measured).
    program: what humaneval_program or mbpp_program made; any string is one without tests.
    """
    reason = run_contained(program, containment(), seconds)
    return reason == "passed", reason


def run_contained(program: dict | str, kind: str, seconds: float, patience: float = 3) -> str:
    """One program in sandbox.py under one kind of containment: the reason it gives.

    seconds: of CPU time; patience: seconds of wall time to each of them.
    """
    if isinstance(program, str):
        program = {"answer": program, "helpers": "", "tests": "", "names": []}
    wall = patience * seconds
    scratch = tempfile.mkdtemp(prefix="program-")
    command = [sys.executable, "-s", "-S", SANDBOX, kind, str(seconds), str(wall)]
    keeper = subprocess.Popen(command, cwd=scratch, start_new_session=True,
                              env={"PYTHONHASHSEED": "0"},       # a set's order is always the same
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
    try:
        word, _ = keeper.communicate(json.dumps(program).encode(), timeout=wall + 20)
        return word.decode().strip() or "ended"
    except subprocess.TimeoutExpired:                        # somebody stopped the keeper
        return "timeout"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.communicate()
        # Not shutil.rmtree: a program may have left folders deeper than Python's recursion limit.
        subprocess.run(["chmod", "-R", "u+rwX", scratch], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", scratch], stderr=subprocess.DEVNULL)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k answers passes, drawn from n of which c do: arXiv 2107.03374, Eq. 1."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {n} answers, {c} of them right")
    return 1 - comb(n - c, k) / comb(n, k)


def main():
    """Run a file's reference solutions: where they pass, the sandbox is no hindrance to answers."""
    parser = Parser(description="Run the reference solutions of HumanEval or MBPP.")
    parser.add_argument("file", help="the data set, a JSON list or JSON lines")
    file = parser.parse_args().file
    print(isolation())
    ended = Counter()
    for where, problem in read_entries(file):
        if isinstance(problem, dict) and {"prompt", "canonical_solution", "test"} <= {*problem}:
            program = humaneval_program(problem, problem["canonical_solution"])
        elif isinstance(problem, dict) and {"code", "test_list"} <= {*problem}:
            program = mbpp_program(problem, problem["code"])
        else:
            raise InputError(f"{file}, {where}: neither a problem of HumanEval nor one of MBPP")
        passed, reason = run_program(program)
        ended[reason] += 1
        if not passed:
            print(f"{problem['task_id']}: {reason}")
    print(f"{ended['passed']} of {ended.total()} reference solutions pass")


if __name__ == "__main__":
    run_script(main)
