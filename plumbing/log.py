"""What a run prints and records: each step's numbers, its line on the screen, samples, transcript.
"""
import math
import textwrap
import time
from collections import Counter
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

from torch import Tensor

from plumbing.overlap import overlap
from plumbing.runs import read_lines

# What metrics.jsonl tells of the machine. All else two runs of one game have in common.
TIMED = ("seconds", "phase_seconds", "tokens_per_second", "peak_gb", "budget_gb")
LARGE = 10**8                        # weights: with fewer a step is over before it has a speed
WIDTH = 100                          # of a line on the screen

# The columns of a step's line: title, key in metrics.jsonl, format, the algorithms that show it.
PLAYED = ("lsp", "lsp-zero")
SCORED = (*PLAYED, "grpo", "rlpt")
EVERY = (*SCORED, "sft")
COLUMNS = (("reward", "reward", ".3f", SCORED), ("NLL", "loss", ".3f", ("sft",)),
           ("quality", "quality", ".2f", ("lsp",)),
           ("ASR", "asr_reward", ".2f", ("rlpt",)), ("MSR", "msr_reward", ".2f", ("rlpt",)),
           ("ch-adv", "challenger_advantage", ".2f", PLAYED), ("KL-sol", "kl_solver", ".2f", EVERY),
           ("KL-ch", "kl_challenger", ".2f", PLAYED),
           ("distinct", "distinct_queries", ".2f", PLAYED),
           ("truncated", "truncated_answers", ".2f", EVERY),
           ("no-prediction", "no_prediction", ".2f", ("rlpt",)),
           ("unparsed", "unparsed", ".2f", ("lsp", "rlpt")),
           ("logp-diff", "logp_difference", ".0e", SCORED), ("s/step", "seconds", ".2f", EVERY))


# ---------------------------------------------------------------- numbers

def mean(values: list) -> float | None:
    """The mean of a list, None for an empty one."""
    return sum(values) / len(values) if values else None


def spreads(X: Tensor) -> tuple[float, float]:
    """Standard deviations of rewards (N, G): of the group means over queries, which is what the
    Challenger's advantage is made of, and within groups, which is what the Solver's is made of."""
    within = X - X.mean(1, keepdim=True)
    return X.mean(1).std(correction=0).item(), within.square().mean().sqrt().item()


def measure(s, r) -> dict:
    """What a train.Round says about the game; README.md explains each. None: no such thing here.

    In rlpt alone: no_prediction, of all answers, those from which no prediction could be extracted;
    truncated_predictions, those with one that does not end as a sentence does.
    """
    rows = [row for group in r.answer_rows for row in group]
    flat = r.A_sol[r.learn].abs().amax(1) < 1e-6                    # (queries learnt from,)
    judged = [j for j in r.judgements if not j.get("failure")]
    read = any("reason" in j for j in judged)
    reasons = [j.get("reason") for j in judged] if read else []
    mass = [j["mass"] for j in judged if math.isfinite(j.get("mass", math.nan))]
    kinds, predicted = r.kinds or [], r.judgements if r.kinds else []
    earned = lambda kind: mean([R for k, R in zip(kinds, r.R.mean(1).tolist()) if k == kind])
    reward, quality = spreads(r.R), (None, None) if r.R_Q is None else spreads(r.R_Q)
    return {
        "reward": r.R.mean().item(), "value_spread": reward[0], "reward_spread": reward[1],
        "quality": None if r.R_Q is None else r.R_Q.mean().item(),
        "quality_value_spread": quality[0], "quality_spread": quality[1],
        "zero_variance_groups": mean(flat.tolist()),
        "challenger_advantage": None if r.A_ch is None else r.A_ch.abs().mean().item(),
        "distinct_queries": len(set(r.queries)) / len(r.queries), "overlap": overlap(r.queries),
        "leaked_tags": mean(["[Start Gen" in q or "[End Gen" in q for q in r.queries]),
        "held_out_queries": 1 - r.learn.float().mean().item(),
        "query_length": mean([len(row.tokens) for row in r.query_rows]),
        "answer_length": mean([len(row.tokens) for row in rows]),
        "truncated_queries": mean([not row.stopped for row in r.query_rows]),
        "truncated_answers": mean([not row.stopped for row in rows]),
        "unparsed": mean([reason is not None for reason in reasons]),
        "parse_failures": dict(Counter(filter(None, reasons))) if reasons else None,
        "truncated_inputs": r.truncated_inputs,
        "judge_mass": mean(mass), "judge_tags": mean([j["tags"] for j in judged if "tags" in j]),
        "msr_share": mean([kind == "msr" for kind in kinds]),
        "asr_reward": earned("asr"), "msr_reward": earned("msr"),
        "no_prediction": mean([bool(j["failure"]) for j in predicted]),
        "extraction_failures": dict(Counter(j["failure"] for j in predicted if j["failure"]))
        if predicted else None,
        "truncated_predictions": mean([j["failure"] == "short" or not j.get("whole", True)
                                       for j in predicted]),
    }


