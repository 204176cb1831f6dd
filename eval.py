"""Measure any checkpoint, before and after, and compare.

    python eval.py generate --model M --prompts alpaca_eval.json --out M/outputs.json
    python eval.py winrate M/outputs.json base/outputs.json --judge skywork-v2-3b --out M/wins.jsonl
    python eval.py winrate --annotations FILE                # AlpacaEval's own, published or yours
    python eval.py benchmark gsm8k --model M --prompts gsm8k_test.jsonl --out M/gsm8k.jsonl
    python eval.py compare base M                            # folders, or files, of results
    python eval.py plot runs/tiny-lsp-* --out curves.png     # training curves

What is measured is written as it comes; the same command again goes on where it was interrupted.
"""
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import torch

import rewards
from evals import benchmarks, grade, judges, plot, results
from evals.page import page
from model import load_model, read_config
from plumbing.chat import Tokenizer
from plumbing.cli import Parser, run_script
from plumbing.data import check_data, generator
from plumbing.files import HERE, InputError, find_model, pick_device, prompt_file, read_prompt
from plumbing.runs import append_line, read_lines, write_json
from sample import sample, text_of

# ---------------------------------------------------------------- answers

def name_of(model: str) -> str:
    """A checkpoint goes by its run's name, any other model by its folder's or its own."""
    path = Path(model).absolute()
    return path.parent.name if path.name.startswith("checkpoint") else path.name


def answer(args, queries: list[str], done: set[int], samples: int = 1):
    """The model's answers to the queries whose numbers are not in `done`: yields
    (number, [(text, truncated), ...]), --batch queries at a time.

    Every answer has a random stream of its own: neither an interruption nor --batch changes any
    (up to floating point).
    """
    path, left = find_model(args.model), [i for i in range(len(queries)) if i not in done]
    if not left:
        return
    device, dtype = pick_device(args.device, path)
    tokenizer, context = Tokenizer(path), read_config(path).max_position_embeddings
    check_data(args.prompts or args.name, [(query, None) for query in queries], tokenizer,
               context - args.max_new_tokens)
    model = load_model(path, device=device, dtype=dtype, writes=True)
    seeds = torch.randint(2**63 - 1, (len(queries), samples),
                          generator=generator(args.seed, 0, "evaluate")).tolist()
    for some in results.in_batches(left, args.batch, "answering"):
        prompts = [tokenizer.chat([{"role": "user", "content": queries[i]}]) for i in some]
        groups = sample(model, prompts, num_samples=samples, max_new_tokens=args.max_new_tokens,
                        temperature=args.temperature, stop_ids=tokenizer.stop_ids,
                        seeds=sum((seeds[i] for i in some), []))
        for i, group in zip(some, groups):
            yield i, [(text_of(tokenizer, row), not row.stopped) for row in group]


def made_by(args, measure: str, queries: list[str], **more) -> dict:
    """A result file's header: all that its figures depend on, and the command."""
    path = find_model(args.model).resolve()             # `checkpoint` is a link that moves on
    return {"measure": measure, "model": str(path), "temperature": args.temperature,
            "max_new_tokens": args.max_new_tokens, "seed": args.seed,
            "questions": results.digest(queries)} | more | {"command": command()}


def command() -> str:
    return shlex.join(["python", "eval.py", *sys.argv[1:]])


def generate(args):
    """One answer an instruction, in AlpacaEval's format."""
    out = Path(args.out)
    if out.exists():
        raise InputError(f"--out {out} exists already; nothing is overwritten: choose another")
    problems, _ = benchmarks.read_problems("alpaca_eval", args.prompts, args.limit)
    queries = [problem["query"] for problem in problems]
    name = args.generator or name_of(args.model)
    partial = out.with_name(out.name + ".partial")
    records = results.resume(partial, made_by(args, "outputs", queries, generator=name))
    for i, [(text, cut)] in answer(args, queries, {record["item"] for record in records}):
        records.append({"item": i, "output": text, "cut": cut})
        append_line(partial, records[-1])
    records.sort(key=lambda record: record["item"])
    outputs = [{key: problem["problem"][key] for key in ("dataset", "instruction")
                if key in problem["problem"]} | {"output": record["output"], "generator": name}
               for problem, record in zip(problems, records)]
    write_json(out, outputs)
    partial.unlink()
    print(f"{out}: {len(outputs)} answers, {sum(r['cut'] for r in records)} of them cut off at "
          f"{args.max_new_tokens} tokens")


