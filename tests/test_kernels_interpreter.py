"""The Triton kernels in Triton's interpreter, on a CPU, against the float64 loop.

The interpreter is chosen when a kernel is defined, for the whole process: one that other tests
share would hand them interpreted kernels too. So this file runs itself once as a program, which
works all cases and prints their errors, and the tests look at those.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import pairwise

import pytest

GATES = ("none", "[H]", "[H,K]", "[B,T,H]", "[B,T,H,K]")
PACKED = (0, 1, 30, 95, 160)


def cases() -> dict[str, dict]:
    """Arguments of kernel_cases.Case by name."""
    found: dict[str, dict] = {}
    for gate in GATES:
        found[f"{gate} ragged, grouped, K != V"] = {"gate": gate, "T": 70, "K": 20, "V": 24}
        found[f"{gate} bonus"] = {"gate": gate, "T": 37, "bonus": True, "lowest": -5.0}
        found[f"{gate} packed"] = {"gate": gate, "T": 160, "H": 1, "cu_seqlens": PACKED}
        found[f"{gate} no state"] = {"gate": gate, "T": 33, "B": 2, "state": False}
    # Not [H]: where both gates are hard, the sum over all tokens of gradients near 0 is rounding.
    for gate in GATES[2:]:
        found[f"{gate} hard"] = {"gate": gate, "T": 100, "H": 2, "Hk": 2, "lowest": -50.0}
    for gate in ("none", "[B,T,H]", "[B,T,H,K]"):
        found[f"{gate} split"] = {"gate": gate, "T": 600, "H": 1, "split": True}
    for gate in ("[B,T,H]", "[B,T,H,K]"):
        split = {"T": 400, "H": 1, "cu_seqlens": (0, 1, 300, 301, 400), "split": True}
        found[f"{gate} split and packed"] = {"gate": gate, **split}
        found[f"{gate} one token"] = {"gate": gate, "T": 1}
        found[f"{gate} bfloat16"] = {"gate": gate, "T": 70, "dtype": "bfloat16", "H": 1}
    empty = {"T": 300, "H": 1, "cu_seqlens": (0, 0, 30, 30, 30, 290, 300, 300)}
    for gate in ("none", "[H]", "[B,T,H]", "[B,T,H,K]"):
        found[f"{gate} empty sequences"] = {"gate": gate, **empty}
        found[f"{gate} empty sequences, split"] = {"gate": gate, **empty, "split": True}
    shared = {"dtype": "bfloat16", "K": 20, "V": 24}  # keys: a backward pass of their own
    found["[H] shared, bfloat16"] = {"gate": "[H]", "T": 150, "H": 4, "Hk": 2, **shared}
    found["[B,T,H] shared, bfloat16, hard"] = {
        "gate": "[B,T,H]",
        "T": 100,
        "lowest": -50.0,
        **shared,
    }
    for name, offsets in (("split", None), ("split and packed", (0, 1, 300, 301, 400))):
        split = {"gate": "[B,T,H]", "T": 400, "cu_seqlens": offsets, "split": True}
        found[f"[B,T,H] shared, bfloat16, {name}"] = {**split, **shared}
    for gate in GATES:  # programs that share out the contracted channels, unevenly
        sliced = {"gate": gate, "K": 20, "V": 24, "sliced": True}
        found[f"{gate} sliced"] = {**sliced, "T": 70}
        found[f"{gate} sliced, bonus"] = {**sliced, "T": 37, "bonus": True, "H": 1}
    for gate in ("none", "[H,K]", "[B,T,H]", "[B,T,H,K]"):
        split = {"T": 400, "H": 1, "cu_seqlens": (0, 1, 300, 301, 400), "split": True}
        found[f"{gate} sliced, split and packed"] = {
            "gate": gate, **split, "K": 20, "V": 24, "sliced": True,
        }  # fmt: skip
    # And where that is the choice for heads so wide and so few.
    wide = {"T": 50, "H": 1, "dtype": "bfloat16", "lowest": -5.0, "processors": 132}
    found["[B,T,H,K] wide values, bfloat16"] = {"gate": "[B,T,H,K]", **wide, "K": 16, "V": 150}
    found["[B,T,H,K] wide keys, bfloat16"] = {"gate": "[B,T,H,K]", **wide, "K": 150, "V": 16}
    found["[B,T,H] wide values, bfloat16"] = {"gate": "[B,T,H]", **wide, "K": 16, "V": 150}
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", cases())
def test_equal_to_the_loop(interpreted, name):
    allowed = 2**-8 if "bfloat16" in name else 1e-5  # a rounding to bfloat16 errs by half of that
    wrong = {what: error for what, error in interpreted[name].items() if not error <= allowed}
    assert not wrong, f"relative errors above {allowed}: {wrong}"


def test_segments_of_packed_sequences(interpreted):
    assert interpreted["segments"] == {"wrong": [], "outside": []}


@pytest.mark.parametrize("gate", GATES[1:])
def test_a_gate_that_is_no_number_is_not_taken_to_forget(interpreted, gate):
    assert interpreted[f"{gate} with NaN"] == {"shown": True}


@pytest.mark.parametrize("gate", GATES)
def test_a_token_of_each_row_may_lie_anywhere(interpreted, gate):
    assert interpreted[f"{gate} one token, time first"] == {"equal": True}


def test_packed_results_hold_nothing_that_was_in_memory(interpreted):
    assert interpreted["old memory"] == {"hidden": True}


def test_a_scale_of_next_to_nothing_spoils_no_gradient(interpreted):
    assert interpreted["tiny scale"] == {"equal": True}


def test_no_state_has_no_gradient(interpreted):
    """Of a thousand packed sequences it would be a gigabyte that nobody asked for."""
    assert interpreted["no state"] == {"numbers": [0, 0]}


def test_views_whose_heads_lie_too_far_apart_are_copied():
    """As of [B,H,T,K] with more than 2^31 elements."""
    import torch

    from subquad.engines.matrix.gpu.passes import strided

    near, far = (torch.empty(1, 16, n, 128, device="meta").transpose(1, 2) for n in (2**19, 2**21))
    assert strided(near) is near
    assert strided(far).stride() == (2**21 * 16 * 128, 16 * 128, 128, 1)


def test_reasons_to_decline():
    import torch

    from subquad.engines.matrix.gpu import scan as matrix

    q = torch.zeros(1, 2, 1, 16)
    assert "CUDA" in matrix.supported(q, q, q)


def test_the_kernels_are_named():
    import torch

    from subquad.engines.matrix.gpu import scan as matrix

    q = torch.zeros(1, 70, 1, 128, dtype=torch.bfloat16)
    v, gate = torch.zeros(1, 70, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 70, 4)
    told = matrix.describe(q, q, v, gate)
    assert told.startswith("scan (decay per head): chunks of 32 tokens")
    assert told.endswith("backward by chunks of 64 for heads that share keys")
    assert "share" not in matrix.describe(q, q, v, gate, torch.zeros(4, 128))
    assert "share" not in matrix.describe(q, q, v[:, :, :1], gate[:, :, :1])


def test_slices_are_told_where_they_run(monkeypatch):
    import torch

    from subquad.engines.matrix.gpu import layout, passes
    from subquad.engines.matrix.gpu import scan as matrix

    monkeypatch.setattr(layout, "processors", lambda device: 132)
    k, v = torch.zeros(1, 320, 1, 256), torch.zeros(1, 320, 1, 64)
    for sequences, sliced in ((1, True), (131, True), (132, False)):
        cu_seqlens = torch.arange(sequences + 1)
        plan = passes.plan(k, v, None, cu_seqlens, [])
        told = matrix.describe(k, k, v, cu_seqlens=cu_seqlens)
        assert (plan.value_tiles.slices == 2) == sliced == ("2 slices" in told)


def main() -> None:
    import triton_interpreter  # noqa: F401, I001 - before anything that imports Triton
    import torch
    from kernel_cases import Case, errors, kernels, oracle, results, shows_nan
    from subquad.engines.matrix.gpu import layout, scan as matrix, passes

    whole = layout.SHORTEST_SEGMENT, layout.WARPS_PER_PROCESSOR
    share_out = passes.share_out
    found = {}
    for name, arguments in cases().items():
        slices = {"slices": 2} if arguments.pop("sliced", False) else {}
        passes.share_out = lambda *shape, more=slices: share_out(*shape)._replace(**more)
        count = arguments.pop("processors", 1)
        layout.processors = lambda device, count=count: count
        split = arguments.pop("split", False)
        layout.SHORTEST_SEGMENT, layout.WARPS_PER_PROCESSOR = (256, 256) if split else whole
        if "dtype" in arguments:
            arguments["dtype"] = getattr(torch, arguments["dtype"])
        case = Case(**arguments)
        truth = results(oracle, case, "cpu", torch.float64)
        found[name] = errors(results(kernels, case, "cpu"), truth)
    passes.share_out, layout.processors = share_out, lambda device: 1
    for gate in ("none", "[B,T,H,K]"):  # raises where the fake or the gradient is not as promised
        inputs = Case(gate, T=20).inputs("cpu").values()
        leaves = [None if x is None else x.requires_grad_() for x in inputs]
        torch.library.opcheck(matrix.scan_forward.op, (*leaves, None, 0.3))
    found["tiny scale"] = {"equal": does_not_divide_by_scale(1e-42)}
    found["old memory"] = {"hidden": shows_no_old_memory()}
    for gate in GATES:
        found[f"{gate} one token, time first"] = {"equal": does_not_mind_strides(gate)}
        if gate != "none":
            found[f"{gate} with NaN"] = {"shown": shows_nan(gate, "cpu")}
    found["segments"] = {
        "wrong": [str(ends) for ends in boundaries() if not are_cut_well(*ends)],
        "outside": [str(ends) for ends in wrong_boundaries() if not stay_inside(*ends)],
    }
    found["no state"] = {
        "numbers": [numbers_of_no_state(dtype) for dtype in ("bfloat16", "float32")]
    }
    print(json.dumps(found))


def does_not_divide_by_scale(scale: float) -> bool:
    """Whether what reaches the final state has the gradients that it has at any scale."""
    import torch

    from kernel_cases import Case
    from subquad.engines.matrix.gpu import scan as matrix

    def gradients(scale):
        inputs = Case("[B,T,H]", T=33).inputs("cpu")
        q, k, v, gate, _, state = inputs.values()
        leaves = [x.requires_grad_() for x in (k, v, gate, state)]
        o, final = matrix.linear_recurrence(q, k, v, gate, None, scale, state)
        return torch.autograd.grad(o.sum() + final.square().sum(), leaves)

    return all(map(torch.allclose, gradients(scale), gradients(0.0)))


def shows_no_old_memory() -> bool:
    """Whether the forward pass writes all of its results where sequences have fewer boundaries
    between segments than there is room for."""
    import torch

    from kernel_cases import Case
    from subquad.engines.matrix.gpu import layout
    from subquad.engines.matrix.gpu import scan as matrix

    case = Case("[B,T,H]", T=300, H=1, cu_seqlens=(0, 100, 300))
    layout.SHORTEST_SEGMENT, layout.WARPS_PER_PROCESSOR = 256, 256
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        results = matrix.scan_forward(*case.inputs("cpu").values(), case.offsets("cpu"), 0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert results[2].numel()
    return all(x.isfinite().all().item() for x in results)


def does_not_mind_strides(gate: str) -> bool:
    """Whether one token of two rows has the same results where the rows lie as if time came first.

    PyTorch calls such tensors contiguous: the stride along an axis of size 1 does not count.
    """
    import torch

    from kernel_cases import Case, kernels

    case = Case(gate, T=1, B=2)

    def run(lay):
        leaves = [
            None if x is None else lay(x).requires_grad_() for x in case.inputs("cpu").values()
        ]
        o, final = kernels(*leaves, None)
        (o.square().sum() + final.square().sum()).backward()
        return [o, final, *(x.grad for x in leaves if x is not None)]

    def time_first(x):
        if x.shape[:2] != (2, 1):
            return x
        return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)

    q = case.inputs("cpu")["q"]
    assert time_first(q).is_contiguous() and time_first(q).stride() != q.stride()
    return all(map(torch.equal, run(time_first), run(lambda x: x)))


def numbers_of_no_state(dtype: str) -> int:
    """How many numbers the gradient of an absent state has; opcheck compares the fake's results."""
    import torch

    from kernel_cases import Case
    from subquad.engines.matrix.gpu import scan as matrix

    case = Case("[B,T,H]", T=33, state=False, dtype=getattr(torch, dtype))
    q, k, v, gate, *_ = case.inputs("cpu").values()
    _, _, states = matrix.scan_forward(q, k, v, gate, None, None, None, 0.3)
    args = (v, None, q, k, v, gate, None, None, states, None, 0.3, True)
    torch.library.opcheck(matrix.scan_backward.op, args, test_utils="test_faketensor")
    return matrix.scan_backward(*args)[-1].numel()


