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

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from subquad.arena.folder import describe_machine
from subquad.arena.scaling.results import Point, RowScaling, ScalingConfig
from subquad.mixers import MIXERS, Mixer
from subquad.models.device import pick_device
from subquad.table import ROWS


def run_scaling(
    config: ScalingConfig,
    on_event: Callable[[str], None] = lambda text: None,
    on_row: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure every row; returns what goes to JSON.

    `on_event` is called with what is being measured, `on_row` with the record after every row, so
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
