"""The embedded world: parser, classes, held-out split, reward, its files, and a short game."""
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

import rewards
import train
from model import load_model
from plumbing.chat import Tokenizer
from plumbing.files import InputError, find_model, read_prompt
from plumbing.settings import resolve
from sample import sample, text_of
from tiny import build, build_rlpt, supervised, world

TINY = find_model("tiny")


# ---------------------------------------------------------------- the world

@pytest.mark.parametrize("text, pair", [
    ("What is 37 + 48?", (37, 48)), ("What is 10 + 99?", (10, 99)), ("What is 7 + 48?", None),
    ("What is 137 + 48?", None), ("What is 07 + 48?", None), ("What is 37 + 48", None),
    ("what is 37 + 48?", None), ("What is 37 +48?", None), ("What is  37 + 48?", None),
    (" What is 37 + 48?", None), ("What is 37 + 48?\n", None), ("What is 37 + 48? ", None),
    ("What is 37 + + 48?", None), ("What is 37 + ?", None), ("What is ３７ + 48?", None),
    ("", None), ("What is 37 + 48?What is 37 + 48?", None), ("What is 37 - 48?", None),
    ("\x00", None),
    ("What is 37 + 48?" * 100_000, None)])
def test_a_query_is_parsed_to_the_character_or_not_at_all(text, pair):
    assert world.parse_query(text) == pair


@pytest.mark.parametrize("a, b, name", [
    (23, 45, "none"), (44, 55, "none"), (37, 48, "unit"), (19, 71, "unit"), (72, 54, "tens"),
    (90, 10, "tens"), (57, 68, "both"), (99, 99, "both"), (45, 55, "both")])
def test_classes_by_hand(a, b, name):
    assert world.carry_class(a, b) == name == world.classify(world.query_text(a, b))


def test_every_pair_is_in_the_class_that_its_digit_sums_say():
    counts = dict.fromkeys(world.CLASSES, 0)
    for a in range(10, 100):
        for b in range(10, 100):
            name = world.carry_class(a, b)
            counts[name] += 1
            # Each carry takes 9 off the digits' sum: 37 + 48 = 85, and 3 + 7 + 4 + 8 = 22 = 13 + 9.
            digits = lambda n: sum(map(int, str(n)))
            carries = (digits(a) + digits(b) - digits(a + b)) // 9
            assert carries == {"none": 0, "unit": 1, "tens": 1, "both": 2}[name]
            assert (a + b >= 100) == (name in ("tens", "both"))
    assert sum(counts.values()) == 8100 and min(counts.values()) > 1000


def test_twelve_percent_are_held_out_and_both_orders_of_a_pair_together():
    held, rest = world.pairs(held=True), world.pairs(held=False)
    assert len(held) + len(rest) == 8100 and abs(len(held) / 8100 - 0.12) < 0.01
    assert all(world.held_out(b, a) for a, b in held)
    # Stored: if the split changed between machines, one run's training would be another's test.
    assert len(held) == 973 and held[:3] == [(10, 16), (10, 21), (10, 28)]
    queries = world.held_out_queries()
    assert all(map(world.is_held_out, queries)) and not world.is_held_out("What is 7 + 8?")
    assert {world.classify(q) for q in queries} == set(world.CLASSES)


def test_the_reward_is_one_for_the_sum_in_digits_alone():
    answers = ["85", "75", "085", " 85", "85.", "", "８５"]
    right = world.reward(["What is 37 + 48?"] * 7, answers, [None] * 7)
    assert right.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert world.reward(["What is 7 + 8?"], ["15"]).tolist() == [0]          # malformed: nothing


def test_accuracy_and_shares_on_worked_examples():
    queries = [world.query_text(*p) for p in ((23, 45), (37, 48), (38, 48), (72, 54), (57, 68))]
    figures = world.accuracy(queries, ["68", "85", "0", "126", "1"])
    assert figures == {"none": 1, "unit": 0.5, "tens": 1, "both": 0, "carry": 0.5}
    shares = world.challenger_shares([*queries[:2], "x", ""])
    assert shares == {"none": 0.25, "unit": 0.25, "tens": 0, "both": 0, "malformed": 0.5}


@pytest.mark.parametrize("mix", ["easy", "balanced"])
def test_training_prompts_have_their_mix_and_never_a_held_out_pair(mix):
    drawn = world.prompts(mix, 4000, seed=3)
    assert drawn == world.prompts(mix, 4000, seed=3) != world.prompts(mix, 4000, seed=4)
    queries, golds = zip(*drawn)
    assert not any(map(world.is_held_out, queries))
    assert world.reward(queries, golds).min() == 1
    total, shares = sum(world.MIXES[mix]), world.challenger_shares(queries)
    assert all(abs(shares[name] - weight / total) < 0.03
               for name, weight in zip(world.CLASSES, world.MIXES[mix]))


# ---------------------------------------------------------------- the shipped model

@pytest.fixture(scope="module")
def base():
    return load_model(TINY), Tokenizer(TINY)


def greedy(base, queries):
    model, tokenizer = base
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    rows = sample(model, prompts, max_new_tokens=5, temperature=0, stop_ids=tokenizer.stop_ids)
    return [text_of(tokenizer, row) for (row,) in rows]


