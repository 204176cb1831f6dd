"""eval.py's commands: answers that resume, benchmarks that agree with an independent count."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import write_checkpoint

import eval as eval_script
from evals import benchmarks, grade, heldout, results
from plumbing.cli import run_script
from plumbing.files import HERE, InputError
from plumbing.phases import Phases
from tiny import world


def command(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    eval_script.main()
    return capsys.readouterr().out


def interrupted(monkeypatch, capsys, after, *arguments):
    """The command, with Ctrl-C after so many written items, and a crash within the next line."""
    append, written = eval_script.append_line, []

    def append_some(path, record):
        if len(written) == after:
            with open(path, "a") as file:
                file.write(json.dumps(record)[:-5])
            raise KeyboardInterrupt
        written.append(record)
        append(path, record)
    monkeypatch.setattr(eval_script, "append_line", append_some)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, capsys, *arguments)
    monkeypatch.setattr(eval_script, "append_line", append)


@pytest.fixture
def prompts(tmp_path):
    """Instructions as AlpacaEval's file has them, in the embedded model's few letters."""
    entries = [{"instruction": f"What is {a} + {a + 11}?", "dataset": "koala"}
               for a in range(20, 27)]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    return tmp_path / "prompts.json"


# ---------------------------------------------------------------- generate

def test_outputs_have_alpaca_evals_format(monkeypatch, capsys, tmp_path, prompts):
    said = command(monkeypatch, capsys, "generate", "--prompts", prompts, "--out",
                   tmp_path / "new/outputs.json", "--generator", "me", "--max-new-tokens", 3)
    outputs = json.loads((tmp_path / "new/outputs.json").read_text())
    assert [list(o) for o in outputs] == [["dataset", "instruction", "output", "generator"]] * 7
    assert [o["instruction"] for o in outputs] == [
        e["instruction"] for e in json.loads(prompts.read_text())]
    assert outputs[0]["output"] == "51" and outputs[0]["generator"] == "me"      # 20 + 31
    assert "7 answers, 0 of them cut off" in said and len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupted_generate_goes_on_to_the_same_outputs(
        monkeypatch, capsys, tmp_path, prompts, after):
    flags = ("generate", "--prompts", prompts, "--temperature", 5, "--max-new-tokens", 6, "--batch",
             3, "--seed", 4, "--out")
    command(monkeypatch, capsys, *flags, tmp_path / "whole.json")
    interrupted(monkeypatch, capsys, after, *flags, tmp_path / "broken.json")
    assert not (tmp_path / "broken.json").exists()
    command(monkeypatch, capsys, *flags, tmp_path / "broken.json")
    outputs = json.loads((tmp_path / "broken.json").read_text())
    assert outputs == json.loads((tmp_path / "whole.json").read_text())
    assert len({o["output"] for o in outputs}) > 3                  # hot: every answer is another
    assert not list(tmp_path.glob("*.partial"))


def test_the_batch_changes_no_answer_and_the_seed_does(monkeypatch, capsys, tmp_path, prompts):
    outputs = []
    for name, flags in (("a", ["--batch", 1]), ("b", ["--batch", 7]), ("c", ["--seed", 1])):
        command(monkeypatch, capsys, "generate", "--prompts", prompts, "--temperature", 5,
                "--max-new-tokens", 6, "--out", tmp_path / f"{name}.json", *flags)
        outputs.append((tmp_path / f"{name}.json").read_text())
    assert outputs[0] == outputs[1] != outputs[2]


def test_what_exists_is_not_overwritten_and_other_settings_do_not_go_on(
        monkeypatch, capsys, tmp_path, prompts):
    flags = ("generate", "--prompts", prompts, "--max-new-tokens", 3, "--out", tmp_path / "o.json")
    interrupted(monkeypatch, capsys, 2, *flags)
    with pytest.raises(InputError, match="o.json.partial was made with another temperature"):
        command(monkeypatch, capsys, *flags, "--temperature", 1)
    prompts.write_text(prompts.read_text().replace("20 + 31", "21 + 31"))
    with pytest.raises(InputError, match="another questions"):
        command(monkeypatch, capsys, *flags)
    (tmp_path / "o.json").write_text("mine")
    with pytest.raises(InputError, match="o.json exists already"):
        command(monkeypatch, capsys, *flags)
    assert (tmp_path / "o.json").read_text() == "mine"


def test_a_checkpoint_goes_by_its_runs_name():
    assert eval_script.name_of("runs/tiny-lsp-0/checkpoint") == "tiny-lsp-0"
    assert eval_script.name_of("runs/tiny-lsp-0/checkpoint-000050/") == "tiny-lsp-0"
    assert eval_script.name_of("HuggingFaceTB/SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"
    assert eval_script.name_of("llama-3.2-3b") == "llama-3.2-3b"


# ---------------------------------------------------------------- benchmarks

def test_the_embedded_benchmark_is_the_worlds_accuracy_item_by_item(monkeypatch, capsys, tmp_path):
    flags = ("benchmark", "tiny", "--out", tmp_path / "tiny.jsonl", "--batch", 256)
    said = command(monkeypatch, capsys, *flags)
    header, *records = results.read_lines(tmp_path / "tiny.jsonl")
    records.sort(key=lambda record: record["item"])            # written as they ended
    queries = [record["query"] for record in records]
    assert queries == world.held_out_queries() and header["model"] == str(HERE / "tiny")
    shares = world.accuracy(queries, [record["answers"][0] for record in records])
    figures = json.loads(said.split("\n")[-2])
    n = figures["n"]
    right = sum(shares[c] * sum(world.classify(q) == c for q in queries) for c in world.CLASSES)
    assert n == len(queries) and figures["accuracy"] == pytest.approx(100 * right / n)
    for name in world.CLASSES:
        assert f"{name:24} {100 * shares[name]:6.2f}" in said
    # Again: nothing is left to do, the figures are the same.
    before = (tmp_path / "tiny.jsonl").read_text()
    monkeypatch.setattr(eval_script, "load_model", None)
    assert command(monkeypatch, capsys, *flags).split("\n")[-2] == said.split("\n")[-2]
    assert (tmp_path / "tiny.jsonl").read_text() == before


def test_an_interrupted_benchmark_goes_on_to_the_same_file(monkeypatch, capsys, tmp_path):
    flags = ("benchmark", "tiny", "--limit", 10, "--samples", 3, "--temperature", 2, "--batch", 4,
             "--out")
    said = command(monkeypatch, capsys, *flags, tmp_path / "whole.jsonl")
    interrupted(monkeypatch, capsys, 5, *flags, tmp_path / "broken.jsonl")
    assert command(monkeypatch, capsys, *flags, tmp_path / "broken.jsonl") == said
    whole, broken = (results.read_lines(tmp_path / f"{n}.jsonl")[1:] for n in ("whole", "broken"))
    by_item = lambda records: sorted(records, key=lambda record: record["item"])
    assert by_item(whole) == by_item(broken) and len(whole) == 10
    figures = json.loads(said.split("\n")[-2])
    right = [sum(record["correct"]) for record in whole]
    assert figures["pass@1"] == pytest.approx(100 * sum(right) / 30)
    assert figures["pass@3"] == pytest.approx(100 * sum(r > 0 for r in right) / 10)


def answering(monkeypatch, *texts, cut=False):
    """The model says these, one an item; a list is an item's samples."""
    def answer(args, queries, done, samples=1):
        for i in (i for i in range(len(queries)) if i not in done):
            said = texts[i] if isinstance(texts[i], list) else [texts[i]]
            yield i, [(text, cut) for text in said]
    monkeypatch.setattr(eval_script, "answer", answer)


