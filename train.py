"""Train a Llama by Language Self-Play (arXiv 2509.07414, Algorithm 1), or by GRPO on given prompts
or (RLPT, arXiv 2509.19249; rlpt.py) on plain text.

    python train.py                                        # the embedded model, a minute on a CPU
    python train.py --model llama-3.2-3b                   # LSP at the paper's settings, one GPU
    python train.py --model llama-3.2-3b --algo grpo --prompts alpaca.json
    python train.py --model llama-3.2-3b --algo rlpt --text books/
    python train.py --model runs/A/checkpoint --judge llama-3.2-3b    # a second stage
    torchrun --nproc-per-node 8 train.py --model llama-3.2-3b    # on eight GPUs
    python train.py --watch                                # one round as a transcript, no update
    python train.py --resume runs/A                        # as if it had never been stopped

Departures from the paper: the KL term is k2, since the printed one has no gradient on average
(lsp.py; --kl paper for the letter). GRPO is Eq. 4 on given prompts, without division by the
standard deviation and without clipping: every batch is used once, so a clip could never bind.
"""
import json
import math
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

import lsp
import rewards
import rlpt
from evals.heldout import evaluate, evaluate_world
from model import Llama, Tokenizer, load_model, read_config, save_model
from plumbing import cli, log, ranks, runs
from plumbing.budget import Plan
from plumbing.cache import pad, shared_forward
from plumbing.chat import fill, fit
from plumbing.data import (
    CHALLENGE,
    JUDGE,
    NONCE,
    SOLVE,
    check_data,
    draw,
    opening,
    read_data,
    seeds,
)
from plumbing.files import InputError, find_model, pick_device, prompt_file, read_prompt
from plumbing.logprobs import log_probs
from plumbing.memory import MasterAdamW, Stage, rest
from plumbing.phases import Phases, StopRequest
from plumbing.runs import read_lines
from plumbing.settings import Settings, resolve, run_name
from plumbing.texts import Texts
from sample import Completion, pick, sample, take_batch, text_of
from tiny import world as tiny_world

rewards.CHECKS["tiny"] = tiny_world.reward         # the embedded sums check themselves

# Shapes: N queries, G answers a query, B rows of a micro-batch, T tokens of its longest completion,
# M tokens of all its completions laid end to end, D hidden size.

# ----------------------------------------------------- challenge, solve, score, advantages

@dataclass
class Round:
    """One round of play: N queries, and G answers to each. Under torchrun a process first has the
    round of its own n queries, then the whole."""
    queries: list[str]                              # as they were asked (see `shortened`)
    golds: list[str | None]                         # reference answers, where the data has them
    kinds: list[str] | None                         # rlpt: asr or msr
    query_rows: list[Completion]                    # (N)    empty where the queries are given
    shortened: dict[str, int]                       # inputs that were truncated, by what they are
    solver_prompts: list[list[int]] = ()            # (N)
    answer_rows: list[list[Completion]] = ()        # (N, G)
    answers: list[list[str]] = ()                   # (N, G)
    R: Tensor | None = None                         # (N, G) before --reward-scale
    R_Q: Tensor | None = None                       # (N, G) None without a self-reward
    judgements: list[dict] = ()                     # (N * G), empty without a judge
    kept: Tensor | None = None                      # (N,)   False: held out for evaluation
    A_sol: Tensor | None = None                     # (N, G)
    A_ch: Tensor | None = None                      # (N,)   None where the queries are given
    seconds: dict[str, float] = field(default_factory=dict)      # by phase


def ask(game: "Game", step: int, mine: slice) -> Round:
    """The queries of one process: q ~ pi_Ch(q) = pi(q | <cp>), or, in rlpt and grpo, given ones."""
    s = game.settings
    if game.texts:
        queries, golds, kinds, cut = map(list, zip(*rlpt.draw_episodes(game, step)[mine]))
        return Round(queries, golds, kinds, [], {"contexts": sum(cut)})
    if game.data:
        queries, golds = map(list, zip(*draw(game.data, s.queries, s.seed, step)[mine]))
        return Round(queries, golds, None, [], {})
    streams = seeds(s.seed, step, CHALLENGE, s.queries)[mine]
    with game.phase("challenge", game.policy):
        groups = sample(game.policy, [game.challenger_prompt] * len(streams), seeds=streams,
                        max_new_tokens=s.query_tokens, **game.sampling)
    rows = [row for (row,) in groups]
    # The query is all that was written, and nothing else.
    return Round([text_of(game.tokenizer, row) for row in rows], [None] * len(rows), None, rows, {})