def learnt(s, sol: Counter, ch: Counter, norm: float, rate: float, faults: list) -> dict:
    """What an update says: sol, ch: the sums of lsp.policy_loss over the roles' rows."""
    per = lambda key, count, sums: sums[key] / sums[count] if sums[count] else None
    entropy = lambda sums: -sums["logp"] / sums["tokens"] if sums["tokens"] else None
    loss, given = sol["loss"] + s.alpha_ch * ch["loss"], s.algo == "sft"
    return {
        "loss": None if faults else entropy(sol) if given else loss,       # sft: NLL of a token
        "kl_solver": per("kl", "sequences", sol) if s.beta else None,
        "kl_challenger": per("kl", "sequences", ch) if s.beta else None,
        "entropy_solver": entropy(sol), "entropy_challenger": entropy(ch),
        "logp_difference": None if given else per("difference", "tokens", sol + ch),
        "grad_norm": norm, "skipped": bool(faults), "faults": faults, "learning_rate": rate,
    }


def non_finite(r) -> list[dict]:
    """The samples with a reward or log-prob that is not finite, counted from 1 in the order of
    samples.jsonl (answer None: the query itself); their sum, where each of them is finite."""
    faults = []
    for n in r.learn.nonzero()[:, 0].tolist():
        asked = [(None, r.query_rows[n], 0.0)] if r.query_rows else []
        answered = zip(range(1, len(r.answer_rows[n]) + 1), r.answer_rows[n], r.R[n].tolist())
        for answer, row, reward in [*asked, *answered]:
            if not math.isfinite(reward + sum(row.logp)):
                what = "log-prob" if math.isfinite(reward) else "reward"
                faults.append({"query": n + 1, "answer": answer, "what": what})
    everything = {"query": None, "answer": None, "what": "gradient of all samples together"}
    return faults or [everything]


def speed(game, r) -> dict[str, float]:
    """Tokens/s of a train.Round's phases. A phase's time includes its prefill and all waiting."""
    count = lambda groups: sum(len(row.tokens) for rows in groups for row in rows)
    learn = r.learn.tolist()
    kept = [rows for rows, keep in zip(r.answer_rows, learn) if keep]
    kept.append([row for row, keep in zip(r.query_rows, learn) if keep])
    tokens = {"challenge": count([r.query_rows]), "solve": count(r.answer_rows),
              "reward": getattr(game.reward, "tokens", 0), "update": count(kept),
              "judge": sum(j["judge_tokens"][1] for j in r.judgements if "judge_tokens" in j)}
    return {name: n / r.seconds[name] for name, n in tokens.items() if n and name in r.seconds}


def samples(r, step: int):
    """One record a query: everything that was said, scored and concluded."""
    N, G = r.R.shape
    for n in range(N):
        yield {
            "step": step, "query": r.queries[n], "gold": r.golds[n],
            "query_tokens": r.query_rows[n].tokens if r.query_rows else None,
            "prompt_tokens": r.solver_prompts[n],
            "kind": r.kinds and r.kinds[n],
            "query_stopped": r.query_rows[n].stopped if r.query_rows else None,
            "trained_on": bool(r.learn[n]),
            "challenger_advantage": None if r.A_ch is None else r.A_ch[n].item(),
            "answers": [{
                "answer": r.answers[n][g], "tokens": r.answer_rows[n][g].tokens,
                "stopped": r.answer_rows[n][g].stopped,
                "reward": r.R[n, g].item(), "advantage": r.A_sol[n, g].item(),
                "quality": None if r.R_Q is None else r.R_Q[n, g].item(),
            } | (r.judgements[n * G + g] if r.judgements else {}) for g in range(G)]}


# ---------------------------------------------------------------- lines on the screen

