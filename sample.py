"""The KV-cache sampler, and a way to talk to a model.

    python sample.py "What is 37 + 48?"                                 # the embedded model
    python sample.py --model smollm2-135m "Why is the sea salty?"       # streams one answer
    python sample.py --model smollm2-135m --chat                   # a conversation; end with Ctrl-D
    python sample.py --model llama-3.2-3b --challenger --task "Pure & Applied Mathematics"

Sampling is from the full distribution softmax(logits / temperature): no top-k, no top-p, so that
the sampled distribution is the one that train.py differentiates. A prompt's samples share one
prefill, rows that have finished leave the batch, and every completion has a random stream of its
own: what it says does not depend on its company.
Shapes: P prompts, B rows (one per completion) still in the batch, T prompt tokens, V vocabulary,
D hidden size.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chat import Tokenizer, fill
from files import InputError, find_model, pick_device, prompt_file, read_prompt
from model import Cache, Llama, load_model
from runs import Parser, run_script


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
           generator: torch.Generator | None = None,
           batch_tokens: int = 65536) -> list[list[Completion]]:
    """num_samples completions of each prompt (token ids in, Completions out, in the same order).

    max_new_tokens: one limit, or one per completion in the order prompt, sample.
    generator: one 64-bit seed per completion is drawn from it at once, so that a completion depends
    on its own seed alone and not on batch, chunk or neighbours
    (test_a_completion_does_not_depend_on_its_company).
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
    seeds = torch.randint(2**63 - 1, (total,), generator=generator).tolist()

    device = model.model.embed_tokens.weight.device
    tokens = torch.zeros(total, max(limits, default=0), dtype=torch.long, device=device)
    logp = torch.zeros(tokens.shape, device=device)                         # (total, longest limit)
    lengths = torch.zeros(total, dtype=torch.long, device=device)
    # Prompts of like length together, for little padding;
    # a prompt's samples stay neighbours and share its prefill.
    waiting = sorted(range(total), key=lambda i: len(prompts[i // num_samples]))
    while waiting:
        rows = take_batch(waiting, lambda i: len(prompts[i // num_samples]), limits, batch_tokens)
        steps = decode(model, [prompts[i // num_samples] for i in rows],
                       limits=[limits[i] for i in rows], seeds=[seeds[i] for i in rows],
                       temperature=temperature, stop_ids=stop_ids)
        rows = torch.tensor(rows, device=device)
        for step, (alive, token, token_logp) in enumerate(steps):
            tokens[rows[alive], step] = token
            logp[rows[alive], step] = token_logp.to(logp.dtype)
            lengths[rows[alive]] += 1
    done = [Completion(t[:n], p[:n], t[n - 1] in stop_ids)
            for t, p, n in zip(tokens.tolist(), logp.tolist(), lengths.tolist())]
    return [done[i:i + num_samples] for i in range(0, total, num_samples)]


def take_batch(waiting: list[int], prompt_length, limits: list[int],
               batch_tokens: int) -> list[int]:
    """Remove from the head of `waiting` as many rows as batch_tokens holds
    (at least one) and return them."""
    longest, count = 0, 0
    for i in waiting:
        longest = max(longest, prompt_length(i) + limits[i])
        if count and (count + 1) * longest > batch_tokens:
            break
        count += 1
    rows = waiting[:count]
    del waiting[:count]
    return rows


@torch.inference_mode()
def decode(model: Llama, prompts: list[list[int]], *, limits: list[int], seeds: list[int],
           temperature: float, stop_ids) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Decode a batch, one row a prompt; equal neighbours share a prefill. Yields a step at a time:

    the numbers of the rows still alive (B,), their new tokens (B,) and these tokens' log-probs
    (B,). A row leaves after a stop token or at its limit.
    """
    device = model.model.embed_tokens.weight.device
    distinct = [p for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]]
    which = torch.tensor([i > 0 and p != prompts[i - 1]
                          for i, p in enumerate(prompts)]).cumsum(0).to(device)      # (B,)
    logits, cache = prefill(model, distinct)                                 # (P, V)
    logits = logits[which]                                                   # (B, V)
    cache.select(which, cache.used + max(limits))
    # Row b's t-th token uses the t-th uniform number of its own stream. float64: with fp32's 24
    # bits, tokens less likely than 6e-8 could never be drawn.
    uniforms = [np.random.Generator(np.random.Philox(key=seed)).random(max(limits))
                for seed in seeds]
    uniforms = torch.from_numpy(np.stack(uniforms))                          # (B, longest limit)
    limit = torch.tensor(limits, device=device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    alive = torch.arange(len(prompts), device=device)
    for step in range(max(limits)):
        token, logp = pick(logits, temperature, uniforms[:, step])           # (B,), (B,)
        yield alive, token, logp
        stay = ~torch.isin(token, stop) & (step + 1 < limit)                 # (B,)
        if not stay.all():
            keep = stay.nonzero()[:, 0]
            if len(keep) == 0:
                return
            alive, token, limit, uniforms = (
                alive[keep], token[keep], limit[keep], uniforms[keep.cpu()])
            cache.select(keep)
        logits = model.logits(model(token[:, None], cache=cache)[:, -1])     # (B, V)


def prefill(model: Llama, prompts: list[list[int]]) -> tuple[Tensor, Cache]:
    """Run ragged prompts, padded on the right, in one pass:
    logits after each prompt's last token (P, V), cache."""
    device, dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
    tokens, lengths = pad(prompts, device)                                   # (P, T), (P,)
    cache = Cache(model.config, *tokens.shape, device=device, dtype=dtype)
    hidden = model(tokens, cache=cache)                                      # (P, T, D)
    cache.lengths = lengths
    return model.logits(hidden[torch.arange(len(prompts), device=device), lengths - 1]), cache


def pad(rows: list[list], device, dtype=torch.long) -> tuple[Tensor, Tensor]:
    """Lists as one tensor padded on the right
    (with 0: masks come from lengths) and their lengths."""
    lengths = torch.tensor([len(row) for row in rows], device=device)        # (B,)
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)        # (B, T)
    for out, row in zip(padded, rows):
        out[:len(row)] = torch.tensor(row, dtype=dtype)
    return padded.to(device), lengths


def pick(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits / temperature), and its log-prob:
    (B, V), (B,) -> (B,), (B,).

    Inverse of the cumulative distribution: the first token whose cumulative probability exceeds the
    row's uniform number. One number a row, where torch.multinomial draws one for every token of the
    vocabulary.
    """
    logp = torch.log_softmax(logits / (temperature or 1.0), dim=-1)          # (B, V)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        exact = logp.cpu() if logp.device.type == "mps" else logp            # MPS has no float64
        cumulative = exact.exp().cumsum(-1, dtype=torch.float64)             # (B, V)
        # Below the total, which is 1 up to rounding.
        aim = uniform.to(exact.device)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, aim, right=True)[:, 0].to(logp.device)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


# ---------------------------------------------------------------- command line

def stream(model: Llama, tokenizer: Tokenizer, messages: list[dict], *, max_new_tokens: int,
           temperature: float, seed: int) -> str:
    """Print an answer as it is written, and return it."""
    ids, shown = [], ""
    strange = tokenizer.unspelt(messages[-1]["content"])
    if strange is not None:
        raise InputError(f"this model's tokenizer cannot spell {strange!r}")
    prompt = tokenizer.chat(messages)
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise InputError(f"the conversation has {len(prompt)} tokens, the model's context "
                         f"{model.config.max_position_embeddings}")
    for _, token, _ in decode(model, [prompt], limits=[min(max_new_tokens, room)], seeds=[seed],
                              temperature=temperature, stop_ids=tokenizer.stop_ids):
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
    path = find_model(args.model)
    device, dtype = pick_device(args.device)
    tokenizer, model = Tokenizer(path), load_model(path, device=device, dtype=dtype)
    if model.config.scalar_head:
        raise InputError(f"{args.model} is a reward model, which cannot write")
    say = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature)

    if args.challenger:
        prompt = read_prompt(args.challenger_prompt or prompt_file(path, "challenger"), fills)
        prompt = fill(prompt, task=args.task, template=args.template)
        stream(model, tokenizer, [{"role": "user", "content": prompt}], seed=args.seed, **say)
        return
    if not args.chat:
        stream(model, tokenizer, [{"role": "user", "content": args.prompt}], seed=args.seed, **say)
        return
    messages = []
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            return
        answer = stream(model, tokenizer, messages, seed=args.seed + len(messages), **say)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    run_script(main)
