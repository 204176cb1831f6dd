"""Kill, starve and corrupt runs at random moments; each must end as if nothing had happened.

    python bench/faults.py                    # docs/RESULTS.md's table; minutes are in its JSON
    python bench/faults.py --quick            # 4 kills, and one or two of all else, for the tests

Every life of a run is a process of its own (forked, so that it need not import torch again) that
calls train.py's main() with --requeue. A trial recovers when the run reaches its last step; it
differs when anything that it leaves differs from the run that was never touched: weights, masters,
moments, state, metrics (seconds aside), samples, evaluations, the list of checkpoints.
Disk full is a small tmpfs where the machine lets us mount one, else a limit on the size of files.
Prints a table and one JSON line.
"""
import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"


import torch  # noqa: E402
from checkpoints import write_checkpoint  # noqa: E402

import rewards  # noqa: E402
import train  # noqa: E402
from plumbing import cli, log, runs  # noqa: E402

STEPS = 20
COMMON = ["--model", "m", "--queries", "2", "--answers", "2", "--query-tokens", "4",
          "--answer-tokens", "4", "--judge-tokens", "2", "--steps", str(STEPS), "--save-every", "3",
          "--learning-rate", "1e-3", "--device", "cpu", "--eval-prompts", "p.jsonl",
          "--eval-every", "7"]
GAMES = {"lsp": ["--reward", "rm"], "lsp-zero": ["--reward", "rm", "--algo", "lsp-zero"],
         "grpo": ["--reward", "rm", "--algo", "grpo", "--prompts", "p.jsonl"]}
# name: (trials, trials with --quick); a kill is a trial of its own
CAMPAIGN = {"kill -9 at a random moment": (54, 2), "kill -9 inside checkpoint writing": (54, 2),
            "SIGTERM or SIGINT, every third twice": (15, 1), "checkpoint file cut": (15, 1),
            "checkpoint bit flipped": (20, 1), "checkpoint left half-written": (12, 1),
            "records cut or half a line more": (12, 1), "disk full": (10, 1),
            "NaN or infinity injected": (12, 2), "rubbish from reward or judge": (8, 1)}


# ---------------------------------------------------------------- lives of a run

def make_world(folder: Path):
    """A random policy stored in bf16 (so masters are apart), a reward model, prompts with golds."""
    write_checkpoint(folder / "m", "llama3_tied", max_position_embeddings=8192,
                     torch_dtype="bfloat16")
    write_checkpoint(folder / "rm", "scalar_head", max_position_embeddings=8192)
    (folder / "m/prompts").mkdir()             # short: the kills count here, not the tokens
    (folder / "m/prompts/challenger.txt").write_text("Ask.")
    (folder / "m/prompts/self_reward.txt").write_text("Judge {instruction} {response}")
    lines = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(5)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))


def start(world: Path, out: Path, game: str, *flags, spoil=None) -> int:
    """A life of a run as a process; spoil() may break things in it first. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(world)
        said = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["train.py", *COMMON, *GAMES[game], "--out", str(out), "--requeue", *flags]
        if spoil:
            spoil()
        cli.run_script(train.main)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit code of a life, -n if signal n killed it, None while it goes on."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def live(*args, **options) -> int:
    """A life to its end; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start(*args, **options), 0)[1])


def wait(pid: int, until) -> int | None:
    """Watch a life until it ends or until() is true; its exit code, None if it still lives."""
    while (code := ended(pid)) is None and not until():
        time.sleep(0.0002)
    return code


def kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------- what must be the same

def left(out: Path) -> dict[str, bytes | str]:
    """All that a finished run leaves and that must not depend on its lives."""
    held = {"link": str((out / "checkpoint").readlink())}
    for path in sorted(out.iterdir()):
        if path.name.startswith("checkpoint-"):
            held |= {str(f.relative_to(out)): f.read_bytes() for f in path.rglob("*")
                     if f.is_file() and f.name not in ("state.json", "manifest.json")}
            held[path.name] = runs.damage(path)
    state = json.loads((out / "checkpoint/state/state.json").read_text())
    held["state"] = {key: state[key] for key in ("step", "updates", "bad_steps")}
    for name in runs.RECORDS:
        held[name] = (out / name).read_bytes() if (out / name).exists() else None
    held["metrics.jsonl"] = [
        {key: value for key, value in json.loads(line).items() if key not in log.TIMED}
        for line in held["metrics.jsonl"].splitlines()]
    return held


