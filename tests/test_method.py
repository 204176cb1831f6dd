"""The game as a whole: what is drawn, weighed and recorded, and what the metrics say."""
import copy
import json
import sys
from collections import Counter

import pytest
import torch
from checkpoints import random_llama, write_checkpoint
from safetensors.torch import load_file
from test_train import game, random_rows

import lsp
import rewards
import train
import train as players
from model import load_model
from plumbing import cli, log, overlap
from plumbing.files import HERE, InputError
from plumbing.memory import MasterAdamW
from plumbing.settings import resolve
from sample import Completion, sample
from train import Row, accumulate, reference_log_probs

pytestmark = pytest.mark.usefixtures("few_held_out")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("method")
    for name, kind in (("m", "llama3_tied"), ("r", "llama3_tied"), ("rm", "scalar_head")):
        write_checkpoint(folder / name, kind, max_position_embeddings=8192)
    return folder


def settings(world, **more):
    given = {"model": str(world / "m"), "reward": str(world / "rm"), "queries": 4,
             "answers": 3, "query_tokens": 6, "answer_tokens": 6, "judge_tokens": 3,
             "device": "cpu", "self_reward": "expected"} | more
    return resolve({key: value for key, value in given.items() if value is not None})[0]


def gradient_of(g, r, step=0) -> torch.Tensor:
    """The gradient that update() hands to the optimizer, and what it reports."""
    optimizer, taken = MasterAdamW(g.policy, torch.float32, weight_decay=0.0), []
    optimizer.step = lambda rate, clip: taken.append(
        torch.cat([p.grad.flatten() for p in optimizer.params])) or 1.0
    m = train.update(g, optimizer, r, step)
    g.policy.zero_grad()
    return taken[0], m


# ---------------------------------------------------------------- what is weighed

def test_advantages_are_those_of_the_recorded_rewards(world):
    """Eq. 3 from the records alone: R scaled, R_Q added once for the Solver and never to V."""
    g = players.set_up(settings(world, reward_scale=2.0))
    r = train.play(g, 0)
    said = list(log.samples(r, 1))
    R = 2 * torch.tensor([[a["reward"] for a in line["answers"]] for line in said])
    R_Q = torch.tensor([[a["quality"] for a in line["answers"]] for line in said])
    A_sol = R + R_Q - (R + R_Q).mean(1, keepdim=True)
    S = R_Q.mean(1) - R.mean(1)
    assert torch.allclose(r.A_sol, A_sol, atol=1e-5) and R_Q.std() > 0.01
    assert torch.allclose(r.A_ch, S - S.mean(), atol=1e-5)


def test_alpha_ch_weighs_the_challengers_gradient_and_the_logged_loss(world):
    taken, losses = {}, {}
    for alpha in (0.0, 1.0, 3.0):
        g = players.set_up(settings(world, alpha_ch=alpha, reference=str(world / "r")))
        for p in g.reference.parameters():
            p.data += 0.01                       # a KL of 0 would have no gradient
        taken[alpha], m = gradient_of(g, train.play(g, 0))
        losses[alpha] = m["loss"]
    one, three = taken[1.0] - taken[0.0], taken[3.0] - taken[0.0]
    assert one.norm() > 1e-3 and (three - 3 * one).norm() / one.norm() < 1e-3
    assert abs(losses[1.0] - losses[0.0]) > 1e-6
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * (losses[1.0] - losses[0.0]), rel=1e-3)


def test_a_reference_that_is_the_policy_has_no_kl_at_any_temperature(llama):
    g, rows = game(llama, copy.deepcopy(llama), beta=0.3, temperature=0.6), random_rows()
    reference_log_probs(g, rows)
    assert accumulate(g, rows, 1.0)["kl"] < 1e-12


