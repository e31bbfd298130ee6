"""From a config to a model on a device, with random weights or those of another."""

import json
from pathlib import Path
from typing import Any

import torch

from subquad.errors import fail
from subquad.files import read_json
from subquad.models import ByteTokenizer, SubquadConfig, SubquadForCausalLM
from subquad.models.folder import model_folders
from subquad.train.config import TrainConfig

_MOST_TOKENIZER = 1 << 30  # bytes of a tokenizer.json


def build_model(config: TrainConfig, tokenizer: Any) -> Any:
    """A SubquadForCausalLM with random weights; its vocabulary is the tokenizer's unless given."""
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    keywords = {"vocab_size": len(tokenizer), **special, **config.model_keywords}
    if keywords["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"model: vocab_size is {keywords['vocab_size']}, but the tokenizer has "
            f"{len(tokenizer)} ids"
        )
    return SubquadForCausalLM(SubquadConfig.from_dict(keywords))


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else None


def model_at(path: str | Path) -> tuple[SubquadConfig, str | None]:
    """The config of the newest model at `path`, and its tokenizer as TrainConfig names it.

    Raises ValueError if there is none.
    """
    folder = model_folders(Path(path))[0]
    config = SubquadConfig.from_pretrained(folder)
    own_tokenizer = (folder / "tokenizer.json").exists() and not _is_bytes(folder)
    return config, str(folder) if own_tokenizer else None


def check_tokenizer(tokenizer: str | None, own: str | None, path: str | Path) -> None:
    """ValueError if another tokenizer is asked for than the model at `path` was trained with."""
    if tokenizer is None or tokenizer == own:
        return
    if own is None or _vocabulary(Path(tokenizer)) != _vocabulary(Path(own)):
        expected = f"that of {path}: {own or 'bytes'}"
        raise fail("tokenizer", repr(tokenizer), expected, "leave the tokenizer out")


def load_weights(model: SubquadForCausalLM, path: str | Path) -> None:
    """Give `model` the weights at `path`. ValueError if they are another model's, or damaged."""
    folder = model_folders(Path(path))[0]
    held = SubquadForCausalLM.from_pretrained(folder, local_files_only=True, config=model.config)
    model.load_state_dict(held.state_dict())


def _is_bytes(folder: Path) -> bool:
    """Whether the folder's tokenizer does what ours for bytes does."""
    return bool(
        _vocabulary(folder) == json.loads(ByteTokenizer().backend_tokenizer.to_str())["model"]
    )


def _vocabulary(path: Path) -> Any:
    file = path / "tokenizer.json" if path.is_dir() else path
    return read_json(file, most=_MOST_TOKENIZER).get("model")
