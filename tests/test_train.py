"""The loop: gradients, masters, learning, data, records, and the script on small random models."""
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from checkpoints import CONFIGS, random_llama, random_weights, write_checkpoint
from conftest import ROOT

import lsp
import rewards
import train
from model import Llama, parse_config
from plumbing import cli, logprobs, memory, settings
from plumbing.data import draw, read_data
from plumbing.files import InputError
from plumbing.logprobs import log_probs
from plumbing.memory import MasterAdamW
from plumbing.settings import Settings, resolve
from sample import Completion, sample
from train import Game, Row, accumulate, reference_log_probs, token_log_probs

pytestmark = pytest.mark.usefixtures("few_held_out")


def game(policy, reference=None, **settings):
    s = Settings(model="random", **settings)
    return Game(s, policy, None, None, reference)


def random_rows(count=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (), generator=g))
    tokens = lambda n: torch.randint(0, 37, (n,), generator=g).tolist()
    return [Row(tokens(number(1, 9)), Completion(c := tokens(number(1, 12)), [-1.0] * len(c), True),
                torch.randn((), generator=g).item()) for _ in range(count)]


# ---------------------------------------------------------------- gradients

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("width", [5, 37])                   # chunks of the vocabulary; all of it
def test_chunked_log_probs_equal_the_plain_ones(llama, monkeypatch, width, temperature, dtype,
                                                tolerance):
    monkeypatch.setattr(logprobs, "chunk_width", lambda *_: width)
    llama = llama.to(dtype)
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 37, (23,), generator=g)
    weight = torch.randn(23, generator=g, dtype=torch.float64)
    start = torch.randn(23, 32, generator=g, dtype=torch.float64).to(dtype)
    results = []
    for f in (log_probs, plain_log_probs):
        hidden = start.clone().requires_grad_()
        llama.zero_grad()
        logp = f(llama, hidden, targets, temperature=temperature)
        (logp * weight).sum().backward()
        results.append((logp.detach(), hidden.grad, llama.head.grad.clone()))
    for found, wanted in zip(*results):
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


def plain_log_probs(model, hidden, targets, *, temperature):
    logits = model.logits(hidden) / temperature
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def test_a_chunk_holds_no_more_logits_than_it_may_beyond_a_multiple_of_64():
    assert logprobs.chunk_width(1536, 49152, "cpu") == 10944        # 2^24 / 1536 = 10,922.7
    assert logprobs.chunk_width(32, 99, "cpu") == 99                # no more than there are
    assert logprobs.chunk_width(2**27, 49152, "cuda") == 64         # nor none at all


def test_completion_log_probs_equal_each_row_alone(llama):
    rows = random_rows()
    logp, mask = token_log_probs(llama, rows, 0.8)
    for row, ours, on in zip(rows, logp, mask):
        n, ids = len(row.completion.tokens), row.completion.tokens
        logits = llama.logits(llama(torch.tensor([row.prompt + ids])))[0, len(row.prompt) - 1:-1]
        alone = (logits / 0.8).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert (ours[:n] - alone).abs().max() < 1e-12
        assert on.tolist() == [True] * n + [False] * (len(on) - n) and ours[n:].abs().sum() == 0


@pytest.mark.parametrize("kl", ["k2", "k2-seq", "k3", "paper"])
def test_micro_batch_size_changes_no_gradient(llama, kl):
    reference = random_llama("llama3_tied", dtype=torch.float64)
    for p in reference.parameters():
        p.data += 0.01
    gradients, losses = [], []
    for tokens in (10_000, 40, 1):
        llama.zero_grad()
        g, rows = game(llama, reference, beta=0.3, kl=kl, micro_batch_tokens=tokens), random_rows()
        reference_log_probs(g, rows)
        sums = accumulate(g, rows, 0.7)
        gradients.append(torch.cat([p.grad.reshape(-1) for p in llama.parameters()]))
        losses.append(sums["loss"])
    for gradient, loss in zip(gradients[1:], losses[1:]):
        # Advantages pass through fp32.
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-6
        assert loss == pytest.approx(losses[0], rel=1e-5)


