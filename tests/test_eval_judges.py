"""Win-rates: pairs, orders, annotations, local judges, and an endpoint that misbehaves."""
import io
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from checkpoints import write_checkpoint
from conftest import ROOT

import eval as eval_script
from evals import judges, results
from model import load_model
from plumbing.chat import Tokenizer, fill
from plumbing.files import InputError, read_prompt
from rewards import RewardModel

KEY = "sk-not-to-be-seen-anywhere"
PROMPT = read_prompt(ROOT / "prompts/preference.txt")


def completion(text) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def prefer_longer(question: str) -> str:
    """A judge without a favourite place: the longer answer, as it stands between the tags."""
    first, second = (question.split(f"<Answer{n}>\n")[1].split(f"\n</Answer{n}>")[0] for n in "12")
    return f"Better: {'tie' if len(first) == len(second) else 1 + (len(second) > len(first))}"


class Server:
    """An OpenAI-compatible server whose behave(question, number of the request) gives
    (status, headers, body, seconds to wait); it keeps what it was sent."""

    def __init__(self, behave):
        outer, self.requests, self.at_once, self.most_at_once = self, [], 0, 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                size = int(self.headers.get("Content-Length", 0))          # none: a redirect's GET
                sent = json.loads(self.rfile.read(size) or '{"messages": [{"content": ""}]}')
                with lock:
                    outer.requests.append((self.path, dict(self.headers), sent))
                    number = len(outer.requests)
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                status, headers, body, seconds = behave(sent["messages"][0]["content"], number)
                time.sleep(seconds)
                with lock:
                    outer.at_once -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    pass                                  # the client did not wait

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(judges.KEY, KEY)
    monkeypatch.setattr(judges, "BACKOFF", 0.001)
    servers = []

    def start(behave) -> Server:
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def fair(question, number):
    return 200, {}, completion(prefer_longer(question)), 0


def write_outputs(folder, count=6):
    """The measured model's answer is longer to even questions: it wins half, and ties none."""
    ours = [{"dataset": "koala" if i < count / 2 else "vicuna", "instruction": f"question {i}",
             "output": "long " * 4 if i % 2 == 0 else "short", "generator": "run"}
            for i in range(count)]
    theirs = [entry | {"output": "between", "generator": "base"} for entry in ours]
    for name, outputs in (("run", ours), ("base", theirs)):
        (folder / f"{name}.json").write_text(json.dumps(outputs))
    return [str(folder / "run.json"), str(folder / "base.json")]