def test_gsm8k_compares_final_numbers_and_counts_cut_off_answers_as_wrong(
        monkeypatch, capsys, tmp_path):
    problems = [{"question": f"Q{i}", "answer": f"so\n#### {gold}"} for i, gold in
                enumerate(("1,200", "7", "-3", "18"))]
    # U+2028 ends a line to splitlines(), not in JSON lines.
    (tmp_path / "p.jsonl").write_text("\n".join(
        json.dumps(p, ensure_ascii=False).replace("Q0", "Q\u20280") for p in problems))
    flags = ("benchmark", "gsm8k", "--prompts", tmp_path / "p.jsonl", "--out")
    answering(monkeypatch, "It is $1200.00.", "7 or rather #### 8", "#### -3", "no idea")
    said = command(monkeypatch, capsys, *flags, tmp_path / "a.jsonl")
    assert json.loads(said.split("\n")[-2])["accuracy"] == 50
    header, *records = results.read_lines(tmp_path / "a.jsonl")
    assert [record["correct"] for record in records] == [[True], [False], [True], [False]]
    assert "Q\u20280" in records[0]["query"] and header["prompt"].count("{problem}") == 1
    answering(monkeypatch, *["#### 7"] * 4, cut=True)
    said = command(monkeypatch, capsys, *flags, tmp_path / "b.jsonl")
    assert json.loads(said.split("\n")[-2])["accuracy"] == 0 and "4 of 4" in said