def differences(ours: Path, untouched: Path) -> list[str]:
    a, b = left(ours), left(untouched)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


# ---------------------------------------------------------------- what is done to them

def writing(out: Path) -> bool:
    return any(out.glob("checkpoint-*.tmp"))


def killed(bench, game: str, out: Path, count: int, inside: bool) -> int:
    """Kill one run `count` times; returns how many of the kills left a half-written checkpoint."""
    hit = kills = 0
    while kills < count:
        pid = start(bench.world, out, game)
        if inside:
            code, until = None, [lambda: writing(out), lambda: not writing(out)]
            # Lets up to three checkpoints pass: else all of a run's kills would hit its first.
            for now in (until * 4)[2 * bench.random.randrange(4):-1]:
                code = wait(pid, now) if code is None else code
            end = time.perf_counter() + bench.random.uniform(0, bench.writing[game])
            while code is None and writing(out) and time.perf_counter() < end:
                code = ended(pid)
        else:
            end = time.perf_counter() + bench.random.uniform(0, bench.seconds[game])
            code = wait(pid, lambda end=end: time.perf_counter() > end)
        if code is not None:
            assert code == 0, f"{game} ended in {code}: see {out}.log"
            shutil.rmtree(out)                   # too late: it had finished; from the start again
            continue
        kill(pid)
        kills += 1
        hit += writing(out)
    assert live(bench.world, out, game) == 0
    return hit


def signalled(bench, game: str, out: Path, twice: bool) -> bool:
    number = bench.random.choice([signal.SIGTERM, signal.SIGINT])
    pid = start(bench.world, out, game)
    begun = wait(pid, lambda: (out / "metrics.jsonl").exists())    # its handlers are in place
    end = time.perf_counter() + bench.random.uniform(0, bench.seconds[game] * 0.6)
    code = begun if begun is not None else wait(pid, lambda: time.perf_counter() > end)
    if code is None:
        os.kill(pid, number)
        if twice:
            time.sleep(bench.random.uniform(0, 0.02))
            os.kill(pid, number)
        code = wait(pid, lambda: False)
    stopped = code in (0, 128 + number) or twice and code == -number
    return stopped and live(bench.world, out, game) == 0


def damaged(bench, game: str, out: Path, how: str) -> bool:
    """A copy of a run that was killed half-way, damaged, then resumed."""
    shutil.copytree(bench.half[game], out, symlinks=True)
    newest = runs.Run(out).checkpoints()[-1]
    files = [file for file in newest.rglob("*") if file.is_file()]
    file = bench.random.choice(files)
    if how == "checkpoint left half-written":                  # as by a crash before the rename
        for other in files:
            fate = bench.random.choice(["whole", "cut", "missing"])
            if fate == "missing" or other.name == "manifest.json":
                other.unlink()
            elif fate == "cut":
                os.truncate(other, bench.random.randrange(other.stat().st_size))
        newest.rename(f"{newest}.tmp")
    elif how == "records cut or half a line more":
        file = out / bench.random.choice(runs.RECORDS)
        known = json.loads((newest / "state/state.json").read_text())["records"].get(file.name, [0])
        if bench.random.random() < 0.5 and file.exists():
            os.truncate(file, bench.random.randint(known[0], file.stat().st_size))
        else:
            with open(file, "a") as lines:
                lines.write('{"step": 99, "half')
    elif how == "checkpoint file cut":
        os.truncate(file, bench.random.randrange(file.stat().st_size))
    else:
        content = bytearray(file.read_bytes())
        content[bench.random.randrange(len(content))] ^= 1 << bench.random.randrange(8)
        file.write_bytes(content)
    return live(bench.world, out, game) == 0