def record(game, run, step: int, r, learnt: dict):
    """Append a step's metrics and samples to the run's files, and print its line: every 20 steps
    below a header, every 10 steps with an example and the time."""
    s = game.settings
    m = {"step": step} | measure(s, r) | learnt | {
        "phase_seconds": r.seconds, "peak_gb": game.phase.peak_gb,
        "tokens_per_second": speed(game, r)}
    run.append("metrics.jsonl", [m])
    run.append("samples.jsonl", list(samples(r, step)))
    if game.shown % 20 == 0:
        print("\n" + header(s))
    print(step_line(s, m), flush=True)
    game.shown += 1
    if sum(p.numel() for p in game.policy.parameters()) >= LARGE:
        print(speed_line(m))
    if step % 10 == 0 or game.shown in (1, 5):
        passed, left = time.monotonic() - game.begun, (s.steps - step) * m["seconds"]
        duration = lambda seconds: timedelta(seconds=round(seconds))
        print(f"{example(r, step)}\n{'':10}elapsed {duration(passed)}, about {duration(left)} left",
              flush=True)


def header(s) -> str:
    titles = [title for title, *_, algos in COLUMNS if s.algo in algos]
    return f"{'step':>9}" + "".join(f"  {title:>6}" for title in titles)


def step_line(s, m: dict) -> str:
    """A step's numbers below header(), and below them what needs attention."""
    if m["judge_mass"] is not None:
        m = m | {"unparsed": 1 - m["judge_mass"]}
    line = f"{m['step']:>{len(str(s.steps))}}/{s.steps}".rjust(9)
    for title, key, form, algos in COLUMNS:
        if s.algo in algos:
            value = "-" if m[key] is None else format(m[key], form)
            line += f"  {value:>{max(6, len(title))}}"
    notes = []
    if m["skipped"]:
        notes.append(fault_text(m["faults"]) + ": update skipped")
    if m["quality"] is not None and not m["quality_value_spread"] and not m["quality_spread"]:
        notes.append("all R_Q equal: the self-reward changes nothing in this step")
    if (m["unparsed"] or 0) > 0.5:
        notes.append(f"{'verdicts' if s.verdict else 'self-reward'} mostly unparsed")
    return "\n".join([line, *(f"{'':10}{note}" for note in notes)])


def fault_text(faults: list[dict]) -> str:
    """The first sample of a skipped update that is not finite, and how many more there are."""
    what, query, answer = (faults[0].get(key) for key in ("what", "query", "answer"))
    where = f" of query {query}" * bool(query) + f", answer {answer}" * bool(answer)
    more = f" (and {len(faults) - 1} more)" * (len(faults) > 1)
    return f"{what}{where} not finite{more}"


def speed_line(m: dict) -> str:
    """The second line of a step: each phase's seconds and tokens/s, and the highest peak, GB."""
    said = []
    for name, seconds in m["phase_seconds"].items():
        rate = m["tokens_per_second"].get(name)
        said.append(f"{name} {seconds:.1f} s" + (f" {rate:.0f} tok/s" if rate else ""))
    peaks = {name: peak for name, peak in m["peak_gb"].items() if peak is not None}
    if peaks:
        highest = max(peaks, key=peaks.get)
        said.append(f"peak {peaks[highest]:.1f} GB in {highest}")
    return wrapped("  ".join(said), " " * 10)


def wrapped(text: str, start: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start),
                         break_on_hyphens=False, break_long_words=False)


def query_lines(title: str, said: dict, answers: list[dict], most: int | None = None) -> list[str]:
    """A query of samples() and these of its answers, below a title, for reading. most: texts are
    printed in one line of so many characters at most."""
    number = lambda x: "     -" if x is None else f"{x:6.2f}"
    fitted = lambda text: text if most is None else textwrap.shorten(text, most, placeholder="...")
    notes = " (truncated)" * (said["query_stopped"] is False)
    notes += " (held out: not trained on)" * (not said["trained_on"])
    lines = [f"{title}   Challenger's advantage {number(said['challenger_advantage'])}{notes}",
             textwrap.indent(fitted(said["query"]), "  ? ")]
    if said["kind"]:
        lines.append(textwrap.indent(fitted(said["gold"]), "  = "))
    for a in answers:
        notes = f" (unparsed: {a['reason']})" if a.get("reason") else ""
        notes += f" (no prediction: {a['failure']})" if a.get("failure") else ""
        notes += " (truncated)" * (not a["stopped"])
        lines += [f"  R {number(a['reward'])}  R_Q {number(a['quality'])}  advantage "
                  f"{number(a['advantage'])}{notes}", textwrap.indent(fitted(a["answer"]), " " * 6)]
    return lines


