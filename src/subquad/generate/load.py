"""From a path to a model ready to speak: a run directory, one of its checkpoints, or a folder."""

from pathlib import Path
from typing import Any

import torch

from subquad.models.device import pick_device  # subquad.models registers its Auto classes


def load(path: str | Path, *, device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a run directory or a Hugging Face model folder, in evaluation mode.

    A run that is not finished gives its newest checkpoint. Raises ValueError if there is no model
    at `path` or no `device`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = pick_device(device)
    folder = model_folder(Path(path))
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from None
    return model.to(place).eval(), tokenizer


def model_folder(path: Path) -> Path:
    """Where under `path` the newest model lies, recognised by the weights in it."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a run directory or a model folder")
    # Checkpoint names carry the step with leading zeros, so that they sort by age.
    checkpoints = sorted(path.glob("checkpoints/step-*"), reverse=True)
    for folder in (path, path / "model", *checkpoints):
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors*")):
            return folder
    raise ValueError(f"{path} holds no model yet; expected a run directory or a model folder")