def disk_full(bench, game: str, out: Path, mounted: bool) -> bool:
    """The disk fills while a run writes; it must stop with code 3, and go on when there is room."""
    out.mkdir()
    kept, size = 0, 2 * bench.size[game]

    def spoil():
        # Whoever else fills the disk does so after the check of its free space.
        runs.free_bytes = lambda path: 1e18
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if mounted:
        limit = bench.random.randint(size // 20, size)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(out)],
                       check=True)
    else:
        limit = bench.random.randint(1000, size // 20)
    try:
        code = live(bench.world, out, game, spoil=spoil)
        found = runs.Run(out).checkpoints()
        kept = len(found) == sum(runs.damage(path) is None for path in found)
        said = Path(f"{out}.log").read_text().strip().split("\n")[-1]
        stopped = code == 0 or code == 3 and "could not be written" in said
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", str(out)], check=True)
        if not (out / "config.json").exists():           # not even begun
            for file in out.iterdir():
                file.unlink()
        recovered = kept and stopped and live(bench.world, out, game) == 0
        if mounted:
            shutil.copytree(out, f"{out}.kept", symlinks=True)
    finally:
        if mounted:
            subprocess.run(["umount", str(out)], check=True)
            out.rmdir()
            Path(f"{out}.kept").rename(out)
    return recovered


def injection(kind: str, step: int, bad: float):
    """spoil() for a life: one sample of one step is given a reward, log-prob, ... of `bad`."""
    def spoil():
        play, accumulate = train.play, train.accumulate

        def spoilt_play(game, at):
            game.at = at
            reward = game.reward
            if at == step and kind == "reward":
                game.reward = lambda *args: torch.tensor([bad, *reward(*args).tolist()[1:]])
            r = play(game, at)
            game.reward = reward
            return r

        def spoilt(game, rows, weight, count=None):
            sums = accumulate(game, rows, weight, count)
            if game.at == step and kind == "gradient" and rows:
                next(game.policy.parameters()).grad[0, 0] = bad
            return sums
        train.play, train.accumulate = spoilt_play, spoilt
    return spoil


def injected(bench, game: str, out: Path, kind: str) -> tuple[bool, list[str]]:
    """One bad number: its step alone is skipped, its sample named; killed or not, the same end."""
    step, bad = bench.random.randrange(STEPS), bench.random.choice([float("nan"), float("inf")])
    spoil = injection(kind, step, bad)
    straight = out.with_name(out.name + "-straight")
    fine = live(bench.world, straight, game, spoil=spoil) == 0
    pid = start(bench.world, out, game, spoil=spoil)
    end = time.perf_counter() + bench.random.uniform(0, bench.seconds[game])
    if wait(pid, lambda: time.perf_counter() > end) is None:
        kill(pid)
        fine &= live(bench.world, out, game, spoil=spoil) == 0
    metrics = left(out)["metrics.jsonl"]
    fine &= [m["step"] for m in metrics if m["skipped"]] == [step + 1]
    found = metrics[step]["faults"]
    named = {"query": 1, "answer": 1, "what": "reward"} in found
    fine &= named if kind == "reward" else found[0]["query"] is None
    fine &= not any(word in (out / name).read_text() for name in runs.RECORDS
                    for word in ("NaN", "Infinity"))
    return fine, differences(out, straight)


RUBBISH = [None, "seven", [], [None, 1.0], {"score": 1}, torch.zeros(0), torch.ones(3, 3),
           float("nan"), 10**400, torch.full((1,), 0.5)]


def rubbish(bench, game: str, out: Path, judge: bool) -> bool:
    """What is no reward stops the run, which then goes on; what is no judgement is unparsed."""
    steps = bench.random.sample(range(STEPS), 3)
    values = [bench.random.choice(RUBBISH) for _ in steps]
    texts = ["<Score>9", "<Score></Score>" * 99, "\x00\ud7ff\ue000", "<Score>4</Score>" * 2, ""]

    def spoil():
        play = train.play

        def spoilt(game, at):
            reward = game.reward
            if at in steps and not judge:
                game.reward = lambda *args: values[steps.index(at)]
            r = play(game, at)
            game.reward = reward
            return r
        train.play = spoilt
        if judge:
            rewards.text_of = lambda tokenizer, row: texts[sum(row.tokens) % len(texts)]
    ends = [live(bench.world, out, game, spoil=spoil), live(bench.world, out, game)]
    fine = ends == [0 if judge else 3, 0]
    metrics = left(out)["metrics.jsonl"]
    skipped = sorted(m["step"] - 1 for m in metrics if m["skipped"])
    counted = all(m["parse_failures"] for m in metrics) if judge else not skipped
    return fine and counted and "NaN" not in (out / "metrics.jsonl").read_text()


# ---------------------------------------------------------------- the campaign

class Bench:
    """The world, and of each game the untouched run and one that was killed half-way."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.world, self.random = folder, folder / "world", random.Random(seed)
        self.world.mkdir()
        make_world(self.world)
        self.untouched, self.half, self.size = {}, {}, {}
        self.seconds, self.writing = {}, {}              # of a whole run, and of a checkpoint
        for game in GAMES:
            begun = time.perf_counter()
            self.untouched[game] = folder / f"untouched-{game}"
            assert live(self.world, self.untouched[game], game) == 0, f"{folder}: see the logs"
            self.seconds[game] = time.perf_counter() - begun
            steps = left(self.untouched[game])["metrics.jsonl"]
            assert all(m["grad_norm"] > 0 for m in steps), "a game without gradient shows nothing"
            self.size[game] = sum(f.stat().st_size for f in self.untouched[game].rglob("*")
                                  if f.is_file() and not f.is_symlink())
            self.half[game] = folder / f"half-{game}"
            pid = start(self.world, self.half[game], game)
            assert wait(pid, lambda game=game: writing(self.half[game])) is None
            begun = time.perf_counter()
            assert wait(pid, lambda game=game: not writing(self.half[game])) is None
            self.writing[game] = time.perf_counter() - begun
            seen = self.half[game] / "checkpoint-000009/manifest.json"
            assert wait(pid, seen.exists) is None
            kill(pid)


def can_mount(folder: Path) -> bool:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
                          capture_output=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def campaign(folder: Path, seed: int, quick: bool) -> list[dict]:
    """Every row of the table: fault, trials, recovered, silent differences."""
    bench, table, played = Bench(folder, seed), [], 0
    mounted = can_mount(folder / "mount")
    for name, counts in CAMPAIGN.items():
        trials, row, number = counts[quick], {"fault": name, "trials": 0, "recovered": 0,
                                              "differences": 0}, 0
        while row["trials"] < trials:
            game = list(GAMES)[played % len(GAMES)]
            played += 1
            if name.startswith("rubbish") and number % 2:
                game = "lsp"                                                 # the judge's
            out = folder / f"{len(table)}-{number}"
            number += 1
            several, differ = 1, None
            if name.startswith("kill"):
                several = min(2 if quick else 6, trials - row["trials"])
                hit = killed(bench, game, out, several, "inside" in name)
                row["left half-written"] = row.get("left half-written", 0) + hit
                fine = True
            elif name.startswith("SIGTERM"):
                fine = signalled(bench, game, out, twice=number % 3 == 0)
            elif name.startswith("disk"):
                fine = disk_full(bench, game, out, mounted)
            elif name.startswith("NaN"):
                kinds = ("reward", "gradient")
                fine, differ = injected(bench, game, out, kinds[number % 2])
            elif name.startswith("rubbish"):
                fine, differ = rubbish(bench, game, out, judge=number % 2 == 0), []
            else:
                fine = damaged(bench, game, out, name)
            differ = differences(out, bench.untouched[game]) if differ is None else differ
            row["trials"] += several
            row["recovered"] += several * fine
            row["differences"] += bool(differ)
            if differ or not fine:
                print(f"{name}, {game}: {out}, recovered {fine}, differs in {differ}",
                      file=sys.stderr, flush=True)
            else:
                shutil.rmtree(out)
        table.append(row)
        print(line(row), flush=True)
    return table


def line(row: dict) -> str:
    return f"| {row['fault']} | {row['trials']} | {row['recovered']} | {row['differences']} |"


def main():
    parser = argparse.ArgumentParser(description="Kill, starve and corrupt runs.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="also write the JSON line into this file")
    args = parser.parse_args()
    begun = time.perf_counter()
    print("| fault | trials | recovered | silent differences |\n|---|---|---|---|", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    table = campaign(folder, args.seed, args.quick)
    good = all(row["recovered"] == row["trials"] and not row["differences"] for row in table)
    if good:
        shutil.rmtree(folder)                  # else what went wrong stays to be looked at
    record = {"seed": args.seed, "torch": torch.__version__, "table": table,
              "seconds": round(time.perf_counter() - begun)}
    print(json.dumps(record))
    if args.results:
        args.results.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