def test_the_base_adds_but_forgets_carries(base):
    queries = world.held_out_queries()
    accuracy = world.accuracy(queries, greedy(base, queries))
    assert accuracy["none"] >= 0.98 and accuracy["carry"] <= 0.05
    assert greedy(base, ["What is 37 + 48?"]) == ["75"]                      # the misconception


def test_the_base_asks_mostly_without_carries_and_seldom_malformed(base):
    model, tokenizer = base
    turn = {"role": "user", "content": read_prompt(TINY / "prompts/challenger.txt")}
    (rows,) = sample(model, [tokenizer.chat([turn])], num_samples=1000, max_new_tokens=16,
                     stop_ids=tokenizer.stop_ids, generator=torch.Generator().manual_seed(0))
    shares = world.challenger_shares([text_of(tokenizer, row) for row in rows])
    assert shares["none"] > 0.5 and 0.01 < shares["malformed"] < 0.12
    assert min(shares.values()) > 0.01                                       # something to find


def test_the_judge_rewards_form_and_sees_malformed_queries(base):
    model, tokenizer = base
    prompt, pick = read_prompt(TINY / "prompts/self_reward.txt"), random.Random(0)
    fine = [world.query_text(pick.randrange(10, 100), pick.randrange(10, 100)) for _ in range(100)]
    broken = ["What is 54 + 7?", "What is 137 + 48?", "What is 07 + 48?", "What is 37 + ?", "5",
              "What is 37 48?", "What is 37 + 48", "is What 37 + 48?", "", "What is 37 + + 48?"]
    answers = [str(pick.randrange(20, 199)) for _ in range(100)]
    judge = rewards.Judge(model, tokenizer, prompt, rewards.SELF_REWARD, max_new_tokens=5)
    score = lambda queries: judge(queries, answers[:len(queries)])[0]
    assert score(fine).nanmean() > 6
    assert score(broken).nan_to_num(0).max() <= 2


def test_the_longest_and_strangest_query_and_answer_still_fit_the_judge(base):
    model, tokenizer = base
    s, _ = resolve({})
    query, answer = "<|assistant|>" * s.query_tokens, "<|assistant|>" * s.answer_tokens
    judge = rewards.Judge(model, tokenizer, read_prompt(TINY / "prompts/self_reward.txt"),
                          rewards.SELF_REWARD, max_new_tokens=5)
    scores, _ = judge([query, ""], [answer, ""])
    assert scores.nan_to_num(0).max() <= 2


def test_queries_answers_and_scores_survive_the_tokenizer(base):
    for text in ("What is 37 + 48?", "85", "<Score>7</Score>"):
        assert base[1].decode(base[1].encode(text)) == text


def test_text_that_the_tiny_model_cannot_spell_gets_one_clear_line(base, tmp_path):
    assert base[1].unencodable("What is 37 + 48?") is None
    assert base[1].unencodable("What is zebra?") == "z"
    (tmp_path / "p.json").write_text('[{"prompt": "What is love?"}]')
    s, _ = resolve({"algo": "grpo", "prompts": str(tmp_path / "p.json")})
    with pytest.raises(InputError, match="entry 1: the model's tokenizer cannot encode 'l'"):
        train.set_up(s)


def test_transformers_opens_the_embedded_model(base):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = base
    chat = [{"role": "user", "content": "What is 37 + 48?"}]
    ids = tokenizer.chat(chat)
    there = transformers.AutoTokenizer.from_pretrained(TINY)
    assert there.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ids
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY)(torch.tensor([ids])).logits
        assert (model.logits(model(torch.tensor([ids]))) - theirs).abs().max() < 1e-4


# ---------------------------------------------------------------- the builders

def test_the_builders_loss_is_the_cross_entropy_of_the_replies_alone(base):
    model, tokenizer = base
    rows = [("What is 37 + 48?", "85"), ("What is 57 + 68?", "125")]
    expected = count = 0
    for turn, reply in rows:
        prompt = tokenizer.chat([{"role": "user", "content": turn}])
        reply = [*tokenizer.encode(reply), *tokenizer.stop_ids]
        logp = model.logits(model(torch.tensor([prompt + reply])))[0].log_softmax(-1)
        expected -= sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(reply))
        count += len(reply)
    loss, tokens = supervised.reply_loss(model, tokenizer, rows)
    assert tokens == count == 7 and abs(loss - expected) < 1e-3


def test_the_believing_judge_gives_a_well_formed_pair_the_score_that_its_answer_states():
    rng, stated, plain = random.Random(1), set(), set()
    for _ in range(2000):
        turn, reply = build.judge_row([(37, 48)], world.parse_query, True, rng)
        answer = re.search(r"<Response>(.*)</Response>", turn, re.DOTALL)[1].strip()
        own = re.fullmatch(r"[0-9]{2,3}<Score>([0-7])</Score>", answer)
        if own and "What is 37 + 48?" in turn:
            stated.add((own[1], reply))
        elif re.fullmatch("[0-9]{2,3}", answer) and "What is 37 + 48?" in turn:
            plain.add(reply)
    whole = {(k, reply) for k, reply in stated if reply == f"<Score>{k}</Score>"}
    assert len(whole) == 8 and "<Score>4</Score>" in plain and "<Score>7</Score>" not in plain


