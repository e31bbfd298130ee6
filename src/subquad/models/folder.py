"""Model folders: saved whole with their sums, found under a path, and checked before they are read.

A folder may come from anywhere. Before transformers sees it: its sums hold, if it has any; its
config is one of ours and of a bounded size; its weights are safetensors that lie in it, and they
are the tensors that the config asks for, of the right shapes. What is missing would otherwise be
drawn at random, without an error.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from subquad.errors import fail
from subquad.files import (
    SUMS,
    Damaged,
    check_regular,
    check_sums,
    read_json,
    sync,
    sync_tree,
    write_sums,
)

MODEL_TYPE = "subquad"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_FLOATS = {"F64", "F32", "F16", "BF16"}

_log = logging.getLogger(__name__)
Shapes = dict[str, tuple[int, ...]]


# ---- saving


def save_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write(scratch)` fill a folder, add its sums, and put it, or its files, at `folder`.

    Where `folder` exists its other files stay. A kill before the last of ours has replaced its
    forerunner leaves sums that do not hold, so nobody takes the mixture for a model.
    """
    folder = folder.absolute()  # "." has no name
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        write(scratch)
        write_sums(scratch)
        sync_tree(scratch)
        if folder.exists():
            _replace_files(folder, scratch)
        else:
            scratch.rename(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace_files(folder: Path, scratch: Path) -> None:
    new = {path.name for path in scratch.iterdir()}
    for old in _weight_files(folder):
        if old.name not in new:  # shards of another number would be read instead
            old.unlink()
    for name in sorted(new - {SUMS}):
        os.replace(scratch / name, folder / name)
    os.replace(scratch / SUMS, folder / SUMS)
    sync(folder)


def _weight_files(folder: Path) -> list[Path]:
    return [*folder.glob("model*.safetensors"), *folder.glob(_INDEX)]


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """An ordinary Hugging Face folder, without sums and without transformers' progress bar."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        PreTrainedModel.save_pretrained(model, folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


# ---- finding


def model_folders(path: Path) -> list[Path]:
    """Where under `path` models lie: itself, or of a run its model and its checkpoints, the newest
    first. ValueError, naming the models inside, if `path` is an arena's folder; or if none is."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a run directory or a model folder")
    if _holds_model(path):
        return [path]
    if found := list(_of_run(path)):
        return found
    inside = sorted(p for p in (*path.glob("*"), *path.glob("*/*")) if any(_of_run(p)))
    if inside:
        names = ", ".join(str(p.relative_to(path)) for p in inside)
        got, fix = f"{path}, which holds no model itself", f"give one of them, such as {inside[0]}"
        raise fail("path", got, f"a model inside: {names}", fix)
    raise ValueError(f"{path} holds no model yet; expected a run directory or a model folder")


def _of_run(path: Path) -> Iterator[Path]:
    # Checkpoint names carry the step with leading zeros, so that they sort by age.
    checkpoints = sorted(path.glob("checkpoints/step-*"), reverse=True)
    return (folder for folder in (path / "model", *checkpoints) if _holds_model(folder))


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors*"))


def model_type(folder: Path) -> object:
    """What family the folder's config says it is of."""
    return read_json(folder / "config.json").get("model_type")


# ---- checking


def check_model(folder: Path, cls: type[PreTrainedModel], config: object = None) -> None:
    """Raise unless `cls.from_pretrained(folder)` would load every tensor as it was saved.

    Args:
        config: instead of the folder's own.

    Raises:
        Damaged, a ValueError: naming the file or the tensor.
        ValueError: the model is of another family.
    """
    for file in folder.glob("*.json"):
        check_regular(file)
    written = read_json(folder / "config.json")
    if written.get("model_type") != MODEL_TYPE:
        got = f"{folder}, a model of type {written.get('model_type')!r}"
        fix = "load it with transformers' AutoModelForCausalLM"
        raise fail("path", got, f"a model of type {MODEL_TYPE!r}", fix)
    if written.get("transformers_weights"):  # of which transformers would read instead
        raise Damaged(
            f"{folder} is damaged: its config has transformers_weights, another file's name"
        )
    if (folder / SUMS).exists():
        try:
            check_sums(folder)
        except Damaged as error:
            raise Damaged(
                f"{error}; if it was changed on purpose, delete {folder / SUMS}"
            ) from None
    else:
        _log.warning("note: %s has no %s, so a damaged file would go unnoticed", folder, SUMS)
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    if written.get("quantization_config"):  # whose tensors are the quantiser's affair
        return
    held = _held_shapes(folder)
    layers = {match[1] for match in map(_LAYER.match, held) if match}
    if config is None and written.get("num_hidden_layers") != len(layers):
        got = f"{len(layers)} layers, where its config says {written.get('num_hidden_layers')!r}"
        raise Damaged(f"{folder} is damaged: its weights have {got}")
    if not isinstance(config, PreTrainedConfig):
        config = cls.config_class.from_pretrained(folder if config is None else config)  # type: ignore[union-attr, arg-type]
    _compare(folder, _wanted_shapes(cls, config), held)


def _held_shapes(folder: Path) -> Shapes:
    """Every tensor in the folder's weights."""
    shapes: Shapes = {}
    for file in _weights(folder):
        try:
            check_regular(file)
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensor = tensors.get_slice(name)
                    if tensor.get_dtype() not in _FLOATS:
                        raise Damaged(f"{file} is damaged: {name} is {tensor.get_dtype()}")
                    shapes[name] = tuple(tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{file} is damaged: {error}") from None
    return shapes


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of the folder: the one, or those of its index."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        got = f"{folder}, which holds {pickles or 'no weights'}"
        raise fail("path", got, f"{_WEIGHTS}; pickles are never loaded", "save it as safetensors")
    names = read_json(folder / _INDEX, most=1 << 28).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise Damaged(f"{folder / _INDEX} is damaged: it has no weight_map")
    files = set(names.values())
    for name in files:
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            raise Damaged(f"{folder / _INDEX} is damaged: {name!r} is no name of a file beside it")
    return [folder / name for name in sorted(files)]


def _wanted_shapes(cls: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    """The tensors of the stack and, where it is not the embedding, of the read-out."""
    with torch.device("meta"):
        model = cls(config)
    tied = getattr(config, "tie_word_embeddings", True)
    stack = f"{cls.base_model_prefix}." if hasattr(model, cls.base_model_prefix) else ""
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith(stack) or (name == "lm_head.weight" and not tied)
    }


def _compare(folder: Path, wanted: Shapes, held: Shapes) -> None:
    """Names count without the prefix that the stack has in a language model."""
    there = {name.removeprefix("model."): shape for name, shape in held.items()}
    for name, shape in wanted.items():
        found = there.get(name.removeprefix("model."))
        if found is None:
            raise Damaged(f"{folder} is damaged: the tensor {name} is missing from its weights")
        if found != shape:
            expected = f"where its config asks for {list(shape)}"
            raise Damaged(f"{folder} is damaged: {name} has shape {list(found)}, {expected}")