def example(r, step: int) -> str:
    """The query of the round with the highest advantage for the Challenger (in grpo and rlpt the
    first one), with its best answer and its worst one."""
    said = list(samples(r, step))[0 if r.A_ch is None else int(r.A_ch.argmax())]
    ranked = sorted(said["answers"], key=lambda a: a["advantage"])
    lines = query_lines("example", said, [ranked[-1], ranked[0]], 80)
    return textwrap.indent("\n".join(lines), " " * 10)


def eval_lines(s, record: dict) -> str:
    """An evaluation: held-out figures; in the embedded world accuracy and fractions of queries."""
    start = f"eval {record['step']:>{len(str(s.steps))}}/{s.steps}  "
    lines = []
    if "win_rate" in record:
        lines.append(f"held-out reward {record['reward']:.3f}  win-rate against the start "
                     f"{record['win_rate']:.3f}  ({record['n']} prompts)")
    for key, title in (("accuracy", "accuracy"), ("challenger", "queries"),
                       ("truncated", "truncated")):
        figures = dict(record.get(key) or {})
        if key == "challenger" and figures:
            figures["carry"] = 1 - figures["none"] - figures["malformed"]
        if figures:
            lines.append(f"{title:10}" + "  ".join(f"{k} {v:.2f}" for k, v in figures.items()))
    return start + f"\n{'':{len(start)}}".join(lines)


def opening_lines(s, folder: Path) -> str:
    """Model, algorithm, seed and what is not a default of --help; how to stop and to resume."""
    said = [f"{f.name}={getattr(s, f.name)}" for f in fields(s)
            if f.name in ("model", "algo", "seed") or getattr(s, f.name) != f.default]
    return "\n".join((wrapped(" ".join(said), "settings      "),
                      "to stop       Ctrl-C: the phase ends, and a checkpoint is saved",
                      f"to go on      python train.py --resume {folder}"))


def closing_lines(out: Path) -> str:
    """The end of a run: before and after, and where everything lies."""
    evals, lines = read_lines(out / "eval.jsonl"), []
    titles = {"accuracy": "held-out accuracy, greedy", "challenger": "Challenger's queries",
              "truncated": "truncated predictions"}
    for key, title in titles.items():
        if evals and evals[-1].get(key):
            lines += ["", f"{title:30}before   after"] + [
                f"  {k:26}{evals[0][key][k]:8.3f}{v:8.3f}" for k, v in evals[-1][key].items()]
    curves = f"curves      {out}/metrics.jsonl" + " and eval.jsonl" * bool(evals)
    return "\n".join([*lines, "", curves, f"samples     {out}/samples.jsonl",
                      f"checkpoint  {out}/checkpoint"])


def transcript(s, r) -> str:
    """A round for reading: query, in rlpt what really follows, answers, R, R_Q, advantages."""
    lines = []
    for n, said in enumerate(samples(r, 0), 1):
        lines += ["", *query_lines(f"query {n}/{len(r.queries)}", said, said["answers"])]
    total = f"mean R {r.R.mean():.3f}" + ("" if r.R_Q is None else f", mean R_Q {r.R_Q.mean():.3f}")
    R = "R" if s.reward_scale == 1 else f"{s.reward_scale:g} * R"
    of = f"; advantages compare {R}" + ("" if r.R_Q is None else " + R_Q") + " (Solver)"
    of += "" if r.A_ch is None else f", {'-' if r.R_Q is None else 'R_Q - '}{R} (Challenger)"
    return "\n".join([*lines, "", total + of, *balance_lines(r)])


def balance_lines(r) -> list[str]:
    """How far R and R_Q of a round spread, and the --reward-scale that makes them spread alike."""
    lines = []
    roles = ("Challenger's, over queries", "Solver's, within groups")
    for role, R, R_Q in [] if r.R_Q is None else zip(roles, spreads(r.R), spreads(r.R_Q)):
        scale = f"--reward-scale {R_Q / R:.2g} would make them equal" if R and R_Q else (
            "no scale makes them equal")
        lines.append(f"spread of R {R:.2f}, of R_Q {R_Q:.2f} ({role}): {scale}")
    return lines
