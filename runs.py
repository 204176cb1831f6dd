"""What a reader may skip: command lines, run folders, checkpoints, Ctrl-C, and what is logged."""
import argparse
import json
import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

from files import InputError

# ---------------------------------------------------------------- command lines


class Parser(argparse.ArgumentParser):
    """argparse, with one line in place of the usage page."""

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")


def run_script(main):
    """Call main(); bad input ends in one line on standard error and exit code 2, Ctrl-C in 130."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def add_flags(parser: Parser, settings_class):
    """A flag for each field of a dataclass of settings; only those given reach the namespace."""
    for f in fields(settings_class):
        kinds = getattr(f.type, "__args__", (f.type,))             # str | None -> (str, NoneType)
        default = "" if f.default in (None, False) else f" (default {f.default})"
        how = {"action": argparse.BooleanOptionalAction} if bool in kinds else {
            "type": kinds[0], "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=(f.metadata["help"] + default).replace("%", "%%"), **how)


# ---------------------------------------------------------------- one run's folder

def make_folder(out: str | None, name: str) -> Path:
    """A new folder: `out`, or runs/NAME, else runs/NAME-2, -3, ... None that exists is touched."""
    base = Path(out) if out else Path("runs") / name
    tries = [base] if out else [base, *(base.with_name(f"{name}-{k}") for k in range(2, 10000))]
    for path in tries:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
    raise InputError(f"--out {base} exists already; nothing is overwritten: choose another")


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def append_line(path: Path, record: dict):
    """One JSON object on a line of its own, in one write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def save_checkpoint(out: Path, step: int, write) -> Path:
    """checkpoint-000050/, whole or not at all: write(folder) fills a .tmp folder, then renamed.

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
    """True once Ctrl-C or SIGTERM has come: the loop ends after its step. Another stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def _take(self, number, frame):
        self.signal = number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving "
              "(again: stop at once)", flush=True)
        for n in (signal.SIGINT, signal.SIGTERM):
            signal.signal(n, signal.default_int_handler)

    def __bool__(self):
        return self.signal != 0


# ---------------------------------------------------------------- what is logged

def share(flags: list) -> float | None:
    """The mean of a list, None for an empty one."""
    return sum(flags) / len(flags) if flags else None


def measure(s, r) -> dict:
    """What a train.Round says about the game; README.md explains each. None: no such thing here."""
    rows = [row for group in r.answer_rows for row in group]
    flat = r.A_sol[r.kept].abs().amax(1) < 1e-6                        # (kept queries,)
    reasons = [j["reason"] for j in r.judgements if "reason" in j]
    failures = Counter(reason for reason in reasons if reason)
    return {
        "reward": r.R.mean().item(),
        "quality": None if r.R_Q is None else r.R_Q.mean().item(),
        "value_spread": r.R.mean(1).std(correction=0).item(),
        "flat_groups": share(flat.tolist()),
        "challenger_advantage": None if r.A_ch is None else r.A_ch.abs().mean().item(),
        "distinct_queries": len(set(r.queries)) / len(r.queries),
        "leaked_tags": share(["[Start Gen" in q or "[End Gen" in q for q in r.queries]),
        "held_out_queries": 1 - r.kept.float().mean().item(),
        "query_length": share([len(row.tokens) for row in r.query_rows]),
        "answer_length": share([len(row.tokens) for row in rows]),
        "truncated_queries": share([not row.stopped for row in r.query_rows]),
        "truncated_answers": share([not row.stopped for row in rows]),
        "unread": share([reason is not None for reason in reasons]),
        "parse_failures": dict(failures) if reasons else None,
        "shortened": r.shortened,
        "judge_mass": share([j["mass"] for j in r.judgements if "mass" in j]),
    }


