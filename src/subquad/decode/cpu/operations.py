"""What a trace knows of PyTorch: how each operation goes on a tape. Signatures are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.explanation import Explanation


class Untraceable(Exception):
    """An operation that has no kernel on a tape; its message names it."""


class Recorder(Protocol):
    """What puts operations on a tape. Their results have memory already, but no values yet."""

    tape: Any
    told: list[Explanation]
    weights: list[Tensor]

    def new(self, shape: Sequence[int]) -> Tensor: ...

    def flat(self, x: Tensor) -> Tensor: ...

    def unary(
        self, operation: str, x: Tensor, slope: float = 1.0, offset: float = 0.0
    ) -> Tensor: ...

    def binary(self, operation: str, x: Tensor | float, z: Tensor | float) -> Tensor: ...

    def rowwise(self, operation: str, x: Tensor, shape: Sequence[int]) -> Tensor: ...

    def copy(self, x: Tensor, into: Tensor) -> None: ...


def _unary(operation: str) -> Callable[..., Tensor]:
    def put(r: Recorder, x: Tensor, inplace: bool = False) -> Tensor:
        _refuse_in_place(inplace)
        return r.unary(operation, x)

    return put


def _binary(operation: str, *, swapped: bool = False) -> Callable[..., Tensor]:
    if swapped:
        return lambda recorder, x, z: recorder.binary(operation, z, x)
    return lambda recorder, x, z: recorder.binary(operation, x, z)


def _refuse_in_place(inplace: bool) -> None:
    if inplace:
        raise Untraceable("an operation in place")


def _softplus(r: Recorder, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    if (beta, threshold) != (1, 20):
        raise Untraceable("softplus with a beta or threshold of its own")
    return r.unary("softplus", x)


def _logsigmoid(r: Recorder, x: Tensor) -> Tensor:
    return r.unary("affine", r.unary("softplus", r.unary("affine", x, -1.0)), -1.0)


def _elu(r: Recorder, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    _refuse_in_place(inplace)
    if alpha != 1.0:
        raise Untraceable("elu with an alpha of its own")
    return r.unary("elu", x)


def _gelu(r: Recorder, x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate != "none":
        raise Untraceable("gelu by tanh")
    return r.unary("gelu", x)


def _glu(r: Recorder, x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return r.binary("mul", value, r.unary("sigmoid", gate))


def _addcmul(r: Recorder, x: Tensor, y: Tensor, z: Tensor, *, value: float = 1) -> Tensor:
    product = r.binary("mul", y, z)
    return r.binary("add", x, product if value == 1 else r.unary("affine", product, value))


def _sum(
    r: Recorder, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    if dim not in (-1, x.ndim - 1, (-1,), [-1]) or dtype not in (None, torch.float32):
        raise Untraceable(f"a sum over {dim}, in {dtype}")
    shape = (*x.shape[:-1], 1) if keepdim else x.shape[:-1]
    return r.rowwise("sum", x, shape)


def _softmax(r: Recorder, x: Tensor, dim: int | None = None, *others: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("_stacklevel", None)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if dim not in (-1, x.ndim - 1) or others or kwargs:
        raise Untraceable(f"a softmax over {dim}, with {others}, {kwargs}")
    return r.rowwise("softmax", x, x.shape)


def _detach(r: Recorder, x: Tensor) -> Tensor:
    return x


def _lerp(r: Recorder, x: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return r.binary("add", x, r.binary("mul", r.binary("sub", end, x), weight))


def _logaddexp(r: Recorder, x: Tensor, y: Tensor) -> Tensor:
    apart = r.unary("affine", r.unary("abs", r.binary("sub", x, y)), -1.0)
    return r.binary("add", r.binary("max", x, y), r.unary("softplus", apart))


def _square(r: Recorder, x: Tensor) -> Tensor:
    return r.binary("mul", x, x)


def _to(r: Recorder, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if x.to(*args, **kwargs) is not x:
        raise Untraceable("a change of dtype or device")
    return x


def _float(r: Recorder, x: Tensor) -> Tensor:
    return _to(r, x, torch.float32)


def _pad(
    r: Recorder, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    if mode != "constant" or min(pad) < 0:
        raise Untraceable(f"pad by {mode}, {pad}")
    y = F.pad(_like(x), pad, value=value)  # what is around stays from run to run
    inside = y
    for axis, (before, _) in enumerate(zip(pad[::2], pad[1::2])):
        inside = inside.narrow(-1 - axis, before, x.shape[-1 - axis])
    r.copy(x, inside)
    return y


def _cat(r: Recorder, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    y = torch.cat([_like(x) for x in tensors], dim)
    for x, part in zip(tensors, y.split([x.shape[dim] for x in tensors], dim)):
        r.copy(x, part)
    return y


def _stack(r: Recorder, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    y = torch.stack([_like(x) for x in tensors], dim)
    for x, part in zip(tensors, y.unbind(dim)):
        r.copy(x, part)
    return y


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device="cpu")


OPERATIONS: dict[Any, Callable[..., Any]] = {
    F.softplus: _softplus,
    F.logsigmoid: _logsigmoid,
    F.elu: _elu,
    F.gelu: _gelu,
    F.glu: _glu,
    F.pad: _pad,
    torch.addcmul: _addcmul,
    torch.cat: _cat,
    torch.stack: _stack,
    Tensor.to: _to,
    Tensor.float: _float,
    **dict.fromkeys((torch.exp, Tensor.exp), _unary("exp")),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _unary("tanh")),
    **dict.fromkeys((torch.log, Tensor.log), _unary("log")),
    **dict.fromkeys((torch.log1p, Tensor.log1p), _unary("log1p")),
    **dict.fromkeys((torch.square, Tensor.square), _square),
    torch.logaddexp: _logaddexp,
    **dict.fromkeys((torch.abs, Tensor.abs), _unary("abs")),
    **dict.fromkeys((torch.maximum, Tensor.maximum), _binary("max")),
    **dict.fromkeys((torch.sum, Tensor.sum), _sum),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    **dict.fromkeys((torch.detach, Tensor.detach), _detach),
    **dict.fromkeys((torch.lerp, Tensor.lerp), _lerp),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), _unary("sigmoid")),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _unary("relu")),
    F.silu: _unary("silu"),
    **dict.fromkeys(
        (torch.neg, Tensor.neg, Tensor.__neg__), lambda r, x: r.unary("affine", x, -1.0)
    ),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _binary("add")),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _binary("sub")),
    Tensor.__rsub__: _binary("sub", swapped=True),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _binary("mul")),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _binary("div")),
}

VIEWS = {
    Tensor.chunk,
    Tensor.expand,
    Tensor.flatten,
    Tensor.narrow,
    Tensor.permute,
    Tensor.reshape,
    Tensor.split,
    Tensor.split_with_sizes,
    Tensor.squeeze,
    Tensor.transpose,
    Tensor.unbind,
    Tensor.unflatten,
    Tensor.unsqueeze,
    Tensor.view,
    Tensor.__getitem__,
    torch.chunk,
    torch.split,
    torch.unbind,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    Tensor.data.__get__,  # type: ignore[attr-defined]
}

# What of a tensor does not depend on its numbers.
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "is_cpu", "is_cuda", "is_nested")
LOOKS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
}

# Made of numbers and sizes alone, so that they are the same in each run.
CONSTANTS = {torch.arange, torch.linspace, torch.empty, torch.zeros, torch.ones, torch.full}
