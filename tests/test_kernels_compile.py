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
from subquad.kernels import launch, matrix

compiled = []

def compile_only(launches):
    launch._compile(launches)
    for one in launches:  # what _compile did not compile would be compiled here
        kernel = one.kernel.warmup(*one.arguments, grid=one.grid, **one.options)
        compiled.append(kernel.asm["ptx"].count("wgmma"))

matrix.launch = compile_only
q, k, v = torch.randn(3, 1, 64, 2, 64, dtype=torch.bfloat16).requires_grad_().unbind(0)
o, _ = matrix.linear_recurrence(q, k, v)
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
    # Four kernels, one of them in the forward pass and three side by side in the backward pass.
    assert done.stdout.split() == ["4", "True", "4", "3"], done.stdout


def test_launches_run_in_order_and_new_ones_are_met_once():
    from subquad.kernels.launch import Launch, _met, launch

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
