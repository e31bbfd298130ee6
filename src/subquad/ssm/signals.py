"""Signals to remember: three that are made, or any file of numbers."""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from subquad.errors import fail, is_whole

MADE = ("waves", "steps", "noise")
SUFFIXES = (".csv", ".txt", ".dat", ".npy")


def make(name: str, T: int, seed: int = 0) -> Tensor:
    """[T] float64, mean 0 and variance 1.

    "waves": ten sinusoids of up to 15 periods. "steps": twelve levels, which no polynomial follows
    at the jumps. "noise": what no memory smaller than itself can hold.
    """
    if not is_whole(T, 2):
        raise fail("length", repr(T), "at least 2 samples", "--length 1000")
    generator = torch.Generator().manual_seed(seed)
    if name == "noise":
        f = torch.randn(T, generator=generator, dtype=torch.float64)
    elif name == "steps":
        levels = torch.randn(12, generator=generator, dtype=torch.float64)
        f = levels[torch.arange(T) * 12 // T]
    else:
        t = torch.arange(T, dtype=torch.float64) / T
        draws = torch.rand(3, 10, 1, generator=generator, dtype=torch.float64)
        amplitude, frequency, phase = draws
        f = (amplitude * torch.sin(2 * math.pi * (15 * frequency * t + phase))).sum(0)
    return (f - f.mean()) / f.std()


def read(path: Path, column: str | None = None) -> Tensor:
    """One column of a .csv, .txt or .dat file, or a .npy array: [T] float64.

    Args:
        column: its name in the first line, or its number from 1; needed where several are numbers.

    Raises:
        ValueError: for what is no signal: other kinds of files, text, gaps, an empty column.
        OSError: if the file cannot be read.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise fail(
            "signal",
            repr(str(path)),
            f"one of {', '.join(MADE)}, or a file ending in {', '.join(SUFFIXES)}",
            "save it as text, one sample a line",
        )
    names, table = _array(path) if path.suffix.lower() == ".npy" else _text(path)
    values = table[:, _column(names, column, table)]
    bad = np.flatnonzero(~np.isfinite(values))
    if len(values) < 2 or len(bad):
        got = (
            f"sample {bad[0] + 1} that is no finite number"
            if len(bad)
            else f"{len(values)} samples"
        )
        raise fail("signal", got, "at least 2 finite samples", "fill the gaps, or cut them out")
    return torch.from_numpy(np.ascontiguousarray(values))


def _array(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        array = np.load(path, allow_pickle=False)
        table = np.asarray(array.real, dtype=np.float64)
    except (ValueError, TypeError, EOFError):
        fix = "numpy.save of such an array; objects (pickles) are never loaded"
        raise fail("signal", f"{path} without one", "an array of real numbers", fix) from None
    if table.ndim not in (1, 2) or 0 in table.shape or np.iscomplexobj(array):
        got = f"an array of shape {table.shape}, {array.dtype}"
        raise fail("signal", got, "[T] or [T,columns] real", "save one signal")
    table = table[:, None] if table.ndim == 1 else table
    return [str(n + 1) for n in range(table.shape[1])], table


def _text(path: Path) -> tuple[list[str], np.ndarray]:
    """Separated by commas, semicolons, tabs or blanks; maybe with names in the first line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise fail(
            "signal", f"{path}, which is not text", "numbers as text", "see --help"
        ) from None
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise fail("signal", f"{path}, which is empty", "one sample a line", "see --help")
    mark = next((mark for mark in ",;\t" if mark in lines[0]), None)
    rows = list(csv.reader(lines, delimiter=mark)) if mark else [line.split() for line in lines]
    first = [_number(cell) for cell in rows[0]]
    named = all(value is None for value in first)
    names = [cell.strip() for cell in rows[0]] if named else [str(n + 1) for n in range(len(first))]
    rows = rows[1:] if named else rows
    short = [k for k, row in enumerate(rows) if len(row) != len(names)]
    if short or not rows:
        got = f"row {short[0] + 1} with {len(rows[short[0]])} columns" if short else "no rows"
        raise fail("signal", got, f"{len(names)} columns in every row", "look for stray separators")
    table = [[_number(cell) for cell in row] for row in rows]
    return names, np.array([[math.nan if x is None else x for x in row] for row in table])


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _column(names: list[str], column: str | None, table: np.ndarray) -> int:
    if column in names:
        return names.index(column)
    if column is not None and column.isdigit() and 1 <= int(column) <= len(names):
        return int(column) - 1
    numbers = [n for n in range(len(names)) if np.isfinite(table[:, n]).all()]
    if column is None and (len(names) == 1 or len(numbers) == 1):
        return numbers[0] if numbers else 0
    got = "none" if column is None else repr(column)
    raise fail("column", got, f"one of {', '.join(names)}", f"--column {names[-1]}")
