"""Train a Llama by Language Self-Play (arXiv 2509.07414, Algorithm 1), or by GRPO on given prompts
or (RLPT, arXiv 2509.19249; rlpt.py) on plain text.

    python train.py                                        # the embedded model, a minute on a CPU
    python train.py --model llama-3.2-3b                   # LSP at the paper's settings, one GPU
    python train.py --model llama-3.2-3b --algo lsp-zero   # the bare zero-sum game
    python train.py --model llama-3.2-3b --algo grpo --prompts alpaca.json
    python train.py --model llama-3.2-3b --algo rlpt --text books/
    python train.py --model runs/A/checkpoint --judge llama-3.2-3b    # a second stage
    torchrun --nproc-per-node 8 train.py --model llama-3.2-3b    # on eight GPUs (ranks.py)
    python train.py --watch                                # one round as a transcript, no update
    python train.py --resume runs/A                        # as if it had never been stopped

Departures from the paper: KL as k2, since the printed term pulls nowhere (lsp.py; --kl paper for
the letter). GRPO is Eq. 4 on given prompts: no division by the standard deviation, and no clipping,
which could never bind, every batch being used once. Shapes: N queries, G answers a query.
"""
import json
import math
import sys
import textwrap
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import lsp
import rewards
from evals.heldout import evaluate, evaluate_world
from evals.results import read_lines
from game import Game, set_up
from gradient import Row, accumulate, culprits, refer, unsound
from model import save_model
from plumbing import cli, log, ranks, report, runs
from plumbing.chat import fit
from plumbing.data import CHALLENGE, JUDGE, NONCE, SOLVE, draw, generator
from plumbing.files import pick_device
from plumbing.memory import MasterAdamW
from plumbing.phases import StopRequest, out_of_memory
from plumbing.settings import Settings, resolve, run_name
from rlpt import draw_episodes
from sample import Completion, sample, text_of

# ----------------------------------------------------- challenge, solve, score, advantages

@dataclass
class Round:
    """One round of play. Tensors and lists of N queries, and of N groups of G answers."""
    queries: list[str]                     # as they were asked (see `shortened`)
    golds: list[str | None]
    kinds: list[str] | None                # rlpt: of task, asr or msr
    query_rows: list[Completion]           # (N), empty where the queries are data
    solver_prompts: list[list[int]]        # (N)
    answer_rows: list[list[Completion]]    # (N, G)
    answers: list[list[str]]               # (N, G)
    R: Tensor                              # (N, G) before scaling
    R_Q: Tensor | None                     # (N, G) unread ones filled in
    judgements: list[dict]                 # (N * G), empty without a judge
    kept: Tensor                           # (N,) bool: not held out for evaluation
    A_sol: Tensor                          # (N, G)
    A_ch: Tensor | None                    # (N,)
    shortened: dict[str, int]              # texts cut to fit a context: queries, rewarded, judged
    seconds: dict[str, float]              # by phase


def play(game: Game, step: int) -> Round:
    """Algorithm 1 up to the update. What is random in it depends on the seed and the step alone."""
    s, G, phase = game.settings, game.settings.answers, game.phase
    phase.seconds, phase.peak_gb = {}, {}
    speak = dict(temperature=s.temperature, stop_ids=game.tokenizer.stop_ids,
                 batch_tokens=s.batch_tokens)

    # Challenge: q ~ pi_Ch(q) = pi(q | <cp>). The query is all that was written, and nothing else.
    # In rlpt and grpo the queries are given.
    query_rows, golds, kinds, shortened = [], [None] * s.queries, None, {}
    if game.texts:
        queries, golds, kinds, cut = map(list, zip(*draw_episodes(game, step)))
        shortened["contexts"] = sum(cut)
    elif game.data:
        queries, golds = map(list, zip(*draw(game.data, s.queries, s.seed, step)))
    else:
        with phase("challenge", game.policy):
            (query_rows,) = sample(game.policy, [game.challenger_prompt], num_samples=s.queries,
                                   max_new_tokens=s.query_tokens,
                                   generator=generator(s.seed, step, CHALLENGE), **speak)
        queries = [text_of(game.tokenizer, row) for row in query_rows]

    # Solve: a ~ pi_Sol(a|q) = pi(a | q as a plain user turn), G times. A query whose text takes
    # more tokens than the Challenger wrote, more than the context holds, is asked without its end.
    with phase("solve", game.policy):
        fitted = fit(game.tokenizer, [(q,) for q in queries],
                     lambda q: [{"role": "user", "content": q}],
                     game.policy.config.max_position_embeddings - s.answer_tokens)
        solver_prompts, queries = [ids for ids, _, _ in fitted], [q for _, (q,), _ in fitted]
        shortened["queries"] = sum(cut for _, _, cut in fitted)
        answer_rows = sample(game.policy, solver_prompts, num_samples=G,
                             max_new_tokens=s.answer_tokens,
                             generator=generator(s.seed, step, SOLVE), **speak)
        answers = [[text_of(game.tokenizer, row) for row in group] for group in answer_rows]

    # Score: R(q, a), in rlpt the judge's verdict, and in lsp its R_Q(q, a).
    stopped = [[row.stopped for row in group] for group in answer_rows]              # (N, G)
    R, R_Q, judgements, cut = score(game, step, queries, golds, answers, stopped)
    shortened |= cut

    # Advantages, over the queries that may be learnt from.
    keep = lambda query: not (game.world and game.world.is_held_out(query))
    kept = torch.tensor([keep(q) for q in queries])                                  # (N,)
    quality = None if R_Q is None else R_Q[kept]
    A_sol = torch.zeros_like(R)                                                      # (N, G)
    A_sol[kept] = lsp.solver_advantages(s.reward_scale * R[kept], quality)           # Eq. 3
    A_ch = torch.zeros(len(queries)) if query_rows else None                         # (N,)
    if query_rows and kept.sum() >= 2:
        A_ch[kept] = lsp.challenger_advantages(s.reward_scale * R[kept], quality)    # Eq. 3
    return Round(queries, golds, kinds, query_rows, solver_prompts, answer_rows, answers, R, R_Q,
                 judgements, kept, A_sol, A_ch, shortened, phase.seconds)