def play(game: "Game", step: int) -> Round:
    """Algorithm 1 up to the update. What is random in it depends on the seed and the step alone."""
    s, G, context = game.settings, game.settings.answers, game.policy.config.max_position_embeddings
    mine, answered = ranks.slice_of(s.queries), ranks.slice_of(s.queries, G)
    game.phase.reset()
    r = ask(game, step, mine)
    with game.phase("solve", game.policy):         # a ~ pi_Sol(a|q) = pi(a | q as a user turn)
        fitted = fit(game.tokenizer, [(q,) for q in r.queries],
                     lambda q: [{"role": "user", "content": q}], context - s.answer_tokens)
        r.solver_prompts, r.queries = [ids for ids, _, _ in fitted], [q for _, (q,), _ in fitted]
        r.shortened["queries"] = sum(cut for _, _, cut in fitted)
        r.answer_rows = sample(game.policy, r.solver_prompts, num_samples=G,
                               seeds=seeds(s.seed, step, SOLVE, s.queries * G)[answered],
                               max_new_tokens=s.answer_tokens, **game.sampling)
        r.answers = [[text_of(game.tokenizer, row) for row in group] for group in r.answer_rows]
    with game.phase("judge" if s.verdict else "reward", game.scorer):
        score(game, step, r)                                                             # (n, G)
    if s.self_reward:
        with game.phase("judge", game.judge):
            judge(game, step, r, answered)                                               # (n, G)
    r = ranks.gather(r)                            # from here on every process knows all N queries
    r.seconds = game.phase.seconds
    r.kept = torch.tensor([not (game.world and game.world.is_held_out(q)) for q in r.queries])
    R, R_Q = s.reward_scale * r.R[r.kept], None if r.R_Q is None else r.R_Q[r.kept]
    r.A_sol = torch.zeros_like(r.R)                                                      # (N, G)
    r.A_sol[r.kept] = lsp.solver_advantages(R, R_Q)                                      # Eq. 3
    if r.query_rows:
        r.A_ch = torch.zeros(len(r.queries))                                             # (N,)
        if len(R) > 1:
            r.A_ch[r.kept] = lsp.challenger_advantages(R, R_Q)                           # Eq. 3
    return r


def nonce(s: Settings, step: int) -> str:
    """A number of this step that no text can know, for a judge's prompt with a {nonce}."""
    return str(seeds(s.seed, step, NONCE, 1)[0] % 10**6)


def score(game: "Game", step: int, r: Round):
    """R(q, a), in rlpt the judge's verdict: R (n, G) and, for a verdict, what was said."""
    s, G = game.settings, game.settings.answers
    pairs = [(q, a, gold) for q, group, gold in zip(r.queries, r.answers, r.golds) for a in group]
    stopped = torch.tensor([row.stopped for group in r.answer_rows for row in group])
    if s.verdict:
        game.reward.seed, game.reward.nonce = s.seed, nonce(s, step)
    r.R = rewards.score(game.reward, *map(list, zip(*pairs)), stopped).view(-1, G)       # (n, G)
    r.judgements = list(game.reward.records) if s.verdict else []
    r.shortened["rewarded"] = getattr(game.reward, "shortened", 0)


def judge(game: "Game", step: int, r: Round, answered: slice):
    """The self-reward R_Q(q, a): R_Q (n, G) and what the judge said to each pair. A greedy judge is
    asked once about equal pairs."""
    s, G = game.settings, game.settings.answers
    pairs = [(q, a) for q, group in zip(r.queries, r.answers) for a in group]
    streams = seeds(s.seed, step, JUDGE, s.queries * G)[answered]
    sampled = s.judge_temperature > 0 and s.self_reward == "generate"
    number = dict(enumerate(pairs)) if sampled else dict.fromkeys(pairs)
    distinct = list(number.values()) if sampled else list(number)
    at = list(range(len(pairs))) if sampled else [distinct.index(pair) for pair in pairs]
    scores, records = rewards.self_reward(
        game.judge, game.judge_tokenizer, *map(list, zip(*distinct)), prompt=game.judge_prompt,
        reading=s.self_reward, temperature=s.judge_temperature, max_new_tokens=s.judge_tokens,
        seeds=streams[:len(distinct)], batch_tokens=s.batch_tokens, nonce=nonce(s, step))
    r.R_Q = rewards.fill_unparsed(scores[at].view(-1, G))                                # (n, G)
    r.judgements = [records[i] for i in at]
    r.shortened["judged"] = sum(record["shortened"] for record in records)