def boundaries() -> list[tuple[list[int], int]]:
    """Ends of packed sequences, some of them empty, and the tokens of a segment."""
    draw = random.Random(0)
    few = [sorted(draw.choices(range(700), k=n)) for n in (0, 1, 2, 9, 40)]
    many = [sorted(draw.choices(range(700), k=1500))]  # more than a program looks at in one go
    return [([0, *ends, 700], length) for ends in few + many for length in (64, 256, 768)]


def wrong_boundaries() -> list[tuple[list[int], int]]:
    """Ends that go back and forth and beyond the 700 tokens, and the tokens of a segment."""
    draw = random.Random(0)
    ends = [[0, 700, 0, 700], [65, -(2**63), 650]]
    ends += ([draw.randint(-5, 1400) for _ in range(n)] for n in (2, 5, 9))
    return [(some, length) for some in ends for length in (32, 256, 768)]


def stay_inside(ends: list[int], length: int) -> bool:
    """Whether wrong boundaries cut each token once, and nothing beyond the tokens and chunks."""
    import torch

    from subquad.backend.gpu.launch import launch
    from subquad.engines.matrix.gpu import layout

    chunk, tokens, queue = 32, 700, []
    found = layout.lay_out(1, tokens, length, torch.tensor(ends), chunk, queue)
    launch(queue)
    begin, size, first, *_ = found.table[found.table[:, 1] > 0].unbind(1)
    chunks = -(-tokens // chunk) + len(ends) - 2
    inside = (first + -(-size // chunk) <= chunks).all() and found.offsets.max() <= found.segments
    edges = torch.tensor([0]), begin + size, begin, torch.tensor([tokens])
    return bool(inside and torch.equal(torch.cat(edges[:2]), torch.cat(edges[2:])))


def are_cut_well(ends: list[int], length: int) -> bool:
    """Whether the kernels' table of segments is the one that a loop finds."""
    import torch

    from subquad.backend.gpu.launch import launch
    from subquad.engines.matrix.gpu import layout

    chunk, queue = 32, []
    spread = torch.tensor(ends, dtype=torch.int32).repeat_interleave(2)[::2]
    found = layout.lay_out(1, ends[-1], length, spread, chunk, queue)
    launch(queue)
    rows, offsets, chunks = [], [0], 0
    for number, (begin, end) in enumerate(pairwise(ends)):
        for at in range(begin, max(end, begin + 1), length):
            place = (at == begin) + 2 * (at + length >= end)  # first, last
            chunk_here = chunks + (at - begin) // chunk
            rows.append([at, min(length, end - at), chunk_here, number, place])
        offsets.append(len(rows))
        chunks += -(-(end - begin) // chunk)
    left_over = found.table[len(rows) :, [1, 3, 4]]
    return (
        found.offsets.tolist() == offsets
        and found.table[: len(rows)].tolist() == rows
        and (left_over == torch.tensor([0, -1, 3])).all().item()
    )


if __name__ == "__main__":
    main()
