"""Give every row the same number of parameters: choose depth, hidden size and MLP width."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from subquad.arena.records import Shape
from subquad.errors import choose
from subquad.mixers import MIXERS
from subquad.models import SubquadConfig, SubquadForCausalLM

TOLERANCE = 0.02
# Where the depth is given, only the width is left to choose, in steps that heads divide.
GIVEN_DEPTH_TOLERANCE = 0.05
# Hidden size per layer of the usual proportions. Small models are best somewhat deeper, but on a
# few CPU cores a layer this small costs more in calls than in arithmetic.
_ASPECT = 40
_MLP_RATIO = 8 / 3  # a gated MLP of this width has the parameters of a plain one of width 4
_MLP_STEP = 8
# Even hidden sizes are tried where no multiple of 16 has good proportions: rows without an MLP
# have no width to make up the difference.
_HIDDEN_STEPS = (16, 2)
_GOOD = 0.8  # distance from the usual proportions below which no other is looked for
_NARROW = 512
# Published head counts and state sizes are for hidden sizes of 1024 and more. In a narrow model
# they would leave heads of few channels, or a state out of proportion to the layer around it.
_NARROW_OPTIONS: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"num_heads": 2},
    "gla": {"num_heads": 2},
    "mamba2": {"head_dim": 32, "state_size": 72},
    "retnet": {"num_heads": 2},
}


# At a given depth a row without an MLP has only its width to choose, and heads make that coarse:
# these options are tried too, in order of preference.
_FINE: dict[str, list[dict[str, Any]]] = {
    "mamba2": [
        {"head_dim": head_dim, "state_size": state_size}
        for head_dim in (32, 16)
        for state_size in (72, 64, 80, 56, 88, 48, 96)
    ]
}


def equal_shape(
    row: str,
    parameters: int,
    vocab_size: int,
    *,
    layers: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Shape:
    """The best-proportioned model of `row` with `parameters` trainable parameters, within 2 %.

    Counted are all parameters, the embedding (tied to the output) once. Rows with channel mixing of
    their own get no MLP and, as is usual for them, about twice the layers. Of all shapes within
    2 % the one is taken whose hidden size is nearest to 40 times the depth, its MLP nearest to 8/3
    of the hidden size, and its parameters nearest to those asked for.

    Args:
        layers: the depth, if it is not to be chosen; then within 5 %.
        options: of the mixer, over those for narrow models.

    Raises:
        ValueError: the row is unknown, or no shape comes near enough.
    """
    choose("rows", row, tuple(MIXERS))
    tolerance = TOLERANCE if layers is None else GIVEN_DEPTH_TOLERANCE
    search = _Search(row, parameters, vocab_size, layers, dict(options or {}), tolerance)
    found: list[tuple[float, Shape]] = []
    refusals: list[ValueError] = []
    for step in _HIDDEN_STEPS:
        for distance, model in sorted(_candidates(search, step, refusals), key=_distance):
            shape = count_shape(row, model, vocab_size)
            if abs(shape.parameters - parameters) <= tolerance * parameters:
                found.append((distance, shape))
                break
        if found and min(found, key=_distance)[0] < _GOOD:
            break
    if found:
        return min(found, key=_distance)[1]
    refused = f". Widths it refused, as: {refusals[-1]}" if refusals else ""
    raise ValueError(
        f"parameters: {row} has no shape within {tolerance:.0%} of {parameters:,} parameters at a "
        f"vocabulary of {vocab_size}; ask for more parameters, or leave the row out{refused}"
    )


def count_parameters(model: torch.nn.Module) -> int:
    """Trainable parameters, each tensor once however often it is used."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _distance(candidate: tuple[float, Any]) -> float:
    return candidate[0]


def count_shape(row: str, model: dict[str, Any], vocab_size: int) -> Shape:
    """The shape of these keywords of SubquadConfig. ValueError if they do not fit."""
    built = _build(model, vocab_size)
    embedding = built.model.embed_tokens.weight.numel()
    return Shape(row, count_parameters(built), embedding, model)


