"""The laws of the house: which files there are, how long they are, and who may import whom."""
import ast
import functools
import tokenize
from pathlib import Path

from conftest import ROOT

import lsp
import rewards
import train
from plumbing import settings
from tiny import world

METHOD = {"lsp", "model", "sample", "rewards", "train", "rlpt", "eval"}
FOLDERS = ("plumbing", "evals", "tiny")
# What a root file may know of the other root files: only those that come before it.
MAY_KNOW = {"lsp": set(), "model": set(), "sample": {"model"}, "rewards": {"model", "sample"}}
# Limits in code lines.
ROOT_LIMIT, TOTAL_LIMIT, FILE_LIMIT, TESTS_LIMIT = 1550, 4700, 350, 7000
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER, tokenize.ENCODING}


def files(*folders) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def root_files() -> list[Path]:
    return sorted(ROOT.glob("*.py"))


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def code_lines(file: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    documented = set()
    for node in ast.walk(ast.parse(file.read_text())):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    with open(file, "rb") as source:
        lines = {line for token in tokenize.tokenize(source.readline) if token.type not in LAYOUT
                 for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - documented)


def imported(file: Path) -> set[str]:
    """Modules of the house that a file imports, wherever in it: "lsp", "plumbing.files", ..."""
    house = {module(f) for f in [*root_files(), *files(*FOLDERS, "bench", "course")]}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & house


def test_the_root_holds_the_seven_scripts_of_the_method():
    assert {file.stem for file in root_files()} == METHOD


def test_every_imported_folder_is_a_package_of_its_own():
    """Without __init__.py an installed package of the same name would be imported in its place."""
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").read_text() == ""


def test_plumbing_imports_nothing_from_above():
    for file in files("plumbing"):
        assert all(name.startswith("plumbing") for name in imported(file)), file


def test_the_method_knows_only_what_comes_before_it():
    for name, known in MAY_KNOW.items():
        found = imported(ROOT / f"{name}.py")
        assert {n for n in found if not n.startswith("plumbing")} <= known, name
    assert imported(ROOT / "lsp.py") == set()
    tree = ast.parse((ROOT / "lsp.py").read_text())
    outside = {alias.name.split(".")[0] for node in ast.walk(tree)
               if isinstance(node, ast.Import) for alias in node.names}
    assert outside == {"torch"}


def test_no_circle_of_imports():
    graph = {module(f): imported(f) - {module(f)} for f in [*root_files(), *files(*FOLDERS)]}
    while free := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in free:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"


def test_no_file_is_longer_than_a_sitting():
    long = {file.name: code_lines(file) for file in root_files() + files(*FOLDERS)
            if code_lines(file) > FILE_LIMIT}
    assert not long


def test_the_house_keeps_its_budgets():
    lines = lambda found: sum(code_lines(file) for file in found)
    root, whole = lines(root_files()), lines(root_files() + files(*FOLDERS))
    assert root <= ROOT_LIMIT and whole <= TOTAL_LIMIT
    assert lines((ROOT / "tests").glob("*.py")) <= TESTS_LIMIT
    assert f"{root:,} lines in seven scripts, {whole:,} with" in (ROOT / "README.md").read_text()


def test_the_names_that_settings_offer_are_those_of_the_method():
    assert settings.KL_ESTIMATORS == lsp.KL_ESTIMATORS and settings.READINGS == rewards.READINGS
    assert settings.CHALLENGER_REWARDS == lsp.CHALLENGER_REWARDS
    assert settings.CHECKS == tuple(train.rewards.CHECKS)
    assert settings.NEED_GOLD == tuple(rewards.NEED_GOLD)
    assert settings.MIXES == tuple(world.MIXES) and settings.STORIES == world.STORIES
