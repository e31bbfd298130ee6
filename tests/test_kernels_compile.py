"""The scan's kernels compile for Hopper without a GPU, those of one pass side by side."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import threading

import torch
import triton
from triton.backends.compiler import GPUTarget

compiler, threads = triton.compiler.compile, []

def note_thread(*arguments, **options):
    threads.append(threading.current_thread().name)
    return compiler(*arguments, **options)

triton.compiler.compile = note_thread

class Driver:  # what Triton asks of one before it launches anything
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

triton.runtime.driver.set_active(Driver())
from subquad.backend.gpu import launch
from subquad.engines.matrix.gpu import scan as matrix, shared_keys as shared

compiled = []

def compile_only(launches):
    launch._compile(launches)
    for one in launches:  # what _compile did not compile would be compiled here
        kernel = one.kernel.warmup(*one.arguments, grid=one.grid, **one.options)
        sums = one.kernel.__name__ == "sum_head_gates"  # which multiplies nothing
        compiled.append(sums or kernel.asm["ptx"].count("wgmma"))

matrix.launch = shared.launch = compile_only
for heads in (2, 4):  # keys of their own, and shared ones with gates
    q, k, v = (torch.randn(1, 64, n, 64, dtype=torch.bfloat16) for n in (2, 2, heads))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gate = torch.zeros(1, 64, heads, requires_grad=True) if heads > 2 else None
    o, _ = matrix.linear_recurrence(*leaves, gate)
    o.sum().backward()
    print(len(compiled), all(compiled), len(threads), sum("Pool" in name for name in threads))
"""


def test_forward_and_backward_compile_for_hopper(tmp_path):
    pytest.importorskip("triton")
    environment = {
        **{name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Without gates one kernel, then three side by side; with gates two, then five, their sums too.
    assert done.stdout.splitlines() == ["4 True 4 3", "11 True 11 10"], done.stdout


BESIDE = """
from subquad.engines.cross_entropy import gpu as loss
from subquad.engines.gates import gpu as activation

def compile_only(kernel, grid, *arguments, **options):
    ptx = kernel.warmup(*arguments, grid=grid, **options).asm["ptx"]
    wide = "ld.global.v4" in ptx and ("st.global.v4" in ptx or kernel.__name__ == "forward")
    print(kernel.__name__, wide)

activation.launch_one = loss.launch_one = compile_only
gate, up = torch.randn(2, 3, 5632, dtype=torch.bfloat16, requires_grad=True).chunk(2, -1)
activation.silu_product(gate, up).sum().backward()
activation.log_sigmoid(gate, 0.25).sum().backward()
logits = torch.randn(2, 3, 32000, dtype=torch.bfloat16, requires_grad=True)
losses, _ = loss.cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64))
losses.sum().backward()
"""


def test_kernels_of_gates_and_losses_compile_for_hopper(tmp_path):
    """And read and write 16 bytes at a time."""
    pytest.importorskip("triton")
    environment = {
        **{name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    program = PROGRAM.partition("from subquad")[0] + BESIDE  # with its driver
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    names = "silu_product", "log_sigmoid"
    found = [f"{name}{half} True" for name in names for half in ("", "_backward")]
    assert done.stdout.splitlines() == [*found, "forward True", "backward True"], done.stdout


def test_launches_run_in_order_and_new_ones_are_met_once():
    from subquad.backend.gpu.launch import Launch, _met, launch

    ran = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: ran.append((grid, arguments, options))

    kernel = Kernel()
    jobs = [Launch(kernel, (n,), (n,), {"C": n % 2}) for n in (3, 1, 2)]
    before = len(_met)
    launch(jobs)
    launch(jobs)
    assert [grid for grid, _, _ in ran] == [(3,), (1,), (2,)] * 2
    assert ran[0] == ((3,), (3,), {"C": 1})
    assert len(_met) == before + 2  # two of the three are one kernel


def test_after_a_compilation_that_failed_others_are_tried():
    triton = pytest.importorskip("triton")
    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip("kernels are compiled by their launches")
    from triton.runtime._async_compile import active_mode

    from subquad.backend.gpu.launch import Launch, launch

    class Kernel(triton.JITFunction):
        __hash__ = object.__hash__

        def __init__(self):
            pass

        def warmup(self, grid):
            active_mode.get().submit(self, self.fail, None)

        def fail(self):
            raise OSError("no space left on device")

    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            launch([Launch(Kernel(), (1,), (), {}) for _ in range(2)])
    assert active_mode.get() is None
