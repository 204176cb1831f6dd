"""The commands that README.md, the other pages and the exercises give, and how a test runs each of
them: for real in a folder of its own, or, where it needs a hub, a GPU or hours, by looking its
flags up in its script's --help."""
import ast
import contextlib
import glob
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

DOCUMENTS = {name: (ROOT / name).read_text()
             for name in ("README.md", "course/COURSE.md", "docs/MANUAL.md", "docs/RESULTS.md")}
EXERCISES = {f"course/exercises/{file.name}": ast.get_docstring(ast.parse(file.read_text()))
             for file in sorted((ROOT / "course/exercises").glob("*.py"))}

# What is not run here, and why; first match. Its flags are looked up instead.
CANNOT = {
    r"break_it\.py [a-z0-9-]+ --seed \d": "a fault each: tests/test_break_it.py",
    r"--dry-run": "seconds each: test_the_memory_table_is_what_dry_run_prints runs one",
    r"llama-3|smollm|skywork": "models of the hub",
    r"torchrun|--gpu|bench/gpu": "GPUs or several processes",
    r"prompts \S+\.json|annotations|eval\.py reference|HOST": "files that the reader has to bring",
    r"--text (books/|a\.txt|FILE)|--model DIR": "a corpus or a model of the reader's own",
    r"runs/(lsp|grpo|A)\S*/|results/(base|lsp)|\$run": "runs of real models",
    r"bench/\w+\.py|tiny/build\w*\.py|break_it\.py all": "minutes or hours",
    r"--out \.\./|--figure bench/": "writes over a kept result",
    r"--model (HOLE|BELIEVING)": "a model that takes 8 minutes to make",
    r"course/exercises/grade\.py$": "all ten: tests/test_exercises.py does",
}
# Not the product's own commands.
FOREIGN = ("pip", "curl", "gunzip", "git", "hf", "alpaca_eval", "cd", ".", "for", "do", "done",
           "python3", "python -m venv", "python -m pytest")


def commands(text: str) -> list[str]:
    """Commands of a document: indented lines and `code` that begin as a command does."""
    text = re.sub(r"\\\n\s*", "", text)                        # a command of several lines
    lines = [line.strip() for line in re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)]
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", text)]
    parts = [part.strip() for line in lines for part in
             re.split(r"&&|\||; do ", re.sub(r"\s+#\s.*", "", line))]
    first = ("python", "torchrun", "pip ", "curl ", "cp ", "git ", "hf ")
    return [part for part in parts if part.startswith(first) and len(part.split()) > 1]


def why_not(command: str) -> str | None:
    """Why a command is not run here; None: it is."""
    return next((why for pattern, why in CANNOT.items() if re.search(pattern, command)), None)


def foreign(command: str) -> bool:
    return command.startswith(tuple(word + " " for word in FOREIGN) + FOREIGN[-3:])


def script_of(command: str) -> tuple[str, list[str]]:
    """train.py and its arguments, also behind torchrun's."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at].replace("../", ""), words[at + 1:]


def folder_of(place: Path):
    """Links to all that the repository holds, so that commands find it and write elsewhere."""
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "results") and not entry.name.startswith("."):
            (place / entry.name).symlink_to(entry)
    block = re.search(r" {4}def even.*\n.*\n", DOCUMENTS["README.md"])[0]
    (place / "my_rewards.py").write_text(re.sub(r"^ {4}", "", block, flags=re.MULTILINE))


def run(command: str) -> tuple[int, str]:
    """Exit code and output of a command in the current folder, games at one step."""
    if command.startswith("cp "):
        *_, source, target = shlex.split(command)
        copy = shutil.copytree if Path(source).is_dir() else shutil.copy
        copy(source, target)
        return 0, ""
    script, words = script_of(command)
    words = [name for word in words for name in sorted(glob.glob(word)) or [word]]
    if script == "train.py" and not {"--watch", "--resume"} & set(words):
        words = [w for i, w in enumerate(words)
                 if "--steps" not in words[max(0, i - 1):i + 1]] + ["--steps", "1"]
    said, before, path = io.StringIO(), sys.argv, list(sys.path)
    sys.argv = [script, *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(script, run_name="__main__")
        return 0, said.getvalue()
    except SystemExit as end:
        return end.code or 0, said.getvalue()
    finally:
        sys.argv, sys.path[:] = before, path


def helps(scripts: list[str]) -> dict[str, str]:
    """--help of scripts, and of eval.py's commands, all in one process."""
    program = """
import contextlib, io, json, runpy, sys
out, path = {}, list(sys.path)
for key in json.loads(sys.argv[1]):
    said = io.StringIO()
    sys.argv = [*key.split(), "--help"]
    sys.path[:] = [key.split()[0].rpartition("/")[0] or ".", *path]
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    out[key] = said.getvalue()
    for name, module in list(sys.modules.items()):
        if "/bench/" in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]                   # bench/memory.py is not the product's memory.py
print(json.dumps(out))
"""
    done = subprocess.run([sys.executable, "-c", program, json.dumps(scripts)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"COLUMNS": "1000"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def help_key(command: str) -> str:
    """Whose --help names a command's flags: a script, or a command of eval.py."""
    script, words = script_of(command)
    return f"{script} {words[0]}" if script == "eval.py" and words else script
