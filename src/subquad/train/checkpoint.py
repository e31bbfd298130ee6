"""Checkpoints that are either whole and proven, or absent.

    root/step-00000100/          whatever the caller's `write` put there, and
        SHA256SUMS               the sum of every file

A checkpoint is written to a hidden folder beside its place, forced to the disk, and renamed: at any
moment, and after a kill or a power cut, a folder called `step-...` is complete. What happens to it
later (a flipped bit loads silently in every tool) is what the sums are for. Only the run's own
process may write to `root`; `subquad.train.run` holds the lock.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from subquad.files import Damaged, check_sums, remove, sync, sync_tree, write_sums

_HIDDEN = ".unfinished-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is not what was written."""


def path_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(root: Path) -> list[Path]:
    """Every checkpoint in `root`, oldest first, unverified."""
    found = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def save(root: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Let `write(folder)` fill a folder, make it checkpoint `step`, drop all but the newest `keep`.

    Raises CheckpointError, leaving every earlier checkpoint as it was, when the disk refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, hidden = path_of(root, step), root / f"{_HIDDEN}{step}"
    try:
        _remove(hidden)
        hidden.mkdir()
        write(hidden)
        write_sums(hidden)
        sync_tree(hidden)
        _remove(final)  # the same step again, after falling back to an older checkpoint
        hidden.rename(final)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        kept = checkpoints(root)
        last = f"the newest checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot write checkpoint {final}: {error}; {last}") from error
    for old in checkpoints(root)[:-keep]:
        _remove(old)
    return final


def verify(checkpoint: Path) -> None:
    """Raise CheckpointError, naming the file, unless every byte is as it was written."""
    try:
        check_sums(checkpoint, exactly=True)
    except (Damaged, OSError) as error:
        raise CheckpointError(str(error)) from None


def newest_good(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; None if there has never been one.

    A damaged one is reported through `say` and set aside as `damaged-step-...`, so that the run can
    write its step again. Raises CheckpointError if there are checkpoints and none is good.
    """
    damaged = []
    for checkpoint in reversed(checkpoints(root)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            damaged.append(checkpoint)
            say(f"{error}; trying the one before it")
            continue
        for bad in damaged:
            aside = bad.with_name(f"damaged-{bad.name}")
            _remove(aside)
            bad.rename(aside)
        return checkpoint
    if damaged:
        raise CheckpointError(f"none of the {len(damaged)} checkpoints in {root} is undamaged")
    return None


def clean(root: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    for leftover in root.glob(f"{_HIDDEN}*"):
        remove(leftover)


def _remove(path: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing that looks like a checkpoint."""
    if os.path.lexists(path):
        doomed = path.with_name(f"{_HIDDEN}removed-{path.name}")
        remove(doomed)
        path.rename(doomed)
        remove(doomed)
