"""Launching functions replayed: the Python between a call and its kernels runs once for each kind.

The backward pass of one scan launches three kernels and takes 0.25 ms of Python: tiles are chosen,
strides read, tensors made, and Triton looks at each of some 50 arguments. Between two calls with
tensors of equal shapes, strides, types and alignment nothing of that differs but the addresses. So
the second call of a kind is recorded (every tensor it makes, every operation of PyTorch, every
launch) and calls after that do just these things, with the same results to the bit.

A function can be replayed if what it does follows from its arguments' kinds alone: from no values
of tensors and no state of its own.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.backend.fast_paths import are_fast_paths_on
from subquad.backend.gpu.launch import Launch, witness

KINDS = 512  # of calls, remembered for each function; the oldest is forgotten first
_ALIGNMENT = 16  # bytes: what Triton looks at in an address

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default,
    _aten.empty_strided.default, _aten.new_empty_strided.default,
}  # fmt: skip


# What most scripts call, by PyTorch's own bindings: they take half the time of an overload's.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.view.default: Tensor.view, _aten.t.default: Tensor.t, _aten.select.int: Tensor.select,
    _aten.unbind.int: Tensor.unbind, _aten.sum.dim_IntList: Tensor.sum,
    _aten.copy_.default: Tensor.copy_,
    _aten._to_copy.default: functools.partial(Tensor.to, copy=True),
}  # fmt: skip


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of tensors and numbers that launches kernels by `launch`.

    Its results are a tensor, or a tuple or list of tensors. It also runs on its tensors' GPU,
    whichever is the current one.
    """
    # True: the next such call is to be recorded. False: what such calls do cannot be replayed.
    # Threads share it: an ordered dict forgets its oldest kind in one step, a plain one does not.
    scripts: OrderedDict[tuple, Script | bool] = OrderedDict()

    def run(args: tuple) -> Any:
        # Where it is switched off, or somebody wants to see the operations.
        if not are_fast_paths_on() or torch._C._len_torch_dispatch_stack() > 0:
            return function(*args)
        kind = _kind(args)
        script = scripts.get(kind)
        if isinstance(script, Script):
            return script.play(args)
        if script is None:
            if len(scripts) >= KINDS:
                scripts.popitem(last=False)
            scripts[kind] = True
        elif script and _differ(args):
            result, scripts[kind] = record(function, args)
            return result
        return function(*args)

    @functools.wraps(function)
    def on_its_device(*args: Any) -> Any:
        device = _device(args)
        if device < 0 or device == torch.cuda.current_device():
            return run(args)
        with torch.cuda.device(device):
            return run(args)

    return on_its_device


def record(function: Callable[..., Any], args: tuple) -> tuple[Any, Script | bool]:
    """What the function returns, and a script of what it did (False: it cannot be recorded)."""
    script = Script(args)
    witness.script = script
    try:
        with _Operations(script):
            result = function(*args)
    finally:
        witness.script = None
    return result, script.finish(result)


def _device(args: tuple) -> int:
    """The index of the first tensor's GPU; -1 for none."""
    for x in args:
        if isinstance(x, Tensor):
            return x.get_device()
    return -1


def _kind(args: tuple) -> tuple:
    """All that a launching function may depend on. Flat, since each call makes and hashes one."""
    kind: list[Any] = [torch.is_autocast_enabled("cuda")]
    for x in args:
        if isinstance(x, Tensor):
            kind += x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % _ALIGNMENT
        else:
            kind += type(x), x
    return tuple(kind)


def _differ(args: tuple) -> bool:
    """Whether the tensors are all different. Calls that pass one twice are not recorded."""
    tensors = [id(x) for x in args if isinstance(x, Tensor)]
    return len(tensors) == len(set(tensors))


