"""One token through layers on the CPU: traced once from their own code, then run in one call.

Decoding reads every weight once for each token; the operations between are short. Called from the
interpreter one by one they cost as much as the reading, because the weights that stream through
the caches drive the interpreter out of them. So what a layer computes for one token is traced to a
tape of compiled kernels, and only the tape runs from then on.

A trace sees what `__torch_function__` shows: every call of PyTorch's, and of our engines, which
take part in that protocol. It knows the operations in `operations.py`. Any other, and whatever
reads a value (`if x.sum() > 0`), raises `Untraceable`, and the layer is called as it always was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from subquad.recurrence import api, diagonal
from subquad.recurrence.convolution import short_convolution
from subquad.recurrence.eager import can_call_compiled_code
from subquad.recurrence.explanation import Explanation, tell, watched
from subquad.recurrence.linear import linear
from subquad.recurrence.norm import gated_rms_norm, l2_norm, rms_norm
from subquad.recurrence.operations import CONSTANTS, LOOKS, OPERATIONS, VIEWS, Untraceable
from subquad.recurrence.reference import Delta, Erase, LowRank

Layers = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Trace:
    """What `layers` computes from tensors like `examples`, to be run with others in their place.

    Weights are read anew in each run, wherever they lay at the time of tracing. Settings of
    modules, and whatever Python did besides calling operations, are as they were then.

    Args:
        layers: from tensors to tensors; called once, its results are thrown away.
        examples: float32 contiguous tensors on the CPU, of which only the shapes matter.

    Raises:
        Untraceable: what `layers` does cannot be on a tape.
    """

    def __init__(self, layers: Layers, examples: Sequence[Tensor]) -> None:
        recorder = _Recorder()
        inputs = [torch.empty(x.shape) for x in examples]
        with torch.no_grad(), recorder:
            results = layers(inputs)
        outputs = recorder.outputs(results)
        self._inputs = [x.shape for x in inputs]
        self._outputs = [y.shape for y in outputs]
        self._told = recorder.told
        self._tape = recorder.tape
        self._tape.free([*inputs, *outputs])
        recorder.pages.enlarge_pages(recorder.weights)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs, new tensors; None where it cannot: other shapes, gradients, autocast...

        For one thread at a time.
        """
        if torch.is_autocast_enabled("cpu") or not can_call_compiled_code(inputs):
            return None
        for x, shape in zip(inputs, self._inputs):
            if x.shape != shape or not x.is_contiguous():
                return None
        outputs = [torch.empty(shape) for shape in self._outputs]
        self._tape.run([*inputs, *outputs])
        if watched():
            for explanation in self._told:
                tell(explanation)
        return outputs


