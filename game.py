"""The players and what they play with: models, tokenizers, prompts, data and the reward.

    s, preset = settings.resolve({"model": "smollm2-135m", "reward": "skywork-v2-1b"})
    game = set_up(s)                       # all that train.py's play() and update() need
"""
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

import rewards
import rlpt
from model import Llama, load_model, read_config
from plumbing import ranks
from plumbing.chat import Tokenizer, fill
from plumbing.data import check_data, opening, read_data
from plumbing.files import InputError, find_model, pick_device, prompt_file, read_prompt
from plumbing.memory import Stage, rest
from plumbing.phases import Phases
from plumbing.settings import Settings
from plumbing.texts import Texts
from tiny import world as tiny_world


@dataclass
class Game:
    """What play() needs: models, tokenizers, prompts and the reward."""
    settings: Settings
    policy: Llama
    tokenizer: Tokenizer
    reward: object                         # (queries, answers, golds) -> (len,)
    reference: Llama | None = None         # None where beta is 0 and nobody judges
    judge: Llama | None = None             # None without self-reward
    judge_tokenizer: Tokenizer | None = None
    judge_prompt: str | None = None        # with {instruction} and {response} to fill
    challenger_prompt: list[int] | None = None    # <cp> as token ids; None with grpo
    data: list = ()                        # grpo: (query, gold); else empty
    held_out: list = ()                    # those of --eval-prompts
    texts: Texts | None = None             # rlpt: what episodes are made of
    episode_prompts: dict = field(default_factory=dict)    # "asr", "msr": with {context}, {next}
    world: ModuleType | None = None        # the embedded world, where it is played
    sources: dict[str, Path | Texts] = field(default_factory=dict)     # what was read, by flag
    phase: Phases = field(default_factory=Phases)

    @property
    def scorer(self) -> Llama | None:
        """The reward's model, where it has one."""
        return getattr(self.reward, "model", None)


def set_up(s: Settings, checkpoint: Path | None = None) -> Game:
    """Read and load all that the settings name; small files first, so that errors come early.

    checkpoint: the policy of a run that is resumed.
    """
    device, dtype = pick_device(s.device)
    ranks.check_gpu(device)
    stories = s.algo == "rlpt" and s.text == tiny_world.STORIES
    world = tiny_world if s.reward == "tiny" or stories else None
    if world and device.type == "cpu":
        torch.set_num_threads(1)           # matrices this small: threads would wait for each other
    if s.gpu_memory and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, s.gpu_memory * 1e9 / whole))
    home = torch.device("cpu") if s.offload else device          # where models rest
    load = lambda path, dtype=dtype: load_model(path, device=home, dtype=dtype)
    Tokenizer.date_string = s.date_string
    start = find_model(s.model)
    reference_path = find_model(s.reference) if s.reference else start
    judge_path = find_model(s.judge) if s.judge else reference_path
    judged = rewards.SELF_REWARD if s.self_reward else (
        rewards.VERDICT if s.reward == "verdict" else None)
    data, held_out = [], []
    read = lambda file: read_data(file, gold=rewards.NEED_GOLD.get(s.reward), boxed=rewards.boxed)
    if s.algo == "grpo" and world and s.prompts in world.MIXES:
        data = world.prompts(s.prompts, min(s.queries * s.steps, 10**5), seed=s.seed)
    elif s.algo == "grpo":
        data = read(s.prompts)
    if s.eval_prompts:
        held_out = read(s.eval_prompts)
    tokenizer = Tokenizer(start)
    context = read_config(start).max_position_embeddings
    check_data(s.prompts, data, tokenizer, context - s.answer_tokens)
    check_data(s.eval_prompts, held_out, tokenizer, context - s.answer_tokens)
    game = Game(s, None, tokenizer, rewards.CHECKS.get(s.reward), data=data, held_out=held_out,
                world=world)
    game.sources = {"--model": start}
    for flag in ("prompts", "eval_prompts"):
        if getattr(s, flag) and not (world and getattr(s, flag) in world.MIXES):
            game.sources["--" + flag.replace("_", "-")] = Path(getattr(s, flag))
    if s.algo == "rlpt":
        rlpt.open_texts(game, start, context)
    elif s.algo != "grpo":
        game.sources["--challenger-prompt"] = Path(s.challenger_prompt)
        given = [name for name in ("task", "template") if getattr(s, name) != "None"]
        prompt = fill(read_prompt(s.challenger_prompt, given), task=s.task, template=s.template)
        game.challenger_prompt = opening(tokenizer, s.challenger_prompt, prompt, s.query_tokens,
                                         context)
        opening(tokenizer, "--query-tokens and --answer-tokens", "",
                s.query_tokens + s.answer_tokens, context)
    if judged:
        prompt_path = Path(s.self_reward_prompt) if s.self_reward else prompt_file(
            judge_path, "verdict_strict" if s.strict else "verdict")
        flag = "--self-reward-prompt" if s.self_reward else "the judge's prompt"
        game.sources |= {flag: prompt_path, "--judge": judge_path}
        game.judge_tokenizer = tokenizer if judge_path == start else Tokenizer(judge_path)
        game.judge_prompt = read_prompt(prompt_path, judged.places)
        opening(game.judge_tokenizer, prompt_path,
                fill(game.judge_prompt, **dict.fromkeys(judged.places, "")), s.judge_tokens,
                read_config(judge_path).max_position_embeddings)
    if not game.reward and s.algo != "rlpt":
        game.sources["--reward"] = find_model(s.reward)
        game.reward = rewards.RewardModel(game.sources["--reward"], device=home, dtype=dtype,
                                          batch_tokens=min(16384, s.batch_tokens))
    shared = judged and judge_path == reference_path
    game.reference = load(reference_path) if s.beta or shared else None
    if game.reference:
        game.sources["--reference"] = reference_path
    if judged:
        game.judge = game.reference if shared else load(judge_path)
    if s.algo == "rlpt":
        game.reward = rlpt.Verdict(
            game.judge, game.judge_tokenizer, game.judge_prompt, reading=s.verdict,
            temperature=s.judge_temperature, max_new_tokens=s.judge_tokens,
            batch_tokens=s.batch_tokens, min_prediction=s.min_prediction, least=s.min_segment,
            world=world if s.reward == "tiny" else None)
    # In its masters' precision; MasterAdamW makes it bf16.
    game.policy = load(checkpoint or start, torch.float32)
    game.policy.checkpointing = s.checkpointing
    for flag in ("policy", "reference", "judge"):
        model = getattr(game, flag)
        if model and model.config.scalar_head:
            raise InputError(f"the {flag} is a reward model, which cannot write")
    if s.beta and game.reference.config.vocab_size != game.policy.config.vocab_size:
        raise InputError(f"--reference {s.reference}: another vocabulary than the policy's")
    if s.offload:
        game.phase.stage = Stage(device, dtype)
        for model in {game.scorer, game.reference, game.judge} - {None}:
            rest(model)                        # the policy: MasterAdamW
    return game