# ---------------------------------------------------------------- update

@dataclass
class Row:
    """A completion on its way into the loss."""
    prompt: list[int]
    completion: Completion
    advantage: float
    ref_logp: list[float] | None = None        # one a token, from reference_log_probs()


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up to --learning-rate, then linear decay to --final-lr-share of it at the end."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / (s.warmup + 1)
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.learning_rate * (1 - done * (1 - s.final_lr_share))


def update(game: "Game", optimizer: MasterAdamW, r: Round, step: int) -> dict:
    """One gradient step on L = L_Sol + alpha_Ch * L_Ch; returns its metrics. Where the gradient is
    not finite, nothing moves, and "faults" names the samples with such a reward or log-prob."""
    s, count, rate = game.settings, int(r.kept.sum()), learning_rate(game.settings, step)
    mine = [n for n in range(len(r.queries))[ranks.slice_of(len(r.queries))] if r.kept[n]]
    solver = [Row(r.solver_prompts[n], completion, A) for n in mine
              for completion, A in zip(r.answer_rows[n], r.A_sol[n].tolist())]
    challenger = [Row(game.challenger_prompt, r.query_rows[n], r.A_ch[n].item())
                  for n in mine if r.query_rows]
    if s.beta:
        with game.phase("reference", game.reference):
            reference_log_probs(game, solver + challenger)
    with game.phase("update", game.policy):
        sol = accumulate(game, solver, 1.0, count * s.answers)                           # Eq. 4
        ch = accumulate(game, challenger, s.alpha_ch, count)                             # Eq. 5
        sol, ch = ranks.total(sol), ranks.total(ch)
        norm = optimizer.step(rate, s.grad_clip) if count else 0.0
    loss = sol["loss"] + s.alpha_ch * ch["loss"]
    faults = [] if math.isfinite(norm) else non_finite(r)
    mean = lambda key, per, sums: sums[key] / sums[per] if sums[per] else None
    entropy = lambda sums: -sums["logp"] / sums["tokens"] if sums["tokens"] else None
    tokens = sol["tokens"] + ch["tokens"]
    return {
        "loss": loss if not faults else None,
        "kl_solver": mean("kl", "sequences", sol) if s.beta else None,
        "kl_challenger": mean("kl", "sequences", ch) if s.beta else None,
        "entropy_solver": entropy(sol), "entropy_challenger": entropy(ch),
        "logp_gap": (sol["gap"] + ch["gap"]) / tokens if tokens else None,
        "grad_norm": norm, "skipped": bool(faults), "faults": faults, "learning_rate": rate,
    }


def non_finite(r: Round) -> list[dict]:
    """The samples with a reward or log-prob that is not finite, counted from 1 in the order of
    samples.jsonl (answer None: the query itself); their sum, where each of them is finite."""
    faults, finite = [], lambda row: math.isfinite(sum(row.logp))
    for n in r.kept.nonzero()[:, 0].tolist():
        if r.query_rows and not finite(r.query_rows[n]):
            faults.append({"query": n + 1, "answer": None, "what": "log-prob"})
        for g, (row, reward) in enumerate(zip(r.answer_rows[n], r.R[n].tolist()), 1):
            if not math.isfinite(reward) or not finite(row):
                what = "log-prob" if math.isfinite(reward) else "reward"
                faults.append({"query": n + 1, "answer": g, "what": what})
    everything = {"query": None, "answer": None, "what": "gradient of all samples together"}
    return faults or [everything]