@pytest.mark.parametrize("kl", lsp.KL_ESTIMATORS)
def test_beta_and_kl_reach_the_gradient(llama, kl):
    """accumulate() against the loss written out for whole rows, advantages zero."""
    reference, rows = random_llama("llama3_tied", dtype=torch.float64), random_rows(3)
    for p in reference.parameters():
        p.data += 0.01
    for row in rows:
        row.advantage = 0.0
    g = game(llama, reference, beta=0.4, kl=kl, temperature=0.7)
    reference_log_probs(g, rows)
    accumulate(g, rows, 1.0)
    ours = torch.cat([p.grad.flatten() for p in llama.parameters()])
    llama.zero_grad()
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.prompt + row.completion.tokens])
        logp, ref = ((model.logits(model(ids))[0, len(row.prompt) - 1:-1] / 0.7).log_softmax(-1)
                     .gather(-1, torch.tensor(row.completion.tokens)[:, None]).T
                     for model in (llama, reference))
        total += 0.4 * lsp.kl_estimate(logp, ref.detach(), torch.ones_like(logp), kl).sum() / 3
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in llama.parameters()])
    assert (ours - plain).norm() / plain.norm() < 1e-6


def test_truncated_rows_leave_the_kl_too(llama):
    reference = random_llama("llama3_tied", dtype=torch.float64)
    for p in reference.parameters():
        p.data += 0.01

    def gradient(rows, weight=1.0, **given):
        llama.zero_grad()
        g = game(llama, reference, beta=0.3, **given)
        reference_log_probs(g, rows)
        accumulate(g, rows, weight)
        return torch.cat([p.grad.reshape(-1) for p in llama.parameters()])
    rows = random_rows(4)
    rows[1].completion.stopped = False
    without = gradient([rows[0], rows[2], rows[3]], 3 / 4)
    assert torch.allclose(gradient(rows, mask_truncated=True), without, rtol=1e-5, atol=1e-9)


def test_weight_decay_and_gradient_clipping_reach_the_optimizer(tmp_path, monkeypatch):
    """One step of the embedded game: decay takes off rate * decay * weight; a gradient clipped far
    below AdamW's epsilon moves next to nothing."""
    ends = {}
    for name, flags in {"plain": [], "decay": ["--weight-decay", "0.5"],
                        "clip": ["--grad-clip", "1e-12"]}.items():
        monkeypatch.setattr(sys, "argv", [
            "train.py", "--algo", "grpo", "--prompts", "balanced", "--steps", "1", "--queries", "8",
            "--learning-rate", "1e-3", "--eval-every", "9", "--out", str(tmp_path / name), *flags])
        train.main()
        ends[name] = load_file(tmp_path / name / "checkpoint/model.safetensors")
    start = dict(load_model(HERE / "tiny").named_parameters())
    for name, weight in start.items():
        taken = ends["plain"][name] - ends["decay"][name]
        assert torch.allclose(taken, 1e-3 * 0.5 * weight, atol=1e-6), name
    moved = {name: max((end[n] - start[n]).abs().max().item() for n in start)
             for name, end in ends.items()}
    assert moved["plain"] > 9e-4 and moved["clip"] < 1e-5


# ---------------------------------------------------------------- what is drawn

def test_each_role_and_each_step_draws_from_a_stream_of_its_own(world, monkeypatch):
    drawn = []

    def note(module):
        real = module.sample
        monkeypatch.setattr(module, "sample", lambda *args, **options: (
            drawn.append(options["seeds"]), real(*args, **options))[1])
    note(train)
    note(rewards)
    g = players.set_up(settings(world, self_reward="generate", judge_temperature=1.0))
    for step in range(2):
        train.play(g, step)
    assert list(map(len, drawn)) == 2 * [4, 12, 12]           # queries, answers, judgements
    everything = sum(drawn, [])
    assert len(everything) == len(set(everything))


def test_the_temperatures_are_those_of_the_settings(world, monkeypatch):
    """Queries and answers: the sampler's log-probs are the trainer's at that temperature."""
    asked = []
    real = rewards.sample
    monkeypatch.setattr(rewards, "sample", lambda *args, **options: (
        asked.append(options["temperature"]), real(*args, **options))[1])
    g = players.set_up(settings(world, temperature=0.4, self_reward="generate",
                                judge_temperature=0.8))
    r = train.play(g, 0)
    _, m = gradient_of(g, r)
    assert m["logp_difference"] < 1e-4 and asked == [0.8]


def test_the_judge_is_the_reference_by_default(world):
    g = players.set_up(settings(world, reference=str(world / "r")))
    assert g.judge.model is g.reference
    g = players.set_up(settings(world, judge=str(world / "r")))
    assert g.judge.model is not g.reference


# ---------------------------------------------------------------- what is recorded

def test_an_update_can_be_recomputed_from_the_records(world):
    """Token ids, advantages and the starting models give the gradient that was taken."""
    g = players.set_up(settings(world))
    for p in g.reference.parameters():
        p.data += 0.01
    r = train.play(g, 0)
    taken, _ = gradient_of(g, r)
    said = json.loads(json.dumps(list(log.samples(r, 1))))
    row = lambda prompt, tokens, A: Row(prompt, Completion(tokens, [0.0] * len(tokens), True), A)
    solver = [row(line["prompt_tokens"], a["tokens"], a["advantage"])
              for line in said for a in line["answers"]]
    challenger = [row(g.challenger_prompts[0], line["query_tokens"], line["challenger_advantage"])
                  for line in said]
    for rows in (solver, challenger):
        reference_log_probs(g, rows)
        accumulate(g, rows, 1.0)
    again = torch.cat([p.grad.flatten() for p in g.policy.parameters()])
    assert (again - taken).norm() / taken.norm() < 1e-5


# ---------------------------------------------------------------- what the metrics say

def test_the_spreads_of_the_rewards_on_hand_worked_numbers():
    R = torch.tensor([[1.0, 0.0], [1.0, 1.0]])                   # V = .5, 1
    R_Q = torch.tensor([[2.0, 0.0], [6.0, 6.0]])                 # V_Q = 1, 6
    assert log.spreads(R) == pytest.approx((0.25, (2 * 0.5**2 / 4) ** 0.5))
    assert log.spreads(R_Q) == pytest.approx((2.5, (2 * 1.0 / 4) ** 0.5))


def test_overlap_is_the_fraction_of_3_grams_that_others_hold():
    queries = ["What is 37 + 48?", "What is 37 + 21?", "Say it"]
    # Of the first's three 3-grams two stand in the second, and the other way round.
    assert overlap.overlap(queries) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert overlap.overlap(["a b c"]) is None
    assert overlap.overlap(["a b c", "a b c"]) == 1.0


def test_near_copies_are_the_other_queries_with_more_than_half_of_the_3_grams():
    queries = ["What is 37 + 48?", "What is 37 + 21?", "What is 11 + 48?", "What is 37 + 48?"]
    # The second holds two of the first's three; the third one of them, "+ 48?" being no 3-gram.
    assert overlap.near_copies(queries).tolist() == pytest.approx([2 / 3, 2 / 3, 0, 2 / 3])
    assert overlap.near_copies(["a"]).tolist() == [0]


def test_repetition_costs_the_challenger_in_the_game(world, monkeypatch):
    g = players.set_up(settings(world, repetition_penalty=6.0, algo="lsp-zero",
                                self_reward=None))
    texts = iter(["one two three four", "one two three four", "five six seven", "eight"])
    monkeypatch.setattr(train, "text_of", lambda tokenizer, row: next(texts, "x"))
    r = train.play(g, 0)
    penalty = 6 * torch.tensor([1 / 3, 1 / 3, 0, 0])
    expected = -r.R.mean(1) - penalty
    assert torch.allclose(r.A_ch, expected - expected.mean(), atol=1e-5)