class Script:
    """What one call did, in terms of numbered tensors: its arguments, then what it made."""

    def __init__(self, args: tuple) -> None:
        self._numbers = {id(x): n for n, x in enumerate(args) if isinstance(x, Tensor)}
        self._count = len(args)
        self._alive: list[Any] = list(args)  # so that no id is given twice while it is written
        self._steps: list[Callable[[list], None]] = []
        self._results: list[int] = []
        self._pack: Callable[[list], Any] = list
        self._complete = True

    def play(self, args: tuple) -> Any:
        values = list(args)
        for step in self._steps:
            step(values)
        return self._pack([values[number] for number in self._results])

    def note_operation(self, call: Callable, args: tuple, kwargs: dict, out: Any) -> None:
        made = out if isinstance(out, (tuple, list)) else [out]
        if next(_tensors((args, kwargs, out)), None) is None:
            return  # of types and numbers alone, as promote_types: it follows from the call's kind
        # Told are tensors from tensors: no value that was looked at, no `out=`.
        told = all(isinstance(x, Tensor) for x in made) and next(_tensors(kwargs), None) is None
        self._complete = self._complete and told and self._knows(args)
        if not self._complete:
            return
        self._alive += made
        if call is _aten.detach.default:  # of each tensor that is made; there are no gradients here
            self._numbers[id(out)] = self._numbers[id(args[0])]
            return
        if call in _ALLOCATIONS:
            self._steps.append(_allocation(out))
        else:
            if kwargs.keys() <= {"dtype"}:
                call = _BINDINGS.get(call, call)
            self._steps.append(_operation(call, self._form(args), dict(kwargs), made is out))
        for x in made:
            # One that has a number, as it was changed in place, gets another.
            self._numbers[id(x)] = self._count
            self._count += 1

    def note_launch(self, one: Launch, compiled: Any) -> None:
        # A launcher takes what its kernel's signature names: all arguments, constants too, since
        # Triton 3.3. The interpreter has none. On AMD, kernels depend on the sizes of storages too.
        order = tuple(getattr(one.kernel, "arg_names", ()))
        named = order[len(one.arguments) :]
        signature = tuple(getattr(getattr(compiled, "src", None), "signature", ()))
        takes_all = bool(signature) and signature == order and set(named) <= one.options.keys()
        known = takes_all and self._knows((one.arguments, one.options))
        self._complete = self._complete and known and torch.version.hip is None
        if not self._complete:
            return
        fill = self._form((*one.arguments, *(one.options[name] for name in named)))
        run = compiled[(*one.grid, 1, 1)[:3]]
        self._steps.append(lambda values: run(*fill(values)))

    def finish(self, result: Any) -> Script | bool:
        self._pack = itemgetter(0) if isinstance(result, Tensor) else type(result)
        results = (result,) if isinstance(result, Tensor) else result
        if not self._complete or not self._knows(results):
            return False
        self._results = [self._numbers[id(x)] for x in results]
        self._alive, self._numbers = [], {}
        return self

    def _knows(self, args: Any) -> bool:
        """Whether all tensors in it are numbered: not, if one outlived an earlier call."""
        return all(id(x) in self._numbers for x in _tensors(args))

    def _form(self, args: tuple) -> Callable[[list], list]:
        """A function that writes a replay's tensors into these arguments."""
        blank: list[Any] = []
        places, lists = [], []
        for n, x in enumerate(args):
            is_list = isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x)
            if isinstance(x, Tensor):
                places.append((n, self._numbers[id(x)]))
            elif is_list:
                lists.append((n, self._form(tuple(x))))
            blank.append(None if is_list or isinstance(x, Tensor) else x)

        def fill(values: list) -> list:
            filled = blank.copy()
            for place, number in places:
                filled[place] = values[number]
            for place, inner in lists:
                filled[place] = inner(values)
            return filled

        return fill


def _tensors(args: Any) -> Iterator[Tensor]:
    if isinstance(args, Tensor):
        yield args
    elif isinstance(args, (tuple, list, dict)):
        for x in args.values() if isinstance(args, dict) else args:
            yield from _tensors(x)


# Steps are made by functions of their own: a closure would keep what else its maker has, tensors.


def _operation(
    call: Callable, fill: Callable[[list], list], options: dict[str, Any], several: bool
) -> Callable[[list], None]:
    if several:
        return lambda values: values.extend(call(*fill(values), **options))
    return lambda values: values.append(call(*fill(values), **options))


def _allocation(like: Tensor) -> Callable[[list], None]:
    size, stride = tuple(like.shape), like.stride()
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return lambda values: values.append(torch.empty_strided(size, stride, **options))


class _Operations(TorchDispatchMode):
    """Adds PyTorch's operations to a script. (Launches add themselves.)"""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would import its compiler to keep it away: a second and more

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        witness.script = None  # what an operation launches is its own affair
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            witness.script = self._script
        self._script.note_operation(func, args, kwargs or {}, out)
        return out