def token_log_probs(model: Llama, rows: list[Row], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the rows' completion tokens (B, T), 0 beyond their ends, and the mask (B, T)."""
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
    which = [prompts.index(tuple(row.prompt)) for row in rows]
    # The last token, a stop token or the one before the limit, predicts nothing that is needed.
    rests = [row.completion.tokens[:-1] for row in rows]
    hidden = shared_forward(model, prompts, which, rests)                                # (B, T, D)
    tokens, lengths = pad([row.completion.tokens for row in rows], "cpu")                # (B, T)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]                              # (B, T)
    # Chosen by number, and counted on the host: a mask on the GPU would have to be waited for.
    at = mask.flatten().nonzero()[:, 0].to(hidden.device)                                # (M,)
    logp = log_probs(model, hidden.flatten(0, 1)[at], tokens[mask].to(hidden.device),
                     temperature=temperature)                                            # (M,)
    padded = logp.new_zeros(mask.numel()).scatter(0, at, logp).view(mask.shape)          # (B, T)
    return padded, mask.to(hidden.device)


def micro_batches(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    """The rows in passes of so many padded tokens: distinct prompts, and completions. Completions
    of like length go together, for little padding; those of one prompt share it."""
    def padded(rows: list[Row]) -> int:
        prompts = {tuple(row.prompt) for row in rows}
        return (len(prompts) * max(map(len, prompts))
                + len(rows) * max(len(row.completion.tokens) for row in rows))
    waiting = sorted(rows, key=lambda row: len(row.completion.tokens))
    while waiting:
        yield take_batch(waiting, padded, tokens)


@torch.no_grad()
def reference_log_probs(game: "Game", rows: list[Row]):
    """Store in each row its completion's log-probs under the reference.

    A pass of its own before the update's, so that the reference need not be on the GPU with the
    gradients; in the same micro-batches, so that both sides of the KL round alike.
    """
    batches = list(micro_batches(rows, game.settings.micro_batch_tokens))
    scored = [token_log_probs(game.reference, batch, game.settings.temperature)[0]
              for batch in batches]                                                      # (B, T)
    for batch, logp in zip(batches, scored):
        for row, line in zip(batch, logp.tolist()):
            row.ref_logp = line[:len(row.completion.tokens)]


def batch_loss(policy: Llama, batch: list[Row], s: Settings, count: int) -> tuple[Tensor, dict]:
    """Eq. 4 or 5 of a micro-batch, `count` rows being in the whole step; statistics as sums."""
    logp, mask = token_log_probs(policy, batch, s.temperature)                           # (B, T)
    ref_logp = None
    if s.beta:
        ref_logp, _ = pad([row.ref_logp for row in batch], logp.device, logp.dtype)      # (B, T)
    advantages = logp.new_tensor([row.advantage for row in batch])                       # (B,)
    loss, sums = lsp.policy_loss(logp, ref_logp, advantages, mask, beta=s.beta, kl=s.kl,
                                 count=count)
    sampled, _ = pad([row.completion.logp for row in batch], logp.device, logp.dtype)    # (B, T)
    gap = ((logp.detach() - sampled).abs() * mask).sum()
    return loss, sums | {"gap": gap, "loss": loss.detach()}


def accumulate(game: "Game", rows: list[Row], weight: float, count: int | None = None) -> Counter:
    """Add the gradient of weight * (Eq. 4 or 5) over these rows to the policy's; return sums.

    With beta above 0, reference_log_probs() has been here before. The loss is normalised by the
    number of all rows before it is split into micro-batches, so that their size changes nothing
    (test_micro_batch_size_changes_no_gradient). count: all rows of the step, where these are one
    process's (default: these are all).
    """
    s, sums = game.settings, Counter()
    count = len(rows) if count is None else count
    rows = [row for row in rows if row.completion.stopped or not s.mask_truncated]
    for batch in micro_batches(rows, s.micro_batch_tokens):
        loss, statistics = batch_loss(game.policy, batch, s, count)
        (weight * loss).backward()
        sums.update(statistics)
    if not sums:
        return sums
    values = torch.stack(list(sums.values())).tolist()       # the only wait for the GPU's results
    return Counter(dict(zip(sums, values)))


# ---------------------------------------------------------------- what a run plays with

@dataclass
class Game:
    """What play() and update() need: models, tokenizers, prompts and the reward."""
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
    texts: Texts | None = None             # rlpt: what episodes are made of
    episode_prompts: dict = field(default_factory=dict)    # "asr", "msr": with {context}, {next}
    world: ModuleType | None = None        # the embedded world, where it is played
    sources: dict[str, Path | Texts] = field(default_factory=dict)     # what was read, by flag
    phase: Phases = field(default_factory=Phases)

    @property
    def scorer(self) -> Llama | None:
        """The reward's model, where it has one."""
        return getattr(self.reward, "model", None)

    @property
    def sampling(self) -> dict:
        """How both roles speak."""
        return {"temperature": self.settings.temperature, "stop_ids": self.tokenizer.stop_ids,
                "batch_tokens": self.settings.batch_tokens}


def set_up(s: Settings, checkpoint: Path | None = None) -> Game:
    """Read and load all that the settings name; small files first, so that errors come early.

    checkpoint: the policy of a run that is resumed.
    """
    device, dtype = pick_device(s.device)
    ranks.check_gpu(device)
    if ranks.world() > s.queries:
        raise InputError(f"{ranks.world()} processes and {s.queries} queries a step: each process "
                         "needs a query, --queries")
    stories = s.algo == "rlpt" and s.text == tiny_world.STORIES
    world = tiny_world if s.reward == "tiny" or stories else None
    if world and device.type == "cpu":
        torch.set_num_threads(1)           # matrices this small: threads would wait for each other
    if s.gpu_memory and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, s.gpu_memory * 1e9 / whole))
    home = torch.device("cpu") if s.offload else device          # where models rest
    load = lambda path, dtype=dtype: load_model(path, device=home, dtype=dtype)
    Tokenizer.date_string = s.date_string
    start = find_model(s.model)
    reference_path = find_model(s.reference) if s.reference else start
    judge_path = find_model(s.judge) if s.judge else reference_path
    judged = rewards.SELF_REWARD if s.self_reward else (
        rewards.VERDICT if s.reward == "verdict" else None)
    data, held_out = [], []
    read = lambda file: read_data(file, gold=rewards.NEED_GOLD.get(s.reward), boxed=rewards.boxed)
    if s.algo == "grpo" and world and s.prompts in world.MIXES:
        data = world.prompts(s.prompts, min(s.queries * s.steps, 10**5), seed=s.seed)
    elif s.algo == "grpo":
        data = read(s.prompts)
    if s.eval_prompts:
        held_out = read(s.eval_prompts)
    tokenizer = Tokenizer(start)
    context = read_config(start).max_position_embeddings
    check_data(s.prompts, data, tokenizer, context - s.answer_tokens)
    check_data(s.eval_prompts, held_out, tokenizer, context - s.answer_tokens)
    game = Game(s, None, tokenizer, rewards.CHECKS.get(s.reward), data=data, held_out=held_out,
                world=world)
    game.sources = {"--model": start}
    for flag in ("prompts", "eval_prompts"):
        if getattr(s, flag) and not (world and getattr(s, flag) in world.MIXES):
            game.sources["--" + flag.replace("_", "-")] = Path(getattr(s, flag))
    if s.algo == "rlpt":
        rlpt.open_texts(game, start, context)
    elif s.algo != "grpo":
        game.sources["--challenger-prompt"] = Path(s.challenger_prompt)
        given = [name for name in ("task", "template") if getattr(s, name) != "None"]
        prompt = fill(read_prompt(s.challenger_prompt, given), task=s.task, template=s.template)
        game.challenger_prompt = opening(tokenizer, s.challenger_prompt, prompt, s.query_tokens,
                                         context)
        opening(tokenizer, "--query-tokens and --answer-tokens", "",
                s.query_tokens + s.answer_tokens, context)
    if judged:
        prompt_path = Path(s.self_reward_prompt) if s.self_reward else prompt_file(
            judge_path, "verdict_strict" if s.strict else "verdict")
        flag = "--self-reward-prompt" if s.self_reward else "the judge's prompt"
        game.sources |= {flag: prompt_path, "--judge": judge_path}
        game.judge_tokenizer = tokenizer if judge_path == start else Tokenizer(judge_path)
        game.judge_prompt = read_prompt(prompt_path, judged.places)
        opening(game.judge_tokenizer, prompt_path,
                fill(game.judge_prompt, **dict.fromkeys(judged.places, "")), s.judge_tokens,
                read_config(judge_path).max_position_embeddings)
    if not game.reward and s.algo != "rlpt":
        game.sources["--reward"] = find_model(s.reward)
        game.reward = rewards.RewardModel(game.sources["--reward"], device=home, dtype=dtype,
                                          batch_tokens=min(16384, s.batch_tokens))
    shared = judged and judge_path == reference_path
    game.reference = load(reference_path) if s.beta or shared else None
    if game.reference:
        game.sources["--reference"] = reference_path
    if judged:
        game.judge = game.reference if shared else load(judge_path)
    if s.algo == "rlpt":
        game.reward = rlpt.Verdict(
            game.judge, game.judge_tokenizer, game.judge_prompt, reading=s.verdict,
            temperature=s.judge_temperature, max_new_tokens=s.judge_tokens,
            batch_tokens=s.batch_tokens, min_prediction=s.min_prediction, least=s.min_segment,
            world=world if s.reward == "tiny" else None)
    # In its masters' precision; MasterAdamW makes it bf16.
    game.policy = load(checkpoint or start, torch.float32)
    game.policy.checkpointing = s.checkpointing
    for flag in ("policy", "reference", "judge"):
        model = getattr(game, flag)
        if model and model.config.scalar_head:
            raise InputError(f"the {flag} is a reward model, which cannot write")
    if s.beta and game.reference.config.vocab_size != game.policy.config.vocab_size:
        raise InputError(f"--reference {s.reference}: another vocabulary than the policy's")
    if s.offload:
        game.phase.stage = Stage(device, dtype)
        for model in {game.scorer, game.reference, game.judge} - {None}:
            rest(model)                        # the policy: MasterAdamW
    return game


