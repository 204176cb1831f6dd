"""Grading: MATH answers against a table, boxes, programs in chat answers, and hostile programs."""
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from evals import benchmarks, grade
from plumbing.files import InputError


@pytest.mark.parametrize("n, c, k", [(1, 1, 1), (5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 1, 4)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_answer(n, c, k):
    answers = [i < c for i in range(n)]
    draws = [any(draw) for draw in itertools.combinations(answers, k)]
    assert grade.pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


# ---------------------------------------------------------------- programs in chat answers

# Our own problems in the layout of the two data sets.
HUMANEVAL = {
    "task_id": "Own/0", "entry_point": "area_sum",
    "prompt": "from math import pi\n\n\ndef area(r: float) -> float:\n    return pi * r * r\n\n\n"
              "def area_sum(radii: list) -> float:\n    \"\"\" The circles' areas, rounded.\n"
              "    >>> area_sum([1])\n    3\n    \"\"\"\n",
    "canonical_solution": "    return round(sum(area(r) for r in radii))\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1]) == 3\n"
            "    assert candidate([1, 2]) == 16\n    assert candidate([]) == 0\n",
}
MBPP = {
    "task_id": 1, "prompt": "Write a function to turn a word around.",
    "code": "def turn(word):\n  return word[::-1]", "test_imports": ["import math"],
    "test_list": ["assert turn('abc') == 'cba'", "assert turn('') == ''",
                  "assert turn('xy' * 2) == 'yx' * math.floor(2.5)"],
}
WHOLE = "def area_sum(radii):\n    return round(sum(area(r) for r in radii))\n"


@pytest.mark.parametrize("answer", [
    HUMANEVAL["canonical_solution"],
    HUMANEVAL["canonical_solution"].lstrip(), " " + HUMANEVAL["canonical_solution"],
    "total = 0\nfor r in radii:\n    total += area(r)\nreturn round(total)",
    "total = 0\n    for r in radii:\n        total += area(r)\n    return round(total)",
    "    total = 0\n    for r in radii:\n        total += area(r)\n    return round(total)\n1",
    f"Here it is:\n\n{WHOLE}", f"ONE = 1\n\n{WHOLE.replace('round(', 'round(ONE * ')}",
    f"{WHOLE}```",
    HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"],
    WHOLE,
    f"Sure.\n\n```python\n{WHOLE}```\nFor instance:\n```python\nprint(area_sum([1]))\n```\nDone.",
    f"First try:\n```\ndef area_sum(radii):\n    return 0\n```\nBetter:\n~~~py\n{WHOLE}~~~",
    f"```python\nfrom __future__ import annotations\n{WHOLE}```",
    f"```python\n{WHOLE}\nif __name__ == '__main__':\n    print(input())\n```",
    "1. So:\n   ```python\n" + textwrap.indent(WHOLE, "   ") + "   ```",
    f"```python\n{WHOLE}```\nTest:\n```python\ndef test_it():\n    assert area_sum([]) == 0\n```",
    "```python\n" + HUMANEVAL["canonical_solution"] + "```",
    f"```python\n{WHOLE}",                                                  # never closed
])
def test_a_right_answer_passes_however_it_is_wrapped(answer):
    assert grade.run_program(grade.humaneval_program(HUMANEVAL, answer)) == (True, "passed")


@pytest.mark.parametrize("answer, reason", [
    ("    return None\n", "failed"), (WHOLE.replace("in radii", "in radii[:1]"), "failed"),
    ("", "failed"), ("I cannot do that.", "error"), ("```python\ndef area_sum(:\n```", "error"),
    ("    raise SystemExit(0)\n", "ended")])
def test_a_wrong_answer_fails(answer, reason):
    assert grade.run_program(grade.humaneval_program(HUMANEVAL, answer)) == (False, reason)


def test_mbpp_answers_meet_each_of_their_tests():
    assert grade.run_program(grade.mbpp_program(MBPP, MBPP["code"])) == (True, "passed")
    for number, test in enumerate(MBPP["test_list"]):
        wrong = {**MBPP, "test_list": [*MBPP["test_list"]]}
        wrong["test_list"][number] = test.replace("==", "!=")
        assert grade.run_program(grade.mbpp_program(wrong, MBPP["code"])) == (False, "failed")
    setup = {"code": MBPP["code"], "test_list": ["assert turn(W) == 'ba'"],
             "test_setup_code": "W = 'ab'"}
    assert grade.run_program(grade.mbpp_program(setup, MBPP["code"])) == (True, "passed")


@pytest.mark.parametrize("problem, line", [
    (HUMANEVAL, "1 of 1 reference solutions pass"), (MBPP, "1 of 1 reference solutions pass"),
    (MBPP | {"code": "def turn(word): return None"}, "1: failed\n0 of 1 reference solutions pass")])
def test_the_reference_solutions_of_a_file_are_run(problem, line, tmp_path, capsys):
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    benchmarks.run_references(str(tmp_path / "problems.jsonl"))
    assert capsys.readouterr().out == f"{grade.ISOLATION[grade.containment()]}\n{line}\n"


def test_a_file_of_something_else_is_refused_in_a_line(tmp_path):
    (tmp_path / "problems.json").write_text('[{"question": "1 + 1?"}]')
    with pytest.raises(InputError, match="problems.json, entry 1: no text"):
        benchmarks.run_references(str(tmp_path / "problems.json"))


# ---------------------------------------------------------------- hostile programs

def leftovers() -> list[str]:
    """Processes of this test's sandbox.py that are alive."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [file.parent.name] if grade.SANDBOX.encode() in file.read_bytes() else []
    return found


@pytest.fixture
def namespaces():
    """Only where programs can have namespaces of their own."""
    if grade.containment() != "namespaces":
        pytest.skip("no namespaces here")


KINDS = [grade.containment(), *({"limits"} - {grade.containment()})]


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Scratch folders in a place of this test; after it they are gone, and so is every process."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    named = tmp_path / "sandbox.py"
    named.symlink_to(grade.SANDBOX)                # a name of its own: tests may run side by side
    monkeypatch.setattr(grade, "SANDBOX", str(named))
    yield folder
    assert list(folder.iterdir()) == [] and leftovers() == []


def end(program: str, kind: str, seconds: float = 10) -> str:
    program = {"answer": textwrap.dedent(program), "helpers": "", "tests": "", "names": []}
    return grade.run_program(program, seconds=seconds, kind=kind)[1]


# What each does, and how it may end. None of them may pass. (A fork is an error where the limit of
# processes counts all of a user's.)
HOSTILE = {
    "loops for ever": ("while True: pass", {"timeout"}),
    "sleeps for ever": ("import time\ntime.sleep(1e6)", {"timeout"}),
    "ignores every signal it can": ("""
        import signal
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True: pass""", {"timeout"}),
    "stops itself": ("import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\n"
                     "time.sleep(60)", {"timeout"}),
    "swallows every exception": ("""
        while True:
            try: raise SystemExit
            except BaseException: pass""", {"timeout"}),
    "eats memory": ("hoard = bytearray(1 << 30)", {"memory"}),
    "eats memory in small bites": ("hoard = [1]\nwhile True: hoard += [[n] for n in hoard]",
                                   {"memory", "timeout"}),
    "asks for one huge number": ("x = 7 ** 7 ** 9\nassert x", {"timeout", "memory"}),
    "writes a huge file": ("with open('big', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
                           {"error"}),
    "prints without end": ("while True: print('x' * 1_000_000)", {"timeout"}),
    "opens many files": ("all = [open('/dev/null') for _ in range(40)]", {"error"}),
    "recurses without end": ("def f(): return f()\nf()", {"error"}),
    "lifts the recursion limit": ("""
        import sys
        sys.setrecursionlimit(10 ** 9)
        class A:
            def __getattr__(self, name): return getattr(self, name + "x")
        A().a""", {"ended", "memory", "timeout"}),
    "crashes the interpreter": ("import ctypes\nctypes.string_at(0)", {"ended"}),
    "waits for input": ("input()", {"error"}),
    "exits as if all were well": ("import sys\nsys.exit(0)", {"ended"}),
    "leaves as if all were well": ("import os\nos._exit(0)", {"ended"}),
    "leaves when a test is about to fail": ("""
        import os
        class Answer:
            def __eq__(self, other): os._exit(0)
        assert Answer() == 1""", {"ended"}),
    "says that it passed": ("""
        import os, sys
        for stream in (sys.stdout, sys.stderr): print("passed", file=stream, flush=True)
        for number in range(64):
            try: os.write(number, b"passed")
            except OSError: pass
        os._exit(0)""", {"ended", "error"}),
    "says so when it exits": ("import atexit, os\natexit.register(os.write, 3, b'passed')\n"
                              "assert False", {"failed"}),
    "patches what the child needs": ("""
        import builtins, os, sys
        os._exit = sys.exit = lambda code=0: None
        os.write = lambda number, word: len(word)
        builtins.exec = builtins.compile = lambda *a: None
        builtins.AssertionError = builtins.Exception = builtins.MemoryError = ZeroDivisionError
        sys.excepthook = lambda *a: None
        assert False""", {"ended"}),
    "closes every file": ("import os\nos.closerange(0, 1000)", {"ended"}),
    "kills its process group": ("import os\nos.killpg(0, 9)\nassert False", {"ended", "failed"}),
    "forks, and the parent leaves": ("""
        import os, time
        if os.fork(): os._exit(0)
        time.sleep(60)""", {"timeout", "error", "ended"}),
    "imports this project": ("import sandbox", {"error"}),
}
# Contained by namespaces alone.
NAMESPACES = {
    "leaves a daemon in a session of its own": ("""
        import os, time
        for _ in range(2):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0: time.sleep(600)
                os._exit(0)
        time.sleep(.1)
        assert False""", {"failed", "error"}),
    "forks without end": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
                          {"timeout"}),
    "starts threads without end": ("""
        import threading, time
        while True: threading.Thread(target=time.sleep, args=(60,)).start()""", {"error"}),
    "kills all that it may": ("import os\nassert os.getpid() == 1\nos.kill(-1, 9)\nassert False",
                              {"error", "failed"}),
    "kills its parent": ("import os\nassert os.getpid() == 1\nos.kill(os.getppid(), 9)\n"
                         "assert False", {"failed", "ended"}),
    "fills its scratch folder": ("""
        for number in range(100):
            with open(str(number), "wb") as f: f.write(bytes(1 << 20))""", {"error"}),
    "reads other people's files": ("open('/etc/passwd').read()", {"error"}),
    "writes over the libraries": ("import os\nopen(os.__file__, 'a').write('x')", {"error"}),
    "follows a link out": ("import os\nos.symlink('/etc', 'x')\nos.listdir('x')", {"error"}),
    "mounts": ("""
        import ctypes
        libc = ctypes.CDLL(None)
        assert not libc.mount(None, b"/", None, 32, None) or not libc.umount2(b"/usr/lib", 2)""",
               {"failed"}),
}


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_hostile_program_is_contained_by_namespaces_and_does_not_pass(name, namespaces):
    program, reasons = NAMESPACES[name]
    assert end(program, "namespaces", 0.5 if "timeout" in reasons else 10) in reasons


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained_and_does_not_pass(name, kind):
    program, reasons = HOSTILE[name]
    assert end(program, kind, 0.5 if "timeout" in reasons else 10) in reasons


def test_the_cpu_limit_ends_what_no_signal_handler_interrupts():
    program = {"answer": "", "helpers": "", "names": [], "tests": "sum(range(10 ** 12))"}
    started = time.monotonic()
    assert grade.run_program(program, seconds=0.5) == (False, "ended")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_passes_leaves_at_once_whatever_it_left_running(kind):
    assert end("""
        import atexit, os, threading, time
        if os.getpid() == 1: threading.Thread(target=time.sleep, args=(60,)).start()
        atexit.register(time.sleep, 60)""", kind) == "passed"


def test_processes_are_counted_and_there_are_enough(namespaces):
    assert end("""
        import os, time
        children = 0
        try:
            for _ in range(100):
                if os.fork() == 0: time.sleep(60)
                children += 1
        except BlockingIOError: pass
        assert 0 < children < 8""", "namespaces") == "passed"
    assert end("len(bytearray(100 << 20))", "namespaces") == "passed"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_environment_or_the_open_files_is_inherited(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    with open(tmp_path / "private", "w") as file:
        os.set_inheritable(file.fileno(), True)
        assert end("""
            import os
            assert not {"SECRET_KEY", "HOME", "PATH"} & set(os.environ)
            if os.path.exists("/proc"):
                assert b"s3cret" not in open("/proc/self/environ", "rb").read()
            for number in range(5, 100):
                try: os.fstat(number)
                except OSError: continue
                assert False, number""", kind) == "passed"


def test_the_environment_of_other_processes_is_out_of_sight(namespaces):
    assert Path(f"/proc/{os.getpid()}/environ").exists()
    assert end("import os\nassert not os.path.exists('/proc')", "namespaces") == "passed"


def test_the_home_folder_stays_as_it_was(namespaces):
    file = Path.home() / f".grade-test-{os.getpid()}"
    for name in (str(file), f"~/{file.name}"):
        program = f"import os\nopen(os.path.expanduser({name!r}), 'w').close()"
        assert end(program, "namespaces") == "error" and not file.exists()


def test_there_is_no_network(namespaces):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        place = ("127.0.0.1", server.getsockname()[1])
        program = f"import socket\nsocket.create_connection({place!r}, 1)"
        assert end(program, "namespaces") == "error"
        with pytest.raises(TimeoutError):
            server.accept()


def test_links_and_closed_folders_in_the_scratch_folder_harm_nobody(tmp_path):
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("kept")
    treasure.chmod(0o500)
    assert end(f"""
        import os
        os.makedirs("deep/closed")
        for folder in (".", "deep", "deep/closed"):
            os.symlink({str(treasure)!r}, folder + "/link")
            os.symlink({str(treasure / "gold")!r}, folder + "/gold")
        os.chmod("deep/closed", 0)
        os.chmod(".", 0)""", "limits") == "passed"
    assert (treasure / "gold").read_text() == "kept" and treasure.stat().st_mode & 0o777 == 0o500


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outlives_a_run_that_is_killed(kind, scratch):
    if not Path("/proc").exists():
        pytest.skip("the death of a parent is a signal on Linux alone")
    command = [sys.executable, "-s", "-S", grade.SANDBOX, kind, "60"]
    program = json.dumps({"answer": "import time; time.sleep(600)", "helpers": "", "tests": "",
                          "names": []}).encode()
    run = subprocess.Popen([sys.executable, "-S", "-c", f"import subprocess, time\n"
                            f"p = subprocess.Popen({command!r}, stdin=subprocess.PIPE,"
                            f" cwd={str(scratch)!r}, start_new_session=True)\n"
                            f"p.communicate({program!r})"])
    wait_until(lambda: len(leftovers()) >= 3)                # the run, the keeper, the program
    time.sleep(0.5)                                          # which now has its limits
    run.kill()
    run.wait()
    wait_until(lambda: leftovers() == [])


def wait_until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_program_that_cannot_be_started_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(grade, "SANDBOX", "/nowhere/sandbox.py")
    with pytest.raises(InputError, match="could not be started"):
        benchmarks.is_right("mbpp", {"problem": MBPP}, MBPP["code"], cut=False)


def test_without_namespaces_the_next_best_is_chosen(monkeypatch):
    monkeypatch.setattr(grade, "run_program", lambda program, seconds, kind:
                        (kind == "limits", ""))
    assert grade.containment.__wrapped__() == "limits"


# Wrong answers to tests of add_one(1) == 2, add_one(5) == 6 and of what their tests rely on.
CHEATS = {
    "equals everything": """
        class Same(int):
            def __eq__(self, other): return True
            __hash__ = int.__hash__
        def add_one(x): return Same(0)""",
    "a helper called abs, by accident": "def abs(x): return -1\ndef add_one(x): return x + 17",
    "patches a builtin": "import builtins\nbuiltins.abs = lambda x: 0\ndef add_one(x): return 0",
    "patches a module": "import math\nmath.isclose = lambda *a: True\ndef add_one(x): return 0",
    "puts a module of its own in place": """
        import sys, types
        sys.modules["math"] = types.SimpleNamespace(isclose=lambda *a, **k: True)
        def add_one(x): return 0""",
    "looks for the verdict in the callers' frames": """
        import os, sys
        def add_one(x):
            frame = sys._getframe()
            while frame := frame.f_back:
                for name in list(frame.f_locals): frame.f_locals[name] = "passed"
            return 0""",
    "skips assertions": "import sys\nsys.settrace(lambda *a: None)\ndef add_one(x): return 0",
    "answers both ways in two processes": """
        import os
        def add_one(x):
            return x + 1 if os.fork() == 0 and x == 1 else 0""",
    "claims a fault of the machine": """
        import os
        os.write(4, b'["sandbox", null]\\n')
        def add_one(x): return 0""",
    "writes replies ahead": """
        import os
        for _ in range(9): os.write(4, b'["value", true]\\n')
        def add_one(x): return 0""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_answer_does_not_pass_whatever_it_redefines(name):
    program = {"answer": textwrap.dedent(CHEATS[name]), "helpers": "import math", "tests": (
        "assert add_one(1) == 2 and add_one(5) == 6\nassert abs(add_one(2.5) - 3.5) < 1e-6\n"
        "assert math.isclose(add_one(1e9), 1e9 + 1)"), "names": ["add_one"]}
    assert grade.run_program(program)[1] in ("failed", "error", "ended")
    right = program | {"answer": "def add_one(x): return x + 1"}
    assert grade.run_program(right) == (True, "passed")


@pytest.mark.parametrize("answer", [
    "def set(x): return 0\n", "import os; set = lambda x: 0\n",
    "from builtins import bool as set\n"])
def test_an_answer_replaces_nothing_else_that_the_tests_use(answer):
    right = "def both(a, b): return [x for x in a if x in b]"
    problem = {"code": right, "test_list": ["assert set(both([1, 2], [2, 3])) == set([2])"]}
    wrong = answer + "def both(a, b): return [7]"
    assert not grade.run_program(grade.mbpp_program(problem, wrong))[0]
    assert grade.run_program(grade.mbpp_program(problem, right)) == (True, "passed")


def test_the_tests_may_set_up_objects_of_the_answers_classes():
    tree = "class Node:\n    def __init__(self, x):\n        self.x, self.left = x, None\n"
    problem = {"code": tree + "def height(n): return 1 + height(n.left) if n else 0",
               "test_setup_code": "root = Node(1) \r\nroot.left = Node(2) \r\nleaf = Node(3)",
               "test_list": ["assert height(root) == 2", "assert height(leaf) == 1"]}
    assert grade.run_program(grade.mbpp_program(problem, problem["code"])) == (True, "passed")
    wrong = grade.mbpp_program(problem, tree + "def height(n): return 1")
    assert grade.run_program(wrong) == (False, "failed")


def test_an_answer_finds_nothing_of_what_the_tests_expect(namespaces):
    answer = """
        import gc, sys
        def guess():
            held, frame = gc.get_objects(), sys._getframe()
            while frame := frame.f_back:
                held += frame.f_locals.values()
            texts = [item for x in held if isinstance(x, dict) for item in x.values()]
            return any("rock" + "et" in str(x) for x in texts + held if type(x) in (str, bytes))"""
    program = {"answer": textwrap.dedent(answer), "helpers": "ROCKET = 'rocket'",
               "names": ["guess"], "tests": "assert guess()  # rocket"}
    assert grade.run_program(program) == (False, "failed")
    assert grade.run_program(program | {"tests": "assert not guess()"}) == (True, "passed")


def test_values_of_every_plain_kind_come_back_as_they_are_and_objects_can_be_handed_back():
    answer = """
        import collections
        class Pair:
            def __init__(self, a): self.a = a
        def same(x, *, key=None): return x
        def total(pairs): return sum(p.a for p in pairs)
        def kinds(): return [collections.Counter("aab"), (x for x in "ab"), {1: 2}.keys()]"""
    tests = """
        for x in (None, True, 3, 10**5000, 2.5, float("inf"), "\\ud800", (1, [2]), {3, 4}, b"x",
                  frozenset({5}), {(1, 2): {"a": None}}, 1 + 2j):
            assert same(x) == x and type(same(x)) is type(x)
        assert same(x=5, key=1) == 5 and total([Pair(1), Pair(2)]) == 3
        assert total(p for p in [Pair(4)]) == 4
        counter, generated, keys = kinds()
        assert counter == {"a": 2, "b": 1} and generated != ["a", "b"]
        assert list(generated) == ["a", "b"] and list(keys) == [1]"""
    program = {"answer": textwrap.dedent(answer), "helpers": "", "tests": textwrap.dedent(tests),
               "names": ["same", "total", "Pair", "kinds"]}
    assert grade.run_program(program) == (True, "passed")
