"""What a reader may skip: bad input in one line, JSON and prompt files,
named models and the hub, devices."""
import json
import re
from pathlib import Path

import torch
from huggingface_hub import errors, snapshot_download  # comes with tokenizers

HERE = Path(__file__).resolve().parent
NAMES = {
    "tiny": str(HERE / "tiny"),
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "skywork-v2-1b": "Skywork/Skywork-Reward-V2-Llama-3.2-1B",
    "skywork-v2-3b": "Skywork/Skywork-Reward-V2-Llama-3.2-3B",
}


class InputError(Exception):
    """Something the user gave is wrong;
    the message is one line that names the file, the flag or the name."""


def read_json(path: Path) -> dict:
    """A JSON file's object;
    InputError names the file when it is missing, broken or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = ("no such file" if isinstance(error, FileNotFoundError)
                  else str(error).splitlines()[0])
        raise InputError(f"{path}: {reason}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def find_model(name: str) -> Path:
    """A directory as it is; a known name or a hub id (owner/name) fetched from the hub,
    or from its local cache.

    Only configuration, tokenizer and *.safetensors are fetched.
    InputError: gated, no network, unknown.
    """
    name = NAMES.get(name, name)
    if name and Path(name).is_dir():
        return Path(name)
    repo = name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        raise InputError(f"model {name!r}: no such directory, and not one of {', '.join(NAMES)} "
                         "or a hub id owner/name")
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.safetensors", "*.json", "*.jinja"],
                                      ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise InputError(f"model {repo} is gated: accept its licence at "
                         f"https://huggingface.co/{repo}, make a token "
                         "at https://huggingface.co/settings/tokens, "
                         "then run: hf auth login") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(f"model {repo}: no such directory, and the hub knows no such repository "
                         "(or it is private: hf auth login). "
                         f"Known names: {', '.join(NAMES)}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError,
            OSError) as error:
        raise InputError(f"model {repo}: the hub could not be reached ({type(error).__name__}) "
                         "and no copy lies in the local cache. Where there is a network run: "
                         f"hf download {repo} --local-dir DIR, and "
                         "give DIR in place of the name") from None


def read_prompt(path) -> str:
    """A prompt file's text, outer blanks removed."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def prompt_file(model_path: Path, name: str) -> Path:
    """prompts/NAME.txt of the model's directory, if it has a language of its own, or ours."""
    own = model_path / "prompts" / f"{name}.txt"
    return own if own.exists() else HERE / "prompts" / f"{name}.txt"


def pick_device(name: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device of that name (auto: cuda, then mps, then cpu) and the dtype to compute in there.

    bfloat16 on CUDA; fp32 elsewhere: most CPUs multiply bfloat16 several times slower than fp32.
    """
    available = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in available if available[d]) if name == "auto" else name
    if not available[name]:
        raise InputError(f"--device {name}: PyTorch finds none here")
    return torch.device(name), torch.bfloat16 if name == "cuda" else torch.float32
