"""Group generation: sample.py against transformers' generate, interleaved, on the same weights.

    python bench/sampler.py --out bench/results/sampler.jsonl
    python bench/sampler.py --curves --out bench/results/sampler.jsonl      # how it grows, no pairs
    python bench/sampler.py --shape llama-3.2-1b --pairs 3 --only "4 x 8"

Both sides draw from the full distribution at temperature 1. Tokens per second count useful tokens:
completions up to their own end. % GB/s: all weights read once a step, % FLOP/s: what the workload
needs at least (measure.py), both of what this machine was measured to do in the same run.
"""
import sys
from dataclasses import replace

import measure  # first: it puts the project's folder before bench/
import torch
from measure import Load

from plumbing.cli import run_script
from sample import sample

SIDES = ("ours", "transformers")
# Each entry: prompts, completions a prompt, varied lengths. Without groups half as many tokens.
WORKLOADS = [(4, 8, False), (4, 8, True), (1, 1, False), (8, 1, False), (32, 1, False)]
# --curves: one quantity at a time, from 2 x 8 with 64 + 32 tokens.
CURVES = {"group": (1, 4, 8, 16), "prompt_tokens": (16, 64, 256), "new_tokens": (16, 32, 64, 128),
          "vocabulary": (16384, 49152, 128256)}


def prepare(side: str, load: Load):
    """A function that samples the load once; its first, small call is done here."""
    prompts = measure.random_tokens(load, load.prompts, load.prompt_tokens, seed=1)
    run = ours(load, prompts) if side == "ours" else transformers(load, prompts)
    run(2)
    return run


def ours(load: Load, prompts: list[list[int]]):
    """sample.sample; lengths as limits, one a completion. No stop ids: no row ends by chance."""
    model, lengths = measure.our_model(load), measure.stops(load)
    g = torch.Generator().manual_seed(0)

    def run(most=None):
        limits = [min(n, most or n) for n in lengths]
        groups = sample(model, prompts, num_samples=load.group, max_new_tokens=limits,
                        temperature=1.0, generator=g)
        assert [len(row.tokens) for group in groups for row in group] == limits
    return run


def transformers(load: Load, prompts: list[list[int]]):
    """generate() with its documented settings, the cache on and attention by sdpa.

    top_k 0 and top_p 1, since its default top-k 50 is another distribution; no eos id, so that no
    row ends by chance; inference_mode, which is a little faster than its own no_grad. Prompts have
    one length: no padding and no mask. The cache is the default, dynamic one: the static one is for
    torch.compile, which gained nothing beyond noise here (1.06-1.18x, ours included).
    num_return_sequences is its documented way to several samples: it copies each prompt before
    the prefill. Lengths: a StoppingCriteria that returns a bool a row, its documented way to end
    rows one by one; the batch goes on until all have ended.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList
    model, tokens = measure.their_model(load), torch.tensor(prompts)             # (P, T)
    ends = load.prompt_tokens + torch.tensor(measure.stops(load))                # (B,)

    class Lengths(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= ends

    criteria = StoppingCriteriaList([Lengths()] if load.varied else [])

    @torch.inference_mode()
    def run(most=None):
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, num_return_sequences=load.group, use_cache=True, pad_token_id=0,
            max_new_tokens=most or max(measure.stops(load)), stopping_criteria=criteria)
        assert most or out.shape == (load.rows, max(ends))
    return run


def main():
    parser = measure.parser("Group generation against transformers' generate.", pairs=5)
    parser.add_argument("--curves", action="store_true",
                        help="how time and memory grow with G, prompt, completion, vocabulary")
    args = parser.parse_args()
    measure.start(args)
    base = Load(args.shape, layers=args.layers, prompt_tokens=args.prompt_tokens,
                new_tokens=args.new_tokens)
    bounds = measure.machine_bounds(small=args.shape == "tiny")
    if args.curves:
        small = replace(base, prompts=2, new_tokens=32)
        measure.curves(args, "sampler", SIDES, small, CURVES, bounds)
        return
    rows = []
    for prompts, group, varied in WORKLOADS:
        new_tokens = args.new_tokens if group > 1 else max(1, args.new_tokens // 2)
        load = replace(base, prompts=prompts, group=group, varied=varied, new_tokens=new_tokens)
        if not measure.chosen(args, load.name):
            continue
        print(load.name, file=sys.stderr, flush=True)
        runs = {side: prepare(side, load) for side in SIDES if not measure.missing(side)}
        times = {side: [] for side in SIDES} | measure.interleave(runs, args.pairs)
        del runs
        memory = {} if args.no_memory or load.rows < 32 else {
            side: measure.in_child("sampler", side, load) for side in SIDES}
        bytes_read, flops = measure.sampler_work(load)
        rows += measure.record(load.name, load, times, memory, bounds, flops=flops,
                               tokens=sum(measure.stops(load)), bytes_read=bytes_read)
    print(measure.table(rows))
    measure.finish(args, "sampler", bounds, {"rows": rows})


if __name__ == "__main__":
    run_script(main)
