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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

import lsp
import rewards
import rlpt
from evals.heldout import is_finite, look
from model import Llama, Tokenizer, load_model, read_config, save_model
from plumbing import cli, files, log, ranks, runs
from plumbing.batches import micro_batches
from plumbing.budget import Plan
from plumbing.cache import pad, shared_forward
from plumbing.chat import fit
from plumbing.data import check_data, draw, opening, read_data, seeds
from plumbing.files import InputError, pick_device, read_prompt
from plumbing.logprobs import log_probs
from plumbing.memory import MasterAdamW, Stage, learning_rate, limit_memory, to_host
from plumbing.overlap import near_copies
from plumbing.phases import Phases, StopRequest
from plumbing.settings import Settings, model_paths, resolve, run_name
from plumbing.texts import Texts
from sample import Completion, pick, sample, text_of
from tiny import world as tiny_world

rewards.CHECKS["tiny"] = tiny_world.reward         # the embedded sums check themselves

# Shapes: N queries, G answers a query, B rows of a micro-batch, T tokens of its longest completion,
# M tokens of all its completions laid end to end, D hidden size.

# ----------------------------------------------------- challenge, solve, score, advantages

@dataclass
class Round:
    """One round of play: N queries, and G answers to each. Under torchrun each process first plays
    its own n queries. After the gather, every process has all N."""
    queries: list[str]                              # as they were asked (see `truncated_inputs`)
    golds: list[str | None]                         # reference answers, where the data has them
    kinds: list[str] | None                         # rlpt: asr or msr
    query_rows: list[Completion]                    # (N)    empty where the queries are given
    truncated_inputs: dict[str, int]                # kind of text: number of truncated ones
    query_prompts: list[list[int]] = ()             # (N)    <cp> of each query, or empty
    solver_prompts: list[list[int]] = ()            # (N)
    answer_rows: list[list[Completion]] = ()        # (N, G)
    answers: list[list[str]] = ()                   # (N, G)
    R: Tensor | None = None                         # (N, G) before --reward-scale
    R_Q: Tensor | None = None                       # (N, G) None without a self-reward
    judgements: list[dict] = ()                     # (N * G), empty without a judge
    learn: Tensor | None = None                      # (N,)   False: held out for evaluation
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
    streams = seeds(s.seed, step, "challenge", s.queries)[mine]
    tasks = range(step * s.queries, (step + 1) * s.queries)[mine]            # tasks in turn
    prompts = [game.challenger_prompts[i % len(game.challenger_prompts)] for i in tasks]
    with game.phase("challenge", game.policy):
        groups = sample(game.policy, prompts, seeds=streams, max_new_tokens=s.query_tokens,
                        **game.sampling)
    rows = [row for (row,) in groups]
    # The query is all that was written, and nothing else.
    queries = [text_of(game.tokenizer, row) for row in rows]
    return Round(queries, [None] * len(rows), None, rows, {}, prompts)


def given_round(game: "Game", step: int) -> Round:
    """--algo sft: the round in which given answers have an advantage of 1. Its gradient is the
    supervised one (test_an_advantage_of_one_on_given_answers_is_the_supervised_gradient)."""
    queries, golds, prompts, rows = rlpt.given_answers(game, step)
    ones = torch.ones(len(queries), 1)                                                   # (N, 1)
    return Round(queries, golds, None, [], {}, [], prompts, rows, [[a] for a in golds], ones,
                 learn=ones[:, 0] > 0, A_sol=ones, seconds=game.phase.seconds)


