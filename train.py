"""Train a Llama by Language Self-Play (arXiv 2509.07414, Algorithm 1), or by GRPO on given prompts.

    python train.py                                        # the embedded model, a minute on a CPU
    python train.py --model llama-3.2-3b                   # LSP at the paper's settings, one GPU
    python train.py --model llama-3.2-3b --algo lsp-zero   # the bare zero-sum game
    python train.py --model llama-3.2-3b --algo grpo --prompts alpaca.json
    python train.py --model runs/A/checkpoint --algo grpo --prompts alpaca.json    # a second stage
    python train.py --watch                                # one round as a transcript, no update

Departures from the paper: KL as k2, since the printed term pulls nowhere (lsp.py; --kl paper for
the letter). GRPO is Eq. 4 on given prompts: no division by the standard deviation, and no clipping,
which could never bind, every batch being used once. Shapes: N queries, G answers a query.
"""
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from types import ModuleType

import torch
from torch import Tensor

import lsp
import rewards
import runs
from chat import Tokenizer, fill, fit
from data import CHALLENGE, JUDGE, SOLVE, check_data, draw, generator, opening, read_data
from eval import evaluate, evaluate_world
from files import InputError, find_model, pick_device, read_prompt
from gradient import Row, accumulate
from memory import MasterAdamW
from model import Llama, load_model, read_config, save_model
from sample import Completion, sample, text_of
from settings import Settings, resolve, run_name
from tiny import world as tiny_world

# ---------------------------------------------------------------- the players


@dataclass
class Game:
    """What play() needs: models, tokenizers, prompts and the reward."""
    settings: Settings
    policy: Llama
    tokenizer: Tokenizer
    reward: object                         # (queries, answers, golds) -> (len,)
    reference: Llama | None = None         # None where beta is 0 and nobody judges
    judge: Llama | None = None             # None without self-reward
    judge_tokenizer: Tokenizer | None = None
    judge_prompt: str | None = None        # with {instruction} and {response} to fill
    challenger_prompt: list[int] | None = None    # <cp> as token ids; None with grpo
    data: list = ()                        # grpo: (query, gold); else empty
    held_out: list = ()                    # those of --eval-prompts
    world: ModuleType | None = None        # the embedded world, where it is played


def set_up(s: Settings) -> Game:
    """Read and load all that the settings name; small files first, so that errors come early."""
    device, dtype = pick_device(s.device)
    if s.reward == "tiny" and device.type == "cpu":
        torch.set_num_threads(1)           # matrices this small: threads would wait for each other
    load = lambda path, dtype=dtype: load_model(path, device=device, dtype=dtype)
    start = find_model(s.model)
    reference_path = find_model(s.reference) if s.reference else start
    judge_path = find_model(s.judge) if s.judge else reference_path
    world = tiny_world if s.reward == "tiny" else None
    data, held_out, gold = [], [], s.reward in rewards.NEED_GOLD
    if s.algo == "grpo" and world and s.prompts in world.MIXES:
        data = world.prompts(s.prompts, min(s.queries * s.steps, 10**5), seed=s.seed)
    elif s.algo == "grpo":
        data = read_data(s.prompts, gold=gold)
    if s.eval_prompts:
        held_out = read_data(s.eval_prompts, gold=gold)
    tokenizer = Tokenizer(start)
    context = read_config(start).max_position_embeddings
    check_data(s.prompts, data, tokenizer, context - s.answer_tokens)
    check_data(s.eval_prompts, held_out, tokenizer, context - s.answer_tokens)
    game = Game(s, None, tokenizer, rewards.VERIFIABLE.get(s.reward), data=data, held_out=held_out,
                world=world)
    if s.algo != "grpo":
        given = [name for name in ("task", "template") if getattr(s, name) != "None"]
        prompt = fill(read_prompt(s.challenger_prompt, given), task=s.task, template=s.template)
        game.challenger_prompt = opening(tokenizer, s.challenger_prompt, prompt, s.query_tokens,
                                         context)
        opening(tokenizer, "--query-tokens and --answer-tokens", "",
                s.query_tokens + s.answer_tokens, context)
    if s.self_reward:
        game.judge_tokenizer = tokenizer if judge_path == start else Tokenizer(judge_path)
        game.judge_prompt = read_prompt(s.self_reward_prompt, ("instruction", "response"))
        opening(game.judge_tokenizer, s.self_reward_prompt,
                fill(game.judge_prompt, instruction="", response=""), s.judge_tokens,
                read_config(judge_path).max_position_embeddings)
    if not game.reward:
        game.reward = rewards.RewardModel(find_model(s.reward), device=device, dtype=dtype)
    shared = s.self_reward and judge_path == reference_path
    game.reference = load(reference_path) if s.beta or shared else None
    if s.self_reward:
        game.judge = game.reference if shared else load(judge_path)
    game.policy = load(start, torch.float32)     # its masters' precision; MasterAdamW makes it bf16
    game.policy.checkpointing = s.checkpointing
    for flag in ("policy", "reference", "judge"):
        model = getattr(game, flag)
        if model and model.config.scalar_head:
            raise InputError(f"the {flag} is a reward model, which cannot write")
    if s.beta and game.reference.config.vocab_size != game.policy.config.vocab_size:
        raise InputError(f"--reference {s.reference}: another vocabulary than the policy's")
    return game