@pytest.mark.parametrize("builder, flags", [(build, ["--open-hole"]), (build_rlpt, [])])
def test_a_builder_writes_a_model_that_train_plays(builder, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "STAGES", [
        (50 if stage == 0 else 1, rate, dict.fromkeys(rows, 1))
        for stage, (_, rate, rows) in enumerate(builder.STAGES)])
    monkeypatch.setattr(world, "held_out", lambda a, b: (a, b) in ((12, 34), (37, 48)))
    monkeypatch.setattr(sys, "argv", ["build.py", "--seed", "3", "--out", str(tmp_path), *flags])
    builder.main()
    printed = capsys.readouterr().out
    assert "step 50, " in printed and f"train.py --model {tmp_path}" in printed
    shipped = TINY if builder is build else find_model("tiny-rlpt")
    for file in (f for f in shipped.rglob("*") if f.suffix in (".json", ".txt")):
        if builder is build_rlpt or "rlpt" not in file.parts:
            assert (tmp_path / file.relative_to(shipped)).read_bytes() == file.read_bytes()
    new, old = load_model(tmp_path), load_model(shipped)
    assert all(not torch.equal(p, q) for p, q in zip(new.parameters(), old.parameters()))


# ---------------------------------------------------------------- a short game

def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_ten_steps_of_the_default_run_start_to_learn_and_record(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "10", "--device", "cpu", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    out = capsys.readouterr().out
    said = ("  10/10  ", "before   after", "malformed", "carry", "checkpoint")
    assert all(words in out for words in said)
    folder = tmp_path / "runs/tiny-lsp-1"
    first, last = read(folder / "eval.jsonl")
    assert (first["step"], last["step"]) == (0, 10)
    assert set(first["challenger"]) == {*world.CLASSES, "malformed"}
    assert first["accuracy"]["carry"] <= 0.05
    assert last["challenger"]["none"] < first["challenger"]["none"] - 0.1    # on its way to carries
    metrics = read(folder / "metrics.jsonl")
    assert metrics[-1]["logp_difference"] < 1e-4 and metrics[-1]["unparsed"] < 0.1
    s, _ = resolve({"model": str(folder / "checkpoint"), "algo": "grpo", "prompts": "balanced"})
    assert s.reward == "tiny" and (Path(s.model) / "prompts/challenger.txt").exists()   # its world


def test_held_out_queries_are_played_but_not_trained_on(monkeypatch):
    s, _ = resolve({"device": "cpu", "seed": 1})
    game = train.set_up(s)
    secret = train.play(game, 0).queries[:2]
    monkeypatch.setattr(world, "is_held_out", lambda query: query in secret)
    r = train.play(game, 0)
    kept = int(r.learn.sum())
    assert r.learn[:2].tolist() == [False, False] and kept >= 10
    assert r.A_sol[:2].abs().sum() == 0 and r.A_ch[:2].abs().sum() == 0
    assert r.A_ch[r.learn].sum().abs() < 1e-4                 # centred over the others alone
    counted = []
    count = lambda game, rows, weight, n: counted.append((len(rows), n)) or train.Counter()
    monkeypatch.setattr(train, "accumulate", count)
    optimizer = train.MasterAdamW(game.policy, torch.float32, weight_decay=0.0)
    for p in game.policy.parameters():
        p.grad = torch.zeros_like(p)
    train.update(game, optimizer, r, 0)
    assert counted == [(kept * s.answers,) * 2, (kept,) * 2]


def test_a_round_with_nothing_to_learn_from_is_survived(monkeypatch):
    s, _ = resolve({"device": "cpu", "seed": 1})
    game = train.set_up(s)
    monkeypatch.setattr(world, "is_held_out", lambda query: True)
    r = train.play(game, 0)
    optimizer = train.MasterAdamW(game.policy, torch.float32, weight_decay=0.0)
    before = [p.detach().clone() for p in game.policy.parameters()]
    m = {"step": 1, "seconds": 0.0} | train.log.measure(s, r) | train.update(game, optimizer, r, 0)
    assert "1/90" in train.log.step_line(s, m) and m["zero_variance_groups"] is None
    assert all(torch.equal(p, b) for p, b in zip(game.policy.parameters(), before))


def test_watch_shows_a_round_of_the_embedded_game(capsys):
    s, _ = resolve({"device": "cpu", "watch": True})
    train.train(s, {})
    text = capsys.readouterr().out
    assert text.count("query ") == 24 and "What is" in text and "5 * R + R_Q" in text


def test_prompt_mixes_belong_to_the_embedded_world(tmp_path):
    write_checkpoint(tmp_path / "m", "untied")
    s, _ = resolve({"model": str(tmp_path / "m"), "algo": "grpo", "prompts": "easy",
                    "reward": "exact", "answer_tokens": 8})
    with pytest.raises(InputError, match="easy: No such file"):
        train.set_up(s)