def test_masked_truncated_rows_leave_the_loss_and_the_count_stays(llama):
    rows = random_rows(4)
    rows[1].completion.stopped = False
    def gradient(rows, weight=1.0, **settings):
        llama.zero_grad()
        accumulate(game(llama, beta=0, **settings), rows, weight)
        return torch.cat([p.grad.reshape(-1) for p in llama.parameters()])
    masked = gradient(rows, mask_truncated=True)
    without = gradient([rows[0], rows[2], rows[3]], weight=3 / 4)
    assert torch.allclose(masked, without, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(masked, gradient(rows), rtol=1e-2)


# ---------------------------------------------------------------- masters

def moved_share(dtype, keep_masters):
    llama = Llama(parse_config(CONFIGS["untied"] | {"vocab_size": 200}))
    g = torch.Generator().manual_seed(0)
    for p in llama.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.02
    if not keep_masters:                        # what everybody writes first: AdamW on bf16 weights
        llama.to(dtype)
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-6, weight_decay=0.0)
    else:
        optimizer = MasterAdamW(llama, dtype, weight_decay=0.0)
    held = optimizer.masters if keep_masters else list(llama.parameters())
    before = [p.detach().clone() for p in held]
    hidden = llama(torch.randint(0, 200, (2, 20), generator=g))
    log_probs(llama, hidden[0], torch.arange(20)).sum().backward()
    optimizer.step(1e-6, 0) if keep_masters else optimizer.step()
    skip_unused = [(p, b) for p, b in zip(held, before) if p.shape[0] != 200]
    return (sum((p != b).sum() for p, b in skip_unused)
            / sum(p.numel() for p, _ in skip_unused)).item()


def test_a_step_of_1e_6_moves_fp32_masters_but_not_bf16_weights():
    assert moved_share(torch.bfloat16, keep_masters=True) > 0.5
    assert moved_share(torch.float32, keep_masters=True) > 0.5
    assert moved_share(torch.bfloat16, keep_masters=False) < 0.1


def test_a_bf16_policy_follows_its_masters_and_gradients_add_up_in_fp32():
    llama = random_llama("untied")
    optimizer = MasterAdamW(llama, torch.bfloat16, weight_decay=0.0)
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    weight, master = llama.model.norm.weight, optimizer.masters[
        [n for n, _ in llama.named_parameters()].index("model.norm.weight")]
    before = master.clone()
    sum((p * (p is weight)).sum() for p in llama.parameters()).backward()
    for _ in range(256):                    # 1 + 256 * 2^-9: in bf16 each addition would round away
        (weight * 2.0**-9).sum().backward()
    assert weight.grad.dtype == torch.float32 and torch.all(weight.grad == 1.5)
    optimizer.step(1e-2, 0)
    assert torch.equal(weight, master.bfloat16()) and weight.grad is None
    assert torch.allclose(master, before - 1e-2) and master.dtype == torch.float32


def test_a_gradient_that_is_not_finite_changes_nothing():
    llama = random_llama("untied")
    optimizer = MasterAdamW(llama, torch.float32, weight_decay=0.1)
    before = [p.detach().clone() for p in llama.parameters()]
    (llama.model.norm.weight * float("nan")).sum().backward()
    assert not torch.isfinite(torch.tensor(optimizer.step(1.0, 1.0)))
    assert all(torch.equal(p, b) for p, b in zip(llama.parameters(), before))


def test_the_learning_rate_warms_up_and_decays_to_its_share():
    s = Settings(learning_rate=1.0, warmup=4, steps=24, final_lr_share=0.2)
    rates = [memory.learning_rate(s, step) for step in range(24)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert (rates[-1] == pytest.approx(0.2 + 0.8 / 20)
            and rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True))


# ---------------------------------------------------------------- does it learn?

