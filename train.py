"""Train a Llama by Language Self-Play (arXiv 2509.07414, Algorithm 1), or by GRPO on a file of prompts.

    python train.py --model llama-3.2-3b                          # LSP at the paper's settings, on one GPU
    python train.py --model llama-3.2-3b --algo lsp-zero          # the bare zero-sum game, no self-reward
    python train.py --model llama-3.2-3b --algo grpo --prompts alpaca.json
    python train.py --model smollm2-135m --algo grpo --prompts gsm8k.jsonl --reward exact
    python train.py --model runs/A/checkpoint --algo grpo --prompts alpaca.json    # a second stage
    python train.py --model smollm2-135m --watch                  # one round as a transcript, no update

Departures from the paper: KL as k2, since the printed term pulls nowhere (lsp.py; --kl paper for the letter); GRPO is
Eq. 4 on given prompts: no division by the standard deviation, no clipping (every batch is used once, so it could
never bind). Shapes: N queries, G answers a query, B rows of a micro-batch, L their longest sequence, T their longest
completion, M completion tokens of a micro-batch, D hidden size.
"""
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lsp
import rewards
import runs
from model import HERE, InputError, Llama, Tokenizer, fill, find_model, load_model, pick_device, read_json, read_prompt
from model import save_model
from sample import Completion, pad, sample, take_batch


# ---------------------------------------------------------------- settings

def setting(default, help, least=None, choices=None):
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