def play(game: "Game", step: int) -> Round:
    """Algorithm 1 up to the update. What is random in it depends on the seed and the step alone."""
    s, G, context = game.settings, game.settings.answers, game.policy.config.max_position_embeddings
    mine, answered = ranks.slice_of(s.queries), ranks.slice_of(s.queries, G)
    nonce = str(seeds(s.seed, step, "nonce", 1)[0] % 10**6)    # for a judge's {nonce}
    game.phase.reset()
    if s.algo == "sft":
        return given_round(game, step)
    r = ask(game, step, mine)
    with game.phase("solve", game.policy):         # a ~ pi_Sol(a|q) = pi(a | q as a user turn)
        fitted = fit(game.tokenizer, [(q,) for q in r.queries],
                     lambda q: [{"role": "user", "content": q}], context - s.answer_tokens)
        r.solver_prompts, r.queries = [ids for ids, _, _ in fitted], [q for _, (q,), _ in fitted]
        r.truncated_inputs["queries"] = sum(cut for _, _, cut in fitted)
        r.answer_rows = sample(game.policy, r.solver_prompts, num_samples=G,
                               seeds=seeds(s.seed, step, "solve", s.queries * G)[answered],
                               max_new_tokens=s.answer_tokens, **game.sampling)
        r.answers = [[text_of(game.tokenizer, row) for row in group] for group in r.answer_rows]
    answers = sum(r.answers, [])                                                         # (n*G)
    queries, golds = ([x for x in column for _ in range(G)] for column in (r.queries, r.golds))
    if s.algo == "rlpt":
        with game.phase("judge", game.judge and game.judge.model):
            R, r.judgements = rlpt.verdicts(game, golds, answers, nonce)                 # (n*G,)
    else:
        with game.phase("reward", getattr(game.reward, "model", None)):
            stopped = torch.tensor([row.stopped for group in r.answer_rows for row in group])
            R = rewards.score(game.reward, queries, answers, golds, stopped,
                              rates=s.challenger_reward != "lsp")                        # (n*G,)
            r.truncated_inputs["rewarded"] = getattr(game.reward, "truncated_inputs", 0)
    r.R = R.view(-1, G)                                                                  # (n, G)
    if s.self_reward:
        streams = seeds(s.seed, step, "judge", s.queries * G)[answered]
        with game.phase("judge", game.judge.model):
            R_Q, r.judgements = game.judge(queries, answers, nonce=nonce,
                                           seeds=streams if s.judge_temperature else None)
        r.R_Q = rewards.fill_unparsed(R_Q.view(-1, G))                                   # (n, G)
    r.truncated_inputs["judged"] = sum(j.get("input_truncated", False) for j in r.judgements)
    r = ranks.gather(r)                            # from here on every process knows all N queries
    r.seconds = game.phase.seconds
    r.learn = torch.tensor([not (game.world and game.world.is_held_out(q)) for q in r.queries])
    R, R_Q = s.reward_scale * r.R[r.learn], None if r.R_Q is None else r.R_Q[r.learn]
    r.A_sol = torch.zeros_like(r.R)                                                      # (N, G)
    r.A_sol[r.learn] = lsp.solver_advantages(R, R_Q)                                     # Eq. 3
    if r.query_rows:
        r.A_ch = torch.zeros(len(r.queries))                                             # (N,)
        if len(R) > 1:
            r.A_ch[r.learn] = lsp.challenger_advantages(                                 # Eq. 3
                R, R_Q, kind=s.challenger_reward, scale=s.reward_scale,
                penalty=s.repetition_penalty * near_copies(r.queries)[r.learn])
    return r


# ---------------------------------------------------------------- update

@dataclass
class Row:
    """A completion on its way into the loss."""
    prompt: list[int]
    completion: Completion
    advantage: float
    ref_logp: list[float] | None = None        # one a token, from reference_log_probs()


def update(game: "Game", optimizer: MasterAdamW, r: Round, step: int) -> dict:
    """One gradient step on L = L_Sol + alpha_Ch * L_Ch; returns its metrics. If the
    gradient is not finite, nothing is updated, and "faults" names the samples that caused it."""
    s, count, rate = game.settings, int(r.learn.sum()), learning_rate(game.settings, step)
    mine = [n for n in range(len(r.queries))[ranks.slice_of(len(r.queries))] if r.learn[n]]
    solver = [Row(r.solver_prompts[n], completion, A) for n in mine
              for completion, A in zip(r.answer_rows[n], r.A_sol[n].tolist())]
    challenger = [Row(r.query_prompts[n], r.query_rows[n], r.A_ch[n].item())
                  for n in mine if r.query_rows]
    if s.beta:
        with game.phase("reference", game.reference):
            reference_log_probs(game, solver + challenger)
    with game.phase("update", game.policy):
        sol = accumulate(game, solver, 1.0, count * s.answers)                           # Eq. 4
        ch = accumulate(game, challenger, s.alpha_ch, count)                             # Eq. 5
        norm = optimizer.step(rate, s.grad_clip) if count else 0.0
    return log.learnt(s, sol, ch, norm, rate, [] if math.isfinite(norm) else log.non_finite(r))


