"""The settings of a run: one dataclass, from which train.py's flags are made, presets, and checks.

Command line, over the model's preset, over the algorithm's preset, over the defaults. A model's
preset is training.json in its directory; checkpoints carry it: a second stage keeps its world.
A resumed run takes all of them from its own config.json.
"""
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from plumbing.files import NAMES, InputError, find_model, pick_device, preset_of, read_json

# What the method's files offer, by name (tests/test_house.py holds the two sides together).
KL_ESTIMATORS = ("k2", "k2-seq", "k3", "paper")              # lsp.py
CHALLENGER_REWARDS = ("lsp", "r-zero", "spice", "absolute-zero")
READINGS = ("generate", "expected")                          # of a judge: rewards.py
CHECKS, NEED_GOLD = ("exact", "math", "majority", "tiny"), ("exact", "math")
MIXES, STORIES = ("easy", "balanced"), "stories"             # of the embedded worlds


def setting(default, least=None, most=10**9, *, choices=None):
    return field(default=default, metadata={"least": least, "most": most, "choices": choices})


@dataclass
class Settings:
    """All settings of a run. The paper's Table 1 where it speaks; where it is silent, the help says
    so. --help prints the texts below in their groups, and the defaults.

    game:
        algo                lsp: with self-reward; lsp-zero: without; grpo: on --prompts; rlpt: on
                            --text; sft: supervised, on the answers in --prompts
        queries             N, queries a step
        answers             G, answers a query (not in the paper)
        steps               iterations, one gradient step each
        reward              R: a reward model's name, directory or hub id; exact or math (against
                            the gold answer); majority (of the answers to a query); tiny (the
                            embedded sums); FILE:FUNCTION (your own)
        reward_scale        factor of R, to balance it against R_Q's 0..7
        challenger_reward   the Challenger's reward: lsp (V_Q - V); or r-zero, spice or
                            absolute-zero, from the solve rate (R must be 0..1)
        alpha_ch            weight of the Challenger's loss (not in the paper)
        self_reward         how the judge's score is read: generate (it writes, and a parser reads;
                            the paper's, and lsp's default) or expected (expectation over the
                            score's token)
        judge_temperature   sampling temperature of the judge; 0: greedy, so that equal pairs have
                            equal scores
        tasks               file with a task in each line: the queries of a step take them in turn
        repetition_penalty  factor of the fraction of the step's other queries that are near-copies
                            of a query (more than half of its word 3-grams); what it gives is
                            subtracted from the Challenger's reward
        task                text for {task} in the Challenger's prompt; None: its own judgement
        template            text for {template} in the Challenger's prompt
        prompts             grpo and sft: JSON list or JSON lines with instruction, question,
                            problem or prompt (sft: and answer or output); in the embedded world
                            easy or balanced
        temperature         sampling temperature of queries and answers, also of their log-probs
        query_tokens        longest query in tokens; rlpt: longest prompt, whose context loses its
                            beginning to fit
        answer_tokens       longest answer in tokens
        judge_tokens        longest judgement in tokens
        mask_truncated      leave truncated queries and answers out of the loss
        seed                random seed
        watch               play one round, print it as a transcript, update nothing

    models:
        model               policy: a known name, a directory, a hub id, a run's checkpoint
        reference           frozen model of the KL term (default: the starting model)
        judge               frozen model of the self-reward, or of rlpt's verdict (default: the
                            reference)
        challenger_prompt   file of the Challenger's prompt (default: the model's prompts/ or ours)
        self_reward_prompt  file of the judge's prompt (default: the model's prompts/ or ours)
        date_string         today's date in Llama 3's chat template; fixed, so that prompts do not
                            change while a model learns
        device              where to compute

    RLPT:
        text                a .txt file, JSON lines with text, or a folder of such; stories: those
                            of the embedded world
        msr_weight          lambda, MSR tasks for each ASR task (not in the paper)
        min_segment         characters; shorter sentences are dropped (not in the paper)
        reference_segments  sentences that the judge is shown (not in the paper)
        min_prediction      least whole sentences of a prediction; 0: any beginning, however short,
                            may earn the reward
        verdict             how the judge's verdict is read: generate (the paper's, and the default)
                            or expected (the probability of a 1)
        strict              right is the content of just one sentence (the paper's earlier rule)

    optimisation:
        learning_rate       peak learning rate of AdamW
        warmup              steps of linear warm-up
        final_lr_share      fraction of the learning rate at which its linear decay ends
        weight_decay        weight decay of AdamW
        grad_clip           largest gradient norm; 0: no clipping
        beta                weight of the KL term; 0: no reference model
        kl                  KL estimator, see lsp.py
        max_bad_steps       skipped updates in a row that stop the run

    memory:
        micro_batch_tokens  padded tokens of a forward and backward pass; changes no gradient; on a
                            GPU as many as fit
        batch_tokens        tokens in the sampler's cache; changes no completion; on a GPU as many
                            as fit
        checkpointing       keep each block's input alone and compute the rest again in the backward
                            pass: a third slower, far less memory
        offload             keep masters and moments in host memory, and on the GPU only the model
                            in use: for small cards, slower
        gpu_memory          GB (1e9 bytes) of the GPU that the run may take, or that --dry-run
                            assumes; 0: all that is free
        dry_run             print what the run needs of memory and disk, from config.json files
                            alone; exit code 3 where it does not fit

    files:
        out                 run folder, new (default: runs/MODEL-ALGO-SEED)
        resume              run folder: continue from its newest whole checkpoint
        requeue             resume --out if a run has begun there, else begin it
        overwrite           delete the run in --out, and begin anew
        eval_prompts        held-out prompts: their reward, and the win-rate against the start
        eval_every          steps between evaluations
        save_every          steps between checkpoints
        keep                newest checkpoints to keep; 0: all (a 3B model's takes 45 GB)
    """
    algo: str = setting("lsp", choices=("lsp", "lsp-zero", "grpo", "rlpt", "sft"))
    queries: int = setting(8, 1, 10**5)
    answers: int = setting(8, 1, 10**5)
    steps: int = setting(500, 1, 10**7)
    reward: str = setting("skywork-v2-3b")
    reward_scale: float = setting(1.0, 0)
    challenger_reward: str = setting("lsp", choices=CHALLENGER_REWARDS)
    alpha_ch: float = setting(1.0, 0)
    self_reward: str | None = setting(None, choices=READINGS)
    judge_temperature: float = setting(0.0, 0)
    tasks: str | None = setting(None)
    repetition_penalty: float = setting(0.0, 0)
    task: str = setting("None")
    template: str = setting("None")
    prompts: str | None = setting(None)
    temperature: float = setting(1.0, 0.001, 1000)
    query_tokens: int = setting(256, 1)
    answer_tokens: int = setting(512, 1)
    judge_tokens: int = setting(256, 1)
    mask_truncated: bool = setting(False)
    seed: int = setting(0, 0, 2**63 - 1)
    watch: bool = setting(False)

    model: str = setting("tiny")
    reference: str | None = setting(None)
    judge: str | None = setting(None)
    challenger_prompt: str | None = setting(None)
    self_reward_prompt: str | None = setting(None)
    date_string: str = setting("26 Jul 2024")
    device: str = setting("auto", choices=("auto", "cpu", "cuda", "mps"))

    text: str | None = setting(None)
    msr_weight: float = setting(0.5, 0)
    min_segment: int = setting(10, 1)
    reference_segments: int = setting(3, 1, 100)
    min_prediction: int = setting(1, 0, 100)
    verdict: str | None = setting(None, choices=READINGS)
    strict: bool = setting(False)

    learning_rate: float = setting(3e-6, 0)
    warmup: int = setting(0, 0)
    final_lr_share: float = setting(0.0, 0, 1)
    weight_decay: float = setting(0.0, 0)
    grad_clip: float = setting(1.0, 0)
    beta: float = setting(0.05, 0)
    kl: str = setting("k2", choices=KL_ESTIMATORS)
    max_bad_steps: int = setting(5, 1)

    micro_batch_tokens: int = setting(2048, 1)
    batch_tokens: int = setting(65536, 1)
    checkpointing: bool = setting(False)
    offload: bool = setting(False)
    gpu_memory: float = setting(0.0, 0, 10**6)
    dry_run: bool = setting(False)

    out: str | None = setting(None)
    resume: str | None = setting(None)
    requeue: bool = setting(False)
    overwrite: bool = setting(False)
    eval_prompts: str | None = setting(None)
    eval_every: int = setting(50, 1)
    save_every: int = setting(50, 1)
    keep: int = setting(2, 0)

    @property
    def scored(self) -> bool:
        """Whether answers are scored by --reward."""
        return self.algo in SCORED

    @property
    def reading(self) -> str | None:
        """How the judge of lsp or rlpt is read; None: nobody judges."""
        return self.self_reward or self.verdict


