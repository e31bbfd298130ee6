"""From a path to a model ready to generate: a run directory, one of its checkpoints, a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from subquad.files import Damaged
from subquad.models import SubquadForCausalLM
from subquad.models.device import pick_device
from subquad.models.folder import MODEL_TYPE, model_folders, model_type


def load(
    path: str | Path, *, device: str = "auto", say: Callable[[str], None] = lambda text: None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a run directory or a Hugging Face model folder, in evaluation mode.

    Of a run, the newest that is whole: its final model or a checkpoint. `say` is given a line for
    each that is damaged. Raises ValueError if there is no model at `path` or no `device`.
    """
    place = pick_device(device)
    *others, last = model_folders(Path(path))
    for folder in others:
        try:
            return _load(folder, place)
        except Damaged as error:
            say(f"{error}; trying the one before it")
    return _load(last, place)


def _load(folder: Path, place: torch.device) -> tuple[Any, Any]:
    family = model_type(folder)
    if family == MODEL_TYPE:
        model: torch.nn.Module = SubquadForCausalLM.from_pretrained(folder, local_files_only=True)
    else:
        model = _load_other(folder, family)
    return model.to(place).eval(), load_tokenizer(folder)


def _load_other(folder: Path, family: object) -> torch.nn.Module:
    """A model of another family, where transformers itself has it: never by code of the folder."""
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        what = f"a model of type {family!r}, which subquad does not load"
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds {what}; transformers says: {reason}") from error
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder. Damaged if it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain ones
        reason = " ".join(str(error).split())[:200]
        raise Damaged(f"{folder} holds no tokenizer that can be read: {reason}") from error