def winrate(monkeypatch, capsys, *arguments) -> dict:
    """The last line of `python eval.py winrate ...`, and what all of it said."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "winrate", *map(str, arguments)])
    eval_script.main()
    out, err = capsys.readouterr()
    return json.loads(out.strip().split("\n")[-1]) | {"said": out + err}


# ---------------------------------------------------------------- annotations

def test_annotations_give_the_hand_worked_win_rate_and_error(monkeypatch, capsys):
    # preference - 1 is 1, 0, .5, .5 (a 0 is a draw), failed, .25: mean .45; squares of the
    # deviations .3025 + .2025 + .0025 + .0025 + .04 = .55; error sqrt(.55 / 4 / 5) = .1658312395.
    file = ROOT / "tests/data/annotations.json"
    figures = winrate(monkeypatch, capsys, "--annotations", file)
    assert figures["n"] == 5 and figures["failed"] == 1
    assert abs(figures["win_rate"] - 45) < 1e-6
    assert abs(figures["standard_error"] - 16.58312395) < 1e-6
    assert figures["interval"] == pytest.approx([45 - 32.50292, 45 + 32.50292], abs=1e-4)
    lines = figures["said"].split("\n")
    assert [line.split()[:2] for line in lines[:2]] == [["koala", "50.00"], ["vicuna", "37.50"]]


@pytest.mark.parametrize("content, message", [
    ('[{"preference": 3}]', "entry 1: expected a preference"),
    ('[{"preference": 1}, {"generator_1": "x"}]', "entry 2: expected a preference"),
    ('[7]', "entry 1"), ("[]", "annotations of no model"),
    ('[{"preference": "2"}]', "entry 1"), ('[{"preference": NaN}]', "entry 1"), ("[{", "line 1")])
def test_broken_annotations_are_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=message):
        judges.read_annotations(str(tmp_path / "a.json"))


# ---------------------------------------------------------------- pairs and orders

def test_answers_are_paired_by_instruction_whatever_their_order(tmp_path):
    entry = lambda q, a: {"instruction": q, "output": a}
    ours = [entry("x", "x1"), entry("y", "y1"), entry("x", "x2"), entry("only ours", "")]
    theirs = [entry("y", "y'"), entry("only theirs", ""), entry("x", "x'")]
    for name, outputs in (("a", ours), ("b", theirs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(outputs))
    pairs, names = judges.read_pairs(str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert names == ["a", "b"] and [(p["query"], p["a"], p["b"]) for p in pairs] == [
        ("x", "x2", "x'"), ("y", "y1", "y'")]                       # of equal ones the last


def test_both_orders_are_asked_and_a_judge_that_favours_a_place_is_named(
        serve, monkeypatch, capsys, tmp_path):
    server = serve(lambda question, number: (200, {}, completion("Better: 1"), 0))
    figures = winrate(monkeypatch, capsys, *write_outputs(tmp_path), "--judge", server.url,
                      "--judge-model", "first")
    assert figures["win_rate"] == 50 and figures["standard_error"] == 0 and figures["n"] == 6
    assert "agree on 0 of 6 pairs; the answer shown first is preferred in 100%" in figures["said"]
    assert "this judge goes by the place" in figures["said"]
    shown = [sent["messages"][0]["content"] for _, _, sent in server.requests]
    assert len(set(shown)) == len(shown) == 12
    pair = {"query": "question 1", "a": "short", "b": "between"}
    assert {judges.asked(PROMPT, pair, "a"), judges.asked(PROMPT, pair, "b")} <= set(shown)


def test_an_endpoint_that_judges_by_the_answers_gives_their_win_rate(
        serve, monkeypatch, capsys, tmp_path):
    server = serve(fair)
    outputs = write_outputs(tmp_path)
    figures = winrate(monkeypatch, capsys, *outputs, "--judge", server.url, "--judge-model", "fair")
    assert (figures["generator"], figures["against"]) == ("run", "base")
    assert figures["win_rate"] == 50 and figures["standard_error"] == pytest.approx(
        100 * (0.3 / 6) ** 0.5)                                            # of 1, 0, 1, 0, 1, 0
    assert "koala                     66.67" in figures["said"]
    path, headers, sent = server.requests[0]
    assert path == "/v1/chat/completions" and sent["model"] == "fair"
    assert headers["Authorization"] == f"Bearer {KEY}" and sent["temperature"] == 0
    swapped = winrate(monkeypatch, capsys, *outputs[::-1], "--judge", server.url, "--judge-model",
                      "fair")
    assert swapped["win_rate"] == 50 and "koala                     33.33" in swapped["said"]


def test_equal_answers_are_a_tie_that_costs_nothing(serve, monkeypatch, capsys, tmp_path):
    server = serve(fair)
    outputs = write_outputs(tmp_path)
    figures = winrate(monkeypatch, capsys, outputs[0], outputs[0], "--judge", server.url,
                      "--judge-model", "fair")
    assert figures["win_rate"] == 50 and not server.requests


@pytest.mark.parametrize("reply, said", [
    ("Better: 1", "1"), ("better: 2.", "2"), ("**Better:** tie", "tie"), ("Better: **2**", "2"),
    ("Both are good, I think.\n\nBetter: 2\n", "2"), ("Better: 1\nBetter: 1", "1"),
    ("Better: 1\nBetter: 2", None), ("", None), (None, None), ("2", None), ("Better: 3", None),
    ("Better: 1 or 2", None), ("Is Better: 1 right?", None), ("Better 1", None),
    ("Better: 12", None), ("> Better: 'TIE'", "tie")])
def test_replies_are_read_or_refused(reply, said):
    assert judges.parse_preference(reply) == said


def test_a_huge_reply_is_read_in_linear_time():
    begun = time.perf_counter()
    for piece in ("better:", "better: ", "* ", "better: 1 ", ":", "better:\n", "_"):
        judges.parse_preference(piece * 300_000)
    assert time.perf_counter() - begun < 5


# ---------------------------------------------------------------- an endpoint that misbehaves

@pytest.mark.parametrize("bad", [
    (500, {}, b"oops", 0), (200, {}, b"<html>", 0), (200, {}, b'{"choices": []}', 0),
    (200, {}, b'{"choices": [{"message": {"content": 7}}]}', 0),
    (200, {"Content-Length": "999"}, b'{"cho', 0), (503, {}, b"\xff\xfe", 0), (408, {}, b"", 0),
    (200, {}, completion("too late"), 0.5), (200, {}, b"null", 0)])
def test_failing_malformed_and_slow_replies_are_tried_again(serve, bad):
    server = serve(lambda q, number: bad if number <= 2 else (200, {}, completion("good"), 0))
    assert judges.Endpoint(server.url, "m", seconds=0.1).ask("x") == {"reply": "good"}
    assert len(server.requests) == 3
    server = serve(lambda q, number: bad)
    with pytest.raises(InputError, match=server.url):
        judges.Endpoint(server.url, "m", seconds=0.05).ask("x")
    assert len(server.requests) == judges.TRIES


def test_a_rate_limit_is_waited_for_twice_as_long_with_each_try(serve, monkeypatch):
    server = serve(lambda q, number: (429, {}, b"slowly", 0) if number < 4
                   else (200, {}, completion("at last"), 0))
    endpoint, waits = judges.Endpoint(server.url, "m"), []
    monkeypatch.setattr(endpoint.stop, "wait", lambda seconds: waits.append(seconds))
    assert endpoint.ask("x") == {"reply": "at last"} and waits == [0.001, 0.002, 0.004]


def test_no_more_questions_are_under_way_than_allowed(serve, monkeypatch, capsys, tmp_path):
    server = serve(lambda q, number: fair(q, number)[:3] + (0.02,))
    winrate(monkeypatch, capsys, *write_outputs(tmp_path, 10), "--judge", server.url,
            "--judge-model", "m", "--concurrency", 3)
    assert server.most_at_once == 3


def test_after_a_failure_nothing_is_lost_and_nothing_paid_twice(
        serve, monkeypatch, capsys, tmp_path):
    broken = True
    paid = []

    def behave(question, number):
        if broken and number > 7:
            return 500, {}, b"", 0
        paid.append(question)
        return fair(question, number)
    server = serve(behave)
    out = tmp_path / "verdicts.jsonl"
    command = (*write_outputs(tmp_path, 10), "--judge", server.url, "--judge-model", "m", "--out",
               out, "--concurrency", 2)
    with pytest.raises(InputError, match="HTTP 500 .*the same command goes on"):
        winrate(monkeypatch, capsys, *command)
    assert len(results.read_lines(out)) == 1 + 7
    with open(out, "a") as file:
        file.write('{"item": 9, "first": "b", "prefer')        # and a crash within a line
    broken = False
    figures = winrate(monkeypatch, capsys, *command)
    assert figures["win_rate"] == 50 and figures["n"] == 10 and len(set(paid)) == len(paid) == 20
    written = out.read_text()
    assert winrate(monkeypatch, capsys, *command)["n"] == 10 and len(paid) == 20
    assert out.read_text() == written and len(written.split("\n")) == 22


def test_one_question_that_is_refused_is_left_open_and_does_not_stop_the_others(
        serve, monkeypatch, capsys, tmp_path):
    unfit = True
    server = serve(lambda q, number: (400, {}, b"too long", 0) if unfit and "question 3" in q
                   else fair(q, number))
    command = (*write_outputs(tmp_path), "--judge", server.url, "--judge-model", "m")
    figures = winrate(monkeypatch, capsys, *command)
    assert figures["n"] == 5 and figures["failed"] == 1 and len(server.requests) == 12
    assert "2 questions have no verdict, for example 'HTTP 400 too long'" in figures["said"]
    unfit = False
    assert winrate(monkeypatch, capsys, *command)["n"] == 6 and len(server.requests) == 14


def test_a_reply_that_cannot_be_parsed_is_counted_shown_and_asked_again(
        serve, monkeypatch, capsys, tmp_path):
    strange = {"question 0": "I like both.", "question 2": None, "question 4": "\ud800"}
    server = serve(lambda q, number: next(
        ((200, {}, completion(said), 0) for name, said in strange.items() if name in q),
        fair(q, number)))
    command = (*write_outputs(tmp_path), "--judge", server.url, "--judge-model", "m")
    for asked in (12, 18):
        figures = winrate(monkeypatch, capsys, *command)
        assert figures["n"] == 3 and figures["failed"] == 3 and len(server.requests) == asked
        assert "6 questions have no verdict, for example " in figures["said"]
    strange.clear()
    assert winrate(monkeypatch, capsys, *command)["n"] == 6 and len(server.requests) == 24


def test_the_agreement_of_the_two_orders_is_reported(capsys):
    judges.report([{"item": 0, "first": x, "preference": 1} for x in "ab"])
    out = capsys.readouterr().out
    assert "agree on 1 of 1 pairs" in out and "preferred in 50%" in out and "place" not in out


def test_an_error_behind_status_200_is_shown(serve):
    server = serve(lambda q, number: (200, {}, b'{"error": {"message": "overloaded"}}', 0))
    with pytest.raises(InputError, match="HTTP 200 .*overloaded"):
        judges.Endpoint(server.url, "m").ask("x")


def test_further_fields_of_a_request_are_added_and_null_leaves_one_out(serve):
    server = serve(lambda q, number: (200, {}, completion("Better: 1"), 0))
    fields = judges.json_object('{"max_completion_tokens": 9, "max_tokens": null}')
    judges.Endpoint(server.url, "m", fields=fields).ask("question 1")
    body = server.requests[0][2]
    assert body["max_completion_tokens"] == 9 and "max_tokens" not in body
    with pytest.raises(InputError, match="--judge-fields"):
        eval_script.make_parser().parse_args(["winrate", "--judge-fields", "[1]"])


def test_annotations_of_several_models_need_a_name(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"generator_2": name, "preference": p}
                                for name, p in (("good", 2), ("bad", 1)) for _ in range(3)]))
    with pytest.raises(InputError, match="annotations of bad, good: choose one with"):
        judges.read_annotations(str(file))
    assert judges.read_annotations(str(file), "good") == [(1, None)] * 3
    with pytest.raises(InputError, match="annotations of bad, good"):
        judges.read_annotations(str(file), "x")


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_does_not_take_the_key_along(serve, status):
    other = serve(lambda q, number: (404, {}, b"", 0))
    there = {"Location": other.url + "/chat/completions"}
    server = serve(lambda q, number: (status, there, b"", 0))
    with pytest.raises(InputError, match="HTTP"):
        judges.Endpoint(server.url, "m").ask("x")
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert all(KEY not in str(request) for request in other.requests)


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_address_ends_the_command_at_once(serve, status):
    server = serve(lambda q, number: (status, {}, b"wrong", 0))
    with pytest.raises(InputError, match=f"HTTP {status} wrong"):
        judges.Endpoint(server.url, "m").ask("x")
    assert len(server.requests) == 1


def test_the_key_is_not_stored(serve, monkeypatch, capsys, tmp_path):
    server = serve(fair)
    outputs = write_outputs(tmp_path)
    said = winrate(monkeypatch, capsys, *outputs, "--judge", server.url, "--judge-model", "m")
    files = list(tmp_path.iterdir())
    assert len(files) == 3 and all(KEY not in file.read_text() for file in files)
    assert KEY not in said["said"]


def test_without_a_key_none_is_sent(serve, monkeypatch):
    monkeypatch.delenv(judges.KEY)
    server = serve(lambda q, number: (200, {}, completion("yes"), 0))
    assert judges.Endpoint(server.url + "/", "m").ask("x") == {"reply": "yes"}
    assert "Authorization" not in server.requests[0][1]


# ---------------------------------------------------------------- judges on this machine

def test_a_reward_model_prefers_the_higher_reward(monkeypatch, capsys, tmp_path):
    write_checkpoint(tmp_path / "judge", "scalar_head")
    outputs = write_outputs(tmp_path)
    command = (*outputs, "--judge", tmp_path / "judge", "--device", "cpu")
    figures = winrate(monkeypatch, capsys, *command)
    ours, theirs = (json.loads(open(file).read()) for file in outputs)
    model = RewardModel(tmp_path / "judge")
    wins = [model([a["instruction"]], [a["output"]]) > model([b["instruction"]], [b["output"]])
            for a, b in zip(ours, theirs)]
    assert figures["win_rate"] == pytest.approx(100 * sum(map(bool, wins)) / 6)
    verdicts = tmp_path / "run-against-base-judge.jsonl"
    whole = verdicts.read_text()
    verdicts.write_text("".join(whole.splitlines(True)[:4]) + '{"item": 3, "pre')
    assert winrate(monkeypatch, capsys, *command)["win_rate"] == figures["win_rate"]
    kept = [(r["item"], r["preference"]) for r in results.read_lines(verdicts)[1:]]
    assert kept == [(r["item"], r["preference"]) for r in map(json.loads, whole.splitlines()[1:])]


def test_a_reward_that_is_no_number_is_a_failed_verdict():
    verdicts, rewards = [], iter(([1.0, float("nan"), 2.0], [1.0, 1.0, float("nan")]))
    pairs = [{"item": i, "query": "q", "subset": None, "a": "", "b": ""} for i in range(3)]
    judge = lambda queries, answers: torch.tensor(next(rewards))
    judges.by_reward(judge, [(pair, None) for pair in pairs], verdicts.append, 3)
    assert [v["preference"] for v in verdicts] == [1.5, None, None]


def test_a_llama_judges_by_the_probability_of_1_against_2_in_both_orders(
        monkeypatch, capsys, tmp_path):
    write_checkpoint(tmp_path / "judge", "untied", max_position_embeddings=4096)
    outputs = write_outputs(tmp_path)
    command = ("--judge", tmp_path / "judge", "--device", "cpu", "--batch", 5)
    figures = winrate(monkeypatch, capsys, *outputs, *command)
    swapped = winrate(monkeypatch, capsys, *outputs[::-1], *command)
    assert figures["win_rate"] + swapped["win_rate"] == pytest.approx(100)
    assert figures["win_rate"] != pytest.approx(50, abs=1e-3)
    assert "wanted to say something else" in figures["said"]
    tokenizer, model = Tokenizer(tmp_path / "judge"), load_model(
        tmp_path / "judge", device="cpu", dtype=torch.float32)
    for record in results.read_lines(tmp_path / "run-against-base-judge.jsonl")[1:5]:
        ours = "long " * 4 if record["item"] % 2 == 0 else "short"
        first, second = (ours, "between") if record["first"] == "a" else ("between", ours)
        text = fill(PROMPT, instruction=record["query"], first=first, second=second)
        ids = tokenizer.chat([{"role": "user", "content": text}]) + tokenizer.encode("Better: ")
        with torch.no_grad():
            p = model.logits(model(torch.tensor([ids])))[0, -1].softmax(-1)
        one, two = (p[tokenizer.encode(digit)[0]].item() for digit in "12")
        wins = (one if record["first"] == "a" else two) / (one + two)
        assert record["preference"] == pytest.approx(1 + wins, abs=1e-5)


def test_a_question_longer_than_the_judges_context_is_said_before_any_is_asked(
        monkeypatch, capsys, tmp_path):
    write_checkpoint(tmp_path / "judge", "untied", max_position_embeddings=128)
    outputs = write_outputs(tmp_path)
    with pytest.raises(InputError, match=r"\d+ tokens does not fit into .* context of 128"):
        winrate(monkeypatch, capsys, *outputs, "--judge", tmp_path / "judge", "--device", "cpu")


@pytest.mark.parametrize("arguments, message", [
    ([], "two files of outputs"), (["a.json"], "two files of outputs"),
    (["a.json", "b.json"], "--judge"), (["a.json", "b.json", "--annotations", "c"], "or --annot"),
    (["a.json", "b.json", "--judge", "http://localhost:1/v1"], "--judge-model"),
    (["a.json", "b.json", "--judge", "nowhere"], "no such directory"),
    (["a.json", "empty.json", "--judge", "tiny"], "empty.json: nothing in it"),
    (["a.json", "bad.json", "--judge", "tiny"], "bad.json, entry 1: no text in instruction"),
    (["a.json", "other.json", "--judge", "tiny"], "share no instruction")])
def test_bad_input_is_named(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a", '[{"instruction": "x", "output": "y"}]'), ("empty", "[]"),
                          ("b", '[{"instruction": "x", "output": "z"}]'),
                          ("bad", '[{"output": 1}]'),
                          ("other", '[{"instruction": "w", "output": "z"}]')):
        (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(InputError, match=message):
        winrate(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_reply_that_trickles_is_cut_off(monkeypatch):
    class Trickle(io.BytesIO):
        def read1(self, size):
            time.sleep(0.05)
            return b"x"
    monkeypatch.setattr(judges.urllib.request, "urlopen", lambda request, timeout: Trickle())
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="no whole reply in 0.2 s"):
        judges.Endpoint("http://localhost", "m", seconds=0.2).send("Hello")
    assert time.monotonic() - begun < 2
