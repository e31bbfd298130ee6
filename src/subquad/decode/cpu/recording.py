"""What layers do with one token, recorded on a tape of kernels while they are called.

What layers compute is seen by `__torch_function__`: every call of PyTorch's, and of our engines,
which take part in that protocol. What gets past it (compiled scripts, NumPy, whoever switches the
protocol off) still reaches PyTorch's dispatcher, and is refused there: whatever is not seen cannot
be on the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

from subquad.decode.cpu.engines import ENGINES
from subquad.decode.cpu.operations import CONSTANTS, LOOKS, OPERATIONS, VIEWS, Untraceable
from subquad.engines.runtime.explanation import Explanation

P = ParamSpec("P")
R = TypeVar("R")


class Recording(TorchFunctionMode):
    """Puts operations on a tape. What they return has memory already, but no values yet."""

    def __init__(self) -> None:
        from subquad.backend.cpu import pages, tape  # compiles, and imports numba
        from subquad.decode.cpu import elementwise as elementwise_cpu

        super().__init__()
        self._kernels, self._pages = elementwise_cpu, pages
        self.tape = tape.Tape()
        self.told: list[Explanation] = []
        self.weights: list[Tensor] = []  # of projections
        self._made: dict[int, Tensor] = {}  # by address: what operations write all of
        self._failure: Exception | None = None

    def record(self, layer: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`layer(*args)` on the tape, behind what is there.

        Raises:
            Untraceable: it does what a tape cannot, and the tape is as it was. Any other exception
                becomes this one: code that meets memory without numbers may fail in its own way.
        """
        begin, self._failure = (self.tape.mark(), len(self.told), len(self.weights)), None
        try:
            with torch.no_grad(), _Hidden(), self:  # type: ignore[no-untyped-call]
                result = layer(*args, **kwargs)
            if self._failure is not None:  # and the layer went on by another way
                raise self._failure
        except Exception as error:
            self.tape.cut(begin[0])
            del self.told[begin[1] :], self.weights[begin[2] :]
            raise Untraceable(f"{type(error).__name__}: {error}") from error
        return result

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            with _pop_mode_temporarily():  # what is shown here is not hidden
                return self._put(func, args, kwargs or {})
        except Exception as error:
            self._failure = error
            raise

    def _put(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _KNOWN:
            return _KNOWN[func](self, *args, **kwargs)
        if func in VIEWS:
            return self._view(func, *args, **kwargs)
        if func in LOOKS or (func in CONSTANTS and not _holds_tensor((args, *kwargs.values()))):
            return func(*args, **kwargs)
        raise Untraceable(resolve_name(func) or repr(func))

    def _view(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same memory seen otherwise; of x laid out anew where PyTorch would do that."""
        if _holds_tensor((args, *kwargs.values())):
            raise Untraceable(f"{resolve_name(func)} by numbers in a tensor")
        views = func(x, *args, **kwargs)
        if not _are_views(views, x):
            x = self.copied(x)
            views = func(x, *args, **kwargs)
            if not _are_views(views, x):
                raise Untraceable(f"{resolve_name(func)}: numbers picked one by one")
        return views

    # ---- memory

    def input(self, shape: Sequence[int]) -> Tensor:
        """A float32 tensor on the CPU for layers to be called with."""
        return torch.empty(shape, dtype=torch.float32, device="cpu")

    def new(self, shape: torch.Size | Sequence[int]) -> Tensor:
        """Memory for what an operation returns, all of which it writes in each run."""
        y = torch.empty(shape, dtype=torch.float32, device="cpu")
        self._made[y.untyped_storage().data_ptr()] = y
        return y

    def flat(self, x: Tensor, shape: torch.Size | None = None) -> Tensor:
        """x, broadcast to the shape, in one contiguous piece."""
        if type(x) not in (Tensor, torch.nn.Parameter) or x.dtype != torch.float32 or not x.is_cpu:
            raise Untraceable(f"a {type(x).__name__} of {x.dtype} on {x.device}")
        if shape is not None and x.shape != shape:
            x = x.expand(shape)
        return x if x.is_contiguous() else self.copied(x)

    def copied(self, x: Tensor) -> Tensor:
        """x in memory of its own."""
        y = self.new(x.shape)
        self.copy(x, y)
        return y

    def copy(self, x: Tensor, into: Tensor) -> None:
        if x.dtype != torch.float32 or not self._kernels.copy(self.tape, x, into):
            raise Untraceable(f"a copy of {x.dtype}, strides {x.stride()}")

    def outputs(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The results, copied where they are not the whole of what one operation returned."""
        outputs = []
        for y in results:
            place = y.untyped_storage().data_ptr()
            whole = y.is_contiguous() and y.untyped_storage().nbytes() == y.nbytes
            outputs.append(y if whole and place in self._made else self.copied(y))
            self._made.pop(place, None)  # only one may have it
        return outputs

    def enlarge_pages(self) -> None:
        """Of the weights that it reads, in the background."""
        self._pages.enlarge_pages(self.weights)

    # ---- elementwise

    def unary(self, operation: str, x: Tensor, slope: float = 1.0, offset: float = 0.0) -> Tensor:
        x = self.flat(x)
        y = self.new(x.shape)
        self._kernels.unary(self.tape, operation, x, y, slope, offset)
        return y

    def binary(self, operation: str, x: Tensor | float, z: Tensor | float) -> Tensor:
        if not isinstance(x, Tensor) or not isinstance(z, Tensor):
            return self._with_number(operation, x, z)
        shape = x.shape if x.shape == z.shape else torch.broadcast_shapes(x.shape, z.shape)
        y = self.new(shape)
        left, right = self.flat(x, shape), self.flat(z, shape)
        self._kernels.binary(self.tape, operation, left, right, y)
        return y

    def rowwise(self, operation: str, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Along the last axis; `shape` is the result's."""
        x, y = self.flat(x), self.new(shape)
        self._kernels.rowwise(self.tape, operation, x, y)
        return y

    def _with_number(self, operation: str, x: Tensor | float, z: Tensor | float) -> Tensor:
        if operation == "max":
            raise Untraceable("the larger of a tensor and a number")
        if isinstance(x, Tensor) and isinstance(z, int | float):
            slope = {"mul": z, "div": 1 / z if z else 0.0}.get(operation, 1.0)
            offset = {"add": z, "sub": -z}.get(operation, 0.0)
            if operation != "div" or 1e-30 < abs(z) < 1e30:  # whose inverse is a float32
                return self.unary("affine", x, slope, offset)
        if isinstance(z, Tensor) and isinstance(x, int | float) and operation != "div":
            slope = {"mul": x, "sub": -1.0}.get(operation, 1.0)
            return self.unary("affine", z, slope, 0.0 if operation == "mul" else x)
        raise Untraceable(f"{operation} of {type(x).__name__} and {type(z).__name__}")


class _Hidden(TorchDispatchMode):
    """Meets what a recording was not shown."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise Untraceable(f"{func}, out of sight of __torch_function__")


def _are_views(results: Tensor | Sequence[Tensor], x: Tensor) -> bool:
    place = x.untyped_storage().data_ptr()
    results = (results,) if isinstance(results, Tensor) else results
    return all(y.untyped_storage().data_ptr() == place for y in results)


def _holds_tensor(x: object) -> bool:
    """Whether an argument, or what it is made of, is a tensor."""
    if isinstance(x, slice):
        x = (x.start, x.stop, x.step)
    return any(map(_holds_tensor, x)) if isinstance(x, tuple | list) else isinstance(x, Tensor)


_KNOWN: dict[Any, Callable[..., Any]] = {**OPERATIONS, **ENGINES}