def test_the_queries_of_a_step_take_the_tasks_in_turn(world, tmp_path):
    (tmp_path / "tasks.txt").write_text("history\n\nphysics\nchess\n")
    (tmp_path / "ask.txt").write_text("Ask about {task}.")
    g = players.set_up(settings(world, tasks=str(tmp_path / "tasks.txt"),
                                challenger_prompt=str(tmp_path / "ask.txt")))
    first, second = train.ask(g, 0, slice(0, 4)), train.ask(g, 1, slice(1, 2))
    shown = [g.tokenizer.decode(ids) for ids in first.query_prompts + second.query_prompts]
    for text, task in zip(shown, ("history", "physics", "chess", "history", "chess")):
        assert f"Ask about {task}." in text


def test_an_advantage_of_one_on_given_answers_is_the_supervised_gradient(world):
    """--algo sft against torch's cross-entropy over the answers' tokens, stop tokens included."""
    file = world / "given.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {n}", "output": "so " * n}) + "\n"
                            for n in range(1, 5)))
    g = players.set_up(settings(world, algo="sft", prompts=str(file), answers=1, beta=0.0,
                                answer_tokens=9, self_reward=None, reward=None))
    r = train.play(g, 0)
    rows = [train.Row(p, row, 1.0) for p, (row,) in zip(r.solver_prompts, r.answer_rows)]
    assert {row.stopped for (row,) in r.answer_rows} == {True, False}         # some are truncated
    sums = train.accumulate(g, rows, 1.0)
    taken = torch.cat([p.grad.flatten() for p in g.policy.parameters()])
    g.policy.zero_grad()
    loss = sum(torch.nn.functional.cross_entropy(
        g.policy.logits(g.policy(torch.tensor([row.prompt + row.completion.tokens])))[
            0, len(row.prompt) - 1:-1], torch.tensor(row.completion.tokens), reduction="sum")
        for row in rows)
    (loss / 4).backward()
    again = torch.cat([p.grad.flatten() for p in g.policy.parameters()])
    assert (again - taken).norm() / taken.norm() < 1e-5
    m = log.learnt(g.settings, sums, Counter(), 1.0, 1e-3, [])
    assert m["loss"] == pytest.approx(loss.item() / sums["tokens"], rel=1e-5)
    assert m["logp_difference"] is None and "NLL" in log.header(g.settings)


def test_equal_qualities_are_said_in_the_step_line_and_watch_names_a_scale(world):
    g = players.set_up(settings(world))
    r = train.play(g, 0)
    m = {"step": 1, "seconds": 1.0, "kl_solver": None, "kl_challenger": None,
         "logp_difference": None, "skipped": False, "faults": []}
    said = lambda r: log.step_line(g.settings, m | log.measure(g.settings, r))
    assert "all R_Q equal" not in said(r)
    r.R, r.R_Q = torch.tensor([[0.0, 1.0, 1.0]] * 4), torch.tensor([[0.0, 4.0, 4.0]] * 4)
    assert "spread of R 0.47, of R_Q 1.89 (Solver's, within groups): --reward-scale 4 would" in (
        log.transcript(g.settings, r))
    r.R_Q = torch.full_like(r.R, 5.0)
    assert "all R_Q equal: the self-reward changes nothing in" in said(r)


# ---------------------------------------------------------------- bad days

def play_tiny(monkeypatch, out, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", "--algo", "lsp-zero", "--steps", "2", "--queries",
                                      "2", "--eval-every", "9", "--out", str(out), *flags])
    train.main()


def test_a_model_that_cannot_play_is_no_checkpoint_and_ends_the_run_in_a_line(
        tmp_path, monkeypatch):
    with pytest.raises(cli.RunStopped, match="after step 1 the model's logits are not finite") as e:
        play_tiny(monkeypatch, tmp_path / "run", "--learning-rate", "1e9", "--save-every", "1",
                  "--seed", "3", "--queries", "16")
    assert e.value.code == 3 and not list((tmp_path / "run").glob("checkpoint*"))


def test_logits_that_are_not_finite_are_refused_in_a_line(llama):
    llama.model.norm.weight.data[0] = float("nan")
    for temperature in (0, 1.0):
        with pytest.raises(InputError, match="the model's logits are not finite"):
            sample(llama, [[1, 2, 3]], max_new_tokens=3, temperature=temperature)