def reward_curve(shuffle, steps=60):
    """The Solver is paid for repeating the prompt's last token; best reward 1, by chance 1/12."""
    config = CONFIGS["untied"] | {"vocab_size": 12, "num_hidden_layers": 2}
    policy = Llama(parse_config(config))
    policy.load_state_dict({k: v * 0.5 for k, v in random_weights(config).items()})
    optimizer = MasterAdamW(policy, torch.float32, weight_decay=0.0)
    g, curve = torch.Generator().manual_seed(0), []
    prompts = [[1, 2, token] for token in (5, 8, 10)]
    for _ in range(steps):
        groups = sample(policy, prompts, num_samples=16, max_new_tokens=3, generator=g)
        R = torch.tensor([[sum(t == p[-1] for t in c.tokens) / 3 for c in group]
                          for p, group in zip(prompts, groups)])
        A = lsp.solver_advantages(R)
        if shuffle:
            A = A.view(-1)[torch.randperm(A.numel(), generator=g)].view_as(A)
        rows = [Row(p, c, a) for p, group, row in zip(prompts, groups, A.tolist())
                for c, a in zip(group, row)]
        accumulate(game(policy, beta=0), rows, 1.0)
        optimizer.step(1e-2, 1.0)
        curve.append(R.mean().item())
    return curve


def test_a_random_llama_learns_a_closed_form_reward_and_not_from_shuffled_advantages():
    curve = reward_curve(shuffle=False)
    assert sum(curve[:3]) / 3 <= 0.2 and sum(curve[-5:]) / 5 >= 0.9
    assert max(reward_curve(shuffle=True)[-20:]) < 0.4


# ---------------------------------------------------------------- data and settings

def write(tmp_path, text):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_prompts_are_read_from_lists_and_lines_under_their_four_names(tmp_path):
    lines = ('{"question": "a\u2028b", "answer": "#### 3"}\n\n'
             '{"instruction": "Sum", "input": "1 2"}\r\n'
             '{"instruction": "Say", "input": ""}\n{"problem": "p", "answer": 4}\n{"prompt": "q"}')
    data = [("a\u2028b", "#### 3"), ("Sum\n\n1 2", None), ("Say", None), ("p", "4"), ("q", None)]
    assert read_data(write(tmp_path, lines), gold=None) == data
    listed = "[" + ",".join(line for line in lines.replace("\r", "").split("\n") if line) + "]"
    assert read_data(write(tmp_path, "\ufeff " + listed), gold=None) == data


@pytest.mark.parametrize("text, message", [
    ('{"prompt": "x", "answer": 1}\n{"q": 1, "a": 2}',
     r"line 2: no field instruction.*fields found: q, a"),
    ('{"prompt": "x"}\n{"prompt', "line 2: "), ("[1, 2", "line 1: "),
    ("3", "line 1: expected an object, found int"),
    ('[{"prompt": "x", "answer": 1}, []]', "entry 2: expected an object, found list"),
    ("", "no prompts in it"), ("[]", "no prompts"),
    ('{"prompt": 5}', "no field"),
    ('{"question": "x", "answer": "none"}', "gold answer with a number"),
    ('{"question": "x"}', "gold answer with a number"), ("[" * 100_000, "line 1: "),
])
def test_bad_prompts_name_the_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_data(write(tmp_path, text), gold=rewards.NEED_GOLD["exact"])