def role_paths(s: Settings, *, weights: bool = True) -> dict[str, Path]:
    """The directory of each model that a run holds; what two roles share is there once.
    weights: whether they are fetched with their weights."""
    path = lambda name: find_model(name, weights=weights)
    policy = path(s.model)
    reference = path(s.reference) if s.reference else policy
    judge = path(s.judge) if s.judge else reference
    shared, found = bool(s.reading) and judge == reference, {"policy": policy}
    if s.beta or shared:
        found["reference"] = reference
    if s.reading and not shared:
        found["judge"] = judge
    if s.reward not in rewards.CHECKS and not s.verdict:
        found["reward model"] = path(s.reward)
    return found


# What the memory budget executes on meta tensors (plumbing/budget.py).
MEASURED = SimpleNamespace(Llama=Llama, Row=Row, Completion=Completion, pick=pick,
                           last_hidden=rewards.last_hidden, micro_batches=micro_batches,
                           token_log_probs=token_log_probs, batch_loss=batch_loss)


def plan_of(s: Settings) -> Plan:
    """What the run needs of memory: measured with the functions that it will call."""
    paths = role_paths(s, weights=False)
    return Plan(s, {role: read_config(path) for role, path in paths.items()}, MEASURED)


# ---------------------------------------------------------------- the loop