# ----------------------------------------------------- challenge, solve, score, advantages

@dataclass
class Round:
    """One round of play. Tensors and lists of N queries, and of N groups of G answers."""
    queries: list[str]                     # as they were asked (see `shortened`)
    golds: list[str | None]
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
    tokens: dict[str, int]                 # by phase


def play(game: Game, step: int) -> Round:
    """Algorithm 1 up to the update. What is random in it depends on the seed and the step alone."""
    s, G = game.settings, game.settings.answers
    seconds, tokens, clock = {}, {}, [time.perf_counter()]

    def lap(phase, rows=()):
        clock.append(time.perf_counter())
        seconds[phase], tokens[phase] = clock[-1] - clock[-2], sum(len(row.tokens) for row in rows)

    speak = dict(temperature=s.temperature, stop_ids=game.tokenizer.stop_ids,
                 batch_tokens=s.batch_tokens)

    # Challenge: q ~ pi_Ch(q) = pi(q | <cp>). The query is all that was written, and nothing else.
    if game.data:
        query_rows = []
        queries, golds = map(list, zip(*draw(game.data, s.queries, s.seed, step)))
    else:
        (query_rows,) = sample(game.policy, [game.challenger_prompt], num_samples=s.queries,
                               max_new_tokens=s.query_tokens,
                               generator=generator(s.seed, step, CHALLENGE), **speak)
        queries = [text_of(game.tokenizer, row) for row in query_rows]
        golds = [None] * s.queries
        lap("challenge", query_rows)

    # Solve: a ~ pi_Sol(a|q) = pi(a | q as a plain user turn), G times. A query whose text takes
    # more tokens than the Challenger wrote, more than the context holds, is asked without its end.
    fitted = fit(game.tokenizer, [(q,) for q in queries],
                 lambda q: [{"role": "user", "content": q}],
                 game.policy.config.max_position_embeddings - s.answer_tokens)
    solver_prompts, queries = [ids for ids, _, _ in fitted], [q for _, (q,), _ in fitted]
    shortened = {"queries": sum(cut for _, _, cut in fitted)}
    answer_rows = sample(game.policy, solver_prompts, num_samples=G, max_new_tokens=s.answer_tokens,
                         generator=generator(s.seed, step, SOLVE), **speak)
    answers = [[text_of(game.tokenizer, row) for row in group] for group in answer_rows]
    lap("solve", [row for group in answer_rows for row in group])

    # Score: R(q, a), and in lsp the judge's R_Q(q, a). The same pair is scored once.
    triples = [(q, a, gold) for q, gold, group in zip(queries, golds, answers) for a in group]
    number = {t: i for i, t in enumerate(dict.fromkeys(triples))}    # of each distinct one
    at = torch.tensor([number[t] for t in triples]).view(-1, G)                      # (N, G)
    asked, answered, gold = map(list, zip(*number))
    R = game.reward(asked, answered, gold)[at]                                       # (N, G)
    if s.reward in rewards.VERIFIABLE:     # cut off is not answered: "#### 4" may be half of 42
        R = R * torch.tensor([[row.stopped for row in group] for group in answer_rows])
    shortened["rewarded"] = getattr(game.reward, "shortened", 0)
    lap("reward")
    R_Q, judgements = None, []
    if game.judge is not None:
        if s.judge_temperature and s.self_reward == "generate":      # drawn anew for each
            at = torch.arange(len(triples)).view(-1, G)
            asked, answered, _ = map(list, zip(*triples))
        scores, records = rewards.self_reward(
            game.judge, game.judge_tokenizer, asked, answered, prompt=game.judge_prompt,
            reading=s.self_reward, temperature=s.judge_temperature, max_new_tokens=s.judge_tokens,
            generator=generator(s.seed, step, JUDGE), batch_tokens=s.batch_tokens)
        R_Q = rewards.fill_unread(scores[at])                                        # (N, G)
        judgements = [records[i] for i in at.flatten().tolist()]
        shortened["judged"] = sum(record["shortened"] for record in records)
        lap("judge")

    # Advantages, over the queries that may be learnt from.
    keep = lambda query: not (game.world and game.world.is_held_out(query))
    kept = torch.tensor([keep(q) for q in queries])                                  # (N,)
    quality = None if R_Q is None else R_Q[kept]
    A_sol = torch.zeros_like(R)                                                      # (N, G)
    A_sol[kept] = lsp.solver_advantages(s.reward_scale * R[kept], quality)           # Eq. 3
    A_ch = torch.zeros(len(queries)) if query_rows else None                         # (N,)
    if query_rows and kept.sum() >= 2:
        A_ch[kept] = lsp.challenger_advantages(s.reward_scale * R[kept], quality)    # Eq. 3
    return Round(queries, golds, query_rows, solver_prompts, answer_rows, answers, R, R_Q,
                 judgements, kept, A_sol, A_ch, shortened, seconds, tokens)