@dataclass
class Settings:
    """Everything a run depends on. The paper's Table 1 where it speaks; where it is silent, see the help texts."""
    model: str | None = setting(None, "policy: a known name, a directory, a hub id, or a run's checkpoint")
    algo: str = setting("lsp", "lsp: with self-reward; lsp-zero: without; grpo: on --prompts",
                        choices=("lsp", "lsp-zero", "grpo"))
    reward: str = setting("skywork-v2-3b", "R: a reward model's name, directory or hub id, or exact (numbers; needs "
                          "gold answers)")
    reward_scale: float = setting(1.0, "R is multiplied by this; it is added to the self-reward's 0..7", 0)
    reference: str | None = setting(None, "frozen model of the KL term (default: the starting model)")
    judge: str | None = setting(None, "frozen model that gives the self-reward (default: the reference)")
    self_reward: str | None = setting(None, "how the judge is read: generate (it writes, we parse; the paper, and the "
                                      "default) or expected (expectation over the score's token)",
                                      choices=rewards.READINGS)
    judge_temperature: float = setting(0.0, "0: greedy, so that one pair has one score", 0)
    task: str = setting("None", "fills {task} of the Challenger's prompt; None: its own judgement")
    template: str = setting("None", "fills {template} of the Challenger's prompt")
    challenger_prompt: str | None = setting(None, "file (default: the model's own prompts/challenger.txt, else ours)")
    self_reward_prompt: str | None = setting(None, "file (default: the model's own prompts/self_reward.txt, else ours)")
    prompts: str | None = setting(None, "grpo: JSON list or JSON lines with instruction, question, problem or prompt")

    queries: int = setting(8, "N, queries a step", 1)
    answers: int = setting(8, "G, answers a query (the paper does not say)", 2)
    steps: int = setting(500, "iterations, one gradient step each", 1)
    beta: float = setting(0.05, "weight of the KL term; 0: no reference model", 0)
    kl: str = setting("k2", "KL estimator, see lsp.py", choices=lsp.KL_ESTIMATORS)
    alpha_ch: float = setting(1.0, "weight of the Challenger's loss (the paper does not say)", 0)
    temperature: float = setting(1.0, "of queries and answers, in sampling and log-probs alike")
    query_tokens: int = setting(256, "longest query", 1)
    answer_tokens: int = setting(512, "longest answer", 1)
    judge_tokens: int = setting(256, "longest judgement", 1)
    mask_truncated: bool = setting(False, "leave cut-off queries and answers out of the loss")

    learning_rate: float = setting(3e-6, "of AdamW at its highest", 0)
    final_lr_share: float = setting(0.0, "share of the learning rate that the linear decay ends at", 0)
    warmup: int = setting(0, "steps of linear warm-up", 0)
    weight_decay: float = setting(0.0, "AdamW's", 0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: any", 0)
    micro_batch_tokens: int = setting(8192, "padded tokens in one forward and backward pass; changes no gradient", 1)
    batch_tokens: int = setting(65536, "tokens that the sampler's cache holds at once; changes no completion", 1)

    eval_prompts: str | None = setting(None, "held-out prompts: reward, and win-rate against the starting model")
    eval_every: int = setting(50, "steps between evaluations", 1)
    save_every: int = setting(50, "steps between checkpoints", 1)
    seed: int = setting(0, "of everything random", 0)
    out: str | None = setting(None, "run folder, new (default: runs/MODEL-ALGO-SEED)")
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    watch: bool = setting(False, "play one round, print it as a transcript, update nothing")


# Command line, over the model's preset, over the algorithm's preset, over the defaults above.
ALGOS = {"lsp": {"self_reward": "generate"}, "lsp-zero": {}, "grpo": {"learning_rate": 1e-6}}
MODELS = {"llama-3.2-1b": {"reward": "skywork-v2-1b"}}


def resolve(given: dict) -> tuple[Settings, dict]:
    """Settings from the flags that were given, and the model's preset (saved with its checkpoints)."""
    name = given.get("model")
    if name is None:
        raise InputError("--model is missing: a known name, a directory or a hub id")
    path = find_model(name)
    preset = MODELS.get(name, {})
    if (path / "training.json").exists():
        preset = preset | read_json(path / "training.json")
    unknown = [key for key in preset if key not in Settings.__dataclass_fields__]
    if unknown:
        raise InputError(f"{path / 'training.json'}: no such setting: {unknown[0]}")
    s = Settings(**ALGOS[given.get("algo", "lsp")] | preset | given)
    if s.algo != "lsp" and "self_reward" not in given:
        s.self_reward = None
    for kind in ("challenger", "self_reward"):
        own = path / f"prompts/{kind}.txt"
        if getattr(s, f"{kind}_prompt") is None:
            setattr(s, f"{kind}_prompt", str(own if own.exists() else HERE / f"prompts/{kind}.txt"))
    check(s)
    return s, preset


def check(s: Settings):
    """Settings that cannot work, each with its reason."""
    runs.check_ranges(s)
    if not s.temperature > 0:
        raise InputError(f"--temperature {s.temperature}: training needs samples from a distribution: above 0")
    if s.algo == "grpo" and not s.prompts:
        raise InputError("--algo grpo learns from data: give --prompts FILE")
    if s.algo != "grpo" and s.prompts:
        raise InputError(f"--prompts is for --algo grpo; in {s.algo} the Challenger writes the queries")
    if s.algo != "grpo" and s.queries < 2:
        raise InputError("--queries 1: the Challenger's advantage compares queries with each other: at least 2")
    if s.algo != "grpo" and s.reward in rewards.VERIFIABLE:
        raise InputError(f"--reward {s.reward} needs gold answers, and a Challenger's query has none: --algo grpo")
    if s.algo != "lsp" and s.self_reward:
        raise InputError(f"--self-reward is for --algo lsp; {s.algo} has none")


# ---------------------------------------------------------------- the players

@dataclass
class Game:
    """What play() needs: models, tokenizers, prompts and the reward."""
    settings: Settings
    policy: Llama
    tokenizer: Tokenizer
    reference: Llama | None                # None where beta is 0
    judge: Llama | None                    # None without self-reward
    judge_tokenizer: Tokenizer | None
    reward: object                         # (queries, answers, golds) -> (M,)
    challenger_prompt: list[int] | None    # <cp> as token ids; None with grpo
    judge_prompt: str | None               # with {instruction} and {response} to fill
    data: list[tuple[str, str | None]]     # grpo: (query, gold); else empty


def set_up(s: Settings) -> Game:
    device, dtype = pick_device(s.device)
    load = lambda path, dtype=dtype: load_model(path, device=device, dtype=dtype)
    start = find_model(s.model)
    reference_path = find_model(s.reference) if s.reference else start
    judge_path = find_model(s.judge) if s.judge else reference_path
    learned = s.reward not in rewards.VERIFIABLE
    data = read_data(s.prompts, gold=not learned) if s.prompts else []
    tokenizer = Tokenizer(start)
    judge_tokenizer = Tokenizer(judge_path) if s.self_reward else None
    judge_prompt = read_prompt(s.self_reward_prompt) if s.self_reward else None
    challenger_prompt = None
    if s.algo != "grpo":
        instructions = fill(read_prompt(s.challenger_prompt), task=s.task, template=s.template)
        challenger_prompt = tokenizer.chat([{"role": "user", "content": instructions}])
    reward = (rewards.RewardModel(find_model(s.reward), device=device, dtype=dtype) if learned
              else rewards.VERIFIABLE[s.reward])
    reference = load(reference_path) if s.beta or (s.self_reward and judge_path == reference_path) else None
    judge = (reference if judge_path == reference_path else load(judge_path)) if s.self_reward else None
    policy = load(start, torch.float32)
    if reference is not None and reference.config.vocab_size != policy.config.vocab_size:
        raise InputError(f"--reference {s.reference}: another vocabulary than the policy's; their KL means nothing")
    return Game(s, policy, tokenizer, reference, judge, judge_tokenizer, reward, challenger_prompt, judge_prompt, data)


def read_data(path: str, *, gold: bool) -> list[tuple[str, str | None]]:
    """Queries with their gold answers (None without one) from a JSON list or JSON lines.

    A query is `instruction` (with `input` below it), `question`, `problem` or `prompt`; the gold answer is `answer`.
    InputError names the line, or the entry of a list; with `gold`, also where an answer holds no number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    # split("\n") and not splitlines(): JSON strings may hold U+2028, which splitlines() takes for a line's end.
    listed = text.lstrip().startswith("[")
    pieces = [text] if listed else text.split("\n")
    entries = []
    for number, piece in enumerate(pieces, 1):
        if piece.strip():
            try:
                value = json.loads(piece)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {getattr(error, 'lineno', 1) if listed else number}: {error}") from None
            entries += ([(f"entry {i}", v) for i, v in enumerate(value, 1)] if listed
                        else [(f"line {number}", value)])
    data = []
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise InputError(f"{path}, {where}: expected an object, found {type(entry).__name__}")
        key = next((k for k in ("instruction", "question", "problem", "prompt") if isinstance(entry.get(k), str)), None)
        if key is None:
            raise InputError(f"{path}, {where}: no field instruction, question, problem or prompt "
                             f"(fields found: {', '.join(entry) or 'none'})")
        extra = entry.get("input") if key == "instruction" else None
        query = entry[key] + (f"\n\n{extra}" if extra else "")
        answer = None if entry.get("answer") is None else str(entry["answer"])
        if gold and (answer is None or rewards.last_number(answer) is None):
            raise InputError(f"{path}, {where}: the reward needs a gold answer with a number in `answer`")
        data.append((query, answer))
    if not data:
        raise InputError(f"{path}: no prompts in it")
    return data


def generator(seed: int, step: int, purpose: int) -> torch.Generator:
    """A fresh generator for each step and purpose: no state to save, and a resumed run draws the same numbers."""
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


CHALLENGE, SOLVE, JUDGE, ORDER = range(4)                                    # purposes


# ---------------------------------------------------------------- one round: challenge, solve, score, advantages

@dataclass
class Round:
    """One round of play. Texts and rewards; N queries, G answers each."""
    queries: list[str]
    golds: list[str | None]
    query_rows: list[Completion]           # (N), empty: from data
    solver_prompts: list[list[int]]        # (N)
    answer_rows: list[list[Completion]]    # (N, G)
    answers: list[list[str]]               # (N, G)
    R: Tensor                              # (N, G) before scaling
    R_Q: Tensor | None                     # (N, G) unread ones filled in
    judgements: list[dict] | None          # (N * G)
    A_sol: Tensor                          # (N, G)
    A_ch: Tensor | None                    # (N,)
    seconds: dict[str, float]              # by phase
    tokens: dict[str, int]                 # by phase


def play(game: Game, step: int) -> Round:
    """Algorithm 1 up to the update: the Challenger asks, the Solver answers, reward and judge score, advantages."""
    s, G = game.settings, game.settings.answers
    seconds, tokens = {}, {}
    clock = time.perf_counter()

    def lap(phase, count=0):
        nonlocal clock
        now = time.perf_counter()
        seconds[phase], tokens[phase], clock = now - clock, count, now

    def text_of(tokenizer, completion):
        return tokenizer.decode(completion.tokens[:-1] if completion.stopped else completion.tokens).strip()

    speak = dict(temperature=s.temperature, stop_ids=game.tokenizer.stop_ids, batch_tokens=s.batch_tokens)

    # Challenge: q ~ pi_Ch(q) = pi(q | challenger prompt). The query is what was written, all of it, and nothing else.
    if game.data:
        query_rows = []
        queries, golds = zip(*draw(game.data, s.queries, s.seed, step))
    else:
        (query_rows,) = sample(game.policy, [game.challenger_prompt], num_samples=s.queries,
                               max_new_tokens=s.query_tokens, generator=generator(s.seed, step, CHALLENGE), **speak)
        queries, golds = [text_of(game.tokenizer, row) for row in query_rows], [None] * s.queries
        lap("challenge", sum(len(row.tokens) for row in query_rows))

    # Solve: a ~ pi_Sol(a|q) = pi(a | q as a plain user turn), G times.
    solver_prompts = [game.tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    answer_rows = sample(game.policy, solver_prompts, num_samples=G, max_new_tokens=s.answer_tokens,
                         generator=generator(s.seed, step, SOLVE), **speak)
    answers = [[text_of(game.tokenizer, row) for row in group] for group in answer_rows]
    lap("solve", sum(len(row.tokens) for group in answer_rows for row in group))

    # Score: R(q, a), and with --algo lsp the self-reward R_Q(q, a) from the judge.
    pairs = ([q for q in queries for _ in range(G)], [a for group in answers for a in group])
    R = game.reward(*pairs, [g for g in golds for _ in range(G)]).view(-1, G)                # (N, G)
    if s.reward in rewards.VERIFIABLE:
        R = R * torch.tensor([[row.stopped for row in group] for group in answer_rows])      # cut off: not an answer
    lap("reward")
    R_Q, judgements = None, None
    if game.judge is not None:
        scores, judgements = rewards.self_reward(
            game.judge, game.judge_tokenizer, *pairs, prompt=game.judge_prompt, reading=s.self_reward,
            temperature=s.judge_temperature, max_new_tokens=s.judge_tokens,
            generator=generator(s.seed, step, JUDGE), batch_tokens=s.batch_tokens)
        R_Q = rewards.fill_unread(scores.view(-1, G))                                        # (N, G)
        lap("judge")

    A_sol = lsp.solver_advantages(s.reward_scale * R, R_Q)                                   # (N, G)  Eq. 3
    A_ch = lsp.challenger_advantages(s.reward_scale * R, R_Q) if query_rows else None        # (N,)    Eq. 3
    return Round(list(queries), list(golds), query_rows, solver_prompts, answer_rows, answers,
                 R, R_Q, judgements, A_sol, A_ch, seconds, tokens)


def draw(data: list, count: int, seed: int, step: int) -> list:
    """The step's `count` entries: every entry once an epoch, in an order of its own for each epoch."""
    at = range(step * count, (step + 1) * count)
    orders = {epoch: torch.randperm(len(data), generator=generator(seed, epoch, ORDER)).tolist()
              for epoch in {i // len(data) for i in at}}
    return [data[orders[i // len(data)][i % len(data)]] for i in at]


# ---------------------------------------------------------------- update

@dataclass
class Row:
    """One completion on its way into the loss."""
    prompt: list[int]
    completion: Completion
    advantage: float


def completion_logp(model: Llama, rows: list[Row], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the rows' completion tokens under the model, (B, T), 0 beyond their ends, and the mask (B, T)."""
    device = model.model.embed_tokens.weight.device
    tokens, _ = pad([row.prompt + row.completion.tokens for row in rows], device)            # (B, L)
    start = torch.tensor([len(row.prompt) for row in rows], device=device)                   # (B,)
    length = torch.tensor([len(row.completion.tokens) for row in rows], device=device)       # (B,)
    mask = torch.arange(max(len(row.completion.tokens) for row in rows), device=device) < length[:, None]   # (B, T)
    b, t = mask.nonzero(as_tuple=True)                                                       # (M,) each
    at = start[b] + t                                                                        # (M,) place in the row
    hidden = model(tokens)[b, at - 1]                  # (M, D)   the state before a token is the one that predicts it
    logp = model.log_probs(hidden, tokens[b, at], temperature=temperature)                   # (M,)
    return logp.new_zeros(mask.shape).index_put((b, t), logp), mask


def accumulate(game: Game, rows: list[Row], weight: float) -> Counter:
    """Add the gradient of weight * (Eq. 4 or 5) over these rows to the policy's; returns statistics as sums.

    The loss is normalised by the number of all rows before it is cut into micro-batches, so their size changes
    nothing (test_micro_batch_size_changes_no_gradient).
    """
    s, sums = game.settings, Counter()
    count = len(rows)
    waiting = list(range(count))
    length = lambda i: len(rows[i].prompt) + len(rows[i].completion.tokens)
    waiting.sort(key=length)
    while waiting:
        batch = [rows[i] for i in take_batch(waiting, length, [0] * count, s.micro_batch_tokens)]
        logp, mask = completion_logp(game.policy, batch, s.temperature)                      # (B, T) twice
        ref_logp = None
        if s.beta:
            with torch.no_grad():
                ref_logp, _ = completion_logp(game.reference, batch, s.temperature)          # (B, T)
        advantages = torch.tensor([row.advantage for row in batch], device=logp.device)      # (B,)
        if s.mask_truncated:
            kept = torch.tensor([row.completion.stopped for row in batch], device=logp.device)
            advantages, mask = advantages * kept, mask & kept[:, None]
        loss, statistics = lsp.policy_loss(logp, ref_logp, advantages, mask, beta=s.beta, kl=s.kl, count=count)
        (weight * loss).backward()
        sampled = torch.zeros_like(logp)                                                     # (B, T)
        for out, row in zip(sampled, batch):
            out[:len(row.completion.logp)] = torch.tensor(row.completion.logp)
        gap = ((logp.detach() - sampled).abs() * mask).sum()
        sums.update({k: v.item() for k, v in statistics.items()} | {"gap": gap.item(), "loss": loss.item()})
    return sums


class MasterAdamW:
    """AdamW on fp32 master weights, which a bfloat16 policy follows.

    A bfloat16 weight of 0.02 moves in steps of about 1e-4, an AdamW step of 3e-6 would round to nothing
    (test_a_step_of_1e_6_moves_fp32_masters_but_not_bf16_weights). So masters, moments and the sum of the
    micro-batches' gradients are fp32, and the policy that plays and is differentiated is a rounded copy. An fp32
    policy is its own master.
    """

    def __init__(self, policy: Llama, dtype: torch.dtype, *, weight_decay: float):
        self.params = list(policy.parameters())
        self.masters = self.params
        if dtype != torch.float32:
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.params]
            for p, master in zip(self.params, self.masters):
                p.data = p.data.to(dtype)
                master.grad = torch.zeros_like(master)
                p.register_post_accumulate_grad_hook(lambda p, master=master: self._collect(p, master))
        self.adamw = torch.optim.AdamW(self.masters, betas=(0.9, 0.999), weight_decay=weight_decay)

    @staticmethod
    def _collect(p, master):
        master.grad += p.grad
        p.grad = None

    def step(self, learning_rate: float, clip: float) -> float:
        """One step; returns the gradient's norm before clipping. A norm that is not finite leaves all as it was."""
        norm = nn.utils.clip_grad_norm_(self.masters, clip or float("inf")).item()
        if np.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = learning_rate
            self.adamw.step()
            with torch.no_grad():
                for p, master in zip(self.params, self.masters):
                    if p is not master:
                        p.copy_(master)
        self.adamw.zero_grad(set_to_none=self.masters is self.params)
        return norm


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up to --learning-rate, then linear decay to --final-lr-share of it at the last step."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / (s.warmup + 1)
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.learning_rate * (1 - done * (1 - s.final_lr_share))


def update(game: Game, optimizer: MasterAdamW, r: Round, step: int) -> dict:
    """One gradient step on L = L_Sol + alpha_Ch * L_Ch; returns its metrics."""
    s = game.settings
    solver = [Row(prompt, completion, advantage)
              for prompt, group, row in zip(r.solver_prompts, r.answer_rows, r.A_sol.tolist())
              for completion, advantage in zip(group, row)]
    sol, ch = accumulate(game, solver, 1.0), None                                            # Eq. 4
    if r.query_rows:
        challenger = [Row(game.challenger_prompt, c, a) for c, a in zip(r.query_rows, r.A_ch.tolist())]
        ch = accumulate(game, challenger, s.alpha_ch)                                        # Eq. 5
    rate = learning_rate(s, step)
    norm = optimizer.step(rate, s.grad_clip)
    both = sol + (ch or Counter())
    mean = lambda sums, key, per: sums[key] / sums[per] if sums and sums[per] else None
    return {
        "loss": sol["loss"] + (s.alpha_ch * ch["loss"] if ch else 0.0),
        "kl_solver": mean(sol, "kl", "sequences") if s.beta else None,
        "kl_challenger": mean(ch, "kl", "sequences") if s.beta else None,
        "entropy_solver": -sol["logp"] / sol["tokens"] if sol["tokens"] else None,
        "entropy_challenger": -ch["logp"] / ch["tokens"] if ch and ch["tokens"] else None,
        "logp_gap": mean(both, "gap", "tokens"),
        "grad_norm": norm, "skipped": not np.isfinite(norm), "learning_rate": rate,
    }


# ---------------------------------------------------------------- records

def measure(s: Settings, r: Round) -> dict:
    """What a round says about the game; README.md tells what each means. None: this algorithm has no such thing."""
    N, G = r.R.shape
    rows = [row for group in r.answer_rows for row in group]
    share = lambda flags: sum(flags) / len(flags) if flags else None
    reasons = [j["reason"] for j in r.judgements] if s.self_reward == "generate" else []
    masses = [j["mass"] for j in r.judgements] if s.self_reward == "expected" else []
    failures = Counter(reason for reason in reasons if reason)
    return {
        "reward": r.R.mean().item(),
        "quality": None if r.R_Q is None else r.R_Q.mean().item(),
        "value_spread": r.R.mean(1).std(correction=0).item(),
        "flat_groups": (r.A_sol.abs().amax(1) < 1e-6).float().mean().item(),
        "challenger_advantage": None if r.A_ch is None else r.A_ch.abs().mean().item(),
        "distinct_queries": len(set(r.queries)) / N,
        "leaked_tags": share(["[Start Generation]" in q or "[End Generation]" in q for q in r.queries]),
        "query_length": share([len(row.tokens) for row in r.query_rows]),
        "answer_length": share([len(row.tokens) for row in rows]),
        "truncated_queries": share([not row.stopped for row in r.query_rows]),
        "truncated_answers": share([not row.stopped for row in rows]),
        "unread": share([reason is not None for reason in reasons]),
        "parse_failures": {reason: failures[reason] for reason in rewards.REASONS} if reasons else None,
        "judge_mass": share(masses),
    }


def step_line(s: Settings, m: dict) -> str:
    """The step's line on the screen: the few numbers that say whether the game goes well."""
    show = lambda x: "-" if x is None else f"{x:.2f}"
    unread = m["unread"] if m["judge_mass"] is None else 1 - m["judge_mass"]
    line = (f"step {m['step']:>{len(str(s.steps))}}/{s.steps}  R {show(m['reward'])}  R_Q {show(m['quality'])}"
            f"  ch-adv {show(m['challenger_advantage'])}  KL {show(m['kl_solver'])}|{show(m['kl_challenger'])}"
            f"  distinct {show(m['distinct_queries'])}  cut {show(m['truncated_answers'])}  unread {show(unread)}"
            f"  gap {'-' if m['logp_gap'] is None else format(m['logp_gap'], '.0e')}  {m['seconds']:.2f} s")
    if m["skipped"]:
        line += "  gradient not finite: update skipped"
    if unread is not None and unread > 0.5:
        line += "  self-reward mostly unread"
    return line


def samples(r: Round, step: int):
    """One record a query: everything that was said, scored and concluded."""
    N, G = r.R.shape
    for n in range(N):
        yield {
            "step": step, "query": r.queries[n], "gold": r.golds[n],
            "query_stopped": r.query_rows[n].stopped if r.query_rows else None,
            "challenger_advantage": None if r.A_ch is None else r.A_ch[n].item(),
            "answers": [{
                "answer": r.answers[n][g], "stopped": r.answer_rows[n][g].stopped, "reward": r.R[n, g].item(),
                "quality": None if r.R_Q is None else r.R_Q[n, g].item(), "advantage": r.A_sol[n, g].item(),
            } | (r.judgements[n * G + g] if r.judgements else {}) for g in range(G)]}


def transcript(s: Settings, r: Round) -> str:
    """A round for reading: query, answers, R, R_Q, advantages."""
    number = lambda x: "     -" if x is None else f"{x:6.2f}"
    lines = []
    for n, sample_ in enumerate(samples(r, 0), 1):
        lines += ["", f"query {n}/{len(r.queries)}   Challenger's advantage {number(sample_['challenger_advantage'])}"
                  + ("   (cut off)" if sample_["query_stopped"] is False else ""), indent(sample_["query"], "  ? ")]
        for a in sample_["answers"]:
            note = a.get("reason") or ""
            lines += [f"  R {number(a['reward'])}  R_Q {number(a['quality'])}{' filled in: ' + note if note else ''}"
                      f"  advantage {number(a['advantage'])}" + ("" if a["stopped"] else "  (cut off)"),
                      indent(a["answer"], "      ")]
    scale = "" if s.reward_scale == 1 else f" ({s.reward_scale:g} R + R_Q makes the Solver's reward)"
    return "\n".join(lines + ["", f"mean R {r.R.mean():.3f}{scale}" + (
        "" if r.R_Q is None else f", mean R_Q {r.R_Q.mean():.3f}")])


def indent(text: str, margin: str) -> str:
    return "\n".join(margin + line for line in text.split("\n"))


def evaluate(game: Game, data: list, start_answers: list[str] | None) -> tuple[dict, list[str]]:
    """Greedy answers to held-out prompts: mean reward, and win-rate against the starting model's stored answers.

    A win is a higher reward on the same prompt, a tie counts half. The reward is the run's own: an improvement here
    can still be the reward's weakness. start_answers None: these are the first ones.
    """
    s = game.settings
    prompts = [game.tokenizer.chat([{"role": "user", "content": q}]) for q, _ in data]
    rows = [c for (c,) in sample(game.policy, prompts, max_new_tokens=s.answer_tokens, temperature=0,
                                 stop_ids=game.tokenizer.stop_ids, batch_tokens=s.batch_tokens)]
    answers = [game.tokenizer.decode(c.tokens[:-1] if c.stopped else c.tokens).strip() for c in rows]
    queries, golds = zip(*data)
    ours, theirs = (game.reward(queries, a, golds) for a in (answers, start_answers or answers))   # (n,) each
    wins = (ours > theirs).float() + (ours == theirs).float() / 2
    return {"reward": ours.mean().item(), "win_rate": wins.mean().item(), "n": len(data)}, answers


# ---------------------------------------------------------------- the loop

def train(s: Settings, preset: dict):
    game = set_up(s)
    _, dtype = pick_device(s.device)
    if s.watch:
        game.policy.to(dtype)
        print(transcript(s, play(game, 0)))
        return
    held_out = read_data(s.eval_prompts, gold=s.reward in rewards.VERIFIABLE) if s.eval_prompts else []
    name = Path(s.model).name if not Path(s.model).name.startswith("checkpoint") else Path(s.model).absolute().parent.name
    out = runs.make_folder(s.out, f"{name}-{s.algo}-{s.seed}")
    runs.write_json(out / "config.json", asdict(s))
    print("\n".join(f"{key} = {value}" for key, value in asdict(s).items() if value is not None))
    game.policy.carried["training.json"] = json.dumps(preset, indent=2).encode()
    optimizer = MasterAdamW(game.policy, dtype, weight_decay=s.weight_decay)
    start_answers, stop = None, runs.StopRequest()

    def look(step):
        nonlocal start_answers
        if held_out:
            record, answers = evaluate(game, held_out, start_answers)
            start_answers = start_answers or answers
            runs.append_line(out / "eval.jsonl", {"step": step} | record)
            print(f"eval {step:>{len(str(s.steps))}}/{s.steps}  held-out reward {record['reward']:.3f}  "
                  f"win-rate against the start {record['win_rate']:.3f}  ({record['n']} prompts)", flush=True)

    look(0)
    for step in range(1, s.steps + 1):
        begun = time.perf_counter()
        r = play(game, step - 1)                             # challenge, solve, score, advantages
        played = time.perf_counter()
        learnt = update(game, optimizer, r, step - 1)        # one gradient step on L_Sol + alpha_Ch * L_Ch
        r.seconds["update"] = time.perf_counter() - played
        m = {"step": step} | measure(s, r) | learnt | {
            "seconds": time.perf_counter() - begun, "phase_seconds": r.seconds,
            "tokens_per_second": {p: n / r.seconds[p] for p, n in r.tokens.items() if n}}
        runs.append_line(out / "metrics.jsonl", m)
        for record in samples(r, step):
            runs.append_line(out / "samples.jsonl", record)
        print(step_line(s, m), flush=True)
        last = step == s.steps or stop
        if step % s.save_every == 0 or last:
            runs.save_checkpoint(out, step, lambda folder: save_model(game.policy, folder))
        if step % s.eval_every == 0 or last:
            look(step)
        if stop:
            break
    print(f"{out}/checkpoint holds the model, {out}/metrics.jsonl the curves, {out}/samples.jsonl what was said")
    if stop:
        sys.exit(128 + stop.signal)


def main():
    parser = runs.Parser(description="Language Self-Play, LSP-Zero and GRPO on one Llama.")
    runs.add_flags(parser, Settings)
    train(*resolve(vars(parser.parse_args())))


if __name__ == "__main__":
    runs.run_script(main)
