"""Calls replayed from a script: the same results, without running the function."""

import gc
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from subquad.backend.gpu import launch_cache as replay
from subquad.backend.gpu.launch import launch_one, witness
from subquad.backend.gpu.launch_cache import replayed
from subquad.engines.runtime.operator import operator


class Kernel:
    """y = factor * x + z for tensors on the CPU, as a Triton kernel looks from outside."""

    arg_names = signature = ("x", "z", "y", "factor", "ADD", "SCALE")

    def __init__(self, compiles=True):
        self.grids, self.compiles = [], compiles

    def __getitem__(self, grid):
        def run(*args, num_warps=4, **options):
            self.grids.append(grid)
            x, z, y, factor, add, scale = (
                *args,
                *(options[n] for n in Kernel.arg_names[len(args) :]),
            )
            with _disable_current_modes():  # PyTorch sees nothing of what a kernel does
                y.copy_(factor * x * scale + (z if add else 0))
            return Compiled(self) if self.compiles else None

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
        self.src = SimpleNamespace(signature=dict.fromkeys(kernel.signature))

    def __getitem__(self, grid):
        assert len(grid) == 3
        return self.kernel[grid]


@pytest.fixture
def work():
    """A replayed function, its kernel, and what its Python was called with."""
    kernel, calls = Kernel(), []

    @replayed
    def function(x, z, factor, cut):
        calls.append(factor)
        y = torch.empty_like(x)
        wide = x.new_empty(x.shape[0], 2 * x.shape[1], dtype=torch.float32)
        absent = x if z is None else z
        launch_one(
            kernel, (x.shape[0],), x.contiguous(), absent, y, factor, ADD=z is not None, SCALE=2,
            num_warps=8,
        )  # fmt: skip
        wide.copy_(torch.cat([y, x], dim=1))
        index = torch.arange(cut, device=x.device)
        return y, wide.sum(0).to(x.dtype), torch.stack([y[index], x[:cut]]).mean(dim=0)

    def expected(x, z, factor, cut):
        y = (factor * x * 2 + (0 if z is None else z)).to(x.dtype)
        sums = torch.cat([y, x], dim=1).float().sum(0).to(x.dtype)
        return y, sums, torch.stack([y[:cut], x[:cut]]).mean(dim=0)

    def check(*args):
        found, wanted = function(*args), expected(*args)
        assert type(found) is tuple
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype

    check.calls, check.kernel, check.function = calls, kernel, function
    return check


def test_the_third_call_of_a_kind_is_replayed(work):
    for _ in range(5):
        work(torch.randn(6, 3), torch.randn(6, 3), 1.5, 2)
    assert len(work.calls) == 2 and len(work.kernel.grids) == 5
    assert work.kernel.grids[0] == (6,) and work.kernel.grids[-1] == (6, 1, 1)


def test_a_list_of_results_stays_one():
    both = replayed(lambda x: [x + 1, x.new_zeros(2)])
    for _ in range(3):
        found = both(torch.ones(3))
        assert type(found) is list and found[0].tolist() == [2, 2, 2] and not found[1].any()


aten = torch.ops.aten
BOUND = {  # arguments, and keywords, as a dispatch mode tells them
    aten.view.default: [(([2, -1],), {})],
    aten.t.default: [((), {})],
    aten.select.int: [((1, 2), {})],
    aten.unbind.int: [((), {}), ((1,), {})],
    aten.sum.dim_IntList: [(([0],), {}), (([1], True), {}), (([0],), {"dtype": torch.float64})],
    aten.copy_.default: [((torch.ones(6, 4),), {})],
    aten._to_copy.default: [((), {"dtype": torch.bfloat16}), ((), {"dtype": torch.float32})],
}


