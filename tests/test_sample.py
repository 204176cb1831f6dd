"""The sampler against the full forward pass, the softmax, and itself in other company."""
import io
import math
import subprocess
import sys

import pytest
import torch
from checkpoints import random_llama, write_checkpoint
from conftest import ROOT

from plumbing.cli import run_script
from plumbing.files import InputError
from sample import decode, main, pick, sample, take_batch

PROMPTS = [[5, 1, 9, 30, 2, 2, 8], [3], [7, 7, 7, 7, 12, 0, 4, 33, 21, 6, 11], [20, 36, 1]]
STOP = {4, 17}


def seeded(n=0):
    return torch.Generator().manual_seed(n)


@torch.no_grad()
def logp_alone(model, prompt, tokens, temperature):
    """Log-probs of the tokens after the prompt: one row, no cache, no padding."""
    logits = model.logits(model(torch.tensor([prompt + tokens])))[0]
    logp = (logits / temperature).log_softmax(-1)
    return logp[len(prompt) - 1:-1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["llama3_tied", "head_dim"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_each_row_of_a_ragged_batch_has_the_log_probs_of_that_row_alone(kind, temperature):
    model = random_llama(kind)
    groups = sample(model, PROMPTS, num_samples=5, max_new_tokens=24, temperature=temperature,
                    stop_ids=STOP, generator=seeded())
    lengths = {len(c.tokens) for group in groups for c in group}
    assert len(lengths) > 3                                           # rows left at different times
    for prompt, group in zip(PROMPTS, groups):
        for c in group:
            alone = logp_alone(model, prompt, c.tokens, temperature)
            assert (torch.tensor(c.logp) - alone).abs().max() < 1e-4
            assert c.stopped == (c.tokens[-1] in STOP) and (c.stopped or len(c.tokens) == 24)
            assert not set(c.tokens[:-1]) & STOP


def test_greedy_rows_equal_the_argmax_of_the_full_forward_pass():
    model = random_llama("untied")
    for prompt, (c,) in zip(
            PROMPTS, sample(model, PROMPTS, max_new_tokens=12, temperature=0, stop_ids=STOP)):
        row = list(prompt)
        with torch.no_grad():
            for token in c.tokens:
                assert model.logits(model(torch.tensor([row])))[0, -1].argmax() == token
                row.append(token)
        assert (torch.tensor(c.logp) - logp_alone(model, prompt, c.tokens, 1.0)).abs().max() < 1e-4


def test_a_completion_does_not_depend_on_its_company():
    model = random_llama("llama3_tied", dtype=torch.float64)
    settings = dict(max_new_tokens=16, stop_ids=STOP)
    together = sample(model, PROMPTS, num_samples=3, generator=seeded(7), **settings)
    in_chunks = sample(
        model, PROMPTS, num_samples=3, generator=seeded(7), batch_tokens=40, **settings)
    assert in_chunks == together
    # Each alone, with the seed that was drawn for it.
    seeds = torch.randint(2**63 - 1, (12,), generator=seeded(7)).tolist()
    for i, seed in enumerate(seeds):
        steps = decode(
            model, [PROMPTS[i // 3]], limits=[16], seeds=[seed], temperature=1.0, stop_ids=STOP)
        assert [token.item() for _, token, _ in steps] == together[i // 3][i % 3].tokens


def test_a_row_that_leaves_the_batch_does_not_change_the_others():
    model = random_llama("untied", dtype=torch.float64)
    long = sample(model, PROMPTS, num_samples=2, max_new_tokens=16, generator=seeded(3))
    limits = [16, 2, 1, 16, 5, 16, 9, 3]
    mixed = sample(model, PROMPTS, num_samples=2, max_new_tokens=limits, generator=seeded(3))
    for i, limit in enumerate(limits):
        assert mixed[i // 2][i % 2].tokens == long[i // 2][i % 2].tokens[:limit]


def test_other_seeds_give_other_completions():
    model = random_llama("untied")
    a, b = (sample(model, PROMPTS, max_new_tokens=8, generator=seeded(n)) for n in (0, 1))
    assert a != b and a == sample(model, PROMPTS, max_new_tokens=8, generator=seeded(0))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampled_frequencies_match_the_softmax_at_the_temperature(temperature):
    model = random_llama("untied")
    with torch.no_grad():
        p = (model.logits(model(torch.tensor([PROMPTS[0]])))[0, -1]
             / temperature).softmax(-1).double()
    n = 4000
    (group,) = sample(model, [PROMPTS[0]], num_samples=n, max_new_tokens=1, temperature=temperature,
                      generator=seeded(11))
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=37).double()
    common = p * n >= 5                                   # pool the rare ones, as the test requires
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([p[common], p[~common].sum()[None]]) * n
    chi2, freedom = (((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item(),
                     len(observed) - 1)
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)                    # four standard deviations
    wrong = torch.full_like(expected, n / len(expected))
    # The test can fail.
    assert ((observed - wrong) ** 2 / wrong).sum().item() > freedom + 4 * math.sqrt(2 * freedom)
    logp = {c.tokens[0]: c.logp[0] for c in group}
    assert all(abs(math.exp(value) - p[token]) < 1e-5 for token, value in logp.items())


def test_pick_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.log(torch.tensor([[0.25, 0.0, 0.5, 0.25]])).repeat(6, 1)
    uniform = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75, 1 - 2**-53], dtype=torch.float64)
    token, logp = pick(logits, 1.0, uniform)
    assert token.tolist() == [0, 0, 2, 2, 3, 3]               # never token 1: it has no probability
    assert torch.allclose(logp.exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]))


def test_batches_hold_no_more_than_their_token_budget():
    waiting, lengths = list(range(7)), [4, 5, 5, 10, 10, 31, 32]
    size = lambda rows: len(rows) * max(lengths[i] for i in rows)
    batches = []
    while waiting:
        batches.append(take_batch(waiting, size, 20))
    assert batches == [[0, 1, 2], [3, 4], [5], [6]]             # one row may exceed it, two may not


@pytest.mark.parametrize("prompts, limit", [([[]], 4), ([[1] * 509], 4)])
def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(prompts, limit):
    with pytest.raises(InputError, match=r"prompt 0 has \d+ tokens"):
        sample(random_llama("untied"), prompts, max_new_tokens=limit)


def test_limits_must_match_the_completions():
    with pytest.raises(ValueError, match="8 of them"):
        sample(random_llama("untied"), PROMPTS, num_samples=2, max_new_tokens=[3])


# ---------------------------------------------------------------- command line

def run(*arguments, text=None):
    return subprocess.run([sys.executable, ROOT / "sample.py", *arguments], input=text,
                          capture_output=True, text=True)


def said(monkeypatch, capsys, *arguments, text="") -> str:
    """What main() prints, with these lines on standard input."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    main()
    return capsys.readouterr().out


def test_the_script_answers_chats_and_plays_the_challenger(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "m", "untied", max_position_embeddings=8192)
    common = ["--model", tmp_path / "m", "--max-new-tokens", "5", "--device", "cpu", "--seed", "1"]
    answer = run(*common, "Hello")
    assert answer.returncode == 0 and answer.stderr.endswith("/m, temperature 1, seed 1)\n")
    again = said(monkeypatch, capsys, *common, "Hello")
    assert answer.stdout.strip() and answer.stdout == again
    chat = said(monkeypatch, capsys, *common, "--chat", text="Hello\nAnd then?\n")
    assert chat.count("> ") >= 3
    assert said(monkeypatch, capsys, *common, "--challenger", "--task", "Sums")


@pytest.mark.parametrize("arguments, message", [
    (["--model", "x"], "give one of"), ([], "give one of"),
    (["--model", "x", "hi", "--chat"], "give one of"),
    (["--model", "x", "hi", "--temperature", "-1"], "--temperature"),
    (["--model", "x", "hi"], "no such directory"),
])
def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1 and out == ""


def test_a_real_model_answers_sensibly(assets):
    answer = run("--model", assets / "smollm2-135m", "--temperature", "0",
                 "--max-new-tokens", "24", "--device", "cpu", "What is the capital of France?")
    assert "Paris" in answer.stdout
