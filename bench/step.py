"""The update and the whole GRPO step, against transformers and TRL, interleaved, on equal weights.

    python bench/step.py --out bench/results/step.jsonl
    python bench/step.py --only update --pairs 3
    python bench/step.py --only grpo --grpo-pairs 2 --checkpointing
    python bench/step.py --curves --out bench/results/step.jsonl            # how the update grows

update: 2 prompts x 8, gradient and AdamW step of the same loss (lsp.policy_loss, k2 KL with --beta)
from given completions. transformers-full takes log-softmax over all positions, transformers-kept
the logits of completions alone; --peers trl-head adds TRL's own chunked head.
grpo: 4 x 8, a whole step with sampling and a reference model, against TRL's GRPOTrainer.
"""
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import measure  # first: it puts the project's folder before bench/
import torch
from measure import Load
from torch import Tensor, nn

import lsp
import train
from plumbing.chat import Tokenizer
from plumbing.cli import run_script
from plumbing.memory import MasterAdamW
from plumbing.settings import Settings
from sample import Completion
from train import Game, Row, accumulate, reference_log_probs

PEERS = ("transformers-full", "transformers-kept", "trl-head")             # of the update
GRPO_SIDES = ("ours", "trl")
# --curves: one quantity at a time, from 1 x 8 with 64 + 32 tokens, all rows in one pass.
CURVES = {"group": (4, 8, 16), "prompt_tokens": (16, 64, 256), "new_tokens": (32, 64, 128),
          "vocabulary": (16384, 49152, 128256)}
RATE, CLIP = 1e-6, 1.0                   # learning rate and gradient norm, on all sides


def settings(load: Load, **more) -> Settings:
    """Ours for this load: the defaults, and as many rows a pass as the peers take."""
    return Settings(model="random", algo="grpo", beta=load.beta, learning_rate=RATE, grad_clip=CLIP,
                    micro_batch_tokens=load.micro_rows * (load.prompt_tokens + load.new_tokens),
                    **more)


# ---------------------------------------------------------------- the update

def prepare_update(side: str, load: Load):
    """A function that makes one update and returns the gradient's norm before clipping.

    Its first, small call (two short rows) is done here: it allocates gradients and moments.
    """
    g = torch.Generator().manual_seed(2)
    prompts = measure.random_tokens(load, load.prompts, load.prompt_tokens, seed=1)
    answers = measure.random_tokens(load, load.rows, load.new_tokens, seed=2)
    rows = [Row(prompts[i // load.group], Completion(answer, [0.0] * len(answer), False),
                torch.randn((), generator=g).item()) for i, answer in enumerate(answers)]
    build = measure.our_model if side == "ours" else measure.their_model
    policy = build(load)
    reference = build(load).requires_grad_(False) if load.beta else None
    if load.beta:
        with torch.no_grad():
            for p in reference.parameters():             # else the KL term and its gradient are 0
                p.mul_(1.01)
    run = (our_update if side == "ours" else their_update)(side, load, policy, reference)
    short = [Row(row.prompt[:4], Completion(row.completion.tokens[:4], [0.0] * 4, False), 1.0)
             for row in rows[:2]]
    run(short)
    return lambda: run(rows)


def our_update(side: str, load: Load, policy, reference):
    game = Game(settings(load), policy, None, None, reference)
    optimizer = MasterAdamW(policy, torch.float32, weight_decay=0.0)

    def run(rows: list[Row]) -> float:
        if load.beta:
            reference_log_probs(game, rows)
        accumulate(game, rows, 1.0)
        return optimizer.step(RATE, CLIP)
    return run


def their_update(side: str, load: Load, policy, reference):
    """The same loss and optimiser around a transformers model; only the log-probs are made
    otherwise. Rows have one length: no padding, so no mask, and attention stays on its causal path.
    No gradient checkpointing: it saves memory and costs a forward pass."""
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.999), weight_decay=0.0,
                                  lr=RATE, fused=True)
    if side == "trl-head":                               # what GRPOTrainer does to its models
        from trl.trainer.utils import add_fused_lm_head
        add_fused_lm_head(policy)
        if reference is not None:
            add_fused_lm_head(reference)
    policy.train()

    def run(rows: list[Row]) -> float:
        for batch in [rows[i:i + load.micro_rows] for i in range(0, len(rows), load.micro_rows)]:
            tokens = torch.tensor([row.prompt + row.completion.tokens for row in batch])    # (B, L)
            new = len(batch[0].completion.tokens)
            advantages = torch.tensor([row.advantage for row in batch])                     # (B,)
            ref_logp = None
            if load.beta:
                with torch.no_grad():
                    ref_logp = LOGP[side](reference, tokens, new)                           # (B, T)
            logp = LOGP[side](policy, tokens, new)                                          # (B, T)
            loss, _ = lsp.policy_loss(logp, ref_logp, advantages, torch.ones_like(logp),
                                      beta=load.beta, count=len(rows))
            loss.backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), CLIP).item()
        optimizer.step()
        optimizer.zero_grad()
        return norm
    return run


