"""Give every row the same number of parameters: choose depth, hidden size and MLP width."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from subquad.arena.results import Shape
from subquad.mixers import MIXERS
from subquad.models import SubquadConfig, SubquadForCausalLM

TOLERANCE = 0.02
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


def equal_shape(row: str, parameters: int, vocab_size: int) -> Shape:
    """The best-proportioned model of `row` with `parameters` trainable parameters, within 2 %.

    Counted are all parameters, the embedding (tied to the output) once. Rows with channel mixing of
    their own get no MLP and, as is usual for them, about twice the layers. Of all shapes within
    2 % the one is taken whose hidden size is nearest to 40 times the depth, its MLP nearest to 8/3
    of the hidden size, and its parameters nearest to those asked for.

    Raises:
        ValueError: the row is unknown, or no shape comes within 2 %.
    """
    if row not in MIXERS:
        raise ValueError(f"rows: there is no row {row!r}; expected some of {', '.join(MIXERS)}")
    found: list[tuple[float, Shape]] = []
    for step in _HIDDEN_STEPS:
        candidates = _candidates(row, parameters, vocab_size, step)
        for distance, model in sorted(candidates, key=_distance):
            shape = _count(row, model, vocab_size)
            if abs(shape.parameters - parameters) <= TOLERANCE * parameters:
                found.append((distance, shape))
                break
        if found and min(found, key=_distance)[0] < _GOOD:
            break
    if found:
        return min(found, key=_distance)[1]
    raise ValueError(
        f"parameters: {row} has no shape within {TOLERANCE:.0%} of {parameters:,} parameters at a "
        f"vocabulary of {vocab_size}; ask for more parameters, or leave the row out"
    )


def count_parameters(model: torch.nn.Module) -> int:
    """Trainable parameters, each tensor once however often it is used."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _distance(candidate: tuple[float, Any]) -> float:
    return candidate[0]


def _count(row: str, model: dict[str, Any], vocab_size: int) -> Shape:
    built = _build(model, vocab_size)
    embedding = built.model.embed_tokens.weight.numel()
    return Shape(row, count_parameters(built), embedding, model)


def _candidates(
    row: str, parameters: int, vocab_size: int, step: int
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Shapes that should come near, as (distance from the usual proportions, model keywords)."""
    mixes_channels = MIXERS[row].has_channel_mixing
    aspect = _ASPECT / 2 if mixes_channels else _ASPECT
    # A layer has about 12 hidden^2 parameters (6 without an MLP) in any row: look around there.
    centre = (parameters * _ASPECT / 12) ** (1 / 3)
    step *= max(1, round(centre / 400))  # wide models need no finer steps in proportion
    for hidden in range(step * math.ceil(centre / 2 / step), int(2 * centre) + 1, step):
        model: dict[str, Any] = {"mixer": row, "hidden_size": hidden}
        if hidden < _NARROW and row in _NARROW_OPTIONS:
            model["mixer_options"] = {row: _NARROW_OPTIONS[row]}
        try:
            fixed, layer, mlp = _affine_count(model, vocab_size, mixes_channels)
        except ValueError:  # a hidden size that this mixer cannot divide into its heads
            continue
        for depth in range(1, (parameters - fixed) // layer + 2):
            shape, width_penalty = model | {"num_hidden_layers": depth}, 0.0
            count = fixed + depth * layer
            if mlp:
                width = round((parameters - count) / (depth * mlp) / _MLP_STEP) * _MLP_STEP
                if width < _MLP_STEP:
                    continue
                count += depth * mlp * width
                shape |= {"intermediate_size": width}
                width_penalty = abs(math.log(width / (hidden * _MLP_RATIO)))
            error = abs(count - parameters) / parameters
            if error <= TOLERANCE:
                proportion = abs(math.log(hidden / (depth * aspect)))
                yield proportion + width_penalty + 10 * error, shape


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
