"""A cache as a safetensors file, with its sum: written whole, and checked before it is believed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from subquad.errors import fail
from subquad.files import check_path, check_regular, sync
from subquad.mixers.base import State

_FORMAT = "subquad-cache-1"
_MOST_LAYERS = 1 << 16  # of a file that says how many it has

COUNTS = ("lengths", "read")  # [B] each, of tokens
Counts = dict[str, Tensor | None]
Held = tuple[list[State | None], Counts, int]  # states by layer, counts, columns


def write_cache(path: Path, states: list[State | None], counts: Counts, columns: int) -> None:
    """Write it all, or leave what was there."""
    check_path("path", path)
    tensors = {
        f"{layer}.{name}": tensor.detach().clone()
        for layer, state in enumerate(states)
        for name, tensor in (state or {}).items()
    }
    tensors |= {name: count for name, count in counts.items() if count is not None}
    metadata = {"format": _FORMAT, "num_layers": str(len(states)), "columns": str(columns)}
    metadata["sha256"] = _digest(tensors, metadata)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        save_file(tensors, draft, metadata=metadata)
        sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_cache(path: Path) -> Held:
    """What `write_cache` wrote, on the CPU. ValueError for any other file."""
    check_path("path", path)
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise fail("path", f"{path}: {error}", "a safetensors file", "save it again") from error
    if metadata.get("format") != _FORMAT:
        raise fail(
            "path", f"format {metadata.get('format')!r}", repr(_FORMAT), "use SubquadCache.save"
        )
    try:
        return _checked(tensors, metadata)
    except (ValueError, KeyError) as error:
        got = f"{path}, which is damaged: {error}"
        raise fail("path", got, "what SubquadCache.save wrote", "save it again") from None


def _checked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Held:
    """ValueError or KeyError for what `write_cache` does not write."""
    written = metadata.pop("sha256", None)  # not in files of before there was one
    if written is not None and written != _digest(tensors, metadata):
        raise ValueError("its SHA-256 sum does not match")
    num_layers, columns = int(metadata["num_layers"]), int(metadata["columns"])
    if not (1 <= num_layers <= _MOST_LAYERS and columns >= 0):
        raise ValueError(f"it says {num_layers} layers and {columns} columns")
    counts: Counts = {name: tensors.pop(name, None) for name in COUNTS}
    lengths = counts["lengths"]
    for name, count in counts.items():
        if count is not None and not _is_count(count, lengths):
            raise ValueError(f"its {name} are no counts of tokens")
    states: list[State | None] = [None] * num_layers
    for name, tensor in tensors.items():
        layer, _, entry = name.partition(".")
        if not (layer.isdecimal() and int(layer) < num_layers and entry):
            raise ValueError(f"a tensor is called {name!r}")
        if lengths is None or tensor.shape[:1] != lengths.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}")
        states[int(layer)] = {**(states[int(layer)] or {}), entry: tensor}
    return states, counts, columns


def _is_count(tensor: Tensor, lengths: Tensor | None) -> bool:
    """Whether it holds numbers of tokens, one a sequence."""
    fits = lengths is not None and tensor.shape == lengths.shape and tensor.ndim == 1
    return fits and tensor.dtype == torch.int64 and not bool((tensor < 0).any())


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of everything: names, kinds, shapes and bytes."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