def test_prompts_come_once_an_epoch_each_time_in_another_order():
    data = list(range(10))
    steps = [draw(data, 4, 0, step) for step in range(10)]
    drawn = sum(steps, [])
    epochs = [drawn[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(e) == data for e in epochs) and len({tuple(e) for e in epochs}) == 4
    assert (steps == [draw(data, 4, 0, step) for step in range(10)]
            and steps[0] != draw(data, 4, 1, 0))
    assert len(draw(data, 25, 0, 0)) == 25


def test_flags_beat_the_models_preset_beats_the_algorithms_beats_the_defaults(tmp_path):
    write_checkpoint(tmp_path / "m", "untied")
    (tmp_path / "m/training.json").write_text(
        json.dumps({"queries": 5, "beta": 0.2, "learning_rate": 1.0}))
    name = str(tmp_path / "m")
    s, preset = resolve({"model": name, "beta": 0.3})
    assert (s.queries, s.beta, s.learning_rate, s.self_reward, s.answers) == (
        5, 0.3, 1.0, "generate", 8)
    assert preset["queries"] == 5
    (tmp_path / "m/training.json").unlink()
    file = tmp_path / "p.json"
    file.write_text('[{"prompt": "x"}]')
    s, _ = resolve({"model": name, "algo": "grpo", "prompts": str(file)})
    assert (s.learning_rate, s.self_reward) == (1e-6, None)


def test_the_defaults_are_the_papers_table_1():
    s = Settings(**settings.ALGOS["lsp"])
    assert (s.queries, s.beta, s.learning_rate, s.self_reward) == (8, 0.05, 3e-6, "generate")
    zero, grpo = (Settings(algo="lsp-zero", **settings.ALGOS["lsp-zero"]),
                  Settings(algo="grpo", **settings.ALGOS["grpo"]))
    assert (zero.learning_rate, zero.self_reward, grpo.learning_rate) == (3e-6, None, 1e-6)


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a random policy m, a random reward model rm and prompts p.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "m", "llama3_tied", max_position_embeddings=8192)
    write_checkpoint(folder / "rm", "scalar_head", max_position_embeddings=8192)
    lines = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(5)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


SHORT = ["--model", "m", "--reward", "rm", "--queries", "3", "--answers", "2",
         "--query-tokens", "6", "--answer-tokens", "7", "--judge-tokens", "4", "--steps", "2",
         "--save-every", "2", "--learning-rate", "1e-3", "--device", "cpu"]


def run(world, *flags):
    return subprocess.run([sys.executable, ROOT / "train.py", *SHORT, *flags], cwd=world,
                          capture_output=True, text=True)


def in_process(world, monkeypatch, *flags):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, *flags])
    train.main()