def test_bindings_are_the_operations_that_they_stand_for():
    class Told(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            told.append((func, args[1:], kwargs))
            return func(*args, **(kwargs or {}))

    assert BOUND.keys() == replay._BINDINGS.keys()
    for operation, calls in BOUND.items():
        for args, options in calls:
            told, x = [], torch.randn(6, 4)
            with Told():
                replay._BINDINGS[operation](x, *args, **options)
            assert told == [(operation, args, options)]


@pytest.mark.parametrize(
    "other",
    [
        (torch.randn(7, 3), torch.randn(7, 3), 1.5, 2),
        (torch.randn(3, 6).t(), torch.randn(6, 3), 1.5, 2),
        (torch.randn(6, 3).double(), torch.randn(6, 3).double(), 1.5, 2),
        (torch.randn(19)[1:].view(6, 3), torch.randn(6, 3), 1.5, 2),
        (torch.randn(6, 3), None, 1.5, 2),
        (torch.randn(6, 3), torch.randn(6, 3), 2.5, 2),
        (torch.randn(6, 3), torch.randn(6, 3), 2, 2),
        (torch.randn(6, 3), torch.randn(6, 3), 1.5, 4),
    ],
    ids=["shape", "stride", "dtype", "alignment", "absent", "number", "integer", "cut"],
)
def test_another_kind_is_not_mistaken(work, other):
    for _ in range(3):
        work(torch.randn(6, 3), torch.randn(6, 3), 1.5, 2)
    before = len(work.calls)
    work(*other)
    assert len(work.calls) == before + 1
    for _ in range(3):
        work(*other)
        work(torch.randn(6, 3), torch.randn(6, 3), 1.5, 2)
    assert len(work.calls) == before + 2


def test_a_tensor_given_twice_is_no_model_for_two(work):
    x = torch.randn(6, 3)
    for _ in range(3):
        work(x, x, 1.0, 2)
    for _ in range(3):
        work(torch.randn(6, 3), torch.randn(6, 3), 1.0, 2)
        work(x, x, 1.0, 2)
    assert len(work.calls) == 4  # three that could not be recorded, and one that was


def test_what_depends_on_values_runs_anew():
    @replayed
    def function(x):
        return x * int(x.sum().item())

    for n in range(5):
        assert torch.equal(function(torch.full((2,), n)), torch.full((2,), 2 * n * n))


def test_what_depends_on_types_alone_is_replayed():
    calls = []

    @replayed
    def function(x, dtype):
        calls.append(dtype)
        return x.to(torch.promote_types(x.dtype, dtype))

    for _ in range(4):
        assert function(torch.ones(2), torch.float64).dtype == torch.float64
    assert len(calls) == 2


def test_what_takes_a_tensor_from_elsewhere_runs_anew():
    kept = []

    @replayed
    def function(x):
        kept.append(x.clone())
        return x + kept[-2] if len(kept) > 1 else x.clone()

    for n in range(6):
        assert torch.equal(function(torch.tensor([2.0**n])), torch.tensor([2.0**n + 2.0**n // 2]))


def test_numbers_of_other_types_are_of_another_kind():
    given = []

    @replayed
    def function(x, number):
        given.append(type(number))
        return x * number

    for _ in range(3):
        for number in (1, 1.0, True):
            function(torch.ones(2), number)
    assert given == 2 * [int, float, bool]


def test_a_launch_that_takes_a_tensor_from_elsewhere_runs_anew():
    kernel, kept = Kernel(), torch.ones(3)

    @replayed
    def function(x):
        y = torch.empty_like(x)
        launch_one(kernel, (1,), x, kept, y, 1.0, ADD=True, SCALE=1)
        return y

    for n in range(5):
        kept = torch.full((3,), n)
        assert torch.equal(function(torch.ones(3)), torch.full((3,), n + 1.0))


def test_a_result_from_elsewhere_is_returned_anew():
    kept = None
    function = replayed(lambda x: kept)
    for n in range(4):
        kept = torch.tensor(n)
        assert function(torch.ones(1)) is kept


def test_a_launch_that_leaves_an_argument_to_its_kernel_runs_anew(work):
    work.kernel.arg_names = work.kernel.signature = (*Kernel.arg_names, "DEFAULT")
    for _ in range(4):
        work(torch.randn(6, 3), None, 1.5, 2)
    assert len(work.calls) == 4


def test_a_kernel_that_is_not_compiled_is_launched_anew():
    kernel, calls = Kernel(compiles=False), []

    @replayed
    def function(x):
        calls.append(x)
        y = torch.empty_like(x)
        launch_one(kernel, (1,), x, x, y, 1.0, ADD=True, SCALE=1)
        return y

    for n in range(4):
        assert torch.equal(function(torch.full((3,), n)), torch.full((3,), 2 * n))
    assert len(calls) == 4


def test_a_launcher_that_takes_no_constants_is_called_by_triton(work):
    work.kernel.signature = work.kernel.arg_names[:4]  # as before Triton 3.3
    for _ in range(4):
        work(torch.randn(6, 3), None, 1.5, 2)
    assert len(work.calls) == 4


def test_nothing_is_launched_by_handle_on_amd(work, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")  # whose kernels depend on storages' sizes
    for _ in range(4):
        work(torch.randn(6, 3), None, 1.5, 2)
    assert len(work.calls) == 4


def test_a_mode_sees_the_operations(work):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    seen = set()
    for _ in range(3):
        work(torch.randn(6, 3), None, 1.5, 2)
    with Seen():
        work.function(torch.randn(6, 3), None, 1.5, 2)
    assert torch.ops.aten.cat.default in seen and len(work.calls) == 3


def test_an_operator_that_launches_is_one_step_of_another_function():
    kernel = Kernel()

    def launch_double(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        launch_one(kernel, (1,), x, x, y, 2.0, ADD=False, SCALE=1)
        return y

    inner = operator("subquad_tests::double")(replayed(launch_double))
    outer = replayed(lambda x: launch_double(inner(x)))
    for call in range(1, 7):
        x = torch.randn(3)
        assert torch.equal(outer(x), 4 * x) and len(kernel.grids) == 2 * call


def test_an_operation_that_is_given_its_result_runs_anew():
    @replayed
    def function(x):
        y = torch.empty_like(x)
        torch.add(x, x, out=y)
        return y

    for _ in range(4):
        x = torch.randn(3)
        assert torch.equal(function(x), 2 * x)


def test_changes_in_place_are_replayed():
    @replayed
    def function(x, state):
        state.mul_(2).add_(x)
        return state + 1

    state = torch.zeros(3)
    for n in range(1, 5):
        assert torch.equal(function(torch.ones(3), state), torch.full((3,), 2.0**n))


def test_a_recording_says_nothing_about_gradients(work):
    with torch.inference_mode():
        for _ in range(3):
            work(torch.randn(6, 3), None, 1.5, 2)
    for result in work.function(torch.randn(6, 3), None, 1.5, 2):
        assert not result.is_inference() and not result.requires_grad
    with torch.inference_mode():
        assert work.function(torch.randn(6, 3), None, 1.5, 2)[0].is_inference()
    assert len(work.calls) == 2


def test_a_single_result_and_memory_of_another_order():
    @replayed
    def function(x):
        y = torch.empty_strided((2, 3), (1, 2), dtype=x.dtype)
        return y.copy_(x)

    for _ in range(4):
        x = torch.randn(2, 3)
        y = function(x)
        assert torch.equal(y, x) and y.stride() == (1, 2)


def test_memory_keeps_strides_that_address_nothing():
    @replayed
    def function(x):
        return torch.empty_like(x).copy_(x)

    for _ in range(4):
        x = torch.randn(5, 3).as_strided((1, 5, 3), (7, 3, 1))
        assert function(x).stride() == (7, 3, 1)


def test_a_failure_while_recording_leaves_nothing_behind(work):
    @replayed
    def function(x, size):
        return x.view(size, -1)

    for _ in range(4):
        with pytest.raises(RuntimeError):
            function(torch.randn(6), 4)
    assert getattr(witness, "script", None) is None
    for _ in range(3):
        work(torch.randn(6, 3), None, 1.5, 2)


def test_the_oldest_kinds_are_forgotten(work, monkeypatch):
    monkeypatch.setattr(replay, "KINDS", 4)
    for _ in range(3):
        for rows in range(2, 8):
            work(torch.randn(rows, 3), None, 1.5, 2)
    assert len(work.calls) == 18
    for _ in range(3):
        work(torch.randn(7, 3), None, 1.5, 2)
    assert len(work.calls) == 19


def test_threads_forget_kinds_side_by_side():
    nothing, failures = replayed(lambda number: None), []

    def work(first):
        for number in range(first, 50_000, 4):
            try:
                nothing(number)
            except RuntimeError as failure:
                failures.append(failure)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def test_nothing_is_kept_of_a_call(work):
    for _ in range(2):  # what Python and PyTorch set up once
        work(torch.randn(5, 3), torch.randn(5, 3), 1.5, 2)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
        for _ in range(4):
            work.function(torch.randn(6, 3), torch.randn(6, 3), 1.5, 2)
            assert sum(isinstance(x, torch.Tensor) for x in gc.get_objects()) == before
    finally:
        gc.enable()


def test_recording_does_not_import_the_compiler():
    program = """
import sys, torch
from subquad.backend.gpu.launch_cache import replayed
double = replayed(lambda x: x * 2)
for n in range(4):
    assert double(torch.full((2,), n)).tolist() == [2 * n, 2 * n]
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_autocast_is_a_kind_of_its_own(monkeypatch):
    calls = []

    @replayed
    def function(x):
        calls.append(x)
        return x + 1

    for enabled in (False, True):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device, now=enabled: now)
        for _ in range(3):
            function(torch.ones(2))
    assert len(calls) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calls_on_a_device_are_replayed(monkeypatch):
    from subquad.engines.matrix.gpu import scan as matrix

    played, play = [], replay.Script.play
    monkeypatch.setattr(
        replay.Script, "play", lambda script, args: played.append(script) or play(script, args)
    )
    leaves = [torch.randn(1, 70, 3, 64, device="cuda", requires_grad=True) for _ in range(3)]
    for _ in range(3):
        o, _ = matrix.linear_recurrence(*leaves, -torch.rand(1, 70, 3, device="cuda"))
        torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert len(played) == 2  # forward and backward
