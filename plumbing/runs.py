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


# ---------------------------------------------------------------- files that survive a power cut

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
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value):
    """Replace a JSON file as a whole: at any moment there is the old one or the new one."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file, if there is one; a half-written last line is left out."""
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line else []
        except (ValueError, RecursionError):
            raise InputError(f"{path}, line {number}: not JSON") from None
    return records


def append_line(path: Path, record: dict):
    """One JSON object on a line of its own, in one write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def digest(path: Path, length: int | None = None) -> list[int]:
    """Bytes and crc32 of a file, or of its first `length` bytes: 2.3 GB/s, 20 s for 45 GB."""
    crc, count = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(2**24 if length is None else min(2**24, length - count)):
            crc, count = zlib.crc32(piece, crc), count + len(piece)
    return [count, crc]


def fingerprint(path) -> int:
    """One number for the contents of a file, or of a model's directory (not of its folders).

    texts.Texts took its own on the one pass that it makes.
    """
    if not isinstance(path, Path):
        return path.crc
    files = [path] if path.is_file() else sorted(
        file for file in path.iterdir() if file.suffix in (".json", ".jinja", ".safetensors"))
    return zlib.crc32(json.dumps([[file.name, *digest(file)] for file in files]).encode())


def free_bytes(path: Path) -> int:
    """What is free on the disk of a path that may not exist yet."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if os.path.exists(p))).free


# ---------------------------------------------------------------- one run's folder

def new_run(s, name: str, need: int) -> "Run":
    """A new folder, locked: --out, or runs/NAME, else runs/NAME-2, -3, ...

    None that exists is touched, except a run's own with --overwrite (its records and checkpoints
    go), and with --requeue one that holds nothing yet. `need`: bytes of a checkpoint.
    """
    base = Path(s.out) if s.out else Path("runs") / name
    tries = [base] if s.out else [base, *(base.with_name(f"{name}-{k}") for k in range(2, 10000))]
    free = free_bytes(base)
    if free < need:
        raise InputError(f"{base}: a checkpoint takes {need / 1e9:.2f} GB, the disk has "
                         f"{free / 1e9:.2f} GB free")
    for path in tries:
        try:
            path.mkdir(parents=True)
            sync(path.parent)
            return Run(path)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
    taken = InputError(f"--out {base} exists already; nothing is overwritten: choose another, or "
                       "--resume, --requeue or --overwrite a run")
    if not base.is_dir():
        raise taken
    held = {file.name for file in base.iterdir()} - {"lock", "config.json.tmp"}
    if held and not (s.overwrite and "config.json" in held):
        raise taken
    run = Run(base)
    for folder in [*run.checkpoints().values(), *run.leftovers()]:
        shutil.rmtree(folder)
    for file in [base / "checkpoint", *(base / name for name in RECORDS), base / "config.json"]:
        file.unlink(missing_ok=True)
    return run


def reopen(folder: Path) -> "Run":
    """A run to go on with: locked, its newest whole checkpoint found."""
    run = Run(folder)
    run.newest_whole()
    return run


