"""Measured exponents: how time and memory of one layer grow with T and with d.

For every row: training (forward and backward over T tokens), and decoding (one token behind T).
Time is the median over repeats. Memory of training is what the forward pass keeps for the backward
pass, each storage once: the same on every machine, and what limits T; on a GPU the peak of both
passes besides. Memory of decoding is the state.

A quantity q is fitted as q = c x^p: the slope of a least-squares line through (log x, log q), with
its standard error. The exponents are of the range measured; fixed costs make them smaller, and the
projections around the engine (d^2 a token) are part of the layer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.arena.entrants import check_rows
from subquad.arena.folder import describe_machine
from subquad.arena.results import write_atomically, write_json
from subquad.mixers import MIXERS, Mixer
from subquad.models.device import pick_device
from subquad.recurrence import ROWS
from subquad.recurrence.validate import choose, fail
from subquad.tasks.base import check_count, check_number

QUANTITIES = ("train seconds", "train bytes", "decode seconds", "decode bytes")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The question.

    rows:      None measures every row that runs.
    tokens:    T, at the width `width`; at least three and rising.
    widths:    d, at `length` tokens.
    seconds:   a point that takes longer than this ends its series: the next would take longer.
               So does one that a GPU has no room for.
    repeats:   timings of a point; the median counts.
    """

    rows: tuple[str, ...] | None = None
    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    width: int = 256
    length: int = 512
    seconds: float = 4.0
    repeats: int = 3
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_rows(self.rows)
            for row in self.rows:
                choose("rows", row, tuple(MIXERS))
        for name in ("tokens", "widths"):
            given = getattr(self, name)
            values = tuple(given) if isinstance(given, list | tuple) else (given,)
            object.__setattr__(self, name, values)
            for value in values:
                check_count(name, value)
            if len(values) < 3 or list(values) != sorted(set(values)):
                expected = "three numbers or more, rising: a slope needs points"
                raise fail(name, list(values), expected, "--set tokens=[512,1024,2048]")
        for name in ("width", "length", "repeats"):
            check_count(name, getattr(self, name))
        check_number("seconds", self.seconds, most=math.inf)


@dataclass(frozen=True)
class Point:
    """One layer at one size. Seconds and bytes; `peak_bytes` on a GPU only."""

    tokens: int
    width: int
    train_seconds: float
    train_bytes: int
    decode_seconds: float
    decode_bytes: int
    peak_bytes: int | None = None

    def value(self, quantity: str) -> float:
        return float(getattr(self, quantity.replace(" ", "_")))


@dataclass(frozen=True)
class Exponent:
    """p of q = c x^p and its standard error, over the points from `low` to `high`."""

    value: float
    error: float
    low: int
    high: int


@dataclass(frozen=True)
class RowScaling:
    """A row's points, and its exponents by quantity: in T, and in d."""

    row: str
    in_tokens: list[Point]
    in_width: list[Point]

    def exponents(self, variable: str) -> dict[str, Exponent | None]:
        """By quantity; None where there are fewer than three points. variable: "T" or "d"."""
        points = self.in_tokens if variable == "T" else self.in_width
        x = [p.tokens if variable == "T" else p.width for p in points]
        return {q: fit_exponent(x, [p.value(q) for p in points]) for q in QUANTITIES}

    def to_json(self) -> dict[str, Any]:
        fits = {
            variable: {q: e and asdict(e) for q, e in self.exponents(variable).items()}
            for variable in ("T", "d")
        }
        claims = {"train": ROWS[self.row].train, "decode": ROWS[self.row].decode}
        return {"claimed": claims, "exponents": fits} | asdict(self)


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> Exponent | None:
    """The least-squares slope of log y over log x; None with fewer than three points."""
    if len(x) < 3:
        return None
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    slope, intercept = statistics.linear_regression(log_x, log_y)
    residual = sum((v - slope * u - intercept) ** 2 for u, v in zip(log_x, log_y))
    spread = sum((u - statistics.fmean(log_x)) ** 2 for u in log_x)
    error = math.sqrt(residual / (len(x) - 2) / spread)
    return Exponent(slope, error, int(x[0]), int(x[-1]))


def run_scaling(
    config: ScalingConfig,
    on_event: Callable[[str], None] = lambda text: None,
    on_row: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure every row; returns what goes to JSON.

    `on_event` is told what is being measured; `on_row` is given the record after every row, so
    that what is measured can be kept before all is.
    """
    rows = config.rows or tuple(name for name in ROWS if name in MIXERS)
    record: dict[str, Any] = {
        "environment": describe_machine(config.device),
        "config": asdict(config),
        "rows": [],
    }
    for row in rows:
        record["rows"].append(measure_row(row, config, on_event).to_json())
        on_row(record)
    return record


def scaling_from_json(record: dict[str, Any]) -> list[RowScaling]:
    """The rows of `run_scaling`'s record."""
    return [
        RowScaling(
            row["row"],
            [Point(**p) for p in row["in_tokens"]],
            [Point(**p) for p in row["in_width"]],
        )
        for row in record["rows"]
    ]


def measure_row(
    row: str, config: ScalingConfig, on_event: Callable[[str], None] = lambda text: None
) -> RowScaling:
    """Both series of one row."""
    series: dict[str, list[Point]] = {"T": [], "d": []}
    sizes = {
        "T": [(tokens, config.width) for tokens in config.tokens],
        "d": [(config.length, width) for width in config.widths],
    }
    for variable, wanted in sizes.items():
        for tokens, width in wanted:
            on_event(f"{row}: T = {tokens}, d = {width}")
            try:
                point = measure_point(row, tokens, width, config)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            series[variable].append(point)
            if point.train_seconds > config.seconds:
                break
    return RowScaling(row, series["T"], series["d"])


def measure_point(row: str, tokens: int, width: int, config: ScalingConfig) -> Point:
    """One layer of `row` over one sequence of `tokens`, `width` wide."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    layer = MIXERS[row](width).to(device)  # with its published options
    x = torch.randn(1, tokens, width, device=device)
    one = torch.randn(1, 1, width, device=device)
    train_bytes = kept_for_backward(layer, x)
    peak = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _train(layer, x)
        peak = torch.cuda.max_memory_allocated(device)
    train_seconds = _median_seconds(lambda: _train(layer, x), config.repeats, device)
    with torch.inference_mode():
        _, state = layer.eval()(x)
        decode_seconds = _median_seconds(lambda: layer(one, state), 4 * config.repeats, device)
    decode_bytes = sum(tensor.nbytes for tensor in state.values())
    return Point(tokens, width, train_seconds, train_bytes, decode_seconds, decode_bytes, peak)


def kept_for_backward(layer: Mixer, x: Tensor) -> int:
    """Bytes of the storages that the forward pass saves for the backward pass, parameters not
    counted."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    # The storages are held on to, or a freed address could be counted for another's.
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        # A node that kept its own output with its history would keep itself, for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.train()(x.requires_grad_(True))
    return sum(storage.nbytes() for storage in kept.values())


def _train(layer: Mixer, x: Tensor) -> None:
    y, _ = layer(x)
    torch.autograd.backward(y.float().square().mean())
    layer.zero_grad(set_to_none=True)
    x.grad = None


def _median_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    call()  # compiling and first allocations
    seconds = []
    for _ in range(repeats):
        begin = _now(device)
        call()
        seconds.append(_now(device) - begin)
    return statistics.median(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def write_scaling(record: dict[str, Any], folder: Path) -> Path:
    """scaling.json and report.html in `folder`; returns the page's path."""
    from subquad.arena.scaling_report import render_scaling

    write_json(folder / "scaling.json", record)
    page = folder / "report.html"
    write_atomically(page, render_scaling(record))
    return page
