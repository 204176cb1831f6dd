"""A real language model learns on a laptop: SmolLM2-135M, without training data and with prompts.

    curl -L -o alpaca_eval.json \\
        https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json
    curl -L -o alpaca.json \\
        https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json
    python bench/smollm2.py --run lsp-zero        # about 1.3 hours on one core; again to go on
    python bench/smollm2.py                       # the table of what is there

The reward is course/rewards/finished.py: 1 for an answer that ends by itself, has 8 to 60 words and
no four words in a row twice. Held out: 100 instructions that people wrote (every seventh of
AlpacaEval, without its `vicuna` part and those of 1,200 characters or more), answered greedily
before, halfway and after. Kept in
bench/results/smollm2/NAME: config.json, metrics.jsonl, eval.jsonl, and for each held-out answer its
reward and number of words. The instructions are not kept: their licence is not ours.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/smollm2"
COMMON = ["--reward", "course/rewards/finished.py:finished", "--queries", "4", "--answers", "4",
          "--query-tokens", "64", "--answer-tokens", "96", "--steps", "60", "--learning-rate",
          "1e-5", "--warmup", "5", "--eval-every", "30", "--save-every", "10", "--seed", "1",
          "--device", "cpu", "--requeue"]
RUNS = {"lsp-zero": ["--algo", "lsp-zero"],
        "lsp-zero-untrained-challenger": ["--algo", "lsp-zero", "--alpha-ch", "0"],
        "grpo": ["--algo", "grpo", "--prompts", "alpaca.json"]}


def held_out(source: Path, target: Path):
    """Writes the 100 held-out instructions."""
    given = [{"instruction": item["instruction"]} for item in json.loads(source.read_text())
             if item["dataset"] != "vicuna" and len(item["instruction"]) < 1200]
    target.write_text(json.dumps(given[::7][:100]))


def run(name: str, model: str, out: Path):
    """One run, or the rest of it, and its records."""
    out.mkdir(parents=True, exist_ok=True)
    held_out(Path("alpaca_eval.json"), out / "held_out.json")
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--model", model, *RUNS[name], *COMMON,
                    "--eval-prompts", str(out / "held_out.json"), "--out", str(out / name)],
                   check=True)
    keep(name, out / name)


def keep(name: str, folder: Path):
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("metrics.jsonl", "eval.jsonl"):
        (kept / file).write_text((folder / file).read_text())
    config = json.loads((folder / "config.json").read_text())
    paths = {k: Path(v).name for k, v in config.items() if isinstance(v, str) and v[:1] == "/"}
    (kept / "config.json").write_text(json.dumps(config | paths, indent=2) + "\n")
    answers = [json.loads(line) for line in (folder / "eval_samples.jsonl").open()]
    (kept / "held_out.jsonl").write_text("".join(
        json.dumps({"step": a["step"], "reward": a["reward"], "words": len(a["answer"].split())})
        + "\n" for a in answers))


def held_out_rewards(name: str, step: int, key: str = "reward") -> list[float]:
    lines = map(json.loads, (RESULTS / name / "held_out.jsonl").open())
    return [line[key] for line in lines if line["step"] == step]


def difference(before: list[float], after: list[float]) -> str:
    """The mean paired difference with its 95 % interval (1.96 standard errors)."""
    pairs = [b - a for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(pairs) / len(pairs)**0.5
    return f"{statistics.mean(pairs):+.2f} ± {1.96 * error:.2f}"


def table(names: list[str]):
    print("| run | before | step 30 | step 60 | difference | better, worse | words | R, steps 1-10 "
          "| R, steps 51-60 | hours |\n" + "|---" * 10 + "|")
    for name in names:
        at = {step: held_out_rewards(name, step) for step in (0, 30, 60)}
        words = [statistics.mean(held_out_rewards(name, step, "words")) for step in (0, 60)]
        metrics = [json.loads(line) for line in (RESULTS / name / "metrics.jsonl").open()]
        reward = [m["reward"] for m in metrics]
        changes = [b - a for a, b in zip(at[0], at[60])]
        print(f"| {name} |", " | ".join(
            [f"{statistics.mean(at[step]):.2f}" for step in at] + [
                difference(at[0], at[60]), f"{sum(c > 0 for c in changes)}, "
                f"{sum(c < 0 for c in changes)}", f"{words[0]:.0f} to {words[1]:.0f}",
                f"{statistics.mean(reward[:10]):.2f}", f"{statistics.mean(reward[-10:]):.2f}",
                f"{sum(m['seconds'] for m in metrics) / 3600:.1f}"]), "|")
    for one, other in zip(names, names[1:]):
        print(f"{other} above {one} at step 60:",
              difference(held_out_rewards(one, 60), held_out_rewards(other, 60)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", choices=RUNS, help="play this run, or go on with it")
    parser.add_argument("--model", default="smollm2-135m", help="name or directory")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="of whole runs")
    args = parser.parse_args()
    if args.run:
        run(args.run, args.model, args.out)
    table([name for name in RUNS if (RESULTS / name / "eval.jsonl").exists()])


if __name__ == "__main__":
    main()
