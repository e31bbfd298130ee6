"""The Triton kernels on a CUDA device: `pytest -m gpu`. Float64 oracle, computed on the device.

The yardstick for 16 bit inputs is the chunked torch form under autocast: its products take the
same 16-bit operands. For float32 it is the contract's own 1e-5.
"""

import pytest
import torch

import subquad
from kernel_cases import Case, chunked_torch, draws, errors, kernels, oracle, results, shows_nan
from subquad.engines.matrix.gpu import layout
from subquad.engines.matrix.gpu import scan as matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GATES = ("none", "[H]", "[H,K]", "[B,T,H]", "[B,T,H,K]")
BF16, FP16 = torch.bfloat16, torch.float16
SIZES = [(16, 256), (256, 16), (256, 256), (80, 48), (20, 24), (192, 96)]
PACKED = (0, 1, 2, 66, 131, 132, 450)


def check(case: Case) -> None:
    truth = draws(oracle, case, "cuda", torch.float64)
    found = draws(kernels, case, "cuda")
    for _ in range(2):  # recorded and replayed, to the bit
        again = draws(kernels, case, "cuda")
        assert all(torch.equal(again[name], x) for name, x in found.items())
    ours = errors(found, truth)
    if case.dtype == torch.float32:
        allowed = dict.fromkeys(ours, 1e-5)
    else:
        with torch.autocast("cuda", case.dtype):
            theirs = errors(draws(chunked_torch, case, "cuda", torch.float32), truth)
        # Theirs may hit by chance; no product of 16-bit numbers promises less than one rounding.
        unit = torch.finfo(case.dtype).eps / 2
        allowed = {name: max(2 * error, unit) for name, error in theirs.items()}
    print(case)
    print("  " + " ".join(f"{n} {e:.1e}/{allowed[n]:.1e}" for n, e in ours.items()))
    wrong = {n: (e, allowed[n]) for n, e in ours.items() if not e <= allowed[n]}
    assert not wrong, f"(error, allowed): {wrong}"


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_and_type(gate, dtype):
    check(Case(gate, T=331, B=2, H=4, Hk=2, K=64, V=128, dtype=dtype))


@pytest.mark.parametrize("lowest", [-5.0, -50.0])
@pytest.mark.parametrize("gate", GATES[1:])
def test_hard_gates(gate, lowest):
    check(Case(gate, T=331, H=4, Hk=4, K=128, V=128, lowest=lowest, dtype=BF16))


@pytest.mark.parametrize("gate", GATES)
def test_bonus(gate):
    check(Case(gate, T=200, H=4, Hk=4, K=64, V=64, lowest=-5.0, bonus=True, dtype=BF16))


@pytest.mark.parametrize("gate", GATES)
def test_packed(gate):
    check(Case(gate, T=450, H=2, Hk=1, K=64, V=64, cu_seqlens=PACKED, dtype=BF16))


@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize("gate", ["[B,T,H]", "[B,T,H,K]"])
def test_sizes(gate, K, V):
    check(Case(gate, T=150, K=K, V=V, state=False, dtype=BF16))


@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 900, 901, 3000)])
@pytest.mark.parametrize("gate", GATES)
def test_wide_heads_that_leave_processors_idle(gate, cu_seqlens):
    check(Case(gate, T=3000, H=2, Hk=1, K=96, V=256, cu_seqlens=cu_seqlens, dtype=BF16))


@pytest.mark.parametrize(("K", "V"), [(96, 256), (256, 96)])
@pytest.mark.parametrize("gate", GATES)
def test_wide_heads_of_every_kind(gate, K, V):
    check(Case(gate, T=150, H=2, Hk=2, K=K, V=V, bonus=True, dtype=BF16))
    check(Case(gate, T=100, H=2, Hk=2, K=K, V=V, dtype=torch.float32))
    check(Case(gate, T=100, H=140, Hk=140, K=K, V=V, dtype=BF16))  # all processors are busy


@pytest.mark.parametrize("T", [1, 63, 64, 65, 257])
def test_lengths(T):
    check(Case("[B,T,H,K]", T=T, K=64, V=64, dtype=BF16))


@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 900, 901, 5000)])
@pytest.mark.parametrize("gate", GATES)
def test_split_sequences(gate, cu_seqlens):
    case = Case(gate, T=5000, H=1, K=64, V=64, cu_seqlens=cu_seqlens, dtype=BF16)
    assert layout.segment_length(1, 5000, 4, torch.device("cuda", 0)) < 5000
    check(case)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
@pytest.mark.parametrize("heads", [(8, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("gate", ["[H]", "[B,T,H]"])
def test_shared_keys(gate, heads, cu_seqlens):
    H, Hk = heads
    check(Case(gate, T=450, H=H, Hk=Hk, K=128, V=64, cu_seqlens=cu_seqlens, dtype=BF16))


@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 900, 901, 5000)])
def test_shared_keys_split(cu_seqlens):
    check(Case("[B,T,H]", T=5000, H=2, K=80, V=48, cu_seqlens=cu_seqlens, dtype=BF16))