# ---------------------------------------------------------------- win-rates

def winrate(args):
    """The fraction of instructions on which the first file's answers are preferred."""
    if args.outputs if args.annotations else len(args.outputs) != 2 or not args.judge:
        raise InputError("winrate takes two files of outputs (the measured model's, the "
                         "baseline's) and a --judge, or --annotations FILE")
    if args.annotations:
        more, found = {}, judges.read_annotations(args.annotations, args.generator)
        total, found = len(found), [(v, subset) for v, subset in found if v is not None]
    else:
        more, total, found = judge(args)
    figures = more | results.percent([value for value, _ in found], "win_rate")
    results.show(figures | {"failed": total - len(found)}, found, "win_rate")


def judge(args) -> tuple[dict, int, list]:
    """Ask the judge what it has not said yet. Returns who is compared, the number of pairs, and
    the win (0..1) and the subset of each judged pair."""
    pairs, names = judges.read_pairs(*args.outputs)
    remote = args.judge.startswith(("http://", "https://"))
    if remote and not args.judge_model:
        raise InputError("--judge URL needs --judge-model NAME, as the server calls it")
    path = None if remote else find_model(args.judge)
    scalar = path and read_config(path).scalar_head
    file = args.judge_prompt or prompt_file(path or HERE, "preference")
    prompt = None if scalar else read_prompt(file)
    who = {"generator": names[0], "against": names[1],
           "judge": args.judge_model if remote else name_of(args.judge)}
    header = {"measure": "win-rate"} | who | {
        "judge_at": args.judge if remote else str(path.resolve()), "prompt": prompt,
        "questions": results.digest([str(pair) for pair in pairs]), "command": command()}
    name = re.sub(r"[^\w.-]+", "_", f"{names[0]}-against-{names[1]}-{who['judge']}.jsonl")
    out = Path(args.out) if args.out else Path(args.outputs[0]).with_name(name)
    left = judges.questions(pairs, [None] if scalar else "ab", results.resume(out, header))
    print(f"verdicts: {out}")
    write = lambda record: append_line(out, record)
    device, dtype = pick_device(args.device)
    if remote:
        endpoint = judges.Endpoint(args.judge, args.judge_model, max_tokens=args.judge_tokens,
                                   seconds=args.timeout, fields=args.judge_fields)
        judges.by_endpoint(endpoint, prompt, left, write, args.concurrency)
    elif scalar:
        model = rewards.RewardModel(path, device=device, dtype=dtype)
        judges.by_reward(model, left, write, args.batch)
    else:
        model = load_model(path, device=device, dtype=dtype)
        judges.by_llama(model, Tokenizer(path), prompt, left, write, args.batch)
    records = read_lines(out)[1:]
    judges.report(records)
    return who, len(pairs), list(results.item_values(header, records).values())


# ---------------------------------------------------------------- benchmarks

def benchmark(args):
    """Answer a benchmark's problems and say which answers are right."""
    name, samples = args.name, args.samples
    if name in benchmarks.CODE and not args.allow_code:
        raise InputError(f"{name} runs programs that a model wrote: give --allow-code to allow it")
    if samples > 1 and args.temperature == 0:
        raise InputError(f"--samples {samples}: greedy answers are all alike: give a --temperature")
    if name == "math":
        rewards.math_verify()                       # absent: said before the model answers
    args.max_new_tokens = args.max_new_tokens or benchmarks.TOKENS[name]
    problems, prompt = benchmarks.read_problems(name, args.prompts, args.limit)
    if name in benchmarks.CODE:
        print(grade.ISOLATION[grade.containment()])
    out, queries = Path(args.out), [problem["query"] for problem in problems]
    records = results.resume(out, made_by(args, name, queries, samples=samples, prompt=prompt))
    for i, answers in answer(args, queries, {record["item"] for record in records}, samples):
        verdicts = [benchmarks.is_right(name, problems[i], text, cut=cut) for text, cut in answers]
        records.append({
            "item": i, "query": queries[i], "subset": problems[i]["subset"],
            "gold": problems[i]["gold"], "correct": [right for right, _ in verdicts],
            "reasons": [why for _, why in verdicts], "answers": [text for text, _ in answers],
            "cut": [cut for _, cut in answers]})
        append_line(out, records[-1])
    records.sort(key=lambda record: record["item"])
    cut = sum(sum(record["cut"]) for record in records)
    print(f"{cut} of {samples * len(records)} answers were cut off at {args.max_new_tokens} tokens")
    reasons = Counter(why for record in records for why in record["reasons"]).most_common()
    print("answers: " + ", ".join(f"{count} {why}" for why, count in reasons))
    (measure, values), *others = benchmarks.scores(records, samples).items()
    figures = {"benchmark": name} | results.percent(values, measure)
    figures |= {other: 100 * results.mean_error(values)[0] for other, values in others}
    subsets = [record["subset"] for record in records]
    results.show(figures, list(zip(values, subsets)), measure)