def train(s: Settings, preset: dict, given=()):
    """Begin a run, or go on with one, and play until the last step, a signal or a fault."""
    plan = plan_of(s)
    s = s if s.resume else plan.sized(s, given)
    if s.dry_run:
        sys.exit(plan.dry_run(s))

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
        print(plan.opening(s))
        now = {"torch": torch.__version__, "device": device.type, "ranks": ranks.world()}
        state = ranks.first(lambda: run.restore(s.keep, **now))
        if run.checkpoint:
            optimizer.load(run.checkpoint / "state", state["updates"])
        if s.resume:
            print(f"resuming {run.folder} after step {state['step']}", flush=True)
        play_on(game, optimizer, run, state, plan)


@torch.no_grad()
def can_play(game: Game) -> bool:
    """Whether the policy's logits are finite: no other model is worth a checkpoint."""
    game.phase.call(game.policy)
    ids = game.tokenizer.chat([{"role": "user", "content": "a"}])
    tokens = torch.tensor([ids], device=game.policy.model.embed_tokens.weight.device)
    return game.policy.logits(game.policy(tokens)[:, -1]).isfinite().all().item()


def play_on(game: Game, optimizer: MasterAdamW, run: runs.Run, state: dict, plan: Plan):
    """The steps that are left. Only a whole step is ever saved; one that was cut short is played
    again, and draws the same random numbers, which depend on the seed and the step alone."""
    s, out = game.settings, run.folder
    budget_gb = {phase: sum(parts.values()) / 1e9 for phase, parts in plan.phases(s).items()}
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
                "budget_gb": budget_gb, "tokens_per_second": log.speed(game, r)}
            recent.append(r.queries)
            run.append("metrics.jsonl", [m])
            run.append("samples.jsonl", list(log.samples(r, step)))
            print(log.step_line(s, m), flush=True)
            if log.is_large(game.policy.config):
                print(log.speed_line(m), flush=True)
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
    s, preset = resolve(given)
    train(s, preset, preset | given)


if __name__ == "__main__":
    cli.run_script(lambda: ranks.together(main))
