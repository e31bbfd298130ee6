"""Calls every launching function three times with tensors of one kind and tells what it launched.

A program for test_replayed_launches.py: the calls run as they are, are recorded and are replayed.
"""

import json

import torch
from torch import Tensor

from subquad.backend.gpu import launch_cache as replay
from subquad.engines.convolution import gpu as conv
from subquad.engines.cross_entropy import gpu as loss
from subquad.engines.gates import gpu as activation
from subquad.engines.matrix.gpu import (
    layout,
    passes,
)
from subquad.engines.matrix.gpu import scan as matrix
from subquad.engines.matrix.gpu import shared_keys as shared
from subquad.engines.matrix.gpu import step as matrix_step
from subquad.engines.norm import gpu as norm
from subquad.engines.selective import gpu as scan
from subquad.engines.step_size import gpu as timestep
from triton_stub import launched

layout.processors = shared.processors = lambda device: 132
BF16, FP32 = torch.bfloat16, torch.float32


def draw(*shapes, dtype=FP32):
    return [None if shape is None else torch.rand(shape).to(dtype) for shape in shapes]


def forward(T, gate, Hk=2, packed=False, bonus=False, dtype=BF16, V=64):
    """What makes the arguments of `scan_forward`, with 2 heads of 64 keys."""

    def make():
        q, k, v = draw((1, T, Hk, 64), (1, T, Hk, 64), (1, T, 2, V), dtype=dtype)
        log_decay, u = draw(gate, (2, 64) if bonus else None)
        state = torch.rand(3, 2, 64, V) if packed else None
        cu_seqlens = torch.tensor([0, 10, 10, T]) if packed else None
        return q, k, v, log_decay, u, state, cu_seqlens, 0.125

    return make


def backward(*args, **options):
    make = forward(*args, **options)

    def make_backward():
        *inputs, cu_seqlens, scale = make()
        _, k, v, log_decay, _, _ = inputs
        kept = passes.states_to_keep(k, v, log_decay, cu_seqlens)
        entering = torch.rand(kept, 2, 64, v.shape[-1])
        with_gate = log_decay is not None
        return torch.rand_like(v), None, *inputs, entering, cu_seqlens, scale, with_gate

    return make_backward


def parts(*shape):
    return draw((*shape[:-1], 2 * shape[-1]), dtype=BF16)[0].chunk(2, -1)


def given(*shapes, then=()):
    return lambda: (*draw(*shapes), *then)


def cases():
    for T in (300, 3000):  # in one piece, and split
        for gate in (None, (2,), (2, 64), (1, T, 2), (1, T, 2, 64)):
            for options in (
                {}, {"dtype": FP32}, {"Hk": 1}, {"Hk": 1, "packed": True}, {"bonus": True},
                {"V": 200},
            ):  # fmt: skip
                yield matrix.scan_forward, forward(T, gate, **options)
                yield matrix.scan_backward, backward(T, gate, **options)
    rows, heads = (2, 50, 96), (2, 50, 4)
    filters = (96, 4), (96,), (2, 3, 96)
    packed = torch.tensor([0, 10, 10, 100])
    yield conv.convolve, given(rows, *filters, then=(None, True))
    yield conv.convolve, lambda: (torch.rand(2, 96, 50).mT, *draw((96, 4)), *[None] * 3, True)
    yield conv.convolve_backward, given(rows, rows, *filters, then=(None, True, True))
    yield (
        conv.convolve_backward,
        given((1, 100, 96), (1, 100, 96), (96, 4), None, (3, 3, 96), then=(packed, True, True)),
    )
    yield conv.one_token, given((2, 1, 96), *filters, then=(True,))
    yield conv.one_token_, given((2, 1, 96), *filters, then=(False,))
    yield norm.norm, given(rows, rows, (96,), None, None, then=(96, True, 1e-5, 1.0, None))
    values = (*heads, 24)
    yield norm.norm, given(values, None, (48,), values, (4,), then=(48, False, 1e-5, 2.0, BF16))
    yield norm.norm_backward, given(rows, rows, None, None, None, None, then=(48, True, 1e-5, 1.0))
    yield (
        norm.norm_backward,
        given(rows, values, rows, (96,), values, (4,), then=(96, True, 1e-5, 1.0)),
    )
    values = (*heads, 16)
    yield timestep.discretise, given(values, heads, (4,), (4,))
    yield timestep.discretise_backward, given(values, heads, values, heads, (4,), (4,))
    yield timestep.discretise_backward, given((0,), heads, None, heads, (4,), (4,))
    yield activation.silu_product, lambda: parts(2, 50, 96)
    yield activation.silu_product, lambda: (torch.rand(2, 96, 50).mT, *draw(rows))
    yield (
        activation.silu_product_backward,
        lambda: (torch.rand(()).expand(rows), *parts(2, 50, 96)),
    )
    yield activation.log_sigmoid, lambda: (parts(2, 50, 96)[0], 0.0625)
    yield activation.log_sigmoid_backward, lambda: (*draw(rows), parts(2, 50, 96)[1], 0.0625)
    labels = torch.zeros(2, 50, dtype=torch.int64)
    yield loss.cross_entropy, lambda: (*draw(rows, dtype=BF16), labels.clone())
    yield loss.cross_entropy, lambda: (torch.rand(2, 96, 50).mT, labels.int()[:, :1].expand(2, 50))
    sums = (2, 50, 2)
    yield (
        loss.cross_entropy_backward,
        lambda: (torch.rand(()).expand(2, 50), *draw(rows), labels.clone(), *draw(sums)),
    )
    token, per_head, state = (2, 1, 4, 64), (2, 1, 4), (2, 4, 64, 64)
    shared_keys = (2, 1, 2, 64), (2, 1, 2, 64), token
    delta_rule = (*shared_keys, per_head, per_head, None, None, (4, 64))
    low_rank = (*shared_keys, (4, 64), None, token, token, None)
    yield matrix_step.step, lambda: (*draw(*delta_rule), 0.125, torch.rand(state))
    yield matrix_step.step_, lambda: (*draw(*low_rank), 0.125, torch.rand(state))
    inputs = (2, 50, 32), (2, 50, 32), (32, 16), (2, 50, 16), (2, 50, 16), (32,), (2, 32, 16)
    yield scan.forward, given(*inputs, then=(None, True))
    yield (
        scan.backward,
        given((2, 50, 32), (2, 32, 16), *inputs, then=(None, torch.rand(5, 32, 16))),
    )


def tell(function, inputs):
    """Each launch and each result; a tensor by its form and by whose memory it lies in."""
    launched.clear()
    results = function(*inputs)
    owners = {}

    def told(x):
        if not isinstance(x, Tensor):
            return type(x), x
        owner = owners.setdefault(x.untyped_storage()._cdata, len(owners))
        return owner, x.storage_offset(), x.shape, x.stride(), x.dtype, x.data_ptr() % 16

    return [
        *map(told, inputs),  # first, so that they have the same numbers in each call
        *[(one.kernel, one.grid, *map(told, one.arguments)) for one in launched],
        *map(told, [results] if isinstance(results, Tensor) else results),
    ]


def main():
    played = []
    play = replay.Script.play
    replay.Script.play = lambda script, args: played.append(script) or play(script, args)
    for function, make in cases():
        function = getattr(function, "_launch", function)
        played.clear()
        first, recorded, replayed = (tell(function, make()) for _ in range(3))
        result = function.__name__, len(launched), len(played), recorded == first, replayed == first
        print(json.dumps(result))


main()
