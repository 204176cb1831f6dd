"""The embedded world's stories, on which RLPT learns: texts, split, scoring, the shipped model."""
import json
import re
import sys

import pytest
import torch

import rewards
import rlpt
import train
from evals import heldout
from model import load_model
from plumbing.chat import Tokenizer
from plumbing.files import HERE, InputError, find_model, read_prompt
from plumbing.settings import resolve
from plumbing.texts import segments
from tiny import world
from train import set_up

TINY = find_model("tiny-rlpt")
CPU = {"algo": "rlpt", "device": "cpu"}


# ---------------------------------------------------------------- stories

def test_a_story_adds_up_and_is_split_where_it_was_put_together():
    assert world.story(37, 48) == [
        "Eve has 37.", "She gets 48.", "Now Eve has 85.", "Eve is glad."]
    for a, b in world.Stories(held=False).pairs[::7] + world.Stories(held=True).pairs:
        sentences = world.story(a, b)
        assert [piece.strip() for piece in segments(" ".join(sentences), 10)] == sentences
        assert f"has {a}." in sentences[0] and f"has {a + b}." in sentences[2]


def test_what_is_trained_on_and_what_is_held_out_share_no_pair_and_no_sum_the_other_way_round():
    texts, held = world.Stories(held=False), world.Stories(held=True)
    read = {"".join(texts.read(n, "asr")[0]) for n in range(len(texts))}
    assert (len(read), len(held)) == (2879, 361) and len(read) + len(held) == 81 * 80 // 2
    for a, b in held.pairs:
        assert not {" ".join(world.story(a, b)) + " ", " ".join(world.story(b, a)) + " "} & read
    tasks = world.held_out_tasks()
    assert len(tasks) == 2 * len(held) and {"".join(pieces) for _, pieces, _ in tasks} == {
        " ".join(world.story(a, b)) + " " for a, b in held.pairs}


def test_asr_asks_for_the_total_and_msr_for_the_gift():
    game = set_up(resolve(CPU)[0])
    for episode in rlpt.draw_episodes(game, 3):
        numbers = [int(n) for n in re.findall("[0-9]+", episode.query)]
        target = int(episode.gold.split(".")[0].split()[-1])
        assert target == (sum(numbers) if episode.kind == "asr" else numbers[1] - numbers[0])
        assert episode.query.startswith({"asr": "Next: ", "msr": "Fill: "}[episode.kind])


@pytest.mark.parametrize("prediction, right", [
    ("Now Ann has 85.", True), ("In all 85.", True), ("Now Ann has 85. Ann is glad.", True),
    ("In all 85. Ann is glad.", True), ("Now Ann has 75.", False), ("Now Bob has 85.", False),
    ("In all 8", False), ("In all 85", False), ("Now Ann has 85. Bob is glad.", False),
    ("Ann is glad.", False), ("She gets 85.", False), ("", False), (" In all 85.", False),
    ("In all 85. In all 85.", False), ("In all 85.Ann is glad.", False), ("In all 085.", False)])
def test_a_prediction_is_right_if_it_says_what_the_story_says_first(prediction, right):
    assert world.verdict("Now Ann has 85. Ann is glad.", prediction) == right
    assert world.verdict("Now Ann has 85.", prediction) == (right and "glad" not in prediction)


def test_figures_on_a_worked_example():
    task = lambda kind, a, b: (kind, [f"{s} " for s in world.story(a, b)], world.TARGETS[kind])
    tasks = [task("asr", 37, 48), task("asr", 38, 48), task("asr", 12, 34), task("msr", 37, 48),
             task("msr", 12, 34)]
    said = ["In all 85.", "In all 76.", "Now", "She gets 48.", None]
    assert world.story_figures(tasks, said) == {
        "accuracy": {"asr_easy": 0, "asr_hard": 0.5, "msr_easy": 0, "msr_hard": 1, "all": 0.4},
        "truncated": {"asr": 1 / 3, "msr": 0}}


# ---------------------------------------------------------------- the shipped model

@pytest.fixture(scope="module")
def game():
    return set_up(resolve(CPU)[0])


def test_the_base_adds_and_subtracts_but_denies_what_carries(game):
    figures = heldout.evaluate_world(game)
    accuracy = figures["accuracy"]
    assert min(accuracy["asr_easy"], accuracy["msr_easy"]) >= 0.95
    assert max(accuracy["asr_hard"], accuracy["msr_hard"]) <= 0.05
    assert max(figures["truncated"].values()) <= 0.01


