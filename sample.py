"""The KV-cache sampler, and a way to talk to a model.

    python sample.py "What is 37 + 48?"                                 # the embedded model
    python sample.py --model smollm2-135m "Why is the sea salty?"       # streams one answer
    python sample.py --model smollm2-135m --chat                   # a conversation; end with Ctrl-D
    python sample.py --model llama-3.2-3b --challenger --task "Pure & Applied Mathematics"

Sampling is from the full distribution softmax(logits / temperature): no top-k, no top-p, so that
the sampled distribution is the one that train.py differentiates. A prompt's samples share one
prefill, rows that have finished leave the batch, on a GPU a step is one captured graph, and every
completion has a random stream of its own: what it says does not depend on its company.
Shapes: B rows (one per completion) still in the batch, V vocabulary.
"""
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from model import Llama, load_model
from plumbing.batches import take_batch
from plumbing.cache import Cache, prefill
from plumbing.chat import Tokenizer, fill
from plumbing.cli import Parser, run_script
from plumbing.files import InputError, find_model, pick_device, preset_of, prompt_file, read_prompt


@dataclass
class Completion:
    tokens: list[int]        # the stop token included
    logp: list[float]        # one per token, at the sampling temperature (at temperature 0: at 1)
    stopped: bool            # False: cut off by max_new_tokens


def text_of(tokenizer: Tokenizer, completion: Completion) -> str:
    """What a completion says: all of it but the stop token, outer blanks removed."""
    tokens = completion.tokens[:-1] if completion.stopped else completion.tokens
    return tokenizer.decode(tokens).strip()


