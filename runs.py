"""What a reader may skip: command lines, run folders, logs, checkpoints and Ctrl-C."""
import argparse
import json
import os
import shutil
import signal
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from model import InputError


# ---------------------------------------------------------------- command lines

class Parser(argparse.ArgumentParser):
    """argparse, with one line in place of the usage page."""

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")


def run_script(main):
    """Call main(); bad input ends in one line on standard error and exit code 2, Ctrl-C in exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def add_flags(parser: Parser, settings_class):
    """One flag for each field of a dataclass of settings; only the flags that were given appear in the namespace."""
    for f in fields(settings_class):
        about, kind = f.metadata, f.type
        kind = next((k for k in (bool, int, float, str) if k is kind or k in getattr(kind, "__args__", ())), str)
        default = "" if f.default in (None, False, MISSING) else f" (default {f.default})"
        how = {"action": "store_true"} if kind is bool else {"type": kind, "choices": about["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=(about["help"] + default).replace("%", "%%"), **how)


def check_ranges(settings):
    """InputError for the first number below its field's `least` (or not a number at all)."""
    for f in fields(settings):
        value, least = getattr(settings, f.name), f.metadata["least"]
        if least is not None and value is not None and not value >= least:
            raise InputError(f"--{f.name.replace('_', '-')} must be at least {least}, found {value}")


# ---------------------------------------------------------------- one run's folder

def make_folder(out: str | None, name: str) -> Path:
    """A new folder: `out`, or runs/NAME, then runs/NAME-2, -3, ... An existing one is never written into."""
    base = Path(out) if out else Path("runs") / name
    for path in [base] if out else [base, *(base.with_name(f"{name}-{k}") for k in range(2, 10000))]:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
    raise InputError(f"--out {base} exists already; nothing is overwritten: choose another folder")


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def append_line(path: Path, record: dict):
    """One JSON object on a line of its own, in one write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def save_checkpoint(out: Path, step: int, write) -> Path:
    """checkpoint-000050/, whole or not at all: write(folder) fills a .tmp folder, which is renamed when complete.

    `checkpoint` is then turned to it: a relative link to the newest whole one.
    """
    final = out / f"checkpoint-{step:06d}"
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    temporary.rename(final)
    link = out / "checkpoint.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, out / "checkpoint")
    return final


class StopRequest:
    """True once Ctrl-C or SIGTERM has come: the loop then ends after its step. A second one stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def _take(self, number, frame):
        self.signal = number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving (again: stop at once)", flush=True)
        for n in (signal.SIGINT, signal.SIGTERM):
            signal.signal(n, signal.default_int_handler)

    def __bool__(self):
        return self.signal != 0
