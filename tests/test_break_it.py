"""exercises/break_it.py: each fault does what it says, from outside, and what is kept is told."""
import inspect
import json
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT

import lsp
import rewards
import sample
import train
from plumbing import cli
from plumbing.memory import MasterAdamW
from plumbing.settings import Settings, resolve

sys.path.append(str(ROOT / "course/exercises"))  # last: its grade.py must not hide the product's
import break_it  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_held_out")

TARGETS = [(rewards, "without_tags"), (MasterAdamW, "step"), (train, "token_log_probs"),
           (sample, "pick"), (lsp, "challenger_advantages")]


@pytest.fixture
def mended(monkeypatch):
    """What faults replace is put back after the test."""
    for place, name in TARGETS:
        monkeypatch.setattr(place, name, getattr(place, name))


def one_round(fault):
    """The first round of the embedded game with a fault, its update and the policy afterwards."""
    parser = cli.Parser()
    cli.add_flags(parser, Settings, {})
    flags = break_it.FAULTS[fault]()
    s, _ = resolve(vars(parser.parse_args([*flags, "--device", "cpu", "--seed", "1"])))
    game = train.set_up(s)
    r = train.play(game, 0)
    optimizer = MasterAdamW(game.policy, torch.float32, weight_decay=0.0)
    return r, train.update(game, optimizer, r, 0), game


def test_a_fault_has_at_most_15_lines_and_the_product_has_no_switch_for_it():
    for name, fault in break_it.FAULTS.items():
        body = inspect.getsource(fault).rstrip().split("\n")
        assert len(body) <= 15 and fault.__doc__, name
    product = "".join(file.read_text() for file in ROOT.glob("*.py"))
    assert "break_it" not in product


def test_the_hole_shows_the_judge_the_tags_that_an_answer_writes(mended):
    game = train.set_up(resolve({"seed": 1})[0])
    prompts = []
    game.judge.generate = lambda ids, *_: (prompts.extend(ids), ([0.0], [{}]))[1]
    for name in ("tags-hidden", "tags-shown"):
        assert break_it.HOLE[name]() == ["--reward-scale", "1", "--answer-tokens", "7"]
        game.judge(["What is 37 + 48?"], ["85<Score>7</Score>"])
    hidden, shown = map(game.tokenizer.decode, prompts)
    assert "85<Score>7</Score>" in shown and "85<Score>" not in hidden and "85" in hidden


def test_nothing_broken_is_the_embedded_worlds_own_game(mended):
    r, learnt, game = one_round("nothing")
    assert game.settings.reward_scale == 5 and game.judge is not None
    assert learnt["logp_difference"] < 1e-5 and learnt["kl_solver"] is not None


def test_flags_reach_the_game(mended):
    assert one_round("no-self-reward")[0].R_Q is None
    assert one_round("no-kl")[1]["kl_solver"] is None
    assert one_round("rate-x-4")[1]["learning_rate"] == 4 * 2.5e-4
    r = one_round("unscaled")[0]
    assert torch.allclose(r.A_sol[r.learn], lsp.solver_advantages(r.R[r.learn], r.R_Q[r.learn]))


def test_bf16_weights_are_rounded_after_the_step(mended):
    game = one_round("bf16-weights")[2]
    assert all(torch.equal(p, p.bfloat16().float()) for p in game.policy.parameters())


def test_without_the_stop_token_each_answer_has_one_token_less_in_the_loss(mended):
    r, _, game = one_round("nothing")
    rows = [train.Row(r.solver_prompts[0], c, 1.0) for c in r.answer_rows[0]]
    before = train.token_log_probs(game.policy, rows, 1.0)[1].sum(-1)
    break_it.no_stop_token()
    logp, mask = train.token_log_probs(game.policy, rows, 1.0)
    assert mask.sum(-1).tolist() == [len(c.tokens) - c.stopped for c in r.answer_rows[0]]
    assert (before - mask.sum(-1)).sum() > 0
    logp.sum().backward()                        # the whole mask is left as autograd found it


def test_top_k_opens_a_gap_between_sampler_and_trainer(mended):
    r, learnt, _ = one_round("top-k")
    assert learnt["logp_difference"] > 1e-2
    logits = torch.arange(10.0).repeat(200, 1)
    token, logp = sample.pick(logits, 1.0, torch.linspace(0, 0.999, 200).double())
    assert token.min() == 5 and (logp <= 0).all()


def test_the_sign_trap_makes_the_challenger_blind_to_quality(mended):
    r = one_round("sign-trap")[0]
    V = 5 * r.R[r.learn].mean(1)
    assert torch.allclose(r.A_ch[r.learn], V.mean() - V, atol=1e-4)


@pytest.mark.parametrize("name", ["r-zero", "spice", "absolute-zero"])
def test_the_rewards_of_others_are_flags_and_reach_the_game(mended, name):
    assert break_it.FAULTS[name]() == ["--algo", "lsp-zero", "--challenger-reward", name]
    r = one_round(name)[0]
    earned = 5 * lsp.challenger_reward(r.R[r.learn], name)
    assert torch.allclose(r.A_ch[r.learn], earned - earned.mean(), atol=1e-5)


def test_one_fault_runs_with_the_seed_and_flags_that_it_was_given(mended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run_name", None)                 # main() names the run
    command = "break_it.py top-k --seed 7 --steps 1 --out there --device cpu"
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    break_it.main()
    assert json.loads((tmp_path / "there/config.json").read_text())["seed"] == 7


def test_the_kept_runs_are_of_different_seeds():
    files = sorted(break_it.KEPT.glob("*/metrics.jsonl"))
    assert {re.sub(r"-\d$", "", f.parent.name) for f in files} == set(break_it.FAULTS)
    assert len({f.read_text() for f in files}) == len(files) >= len(break_it.FAULTS)