# ---------------------------------------------------------------- update

def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up to --learning-rate, then linear decay to --final-lr-share of it at the end."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / (s.warmup + 1)
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.learning_rate * (1 - done * (1 - s.final_lr_share))


def update(game: Game, optimizer: MasterAdamW, r: Round, step: int) -> dict:
    """One gradient step on L = L_Sol + alpha_Ch * L_Ch; returns its metrics."""
    s = game.settings
    kept = r.kept.nonzero()[:, 0].tolist()
    solver = [Row(r.solver_prompts[n], completion, advantage.item())
              for n in kept for completion, advantage in zip(r.answer_rows[n], r.A_sol[n])]
    challenger = [Row(game.challenger_prompt, r.query_rows[n], r.A_ch[n].item())
                  for n in kept if r.query_rows]
    sol = accumulate(game, solver, 1.0)                      # Eq. 4
    ch = accumulate(game, challenger, s.alpha_ch)            # Eq. 5
    rate = learning_rate(s, step)
    norm = optimizer.step(rate, s.grad_clip)
    mean = lambda key, per, sums: sums[key] / sums[per] if sums[per] else None
    entropy = lambda sums: -sums["logp"] / sums["tokens"] if sums["tokens"] else None
    tokens = sol["tokens"] + ch["tokens"]
    return {
        "loss": sol["loss"] + s.alpha_ch * ch["loss"],
        "kl_solver": mean("kl", "sequences", sol) if s.beta else None,
        "kl_challenger": mean("kl", "sequences", ch) if s.beta else None,
        "entropy_solver": entropy(sol), "entropy_challenger": entropy(ch),
        "logp_gap": (sol["gap"] + ch["gap"]) / tokens if tokens else None,
        "grad_norm": norm, "skipped": not math.isfinite(norm), "learning_rate": rate,
    }


# ---------------------------------------------------------------- the loop

def train(s: Settings, preset: dict):
    game = set_up(s)
    held_out = game.held_out
    dtype = pick_device(s.device)[1]
    if s.watch:
        game.policy.to(dtype)
        print(runs.transcript(s, play(game, 0)))
        return
    out = runs.make_folder(s.out, run_name(s))
    runs.write_json(out / "config.json", asdict(s))
    print("\n".join(f"{key} = {value}" for key, value in asdict(s).items() if value is not None))
    game.policy.carried["training.json"] = json.dumps(preset, indent=2).encode()
    optimizer = MasterAdamW(game.policy, dtype, weight_decay=s.weight_decay)
    start, stop, evals = None, runs.StopRequest(), []

    def look(step):
        nonlocal start
        record = {"step": step}
        if held_out:
            figures, answered = evaluate(game, held_out, start)
            start = start or answered
            record |= figures
            for line in answered:
                runs.append_line(out / "eval_samples.jsonl", {"step": step} | line)
        if game.world:
            record |= evaluate_world(game)
        if len(record) > 1:
            evals.append(record)
            runs.append_line(out / "eval.jsonl", record)
            print(runs.eval_line(s, record), flush=True)

    look(0)
    for step in range(1, s.steps + 1):
        begun = time.perf_counter()
        r = play(game, step - 1)                             # challenge, solve, score, advantages
        played = time.perf_counter()
        learnt = update(game, optimizer, r, step - 1)        # one step on L_Sol + alpha_Ch * L_Ch
        done = time.perf_counter()
        r.seconds["update"] = done - played
        m = {"step": step} | runs.measure(s, r) | learnt | {
            "seconds": done - begun, "phase_seconds": r.seconds,
            "tokens_per_second": {p: n / r.seconds[p] for p, n in r.tokens.items() if n}}
        runs.append_line(out / "metrics.jsonl", m)
        for record in runs.samples(r, step):
            runs.append_line(out / "samples.jsonl", record)
        print(runs.step_line(s, m), flush=True)
        if step % 10 == 0:
            print(runs.example_line(r), flush=True)
        stopping = bool(stop)                # read once: a signal during what follows waits a step
        last = step == s.steps or stopping
        if step % s.save_every == 0 or last:
            runs.save_checkpoint(out, step, lambda folder: save_model(game.policy, folder))
        if step % s.eval_every == 0 or last:
            look(step)
        if stopping:
            break
    print(runs.closing_lines(out, evals))
    if stop:
        sys.exit(128 + stop.signal)


def main():
    parser = runs.Parser(description="Language Self-Play, LSP-Zero and GRPO on one Llama.")
    runs.add_flags(parser, Settings)
    train(*resolve(vars(parser.parse_args())))


if __name__ == "__main__":
    runs.run_script(main)