def score(game: Game, step: int, queries: list[str], golds: list[str | None],
          answers: list[list[str]], stopped: list[list[bool]],
          ) -> tuple[Tensor, Tensor | None, list[dict], dict[str, int]]:
    """R (N, G), R_Q (N, G) or None, what the judge said to each pair (N * G, or none), and how many
    texts were cut to fit a context. The same pair is scored once."""
    s, G, phase = game.settings, game.settings.answers, game.phase
    asked_each = [(q, a, gold, whole)
                  for q, gold, group, ends in zip(queries, golds, answers, stopped)
                  for a, whole in zip(group, ends)]
    number = {t: i for i, t in enumerate(dict.fromkeys(asked_each))}         # of each distinct one
    at = torch.tensor([number[t] for t in asked_each]).view(-1, G)                   # (N, G)
    asked, answered, gold, whole = map(list, zip(*number))
    R_Q, judgements = None, []
    nonce = str(torch.randint(10**6, (), generator=generator(s.seed, step, NONCE)).item())
    with phase("judge" if s.verdict else "reward", game.scorer):
        if s.verdict:
            game.reward.generator, game.reward.nonce = generator(s.seed, step, JUDGE), nonce
        R = rewards.score(game.reward, asked, answered, gold, torch.tensor(whole))[at]
    cut = {"rewarded": getattr(game.reward, "shortened", 0)}
    if s.verdict:
        judgements = [game.reward.records[i] for i in at.flatten().tolist()]
    elif game.judge is not None:
        if s.judge_temperature and s.self_reward == "generate":      # drawn anew for each
            at = torch.arange(len(asked_each)).view(-1, G)
            asked, answered, *_ = map(list, zip(*asked_each))
        with phase("judge", game.judge):
            scores, records = rewards.self_reward(
                game.judge, game.judge_tokenizer, asked, answered, prompt=game.judge_prompt,
                reading=s.self_reward, temperature=s.judge_temperature,
                max_new_tokens=s.judge_tokens, generator=generator(s.seed, step, JUDGE),
                batch_tokens=s.batch_tokens, nonce=nonce)
        R_Q = rewards.fill_unparsed(scores[at])                                      # (N, G)
        judgements = [records[i] for i in at.flatten().tolist()]
        cut["judged"] = sum(record["shortened"] for record in records)
    return R, R_Q, judgements, cut


# ---------------------------------------------------------------- update

def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up to --learning-rate, then linear decay to --final-lr-share of it at the end."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / (s.warmup + 1)
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.learning_rate * (1 - done * (1 - s.final_lr_share))


