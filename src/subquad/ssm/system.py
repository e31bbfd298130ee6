"""What linear systems have in common, in continuous and in discrete time: four checked matrices.

... any batch   N state size   I inputs   O outputs
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from subquad.errors import fail
from subquad.ssm.matrix import DPLR, Dense, Diagonal, StateMatrix, cast, check_parameter, unsqueeze

if TYPE_CHECKING:
    from typing import Self

Matrix: TypeAlias = Tensor | Diagonal | DPLR
POINTS = 512  # of a transfer function computed at a time: N^2 numbers each


@dataclass(frozen=True, eq=False)
class LinearSystem:
    """A, B, C and D, checked: a state, its input, its output, and the direct path past it.

    Args:
        A: [...,N,N], or `Diagonal(lam)` or `DPLR(lam, p, q)`; real or complex.
        B: [...,N,I]. One input is one column.
        C: [...,O,N]. One output is one row.
        D: [...,O,I]; None means zeros.

    Nested lists and numpy arrays are taken too, as float64 unless a tensor beside them says
    otherwise. Batch shapes broadcast. All four get one dtype, complex if any of them is.

    Raises:
        ValueError: for shapes that do not fit, numbers that are not finite, several devices.
    """

    A: Matrix
    B: Tensor
    C: Tensor
    D: Tensor | None = None

    def __post_init__(self) -> None:
        given = {"A": self.A, "B": self.B, "C": self.C, "D": self.D}
        dtype = _common_dtype(given.values())
        A, B, C = (_parameter(name, given[name], dtype) for name in "ABC")
        if isinstance(A, Tensor) and A.shape[-1] != A.shape[-2]:
            raise fail("A", f"shape {tuple(A.shape)}", "[...,N,N]", "give a square matrix")
        N = _matrix(A).size
        if B.shape[-2] != N:
            raise fail("B", f"shape {tuple(B.shape)}", f"[...,{N},I]", "one row a state number")
        if C.shape[-1] != N:
            raise fail("C", f"shape {tuple(C.shape)}", f"[...,O,{N}]", "one column a state number")
        through = (C.shape[-2], B.shape[-1])
        D = C.new_zeros(through) if self.D is None else _parameter("D", self.D, dtype)
        if tuple(D.shape[-2:]) != through:
            want = f"[...,{through[0]},{through[1]}] (outputs of C, inputs of B)"
            raise fail("D", f"shape {tuple(D.shape)}", want, "or leave D out")
        for name, value in zip("ABCD", (A, B, C, D)):
            _check_finite(name, value)
            object.__setattr__(self, name, value)
        _check_devices({"A": A, "B": B, "C": C, "D": D})
        _check_batches(self.batch_shapes)

    @property
    def matrix(self) -> StateMatrix:
        """A with its operations; a plain tensor is `Dense`."""
        return _matrix(self.A)

    @property
    def through(self) -> Tensor:
        """D, which is never None once the system exists."""
        assert self.D is not None
        return self.D

    @property
    def batch_shapes(self) -> dict[str, torch.Size]:
        tensors = {"B": self.B, "C": self.C, "D": self.through}
        return {"A": self.matrix.batch} | {name: x.shape[:-2] for name, x in tensors.items()}

    @property
    def batch(self) -> torch.Size:
        """The shape [...] of systems this is."""
        return torch.broadcast_shapes(*self.batch_shapes.values())

    @property
    def state_size(self) -> int:
        return self.matrix.size

    @property
    def inputs(self) -> int:
        return self.B.shape[-1]

    @property
    def outputs(self) -> int:
        return self.C.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def real_dtype(self) -> torch.dtype:
        """Of steps, times and frequencies."""
        wide = self.dtype in (torch.float64, torch.complex128)
        return torch.float64 if wide else torch.float32

    @property
    def device(self) -> torch.device:
        return self.B.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `Tensor.to`: another dtype or device. A complex system stays complex."""
        move = {name: getattr(self, name).to(*args, **kwargs) for name in "BCD"}
        dtype = move["B"].dtype
        if self.dtype.is_complex and not dtype.is_complex:
            raise fail("dtype", dtype, "a complex one: this system is", "complex64 or complex128")
        A = type(self.matrix)(*(t.to(*args, **kwargs) for t in self.matrix.tensors))
        return replace(self, A=A.matrix if isinstance(A, Dense) else A, **move)

    def eigenvalues(self) -> Tensor:
        """Of A: [...,N]. The poles of the system."""
        return self.matrix.eigenvalues()

    def _transfer(self, points: Tensor) -> Tensor:
        """C (z - A)^-1 B + D at points z [...,W] or [W], complex: [...,W,O,I]."""
        dtype = torch.promote_types(self.dtype, torch.complex64)
        A = unsqueeze(cast(self.matrix, dtype))
        B, C, D = (x[..., None, :, :].to(dtype) for x in (self.B, self.C, self.through))
        parts = []
        for z in points.to(dtype).split(POINTS, -1):
            parts.append(C @ A.affine(-1.0, z).solve(B) + D)
        return torch.cat(parts, -3)

    @classmethod
    def from_scipy(cls, system: Any) -> Self:
        """From a scipy.signal system (StateSpace, TransferFunction, ZerosPolesGain; float64)."""
        if not hasattr(system, "to_ss"):
            raise fail(
                "system", type(system).__name__, "a scipy.signal system", "or " + cls.__name__
            )
        theirs = system.to_ss()
        steps = {} if theirs.dt is None else {"dt": float(theirs.dt)}
        if bool(steps) != ("dt" in {field.name for field in fields(cls)}):
            kind = "discrete (it has a dt)" if steps else "continuous (it has no dt)"
            other = "DiscreteStateSpace" if steps else "StateSpace"
            raise fail(
                "system", kind, f"what {cls.__name__} is", f"use {other}.from_scipy for this one"
            )
        return cls(theirs.A, theirs.B, theirs.C, theirs.D, **steps)

    def to_scipy(self) -> Any:
        """As scipy.signal.StateSpace, which holds one system: no batch."""
        from scipy import signal

        if self.batch:
            raise fail("batch", tuple(self.batch), "one system for scipy", "take one of the batch")
        dt = getattr(self, "dt", None)
        parts = (self.matrix.dense(), self.B, self.C, self.through)
        steps = {} if dt is None else {"dt": float(dt)}
        return signal.StateSpace(*(x.detach().cpu().numpy() for x in parts), **steps)


