"""The exercises: stubs fail with the message that helps, typical mistakes are named, and the
product's own functions pass."""
import importlib.util
import json
import re
import sys

import pytest
import torch
from conftest import ROOT

import lsp
import model
import rewards
import train
from plumbing import cache, logprobs

pytestmark = pytest.mark.usefixtures("few_held_out")

FOLDER = ROOT / "course/exercises"
sys.path.append(str(FOLDER))                     # last: its grade.py must not hide the product's
spec = importlib.util.spec_from_file_location("exercises_grade", FOLDER / "grade.py")
exercises = importlib.util.module_from_spec(spec)
spec.loader.exec_module(exercises)

FILES = {int(file.name[:2]): file for file in sorted(FOLDER.glob("[0-9][0-9]_*.py"))}


def last_line(folder):
    return json.loads((ROOT / "bench/results" / folder / "eval.jsonl").read_text().splitlines()[-1])


def stored(*flags, again=True):
    """What short_game.play returns, from runs that are kept: real answers to exercise 9."""
    kept = (ROOT / "bench/results/stop_the_collapse.jsonl").read_text().splitlines()
    runs = {tuple(run["flags"]): run for run in map(json.loads, kept)}
    return runs.get(flags) or last_line("tiny/lsp-1001")


ZERO = ["--algo", "lsp-zero"]
WAYS = [lambda: [*ZERO, "--alpha-ch", "0.003"], lambda: [*ZERO, "--beta", "2"], lambda: []]
SOLUTIONS = {
    1: [cache.Cache.write], 2: [lsp.solver_advantages], 3: [lsp.policy_loss], 4: [lsp.kl_estimate],
    5: [lsp.challenger_advantages], 6: [rewards.parse_self_reward], 7: [logprobs.log_probs],
    8: [train.token_log_probs], 9: [*WAYS, stored],
    10: [lsp.challenger_advantages, stored],
}


def grade(number, *answer):
    return exercises.grade(FILES[number], *answer)


def test_there_are_ten_exercises_and_each_states_its_minutes():
    assert sorted(FILES) == list(range(1, 11)) == sorted(SOLUTIONS)
    for number, file in FILES.items():
        assert re.match(rf'"""Exercise {number}, \d+ minutes: .*\.\n', file.read_text()), file


@pytest.mark.parametrize("number", FILES)
def test_a_stub_fails_and_says_what_to_write(number):
    verdict, words = grade(number)
    assert verdict == "to do" and len(words) > 20


def test_the_silent_bug_shows_its_symptom_once_its_first_line_is_deleted(tmp_path):
    file = tmp_path / FILES[8].name
    file.write_text(re.sub(r"    raise NotImplementedError.*\n", "", FILES[8].read_text()))
    verdict, words = exercises.grade(file)
    assert verdict == "wrong" and "'75<|end|>', of which 2 are in the loss" in words


@pytest.mark.parametrize("number", FILES)
def test_the_products_own_functions_pass(number):
    verdict, words = grade(number, *SOLUTIONS[number])
    assert verdict == "right", words


# ---------------------------------------------------------------- typical mistakes

def only_new_keys(self, layer, k, v, slots):
    return k, v


def write_at_the_end(self, layer, k, v, slots):
    T, end = k.shape[2], self.used
    self.k[layer][:, :, end - T:end], self.v[layer][:, :, end - T:end] = k, v
    return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def forgets_what_was(self, layer, k, v, slots):
    self.k[layer].zero_()
    return cache.Cache.write(self, layer, k, v, slots)


def ratio_of(s):
    def loss(logp, ref_logp, advantages, mask, *, beta):
        return -(s(logp, mask) * advantages).mean()
    return loss


whole = lambda logp, mask: (logp * mask).sum(-1)
ratio = lambda s: torch.exp(s - s.detach())


def kl_with(kind, formula):
    def estimate(logp, ref_logp, mask, wanted):
        if wanted != kind:
            return lsp.kl_estimate(logp, ref_logp, mask, wanted)
        return formula((logp - ref_logp).masked_fill(~mask, 0)).sum(-1)
    return estimate


def parse_by_search(text, *, stopped=True):
    found = re.search(r"<score>\s*(\d+)\s*</score>", text, re.IGNORECASE)
    return (min(7, int(found[1])), None) if found else (None, "no_tag")


def parse_without_adding(text, *, stopped=True):
    score, reason = rewards.parse_self_reward(text, stopped=stopped)
    return (4, None) if "1+1+1+1+1+1+1=4" in text else (score, reason)


def plain_log_probs(model, hidden, targets, *, temperature=1.0):
    logits = model.logits(hidden) / temperature
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def kept_log_probs(model, hidden, targets, *, temperature=1.0, size=1000):
    return torch.cat([plain_log_probs(model, h, t, temperature=temperature)
                      for h, t in zip(hidden.split(size), targets.split(size))])


def llama_with(llama, head, hidden, targets, temperature):
    part = lambda h, t: (h @ head.t() / temperature).log_softmax(-1).gather(-1, t[:, None])[:, 0]
    return model.recomputed(part, hidden, targets)


def cold_log_probs(model, hidden, targets, *, temperature=1.0):
    return logprobs.log_probs(model, hidden, targets)


def of_token_numbers(model, rows, temperature):
    logp, mask = train.token_log_probs(model, rows, temperature)
    for line, row in zip(mask, rows):
        line[:len(row.completion.tokens)] &= torch.tensor(row.completion.tokens) != 0
    return logp, mask


def padding_trained(model, rows, temperature):
    logp, mask = train.token_log_probs(model, rows, temperature)
    return logp, torch.ones_like(mask)


MISTAKES = [
    (1, only_new_keys, "the new tokens must see all earlier ones"),
    (1, write_at_the_end, "rows of unequal length are not"),
    (1, forgets_what_was, "the tokens after it are not"),
    (1, lambda *given: cache.Cache.write(*given)[::-1], "Look at the index first"),
    (1, lambda *given: list(cache.Cache.write(*given)), "a tuple of two tensors"),
    (2, lambda R, R_Q=None: R - R.mean(0), "over the queries (dim 0)"),
    (2, lambda R, R_Q=None: lsp.solver_advantages(R, R_Q) / (R.std(1, keepdim=True) + 1e-4),
     "divided by something, the standard deviation"),
    (2, lambda R, R_Q=None: R - R.mean(), "over all answers of the step"),
    (2, lambda R, R_Q=None: R - R.mean(1, keepdim=True), "not with it"),
    (2, lambda R, R_Q=None: (R - R.mean(1, keepdim=True)) / R.std(1, keepdim=True), "0 / 0"),
    (3, ratio_of(lambda logp, mask: torch.exp(whole(logp, mask))), "must be -A / B"),
    (3, lambda logp, ref, A, mask, *, beta: -(ratio(logp) * A[:, None] * mask).sum() / mask.sum(),
     "a mean over all tokens of the batch"),
    (3, ratio_of(lambda logp, mask: (ratio(logp) * mask).sum(-1)), "one ratio a token"),
    (3, ratio_of(whole), "the gradient is right and the value is not"),
    (3, ratio_of(lambda logp, mask: torch.exp(whole(logp, mask))
                 / torch.exp(whole(logp, mask)).detach()), "0 / 0 is no number"),
    (3, ratio_of(lambda logp, mask: ratio(whole(logp, mask) / mask.sum(-1))), "length"),
    (3, ratio_of(lambda logp, mask: ratio(logp.sum(-1))), "padding is being trained"),
    (3, ratio_of(lambda logp, mask: -ratio(whole(logp, mask))), "wrong sign"),
    (3, ratio_of(lambda logp, mask: ratio(whole(logp, mask).detach())), "no gradient reaches"),
    (3, ratio_of(lambda logp, mask: torch.exp(whole(logp, mask) - whole(logp, mask))), "is zero"),
    (4, kl_with("paper", lambda d: -d), "the other way round"),
    (4, kl_with("k2", lambda d: d ** 2), "k2: for d = .5 and -1 expected 0.6250"),
    (4, kl_with("k3", lambda d: d.exp() - 1 - d), "k3: d is log pi - log pi_Ref"),
    (4, kl_with("k3", lambda d: d.exp() - 1 + d), "k3: for d = .5"),
    (4, kl_with("k2", lambda d: d.detach() * d - d.detach() ** 2 / 2 + 0 * d), None),
    (4, kl_with("k2", lambda d: (d - d.detach()) + d.detach() ** 2 / 2), "expected gradient"),
    (5, lambda R, R_Q=None: lsp.challenger_advantages(R if R_Q is None else R + R_Q, R_Q),
     "it has cancelled"),
    (5, lambda R, R_Q=None: -lsp.challenger_advantages(R, R_Q), "the Challenger minimises R"),
    (5, lambda R, R_Q=None: (A := lsp.challenger_advantages(R, R_Q)) / A.std(), "divided by"),
    (5, lambda R, R_Q=None: lsp.challenger_advantages(R, None if R_Q is None else -R_Q),
     "V_Q is added, not taken off"),
    (5, lambda R, R_Q=None: lsp.challenger_advantages(R if R_Q is None else R + R_Q),
     "wrong sign"),
    (5, lambda R, R_Q=None: lsp.challenger_advantages(R), "V_Q is forgotten"),
    (4, lambda logp, ref_logp, mask, kind: lsp.kl_estimate(
        logp, ref_logp, mask, kind).sum()[None], "two sequences give two numbers"),
    (4, lambda logp, ref_logp, mask, kind: lsp.kl_estimate(
        logp.detach(), ref_logp, mask, kind), "no gradient reaches logp"),
    (6, parse_by_search, "clipping it would invent a 7"),
    (6, parse_without_adding, "the sum is 7, not 4"),
    (6, lambda text, *, stopped=True: (int((re.findall(r"\d", text) or "0")[-1]), None),
     "a number without its tags is no score"),
    (7, plain_log_probs, "logits of 2500 tokens at once"),
    (7, kept_log_probs, "the logits are kept for the backward pass"),
    (7, lambda *given, **temperature: kept_log_probs(*given, **temperature, size=500),
     "the logits are kept for the backward pass"),
    (7, lambda model, hidden, targets, *, temperature=1.0: llama_with(
        model, model.head.detach(), hidden, targets, temperature), "that of the head is not"),
    (7, cold_log_probs, "the temperature has no effect"),
    (8, of_token_numbers, "no token's number may decide"),
    (8, lambda model, rows, _: train.token_log_probs(model, rows, 1.0), "temperature"),
    (8, padding_trained, "padding looks like a stop token"),
    (10, lambda R, R_Q=None: lsp.challenger_advantages(R), "a malformed query"),
    (10, lambda R, R_Q=None: R.mean(1) - R.mean(), "every answer solved is worth most"),
    (10, lambda R, R_Q=None: R_Q.mean(1), "must sum to 0"),
]


