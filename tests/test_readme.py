"""README.md is true: training commands parse or run, the files, flags and tests it names exist."""
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import eval as eval_script
import runs
from settings import Settings

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for line in TEXT.split("\n") if line.startswith("    ")]
COMMANDS = [part.strip() for line in COMMANDS for part in line.split("&&")]
TRAIN = [c for c in COMMANDS if c.startswith("python train.py")]
EVAL = [c for c in COMMANDS if c.startswith("python eval.py")]


@pytest.mark.parametrize("command", TRAIN)
def test_each_training_command_is_made_of_real_flags(command):
    parser = runs.Parser()
    runs.add_flags(parser, Settings)
    parser.parse_args(shlex.split(command)[2:])


@pytest.mark.parametrize("command", EVAL)
def test_each_evaluation_command_is_made_of_real_flags(command):
    eval_script.make_parser().parse_args(shlex.split(command)[2:])


def test_the_commands_of_the_first_minute_run(tmp_path):
    wanted = ["python train.py", "python train.py --watch", "python train.py --algo lsp-zero",
              "python train.py --algo grpo --prompts easy"]
    assert set(wanted) <= set(TRAIN)
    for command in wanted:
        arguments = [str(ROOT / "train.py"), *shlex.split(command)[2:], "--steps", "1"]
        result = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True,
                                text=True)
        assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "runs").glob("tiny-*/eval.jsonl"))) == 3


def test_every_file_flag_and_test_that_the_readme_names_exists():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {name}(" in tests, name
    for file in re.findall(r"`((?:\w+/)*\w+\.(?:py|txt|json))`", TEXT):
        assert (ROOT / file).exists() or (ROOT / "tiny" / file).exists(), file
    flags = {"--" + f.replace("_", "-") for f in Settings.__dataclass_fields__}
    other_scripts = "".join(p.read_text() for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")))
    for flag in re.findall(r"`(--[\w-]+)", TEXT):
        assert flag in flags or f'"{flag}"' in other_scripts, flag
    for module, function in re.findall(r"`(lsp|train|rewards)\.(\w+)`", TEXT):
        assert function == "py" or hasattr(__import__(module), function), function
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (ROOT / picture).exists(), picture


def test_the_continuous_integration_calls_the_readmes_test_command():
    script = (ROOT / ".ci/run").read_text()
    assert "python -m pytest" in COMMANDS and "\npython -m pytest\n" in script


def test_the_results_table_is_what_the_stored_runs_give():
    seeds = re.findall(r"bench/tiny_seeds.py --seeds ([\d ]+?)\s*#", TEXT)[0].split()
    command = [sys.executable, ROOT / "bench/tiny_seeds.py", "--print", "--seeds", *seeds]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.split("\n") if line.startswith("|")]
    assert len(rows) == 10 and all(row in TEXT for row in rows)