def show(args):
    """Write the page; during a run the same command can be repeated."""
    if len(args.runs) > 2:
        raise InputError("show takes one run folder, or two")
    text = page([Path(run) for run in args.runs])
    Path(args.out).write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(text.encode()) / 1e6:.1f} MB; open it in a browser")


# ---------------------------------------------------------------- command line

def make_parser() -> Parser:
    parser = Parser(description="Measure checkpoints, compare them, look at what runs did.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run, what: str):
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=run)
        return command.add_argument

    new = add("generate", generate, "answer AlpacaEval's instructions")
    new("--generator", help="name in the outputs (default: the model's)")
    new("--prompts", required=True, help="AlpacaEval's instructions: JSON list or JSON lines")
    add_sampling(new, temperature=0.01, tokens=1024)
    new = add("benchmark", benchmark, "answer problems that have a right answer")
    new("name", choices=benchmarks.TOKENS)
    new("--prompts", help="the data set: JSON list or JSON lines")
    new("--samples", type=int, default=1, help="answers a problem, for pass@k")
    new("--allow-code", action="store_true", help="run programs that the model wrote")
    add_sampling(new, temperature=0.0, tokens=None)

    new = add("winrate", winrate, "how often one model's answers are preferred")
    new("outputs", nargs="*", help="the measured model's, then the baseline's")
    new("--annotations", help="AlpacaEval's annotations, in place of a judge")
    new("--generator", help="of --annotations, the generator_2 to measure")
    new("--judge", help="a reward model or a Llama (name, directory, hub id), "
        f"or the URL of an OpenAI-compatible endpoint (key: {judges.KEY})")
    new("--judge-model", help="the model's name at the URL")
    new("--judge-prompt", help="its file (default: the judge's own or ours)")
    new("--judge-tokens", type=int, default=1024, help="longest reply from the URL")
    new("--judge-fields", type=judges.json_object, help="JSON object of further fields of a "
        'request, null to leave one out: {"max_completion_tokens": 2048, "max_tokens": null}')
    new("--timeout", type=float, default=120, help="seconds to wait for a reply (default 120)")
    new("--out", help="file of the verdicts (default: beside the first outputs)")
    new("--concurrency", type=int, default=4, help="questions at a time, to a URL")
    add_device(new)
    new = add("show", show, "a page to watch the games of one run or two")
    new("runs", nargs="+", help="one run folder, or two to stand side by side")
    new("--out", default="game.html", help="the page: one file without a network")
    new = add("reference", lambda args: benchmarks.run_references(args.file),
              "run HumanEval's or MBPP's reference solutions")
    new("file", help="the data set, a JSON list or JSON lines")
    new = add("compare", lambda args: results.compare(args.base, args.runs),
              "before and after, with paired intervals")
    new("base", help="a result file, or a folder of them")
    new("runs", nargs="+", help="the same of what is compared with it")
    new = add("plot", lambda args: plot.plot(args.runs, args.out), "training curves")
    new("runs", nargs="+", help="run folders")
    new("--out", default="curves.png", help="the picture (png, pdf or svg)")
    return parser


def add_sampling(new, *, temperature: float, tokens: int | None):
    new("--model", default="tiny", help="a known name, directory or hub id")
    new("--out", required=True, help="the file to write")
    new("--temperature", type=float, default=temperature, help=f"0: greedy (default {temperature})")
    new("--max-new-tokens", type=int, default=tokens, help="longest answer")
    new("--limit", type=int, help="only the first so many")
    new("--seed", type=int, default=0, help="random seed")
    add_device(new)


def add_device(new):
    new("--batch", type=int, default=16, help="prompts or pairs that are computed together")
    new("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])


def main():
    args = make_parser().parse_args()
    for flag, value in vars(args).items():
        least = 0 if flag in ("temperature", "seed") else 1
        if type(value) in (int, float) and not least <= value < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} must be at least {least}, found {value}")
    args.run(args)


if __name__ == "__main__":
    run_script(main)