@torch.inference_mode()
def sample(model: Llama, prompts: list[list[int]], *, num_samples: int = 1,
           max_new_tokens: int | list[int] = 256, temperature: float = 1.0, stop_ids=(),
           seeds: list[int] | None = None, generator: torch.Generator | None = None,
           batch_tokens: int = 65536) -> list[list[Completion]]:
    """num_samples completions of each prompt (token ids in, Completions out, in the same order).

    max_new_tokens: one limit, or one per completion in the order prompt, sample.
    seeds: one a completion, which depends on its own alone and not on batch, chunk or neighbours
    (test_a_completion_does_not_depend_on_its_company). Default: drawn from the generator.
    batch_tokens: rows times their longest length, prompt included, that decode together;
    the rest waits its turn.
    InputError when a prompt is empty or does not fit into the model's context with its new tokens.
    """
    total = len(prompts) * num_samples
    limits = [max_new_tokens] * total if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != total or min(limits, default=1) < 1:
        raise ValueError(f"max_new_tokens: one limit of at least 1, or {total} of them; "
                         f"found {max_new_tokens}")
    context = model.config.max_position_embeddings
    for i, limit in enumerate(limits):
        length = len(prompts[i // num_samples])
        if not 1 <= length <= context - limit:
            raise InputError(f"prompt {i // num_samples} has {length} tokens: with {limit} new "
                             "ones it must be at least 1 and fit into the model's context "
                             f"of {context}")
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (total,), generator=generator).tolist()

    device = model.model.embed_tokens.weight.device
    tokens = torch.zeros(total, max(limits, default=0), dtype=torch.long, device=device)
    logp = torch.zeros(tokens.shape, device=device)                         # (total, longest limit)
    # Prompts of like length together, for little padding;
    # a prompt's samples stay neighbours and share its prefill.
    length = lambda i: len(prompts[i // num_samples])
    size = lambda rows: len(rows) * max(length(i) + limits[i] for i in rows)
    waiting = sorted(range(total), key=length)
    while waiting:
        rows = take_batch(waiting, size, batch_tokens)
        steps = decode(model, [prompts[i // num_samples] for i in rows],
                       limits=[limits[i] for i in rows], seeds=[seeds[i] for i in rows],
                       temperature=temperature, stop_ids=stop_ids)
        rows = torch.tensor(rows, device=device)
        for step, (inside, token, token_logp) in enumerate(steps):
            tokens[rows[inside], step] = token
            logp[rows[inside], step] = token_logp.to(logp.dtype)
    done = []
    tokens, logp = tokens.tolist(), logp.tolist()
    check_finite(x for line in logp for x in line)
    for i in range(total):
        said, likely, limit = tokens[i], logp[i], limits[i]
        end = next((t + 1 for t in range(limit) if said[t] in stop_ids), limit)
        done.append(Completion(said[:end], likely[:end], said[end - 1] in stop_ids))
    return [done[i:i + num_samples] for i in range(0, total, num_samples)]


def check_finite(logp: Iterable[float]):
    """InputError where log-probs are NaN: no such model can play."""
    if any(map(math.isnan, logp)):
        raise InputError("the model's logits are not finite: its weights are broken, or training "
                         "has diverged (a lower --learning-rate may help)")


@torch.inference_mode()
def decode(model: Llama, prompts: list[list[int]], *, limits: list[int], seeds: list[int],
           temperature: float, stop_ids) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Decode a batch, one row a prompt; equal neighbours share a prefill. Yields a step at a time:

    the numbers of the rows still in the batch (B,), their new tokens (B,) and these tokens'
    log-probs (B,). A row leaves after a stop token or at its limit. A GPU is asked only now and
    then who has finished, so that it is not waited for: what a row yields after its end is void.
    """
    device = model.model.embed_tokens.weight.device
    graphs = uses_graphs(device)
    distinct = [p for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]]
    which = torch.tensor([i > 0 and p != prompts[i - 1]
                          for i, p in enumerate(prompts)]).cumsum(0)                 # (B,)
    longest = max(map(len, prompts))
    size = longest + max(limits)
    logits, held = prefill(model, distinct, which, size)                     # (B, V)
    # Row b's t-th token uses the t-th uniform number of its own stream. float64: with fp32's 24
    # bits, tokens less likely than 6e-8 could never be drawn.
    uniforms = [np.random.Generator(np.random.Philox(key=seed)).random(max(limits))
                for seed in seeds]
    uniforms = torch.from_numpy(np.stack(uniforms))                          # (B, longest limit)
    uniforms = uniforms.to("cpu" if device.type == "mps" else device)        # MPS has no float64
    limit = torch.tensor(limits, device=device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    inside = torch.arange(len(prompts), device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)       # (B,)
    captured = None
    for step in range(max(limits)):
        token, logp = pick(logits, temperature, uniforms[:, step])           # (B,), (B,)
        yield inside, token, logp
        ended = ended | torch.isin(token, stop) | (step + 1 >= limit)        # (B,)
        if not graphs or (step + 1) % STRETCH == 0 or step + 1 == max(limits):
            keep = (~ended).nonzero()[:, 0]
            if len(keep) == 0:
                return
            # With a graph, departures cost a capture: wait until half of the rows may go, and
            # until what they hold takes long enough to read.
            gone = len(ended) - len(keep)
            if gone >= (max(len(ended) / 2, CAPTURE_COST / held.used) if graphs else 1):
                left = torch.arange(len(keep), device=device)      # the last rows take empty places
                left[ended[:len(keep)]] = keep[keep >= len(keep)]
                inside, token, limit, ended, uniforms = (
                    inside[left], token[left], limit[left], ended[left],
                    uniforms[left.to(uniforms.device)])
                held.select(left)
                captured = None
        if graphs and (captured is None or longest + step >= held.used):
            held.used = min(size, (longest + step) // REACH * REACH + REACH)
            captured = None                  # its memory is free before the next one is captured
            captured = CapturedStep(model, held)
        logits = (captured(token) if graphs else
                  model.logits(model(token[:, None], cache=held)[:, -1]))   # (B, V)


STRETCH = 8              # steps between two questions to a GPU about who has finished
REACH = 256              # a captured step reads the cache up to a multiple of it
# Cached tokens that a GPU reads 100 times in the time of a capture, by estimate: 30 ms for
# Llama-3.2-3B, whose cache has 115 KB a token, at 3 TB/s.
CAPTURE_COST = 8192


def uses_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def capture_stream() -> "torch.cuda.Stream":
    """The one stream on which graphs are captured: each has a cuBLAS workspace of its own."""
    return torch.cuda.Stream()


class CapturedStep:
    """A decode step as a CUDA graph: recorded once, then launched as one.

    Python takes longer to launch the step's thousand kernels than a GPU takes to run them. A graph
    fixes shapes and addresses, so it serves until rows leave or the cache's used part must grow:
    what lies beyond a row's length there is masked, as padding is. A GPU that cannot capture (some
    debugging modes) goes on eagerly. Nothing in here refers back to itself: the cache is freed with
    the last reference, not when the garbage collector comes (test_nothing_of_a_call_outlives_it).
    """

    def __init__(self, model: Llama, cache: Cache):
        self.model, self.cache = model, cache
        self.token = torch.zeros_like(cache.lengths)[:, None]                # (B, 1)
        cache.fixed, start = True, cache.lengths.clone()
        side = capture_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                # the warm-up that capture asks for
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        cache.lengths.copy_(start)                   # what the warm-up wrote is written over
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=side):
                self.logits = self.step()            # recorded, not run
        except RuntimeError as error:
            warnings.warn(f"decoding without a CUDA graph, slower: {error}", stacklevel=2)
            self.graph = None
            cache.lengths.copy_(start)

    def step(self) -> Tensor:
        return self.model.logits(self.model(self.token, cache=self.cache)[:, -1])

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token[:, None])
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return self.logits                           # (B, V), overwritten by the next call


def pick(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits / temperature), and its log-prob:
    (B, V), (B,) -> (B,), (B,).

    Inverse of the cumulative distribution: the first token whose cumulative probability exceeds the
    row's uniform number (test_pick_is_the_inverse_of_the_cumulative_distribution). One number a
    row, where torch.multinomial draws one for every token of the vocabulary.
    """
    scaled = logits if temperature in (0, 1) else logits / temperature
    p = scaled.softmax(-1)                                                   # (B, V)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)                              # (B, 1)
    else:
        exact = p.cpu() if p.device.type == "mps" else p                     # MPS has no float64
        ends = exact.cumsum(-1, dtype=torch.float64)                         # (B, V)
        # Kept below the sum, where rounding would point at a token without any probability.
        # Clamped, since NaN would point beyond the end, which on a GPU ends the process.
        aim = (uniform[:, None] * ends[:, -1:]).minimum(ends[:, -1:] * (1 - 2**-50))     # (B, 1)
        token = torch.searchsorted(ends, aim, right=True).clamp(max=p.shape[1] - 1).to(p.device)
    return token[:, 0], p.gather(-1, token)[:, 0].log()


# ---------------------------------------------------------------- command line

def stream(model: Llama, tokenizer: Tokenizer, messages: list[dict], *, max_new_tokens: int,
           temperature: float, seed: int) -> str:
    """Print an answer as it is written, and return it."""
    ids, shown = [], ""
    strange = tokenizer.unencodable(messages[-1]["content"])
    if strange is not None:
        toy = preset_of(tokenizer.path).get("reward") == "tiny"
        raise InputError(f"this model's tokenizer cannot encode {strange!r}" + toy * (
            ": the embedded model knows nothing but sums. Ask: What is 37 + 48?"))
    prompt = tokenizer.chat(messages)
    free = model.config.max_position_embeddings - len(prompt)
    if free < 1:
        raise InputError(f"the conversation has {len(prompt)} tokens, the model's context "
                         f"{model.config.max_position_embeddings}")
    for _, token, logp in decode(model, [prompt], limits=[min(max_new_tokens, free)], seeds=[seed],
                              temperature=temperature, stop_ids=tokenizer.stop_ids):
        check_finite(logp.tolist())
        if token.item() in tokenizer.stop_ids:
            break
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):                             # else half of a character: wait
            print(text[len(shown):], end="", flush=True)
            shown = text
    text = tokenizer.decode(ids)
    print(text[len(shown):])
    return text


def main():
    parser = Parser(description="Talk to a model.")
    parser.add_argument("prompt", nargs="?", help="what to ask")
    parser.add_argument("--model", default="tiny", help="a known name, a directory or a hub id")
    parser.add_argument("--chat", action="store_true",
                        help="hold a conversation; end it with Ctrl-D")
    parser.add_argument("--challenger", action="store_true",
                        help="play the Challenger: write a query")
    parser.add_argument("--challenger-prompt", help="its file (default: the model's own or ours)")
    parser.add_argument("--task", default="None", help="fills {task} of the Challenger's prompt")
    parser.add_argument("--template", default="None",
                        help="fills {template} of the Challenger's prompt")
    parser.add_argument("--date-string", default=Tokenizer.date_string,
                        help="today in Llama 3's chat template (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    if (args.prompt is not None) + args.chat + args.challenger != 1:
        raise InputError('give one of: a prompt, --chat, --challenger')
    if args.max_new_tokens < 1 or not 0 <= args.temperature < 1e6 or not 0 <= args.seed < 2**63:
        raise InputError("--max-new-tokens must be at least 1, --temperature and --seed at least 0 "
                         "(and below 1e6 and 2^63)")
    fills = [name for name in ("task", "template") if getattr(args, name) != "None"]
    if not args.challenger and (fills or args.challenger_prompt):
        raise InputError(f"--{(*fills, 'challenger-prompt')[0]} is for --challenger")
    Tokenizer.date_string = args.date_string
    path = find_model(args.model)
    device, dtype = pick_device(args.device, path)
    tokenizer = Tokenizer(path)
    model = load_model(path, device=device, dtype=dtype, writes=True)
    say = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    how = f"({args.model}, temperature {args.temperature:g}, seed {args.seed})"

    if not args.chat:
        prompt = args.prompt
        if args.challenger:
            prompt = read_prompt(args.challenger_prompt or prompt_file(path, "challenger"), fills)
            prompt = fill(prompt, task=args.task, template=args.template)
        stream(model, tokenizer, [{"role": "user", "content": prompt}], seed=args.seed, **say)
        print(how, file=sys.stderr)
        return
    messages = []
    print(how, file=sys.stderr)
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            return
        answer = stream(model, tokenizer, messages, seed=args.seed + len(messages), **say)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    run_script(main)
