"""Files that are whole or absent, and known by their sums.

What is written goes beside its place, is forced to the disk, and is renamed. A folder's SHA-256
sums stand in its SHA256SUMS, in the format of coreutils: `sha256sum -c SHA256SUMS` checks it too.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from subquad.errors import fail

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SUMS = "SHA256SUMS"
_WINDOWS = os.name == "nt"
_MOST_JSON = 1 << 24  # bytes of a JSON file that is a description, not data
_MOST_NAMES = 1 << 20  # bytes of a list of sums


class Damaged(ValueError):
    """A file is not what was written, or cannot be read."""


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


def read_json(path: Path, most: int = _MOST_JSON) -> dict[str, Any]:
    """The object in a JSON file. Damaged if there is none, or more than `most` bytes."""
    check_regular(path)
    if path.stat().st_size > most:
        raise Damaged(f"{path} is damaged: it has more than {most:,} bytes")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict):
        raise Damaged(f"{path} is damaged: it holds no JSON object")
    return record


def check_regular(path: Path) -> None:
    """FileNotFoundError if there is nothing; Damaged for a folder, a pipe, a device, a dead link.

    Reading a pipe would wait for somebody to write to it, and /dev/zero never ends.
    """
    if not path.is_file():
        if not os.path.lexists(path):
            raise FileNotFoundError(f"{path} does not exist")
        raise Damaged(f"{path} is no regular file")


def check_path(argument: str, path: Path) -> None:
    """ValueError for a path that is not UTF-8, in which safetensors writes no file."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise fail(argument, ascii(str(path)), "a path in UTF-8", "give another name") from None


def remove(path: Path) -> None:
    """Remove a folder and all that is in it, a file, a link, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Force a flat folder, its files and the names in it, to the disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file or a directory (of a directory: the names in it)."""
    if _WINDOWS and path.is_dir():
        return  # Windows opens no directory, and keeps names in its journal
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(file: Path) -> int:
    """Lock `file`, made if need be, until the descriptor is closed or the process ends, however it
    ends. OSError if another has it."""
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# ---- sums


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of every file in a flat folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != SUMS)
    lines = [f"{_sum(file)}  {file.name}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def check_sums(folder: Path, *, exactly: bool = False) -> None:
    """Damaged, naming the file, unless all that SHA256SUMS lists is there as it was written.

    exactly: neither may there be a file that it does not list.
    """
    listed = _read_sums(folder)
    if exactly:
        present = {path.name for path in folder.iterdir()} - {SUMS}
        if stray := sorted(present - set(listed)):
            raise Damaged(f"{folder} is damaged: {stray} missing from its {SUMS}")
    for name, expected in listed.items():
        try:
            check_regular(folder / name)
            found = _sum(folder / name)
        except OSError as error:
            raise Damaged(f"{folder / name} is damaged: {error}") from None
        if found != expected:
            raise Damaged(f"{folder / name} is damaged: its SHA-256 sum does not match")


def _read_sums(folder: Path) -> dict[str, str]:
    """Sums by the names of files."""
    path = folder / SUMS
    try:
        check_regular(path)
        if path.stat().st_size > _MOST_NAMES:
            raise ValueError(f"it has more than {_MOST_NAMES:,} bytes")
        listed = {}
        *lines, last = path.read_bytes().decode().split("\n")
        if not lines or last:
            raise ValueError("it is cut off")
        for line in lines:
            digest, name = line[:64], line[66:]
            if line[64:66] != "  " or Path(name).name != name:
                raise ValueError(f"{line[:100]!r} is no sum and name of a file")
            listed[name] = digest
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    return listed


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