def update(game: Game, optimizer: MasterAdamW, r: Round, step: int) -> dict:
    """One gradient step on L = L_Sol + alpha_Ch * L_Ch; returns its metrics.

    Where a reward, log-prob, loss or gradient is not finite, nothing moves; "faults" says where.
    """
    s = game.settings
    kept = r.kept.nonzero()[:, 0].tolist()
    mine = ranks.share(kept, lambda n: sum(len(row.tokens) for row in r.answer_rows[n]))
    solver = [Row(r.solver_prompts[n], completion, advantage.item())
              for n in mine for completion, advantage in zip(r.answer_rows[n], r.A_sol[n])]
    challenger = [Row(game.challenger_prompt, r.query_rows[n], r.A_ch[n].item())
                  for n in mine if r.query_rows]
    sol, ch, loss, norm = Counter(), Counter(), None, None
    rate = learning_rate(s, step)
    faults = unsound(r)
    if s.beta and not faults:
        with game.phase("reference", game.reference):
            refer(game, solver)
            refer(game, challenger)
    with game.phase("update", game.policy):
        if not faults:
            sol, ch = differentiate(game, optimizer, solver, challenger, len(kept))
            loss = sol["loss"] + s.alpha_ch * ch["loss"]
            if math.isfinite(loss):
                norm = optimizer.step(rate, s.grad_clip)
            if norm is None or not math.isfinite(norm):
                faults = ranks.gather(culprits(game, optimizer, mine, solver, challenger)) or [
                    {"query": None, "answer": None, "what": "gradient of all samples together"}]
    mean = lambda key, per, sums: sums[key] / sums[per] if sums[per] else None
    entropy = lambda sums: -sums["logp"] / sums["tokens"] if sums["tokens"] else None
    tokens = sol["tokens"] + ch["tokens"]
    return {
        "loss": loss,
        "kl_solver": mean("kl", "sequences", sol) if s.beta else None,
        "kl_challenger": mean("kl", "sequences", ch) if s.beta else None,
        "entropy_solver": entropy(sol), "entropy_challenger": entropy(ch),
        "logp_gap": (sol["gap"] + ch["gap"]) / tokens if tokens else None,
        "grad_norm": norm, "skipped": bool(faults), "faults": faults, "learning_rate": rate,
    }


