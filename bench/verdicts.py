"""Is a model good enough to be RLPT's judge? Its verdicts on predictions whose truth is known.

    python bench/verdicts.py --judge llama-3.2-3b --text books/
    python bench/verdicts.py --judge DIR --text tests/data/water.txt --count 12 --out verdicts.jsonl

Right: the reference's first sentence, and its first two. Wrong: the one after the reference's first
(the beginning is left out), and another sentence of the passage. For each kind the mean verdict in
both readings, unparsed ones as 0, as in training. A random judge scores 0 in the last column, a
perfect one 1.
"""
import json
import sys
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parent.parent)]         # not bench/: its memory.py

import torch  # noqa: E402

import rewards  # noqa: E402
from model import load_model  # noqa: E402
from plumbing.chat import Tokenizer  # noqa: E402
from plumbing.cli import Parser, run_script  # noqa: E402
from plumbing.files import find_model, pick_device, prompt_file, read_prompt  # noqa: E402
from plumbing.texts import Texts  # noqa: E402

KINDS = {"first": True, "first two": True, "second": False, "another": False}


def cases(texts: Texts, count: int, segments: int) -> list[tuple[str, dict[str, str]]]:
    """References with a prediction of each kind, from targets drawn with a fixed seed."""
    g, found = torch.Generator().manual_seed(0), []
    pick = lambda values: values[int(torch.randint(len(values), (), generator=g))]
    for _ in range(100 * count):
        pieces, targets = texts.read(pick(range(len(texts))), "msr")
        if len(targets) <= segments or len(found) == count:
            continue
        i = pick(targets)
        other = pick([j for j in targets if not i <= j < i + segments])
        spans = {"first": (i, i + 1), "first two": (i, i + 2), "second": (i + 1, i + 2),
                 "another": (other, other + 1)}
        shown = {kind: "".join(pieces[a:b]).rstrip() for kind, (a, b) in spans.items()}
        found.append(("".join(pieces[i:i + segments]).rstrip(), shown))
    return found


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", required=True, help="a known name, a directory or a hub id")
    parser.add_argument("--text", required=True, help="as train.py's")
    parser.add_argument("--count", type=int, default=50, help="references")
    parser.add_argument("--reference-segments", type=int, default=3)
    parser.add_argument("--min-segment", type=int, default=10)
    parser.add_argument("--judge-tokens", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="a file to which the result is added as a JSON line")
    args = parser.parse_args()
    path = find_model(args.judge)
    device, dtype = pick_device(args.device)
    asked = cases(Texts(args.text, args.min_segment), args.count, args.reference_segments)
    rows = [(kind, reference, shown[kind]) for reference, shown in asked for kind in KINDS]
    prompt = read_prompt(prompt_file(path, "verdict"), rewards.VERDICT.places)
    judge, tokenizer = load_model(path, device=device, dtype=dtype), Tokenizer(path)
    result = {"judge": args.judge, "text": args.text, "references": len(asked)}
    print("reading     read  " + "".join(f"{kind:>11}" for kind in KINDS) + "  right - wrong")
    for reading in rewards.READINGS:
        verdict = rewards.Judge(judge, tokenizer, prompt, rewards.VERDICT, reading,
                                max_new_tokens=args.judge_tokens)
        scores, records = verdict(*map(list, zip(*[row[1:] for row in rows])))
        read = torch.tensor([r.get("mass", float(r.get("reason") is None)) for r in records])
        mean = {kind: scores.nan_to_num(0.0)[[row[0] == kind for row in rows]].mean().item()
                for kind in KINDS}
        gap = sum(mean[kind] * (1 if right else -1) for kind, right in KINDS.items()) / 2
        result[reading] = {"read": read.mean().item(), "mean": mean, "right_minus_wrong": gap}
        print(f"{reading:10}{read.mean():6.2f}  "
              + "".join(f"{mean[kind]:11.2f}" for kind in KINDS) + f"{gap:15.2f}", flush=True)
    if args.out:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    run_script(main)
