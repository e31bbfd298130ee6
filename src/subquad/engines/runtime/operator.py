"""Compiled work as PyTorch sees it: an operator where operations are traced, else a plain call.

A custom operator is what `torch.compile`, tracing and dispatch modes need to see. Its way through
the dispatcher and the autograd that torch generates for it costs 10 to 60 microseconds of Python a
call, more than small kernels run; the first one imports the compiler, a second's work. So eager
calls on plain tensors go straight to the function that launches or computes, and where a gradient
is recorded to an `autograd.Function` of the same two halves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from subquad.backend.fast_paths import are_fast_paths_on

_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """A function of tensors that launches kernels, and `op`, the same as a custom operator.

    Args:
        name: of the operator, "library::name".
        launch: takes and returns tensors; its annotations are the operator's schema.
        mutates: the names of the arguments that it writes over.
    """

    def __init__(self, name: str, launch: Callable[..., Any], mutates: Iterable[str] = ()) -> None:
        mutates = tuple(mutates)
        schema = torch.library.infer_schema(inspect.unwrap(launch), mutates_args=mutates)
        self.op = torch.library.custom_op(name, launch, mutates_args=mutates, schema=schema)
        names = [argument.name for argument in self.op._opoverload._schema.arguments]
        self._launch = launch
        self._mutated = tuple(names.index(argument) for argument in mutates)
        self._record: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*args)
        if operations_are_watched():
            self._refuse_tangents(args)
            return self.op(*args)
        if not are_fast_paths_on():
            return self.op(*args)
        recorded = False
        for x in args:
            if isinstance(x, Tensor):
                # A fake or a wrapped one, perhaps one that outlived a transform of functorch.
                if type(x) not in _PLAIN or is_functorch_wrapped_tensor(x):
                    return self.op(*args)
                # One of the gradients of `is_grads_batched`; or one whose memory holds its
                # negative, as of `z.conj().imag`: the dispatcher turns it round.
                if is_legacy_batchedtensor(x) or x.is_neg():
                    return self.op(*args)
                recorded = recorded or x.requires_grad
        if recorded and torch.is_grad_enabled():
            if self._record is None:
                return self.op(*args)  # lets torch say that it has no derivative
            return self._record(*args)
        for place in self._mutated:
            if not args[place].is_inference():
                increment_version(args[place])
        return self._launch(*args)

    def _refuse_tangents(self, args: tuple) -> None:
        """The operator that torch makes would drop them: a forward derivative of 0, and no word."""
        if forward_ad._current_level < 0 or torch._C._are_functorch_transforms_active():
            return
        for x in args:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                name = self.op._opoverload._schema.name
                raise NotImplementedError(
                    f"{name}: got a tensor with a tangent; expected none, as it has no forward "
                    "derivative. Fix: form what is differentiated inside the dual level, too."
                )

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """What the operator returns, by shapes and dtypes alone."""
        self.op.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
        """`setup(ctx, inputs, output)` saves what `backward(ctx, *grads)` needs."""
        self.op.register_autograd(backward, setup_context=setup)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._launch(*args)
            setup(ctx, args, output)
            return output

        # With a `setup_context` of its own torch would look up `forward`'s signature in every call.
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        name = self.op._opoverload._schema.name.rpartition("::")[2]
        function = type(name, (torch.autograd.Function,), members)
        # Not `function.apply`, which looks first at what `__call__` has seen to.
        self._record = super(torch.autograd.Function, function).apply  # type: ignore[misc]


def operator(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the function that launches."""
    return lambda launch: Operator(name, launch, mutates)


def operations_are_watched() -> bool:
    """Whether a transform, a trace or a dispatch mode wants to see each operation."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )
