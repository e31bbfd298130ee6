"""The GPU kernels beside the scan on a CUDA device (`pytest -m gpu`), against float64 there.

Allowed: twice the error of the same work in PyTorch on the same inputs, or one rounding unit of
the dtype where PyTorch happens to be closer; 1e-5 in float32.
"""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

import subquad
from layer_cases import (
    EXTRAS,
    GATES,
    check_odd_gates,
    check_odd_losses,
    convolution,
    convolved_token,
    errors,
    gated_norm,
    gates,
    losses,
    product,
    steps,
    token,
)
from subquad.engines.convolution import gpu as short_convolution
from subquad.engines.cross_entropy import gpu as loss
from subquad.engines.gates import gpu as activation
from subquad.engines.gates.api import log_sigmoid, silu_product
from subquad.engines.matrix.gpu import step as matrix_step
from subquad.engines.norm import gpu as norm
from subquad.engines.norm.api import gated_rms_norm, l2_norm
from subquad.engines.runtime.overwrite import overwriting_states
from subquad.engines.step_size import gpu as timestep
from subquad.models.loss import next_token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)


def check(work, dtype=BF16) -> None:
    truth = work.results(work.torch_form, "cuda", dtype, wide=True)
    found = work.results(work.ours, "cuda", dtype)
    for _ in range(2):  # recorded and replayed, to the bit
        again = work.results(work.ours, "cuda", dtype)
        assert all(torch.equal(again[name], x) for name, x in found.items())
    ours = errors(found, truth)
    theirs = errors(work.results(work.torch_form, "cuda", dtype), truth)
    unit = 1e-5 if dtype == FP32 else torch.finfo(dtype).eps / 2
    allowed = {name: max(2 * error, unit) for name, error in theirs.items()}
    wrong = {n: (e, allowed[n]) for n, e in ours.items() if not e <= allowed[n]}
    print(" ".join(f"{n} {e:.1e}/{allowed[n]:.1e}" for n, e in ours.items()))
    assert not wrong, f"(error, allowed): {wrong}"


@DTYPES
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("gate", GATES)
def test_token(gate, extra, dtype):
    check(token(gate, extra, B=3, H=4, Hk=2, K=64, V=128), dtype)


@pytest.mark.parametrize("K, V", [(16, 256), (256, 16), (256, 256), (80, 48), (20, 24), (128, 300)])
@pytest.mark.parametrize("extra", ["none", "delta"])
def test_token_sizes(K, V, extra):
    check(token("[B,T,H]", extra, K=K, V=V))
    check(token("[B,T,H,K]", extra, K=K, V=V, state=False))
    check(token("[B,T,H,K]", extra, K=K, V=V, in_place=True))


@DTYPES
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_convolution(silu, state, dtype):
    check(convolution(B=3, T=700, D=200, silu=silu, state=state), dtype)


@pytest.mark.parametrize("W", [1, 2, 3, 4, 8])
def test_convolution_taps_and_packing(W):
    check(convolution(B=1, T=450, D=96, W=W, cu_seqlens=(0, 1, 2, 66, 131, 132, 450)))
    check(convolution(B=2, T=3, D=96, W=W))


@DTYPES
def test_convolved_token(dtype):
    check(convolved_token(N=5, D=700), dtype)
    check(convolved_token(N=5, D=700, packed=True, state=False), dtype)
    check(convolved_token(N=5, D=700, in_place=True), dtype)


@DTYPES
@pytest.mark.parametrize("order", ["norm first", "gate first", None])
@pytest.mark.parametrize("weight", ["shared", "own", None])
def test_norm(order, weight, dtype):
    check(gated_norm((3, 333, 512), 128, weight, order), dtype)


@pytest.mark.parametrize("size", [16, 20, 100, 2048, 3000, 16384])
def test_norm_sizes(size):
    check(gated_norm((130, size), size, "own", "gate first"))
    check(gated_norm((130, size), size, "own", "norm first"))


@DTYPES
@pytest.mark.parametrize("values", [True, False])
def test_steps(values, dtype):
    check(steps(3, 333, 32, 64, values), dtype)
    check(steps(2, 50, 5, 20, values, lowest=-25.0), dtype)


