"""What a reader may skip: how a script begins, with flags, and how it ends, with an exit code.

Exit codes: 0 done; 2 bad input, nothing touched; 3 the run stopped itself (disk full, out of
memory, too many bad steps in a row); 128 + n stopped by signal n (SIGINT 130, SIGTERM 143).
"""
import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from plumbing.files import InputError


class RunStopped(Exception):
    """A run ends before its last step: one line that says why, and the exit code."""

    def __init__(self, message: str, code: int = 3, *, can_save: bool = True):
        super().__init__(message)
        self.code, self.can_save = code, can_save


class Parser(argparse.ArgumentParser):
    """argparse, with one line in place of the usage page."""

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")


class Unfailing:
    """A stream for printing that never ends a run: once it cannot be written (a full disk, a reader
    such as `| head` that has left), what is printed goes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def flush(self):
        """write() has done it."""


def run_script(main):
    """Call main(); bad input and a stopped run end in one line on standard error and their code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # an emoji on a latin-1 terminal
    try:
        main()
    except (InputError, RunStopped) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                    # whoever read our output, as `| head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def add_flags(parser: Parser, settings_class):
    """A flag for each field of a dataclass of settings; only those given reach the namespace."""
    for f in fields(settings_class):
        kinds = getattr(f.type, "__args__", (f.type,))             # str | None -> (str, NoneType)
        default = "" if f.default in (None, False) else f" (default {f.default})"
        how = {"action": argparse.BooleanOptionalAction} if bool in kinds else {
            "type": kinds[0], "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=(f.metadata["help"] + default).replace("%", "%%"), **how)
