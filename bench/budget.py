"""budget.py's estimates against measured memory: a step's phases, each workload in its own process.

    python bench/budget.py --out bench/results/budget.jsonl
    python bench/budget.py --only generate

A child builds random models, AdamW's moments too, and plays a step of train.py's game whose texts
all run to their limits. Growth over idle is the kernel's high-water mark of a phase minus what was
resident before the step; its estimate is the phase's peak minus weights and moments. glibc is told
to give freed blocks back at once (GIVE_BACK), or each phase would show the one before it. CPU and
Linux only. A GPU's own figures are in metrics.jsonl of every run: peak_gb beside budget_gb.
"""
import gc
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import measure  # first: it puts the project's folder before bench/
import torch
from measure import Load, resident

import train
from model import Llama
from plumbing import budget
from plumbing.cli import run_script
from plumbing.config import parse_config
from plumbing.files import InputError
from plumbing.memory import MasterAdamW
from plumbing.phases import Phases
from plumbing.settings import Settings
from rewards import SELF_REWARD, Judge, RewardModel
from train import Game

MODEL = Load("smollm2-135m")
GAME = dict(model="random", reward="random", device="cpu", queries=16, answers=4, query_tokens=96,
            answer_tokens=64, judge_tokens=8, self_reward="generate", micro_batch_tokens=2048)
WORK = ("gradients", "cache", "activations")         # what a phase takes beside what stays
# Weights of three models with AdamW's moments 2.7 GB, and enough texts that each phase takes more
# than the 10 to 20 MB that are no tensors.
WORKLOADS = {
    "generate": (MODEL, GAME),
    "expected, checkpointing": (MODEL, GAME | {"self_reward": "expected", "checkpointing": True}),
}
SMALLEST = {"smallest": (Load("tiny"), GAME | {"queries": 2, "answers": 2, "query_tokens": 5,
                                               "answer_tokens": 5, "judge_tokens": 3})}
CHALLENGER, RUBRIC = 500, 400        # tokens
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
             "MALLOC_TOP_PAD_": "0"}


class Words:
    """A tokenizer whose texts are token ids: nothing gets longer or shorter on its way."""
    stop_ids, path = (), "words"

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def encode(self, text: str) -> list[int]:
        return [int(word) if word.isdigit() else 0 for word in re.findall(r"\d+|[^\s\d]+", text)]

    def chat(self, messages: list[dict], *, generation_prompt: bool = True) -> list[int]:
        around = [1] * (budget.TURN // 2)
        return around + [i for m in messages for i in self.encode(m["content"])] + around


def set_up(load: Load, changes: dict) -> tuple[Game, MasterAdamW]:
    """What game.set_up would make, around random models."""
    s = Settings(**changes)
    build = lambda: measure.our_model(load)
    reward = RewardModel.__new__(RewardModel)
    with torch.device("meta"):
        scorer = Llama(replace(parse_config(measure.config_of(load)), scalar_head=True))
    reward.model = measure.fill(scorer.to_empty(device="cpu"))
    reward.tokenizer, reward.batch_tokens = Words(), min(16384, s.batch_tokens)
    game = Game(s, build(), Words(), reward, build().requires_grad_(False))
    game.judge = Judge(game.reference, game.tokenizer, "2 " * RUBRIC + "{instruction} {response}",
                       SELF_REWARD, s.self_reward, max_new_tokens=s.judge_tokens,
                       batch_tokens=s.batch_tokens)
    game.challenger_prompts = [[3] * CHALLENGER]
    game.policy.checkpointing = s.checkpointing
    return game, MasterAdamW(game.policy, torch.float32, weight_decay=0.0)


def estimates(game: Game) -> dict[str, dict]:
    roles = {"policy": game.policy, "reference": game.reference, "reward model": game.reward.model}
    text = {"challenger": CHALLENGER, "judge": budget.TURN + RUBRIC, "rubric": RUBRIC,
            "shown": game.settings.query_tokens}
    plan = budget.Plan(game.settings, {role: model.config for role, model in roles.items()},
                       train.MEASURED, text)
    return plan.phases(game.settings)


class HostPhases(Phases):
    """Phases with the peak of this process's resident memory, GB above `idle`."""

    @contextmanager
    def __call__(self, name, model=None):
        Path("/proc/self/clear_refs").write_text("5")    # the high-water mark starts anew
        with super().__call__(name, model):
            yield
        self.peak_gb[name] = resident("VmHWM") - self.idle


def child(load: Load, changes: dict) -> dict:
    """A step of one workload in this process: a record a phase, in GB."""
    begun, libraries = time.perf_counter(), resident("VmRSS")
    game, optimizer = set_up(load, changes)
    gc.collect()
    game.phase = HostPhases()
    game.phase.idle = idle = resident("VmRSS")           # peaks are counted from here
    r = train.play(game, 0)
    train.update(game, optimizer, r, 0)
    found = estimates(game)
    work = lambda parts: sum(parts.get(part, 0) for part in WORK) / 1e9
    return {"idle": idle - libraries, "seconds": time.perf_counter() - begun,
            "idle_estimate": (sum(found["solve"].values()) / 1e9 - work(found["solve"])),
            "phases": {name: {"measured": game.phase.peak_gb[name], "estimate": work(parts),
                              "parts": {part: parts[part] / 1e9 for part in WORK
                                        if part in parts}} for name, parts in found.items()}}


def table(results: dict[str, dict]) -> str:
    lines = [(workload, "weights and moments", f"{r['idle_estimate']:.3f}", f"{r['idle']:.3f}",
              f"{r['idle_estimate'] / r['idle']:.2f}") if name is None else
             (workload, name, f"{p['estimate']:.3f}", f"{p['measured']:.3f}",
              f"{p['estimate'] / p['measured']:.2f}")
             for workload, r in results.items() for name, p in [(None, None), *r["phases"].items()]]
    return measure.markdown(("workload", "phase", "GB estimated", "GB measured", "ratio"), lines)


def main():
    parser = measure.parser("Estimated and measured memory.", pairs=1)
    parser.add_argument("--child", help="JSON: measure one workload in this process and print it")
    parser.add_argument("--smallest", action="store_true", help="one of a few kilobytes: a test")
    args = parser.parse_args()
    workloads = SMALLEST if args.smallest else WORKLOADS
    if args.child:
        torch.set_num_threads(args.threads)
        print(json.dumps(child(*workloads[args.child])))
        return
    measure.start(args)
    results = {}
    for name in filter(lambda name: measure.chosen(args, name), workloads):
        done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--child", name,
                               "--threads", str(args.threads), *["--smallest"] * args.smallest],
                              capture_output=True, text=True, env=os.environ | GIVE_BACK)
        if done.returncode:
            raise InputError(f"{name}: {done.stderr.strip() or done.returncode}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(table({name: results[name]}), flush=True)
    measure.finish(args, "budget", {}, results)


if __name__ == "__main__":
    run_script(main)
