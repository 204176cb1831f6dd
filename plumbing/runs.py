"""What a reader may skip: run folders, checkpoints, exact resume."""
import fcntl
import json
import math
import os
import re
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from plumbing.cli import RunStopped
from plumbing.files import InputError, read_json

RECORDS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl", "eval_samples.jsonl")


# ---------------------------------------------------------------- files

def plain(value):
    """The same value with None for every number that JSON lacks (NaN, infinities)."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path):
    """Wait until a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, value):
    """Replace a JSON file as a whole: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", "utf-8")
    sync(temporary)
    os.replace(temporary, path)


def append_line(path: Path, *records: dict):
    """Append JSON objects, a line each, in one write; NaN becomes null."""
    lines = [json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; [] without a file. A half-written last line is left out."""
    records = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.split("\n")[:-1]:
            records.append(json.loads(line))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {len(records) + 1}: not JSON: {error}") from None
    return records


def digest(path: Path) -> list[int]:
    """Bytes and crc32 of a file: 2.3 GB/s, 20 s for 45 GB."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            crc = zlib.crc32(piece, crc)
        return [file.tell(), crc]


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path that may not exist yet."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if os.path.exists(p))).free


# ---------------------------------------------------------------- one run's folder

def new_run(s, name: str, need: int) -> "Run":
    """A new folder, locked: --out, or runs/NAME, else runs/NAME-2, -3, ...

    An existing folder is used only if it is empty, or, with --overwrite, if it is a run's: then
    its records and checkpoints are deleted. `need`: bytes of a checkpoint.
    """
    folder, number = Path(s.out or f"runs/{name}"), 1
    while not s.out and folder.exists():
        number += 1
        folder = Path(f"runs/{name}-{number}")
    free = free_bytes(folder)
    if free < need:
        raise InputError(f"{folder}: a checkpoint takes {need / 1e9:.2f} GB, the disk has "
                         f"{free / 1e9:.2f} GB free")
    held = set(os.listdir(folder) if os.path.isdir(folder) else ()) - {"lock", "config.json.tmp"}
    if held and not (s.overwrite and "config.json" in held):
        raise InputError(f"--out {folder} exists already and holds something other than a run")
    run = Run(folder)
    for path in run.checkpoints() + run.checkpoints(".tmp"):
        shutil.rmtree(path)
    for file in ("checkpoint", *RECORDS, "config.json"):
        (folder / file).unlink(missing_ok=True)
    return run


def reopen(folder: Path) -> "Run":
    """A run to resume: locked, with its newest whole checkpoint, if it has saved any."""
    run = Run(folder)
    found = run.checkpoints()
    for path in reversed(found):
        fault = damage(path)
        if not fault:
            run.checkpoint = path
            return run
        print(f"{path} is not whole ({fault}): looking for an older one", flush=True)
    if found:
        raise InputError(f"{folder}: no whole checkpoint; start another run, or this one again "
                         "with --overwrite")
    return run


class Run:
    """A run's folder while one process holds it: its lock, records and checkpoints.

    The lock belongs to the open file, so it ends with the process, however that ends. A copy that
    is sent to another process has no lock, and appends nothing (ranks.py).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoint = None               # the newest whole one
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / "lock", "a", encoding="utf-8")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another process") from None
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}") from None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.lock:
            self.lock.close()

    def __getstate__(self) -> dict:
        return vars(self) | {"lock": None}

    @contextmanager
    def writing(self, name: str):
        """Stop the run where the disk is full or fails; what was written before stays whole."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunStopped(f"{self.folder / name} could not be written: {reason}; "
                             + self.how_to_go_on(), can_save=False) from None

    def append(self, name: str, records: list[dict]):
        """Append records to one of the run's files."""
        if self.lock:
            with self.writing(name):
                append_line(self.folder / name, *records)

    def begin(self, settings: dict):
        """Write config.json."""
        with self.writing("config.json"):
            write_json(self.folder / "config.json", settings)

    # ------------------------------------------------------------ checkpoints

    def checkpoints(self, end: str = "") -> list[Path]:
        """The checkpoints, oldest first. end=".tmp": those that a crash left half-written."""
        return sorted((path for path in self.folder.iterdir()
                       if re.fullmatch(rf"checkpoint-[0-9]{{6,}}{end}", path.name)),
                      key=lambda path: (len(path.name), path.name))

    def restore(self, keep: int, **now) -> dict:
        """Cut the records back to the newest whole checkpoint; returns its state. Without one, that
        of step 0.

        now: what may differ from when it was written, at the price of exactness; reported.
        """
        state = {"step": 0, "updates": 0, "bad_steps": 0, "records": {}, **now}
        if self.checkpoint:
            state |= read_json(self.checkpoint / "state/state.json")
            print(f"resuming {self.folder} after step {state['step']}", flush=True)
        for key, value in now.items():
            if state[key] != value:
                print(f"resuming with {key} {value}, was {state[key]}: not the same bit for bit")
        with self.writing("records"):
            self.tidy(keep)
            for file in (self.folder / name for name in RECORDS):
                length = state["records"].get(file.name, [0])[0]
                text = file.read_bytes()[:length] if file.exists() else b""
                if text:
                    os.truncate(file, text.rfind(b"\n") + 1)
                else:
                    file.unlink(missing_ok=True)
        return state | now

    def save(self, step: int, state: dict, write, *, keep: int):
        """Write checkpoint-000050/, whole or not at all, and `checkpoint`, a relative link to it.

        write(folder) fills a .tmp folder. The folder gets its name when all of it is on the disk,
        with a manifest: bytes and crc32 of each file. A crash at any moment leaves this checkpoint
        or the one before.
        """
        final = self.folder / f"checkpoint-{step:06d}"
        temporary = Path(f"{final}.tmp")
        records = [self.folder / name for name in RECORDS if (self.folder / name).exists()]
        try:
            with self.writing(final.name):
                write(temporary)
                state["records"] = {file.name: digest(file) for file in records}
                write_json(temporary / "state/state.json", {"step": step} | state)
                files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
                write_json(temporary / "manifest.json", {
                    str(file.relative_to(temporary)): digest(file) for file in files})
                for path in (*temporary.rglob("*"), temporary, *records):
                    sync(path)
                temporary.rename(final)
                self.checkpoint = final
                self.tidy(keep)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def tidy(self, keep: int):
        """Link `checkpoint` to the newest whole one. Delete all but it and the keep - 1 before it
        (0: all before it)."""
        whole = found = self.checkpoints()
        if self.checkpoint:
            link = self.folder / "checkpoint.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(self.checkpoint.name)
            os.replace(link, self.folder / "checkpoint")
            sync(self.folder)
            whole = found[:found.index(self.checkpoint) + 1]
        for path in {*found, *self.checkpoints(".tmp")} - {*whole[-keep:]}:
            shutil.rmtree(path)

    def how_to_go_on(self) -> str:
        """What is left of a stopped run, and the command that continues it."""
        whole = self.checkpoint.name if self.checkpoint else "none yet, it would start anew"
        return f"newest whole checkpoint: {whole}; to go on: train.py --resume {self.folder}"


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        for name, expected in read_json(checkpoint / "manifest.json").items():
            found = digest(checkpoint / name)
            if found != expected:
                return f"{name}: bytes and crc32 are {found}, were {expected}"
    except (InputError, OSError) as error:
        return str(error)
    return None