def full_logp(model, tokens: Tensor, new: int) -> Tensor:
    """All positions' logits, log_softmax, gather: what a first script does. (B, L) -> (B, T)."""
    logp = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)               # (B, L-1, V)
    return logp.gather(-1, tokens[:, 1:, None])[:, -new:, 0]


def kept_logp(model, tokens: Tensor, new: int) -> Tensor:
    """Logits of completions alone, by logits_to_keep, and logsumexp for log_softmax: no second
    (B, T, V). What TRL did before it had a head of its own."""
    logits = model(tokens, use_cache=False, logits_to_keep=new + 1).logits[:, :-1]      # (B, T, V)
    return logits.gather(-1, tokens[:, -new:, None])[..., 0] - logits.logsumexp(-1)


def head_logp(model, tokens: Tensor, new: int) -> Tensor:
    """TRL's chunked head, which never makes the logits; on a CPU it scores all positions."""
    labels = tokens.clone()
    labels[:, :-new] = -100                                            # prompts: not asked for
    return model(tokens, labels=labels, fused_lm_head=True).log_probs[:, -new:]


LOGP = {"transformers-full": full_logp, "transformers-kept": kept_logp, "trl-head": head_logp}


# ---------------------------------------------------------------- a whole GRPO step

def reward(queries: list[str], answers: list[str], golds) -> Tensor:
    """Costs nothing and differs within a group: the share of odd words."""
    odd = lambda words: sum(word[-1] in "13579" for word in words) / max(1, len(words))
    return torch.tensor([odd(answer.split()) for answer in answers])



