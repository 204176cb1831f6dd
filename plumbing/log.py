"""What a run says: each step's numbers, its line on the screen, the samples, the transcript."""
import math
import textwrap
from collections import Counter, deque
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from plumbing.budget import parameters
from plumbing.runs import read_lines

# What metrics.jsonl tells of the machine. All else two runs of one game have in common.
TIMED = ("seconds", "phase_seconds", "tokens_per_second", "peak_gb", "budget_gb")


def share(flags: list) -> float | None:
    """The mean of a list, None for an empty one."""
    return sum(flags) / len(flags) if flags else None


LARGE = 10**8                        # weights: with fewer a step is over before it has a speed
RECENT = 10                          # steps whose queries a step's are compared with


def recent_queries(samples: Path) -> deque[list[str]]:
    """The queries of the last steps in a run's samples.jsonl, a list a step."""
    steps = {}
    for line in read_lines(samples):
        steps.setdefault(line["step"], []).append(line["query"])
        if len(steps) > RECENT:
            del steps[min(steps)]
    return deque(steps.values(), maxlen=RECENT)


def grams(query: str) -> set[tuple[str, ...]]:
    """The 3-grams of a query's words; of fewer than three words, all of them as one."""
    words = query.split()
    return {tuple(words[i:i + 3]) for i in range(max(1, len(words) - 2))}


def overlap(queries: list[str], others: list[str] | None = None) -> float | None:
    """Mean fraction of a query's 3-grams that another query holds too: of the same list, or of
    `others`. None where there is nothing to compare with."""
    own = [grams(query) for query in queries]
    counts = Counter(gram for held in own for gram in held)
    known = None if others is None else set().union(*map(grams, others))
    if not own or (len(own) < 2 if others is None else not others):
        return None
    held = lambda gram: counts[gram] > 1 if known is None else gram in known
    return share([share([held(gram) for gram in found]) for found in own])


BALANCE = ("quality_value_spread", "reward_spread", "quality_spread", "reward_quality_correlation")


def balance(R: Tensor, R_Q: Tensor) -> dict[str, float | None]:
    """How the two rewards stand beside each other, (N, G) each. Spreads are standard deviations: of
    the group means over queries, which is what the Challenger's advantage is made of, and within
    groups, which is what the Solver's is made of."""
    spread = lambda X: X.std(correction=0).item()
    within = lambda X: (X - X.mean(1, keepdim=True)).square().mean().sqrt().item()
    pairs = torch.stack((R.flatten(), R_Q.flatten()))                                # (2, N * G)
    constant = spread(R) < 1e-6 or spread(R_Q) < 1e-6
    correlation = None if constant else torch.corrcoef(pairs)[0, 1].item()
    return dict(zip(BALANCE, (spread(R_Q.mean(1)), within(R), within(R_Q), correlation)))


def measure(s, r, recent=()) -> dict:
    """What a train.Round says about the game; README.md explains each. None: no such thing here.
    recent: the queries of the steps before, a list a step."""
    rows = [row for group in r.answer_rows for row in group]
    flat = r.A_sol[r.learn].abs().amax(1) < 1e-6                    # (queries learnt from,)
    judged = [j for j in r.judgements if not j.get("failure")]
    read = any("reason" in j for j in judged)
    reasons = [j.get("reason") for j in judged] if read else []
    mass = [j["mass"] for j in judged if math.isfinite(j.get("mass", math.nan))]
    failures = Counter(reason for reason in reasons if reason)
    return {
        "reward": r.R.mean().item(),
        "quality": None if r.R_Q is None else r.R_Q.mean().item(),
        "value_spread": r.R.mean(1).std(correction=0).item(),
    } | (dict.fromkeys(BALANCE) if r.R_Q is None else balance(r.R, r.R_Q)) | {
        "zero_variance_groups": share(flat.tolist()),
        "challenger_advantage": None if r.A_ch is None else r.A_ch.abs().mean().item(),
        "distinct_queries": len(set(r.queries)) / len(r.queries),
        "overlap": overlap(r.queries), "overlap_recent": overlap(r.queries, sum(recent, [])),
        "leaked_tags": share(["[Start Gen" in q or "[End Gen" in q for q in r.queries]),
        "held_out_queries": 1 - r.learn.float().mean().item(),
        "query_length": share([len(row.tokens) for row in r.query_rows]),
        "answer_length": share([len(row.tokens) for row in rows]),
        "truncated_queries": share([not row.stopped for row in r.query_rows]),
        "truncated_answers": share([not row.stopped for row in rows]),
        "unparsed": share([reason is not None for reason in reasons]),
        "parse_failures": dict(failures) if reasons else None,
        "truncated_inputs": r.truncated_inputs,
        "judge_mass": share(mass), "judge_tags": share([j["tags"] for j in judged if "tags" in j]),
    } | predictions(r)