@DTYPES
def test_norm_of_a_skip(dtype):
    check(gated_norm((3, 333, 2048), 2048, "own", "gate first", heads=32), dtype)
    check(gated_norm((2, 50, 100), 20, "shared", "gate first", heads=5), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_norm_of_a_wider_residual(dtype):
    check(gated_norm((3, 333, 1024), 1024, "own", None, dtype=dtype), dtype)


@DTYPES
@pytest.mark.parametrize("parts", [True, False])
def test_product(parts, dtype):
    check(product((3, 333, 2816), parts), dtype)
    check(product((2, 50, 75), parts), dtype)


@DTYPES
def test_gates(dtype):
    check(gates((3, 333, 512)), dtype)
    check(gates((2, 50, 75), lowest=17.0, scale=1.0), dtype)


def test_odd_gates():
    check_odd_gates("cuda")


@DTYPES
@pytest.mark.parametrize("V", [2, 1000, 4096, 32000, 50257])
def test_losses(V, dtype):
    check(losses((3, 333, V)), dtype)
    check(losses((70, V), torch.int32, offset=100.0), dtype)


def test_losses_of_a_large_vocabulary():
    check(losses((130, 151936)))
    check(losses((130, 262145)))


def test_losses_of_odd_rows():
    check_odd_losses("cuda")


def test_losses_of_more_than_2_to_the_31_logits():
    V = 32000
    labels = torch.randint(V, (2**31 // V + 100,), device="cuda")
    logits = torch.randn(*labels.shape, V, device="cuda", dtype=BF16).requires_grad_()
    found = loss.cross_entropy(logits, labels)[0]
    (grad,) = torch.autograd.grad(found.mean(), logits)
    last = logits[-50:].detach().clone().requires_grad_()
    same = loss.cross_entropy(last, labels[-50:])[0]
    assert torch.equal(found[-50:], same)
    (same,) = torch.autograd.grad(same.sum() / len(labels), last)
    assert torch.equal(grad[-50:], same)


def test_a_captured_loss():
    logits = torch.randn(2, 50, 999, device="cuda", dtype=BF16).requires_grad_()
    labels = torch.randint(999, (2, 50), device="cuda")

    def step():
        mean = next_token_loss(logits, labels)
        return mean.detach(), *torch.autograd.grad(mean, logits)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        logits.normal_()
    labels.random_(999)
    labels[0, 5:30] = -100
    graph.replay()
    for found, want in zip(results, step()):
        assert torch.equal(found, want)


@pytest.mark.parametrize("items", [None, 77])
def test_a_models_loss(items):
    config = subquad.SubquadConfig(
        mixer="gla", hidden_size=64, num_hidden_layers=2, vocab_size=1000
    )
    torch.manual_seed(0)
    model = subquad.SubquadForCausalLM(config).cuda().to(BF16)
    ids = torch.randint(1000, (3, 70), device="cuda")
    labels = ids.clone()
    labels[0, :9] = -100
    given = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    found = model(ids, labels=labels, **given).loss
    gradients = torch.autograd.grad(found, list(model.parameters()))
    model.loss_function = lambda *given, **options: ForCausalLMLoss(*given, **options)
    want = model(ids, labels=labels, **given).loss
    torch.testing.assert_close(found, want)
    wanted = torch.autograd.grad(want, list(model.parameters()))
    for mine, theirs in zip(gradients, wanted):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=2e-2 * theirs.abs().max().item())


def gates_and_loss(gate, up, labels):
    logits = silu_product(gate, up)
    return next_token_loss(logits, labels), log_sigmoid(gate, 16.0)


def test_gates_and_losses_compile():
    gate, up = torch.randn(2, 9, 100, device="cuda").requires_grad_().chunk(2, -1)
    labels = torch.randint(50, (2, 9), device="cuda")
    results = []
    for call in (gates_and_loss, torch.compile(gates_and_loss, fullgraph=True)):
        mean, log_decay = call(gate, up, labels)
        grads = torch.autograd.grad(mean + log_decay.sum(), (gate, up))
        results.append((mean, log_decay, *grads))
    for found, want in zip(*results):
        torch.testing.assert_close(found, want)


def test_bits_repeat():
    works = (
        losses((3000, 999)),
        product((30, 100, 999)),
        gates((3000, 999)),
        convolution(B=4, T=3000, D=300),
        gated_norm((9000, 512), 64),
        steps(4, 3000),
        gated_norm((9000, 512), 512, "own", "gate first", heads=8),
    )
    for work in works:
        first, second = (work.results(work.ours, "cuda", BF16) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_offsets_beyond_32_bits():
    # 2.2e9 numbers: the last rows lie where a 32-bit offset has wrapped round.
    x = torch.randn(1, 2**20 + 100, 2100, device="cuda", dtype=BF16)
    weight = torch.randn(2100, 4, device="cuda")
    y = short_convolution.convolve(x, weight, None, None, None, True)
    last = short_convolution.convolve(x[:, -50:].clone(), weight, None, None, None, True)
    assert torch.equal(y[:, -40:], last[:, -40:])
    del y
    options = (None, None, None, None, 2100, False, 1e-5, 1.0, None)
    y = norm.norm(x, *options)
    last = x[:, -40:].clone()
    assert torch.equal(y[:, -40:], norm.norm(last, *options))
    del y
    for call in (
        lambda x: (activation.silu_product(x, x),),
        lambda x: activation.silu_product_backward(x, x, x),
        lambda x: (activation.log_sigmoid(x, 0.25),),
        lambda x: (activation.log_sigmoid_backward(x, x, 0.25),),
    ):
        for y, same in zip(call(x), call(last)):
            assert torch.equal(y[:, -40:], same)
        del y


def test_opcheck():
    def cuda(work):
        return [None if x is None else x.cuda() for x in work.inputs.values()]

    q, k, v, g, beta, a, b, bonus, state = cuda(token("[B,T,H]", "delta"))
    given = (q, k, v, g, beta, a, b, bonus, 0.3, state)
    torch.library.opcheck(matrix_step.step.op, given)
    torch.library.opcheck(matrix_step.step_.op, given)
    inputs = cuda(convolved_token())
    torch.library.opcheck(short_convolution.one_token.op, (*inputs, True))
    torch.library.opcheck(short_convolution.one_token_.op, (*inputs, True))
    inputs = [x.requires_grad_() for x in cuda(convolution(T=9))]
    torch.library.opcheck(short_convolution.convolve.op, (*inputs, None, True))
    torch.library.opcheck(timestep.discretise.op, [x.requires_grad_() for x in cuda(steps(T=9))])
    inputs = [x.requires_grad_() for x in cuda(product())]
    torch.library.opcheck(activation.silu_product.op, inputs)
    torch.library.opcheck(activation.log_sigmoid.op, (inputs[0], 0.25))
    logits, labels = torch.randn(2, 3, 20), torch.randint(20, (2, 3), device="cuda")
    torch.library.opcheck(loss.cross_entropy.op, (logits.cuda().requires_grad_(), labels))
    for heads in (0, 4):
        inputs = [None if x is None else x.requires_grad_() for x in cuda(gated_norm(heads=heads))]
        torch.library.opcheck(norm.norm.op, (*inputs, 20, True, 1e-5, 1.0, None))


def layer(q, k, v, log_decay, beta, a, b, bonus, state, weight):
    """What a gated delta layer calls around one token, by the public functions."""
    x = torch.cat([q.flatten(2), k.flatten(2)], -1)
    x, conv = subquad.short_convolution(x, weight, activation="silu")
    q, k = l2_norm(x, q.shape[-1]).unflatten(-1, (-1, q.shape[-1])).chunk(2, 2)
    erase = None if beta is None else subquad.Delta(beta)
    o, new = subquad.linear_recurrence(q, k, v, log_decay, erase, state=state)
    o = o.flatten(2)
    return gated_rms_norm(o, o, v.shape[-1], None, 1e-5, gate_first=False), conv, new


def test_public_functions_compile_and_tell():
    inputs = [None if x is None else x.cuda() for x in token("[B,T,H]", "delta").inputs.values()]
    weight = torch.randn(80, 4, device="cuda")
    with torch.no_grad(), subquad.watch() as calls:
        eager = layer(*inputs, weight)
    assert calls[0].impl == "triton" and calls[0].form == "recurrent"
    assert "delta rule" in calls[0].why
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)(*inputs, weight)
    for one, other in zip(compiled, eager):
        torch.testing.assert_close(one, other)
    given = {"q": inputs[0], "k": inputs[1], "v": inputs[2], "state": inputs[-1]}
    given["q"] = given["q"].clone().requires_grad_()
    assert "scan" in subquad.explain(**given).why  # the step has no gradient


def test_states_are_overwritten_only_where_allowed():
    inputs = token("[B,T,H]").inputs
    given = {n: inputs[n].cuda() for n in ("q", "k", "v", "log_decay", "state")}
    before = given["state"].clone()
    _, new = subquad.linear_recurrence(**given)
    assert torch.equal(given["state"], before)
    with overwriting_states():
        _, same = subquad.linear_recurrence(**given)
    assert same is given["state"] and torch.equal(same, new)