def records(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_lsp_runs_records_and_its_checkpoint_starts_a_second_stage(world):
    result = run(world, "--out", "first", "--eval-prompts", "p.jsonl", "--eval-every", "1")
    assert result.returncode == 0, result.stderr
    assert (result.stderr == "" and "  2/2  " in result.stdout
            and "self-reward mostly unparsed" in result.stdout)
    out = world / "first"
    metrics = records(out / "metrics.jsonl")
    wanted = {"step", "reward", "quality", "kl_solver", "kl_challenger", "distinct_queries",
              "truncated_queries", "truncated_answers", "parse_failures", "logp_difference",
              "grad_norm", "seconds", "value_spread", "zero_variance_groups", "entropy_solver",
              "entropy_challenger", "query_length", "answer_length", "phase_seconds",
              "tokens_per_second", "unparsed", "leaked_tags", "challenger_advantage"}
    assert [m["step"] for m in metrics] == [1, 2] and wanted <= set(metrics[0])
    assert (metrics[0]["logp_difference"] < 1e-5
            and metrics[0]["kl_solver"] < 1e-8 < metrics[1]["kl_solver"])
    assert metrics[0]["grad_norm"] > 0 and sum(metrics[0]["parse_failures"].values()) == 6
    said = records(out / "samples.jsonl")
    assert len(said) == 6 and all(len(s["answers"]) == 2 for s in said)
    assert all({"reward", "quality", "advantage", "stopped", "judgement", "reason"}
               <= set(s["answers"][0]) for s in said)
    answered = records(out / "eval_samples.jsonl")
    assert len(answered) == 15 and {"step", "query", "answer", "reward"} == set(answered[0])
    evals = records(out / "eval.jsonl")
    assert ([e["step"] for e in evals] == [0, 1, 2] and evals[0]["win_rate"] == 0.5
            and evals[0]["n"] == 5)
    assert json.loads((out / "config.json").read_text())["queries"] == 3
    assert (out / "checkpoint").readlink().name == "checkpoint-000002"
    second = run(world, "--model", "first/checkpoint", "--algo", "grpo", "--prompts", "p.jsonl",
                 "--reward", "exact")
    assert second.returncode == 0, second.stderr
    assert (world / "runs/first-grpo-0/checkpoint/model.safetensors").exists()
    m = records(world / "runs/first-grpo-0/metrics.jsonl")[0]
    assert m["quality"] is m["kl_challenger"] is m["parse_failures"] is None


def test_lsp_zero_with_no_kl_and_the_expected_reading_run_too(world, monkeypatch, capsys):
    in_process(world, monkeypatch, "--algo", "lsp-zero", "--beta", "0", "--out", "zero")
    m = records(world / "zero/metrics.jsonl")[0]
    assert m["kl_solver"] is None and m["quality"] is None and m["kl_challenger"] is None
    in_process(
        world, monkeypatch, "--self-reward", "expected", "--out", "expected", "--mask-truncated")
    m = records(world / "expected/metrics.jsonl")[0]
    assert 0 <= m["quality"] <= 7 and 0 < m["judge_mass"] < 1 and m["parse_failures"] is None


def test_watch_prints_a_round_and_updates_nothing(world, monkeypatch, capsys):
    before = sorted(world.rglob("*"))
    in_process(world, monkeypatch, "--watch")
    text = capsys.readouterr().out
    assert text.count("query ") == 3 and text.count("R_Q") >= 6 and "advantage" in text
    assert sorted(world.rglob("*")) == before


def test_the_same_seed_gives_the_same_run_and_another_folder(world, monkeypatch):
    for seed in ("5", "5", "6"):
        in_process(world, monkeypatch, "--seed", seed)
    read = lambda name: (world / "runs" / name / "samples.jsonl").read_text()
    assert read("m-lsp-5") == read("m-lsp-5-2") != read("m-lsp-6")


def test_an_answer_that_was_cut_off_is_never_exactly_right(world, monkeypatch):
    s, _ = resolve({
        "model": str(world / "m"), "algo": "grpo", "prompts": str(world / "p.jsonl"),
        "reward": "exact", "queries": 2, "answers": 2, "answer_tokens": 1})
    g = train.set_up(s)
    g.reward = lambda queries, answers, golds: [float(bool(a)) for a in answers]
    r = train.play(g, 0)
    stopped = torch.tensor([[c.stopped for c in group] for group in r.answer_rows])
    assert not stopped.all() and torch.equal(r.R, stopped.float())


def test_the_reference_and_the_judge_stay_frozen_while_the_policy_moves(world):
    s, _ = resolve({
        "model": str(world / "m"), "reward": str(world / "rm"), "queries": 2, "answers": 2,
        "query_tokens": 4, "answer_tokens": 4, "judge_tokens": 2, "device": "cpu"})
    g = train.set_up(s)
    assert g.judge.model is g.reference and g.reference is not g.policy
    copy = lambda m: [p.detach().clone() for p in m.parameters()]
    policy, reference, scorer = copy(g.policy), copy(g.reference), copy(g.reward.model)
    train.update(g, MasterAdamW(g.policy, torch.float32, weight_decay=0.0), train.play(g, 0), 0)
    same = lambda m, old: all(torch.equal(p, o) for p, o in zip(m.parameters(), old))
    assert (same(g.reference, reference) and same(g.reward.model, scorer)
            and not same(g.policy, policy))


def test_every_setting_is_a_flag_with_a_help_text():
    helps = cli.help_texts(Settings)
    assert [*helps] == ["game", "models", "RLPT", "optimisation", "memory", "files"]
    texts = {name: text for group in helps.values() for name, text in group.items()}
    assert [*texts] == [f.name for f in dataclasses.fields(Settings)] and all(texts.values())
    shown = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True,
                           text=True).stdout
    assert all("--" + name.replace("_", "-") in shown for name in texts)
    assert "N, queries a step (default 8; embedded model: 24)" in shown
