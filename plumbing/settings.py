"""The settings of a run: one dataclass, from which train.py's flags are made, presets, and checks.

Command line, over the model's preset, over the algorithm's preset, over the defaults. A model's
preset is training.json in its directory; checkpoints carry it: a second stage keeps its world.
A resumed run takes all of them from its own config.json.
"""
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from plumbing.chat import SURROGATE
from plumbing.files import (
    NAMES,
    InputError,
    find_model,
    inside,
    pick_device,
    prompt_file,
    read_json,
)

# What the method's files offer, by name (tests/test_house.py holds the two sides together).
KL_ESTIMATORS = ("k2", "k2-seq", "k3", "paper")              # lsp.py
CHALLENGER_REWARDS = ("lsp", "r-zero", "spice", "absolute-zero")
READINGS = ("generate", "expected")                          # of a judge: rewards.py
CHECKS, NEED_GOLD = ("exact", "math", "majority", "tiny"), ("exact", "math")
MIXES, STORIES = ("easy", "balanced"), "stories"             # of the embedded worlds


def setting(default, help, least=None, most=10**9, choices=None):
    return field(default=default, metadata={"help": help, "least": least, "most": most,
                                            "choices": choices})


@dataclass
class Settings:
    """The paper's Table 1 where it speaks; where it is silent, the help says so or why."""
    model: str = setting("tiny", "policy: a known name, a directory, a hub id, a run's checkpoint")
    algo: str = setting("lsp", "lsp: with self-reward; lsp-zero: without; grpo: on --prompts; "
                        "rlpt: on --text", choices=("lsp", "lsp-zero", "grpo", "rlpt"))
    reward: str = setting("skywork-v2-3b", "R: a reward model's name, directory or hub id; exact "
                          "or math (against the gold answer); majority (of the answers to a "
                          "query); tiny (the embedded sums); FILE:FUNCTION (your own)")
    challenger_reward: str = setting("lsp", "the Challenger's reward: lsp (V_Q - V), or from the "
                                     "solve rate r-zero, spice, absolute-zero (R must be 0..1)",
                                     choices=CHALLENGER_REWARDS)
    reward_scale: float = setting(1.0, "R is multiplied by it, to stand beside R_Q's 0..7", 0)
    reference: str | None = setting(None, "frozen model of the KL term (default: the start)")
    judge: str | None = setting(None, "frozen model of the self-reward, or of rlpt's verdict "
                                "(default: the reference)")
    self_reward: str | None = setting(None, "how the judge is read: generate (it writes, we parse; "
                                      "the paper's, and lsp's default) or expected (expectation "
                                      "over the score's token)", choices=READINGS)
    judge_temperature: float = setting(0.0, "0: greedy, so that one pair has one score", 0)
    date_string: str = setting("26 Jul 2024", "today in Llama 3's chat template, which should not "
                               "change while a model learns")
    task: str = setting("None", "fills {task} of the Challenger's prompt; None: its judgement")
    template: str = setting("None", "fills {template} of the Challenger's prompt")
    challenger_prompt: str | None = setting(None, "file (default: the model's prompts/, else ours)")
    self_reward_prompt: str | None = setting(None, "file (default: the model's prompts/, or ours)")
    prompts: str | None = setting(None, "grpo: JSON list or JSON lines with instruction, question, "
                                  "problem or prompt; in the embedded world easy or balanced")

    text: str | None = setting(None, "rlpt: a .txt file, JSON lines with text, or a folder of "
                             "such; stories: those of the embedded world")
    msr_weight: float = setting(0.5, "rlpt: lambda, MSR tasks for each ASR task (not in the paper)",
                                0)
    min_segment: int = setting(10, "rlpt: characters; shorter sentences are dropped (not in the "
                               "paper)", 1)
    reference_segments: int = setting(3, "rlpt: sentences that the judge is shown (not in the "
                                      "paper)", 1, 100)
    min_prediction: int = setting(1, "rlpt: whole sentences; 0: any beginning, however short, may "
                                  "earn the reward", 0, 100)
    verdict: str | None = setting(None, "rlpt: how the judge is read: generate (the paper's, and "
                                  "the default) or expected (the probability of a 1)",
                                  choices=READINGS)
    strict: bool = setting(False, "rlpt: right is the content of just one sentence (the paper's "
                           "earlier rule)")

    queries: int = setting(8, "N, queries a step", 1, 10**5)
    answers: int = setting(8, "G, answers a query (the paper does not say)", 2, 10**5)
    steps: int = setting(500, "iterations, one gradient step each", 1, 10**7)
    beta: float = setting(0.05, "weight of the KL term; 0: no reference model", 0)
    kl: str = setting("k2", "KL estimator, see lsp.py", choices=KL_ESTIMATORS)
    alpha_ch: float = setting(1.0, "weight of the Challenger's loss (the paper does not say)", 0)
    temperature: float = setting(1.0, "of queries and answers, in sampling and log-probs alike",
                                 0.001, 1000)
    query_tokens: int = setting(256, "longest query; rlpt: longest prompt, its context loses its "
                                "beginning to fit", 1)
    answer_tokens: int = setting(512, "longest answer", 1)
    judge_tokens: int = setting(256, "longest judgement", 1)
    mask_truncated: bool = setting(False, "leave cut-off queries and answers out of the loss")

    learning_rate: float = setting(3e-6, "of AdamW, at its highest", 0)
    final_lr_share: float = setting(0.0, "share of it at which the linear decay ends", 0, 1)
    warmup: int = setting(0, "steps of linear warm-up", 0)
    weight_decay: float = setting(0.0, "AdamW's", 0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: any", 0)
    micro_batch_tokens: int = setting(2048, "padded tokens a pass; changes no gradient; on a GPU "
                                      "as many as fit", 1)
    checkpointing: bool = setting(False, "keep each block's input alone and compute the rest again "
                                  "in the backward pass: a third slower, far less memory")
    offload: bool = setting(False, "keep masters and moments in host memory, and on the GPU only "
                            "the model in use: small cards, slower")
    batch_tokens: int = setting(65536, "tokens in the sampler's cache; changes no completion; on a "
                                "GPU as many as fit", 1)
    gpu_memory: float = setting(0.0, "GB (1e9 bytes) of the GPU that the run may take, or that "
                                "--dry-run imagines; 0: what is free", 0, 10**6)

    eval_prompts: str | None = setting(None, "held-out prompts: reward, win-rate against the start")
    eval_every: int = setting(50, "steps between evaluations", 1)
    save_every: int = setting(50, "steps between checkpoints", 1)
    seed: int = setting(0, "of everything random", 0, 2**63 - 1)
    keep: int = setting(2, "newest checkpoints to keep; 0: all (a 3B model's takes 45 GB)", 0)
    max_bad_steps: int = setting(5, "skipped updates in a row that stop the run", 1)
    out: str | None = setting(None, "run folder, new (default: runs/MODEL-ALGO-SEED)")
    resume: str | None = setting(None, "run folder: go on where its newest whole checkpoint is")
    requeue: bool = setting(False, "resume --out if a run has begun there, else begin it")
    overwrite: bool = setting(False, "delete the run that --out holds, and begin anew")
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    watch: bool = setting(False, "play one round, print it as a transcript, update nothing")
    dry_run: bool = setting(False, "print what the run needs of memory and disk, from "
                            "config.json files alone; exit code 3 where it does not fit")

    @property
    def reading(self) -> str | None:
        """How the judge of lsp or rlpt is read; None: nobody judges."""
        return self.self_reward or self.verdict


ALGOS = {"lsp": {"self_reward": "generate"}, "lsp-zero": {}, "grpo": {"learning_rate": 1e-6},
         "rlpt": {"learning_rate": 1e-6, "final_lr_share": 1.0, "beta": 0.0, "verdict": "generate",
                  "query_tokens": 1024, "judge_tokens": 16}}
GPU = {"checkpointing": True}
MODELS = {"llama-3.2-1b": {"reward": "skywork-v2-1b"} | GPU, "llama-3.2-3b": GPU}
CHALLENGED, JUDGED = ("lsp", "lsp-zero"), ("lsp", "rlpt")
STRANGERS_MAY_SET = ("text", "task", "template", "reward", "mask_truncated", "checkpointing")
# Flags that name something which only some runs use; given to another run, they are refused.
# Numbers are not: one command line may serve a sweep over algorithms.
NEEDS = {
    "a Challenger: --algo lsp or lsp-zero": (
        lambda s: s.algo in CHALLENGED,
        ("task", "template", "challenger_prompt", "challenger_reward")),
    "a judge: --algo lsp or rlpt": (lambda s: s.algo in JUDGED, ("judge",)),
    "a self-reward: --algo lsp": (lambda s: s.algo == "lsp", ("self_reward_prompt",)),
    "plain text: --algo rlpt": (lambda s: s.algo == "rlpt", ("text", "verdict", "strict")),
    "queries to answer: another --algo than rlpt": (
        lambda s: s.algo != "rlpt", ("eval_prompts",)),
    "queries to answer, or the embedded stories": (
        lambda s: s.algo != "rlpt" or (s.reward, s.text) == ("tiny", STORIES), ("reward",)),
    "a KL term, --beta above 0, or a judge": (
        lambda s: s.beta > 0 or s.algo in JUDGED and not s.judge, ("reference",)),
    "a run that trains: no --watch": (lambda s: not s.watch, ("out", "eval_prompts")),
    "a GPU, or --dry-run": (
        lambda s: s.dry_run or pick_device(s.device)[0].type == "cuda", ("gpu_memory",)),
}

# What --resume may be given beside the folder. FREE changes nothing that is learnt; RETUNE is
# allowed with a warning: --steps moves the decay's end, the others the last bits of sums. Any other
# setting would make it another run and is refused.
FREE = ("eval_every", "save_every", "keep", "max_bad_steps", "offload", "gpu_memory")
# Where things lie. They may have moved; what they hold may not have changed (Run.begin).
PLACES = ("model", "reference", "judge", "reward", "prompts", "eval_prompts", "text",
          "challenger_prompt", "self_reward_prompt")
RETUNE = ("steps", "device", "batch_tokens", "micro_batch_tokens", "checkpointing")
COMMANDS = ("resume", "requeue", "overwrite", "watch", "dry_run", "out")     # not what a run is
# Settings that came later; their defaults are what runs did before, so that older ones go on.
ADDED = ("offload", "gpu_memory", "dry_run", "date_string", "challenger_reward")


def resolve(given: dict) -> tuple[Settings, dict]:
    """Settings from the flags that were given, and the model's preset.

    InputError for flags out of range, contradictory ones, and an unusable training.json.
    """
    named = set(given)                                           # on the command line itself
    if given.get("requeue") and not given.get("out"):
        raise InputError("--requeue needs --out: the folder to go on in, or to begin")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (
            given.get("requeue") or given.get("resume")):
        raise InputError("torchrun --max-restarts needs --out RUN --requeue, so that a restart "
                         "knows what to go on with")
    commands = [key for key in COMMANDS[:5] if given.get(key)]
    if len(commands) > 1 or given.get("resume") and given.get("out"):
        raise InputError("give one of --resume RUN, --requeue, --overwrite, --watch, --dry-run"
                         " (--resume goes on in its own folder: no --out)")
    if given.get("requeue") and os.path.exists(Path(given["out"]) / "config.json"):
        given = given | {"resume": given["out"]}
    if given.get("resume") and re.fullmatch(r"checkpoint(-\d+)?", Path(given["resume"]).name):
        given = given | {"resume": str(Path(given["resume"]).parent)}     # RUN/checkpoint: RUN
    if given.get("resume"):
        given = continued(Path(given["resume"]), given)
    name = given.get("model", "tiny-rlpt" if given.get("algo") == "rlpt" else Settings.model)
    path = find_model(name, weights=not given.get("dry_run"))
    preset = MODELS.get(name, {})
    file = inside(path, "training.json")
    if file.exists():
        preset = preset | read_preset(file)
    algo = given.get("algo", preset.get("algo", Settings.algo))
    s = Settings(**{"model": name} | ALGOS[algo] | preset | given)
    if s.algo == "rlpt" and "reward" not in given:      # whatever the model's preset plays for
        s.reward = "verdict"
    for needs, (met, flags) in NEEDS.items():
        for flag in flags if not met(s) else ():
            if flag in named:
                raise InputError(f"--{flag.replace('_', '-')} is not used here: it needs {needs}")
    s.challenger_prompt = s.challenger_prompt or str(prompt_file(path, "challenger"))
    s.self_reward_prompt = s.self_reward_prompt or str(prompt_file(path, "self_reward"))
    for key in PLACES:               # absolute: --resume may be given elsewhere
        place = getattr(s, key)
        if place and place not in NAMES and os.path.exists(place):
            setattr(s, key, os.path.abspath(place))
    file, colon, function = s.reward.rpartition(":")
    s.reward = os.path.abspath(file) + colon + function if colon else s.reward
    check(s)
    return s, preset


def read_preset(file: Path) -> dict:
    """training.json's settings. It may be a stranger's: what it can set is how the game is played,
    numbers and choices, and no path on this machine."""
    preset = read_json(file)
    check_types(preset, file)
    for f in fields(Settings):
        value = preset.get(f.name)
        number = f.type in (int, float)
        if f.name in preset and not number and not f.metadata["choices"] and (
                f.name not in STRANGERS_MAY_SET
                or f.name == "reward" and value not in (*CHECKS, *NAMES)
                or f.name == "text" and value != STORIES):
            raise InputError(f"{file}: {f.name} can be set on the command line alone")
        if f.name in preset:
            check_range(f"{file}: {f.name}", f, value)
    return preset


def check_range(name: str, f, value):
    least, most = f.metadata["least"], f.metadata["most"]
    if least is not None and not least <= value <= most:
        raise InputError(f"{name} must be at least {least} and at most {most}, found {value}")


def continued(folder: Path, given: dict) -> dict:
    """Every setting of the run in a folder, with the given ones that may differ (FREE, RETUNE)."""
    file = folder / "config.json"
    stored = read_json(file)
    stored.pop("sources", None)
    check_types(stored, file)
    stored = {key: asdict(Settings())[key] for key in ADDED} | stored
    if missing := [f.name for f in fields(Settings) if f.name not in stored]:
        raise InputError(f"{file}: not the settings of a run ({missing[0]} is missing)")
    model = stored["model"]
    if "model" not in given and os.path.isabs(model) and not os.path.exists(model):
        raise InputError(f"{model}, which the run in {folder} began with, is not there any more: "
                         "give its new place with --model")
    changed = {key: value for key, value in given.items()
               if key not in COMMANDS and value != stored[key]}
    for key, value in changed.items():
        flag = "--" + key.replace("_", "-")
        if key not in FREE + RETUNE and not (key in PLACES and os.path.exists(value)):
            raise InputError(f"{flag} {value} would change the run in {folder}, which has "
                             f"{stored[key]}: leave it out, or begin another run with "
                             f"--model {folder}/checkpoint")
        if key in RETUNE:
            print(f"resuming with {flag} {value}, was {stored[key]}: from here on not the run that "
                  "it would have been")
    if "model" in changed:           # what the model's folder brings has moved with it
        for key in ("challenger_prompt", "self_reward_prompt"):
            if stored[key] and Path(stored[key]).is_relative_to(stored["model"]):
                stored[key] = None
    commands = {key: asdict(Settings())[key] for key in COMMANDS}
    return stored | changed | commands | {"resume": str(folder), "out": str(folder)}


def check_types(values: dict, file: Path):
    """InputError for a name that is no setting, or a value of another type."""
    known = {f.name: f for f in fields(Settings)}
    for key, value in values.items():
        kind = known[key].type if key in known else None
        good = kind and isinstance(value, (int, float) if kind is float else kind)
        good = good and (kind is bool or not isinstance(value, bool))
        choices = known[key].metadata["choices"] if good and value is not None else None
        if not good or choices and value not in choices:
            raise InputError(f"{file}: {key} = {value!r} is no setting, or not of its type")


def check(s: Settings):
    """Refuse what cannot work, with the reason."""
    for f in fields(s):
        value, flag = getattr(s, f.name), "--" + f.name.replace("_", "-")
        check_range(flag, f, value)
        if isinstance(value, str) and (SURROGATE.search(value) or "\0" in value):
            raise InputError(f"{flag} {value}: not text in UTF-8")
    if s.warmup > s.steps:
        raise InputError(f"--warmup {s.warmup} is longer than the run, --steps {s.steps}")
    if s.out and os.path.lexists(s.out) and not (s.resume or s.requeue or s.overwrite):
        raise InputError(f"--out {s.out} exists already; nothing is overwritten: choose another, "
                         "or --resume, --requeue or --overwrite a run")
    if s.algo == "grpo" and not s.prompts:
        raise InputError("--algo grpo learns from data: give --prompts FILE")
    if s.algo == "grpo" and s.prompts in MIXES and s.reward != "tiny":
        raise InputError(f"--prompts {s.prompts} belongs to the embedded world: give a file")
    if s.algo != "grpo" and s.prompts:
        raise InputError(f"--prompts is for --algo grpo; {s.algo}'s queries are "
                         + ("made of --text" if s.algo == "rlpt" else "the Challenger's"))
    if s.algo in CHALLENGED and s.queries < 2:
        raise InputError(f"--queries {s.queries}: the Challenger's advantage compares queries: "
                         "at least 2")
    if s.algo in CHALLENGED and s.reward in NEED_GOLD:
        raise InputError(f"--reward {s.reward} needs gold answers, which a Challenger's query "
                         "lacks: --algo grpo")
    if s.challenger_reward != "lsp" and s.reward not in CHECKS and ":" not in s.reward:
        raise InputError(f"--challenger-reward {s.challenger_reward} needs rewards between 0 and "
                         f"1, of which it makes a solve rate: --reward {s.reward} is a model")
    if s.algo != "lsp" and s.self_reward:
        raise InputError(f"--self-reward is for --algo lsp; {s.algo} has none")
    if s.algo != "rlpt" and s.verdict:
        raise InputError(f"--verdict is for --algo rlpt; {s.algo} has none")
    if s.algo == "rlpt" and not s.text:
        raise InputError("--algo rlpt learns from plain text: give --text FILE_OR_FOLDER")
    if s.strict and s.reference_segments != Settings.reference_segments:
        raise InputError("--strict compares with one sentence: no --reference-segments")


def run_name(s: Settings) -> str:
    """MODEL-ALGO-SEED; a checkpoint goes by its run's name."""
    path = Path(s.model)
    name = path.absolute().parent.name if path.name.startswith("checkpoint") else path.name
    return f"{name}-{s.algo}-{s.seed}"


def model_paths(s: Settings, *, weights: bool = True) -> dict[str, Path]:
    """The directory of each model that a run holds; a judge that is the reference is there once.
    weights: whether they are fetched with their weights."""
    path = lambda name: find_model(name, weights=weights)
    policy = path(s.model)
    reference = path(s.reference) if s.reference else policy
    judge = path(s.judge) if s.judge else reference
    judged = s.self_reward or s.verdict and s.reward != "tiny"
    found = {"policy": policy}
    if s.beta or judged and judge == reference:
        found["reference"] = reference
    if judged and judge != reference:
        found["judge"] = judge
    if s.algo != "rlpt" and s.reward not in CHECKS and ":" not in s.reward:
        found["reward model"] = path(s.reward)
    return found