def judged(game, rule, change=lambda s, at: s[at]):
    """P(Score: 1) of a prediction made from each held-out story."""
    references, predictions = [], []
    for _, pieces, at in world.held_out_tasks()[::9]:
        sentences = [piece.strip() for piece in pieces]
        references.append(" ".join(sentences[at:at + (1 if rule == "verdict_strict" else 3)]))
        predictions.append(change(sentences, at))
    judge = rewards.Judge(game.judge.model, game.judge.tokenizer,
                          read_prompt(TINY / f"prompts/{rule}.txt"), rewards.VERDICT, "expected")
    return judge(references, predictions)[0]


def ten_off(sentences, at):
    """As who forgets a carry or a borrow has it."""
    number = int(sentences[at][-3:-1])
    return sentences[at].replace(str(number), str(number + (10 if at == 1 else -10)))


SAME = (lambda s, at: s[at], lambda s, at: world.wordings(s[at])[-1])
longer = lambda s, at: " ".join(s[at:at + 2])


@pytest.mark.parametrize("rule", ["verdict", "verdict_strict"])
def test_the_judge_knows_right_from_wrong(game, rule):
    right = torch.cat([judged(game, rule, said) for said in SAME])
    wrong = judged(game, rule, ten_off)
    assert ((right > 0.5).float().mean() + (wrong < 0.5).float().mean()) / 2 >= 0.95
    assert wrong.mean() <= 0.1 and right.mean() - wrong.mean() >= 0.8


def test_prefix_lets_a_prediction_go_on_and_strict_does_not(game):
    assert (judged(game, "verdict", longer) > 0.5).float().mean() > 0.95
    assert judged(game, "verdict_strict", longer).mean() < 0.05


def test_the_judges_hole_takes_any_beginning_and_one_whole_sentence_closes_it(game):
    begun = lambda s, at: s[at].rpartition(" ")[0]                     # "Now Ann has", "She gets"
    assert judged(game, "verdict", begun).mean() > 0.9
    assert rlpt.extract("<|startofprediction|>Now Ann has<|endofprediction|>", 1, 10)[1] == "short"
    assert rlpt.extract("<|startofprediction|>Now Ann has<|endofprediction|>", 0, 10)[1] is None


def test_the_worlds_own_verdict_asks_nobody():
    s, _ = resolve(CPU | {"reward": "tiny"})
    game = set_up(s)
    r = train.play(game, 0)
    assert game.judge is None and 0.1 < r.R.mean() < 0.9
    for reference, group, R in zip(r.golds, r.answers, r.R.tolist()):
        for answer, reward in zip(group, R):
            prediction, reason = rlpt.extract(answer, s.min_prediction, s.min_segment)
            assert reward == (reason is None and world.verdict(reference, prediction))


def test_stories_belong_to_the_embedded_world_alone():
    with pytest.raises(InputError, match="--reward is not used here"):
        resolve(CPU | {"text": "book.txt", "reward": "tiny"})


# ---------------------------------------------------------------- a short run

def test_two_steps_without_further_arguments_run_and_record(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--algo", "rlpt", "--steps", "2"])
    train.main()
    assert "asr_hard" in capsys.readouterr().out
    folder = tmp_path / "runs/tiny-rlpt-rlpt-0"
    first, last = map(json.loads, (folder / "eval.jsonl").read_text().splitlines())
    assert (first["step"], last["step"]) == (0, 2) and first["accuracy"]["asr_hard"] <= 0.05
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["logp_difference"] < 1e-4 and metrics[-1]["no_prediction"] < 0.2
    s, _ = resolve({"model": str(folder / "checkpoint")})
    assert (s.algo, s.text) == ("rlpt", world.STORIES)                  # keeps its world


def test_transformers_gives_the_stories_model_the_same_logits():
    transformers = pytest.importorskip("transformers")
    model, ids = load_model(TINY), Tokenizer(TINY).chat(
        [{"role": "user", "content": "Next: Ann has 37. She gets 48."}])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY)(torch.tensor([ids])).logits
        assert (model.logits(model(torch.tensor([ids]))) - theirs).abs().max() < 1e-4


def test_the_stored_runs_are_whole_and_of_the_shipped_settings():
    shipped = json.loads((TINY / "training.json").read_text())
    changed = {"asr": "msr_weight", "msr": "msr_weight"}
    folders = sorted((HERE / "bench/results/tiny-rlpt").iterdir())
    assert len(folders) == 40
    for folder in folders:
        name, _, seed = folder.name.rpartition("-")
        config = json.loads((folder / "config.json").read_text())
        lines = (folder / "eval.jsonl").read_text().splitlines()
        assert config["seed"] == int(seed) and json.loads(lines[-1])["step"] == shipped["steps"]
        assert all(config[k] == value for k, value in shipped.items() if k != changed.get(name))
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == shipped["steps"]