KNOWN = {f.name: f for f in fields(Settings)}
ALGOS = {"lsp": {"self_reward": "generate"}, "lsp-zero": {}, "grpo": {"learning_rate": 1e-6},
         "rlpt": {"learning_rate": 1e-6, "final_lr_share": 1.0, "beta": 0.0, "verdict": "generate",
                  "query_tokens": 1024, "judge_tokens": 16},
         # The gradient is a sum over tokens: the clip suits answers of some hundred.
         "sft": {"learning_rate": 2e-5, "beta": 0.0, "answers": 1, "grad_clip": 100.0}}
OVER_PRESETS = {"rlpt": {"reward": "verdict"}, "sft": {"answers": 1}}
GPU = {"checkpointing": True}
MODELS = {"llama-3.2-1b": {"reward": "skywork-v2-1b"} | GPU, "llama-3.2-3b": GPU}
CHALLENGED, JUDGED, GIVEN = ("lsp", "lsp-zero"), ("lsp", "rlpt"), ("grpo", "sft")
SCORED = ("lsp", "lsp-zero", "grpo")
# Flags that only these algorithms use; given with another one, they are refused. Numbers are not:
# one command line may serve a sweep over algorithms.
ONLY = {CHALLENGED: ("task", "tasks", "template", "challenger_prompt", "challenger_reward"),
        JUDGED: ("judge",), ("lsp",): ("self_reward", "self_reward_prompt"), GIVEN: ("prompts",),
        ("rlpt",): ("text", "verdict", "strict"), SCORED: ("reward", "eval_prompts")}