def test_math_needs_a_box_with_an_equal_answer(monkeypatch, capsys, tmp_path):
    pytest.importorskip("math_verify")
    golds = [r"\frac{1}{2}", "3", "x+1", "10"]
    (tmp_path / "p.json").write_text(json.dumps(
        [{"problem": f"P{i}", "answer": gold, "subject": "Algebra"} for i, gold in
         enumerate(golds)]))
    answering(monkeypatch, r"first \boxed{4}, no: \boxed{\dfrac{1}{2}}", "3", r"\boxed{x + 1}",
              r"\boxed{11}")
    said = command(monkeypatch, capsys, "benchmark", "math", "--prompts", tmp_path / "p.json",
                   "--out", tmp_path / "r.jsonl")
    assert json.loads(said.split("\n")[-2])["accuracy"] == 50
    assert [r["reasons"][0] for r in results.read_lines(tmp_path / "r.jsonl")[1:]] == [
        "equal", "nothing boxed", "equal", "not equal"]


def test_programs_run_only_when_allowed_and_pass_at_k_is_unbiased(monkeypatch, capsys, tmp_path):
    problems = [{"prompt": "Write a function to add two numbers.", "task_id": 1, "test_imports": [],
                 "code": "def add(a, b): return a + b",
                 "test_list": ["assert add(2, 3) == 5", "assert add(0, 0) == 0"]}]
    (tmp_path / "p.json").write_text(json.dumps(problems))
    flags = ("benchmark", "mbpp", "--prompts", tmp_path / "p.json", "--out", tmp_path / "r.jsonl",
             "--samples", 4, "--temperature", 1)
    good, bad = ("```python\ndef add(a, b):\n    return a " + sign + " b\n```" for sign in "+-")
    answering(monkeypatch, [good, bad, bad, good])
    with pytest.raises(InputError, match="--allow-code"):
        command(monkeypatch, capsys, *flags)
    said = command(monkeypatch, capsys, *flags, "--allow-code")
    figures = json.loads(said.split("\n")[-2])
    assert figures["pass@1"] == 50 and figures["pass@4"] == 100
    assert grade.ISOLATION[grade.containment()] in said
    record = results.read_lines(tmp_path / "r.jsonl")[1]
    assert record["correct"] == [True, False, False, True]
    assert "assert add(2, 3) == 5" in record["query"]
    values = benchmarks.scores([{"correct": [True, True] + [False] * 8}], 10)
    assert values["pass@5"] == pytest.approx([1 - (8 * 7 * 6 * 5 * 4) / (10 * 9 * 8 * 7 * 6)])


def test_humaneval_completes_the_function_it_is_given(monkeypatch, capsys, tmp_path):
    problem = {"task_id": "HumanEval/0", "entry_point": "twice",
               "prompt": 'def twice(x):\n    """Two times x."""\n',
               "test": "def check(candidate):\n    assert candidate(4) == 8\n"}
    (tmp_path / "p.jsonl").write_text(json.dumps(problem))
    for number, body in enumerate(("2 * x", "x")):
        answering(monkeypatch, f"```python\n{problem['prompt']}    return {body}\n```")
        said = command(monkeypatch, capsys, "benchmark", "humaneval", "--allow-code", "--prompts",
                       tmp_path / "p.jsonl", "--out", tmp_path / f"{number}.jsonl")
        assert json.loads(said.split("\n")[-2])["accuracy"] == 100 * (number == 0)


@pytest.mark.parametrize("name", ["gsm8k", "math", "humaneval", "mbpp"])
def test_every_benchmark_states_its_prompt_and_fills_all_of_it(tmp_path, name):
    entry = {"question": "THE", "problem": "THE", "prompt": "THE", "answer": "4", "test": "t",
             "entry_point": "e", "code": "c", "test_list": ["TESTS"], "subject": "s"}
    (tmp_path / "p.json").write_text(json.dumps([entry]))
    (problem,), prompt = benchmarks.read_problems(name, str(tmp_path / "p.json"), None)
    assert "THE" in problem["query"] and ("TESTS" in problem["query"]) == (name == "mbpp")
    assert "{problem}" in prompt and "{problem}" not in problem["query"]
    assert "{tests}" not in problem["query"]