def _matrix(A: Matrix) -> StateMatrix:
    return Dense(A) if isinstance(A, Tensor) else A


def _common_dtype(values: Iterable[object]) -> torch.dtype:
    """Of the tensors given, complex if anything is; float64 if there is no tensor."""
    values = list(values)
    tensors = [t for v in values for t in (v.tensors if isinstance(v, Diagonal | DPLR) else [v])]
    dtypes = [t.dtype for t in tensors if isinstance(t, Tensor)]
    dtypes = [d for d in dtypes if d.is_floating_point or d.is_complex] or [torch.float64]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    foreign = [v for v in values if v is not None and not isinstance(v, Tensor | Diagonal | DPLR)]
    if any(_is_complex(v) for v in foreign):
        dtype = torch.promote_types(dtype, torch.complex64)
    return dtype


def _is_complex(value: object) -> bool:
    try:
        return torch.as_tensor(value).is_complex()
    except (TypeError, ValueError, RuntimeError):
        return False  # refused by name a little later


def _parameter(name: str, value: Any, dtype: torch.dtype) -> Any:
    """The value in the common dtype: a matrix of at least two dimensions, or Diagonal or DPLR."""
    if isinstance(value, Diagonal | DPLR):
        if name != "A":
            raise fail(name, type(value).__name__, "a tensor", "only A has other shapes")
        value.check()
        return cast(value, dtype)
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=dtype)
        except (TypeError, ValueError, RuntimeError):
            raise fail(name, repr(value)[:60], "a matrix of numbers", "torch.tensor(...)") from None
    layout = {"A": "[...,N,N]", "B": "[...,N,I]", "C": "[...,O,N]", "D": "[...,O,I]"}[name]
    if value.ndim == 1:
        fix = {"A": "Diagonal(A)", "B": "B[:, None]", "C": "C[None]", "D": "D[None, None]"}[name]
        raise fail(name, f"shape {tuple(value.shape)}", layout, fix)
    return check_parameter(name, value, 2, layout).to(dtype)


def _check_finite(name: str, value: Matrix) -> None:
    if torch.compiler.is_compiling():
        return
    tensors = (value,) if isinstance(value, Tensor) else value.tensors
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise fail(name, "NaN or infinity", "finite numbers", "look where it was made")


def _check_devices(parts: dict[str, Matrix]) -> None:
    devices = {
        name: {t.device for t in ((x,) if isinstance(x, Tensor) else x.tensors)}
        for name, x in parts.items()
    }
    if len(set().union(*devices.values())) > 1:
        got = ", ".join(f"{name} on {', '.join(map(str, d))}" for name, d in devices.items())
        raise fail("A, B, C, D", got, "one device", "move them together")


def _check_batches(shapes: dict[str, torch.Size]) -> None:
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise fail(
            "A, B, C, D", f"batch shapes {got}", "shapes that broadcast", "insert dimensions of 1"
        ) from None


def check_signal(name: str, x: object, system: LinearSystem, width: int, layout: str) -> Tensor:
    """An input or a state: finite numbers, [...,width], batch broadcasting with the system's."""
    dims = layout.count(",")
    x = check_parameter(name, x, dims, layout)
    if x.shape[-1] != width:
        fix = f"one input is {name}[..., None]" if width == 1 else "check its layout"
        raise fail(name, f"shape {tuple(x.shape)}", f"{layout}, the last of size {width}", fix)
    if x.device != system.device:
        raise fail(name, f"device {x.device}", f"device {system.device}", "move one of the two")
    check_batch(name, x.shape[:-dims], system.batch)
    _check_finite(name, x)
    return x.to(torch.promote_types(x.dtype, system.dtype))


def check_batch(name: str, batch: torch.Size, systems: torch.Size) -> None:
    """`batch`, the leading dimensions of an argument, must broadcast with those of the systems."""
    try:
        torch.broadcast_shapes(batch, systems)
    except RuntimeError:
        want = f"a batch that broadcasts with the systems' {tuple(systems)}"
        fix = "the systems' dimensions come last, others before them"
        raise fail(name, f"batch {tuple(batch)}", want, fix) from None