@dataclass(frozen=True)
class _Search:
    """What a shape is looked for."""

    row: str
    parameters: int
    vocab_size: int
    layers: int | None
    options: dict[str, Any]
    tolerance: float


def narrow_options(row: str, hidden_size: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """`mixer_options` of a model this wide, as keywords of SubquadConfig; {} for the published."""
    narrow = _NARROW_OPTIONS.get(row, {}) if hidden_size < _NARROW else {}
    merged = {**narrow, **options}
    return {"mixer_options": {row: merged}} if merged else {}


def _candidates(
    search: _Search, step: int, refusals: list[ValueError]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Shapes that should come near, as (distance from the usual proportions, model keywords).

    What the mixer says of widths and options that it does not take goes to `refusals`.
    """
    row, parameters, vocab_size = search.row, search.parameters, search.vocab_size
    mixes_channels = MIXERS[row].has_channel_mixing
    aspect = _ASPECT / 2 if mixes_channels else _ASPECT
    # A layer has about 12 hidden^2 parameters (6 without an MLP) in any row: look around there.
    centre = (parameters * _ASPECT / 12) ** (1 / 3)
    if search.layers is not None:
        a, b = 12 * search.layers, vocab_size  # a h^2 + b h, the embedding included
        centre = ((b * b + 4 * a * parameters) ** 0.5 - b) / (2 * a)
    step *= max(1, round(centre / 400))  # wide models need no finer steps in proportion
    widths = range(step * math.ceil(centre / 2 / step), int(2 * centre) + 1, step)
    sets = list(enumerate(_option_sets(search)))
    for hidden, (rank, options) in itertools.product(widths, sets):
        model: dict[str, Any] = {"mixer": row, "hidden_size": hidden}
        model |= narrow_options(row, hidden, options)
        try:
            fixed, layer, mlp = _affine_count(model, vocab_size, mixes_channels)
        except ValueError as refusal:  # a hidden size it cannot divide, or an option
            refusals.append(refusal)
            continue
        depths = range(1, (parameters - fixed) // layer + 2)
        for depth in depths if search.layers is None else (search.layers,):
            shape, penalty = model | {"num_hidden_layers": depth}, 0.02 * rank
            count = fixed + depth * layer
            if mlp:
                width = round((parameters - count) / (depth * mlp) / _MLP_STEP) * _MLP_STEP
                if width < _MLP_STEP:
                    continue
                count += depth * mlp * width
                shape |= {"intermediate_size": width}
                penalty += abs(math.log(width / (hidden * _MLP_RATIO)))
            error = abs(count - parameters) / parameters
            if search.layers is None:
                penalty += abs(math.log(hidden / (depth * aspect)))
            if error <= search.tolerance:
                yield penalty + 10 * error, shape


def _option_sets(search: _Search) -> list[dict[str, Any]]:
    """The options to try: those that were asked for, and with them the finer steps."""
    if search.layers is None:
        return [search.options]
    fine = [{**options, **search.options} for options in _FINE.get(search.row, [{}])]
    return [options for i, options in enumerate(fine) if options not in fine[:i]]


def _affine_count(
    model: dict[str, Any], vocab_size: int, mixes_channels: bool
) -> tuple[int, int, int]:
    """Parameters of the model are fixed + depth * (layer + mlp * width): the three numbers."""

    def count(depth: int, width: int | None) -> int:
        shape = model | {"num_hidden_layers": depth, "intermediate_size": width}
        return count_parameters(_build(shape, vocab_size))

    if mixes_channels:
        one, two = count(1, None), count(2, None)
        return 2 * one - two, two - one, 0
    one, two, wider = count(1, _MLP_STEP), count(2, _MLP_STEP), count(1, 2 * _MLP_STEP)
    mlp = (wider - one) // _MLP_STEP
    return 2 * one - two, two - one - _MLP_STEP * mlp, mlp


def _build(model: dict[str, Any], vocab_size: int) -> SubquadForCausalLM:
    with torch.device("meta"):  # shapes without storage
        return SubquadForCausalLM(SubquadConfig(vocab_size=vocab_size, **model))