def test_without_math_verify_no_answer_is_begun(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    (tmp_path / "p.json").write_text('[{"problem": "1", "answer": "1"}]')
    answering(monkeypatch, "nothing is boxed here")
    with pytest.raises(InputError, match="pip install 'math-verify"):
        command(monkeypatch, capsys, "benchmark", "math", "--prompts", tmp_path / "p.json",
                "--out", tmp_path / "r.jsonl")


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, message", [
    (["generate", "--prompts", "p.json"], "--out"), (["benchmark", "chess", "--out", "o"], "chess"),
    (["benchmark", "gsm8k", "--out", "o.jsonl"], "--prompts"),
    (["benchmark", "gsm8k", "--prompts", "p.json", "--out", "o.jsonl"], "entry 1: no text"),
    (["benchmark", "gsm8k", "--prompts", "word.json", "--out", "o.jsonl"], "no number in answer"),
    (["benchmark", "mbpp", "--allow-code", "--prompts", "list.json", "--out", "o"], "no text"),
    (["generate", "--prompts", "list.json", "--out", "o.json"], "list.json, entry 1: no text"),
    (["generate", "--prompts", "none.json", "--out", "o.json"], "none.json"),
    (["generate", "--prompts", "gap.json", "--out", "o.json"], "gap.json, entry 2: no text"),
    (["generate", "--prompts", "none.jsonl", "--out", "o.json"], "none.jsonl: nothing in it"),
    (["generate", "--prompts", "long.json", "--out", "o.json"], "model's context"),
    (["benchmark", "tiny", "--samples", "2", "--out", "o.jsonl"], "--samples 2"),
    (["benchmark", "tiny", "--limit", "0", "--out", "o.jsonl"], "--limit must be at least 1"),
    (["benchmark", "tiny", "--temperature", "-1", "--out", "o.jsonl"], "--temperature"),
    (["benchmark", "tiny", "--temperature", "nan", "--out", "o.jsonl"], "--temperature"),
    (["benchmark", "tiny", "--model", "judge", "--out", "o.jsonl"], "reward model"),
    (["generate", "--model", "tiny", "--prompts", "odd.json", "--out", "o.json"], "cannot encode"),
    (["benchmark", "tiny", "--out", "p.json"], "p.json exists and is no result file"),
    (["benchmark", "tiny", "--out", "p.json/x.jsonl"], "p.json"),
    (["compare", "here"], "runs"), (["plot", "nowhere"], "nowhere"), ([], "command")])
def test_bad_input_ends_in_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments,
                                                    message):
    if arguments[:1] == ["plot"]:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text('[{"question": "q"}]\n')
    (tmp_path / "gap.json").write_text('[{"instruction": "q"}, {"output": "a"}]')
    (tmp_path / "word.json").write_text('[{"question": "q", "answer": "many"}]')
    (tmp_path / "list.json").write_text(
        '[{"prompt": "q", "test_list": "t", "instruction": ["q"]}]')
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": "What is 1 + 1?" * 999}]))
    (tmp_path / "odd.json").write_text('[{"instruction": "漢"}]')
    if "judge" in arguments:
        write_checkpoint(tmp_path / "judge", "scalar_head")
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(eval_script.main)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert (tmp_path / "p.json").read_text() == '[{"question": "q"}]\n'


# ---------------------------------------------------------------- during a run

def test_win_rate_counts_ties_half_and_cut_off_answers_as_wrong(monkeypatch):
    game = SimpleNamespace(settings=SimpleNamespace(reward="exact"), phase=Phases(), scorer=None,
                           reward=lambda q, a, g: [float(x) if x else 0.0 for x in a])
    held_out = [("q", "1")] * 4
    ends = torch.tensor([True, True, True, False])           # the last one was cut off
    monkeypatch.setattr(heldout, "greedy", lambda game, queries, _: (list("1101"), ends))
    start = [0.0, 1.0, 1.0, 0.0]
    figures, answered = heldout.evaluate(game, held_out, start)      # win, tie, loss, tie
    assert figures == {"reward": 0.5, "win_rate": 0.5, "n": 4}
    assert [a["reward"] for a in answered] == [1, 1, 0, 0]
    assert heldout.evaluate(game, held_out, [])[0]["win_rate"] == 0.5


# ---------------------------------------------------------------- real data, with --assets

def test_gsm8k_prompt_reaches_a_real_model(assets, monkeypatch, capsys, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([
        {"question": "Tom has 2 apples and buys 3 more. How many has he?", "answer": "#### 5"}]))
    command(monkeypatch, capsys, "benchmark", "gsm8k", "--model", assets / "smollm2-135m",
            "--prompts", tmp_path / "p.json", "--out", tmp_path / "r.jsonl", "--max-new-tokens", 24)
    (record,) = results.read_lines(tmp_path / "r.jsonl")[1:]
    assert len(record["answers"][0]) > 20