def short(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def step_line(s, m: dict) -> str:
    """A step's line on the screen: the few numbers that say whether the game goes well."""
    unread = m["unread"] if m["judge_mass"] is None else 1 - m["judge_mass"]
    gap = "-" if m["logp_gap"] is None else f"{m['logp_gap']:.0e}"
    line = (f"step {m['step']:>{len(str(s.steps))}}/{s.steps}  R {short(m['reward'])}"
            f"  R_Q {short(m['quality'])}  ch-adv {short(m['challenger_advantage'])}"
            f"  KL {short(m['kl_solver'])}|{short(m['kl_challenger'])}"
            f"  distinct {short(m['distinct_queries'])}  cut {short(m['truncated_answers'])}"
            f"  unread {short(unread)}  gap {gap}  {m['seconds']:.2f} s")
    if m["skipped"]:
        line += "  gradient not finite: update skipped"
    if unread is not None and unread > 0.5:
        line += "  self-reward mostly unread"
    return line


def example_line(r) -> str:
    """One query of the round, the Challenger's best, with its answers and what they earned."""
    n = 0 if r.A_ch is None else int(r.A_ch.argmax())
    clip = lambda text, most: repr(text if len(text) <= most else text[:most - 3] + "...")
    answers = Counter(clip(answer, 30) for answer in r.answers[n]).most_common(4)
    said = ", ".join(f"{count} x {answer}" for answer, count in answers)
    quality = "" if r.R_Q is None else f"  R_Q {r.R_Q[n].mean():.2f}"
    return f"    asked {clip(r.queries[n], 70)}  answered {said}  R {r.R[n].mean():.2f}{quality}"


def eval_line(s, record: dict) -> str:
    """An evaluation's line: held-out figures; in the embedded world accuracy and query shares."""
    line = f"eval {record['step']:>{len(str(s.steps))}}/{s.steps}"
    if "win_rate" in record:
        line += (f"  held-out reward {record['reward']:.3f}  win-rate against the start "
                 f"{record['win_rate']:.3f}  ({record['n']} prompts)")
    for key, title in (("accuracy", "held-out accuracy"), ("challenger", "queries")):
        if record.get(key):
            line += f"  {title}: " + " ".join(f"{k} {v:.2f}" for k, v in record[key].items())
    return line


def closing_lines(out: Path, evals: list[dict]) -> str:
    """The end of a run: before and after, and where everything lies."""
    lines = []
    titles = {"accuracy": "held-out accuracy, greedy", "challenger": "Challenger's queries"}
    for key, title in titles.items():
        if evals and evals[-1].get(key):
            lines += ["", f"{title:30}before   after"] + [
                f"  {k:26}{evals[0][key][k]:8.3f}{v:8.3f}" for k, v in evals[-1][key].items()]
    curves = f"curves      {out}/metrics.jsonl" + " and eval.jsonl" * bool(evals)
    return "\n".join([*lines, "", curves, f"samples     {out}/samples.jsonl",
                      f"checkpoint  {out}/checkpoint"])


def samples(r, step: int):
    """One record a query: everything that was said, scored and concluded."""
    N, G = r.R.shape
    for n in range(N):
        yield {
            "step": step, "query": r.queries[n], "gold": r.golds[n],
            "query_stopped": r.query_rows[n].stopped if r.query_rows else None,
            "trained_on": bool(r.kept[n]),
            "challenger_advantage": None if r.A_ch is None else r.A_ch[n].item(),
            "answers": [{
                "answer": r.answers[n][g], "stopped": r.answer_rows[n][g].stopped,
                "reward": r.R[n, g].item(), "advantage": r.A_sol[n, g].item(),
                "quality": None if r.R_Q is None else r.R_Q[n, g].item(),
            } | (r.judgements[n * G + g] if r.judgements else {}) for g in range(G)]}


def transcript(s, r) -> str:
    """A round for reading: query, answers, R, R_Q, advantages."""
    number = lambda x: "     -" if x is None else f"{x:6.2f}"
    indent = lambda text, margin: "\n".join(margin + line for line in text.split("\n"))
    lines = []
    for n, said in enumerate(samples(r, 0), 1):
        cut = "" if said["query_stopped"] in (True, None) else "   (cut off)"
        lines += ["", f"query {n}/{len(r.queries)}   Challenger's advantage "
                  f"{number(said['challenger_advantage'])}{cut}", indent(said["query"], "  ? ")]
        for a in said["answers"]:
            unread = f" (unread: {a['reason']})" if a.get("reason") else ""
            lines += [f"  R {number(a['reward'])}  R_Q {number(a['quality'])}{unread}  advantage "
                      f"{number(a['advantage'])}" + ("" if a["stopped"] else "  (cut off)"),
                      indent(a["answer"], "      ")]
    total = f"mean R {r.R.mean():.3f}" + ("" if r.R_Q is None else f", mean R_Q {r.R_Q.mean():.3f}")
    scale = "" if s.reward_scale == 1 else f"; advantages are of {s.reward_scale:g} * R" + (
        "" if r.R_Q is None else " + R_Q")
    return "\n".join([*lines, "", total + scale])