def differentiate(game: Game, optimizer: MasterAdamW, solver: list[Row], challenger: list[Row],
                  count: int) -> tuple[Counter, Counter]:
    """Add up the gradient of L; out of memory, once more with half the micro-batch.

    count: queries that are learnt from, of which these rows are all, or under torchrun this rank's.
    """
    s, G = game.settings, game.settings.answers
    for last in (False, True):
        sums = None
        try:
            sums = (accumulate(game, solver, 1.0, count * G),                # Eq. 4
                    accumulate(game, challenger, s.alpha_ch, count))         # Eq. 5
        except (RuntimeError, MemoryError) as error:
            if last or not out_of_memory(error):
                raise
        everyones = ranks.exchange(sums)
        if None not in everyones:
            if count:
                ranks.add_up(optimizer.params)
            sol, ch = Counter(), Counter()
            for one, other in everyones:
                sol.update(one)
                ch.update(other)
            return sol, ch
        optimizer.discard()                # out here: the error held on to the pass's tensors
        torch.cuda.empty_cache()
        s.micro_batch_tokens = max(1, s.micro_batch_tokens // 2)
        print(f"out of memory in phase update: again with --micro-batch-tokens "
              f"{s.micro_batch_tokens}, from here on", flush=True)


# ---------------------------------------------------------------- the loop

def train(s: Settings, preset: dict):
    """Begin a run, or go on with one, and play until the last step, a signal or a fault."""
    if s.dry_run:
        sys.exit(report.dry_run(s))

    def reopen():
        run = runs.Run(Path(s.resume))                       # its lock, from here on
        run.newest_whole()
        return run
    run = ranks.first(reopen) if s.resume else None
    game = set_up(s, run.checkpoint if run else None)
    device, dtype = pick_device(s.device)
    if s.watch:
        game.policy.to(dtype)
        print(log.transcript(s, play(game, 0)))
        return
    game.policy.carried["training.json"] = json.dumps(preset, indent=2).encode()
    optimizer = MasterAdamW(game.policy, dtype, weight_decay=s.weight_decay, offload=s.offload)
    need = optimizer.bytes_on_disk()
    run = run or ranks.first(lambda: runs.new_run(s, run_name(s), need))
    with run, StopRequest() as game.phase.stop:
        ranks.first(lambda: run.begin(asdict(s), game.sources))
        said = " ".join(f"{k}={value}" for k, value in asdict(s).items() if value is not None)
        print(textwrap.fill(f"settings      {said}", 100, subsequent_indent=" " * 14,
                            break_long_words=False, break_on_hyphens=False))
        print(report.opening(s))
        now = {"torch": torch.__version__, "device": device.type, "ranks": ranks.world()}
        state = ranks.first(lambda: run.restore(s.keep, **now))
        if run.checkpoint:
            optimizer.load(run.checkpoint / "state", state["updates"])
        if s.resume:
            print(f"resuming {run.folder} after step {state['step']}", flush=True)
        play_on(game, optimizer, run, state)


@torch.no_grad()
def can_play(game: Game) -> bool:
    """Whether the policy's logits are finite: no other model is worth a checkpoint."""
    game.phase.call(game.policy)
    ids = game.tokenizer.chat([{"role": "user", "content": "a"}])
    tokens = torch.tensor([ids], device=game.policy.model.embed_tokens.weight.device)
    return game.policy.logits(game.policy(tokens)[:, -1]).isfinite().all().item()


def play_on(game: Game, optimizer: MasterAdamW, run: runs.Run, state: dict):
    """The steps that are left. Only a whole step is ever saved; one that was cut short is played
    again, and draws the same random numbers, which depend on the seed and the step alone."""
    s, out = game.settings, run.folder
    budget_gb, bounds = report.peaks_gb(s), report.best(game)
    step, bad_steps = state["step"], state["bad_steps"]
    saved = step if run.checkpoint else None
    evals = read_lines(out / "eval.jsonl")
    recent = log.recent_queries(out / "samples.jsonl")
    start = [a for a in read_lines(out / "eval_samples.jsonl") if a["step"] == 0] or None

    def look():
        nonlocal start
        record = {"step": step}
        if game.held_out:
            figures, answered = evaluate(game, game.held_out, start)
            start = start or answered
            record |= figures
            run.append("eval_samples.jsonl", [{"step": step} | line for line in answered])
        if game.world:
            record |= evaluate_world(game)
        if len(record) > 1:
            evals.append(record)
            run.append("eval.jsonl", [record])
            print(log.eval_line(s, record), flush=True)

    def save():
        nonlocal saved
        if saved == step:
            return

        def write(folder):
            save_model(game.policy, folder)
            optimizer.save(folder / "state")
        if not can_play(game):
            raise cli.RunStopped(f"after step {step} the model's logits are not finite: a lower "
                                 f"--learning-rate may help; {run.how_to_go_on()}", can_save=False)
        now = {"updates": optimizer.updates, "bad_steps": bad_steps,
               "torch": state["torch"], "device": state["device"], "ranks": state["ranks"]}
        ranks.alike(optimizer.masters)
        ranks.first(lambda: run.save(step, now, write, need=optimizer.bytes_on_disk(), keep=s.keep))
        saved = step

    try:
        while True:
            known = evals and evals[-1]["step"] == step
            if (step % s.eval_every == 0 or step >= s.steps) and not known:
                with game.phase("eval", game.policy):
                    look()
            if step >= s.steps:
                break
            begun = time.perf_counter()
            r = play(game, step)                             # challenge, solve, score, advantages
            learnt = update(game, optimizer, r, step)        # one step on L_Sol + alpha_Ch * L_Ch
            seconds = time.perf_counter() - begun
            step += 1
            bad_steps = bad_steps + 1 if learnt["skipped"] else 0
            m = {"step": step} | log.measure(s, r, recent) | learnt | {
                "seconds": seconds, "phase_seconds": r.seconds, "peak_gb": game.phase.peak_gb,
                "budget_gb": budget_gb} | report.speed(game, r, bounds)
            recent.append(r.queries)
            run.append("metrics.jsonl", [m])
            run.append("samples.jsonl", list(log.samples(r, step)))
            print(log.step_line(s, m), flush=True)
            if bounds:
                print(report.speed_line(m), flush=True)
            if step % 10 == 0:
                print(log.example_line(r), flush=True)
            if bad_steps >= s.max_bad_steps:
                raise cli.RunStopped(f"{bad_steps} updates in a row were skipped, the last one: "
                                      + log.fault_text(learnt["faults"]))
            if step % s.save_every == 0 or step == s.steps:
                save()
    except cli.RunStopped as error:
        reason = ranks.agreed(error)
        if not getattr(reason, "can_save", False):
            raise reason from None
        save()
        raise cli.RunStopped(f"{reason}; {run.how_to_go_on()}", reason.code) from None
    print(log.closing_lines(out, evals))


def main():
    parser = cli.Parser(description="Language Self-Play, LSP-Zero, GRPO and RLPT on one Llama.")
    cli.add_flags(parser, Settings)
    given = vars(parser.parse_args())
    with redirect_stdout(cli.Unfailing(sys.stdout)):
        train(*resolve(given))


if __name__ == "__main__":
    cli.run_script(lambda: ranks.together(main))