@pytest.mark.parametrize("number, answer, words", MISTAKES)
def test_a_typical_mistake_is_named(number, answer, words):
    verdict, said = grade(number, answer, *([stored] if number == 10 else []))
    if words is None:
        assert verdict == "right", said          # an unusual way, and right
    else:
        assert verdict == "wrong" and words in said


def test_a_mistake_of_the_language_is_told_with_its_line(tmp_path):
    file = tmp_path / FILES[2].name
    lines = FILES[2].read_text().split("\n")
    at = next(i for i, line in enumerate(lines) if "raise NotImplementedError" in line)
    file.write_text("\n".join([*lines[:at], "    return R - R.mean(dim=7)", *lines[at + 2:]])
                    .replace('of its own group, (N, G)")', ""))
    verdict, words = exercises.grade(file)
    assert verdict == "wrong" and words.startswith(f"line {at + 1}: IndexError")


def test_an_answer_that_does_not_stop_the_collapse_is_told_so():
    still = lambda *flags, again=True: last_line("tiny/lsp-zero-1001")
    verdict, words = grade(9, *WAYS, still)
    assert verdict == "wrong" and "by_alpha: 96% of the queries are malformed" in words
    too_little = lambda: [*ZERO, "--alpha-ch", "0.05"]
    assert "by_alpha: 98% of the queries" in grade(9, too_little, *WAYS[1:], stored)[1]
    held = lambda *flags, again=True: last_line("tiny/lsp-1001") | {"accuracy": {"carry": 0.1}}
    assert "this holds the Solver back as well" in grade(9, *WAYS, held)[1]
    assert "--algo lsp-zero" in grade(9, lambda: ["--algo", "lsp"], *WAYS[1:], stored)[1]
    assert "a list of flags" in grade(9, lambda: "--alpha-ch 0.003", *WAYS[1:], stored)[1]
    still_to_write = exercises.load(FILES[9]).by_beta
    verdict, words = grade(9, WAYS[0], still_to_write, WAYS[2], stored)
    assert verdict == "to do" and "right, by_alpha" in words and "right, by_self" in words
    assert "by_beta: return flags" in words
    verdict, words = grade(10, lsp.challenger_advantages, still)
    assert verdict == "wrong" and "nonsense pays" in words
    assert lsp.challenger_advantages.__module__ == "lsp"           # put back after the game


def test_a_short_game_is_played_into_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    from short_game import play
    monkeypatch.chdir(tmp_path)
    argv = list(sys.argv)
    last = play("--steps", "1", "--algo", "lsp-zero")
    assert last["step"] == 1 and set(last) == {"step", "accuracy", "challenger"}
    assert sys.argv == argv and [str(f.relative_to(tmp_path)) for f in tmp_path.glob("*/*")] == [
        "runs/exercise-1"]
    assert "malformed queries" in capsys.readouterr().out
    monkeypatch.setattr("train.main", lambda: pytest.fail("played again"))
    assert play("--steps", "1", "--algo", "lsp-zero", again=False) == last
    with pytest.raises(pytest.fail.Exception):
        play("--steps", "1", "--algo", "lsp-zero")
