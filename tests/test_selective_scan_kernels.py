"""The selective scan's Triton kernels against the plain PyTorch scan in float64.

On a GPU with `pytest -m gpu`. On a CPU in Triton's interpreter, which is chosen for a whole
process: so this file runs itself once as a program that prints the errors of all cases.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

NAMES = ("y", "last", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate")
CASES = {  # rows, T, D, N, bounds of packed sequences
    "one tile": (2, 7, 5, 4, None),
    "tiles": (2, 40, 5, 3, None),
    "whole tiles": (1, 64, 3, 16, None),
    "one token": (2, 1, 3, 2, None),
    "packed": (1, 38, 5, 4, [0, 1, 3, 35, 38]),
    "wide state": (1, 33, 2, 70, None),
}
GPU_CASES = CASES | {
    "long": (3, 1000, 256, 16, None),
    "wide": (64, 100, 2048, 16, None),
    "packed and long": (1, 5000, 128, 16, [0, 1, 33, 2000, 2032, 5000]),
}


def inputs(rows, T, D, N, bounds, device="cpu"):
    """Float32 tensors, with steps dt A of 0, -0.001 and -50 mixed."""
    torch.manual_seed(rows * T)
    A = -torch.rand(D, N) - 0.1
    A[0] = 0.0
    dt = torch.tensor([1e-9, 1e-3, 0.1, 1.0, 50.0])[torch.randint(0, 5, (rows, T, D))]
    S = len(bounds) - 1 if bounds else rows
    shapes = [(rows, T, N), (rows, T, N), (D,), (S, D, N)]
    tensors = [torch.randn(rows, T, D), dt, A, *(torch.randn(shape) for shape in shapes)]
    tensors = [t.mT.contiguous().mT if t.ndim == 3 else t for t in tensors]  # channels lie apart
    # Every other number, as a view: nobody promised that the bounds lie side by side.
    cu_seqlens = torch.tensor(bounds, device=device).repeat_interleave(2)[::2] if bounds else None
    return [t.to(device) for t in tensors], cu_seqlens


def results(module, tensors, cu_seqlens):
    """Outputs and all gradients, by name."""
    y, last, checkpoints = module.forward(*tensors, cu_seqlens, True)
    torch.manual_seed(1)
    dy, dlast = (torch.randn(t.shape).to(t) for t in (y, last))
    gradients = module.backward(dy, dlast, *tensors, cu_seqlens, checkpoints)
    return dict(zip(NAMES, (y, last, *gradients)))


def errors(case, device="cpu"):
    """The largest error of each result over its largest number."""
    from subquad.engines.selective import gpu as selective_scan_gpu
    from subquad.engines.selective import pytorch as scan

    tensors, cu_seqlens = inputs(*case, device=device)
    want = results(scan, [t.double() for t in tensors], cu_seqlens)
    got = results(selective_scan_gpu, tensors, cu_seqlens)
    again = results(selective_scan_gpu, tensors, cu_seqlens)
    assert all(torch.equal(got[name], again[name]) for name in NAMES)
    return {n: float((got[n] - want[n]).abs().max() / want[n].abs().max()) for n in NAMES}


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_scan_in_the_interpreter(interpreted, name):
    assert set(interpreted[name]) == set(NAMES)
    assert {n: e for n, e in interpreted[name].items() if not e <= 1e-5} == {}


def test_wrong_boundaries_reach_nothing_outside_and_leave_no_token_out(interpreted):
    assert interpreted["outside"] == []
    assert interpreted["old memory"] == []


def shows_no_old_memory(ends: list[int], tokens: int) -> bool:
    """Whether all results are written."""
    from subquad.engines.selective import gpu as selective_scan_gpu

    tensors, cu_seqlens = inputs(1, tokens, 5, 4, ends)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        found = results(selective_scan_gpu, tensors, cu_seqlens)
    finally:
        torch.use_deterministic_algorithms(False)
    return all(x.isfinite().all().item() for x in found.values())


def are_held_inside(ends: list[int], tokens: int) -> bool:
    """Whether a kernel finds every sequence inside the tokens that there are."""
    import triton

    from subquad.engines.selective.kernels import locate

    bounds = torch.tensor(ends)
    found = torch.empty(len(ends) - 1, 2, dtype=torch.int64)

    @triton.jit
    def tell(found, bounds, tokens, locate: triton.language.constexpr):
        s = triton.language.program_id(0)
        begin, length = locate(bounds, s, triton.language.num_programs(0), tokens, True)
        triton.language.store(found + 2 * s, begin)
        triton.language.store(found + 2 * s + 1, length)

    tell[(len(found),)](found, bounds, tokens, locate)
    begin, length = found.unbind(1)
    return bool(((begin >= 0) & (length >= 0) & (begin + length <= tokens)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_equal_to_the_scan_on_a_gpu(name):
    assert {n: e for n, e in errors(GPU_CASES[name], "cuda").items() if not e <= 1e-5} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_engine_takes_the_kernels_on_a_gpu(dtype):
    import subquad
    from subquad.engines import selective_scan

    (x, dt, A, B, C, D, _), _ = inputs(2, 50, 32, 16, None, "cuda")
    x, B, C = (t.to(dtype) for t in (x, B, C))
    with subquad.watch() as seen:
        y, last = selective_scan(x, dt, A, B, C, D)
    assert seen[0].impl == "triton" and y.dtype == dtype
    wide = [t.double() for t in (x, dt, A, B, C, D)]
    unit = torch.finfo(dtype).eps
    for found, want in zip((y, last), selective_scan(*wide, impl="torch"), strict=True):
        allowed = max(1e-5, unit if found.dtype == dtype else 0)
        assert (found - want).abs().max() <= allowed * want.abs().max()


def main() -> None:
    import triton_interpreter  # noqa: F401  (before Triton)
    from subquad.engines.selective import gpu as selective_scan_gpu

    # One program for all channels of a sequence, which adds to its share block by block.
    selective_scan_gpu._FEWEST_SHARES = selective_scan_gpu._PROGRAMS = 1
    found = {name: errors(case) for name, case in CASES.items()}
    wrong = [0, 50, -3, 38], [-7, 38], [9, 4, 30], [40, 50, 2**40, -(2**40), 38]
    found["outside"] = [str(ends) for ends in wrong if not are_held_inside(ends, 38)]
    found["old memory"] = [str(ends) for ends in wrong if not shows_no_old_memory(ends, 38)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