def predictions(r) -> dict:
    """What measure() says in rlpt alone. no_prediction: of all answers, those from which none could
    be extracted; truncated_predictions: those with one that does not end as a sentence does."""
    kinds, records = r.kinds or [], r.judgements if r.kinds else []
    of = lambda kind: share([value for k, value in zip(kinds, r.R.mean(1).tolist()) if k == kind])
    return {
        "msr_share": share([kind == "msr" for kind in kinds]),
        "asr_reward": of("asr"), "msr_reward": of("msr"),
        "no_prediction": share([bool(j["failure"]) for j in records]),
        "extraction_failures": dict(Counter(j["failure"] for j in records if j["failure"]))
        if records else None,
        "truncated_predictions": share([j["failure"] == "short" or not j.get("whole", True)
                                        for j in records]),
    }


def short(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def fault_text(faults: list[dict]) -> str:
    """The first sample of a skipped update that is not finite, and how many more there are."""
    what, query, answer = (faults[0].get(key) for key in ("what", "query", "answer"))
    where = f" of query {query}" * bool(query) + f", answer {answer}" * bool(answer)
    more = f" (and {len(faults) - 1} more)" * (len(faults) > 1)
    return f"{what}{where} not finite{more}"


def step_line(s, m: dict) -> str:
    """A step's line on the screen: the few numbers that say whether the game goes well."""
    unparsed = m["unparsed"] if m["judge_mass"] is None else 1 - m["judge_mass"]
    difference = "-" if m["logp_difference"] is None else f"{m['logp_difference']:.0e}"
    line = (f"step {m['step']:>{len(str(s.steps))}}/{s.steps}  R {short(m['reward'])}"
            f"  R_Q {short(m['quality'])}  ch-adv {short(m['challenger_advantage'])}"
            f"  KL {short(m['kl_solver'])}|{short(m['kl_challenger'])}"
            f"  distinct {short(m['distinct_queries'])}  truncated {short(m['truncated_answers'])}"
            f"  unparsed {short(unparsed)}  logp-diff {difference}  {m['seconds']:.2f} s")
    if m["msr_share"] is not None:
        line += (f"  ASR {short(m['asr_reward'])}  MSR {short(m['msr_reward'])}"
                 f"  no prediction {short(m['no_prediction'])}")
    if m["skipped"]:
        line += "  " + fault_text(m["faults"]) + ": update skipped"
    if m["quality"] is not None and not m["quality_value_spread"] and not m["quality_spread"]:
        line += "  all R_Q equal: no self-reward in this step"
    if m["judge_tags"]:
        line += f"  judge's tags in {m['judge_tags']:.2f} of the pairs"
    if unparsed is not None and unparsed > 0.5:
        line += f"  {'verdicts' if s.verdict else 'self-reward'} mostly unparsed"
    return line


def example_line(r) -> str:
    """One query of the round, the Challenger's best, with its answers and what they earned; in rlpt
    the first reference with its predictions."""
    n, G = 0 if r.A_ch is None else int(r.A_ch.argmax()), r.R.shape[1]
    clip = lambda text, most: repr(text if len(text) <= most else text[:most - 3] + "...")
    texts = r.answers[n]
    if r.kinds and r.judgements:
        texts = [j["prediction"] or j["failure"] for j in r.judgements[n * G:(n + 1) * G]]
    answers = Counter(clip(text, 30) for text in texts).most_common(4)
    said = ", ".join(f"{count} x {answer}" for answer, count in answers)
    if r.kinds:
        return f"    {r.kinds[n]}: {clip(r.golds[n], 70)}  predicted {said}  R {r.R[n].mean():.2f}"
    quality = "" if r.R_Q is None else f"  R_Q {r.R_Q[n].mean():.2f}"
    return f"    asked {clip(r.queries[n], 70)}  answered {said}  R {r.R[n].mean():.2f}{quality}"


def eval_line(s, record: dict) -> str:
    """An evaluation's line: held-out figures; in the embedded world accuracy and query shares."""
    line = f"eval {record['step']:>{len(str(s.steps))}}/{s.steps}"
    if "win_rate" in record:
        line += (f"  held-out reward {record['reward']:.3f}  win-rate against the start "
                 f"{record['win_rate']:.3f}  ({record['n']} prompts)")
    for key, title in (("accuracy", "held-out accuracy"), ("challenger", "queries"),
                       ("truncated", "truncated")):
        if record.get(key):
            line += f"  {title}: " + " ".join(f"{k} {v:.2f}" for k, v in record[key].items())
    return line


def closing_lines(out: Path, evals: list[dict]) -> str:
    """The end of a run: before and after, and where everything lies."""
    lines = []
    titles = {"accuracy": "held-out accuracy, greedy", "challenger": "Challenger's queries",
              "truncated": "truncated predictions"}
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


def speed(game, r) -> dict[str, float]:
    """Tokens/s of a train.Round's phases. A phase's time includes its prefill and all waiting."""
    G = game.settings.answers
    rows = [row for group in r.answer_rows for row in group]
    learnt = [row for i, row in enumerate(rows) if r.learn[i // G]]
    learnt += [row for row, keep in zip(r.query_rows, r.learn) if keep]
    count = lambda rows: sum(len(row.tokens) for row in rows)
    judged = [j["judge_tokens"] for j in r.judgements if "judge_tokens" in j]
    tokens = {"challenge": count(r.query_rows), "solve": count(rows),
              "reward": getattr(game.reward, "tokens", 0), "judge": sum(T for _, T in judged),
              "update": count(learnt)}
    return {name: n / r.seconds[name] for name, n in tokens.items() if n and name in r.seconds}


def is_large(c) -> bool:
    """Whether a step takes long enough to have a speed: 1e8 weights."""
    return parameters(c) >= LARGE


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
    return "     " + "  ".join(said)


def transcript(s, r) -> str:
    """A round for reading: query, in rlpt what really follows, answers, R, R_Q, advantages."""
    number = lambda x: "     -" if x is None else f"{x:6.2f}"
    indent = lambda text, margin: "\n".join(margin + line for line in text.split("\n"))
    lines = []
    for n, said in enumerate(samples(r, 0), 1):
        cut = "" if said["query_stopped"] in (True, None) else "   (cut off)"
        held = "" if said["trained_on"] else "   (held out: not learnt from)"
        lines += ["", f"query {n}/{len(r.queries)}   Challenger's advantage "
                  f"{number(said['challenger_advantage'])}{cut}{held}",
                  indent(said["query"], "  ? ")]
        if said["kind"]:
            lines.append(indent(said["gold"], "  = "))
        for a in said["answers"]:
            unparsed = f" (unparsed: {a['reason']})" if a.get("reason") else ""
            unparsed += f" (no prediction: {a['failure']})" if a.get("failure") else ""
            lines += [f"  R {number(a['reward'])}  R_Q {number(a['quality'])}{unparsed}  advantage "
                      f"{number(a['advantage'])}" + ("" if a["stopped"] else "  (cut off)"),
                      indent(a["answer"], "      ")]
    total = f"mean R {r.R.mean():.3f}" + ("" if r.R_Q is None else f", mean R_Q {r.R_Q.mean():.3f}")
    R = "R" if s.reward_scale == 1 else f"{s.reward_scale:g} * R"
    of = f"; advantages: Solver's of {R}" + ("" if r.R_Q is None else " + R_Q")
    of += "" if r.A_ch is None else f", Challenger's of {'-' if r.R_Q is None else 'R_Q - '}{R}"
    return "\n".join([*lines, "", total + of, *balance_lines(r)])


def balance_lines(r) -> list[str]:
    """How far R and R_Q of a round spread, and the --reward-scale that makes them spread alike."""
    if r.R_Q is None:
        return []
    found, lines = balance(r.R, r.R_Q), []
    value_spread = r.R.mean(1).std(correction=0).item()
    for role, R, R_Q in (
            ("Challenger's, over queries", value_spread, found["quality_value_spread"]),
            ("Solver's, within groups", found["reward_spread"], found["quality_spread"])):
        scale = f"--reward-scale {R_Q / R:.2g} would make them equal" if R and R_Q else (
            "no scale makes them equal")
        lines.append(f"spread of R {R:.2f}, of R_Q {R_Q:.2f} ({role}): {scale}")
    return [*lines, f"correlation of R and R_Q {short(found['reward_quality_correlation'])}"]


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


def learnt(s, sol: Counter, ch: Counter, norm: float, rate: float, faults: list) -> dict:
    """What an update says: sol, ch: the sums of lsp.policy_loss over the roles' rows."""
    mean = lambda key, per, sums: sums[key] / sums[per] if sums[per] else None
    entropy = lambda sums: -sums["logp"] / sums["tokens"] if sums["tokens"] else None
    return {
        "loss": None if faults else sol["loss"] + s.alpha_ch * ch["loss"],
        "kl_solver": mean("kl", "sequences", sol) if s.beta else None,
        "kl_challenger": mean("kl", "sequences", ch) if s.beta else None,
        "entropy_solver": entropy(sol), "entropy_challenger": entropy(ch),
        "logp_difference": mean("difference", "tokens", sol + ch),
        "grad_norm": norm, "skipped": bool(faults), "faults": faults, "learning_rate": rate,
    }


def settings_lines(s) -> str:
    """All settings of a run in lines of at most 100 characters."""
    said = " ".join(f"{k}={value}" for k, value in asdict(s).items() if value is not None)
    return textwrap.fill(f"settings      {said}", 100, subsequent_indent=" " * 14,
                         break_long_words=False, break_on_hyphens=False)


def record(game, run, step: int, r, learnt: dict):
    """Append a step's metrics and samples to the run's files, and print its line."""
    s = game.settings
    m = {"step": step} | measure(s, r, game.recent) | learnt | {
        "phase_seconds": r.seconds, "peak_gb": game.phase.peak_gb,
        "tokens_per_second": speed(game, r)}
    game.recent.append(r.queries)
    run.append("metrics.jsonl", [m])
    run.append("samples.jsonl", list(samples(r, step)))
    print(step_line(s, m), flush=True)
    if is_large(game.policy.config):
        print(speed_line(m), flush=True)
    if step % 10 == 0:
        print(example_line(r), flush=True)