class _Recorder(TorchFunctionMode):
    """Puts operations on a tape. What they return has its memory already, but no numbers yet."""

    def __init__(self) -> None:
        # Compiles, and imports numba, when first used.
        from subquad.kernels import (
            elementwise_cpu,
            linear_cpu,
            matrix_step_cpu,
            norm_cpu,
            pages,
            selective_scan_cpu,
            short_convolution_cpu,
            tape,
        )

        super().__init__()
        self._elementwise, self._linear, self._norm = elementwise_cpu, linear_cpu, norm_cpu
        self._matrix, self._scan = matrix_step_cpu, selective_scan_cpu
        self._convolution = short_convolution_cpu
        self.pages = pages
        self.tape = tape.Tape()
        self.told: list[Explanation] = []
        self.weights: list[Tensor] = []  # of projections
        self._written: set[int] = set()  # addresses; the tape keeps all that is there alive

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            return _KNOWN[func](self, *args, **kwargs)
        if func in VIEWS:
            return self._view(func, *args, **kwargs)
        if func in LOOKS or getattr(func, "__name__", "") == "__get__" or func in CONSTANTS:
            return func(*args, **kwargs)
        raise Untraceable(torch.overrides.resolve_name(func) or repr(func))

    def _view(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same memory seen otherwise; of x laid out anew where PyTorch would do that."""
        views = func(x, *args, **kwargs)
        place = x.untyped_storage().data_ptr()
        for view in (views,) if isinstance(views, Tensor) else views:
            if view.untyped_storage().data_ptr() != place:
                return func(self.copied(x), *args, **kwargs)
        return views

    # ---- memory

    def flat(self, x: Tensor, shape: torch.Size | None = None) -> Tensor:
        """x, broadcast to the shape, in one contiguous piece."""
        if x.dtype != torch.float32 or not x.is_cpu:
            raise Untraceable(f"{x.dtype} on {x.device}")
        if shape is not None and x.shape != shape:
            x = x.expand(shape)
        return x if x.is_contiguous() else self.copied(x)

    def new(self, shape: torch.Size | Sequence[int]) -> Tensor:
        """Memory for what an operation returns, all of which it writes in each run."""
        y = torch.empty(shape)
        self._written.add(y.untyped_storage().data_ptr())
        return y

    def outputs(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The results, copied where they are not the whole of what one operation returned."""
        outputs = []
        for y in results:
            place = y.untyped_storage().data_ptr()
            whole = y.is_contiguous() and y.untyped_storage().nbytes() == y.nbytes
            outputs.append(y if whole and place in self._written else self.copied(y))
            self._written.discard(place)  # only one may have it
        return outputs

    def copied(self, x: Tensor) -> Tensor:
        """x in memory of its own."""
        y = self.new(x.shape)
        self.copy(x, y)
        return y

    def copy(self, x: Tensor, into: Tensor) -> None:
        if x.dtype != torch.float32 or not self._elementwise.copy(self.tape, x, into):
            raise Untraceable(f"a copy of {x.dtype}, strides {x.stride()}")

    # ---- elementwise

    def unary(self, operation: str, x: Tensor, slope: float = 1.0, offset: float = 0.0) -> Tensor:
        x = self.flat(x)
        y = self.new(x.shape)
        self._elementwise.unary(self.tape, operation, x, y, slope, offset)
        return y

    def binary(self, operation: str, x: Tensor | float, z: Tensor | float) -> Tensor:
        if not isinstance(x, Tensor) or not isinstance(z, Tensor):
            return self._with_number(operation, x, z)
        shape = torch.broadcast_shapes(x.shape, z.shape)
        y = self.new(shape)
        left, right = self.flat(x, shape), self.flat(z, shape)
        self._elementwise.binary(self.tape, operation, left, right, y)
        return y

    def _with_number(self, operation: str, x: Tensor | float, z: Tensor | float) -> Tensor:
        if isinstance(x, Tensor) and isinstance(z, int | float):
            slope = {"mul": z, "div": 1 / z if z else 0.0}.get(operation, 1.0)
            offset = {"add": z, "sub": -z}.get(operation, 0.0)
            if operation != "div" or z:
                return self.unary("affine", x, slope, offset)
        if isinstance(z, Tensor) and isinstance(x, int | float) and operation != "div":
            slope = {"mul": x, "sub": -1.0}.get(operation, 1.0)
            return self.unary("affine", z, slope, 0.0 if operation == "mul" else x)
        raise Untraceable(f"{operation} of {type(x).__name__} and {type(z).__name__}")

    # ---- the engines

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.numel() != weight.shape[-1]:
            raise Untraceable("a projection of more than one row")
        y = self.new((*x.shape[:-1], weight.shape[0]))
        self._linear.record(self.tape, self.flat(x), self.flat(weight), self._flat(bias), y)
        self.weights.append(weight)
        return y

    def normalise(
        self,
        x: Tensor,
        size: int,
        weight: Tensor | None,
        eps: float,
        gate: Tensor | None = None,
        gate_first: bool = False,
        scale: float = 1.0,
    ) -> Tensor:
        y = self.new(x.shape)
        x, weight, gate = self.flat(x), self._flat(weight), self._flat(gate)
        self._norm.record(self.tape, x, size, weight, gate, gate_first, eps, scale, y)
        return y

    def short_convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if state is None or cu_seqlens is not None or x.shape[1] != 1:
            raise Untraceable("a convolution of more than one token, or from no state")
        y, new, silu = self.new(x.shape), self.new(state.shape), activation == "silu"
        x, weight, state = self.flat(x), self.flat(weight), self.flat(state)
        self._convolution.record(self.tape, x, weight, self._flat(bias), state, silu, y, new)
        return y, new

    def linear_recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None = None,
        erase: Erase = None,
        bonus: Tensor | None = None,
        scale: float | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        form: str = "auto",
        impl: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        if state is None or cu_seqlens is not None:
            raise Untraceable("a recurrence from no state")
        given = (q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens, form, impl)
        explanation = api.explain(*given)
        if explanation.impl != "numba":
            raise Untraceable(f"a recurrence with impl={explanation.impl!r}")
        self.told.append(explanation)
        beta = erase.beta if isinstance(erase, Delta) else None
        a, b = (erase.a, erase.b) if isinstance(erase, LowRank) else (None, None)
        o, new = self.new(v.shape), self.new(state.shape)
        log_decay, beta = self._flat(log_decay), self._flat(beta)
        a, b, bonus = self._flat(a), self._flat(b), self._flat(bonus)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        q, k, v, state = self.flat(q), self.flat(k), self.flat(v), self.flat(state)
        inputs = (q, k, v, log_decay, beta, a, b, bonus, scale, state)
        self._matrix.record(self.tape, *inputs, o, new)
        return o, new

    def selective_scan(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        form: str = "auto",
        impl: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        if state is None or cu_seqlens is not None or x.shape[1] != 1:
            raise Untraceable("a scan of more than one token, or from no state")
        if form not in ("auto", "scan") or impl not in ("auto", "numba"):
            raise Untraceable(f"a scan with form={form!r}, impl={impl!r}")
        self.told.append(diagonal.explain_token(x, A))
        y, new = self.new(x.shape), self.new(state.shape)
        x, dt, A, B, C = map(self.flat, (x, dt, A, B, C))
        D = torch.zeros(x.shape[2]) if D is None else self.flat(D)
        self._scan.record(self.tape, x, dt, A, B, C, D, self.flat(state), y, new)
        return y, new

    def _flat(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.flat(x)


_KNOWN: dict[Any, Callable[..., Any]] = {
    **OPERATIONS,
    api.linear_recurrence: _Recorder.linear_recurrence,
    diagonal.selective_scan: _Recorder.selective_scan,
    short_convolution: _Recorder.short_convolution,
    rms_norm: lambda r, x, size, weight, eps: r.normalise(x, size, weight, eps),
    gated_rms_norm: lambda r, x, gate, size, weight, eps, *, gate_first: r.normalise(
        x, size, weight, eps, gate, gate_first
    ),
    l2_norm: lambda r, x, size, eps=1e-6: r.normalise(x, size, None, eps / size, scale=size**-0.5),
    linear: _Recorder.linear,
}
