"""Bad input is refused here, naming the argument, what came, what was expected and the fix.

Shapes, dtypes and devices are always checked (they cost nothing and are static under
`torch.compile`). Values are read only where that needs no device synchronisation.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from subquad.errors import fail

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str, x: object, ndim: int, layout: str, like: Tensor | None = None
) -> Tensor:
    """`x` must be a floating-point tensor of `ndim` dimensions on the device of `like`."""
    if not isinstance(x, Tensor):
        raise fail(name, type(x).__name__, f"a torch tensor {layout}", "convert it to a tensor")
    if x.layout != torch.strided or x.is_nested:
        got = "a nested tensor" if x.is_nested else f"a tensor laid out as {x.layout}"
        raise fail(name, got, f"a plain dense tensor {layout}", "to_dense(), or pack: cu_seqlens")
    if x.ndim != ndim:
        raise fail(
            name, f"shape {tuple(x.shape)}", layout, f"give it {ndim} dimensions in this order"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise fail(name, x.dtype, "a real floating-point tensor", f"cast it, e.g. {name}.float()")
    if like is not None and x.device != like.device:
        raise fail(
            name, f"device {x.device}", f"device {like.device}", f"{name}.to({str(like.device)!r})"
        )
    return x


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], layout: str) -> None:
    """`x.shape` must be exactly `shape`, written for the reader as `layout`."""
    if tuple(x.shape) != shape:
        raise fail(
            name, f"shape {tuple(x.shape)}", f"{layout} = {shape}", "check its layout and sizes"
        )


def check_state(
    state: object, shape: tuple[int, ...], layout: str, dtype: torch.dtype, like: Tensor
) -> None:
    """A state must be of exactly this shape and dtype: in a shorter one it would drift away."""
    x = check_tensor("state", state, len(shape), layout, like)
    check_shape("state", x, shape, layout)
    if x.dtype != dtype:
        raise fail("state", x.dtype, f"{dtype}: it adds up over all tokens", "cast it")


def check_cu_seqlens(cu_seqlens: object, T: int, batch: int, like: Tensor | None = None) -> int:
    """Check the boundaries of packed sequences and return their number N.

    cu_seqlens is [N+1], int32 or int64, strictly increasing from 0 to T; the batch must be 1.
    The values are read on the CPU only: reading them on a GPU would wait for it, and tracing
    cannot read them at all.
    """
    name = "cu_seqlens"
    if not isinstance(cu_seqlens, Tensor):
        raise fail(
            name,
            type(cu_seqlens).__name__,
            "a torch tensor [N+1]",
            "torch.tensor(..., dtype=torch.int32)",
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise fail(name, cu_seqlens.dtype, "int32 or int64", "cu_seqlens.to(torch.int32)")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise fail(
            name,
            f"shape {tuple(cu_seqlens.shape)}",
            "[N+1] with N >= 1",
            "give 0, the ends of the sequences, T",
        )
    if batch != 1:
        raise fail(
            name,
            f"batch {batch}",
            "batch 1 for packed sequences",
            "lay the sequences end to end in one row",
        )
    if like is not None and cu_seqlens.device != like.device:
        raise fail(
            name,
            f"device {cu_seqlens.device}",
            f"device {like.device}",
            f"cu_seqlens.to({str(like.device)!r})",
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != T:
            raise fail(
                name,
                f"from {ends[0]} to {ends[-1]}",
                f"from 0 to T = {T}",
                "start at 0 and end at the number of tokens",
            )
        if any(b <= a for a, b in pairwise(ends)):
            raise fail(
                name,
                f"{ends[:12]}",
                "strictly increasing boundaries",
                "sort them and drop empty sequences",
            )
    return int(cu_seqlens.shape[0]) - 1
