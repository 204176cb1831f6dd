"""Grade the exercises: what is right, what is wrong in words, what is not written yet.

    python course/exercises/grade.py              # all ten
    python course/exercises/grade.py 2 5          # these
    python course/exercises/grade.py --list       # titles and minutes alone

An exercise is a file of this folder: what to do in words, a function to write, and check(), which
asserts in words. Write into the file, then grade it. Exit code 0: all that was asked for is right.
"""
import argparse
import importlib.util
import re
import sys
import textwrap
import time
import traceback
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
# First the product's files, last this folder: its grade.py must not hide the product's.
sys.path[:] = [str(HERE.parent.parent),
               *(p for p in sys.path if Path(p).resolve() != HERE), str(HERE)]

from plumbing.cli import run_script  # noqa: E402


def load(file: Path) -> ModuleType:
    """An exercise's file as a module; its name begins with a digit, so that import cannot."""
    spec = importlib.util.spec_from_file_location("exercise_" + file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grade(file: Path, *answer) -> tuple[str, str]:
    """("right", what it showed), ("wrong", what is wrong) or ("to do", what is wanted).

    answer: what to check in place of what stands in the file.
    """
    try:
        return "right", load(file).check(*answer)
    except NotImplementedError as wanted:
        return "to do", str(wanted)
    except AssertionError as words:
        return "wrong", str(words)
    except Exception as error:              # a student's code may fail in any way
        at = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
        line = f"line {at[-1].lineno}: " if at else ""
        return "wrong", f"{line}{type(error).__name__}: {error}"


def main():
    parser = argparse.ArgumentParser(description="Grade the exercises.")
    parser.add_argument("numbers", type=int, nargs="*", help="which (default: all)")
    parser.add_argument("--list", action="store_true", help="titles and minutes alone")
    args = parser.parse_args()
    files = {int(f.name[:2]): f for f in sorted(HERE.glob("[0-9][0-9]_*.py"))}
    if unknown := set(args.numbers) - set(files):
        parser.error(f"there is no exercise {min(unknown)}: they are 1 to {max(files)}")
    right = total = 0
    for number, file in files.items():
        if args.numbers and number not in args.numbers:
            continue
        minutes, title = re.match(r'"""Exercise \d+, (\d+) minutes: (.*)\.\n',
                                  file.read_text(encoding="utf-8")).groups()
        print(f"{number:2}  {title}  ({minutes} minutes)  course/exercises/{file.name}", flush=True)
        if args.list:
            continue
        begun = time.perf_counter()
        verdict, words = grade(file)
        total, right = total + 1, right + (verdict == "right")
        seconds = time.perf_counter() - begun
        verdict += f" ({seconds:.0f} s)" * (seconds > 5)
        print(textwrap.fill(f"{verdict}: {words}", 96, initial_indent="      ",
                            subsequent_indent="      "), flush=True)
    if not args.list:
        print(f"\n{right} of {total} right")
        sys.exit(right < total)


if __name__ == "__main__":
    run_script(main)                    # output that cannot be written (`| head`) is dropped
