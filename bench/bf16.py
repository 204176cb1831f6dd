"""How far bfloat16 moves a model's log-probs from fp32: ours, transformers, and two variants.

    python bench/bf16.py --model DIR/smollm2-135m --prompts gsm8k.jsonl

The likeliest token's log-prob (by fp32) after each token of the first 8 prompts, on a CPU: mean and
99.9th percentile of |bf16 - fp32|, nats. "rounded twice" rounds a norm before its weight, as
transformers does. "fp32 head" keeps the sums of the head's products in fp32, as a GPU does here.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import model as method  # noqa: E402
from model import Tokenizer, load_model  # noqa: E402
from plumbing.data import read_data  # noqa: E402
from plumbing.files import find_model  # noqa: E402


def rounded_twice(norm, x):
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
    return y.to(x.dtype) * norm.weight


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a name or a directory")
    parser.add_argument("--prompts", required=True, help="JSON lines, as train.py's")
    args = parser.parse_args()
    path = find_model(args.model)
    tokenizer = Tokenizer(path)
    chats = [tokenizer.chat([{"role": "user", "content": query}])
             for query, _ in read_data(args.prompts)[:8]]
    exact, ours = load_model(path), load_model(path, dtype=torch.bfloat16)
    logits = {"ours": lambda ids: ours.logits(ours(ids)),
              "fp32 head": lambda ids: ours(ids).float() @ ours.head.float().T}
    try:
        from transformers import AutoModelForCausalLM
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        logits["transformers"] = lambda ids: theirs(ids).logits
    except ImportError:
        print("transformers is not installed")

    def show(name: str):
        found = []
        for chat in chats:
            ids = torch.tensor([chat])
            wanted = exact.logits(exact(ids))[0].log_softmax(-1)                 # (T, V)
            likeliest = wanted.argmax(-1, keepdim=True)                          # (T, 1)
            got = logits[name](ids)[0].float().log_softmax(-1)
            found.append((wanted - got).gather(-1, likeliest).abs()[:, 0])
        found = torch.cat(found).double()
        print(f"{name:15} mean {found.mean():.4f}  99.9 % {found.quantile(0.999):.3f}  "
              f"{len(found)} positions")

    for name in logits:
        show(name)
    fused = method.RMSNorm.forward
    logits["rounded twice"] = lambda ids: ours.logits(ours(ids))
    exact_norms = {id(m) for m in exact.modules()}
    method.RMSNorm.forward = lambda norm, x: (
        fused if id(norm) in exact_norms else rounded_twice)(norm, x)
    show("rounded twice")


if __name__ == "__main__":
    main()
