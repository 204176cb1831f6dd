"""What a reader may skip: how a script begins, with flags, and how it ends, with an exit code.

Exit codes: 0 done; 2 bad input, nothing touched; 3 the run stopped itself (disk full, out of
memory, too many bad steps in a row); 128 + n stopped by signal n (SIGINT 130, SIGTERM 143).
"""
import argparse
import inspect
import io
import re
import sys
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from plumbing.files import InputError

# What other libraries call our flags, for the hint at an unknown flag.
ALIASES = {"--lr": "--learning-rate", "--num-generations": "--answers", "--batch-size": "--queries",
           "--max-steps": "--steps", "--max-new-tokens": "--answer-tokens", "--kl-coef": "--beta"}


class RunStopped(Exception):
    """A run ends before its last step: one line that says why, and the exit code."""

    def __init__(self, message: str, code: int = 3, *, can_save: bool = True):
        super().__init__(message)
        self.code, self.can_save = code, can_save


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, with one line in place of the usage page, and with the
    nearest flag for a mistyped one."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        known = {flag: flag for action in self._actions for flag in action.option_strings}
        known |= {alias: flag for alias, flag in ALIASES.items() if flag in known}
        mistyped = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        near = [known[name] for flag in mistyped for name in get_close_matches(flag, known, 1)]
        hint = f"did you mean {', '.join(near)}? " * bool(near)
        raise InputError(f"{message} ({hint}--help lists the flags)")


def run_script(main):
    """Call main(); bad input and a stopped run end in one line on standard error and their code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):       # an emoji on a latin-1 terminal ends no run
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except (InputError, RunStopped) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else error.code)
    except KeyboardInterrupt:
        sys.exit(130)


def help_texts(settings_class) -> dict[str, dict[str, str]]:
    """The help of each setting by group, from the docstring of the dataclass:
    "GROUP:", below it lines of "    NAME  TEXT", and deeper ones that go on with the text."""
    groups = {}
    for line in inspect.getdoc(settings_class).splitlines():
        if re.fullmatch(r"\w+:", line):
            texts = groups[line.removesuffix(":")] = {}
        elif found := re.fullmatch(r"    (\w+) +(.+)", line):
            name, texts[found[1]] = found.groups()
        elif line.startswith("     "):
            texts[name] += " " + line.strip()
    return groups


def add_flags(parser: Parser, settings_class, preset: dict):
    """A flag for each field of a dataclass of settings; only those given reach the namespace.
    preset: what the embedded model sets, for the help."""
    parser.usage = "%(prog)s [FLAG ...]"
    known = {f.name: f for f in fields(settings_class)}
    for title, texts in help_texts(settings_class).items():
        group = parser.add_argument_group(title)
        for name, text in texts.items():
            default, choices = known[name].default, known[name].metadata["choices"]
            kinds = getattr(known[name].type, "__args__", (known[name].type,))   # str | None
            said = [] if default in (None, False) else [f"default {default}"]
            if preset.get(name, default) != default:
                said.append(f"embedded model: {preset[name]}")
            text += f" ({'; '.join(said)})" * bool(said)
            how = {"action": argparse.BooleanOptionalAction} if bool in kinds else {
                "type": kinds[0], "choices": choices,
                "metavar": None if choices else kinds[0].__name__.upper()}
            group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                               help=text.replace("%", "%%"), **how)
