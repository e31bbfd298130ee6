"""Files that are whole or absent: written beside their place, forced to the disk, then renamed."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write all of `text` to `path`, or leave what was there: nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        sync(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, record: Any) -> None:
    """`write_atomically` of JSON. ValueError for NaN and infinity, which JSON does not have."""
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def sync_tree(folder: Path) -> None:
    """Force a flat folder, its files and the names in it, to the disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file or a directory (of a directory: the names in it)."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows opens no directory, and keeps names in its journal
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