def token_log_probs(model: Llama, rows: list[Row], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the rows' completion tokens (B, T), 0 beyond their ends, and the mask (B, T)."""
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
    which = [prompts.index(tuple(row.prompt)) for row in rows]
    # The last token is not an input: nothing after it has to be predicted.
    rests = [row.completion.tokens[:-1] for row in rows]
    hidden = shared_forward(model, prompts, which, rests)                                # (B, T, D)
    tokens, lengths = pad([row.completion.tokens for row in rows], "cpu")                # (B, T)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]                              # (B, T)
    # The positions are computed on the CPU: the CPU would have to wait for a mask on the GPU.
    at = mask.flatten().nonzero()[:, 0].to(hidden.device)                                # (M,)
    logp = log_probs(model, hidden.flatten(0, 1)[at], tokens[mask].to(hidden.device),
                     temperature=temperature)                                            # (M,)
    padded = logp.new_zeros(mask.numel()).scatter(0, at, logp).view(mask.shape)          # (B, T)
    return padded, mask.to(hidden.device)


@torch.no_grad()
def reference_log_probs(game: "Game", rows: list[Row]):
    """Store in each row its completion's log-probs under the reference.

    A pass of its own before the update's, so that the reference need not be on the GPU with the
    gradients; in the same micro-batches, so that both sides of the KL are rounded alike.
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
    difference = ((logp.detach() - sampled).abs() * mask).sum()
    return loss, sums | {"difference": difference, "loss": loss.detach()}


def accumulate(game: "Game", rows: list[Row], weight: float, count: int | None = None) -> Counter:
    """Add the gradient of weight * (Eq. 4 or 5) over these rows to the policy's; return the sums
    of lsp.policy_loss over all processes' rows.

    With beta above 0, call reference_log_probs() first: each row needs its ref_logp. The loss is
    divided by the number of all rows before it is split into micro-batches, so that their size
    changes nothing (test_micro_batch_size_changes_no_gradient). count: the number of rows in the
    whole step, over all processes (default: len(rows)).
    """
    s, sums = game.settings, Counter()
    count = len(rows) if count is None else count
    rows = [row for row in rows if row.completion.stopped or not s.mask_truncated]
    for batch in micro_batches(rows, s.micro_batch_tokens):
        loss, statistics = batch_loss(game.policy, batch, s, count)
        (weight * loss).backward()
        sums.update(statistics)
    return ranks.total(sums)


# ---------------------------------------------------------------- what a run plays with

@dataclass
class Game:
    """What play() and update() need: models, tokenizer, prompts and the reward."""
    settings: Settings
    policy: Llama
    tokenizer: Tokenizer
    reward: Callable | None = None         # (queries, answers, golds) -> (len,); None in rlpt
    reference: Llama | None = None         # None where beta is 0 and it does not judge
    judge: rewards.Judge | None = None     # of the self-reward, or of rlpt's verdict
    challenger_prompts: list = ()          # <cp> as token ids, one a task; empty in grpo and rlpt
    data: list = ()                        # grpo: (query, gold); else empty
    held_out: list = ()                    # those of --eval-prompts
    texts: Texts | None = None             # rlpt: what episodes are made of
    episode_prompts: dict = field(default_factory=dict)    # "asr", "msr": with {context}, {next}
    world: ModuleType | None = None        # the embedded world, where it is played
    begun: float = field(default_factory=time.monotonic)
    shown: int = 0                         # steps whose lines are printed
    phase: Phases = field(default_factory=Phases)

    @property
    def sampling(self) -> dict:
        """How both roles sample."""
        return {"temperature": self.settings.temperature, "stop_ids": self.tokenizer.stop_ids,
                "batch_tokens": self.settings.batch_tokens}


def set_up(s: Settings, checkpoint: Path | None = None) -> Game:
    """Read and load all that the settings name; small files first, so that errors come early.

    checkpoint: the policy of a run that is resumed.
    """
    device, dtype = pick_device(s.device)
    ranks.check(device, s.queries)
    limit_memory(device, s.gpu_memory)
    Tokenizer.date_string = s.date_string
    paths = model_paths(s)
    start, judge_path = paths["policy"], paths.get("judge", paths.get("reference"))
    tokenizer, context = Tokenizer(start), read_config(start).max_position_embeddings
    # The embedded world belongs to its model: whatever the reward, it measures accuracy and holds
    # sums out.
    embedded = s.text == tiny_world.STORIES if s.algo == "rlpt" else (
        "tiny" in (s.reward, files.preset_of(start).get("reward")))
    game = Game(s, None, tokenizer, world=tiny_world if embedded else None)
    if game.world and device.type == "cpu":
        torch.set_num_threads(1)           # matrices this small: threads would wait for each other
    if not s.prompts and s.query_tokens + s.answer_tokens > context:
        raise InputError(f"--query-tokens {s.query_tokens} and --answer-tokens {s.answer_tokens}: "
                         f"the model's context holds {context} in all")

    def read(file):
        gold = ("a text", str.strip) if s.algo == "sft" else rewards.NEED_GOLD.get(s.reward)
        data = read_data(file, gold=gold, boxed=rewards.boxed)
        check_data(file, data, tokenizer, context - s.answer_tokens)
        return data

    if s.eval_prompts:
        game.held_out = read(s.eval_prompts)
    if s.prompts and game.world and s.prompts in game.world.MIXES:
        game.data = game.world.prompts(s.prompts, min(s.queries * s.steps, 10**5), seed=s.seed)
    elif s.prompts:
        game.data = read(s.prompts)
    elif s.algo == "rlpt":
        rlpt.open_texts(game, start)
    else:
        file = s.challenger_prompt or files.prompt_file(start, "challenger")
        tasks = read_prompt(s.tasks).splitlines() if s.tasks else [s.task]
        game.challenger_prompts = [
            opening(tokenizer, file, s.query_tokens, context, task=task, template=s.template)
            for task in tasks if task.strip()]
    if s.self_reward or s.verdict and s.reward != "tiny":
        file = s.self_reward_prompt or files.prompt_file(start, "self_reward")
        scale = rewards.SELF_REWARD
        if s.algo == "rlpt":
            scale = rewards.VERDICT
            file = files.prompt_file(judge_path, "verdict_strict" if s.strict else "verdict")
        game.judge = rewards.open_judge(
            judge_path, file, scale, reading=s.reading, temperature=s.judge_temperature,
            max_new_tokens=s.judge_tokens, batch_tokens=s.batch_tokens)

    # Models are loaded to where they stay between phases: with --offload, the host.
    home = torch.device("cpu") if s.offload else device
    if s.scored:
        game.reward = rewards.open_reward(s.reward, paths.get("reward model"), device=home,
                                          dtype=dtype, batch_tokens=min(16384, s.batch_tokens))
    if "reference" in paths:
        game.reference = load_model(paths["reference"], device=home, dtype=dtype, writes=True)
    if game.judge:
        game.judge.model = game.reference if "judge" not in paths else load_model(
            judge_path, device=home, dtype=dtype, writes=True)
    # The policy is loaded in fp32, as the master weights are; MasterAdamW casts it to bf16.
    game.policy = load_model(checkpoint or start, device=home, writes=True)
    game.policy.checkpointing = s.checkpointing
    if s.beta and game.reference.config.vocab_size != game.policy.config.vocab_size:
        raise InputError(f"--reference {s.reference}: another vocabulary than the policy's")
    if s.offload:
        game.phase.stage = Stage(device, dtype)
        for model in {game.reference, game.judge and game.judge.model,
                      getattr(game.reward, "model", None)} - {None}:
            to_host(model)                        # the policy: MasterAdamW
    return game


# What the memory budget executes on meta tensors (plumbing/budget.py).
MEASURED = SimpleNamespace(Llama=Llama, Row=Row, Completion=Completion, pick=pick,
                           last_hidden=rewards.last_hidden, micro_batches=micro_batches,
                           token_log_probs=token_log_probs, batch_loss=batch_loss)


def plan_of(s: Settings) -> Plan:
    """What the run needs of memory: measured with the functions that it will call."""
    paths = model_paths(s, weights=False)
    return Plan(s, {role: read_config(path) for role, path in paths.items()}, MEASURED)


# ---------------------------------------------------------------- the loop

def train(s: Settings, preset: dict, given=()):
    """Begin a run, or go on with one, and play until the last step, a signal or a fault."""
    plan = plan_of(s)
    s = s if s.resume else plan.sized(s, fixed={*preset, *given})
    if s.dry_run:
        sys.exit(plan.dry_run(s))

    run = ranks.first(lambda: runs.reopen(Path(s.resume))) if s.resume else None
    game = set_up(s, run.checkpoint if run else None)
    device, dtype = pick_device(s.device)
    if s.watch:
        game.policy.to(dtype)
        print(log.transcript(s, play(game, 0)))
        return
    game.policy.carried["training.json"] = json.dumps(preset, indent=2).encode()
    optimizer = MasterAdamW(game.policy, dtype, weight_decay=s.weight_decay, offload=s.offload)
    run = run or ranks.first(lambda: runs.new_run(s, run_name(s), plan.checkpoint_bytes()))
    with run, StopRequest() as game.phase.stop:
        ranks.first(lambda: run.begin(asdict(s)))
        print(log.opening_lines(s, run.folder))
        print(plan.opening(s))
        now = {"torch": torch.__version__, "device": device.type, "ranks": ranks.world()}
        state = ranks.first(lambda: run.restore(s.keep, **now))
        if run.checkpoint:
            optimizer.load(run.checkpoint / "state", state["updates"])
        play_on(game, optimizer, run, state, plan)


def play_on(game: Game, optimizer: MasterAdamW, run: runs.Run, state: dict, plan: Plan):
    """The steps that are left. Only a whole step is ever saved; one that was cut short is played
    again, and draws the same random numbers, which depend on the seed and the step alone."""
    s, step, bad_steps = game.settings, state["step"], state["bad_steps"]
    budget_gb = {phase: sum(parts.values()) / 1e9 for phase, parts in plan.phases(s).items()}
    saved = step if run.checkpoint else None
    evaluated = {record["step"] for record in runs.read_lines(run.folder / "eval.jsonl")}

    def save():
        nonlocal saved
        if saved == step:
            return
        if not is_finite(game):
            raise cli.RunStopped(f"after step {step} the model's logits are not finite: a lower "
                                 f"--learning-rate may help; {run.how_to_go_on()}", can_save=False)

        def write(folder):
            save_model(game.policy, folder)
            optimizer.save(folder / "state")
        now = state | {"step": step, "updates": optimizer.updates, "bad_steps": bad_steps}
        ranks.first(lambda: run.save(step, now, write, keep=s.keep))
        saved = step

    try:
        while True:
            if (step % s.eval_every == 0 or step >= s.steps) and step not in evaluated:
                with game.phase("eval", game.policy):
                    look(game, run, step)
            if step >= s.steps:
                break
            begun = time.perf_counter()
            r = play(game, step)                             # challenge, solve, score, advantages
            learnt = update(game, optimizer, r, step)        # one step on L_Sol + alpha_Ch * L_Ch
            seconds = time.perf_counter() - begun
            step += 1
            bad_steps = bad_steps + 1 if learnt["skipped"] else 0
            log.record(game, run, step, r, learnt | {"seconds": seconds, "budget_gb": budget_gb})
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
    print(log.closing_lines(run.folder))


def main():
    parser = cli.Parser(description="Language Self-Play, LSP-Zero, GRPO and RLPT on one Llama.")
    cli.add_flags(parser, Settings, files.preset_of(files.HERE / "tiny"))
    given = vars(parser.parse_args())
    train(*resolve(given), given)


if __name__ == "__main__":
    cli.run_script(lambda: ranks.together(main))