# What --resume may be given beside the folder. FREE changes nothing that is learnt; RETUNE is
# allowed with a warning: --steps moves the decay's end, the others the last bits of sums. Any other
# setting would make it another run and is refused.
FREE = ("eval_every", "save_every", "keep", "max_bad_steps", "offload", "gpu_memory")
# Where things lie: on resume they may have moved.
PLACES = ("model", "reference", "judge", "reward", "prompts", "eval_prompts", "text", "tasks",
          "challenger_prompt", "self_reward_prompt")
RETUNE = ("steps", "device", "batch_tokens", "micro_batch_tokens", "checkpointing")
COMMANDS = ("resume", "requeue", "overwrite", "watch", "dry_run", "out")     # not what a run is


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(given: dict) -> tuple[Settings, dict]:
    """Settings from the flags that were given, and the model's preset.

    InputError for flags out of range, contradictory ones, and an unusable training.json.
    """
    named = set(given)                                           # on the command line itself
    if given.get("requeue") and not given.get("out"):
        raise InputError("--requeue needs --out: the folder to go on in, or to begin")
    commands = [key for key in COMMANDS[:5] if given.get(key)]
    if len(commands) > 1 or given.get("resume") and given.get("out"):
        raise InputError("give one of --resume RUN, --requeue, --overwrite, --watch, --dry-run"
                         " (--resume goes on in its own folder: no --out)")
    if given.get("requeue") and os.path.exists(Path(given["out"]) / "config.json"):
        given = given | {"resume": given["out"]}
    if given.get("resume"):
        folder = Path(given["resume"])
        if re.fullmatch(r"checkpoint(-\d+)?", folder.name):                # RUN/checkpoint: RUN
            folder = folder.parent
        given = continued(folder, given)
    name = given.get("model", "tiny-rlpt" if given.get("algo") == "rlpt" else Settings.model)
    path = find_model(name, weights=not given.get("dry_run"))
    preset = MODELS.get(name, {}) | read_preset(path)
    algo = given.get("algo", preset.get("algo", Settings.algo))
    s = Settings(**{"model": name} | ALGOS[algo] | preset | OVER_PRESETS.get(algo, {}) | given)
    for algos, flags in ONLY.items():
        for unused in named & set(flags) if algo not in algos else ():
            if (unused, s.reward, s.text) != ("reward", "tiny", STORIES):     # an exact verdict
                raise InputError(f"{flag(unused)} is not used here: it needs --algo "
                                 + " or ".join(algos))
    if s.algo != "lsp":                                 # nor may a preset's reading be used
        s.self_reward = None
    for key in PLACES:               # absolute: --resume may be given elsewhere
        place, colon, function = str(getattr(s, key)).rpartition(":")
        if key == "reward" and colon:
            s.reward = os.path.abspath(place) + colon + function
        elif function not in NAMES and os.path.exists(function):
            moves_on = Path(function).name == "checkpoint"         # a run's link to its newest one
            setattr(s, key, (os.path.realpath if moves_on else os.path.abspath)(function))
    check(s)
    return s, preset