class Run:
    """A run's folder while one process holds it: its lock, records and checkpoints.

    The lock belongs to the open file, so it ends with the process, however that ends. What is sent
    to another process is without the lock, and appends nothing (ranks.py).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoint = None               # the newest whole one
        try:
            self.lock = open(folder / "lock", "a+", encoding="utf-8")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lock.truncate(0)
            print(os.getpid(), end="", file=self.lock, flush=True)
        except BlockingIOError:
            self.lock.seek(0)
            raise InputError(f"{folder} is in use by process {self.lock.read()}") from None
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
        """A disk that is full, or fails, stops the run; what was written before stays whole."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunStopped(f"{self.folder / name} could not be written: {reason}; "
                             + self.how_to_go_on(), can_save=False) from None

    def append(self, name: str, records: list[dict]):
        """JSON objects, a line each, in one write; NaN becomes null."""
        lines = [json.dumps(plain(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records]
        file = self.folder / name if self.lock else os.devnull
        with self.writing(name), open(file, "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def begin(self, settings: dict, sources: dict[str, Path]):
        """Write config.json; when resuming, refuse if what the run began with has changed.

        A path can stay and its contents change: runs/A/checkpoint moves when A goes on.
        """
        found = {path: fingerprint(path) for path in set(sources.values())}
        prints = {flag: found[path] for flag, path in sources.items()}
        file = self.folder / "config.json"
        if file.exists():
            began = read_json(file).get("sources", {})
            for flag in began:
                if began[flag] != prints.get(flag):
                    raise InputError(f"{self.folder}: {sources.get(flag)} ({flag}) is not what "
                                     "the run began with; resuming would change the run")
        with self.writing(file.name):
            write_json(file, settings | {"sources": prints})

    # ------------------------------------------------------------ checkpoints

    def checkpoints(self) -> dict[int, Path]:
        """Those that bear a final name, by step."""
        found = {int(m[1]): path for path in self.folder.iterdir()
                 if (m := re.fullmatch(r"checkpoint-([0-9]{6,})", path.name))}
        return dict(sorted(found.items()))

    def leftovers(self) -> list[Path]:
        """Those that a crash left while they were written or deleted."""
        return [path for path in self.folder.iterdir()
                if re.fullmatch(r"checkpoint-[0-9]{6,}\.tmp", path.name)]

    def newest_whole(self) -> Path | None:
        """The newest whole checkpoint, or None before the first; says which ones are not whole."""
        found = self.checkpoints()
        for path in reversed(found.values()):
            fault = damage(path)
            if fault is None:
                self.checkpoint = path
                return path
            print(f"{path} is not whole ({fault}): looking for an older one", flush=True)
        if found:
            raise InputError(f"{self.folder}: no whole checkpoint; start another run, or this one "
                             "again with --overwrite")
        return None

    def restore(self, keep: int, **now) -> dict:
        """The newest whole checkpoint's state; records are cut back to it. At step 0 without one.

        now: what may differ from when it was written, at the price of exactness; said if it does.
        """
        state = {"step": 0, "updates": 0, "bad_steps": 0, "records": {}, **now}
        if self.checkpoint:
            state |= read_json(self.checkpoint / "state/state.json")
        for key, value in now.items():
            if state[key] != value:
                print(f"resuming with {key} {value}, was {state[key]}: not the same bit for bit")
        with self.writing("records"):
            for leftover in self.leftovers():
                shutil.rmtree(leftover)
            self.tidy(keep)
            for file in (self.folder / name for name in RECORDS):
                length, crc = state["records"].get(file.name, [0, 0])
                if not length:
                    file.unlink(missing_ok=True)
                    continue
                if not file.exists() or digest(file, length) != [length, crc]:
                    print(f"{file} is not what it was at {self.checkpoint.name}: lines of it are "
                          "lost or changed; training is not affected")
                keep_whole_lines(file, length)
        if self.checkpoint:
            print(f"resuming {self.folder} after step {state['step']}", flush=True)
        return state | now

    def save(self, step: int, state: dict, write, *, need: int, keep: int):
        """checkpoint-000050/, whole or not at all, and `checkpoint`, a relative link to it.

        write(folder) fills a .tmp folder; all of it is on the disk, and its manifest (bytes and
        crc32 of each file) last, before the folder gets its name. A crash at any moment leaves
        this one or the one before.
        """
        final = self.folder / f"checkpoint-{step:06d}"
        temporary = final.with_name(final.name + ".tmp")
        try:
            with self.writing(final.name):
                free = free_bytes(self.folder)
                if free < need:
                    raise OSError(0, f"it takes {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
                shutil.rmtree(temporary, ignore_errors=True)
                write(temporary)
                records = [self.folder / name for name in RECORDS]
                state["records"] = {file.name: digest(file) for file in records if file.exists()}
                write_json(temporary / "state/state.json", {"step": step} | state)
                files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
                for path in [*files, *(file for file in records if file.exists())]:
                    sync(path)
                write_json(temporary / "manifest.json", {
                    str(file.relative_to(temporary)): digest(file) for file in files})
                for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                    sync(path)
                if final.exists():           # not whole, else the run would have resumed from it
                    shutil.rmtree(final)
                temporary.rename(final)
                self.checkpoint = final
                self.tidy(keep)
        except RunStopped:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def tidy(self, keep: int):
        """`checkpoint` links to the newest whole one; of those up to it, `keep` stay (0: all)."""
        if not self.checkpoint:
            return
        link = self.folder / "checkpoint.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(self.checkpoint.name)
        os.replace(link, self.folder / "checkpoint")
        sync(self.folder)
        paths = list(self.checkpoints().values())
        for path in paths[:paths.index(self.checkpoint) + 1][:-keep]:        # [:-0] is empty
            doomed = path.rename(f"{path}.tmp")              # never half a checkpoint by that name
            shutil.rmtree(doomed)

    def how_to_go_on(self) -> str:
        """What is left of a stopped run, and the command that continues it."""
        whole = self.checkpoint.name if self.checkpoint else "none yet, it would start anew"
        return f"newest whole checkpoint: {whole}; to go on: train.py --resume {self.folder}"


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
        if "state/state.json" not in manifest:
            return "manifest.json names no state"
        for name, expected in manifest.items():
            found = digest(checkpoint / name)
            if found != expected:
                return f"{name}: " + (
                    f"{found[0]} bytes, was {expected[0]}" if found[0] != expected[0] else
                    "contents changed")
    except (InputError, OSError, ValueError, TypeError, IndexError) as error:
        return str(error)
    return None


def keep_whole_lines(path: Path, length: int):
    """Cut a file to its first `length` bytes; of a shorter one, a half-written last line."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        text = file.read(length)
        file.truncate(text.rfind(b"\n") + 1)
