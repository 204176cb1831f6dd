"""What a reader may skip: bad input in one line, JSON and prompt files,
named models and the hub, devices."""
import json
import os
import runpy
from pathlib import Path

import torch
from huggingface_hub import errors, snapshot_download  # comes with tokenizers

HERE = Path(__file__).resolve().parent.parent          # the project's root
NAMES = {
    "tiny": str(HERE / "tiny"),
    "tiny-rlpt": str(HERE / "tiny/rlpt"),
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "skywork-v2-1b": "Skywork/Skywork-Reward-V2-Llama-3.2-1B",
    "skywork-v2-3b": "Skywork/Skywork-Reward-V2-Llama-3.2-3B",
}
# What a model's directory may bring in a language of its own; its checkpoints carry them.
PROMPTS = tuple(f"prompts/{name}.txt" for name in (
    "challenger", "self_reward", "asr", "msr", "verdict", "verdict_strict"))
POINTER = "version https://git-lfs"


class InputError(Exception):
    """Wrong input; the message is one line that names the file, the flag or the name."""

    def __str__(self):
        """One line of at most some 1,000 characters; those that do not print are escaped."""
        text = super().__str__()
        text = text if len(text) <= 1000 else f"{text[:600]} ... {text[-400:]}"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check_regular(path: Path):
    """InputError for a pipe, a device or a folder. Files are read more than once."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: not a regular file")


def read_small(path: Path) -> str:
    """The text of a file that is small by its nature; a leading byte order mark is dropped."""
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        hint = f"; {path.parent} is no model or run folder" if path.suffix == ".json" else ""
        raise InputError(f"{path}: no such file{hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if text.startswith(POINTER):
        raise InputError(f"{path}: a git-lfs pointer, not the file: run git lfs pull there")
    return text


def read_json(path: Path) -> dict:
    """A JSON file's object;
    InputError names the file when it is missing, broken or not an object."""
    try:
        value = json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def find_model(name: str, *, weights: bool = True) -> Path:
    """The directory of a model: `name` itself if it is one, else a known name's or hub id's
    (owner/name), which is fetched from the hub or its local cache.

    Only configuration, tokenizer, prompts and *.safetensors are fetched. weights=False: only
    config.json, preset and prompts, which a memory budget needs, and nothing where
    plumbing/shapes/ has the name. InputError: the model is gated or unknown, or no network.
    """
    if not weights and name in NAMES and (HERE / "plumbing/shapes" / name).is_dir():
        return HERE / "plumbing/shapes" / name
    name = NAMES.get(name, name)
    if os.path.isdir(os.path.join(name, "checkpoint")):
        raise InputError(f"model {name}: a run's folder; its newest model is {name}/checkpoint")
    if os.path.isdir(name):
        return Path(name)
    unknown = InputError(f"model {name!r}: no such directory, none of {', '.join(NAMES)}, and no "
                         "repository owner/name of the hub (a private one needs: hf auth login)")
    if name.count("/") != 1:
        raise unknown
    try:
        # In these patterns * also matches a slash. Of the folders, only prompts/ is wanted.
        kinds = (["*.safetensors", "*.json", "*.jinja"] if weights
                 else ["config.json", "training.json"])
        return Path(snapshot_download(
            name, allow_patterns=[*kinds, *PROMPTS],
            ignore_patterns=["*/" + kind for kind in kinds]))
    except errors.GatedRepoError:
        raise InputError(f"model {name} is gated: accept its licence at https://huggingface.co/"
                         f"{name}, then run: hf auth login") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise unknown from None
    except OSError as error:                            # offline, the hub's HTTP errors
        raise InputError(f"model {name}: the hub could not be reached ({type(error).__name__}) and "
                         "no copy is in the local cache. Where there is a network run: hf download "
                         f"{name} --local-dir DIR, and give DIR in place of the name") from None


def read_prompt(path, places=()) -> str:
    """A prompt file's text, stripped; InputError if it is empty or lacks a {place}."""
    text = read_small(Path(path)).strip()
    if not text:
        raise InputError(f"{path}: nothing in it")
    for name in places:
        if f"{{{name}}}" not in text:
            raise InputError(f"{path}: no {{{name}}} in it, so the {name} would go unseen")
    return text


def prompt_file(model_path: Path, name: str) -> Path:
    """prompts/NAME.txt of the model's directory if it brings one, else of this project."""
    own = model_path / f"prompts/{name}.txt"
    return own if own.exists() else HERE / "prompts" / f"{name}.txt"


def preset_of(folder: Path) -> dict:
    """The object in a model's training.json; {} without that file."""
    file = folder / "training.json"
    return read_json(file) if file.exists() else {}


def pick_device(name: str = "auto", path: Path | None = None) -> tuple[torch.device, torch.dtype]:
    """The device of that name and the dtype to compute in there. auto: the first that is available
    of cuda, mps and cpu, or cpu if the training.json of the model at `path` says so.

    bfloat16 on CUDA, fp32 elsewhere. Most CPUs multiply bfloat16 several times slower than fp32.
    GPUs before Ampere (V100, T4, 20x0) have no units for it, and fp16 would overflow: its largest
    number is 65,504, and we do no loss scaling. So these compute in fp32: slower, but right.
    """
    available = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto" and path and preset_of(path).get("device") == "cpu":
        name = "cpu"                                                         # the embedded ones
    name = next(d for d in available if available[d]) if name == "auto" else name
    if not available[name]:
        raise InputError(f"--device {name}: PyTorch finds none here")
    if name == "cuda":
        # cuDNN's attention builds a plan for every new shape, and shapes change with every batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Models and batches differ in the sizes of their tensors: segments that can grow leave
        # fewer gaps. PyTorch reads this when CUDA starts. What the user has set stays.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:                  # its older name
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    rounded = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(name), torch.bfloat16 if rounded else torch.float32


def load_function(spec: str):
    """The function that FILE:FUNCTION names; InputError if there is none."""
    path, _, name = spec.rpartition(":")
    check_regular(Path(path))
    try:
        function = runpy.run_path(path).get(name)
    except Exception as error:                           # whatever the file itself does wrong
        raise InputError(f"{path}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise InputError(f"{path}: no function {name} in it")
    return function