def check_names(file: Path, values: dict):
    """InputError for a name in a JSON file that is no setting, and for a wrong value."""
    for key, value in values.items():
        if key not in KNOWN:
            raise InputError(f"{file}: {key} is no setting")
        check_value(f"{file}: {key}", KNOWN[key], value)


def check_value(name: str, f, value):
    """InputError unless the value has the type of its setting, is a choice of it and in range."""
    least, most, choices = (f.metadata[key] for key in ("least", "most", "choices"))
    kind = (int, float) if f.type is float else f.type
    good = isinstance(value, kind) and (f.type is bool or not isinstance(value, bool))
    if not good or choices and value is not None and value not in choices:
        raise InputError(f"{name} = {value!r} has not the type of this setting, or is no choice")
    if least is not None and not least <= value <= most:
        raise InputError(f"{name} must be at least {least} and at most {most}, found {value}")


def read_preset(folder: Path) -> dict:
    """The settings in a model's training.json. It may be a stranger's: it can set how the game is
    played, and no path on this machine."""
    file, preset = folder / "training.json", preset_of(folder)
    check_names(file, preset)
    for key, value in preset.items():
        if key in PLACES + COMMANDS and value not in (None, STORIES, *CHECKS, *NAMES):
            raise InputError(f"{file}: {key} can be set on the command line alone")
    return preset


def continued(folder: Path, given: dict) -> dict:
    """Every setting of the run in a folder, with the given ones that may differ (FREE, RETUNE)."""
    stored = read_json(folder / "config.json")
    check_names(folder / "config.json", stored)
    stored = asdict(Settings()) | stored                # a run older than a setting lacks it
    changed = {key: value for key, value in given.items()
               if key not in COMMANDS and value != stored[key]}
    for key, value in sorted(changed.items(), key=lambda item: item[0] in RETUNE):
        if key not in FREE + RETUNE and not (key in PLACES and os.path.exists(value)):
            raise InputError(f"{flag(key)} {value} would change the run in {folder}, which has "
                             f"{stored[key]}: leave it out, or begin another run with "
                             f"--model {folder}/checkpoint")
        if key in RETUNE:
            print(f"resuming with {flag(key)} {value}, was {stored[key]}: from here on not the run "
                  "that it would have been")
    commands = {key: KNOWN[key].default for key in COMMANDS}
    return stored | changed | commands | {"resume": str(folder), "out": str(folder)}


def check(s: Settings):
    """Refuse what cannot work, with the reason."""
    for key, f in KNOWN.items():
        check_value(flag(key), f, getattr(s, key))
    if s.warmup > s.steps:
        raise InputError(f"--warmup {s.warmup} is longer than the run, --steps {s.steps}")
    if s.out and os.path.lexists(s.out) and not (s.resume or s.requeue or s.overwrite):
        raise InputError(f"--out {s.out} exists already; nothing is overwritten: choose another, "
                         "or --resume, --requeue or --overwrite a run")
    if s.algo in GIVEN and not s.prompts:
        raise InputError(f"--algo {s.algo} learns from data: give --prompts FILE")
    if (s.algo == "sft") != (s.answers == 1):
        raise InputError(f"--answers {s.answers}: a group to compare needs at least 2; --algo sft "
                         "has 1")
    if s.algo == "rlpt" and not s.text:
        raise InputError("--algo rlpt learns from plain text: give --text FILE_OR_FOLDER")
    if s.tasks and s.task != "None":
        raise InputError("give --task, or --tasks FILE")
    if s.algo in CHALLENGED and s.queries < 2:
        raise InputError(f"--queries {s.queries}: the Challenger's advantage compares queries: "
                         "at least 2")
    if s.algo in CHALLENGED and s.reward in NEED_GOLD:
        raise InputError(f"--reward {s.reward} needs gold answers, which a Challenger's query "
                         "lacks: --algo grpo")
    if s.gpu_memory and not s.dry_run and pick_device(s.device)[0].type != "cuda":
        raise InputError("--gpu-memory is not used here: it needs a GPU, or --dry-run")
    if s.challenger_reward != "lsp" and s.reward not in CHECKS and ":" not in s.reward:
        raise InputError(f"--challenger-reward {s.challenger_reward} needs rewards between 0 and "
                         f"1, of which it makes a solve rate: --reward {s.reward} is a model")


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
    if s.scored and s.reward not in CHECKS and ":" not in s.reward:
        found["reward model"] = path(s.reward)
    return found
