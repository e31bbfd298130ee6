"""Real text from this machine as named documents, split into train and held-out without leaks."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from subquad.files import read_json

HELD_OUT_SHARE = 20  # one document (or byte) in twenty is never trained on
_LONGEST_LINE = 1 << 26  # bytes of one document in a .jsonl file
FEW_DOCUMENTS = 200  # below this, a split by document is too uneven: hold out the end of the text


class Document(NamedTuple):
    name: str
    text: bytes


def read_documents(source: str) -> list[Document]:
    """The source's non-empty documents, in an order that depends on their names alone."""
    expected = "`stdlib`, a text file, a .jsonl file or a folder"
    if source == "stdlib":
        documents = _stdlib()
    elif not source or not Path(source).exists():
        raise ValueError(f"data: {source!r} does not exist; expected {expected}")
    elif not (Path(source).is_dir() or Path(source).is_file()):  # a pipe or a device has no end
        raise ValueError(f"data: {source!r} is no regular file; expected {expected}")
    elif Path(source).is_dir():
        documents = _folder(Path(source))
    else:
        documents = _file(Path(source), Path(source).name)
    found = [document for document in documents if document.text]
    if not found:
        raise ValueError(f"data: {source!r} holds no text")
    return found


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held-out): by a hash of each document's name, or the last twentieth of a short list.

    The hash keeps a document on its side when others come and go. With few documents the cut goes
    through the text, at a line's end where there is one.
    """
    if len(documents) >= FEW_DOCUMENTS:
        sides: tuple[list[Document], list[Document]] = ([], [])
        for document in documents:
            sides[_hash(document.name) % HELD_OUT_SHARE == 0].append(document)
        if all(sides):
            return sides
    return _split_at(
        documents, sum(len(d.text) for d in documents) * (HELD_OUT_SHARE - 1) // HELD_OUT_SHARE
    )


def _split_at(documents: list[Document], position: int) -> tuple[list[Document], list[Document]]:
    for i, (name, text) in enumerate(documents):
        if position < len(text):
            line_end = text.rfind(b"\n", 0, position) + 1
            cut = line_end if line_end > position // 2 else position
            before, after = Document(name, text[:cut]), Document(f"{name} (end)", text[cut:])
            return [*documents[:i], before], [after, *documents[i + 1 :]]
        position -= len(text)
    raise AssertionError("position lies beyond the text")


def _stdlib() -> Iterator[Document]:
    """Every different .py file of this Python's own library, installed packages excluded."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if {"site-packages", "dist-packages"} & set(name.parts):
            continue
        text = path.read_bytes()
        # The library repeats some files (test data above all); a copy must not cross the split.
        if (digest := hashlib.sha256(text).digest()) not in seen:
            seen.add(digest)
            yield Document(name.as_posix(), text)


def _folder(root: Path) -> Iterator[Document]:
    """Every file but hidden ones, and but what training and the arena write: a run that is made
    inside the folder it learns from would find itself there when it is resumed."""
    found: list[Path] = []
    for place, folders, files in os.walk(root):
        here = Path(place)
        folders[:] = [f for f in folders if f[0] != "." and not _is_ours(here / f)]
        found += [here / name for name in files if name[0] != "."]
    for path in sorted(found):
        if path.is_file():
            yield from _file(path, path.relative_to(root).as_posix())


def _is_ours(folder: Path) -> bool:
    """Whether this is a run's directory or an arena's."""
    if (folder / ".lock").exists() and (folder / "config.json").exists():
        return True
    try:
        return {"config", "environment"} <= set(read_json(folder / "plan.json"))
    except (OSError, ValueError):
        return False


def _file(path: Path, name: str) -> Iterator[Document]:
    if path.suffix != ".jsonl":
        yield Document(name, path.read_bytes())
        return
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE:
                at_most = f"{_LONGEST_LINE >> 20} MiB"
                raise ValueError(f"data: {path}, line {number} is longer than {at_most}; split it")
            if line.strip():
                yield Document(f"{name}:{number}", _json_text(line, f"{path}, line {number}"))


def _json_text(line: bytes, where: str) -> bytes:
    try:
        text: str = json.loads(line)["text"]
        return text.encode("utf-8", "surrogatepass")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f'data: {where} is not a JSON object with a string "text"') from None


def _hash(name: str) -> int:
    return int.from_bytes(
        hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big"
    )