def test_shared_keys_hard_gates():
    check(Case("[B,T,H]", T=331, H=4, Hk=2, K=128, V=64, lowest=-50.0, dtype=BF16))


@pytest.mark.slow
def test_more_elements_than_int32_counts():
    """The gates forget all but the last thousand tokens, so a call on those must agree."""
    for H, Hk, K, V in ((16, 16, 128, 128), (32, 1, 128, 64)):  # one at a time: 35 GiB each
        free, _ = torch.cuda.mem_get_info()
        if free < 45 * 2**30:
            pytest.skip("needs 45 GiB of free memory")
        agrees_at_the_end(H, Hk, K, V)


def agrees_at_the_end(H: int, Hk: int, K: int, V: int) -> None:
    tail, T = 8192, 2**31 // (H * V) + 4096
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": BF16}
    inputs = [torch.randn(1, T, heads, n, **options) for heads, n in ((Hk, K), (Hk, K), (H, V))]
    inputs.append(torch.full((1, T, H), -0.1, device="cuda"))
    do = torch.randn(1, T, H, V, **options)
    assert do.numel() > 2**31

    def last(inputs, do):
        leaves = [x.requires_grad_() for x in inputs]
        o, final = matrix.linear_recurrence(*leaves)
        found = [o, *torch.autograd.grad(o, leaves, do)]
        return [x[:, -4096:].clone() for x in found], final

    found, final = last(inputs, do)
    inputs = [x.detach()[:, -tail:].clone() for x in inputs]
    same, also = last(inputs, do[:, -tail:])
    for one, other in zip([*found, final], [*same, also]):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6 * other.abs().max().item())


@pytest.mark.parametrize("gate", ["[B,T,H]", "[B,T,H,K]"])
def test_bits_repeat(gate):
    case = Case(gate, T=3000, B=2, H=4, Hk=2, K=64, V=64, dtype=BF16)
    first, second = results(kernels, case, "cuda"), results(kernels, case, "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_inputs_and_minus_infinity():
    torch.manual_seed(0)
    packed = torch.randn(2, 100, 3, 4, 64, device="cuda", dtype=BF16)
    q, k, v = packed.unbind(2)
    gate = torch.where(torch.rand(2, 100, 4, device="cuda") < 0.1, -torch.inf, -0.1)
    o, final = matrix.linear_recurrence(q, k, v, gate)
    same, also = matrix.linear_recurrence(q.contiguous(), k.contiguous(), v.contiguous(), gate)
    assert o.isfinite().all() and final.isfinite().all()
    assert torch.equal(o, same) and torch.equal(final, also)


@pytest.mark.parametrize("gate", GATES[1:])
def test_a_gate_that_is_no_number_is_not_taken_to_forget(gate):
    assert shows_nan(gate, "cuda")


def test_forward_derivatives_are_the_torch_forms():
    inputs = Case("[B,T,H]", T=100).inputs("cuda")
    q, k, v, gate, _, state = inputs.values()

    def call(v, impl="auto"):
        return subquad.linear_recurrence(q, k, v, gate, state=state, impl=impl)

    found = torch.func.jvp(call, (v,), (v,))[1]
    due = torch.func.jvp(lambda v: call(v, "torch"), (v,), (v,))[1]
    torch.testing.assert_close(found, due)
    assert due[0].any()


@pytest.mark.parametrize("gate", ["none", "[B,T,H]", "[B,T,H,K]"])
def test_opcheck_and_compile(gate):
    case = Case(gate, T=100, B=2, K=32, V=32, dtype=BF16)
    inputs = [None if x is None else x.requires_grad_() for x in case.inputs("cuda").values()]
    torch.library.opcheck(matrix.scan_forward.op, (*inputs, None, 0.3))
    compiled = torch.compile(lambda *a: matrix.linear_recurrence(*a), fullgraph=True)
    q, k, v, log_decay, bonus, state = inputs
    o, final = compiled(q, k, v, log_decay, bonus, 0.3, state)
    same, also = matrix.linear_recurrence(q, k, v, log_decay, bonus, 0.3, state)
    assert torch.equal(o, same) and torch.equal(final, also)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_gpu_need_not_be_the_current_one():
    case = Case("[B,T,H,K]", T=300, B=2, K=64, V=64, dtype=BF16)
    first = results(kernels, case, "cuda:0")
    for _ in range(3):
        other = results(kernels, case, "cuda:1")
        assert all(torch.equal(x, other[name].to("cuda:0")) for name, x in first.items())
    assert torch.cuda.current_device() == 0


def test_the_public_function_takes_them():
    inputs = Case("[B,T,H,K]", T=100, K=64, V=64, dtype=BF16).inputs("cuda")
    q, k, v, gate, _, state = inputs.values()
    o, final = subquad.linear_recurrence(q, k, v, log_decay=gate, state=state)
    same, also = matrix.linear_recurrence(q, k, v, gate, None, 64**-0.5, state)
    assert torch.equal(o, same) and torch.equal(final, also)
    assert "scan (decay per key channel)" in str(subquad.explain(q, k, v, log_decay=gate))