def write_tokenizer(folder: Path, load: Load):
    """Words t0, t1, ...: one token each, as many as the vocabulary; the chat template is the bare
    content. The end-of-text token has the number after the last: no model can draw it, so that on
    both sides all completions have their full length."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Words
    count = measure.vocabulary_of(load)
    words = Words(models.WordLevel({f"t{i}": i for i in range(count)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken("</s>", special=True)])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "t0",
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}))
    (folder / "config.json").write_text(json.dumps(measure.config_of(load)))


def queries(load: Load, steps: int) -> list[str]:
    rows = measure.random_tokens(load, load.prompts * steps, load.prompt_tokens, seed=1)
    return [" ".join(f"t{i}" for i in row) for row in rows]


def our_game(load: Load, steps: int) -> tuple[Game, MasterAdamW]:
    """What train.set_up() would make, around random models."""
    s = settings(load, queries=load.prompts, answers=load.group, answer_tokens=load.new_tokens,
                 steps=steps, prompts="random", reward="share of odd words")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), load)
        tokenizer = Tokenizer(folder)
    reference = measure.our_model(load).requires_grad_(False) if load.beta else None
    game = Game(s, measure.our_model(load), tokenizer, reward, reference,
                data=[(query, None) for query in queries(load, steps)])
    return game, MasterAdamW(game.policy, torch.float32, weight_decay=s.weight_decay)


def our_step(game: Game, optimizer: MasterAdamW, step: int):
    r = train.play(game, step)
    train.update(game, optimizer, r, step)
    tokens = sum(len(row.tokens) for group in r.answer_rows for row in group)
    assert tokens == game.settings.queries * game.settings.answers * game.settings.answer_tokens


def trl_trainer(load: Load, steps: int, callbacks=()):
    """TRL's GRPOTrainer on the same model, queries, reward, number of rows, tokens and passes.

    Departures from its defaults, each with its reason: use_cpu and bf16=False (bfloat16 products
    are several times slower on such CPUs); gradient_checkpointing off (faster; --checkpointing puts
    it back); beta above 0 (the paper's game has a reference model); no logging, saving, reports or
    progress bar, none of which ours does here; dr_grpo and scale_rewards="none", the loss that is
    nearest to ours (costs nothing either way); max_steps. top_k and top_p are its defaults: the
    full distribution. vLLM and Triton kernels, its documented ways to speed, need a GPU.
    Rows a pass: micro_rows, and gradient accumulation up to all rows, which it samples in one
    batch. It computes the entropy of each position for its log; that cannot be turned off.
    """
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, PrinterCallback
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer
    logging.disable_progress_bar()

    def odd_share(prompts, completions, **kwargs):
        return reward(prompts, [turn[0]["content"] for turn in completions], None).tolist()

    with tempfile.TemporaryDirectory() as folder:        # it loads policy and reference by path
        measure.their_model(load).save_pretrained(folder)
        write_tokenizer(Path(folder), load)
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            logging_strategy="no", save_strategy="no", max_steps=steps,
            per_device_train_batch_size=min(load.micro_rows, load.rows),
            gradient_accumulation_steps=max(1, load.rows // load.micro_rows),
            num_generations=load.group, max_completion_length=load.new_tokens, beta=load.beta,
            learning_rate=RATE, max_grad_norm=CLIP, weight_decay=0.0, loss_type="dr_grpo",
            scale_rewards="none", gradient_checkpointing=load.checkpointing,
            dataloader_pin_memory=False,
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"})
        data = [[{"role": "user", "content": query}] for query in queries(load, steps)]
        trainer = GRPOTrainer(
            folder, reward_funcs=odd_share, args=config, callbacks=list(callbacks),
            train_dataset=Dataset.from_dict({"prompt": data}),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder))
    trainer.remove_callback(PrinterCallback)
    return trainer


def prepare_grpo(side: str, load: Load):
    """A function that makes one whole step; AdamW's moments are there already, as later on."""
    if side == "ours":
        game, optimizer = our_game(load, steps=1)
        return lambda: our_step(game, optimizer, 0)
    trainer = trl_trainer(load, steps=1)
    adamw = trainer.create_optimizer()
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    adamw.step()                                         # zero gradients: allocates, moves nothing
    adamw.zero_grad()
    return trainer.train


def compare_steps(load: Load, pairs: int) -> dict[str, list]:
    """Times of a step of both sides in turn. TRL's loop cannot be stepped from outside: a callback
    takes its times, and makes our step when one of its own has ended. The first of each is warm-up.
    """
    game, optimizer = our_game(load, steps=pairs + 1)
    times = {"ours": [], "trl": []}

    def timed_step():
        begun = measure.now()
        our_step(game, optimizer, len(times["ours"]))
        times["ours"].append(measure.now() - begun)

    if measure.missing("trl"):
        for _ in range(pairs + 1):
            timed_step()
        return {"ours": times["ours"][1:], "trl": []}
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = measure.now()

        def on_step_end(self, args, state, control, **kwargs):
            times["trl"].append(measure.now() - self.begun)
            timed_step()

    trl_trainer(load, pairs + 1, [Clock()]).train()
    return {side: taken[1:] for side, taken in times.items()}


# ---------------------------------------------------------------- command line

def compare_updates(load: Load, sides: list[str], pairs: int) -> dict[str, list]:
    """Times of an update of all sides in turn; all must find the same gradient."""
    norms, runs = {}, {}
    for side in sides:
        if not measure.missing(side):
            run = prepare_update(side, load)
            runs[side] = lambda side=side, run=run: norms.setdefault(side, run())
    times = measure.interleave(runs, pairs)
    for side, norm in norms.items():
        if abs(norm / norms["ours"] - 1) > 1e-3:
            raise RuntimeError(f"{side} finds a gradient of norm {norm}, ours {norms['ours']}")
    return {side: [] for side in sides} | times


def main():
    parser = measure.parser("The update and the GRPO step against transformers and TRL.", pairs=5)
    parser.add_argument("--grpo-pairs", type=int, default=3, help="of the whole step (default 3)")
    parser.add_argument("--micro-rows", type=int, default=16, help="rows a pass, all sides (16)")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 128256])
    parser.add_argument("--beta", type=float, default=0.05, help="0: no reference model anywhere")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS[:2]),
                        help="of the update")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's, in the whole step")
    parser.add_argument("--curves", action="store_true", help="how the update's time and memory "
                        "grow with G, prompt, completion, vocabulary")
    args = parser.parse_args()
    measure.start(args)
    bounds = measure.machine_bounds(small=args.shape == "tiny")
    base = Load(args.shape, layers=args.layers, prompt_tokens=args.prompt_tokens, prompts=2,
                new_tokens=args.new_tokens, beta=args.beta, micro_rows=args.micro_rows)
    if args.curves:
        start = replace(base, prompts=1, new_tokens=32, micro_rows=1024)
        measure.curves(args, "update", ("ours", "transformers-kept"), start, CURVES, bounds)
        return
    rows = []
    for vocabulary in args.vocabularies:
        load = replace(base, vocabulary=vocabulary)
        name = f"update {load.name}, V {vocabulary}"
        if not measure.chosen(args, name):
            continue
        print(name, file=sys.stderr, flush=True)
        sides = ["ours", *args.peers]
        times = compare_updates(load, sides, args.pairs)
        memory = {} if args.no_memory else {
            side: measure.in_child("update", side, load) for side in sides}
        rows += measure.record(name, load, times, memory, bounds, flops=measure.update_work(load),
                               tokens=load.rows * load.new_tokens)
    load = replace(base, prompts=4, checkpointing=args.checkpointing)
    name = f"grpo {load.name}"
    if measure.chosen(args, name):
        print(name, file=sys.stderr, flush=True)
        times = compare_steps(load, args.grpo_pairs)
        memory = {} if args.no_memory else {
            side: measure.in_child("grpo", side, load) for side in GRPO_SIDES}
        flops = measure.sampler_work(load)[1] + measure.update_work(load)
        rows += measure.record(name, load, times, memory, bounds, flops=flops,
                               tokens=load.rows * load.new_tokens)
    print(measure.table(rows))
    measure.finish(args, "step", bounds, {"rows": rows})


if __name__ == "__main__":
    run_script(main)
