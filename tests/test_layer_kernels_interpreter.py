"""The GPU kernels beside the scan in Triton's interpreter, on a CPU, against PyTorch in float64.

As for the scan, the interpreter is chosen for a whole process, so this file runs itself once as a
program that works all cases and prints their errors; the tests look at those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PACKED = (0, 1, 2, 5, 33, 70)


def cases() -> dict[str, tuple[str, dict]]:
    """A function of layer_cases and its arguments, by name."""
    import torch

    found: dict[str, tuple[str, dict]] = {}
    for gate in ("none", "[H]", "[H,K]", "[B,T,H]", "[B,T,H,K]"):
        for extra in ("none", "delta", "low rank", "bonus"):
            found[f"token: gate {gate}, {extra}"] = "token", {"gate": gate, "extra": extra}
    found["token: no state"] = "token", {"extra": "delta", "state": False}
    found["token: in place"] = "token", {"gate": "[B,T,H]", "extra": "delta", "in_place": True}
    found["token: bfloat16"] = "token", {"gate": "[B,T,H]", "K": 64, "V": 33}
    found["convolution"] = "convolution", {}
    found["convolution: packed"] = "convolution", {"B": 1, "cu_seqlens": PACKED}
    found["convolution: packed, no state"] = (
        "convolution",
        {"B": 1, "cu_seqlens": PACKED, "state": False},
    )
    found["convolution: long"] = "convolution", {"B": 1, "T": 300, "D": 70, "W": 3, "bias": False}
    found["convolution: linear"] = "convolution", {"silu": False, "state": False}
    found["convolution: shorter than its taps"] = "convolution", {"T": 2, "W": 8}
    found["convolution: one token, with gradients"] = "convolution", {"B": 3, "T": 1}
    found["convolution: one tap"] = "convolution", {"W": 1}
    found["convolution: bfloat16"] = "convolution", {}
    found["convolved token"] = "convolved_token", {}
    found["convolved token: packed"] = "convolved_token", {"packed": True}
    found["convolved token: no state"] = "convolved_token", {"state": False}
    found["convolved token: in place"] = "convolved_token", {"in_place": True}
    for order in ("norm first", "gate first", None):
        for weight in ("shared", "own", None):
            arguments = {"order": order, "weight": weight}
            found[f"norm: {order}, {weight} weight"] = "gated_norm", arguments
    found["norm: wide"] = "gated_norm", {"shape": (3, 3000), "size": 3000, "order": "gate first"}
    found["norm: wider"] = "gated_norm", {"shape": (2, 5000), "size": 5000}
    found["norm: many rows"] = "gated_norm", {"shape": (70, 64), "size": 16}
    found["norm: no eps"] = "gated_norm", {"eps": 0.0}
    found["steps"] = "steps", {}
    found["steps: no values"] = "steps", {"values": False, "T": 300}
    found["steps: tiny"] = "steps", {"lowest": -25.0}
    found["steps: one token"] = "steps", {"B": 3, "T": 1, "H": 5, "P": 64}
    found["steps: bfloat16"] = "steps", {}
    skipped = {"order": "gate first", "heads": 4}
    found["norm: skip"] = "gated_norm", skipped
    found["norm: skip, norm first"] = "gated_norm", {"heads": 8, "weight": None}
    found["norm: skip, wide"] = "gated_norm", {"shape": (3, 3000), "size": 3000, **skipped}
    found["norm: skip, bfloat16"] = "gated_norm", skipped
    found["norm: bfloat16 of a float32 residual"] = (
        "gated_norm",
        {"order": None, "dtype": torch.bfloat16},
    )
    found["product"] = "product", {}
    found["product: laid out otherwise"] = "product", {"parts": False}
    found["product: several blocks"] = "product", {"shape": (35, 300)}
    found["product: one channel"] = "product", {"shape": (5, 1)}
    found["product: bfloat16"] = "product", {}
    found["gates"] = "gates", {"scale": 1.0}
    found["gates: several blocks"] = "gates", {"shape": (35, 300)}
    found["gates: nearly open"] = "gates", {"lowest": 17.0}
    found["gates: bfloat16"] = "gates", {}
    found["losses"] = "losses", {"labels": torch.int32}
    found["losses: several blocks"] = "losses", {"shape": (5, 8200)}
    found["losses: large logits"] = "losses", {"shape": (70, 64), "offset": 1e4}
    found["losses: bfloat16"] = "losses", {"shape": (3, 5, 4097)}
    found["norm: bfloat16"] = "gated_norm", {"order": "gate first", "weight": "own"}
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
def test_equal_to_pytorch(interpreted, name):
    allowed = 2**-8 if "bfloat16" in name else 1e-5  # a rounding to bfloat16 errs by half of that
    wrong = {what: error for what, error in interpreted[name].items() if not error <= allowed}
    assert interpreted[name]
    assert not wrong, f"relative errors above {allowed}: {wrong}"


def test_reasons_to_decline():
    import torch

    from subquad.engines.convolution import gpu as short_convolution
    from subquad.engines.matrix.gpu import step as matrix_step
    from subquad.engines.norm import gpu as norm

    q, x = torch.zeros(1, 1, 1, 16), torch.zeros(1, 4, 16)
    assert "CUDA" in matrix_step.supported(q, q, q)
    assert "256" in matrix_step.supported(q.new_zeros(1, 1, 1, 300))
    assert "CUDA" in short_convolution.supported(x, x[0].t(), None, None)
    assert "at most 8" in short_convolution.supported(x, x.new_zeros(16, 9), None, None)
    assert "CUDA" in norm.supported(16, x, None, x)


def test_step_sizes_that_pytorch_would_broadcast_or_refuse_are_left_to_it(monkeypatch):
    import torch

    from subquad.engines.step_size.api import _has_kernel

    pytest.importorskip("triton")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x, dt, one = torch.zeros(2, 5, 4, 3), torch.zeros(2, 5, 4), torch.zeros(4)
    assert _has_kernel(x, dt, one, one) and _has_kernel(None, dt, one, one)
    assert not _has_kernel(x, dt, one[:1], one)
    assert not _has_kernel(x, dt, one, one[:3])
    assert not _has_kernel(x[:, :, :1], dt, one, one)
    assert not _has_kernel(x[:, :, None], dt[:, :, None], one, one)


def test_gates_and_losses_that_no_kernel_takes_are_left_to_pytorch(monkeypatch):
    import torch

    from subquad.engines.cross_entropy import api as cross_entropy
    from subquad.engines.gates import api as activation

    pytest.importorskip("triton")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x, labels = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    silu, log_sigmoid = torch.nn.functional.silu, torch.nn.functional.logsigmoid
    assert activation._has_kernel(x, x) and cross_entropy._has_kernel(x, labels)
    for gate, up in ((x, x[0]), (x, x[..., :1]), (x.double(), x), (x[0, 0, 0], x[0, 0, 0])):
        assert torch.equal(activation.silu_product(gate, up), silu(gate) * up)
    assert torch.equal(activation.log_sigmoid(x.double(), 4.0), log_sigmoid(x.double()) / 4)
    assert activation.log_sigmoid(x[..., :0]).shape == (2, 5, 0)
    assert activation.log_sigmoid(x[0, 0, 0].bfloat16()).dtype == torch.float32
    for logits, due in ((x.double(), labels), (x, labels.short()), (x[..., :0], labels)):
        assert not cross_entropy._has_kernel(logits, due)


def main() -> None:
    import triton_interpreter  # noqa: F401, I001 - before anything that imports Triton
    import layer_cases
    import torch

    found = {}
    for name, (function, arguments) in cases().items():
        work = getattr(layer_cases, function)(**arguments)
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        truth = work.results(work.torch_form, "cpu", dtype, wide=True)
        found[name] = layer_cases.errors(work.results(work.ours, "cpu", dtype), truth)
    check()
    check_far_rows()
    check_wrong_boundaries()
    layer_cases.check_odd_gates("cpu")
    layer_cases.check_odd_losses("cpu")
    check_models()
    print(json.dumps(found))


def check() -> None:
    """Raise where a fake or a gradient is not as promised."""
    import torch

    import layer_cases
    from subquad.engines.convolution import gpu as short_convolution
    from subquad.engines.cross_entropy import gpu as loss
    from subquad.engines.gates import gpu as activation
    from subquad.engines.matrix.gpu import step as matrix_step
    from subquad.engines.norm import gpu as norm
    from subquad.engines.step_size import gpu as timestep

    q, k, v, g, beta, a, b, bonus, state = layer_cases.token("[B,T,H]", "delta").inputs.values()
    given = (q, k, v, g, beta, a, b, bonus, 0.3, state)
    torch.library.opcheck(matrix_step.step.op, given)
    torch.library.opcheck(matrix_step.step_.op, given)
    inputs = layer_cases.convolved_token().inputs.values()
    torch.library.opcheck(short_convolution.one_token.op, (*inputs, True))
    torch.library.opcheck(short_convolution.one_token_.op, (*inputs, True))
    inputs = [x.requires_grad_() for x in layer_cases.convolution(T=9).inputs.values()]
    torch.library.opcheck(short_convolution.convolve.op, (*inputs, None, True))
    inputs = [x.requires_grad_() for x in layer_cases.steps(T=9).inputs.values()]
    torch.library.opcheck(timestep.discretise.op, inputs)
    inputs = [x.requires_grad_() for x in layer_cases.product().inputs.values()]
    torch.library.opcheck(activation.silu_product.op, inputs)
    torch.library.opcheck(activation.log_sigmoid.op, (inputs[0], 0.25))
    logits, labels = torch.randn(2, 3, 20, requires_grad=True), torch.randint(0, 20, (2, 3))
    torch.library.opcheck(loss.cross_entropy.op, (logits, labels))
    for heads in (0, 4):
        inputs = layer_cases.gated_norm(heads=heads).inputs.values()
        inputs = [None if x is None else x.requires_grad_() for x in inputs]
        torch.library.opcheck(norm.norm.op, (*inputs, 20, True, 1e-5, 1.0, None))


def check_models() -> None:
    """Raise where models that are told of a GPU leave its gates or loss out, or come to others."""
    import contextlib
    from unittest import mock

    import torch

    from subquad import SubquadConfig, SubquadForCausalLM
    from subquad.engines.cross_entropy import gpu as loss
    from subquad.engines.gates import gpu as activation
    from subquad.engines.matrix.gpu import layout
    from subquad.engines.matrix.gpu import shared_keys as shared

    layout.processors = shared.processors = lambda device: 132
    ids = torch.randint(50, (2, 9))
    for mixer in ("gla", "mamba"):
        config = SubquadConfig(mixer=mixer, hidden_size=32, num_hidden_layers=1, vocab_size=50)
        model = SubquadForCausalLM(config)

        def results(model=model):
            mean = model(ids, labels=ids, use_cache=False).loss
            return mean, *torch.autograd.grad(mean, list(model.parameters()))

        wanted = results()
        operators = [activation.silu_product, loss.cross_entropy]
        operators += [activation.log_sigmoid] if mixer == "gla" else []
        launches = [mock.Mock(side_effect=one._launch) for one in operators]
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
            for one, launch in zip(operators, launches):
                patches.enter_context(mock.patch.object(one, "_launch", launch))
            found = results()
        assert all(launch.call_count == 1 for launch in launches), launches
        for one, want in zip(found, wanted):
            assert (one - want).norm() <= 1e-5 * want.norm(), mixer


def check_wrong_boundaries() -> None:
    """Raise where wrong boundaries, which no one looked at, lead the convolution astray."""
    import torch

    from subquad.engines.convolution import gpu as short_convolution

    def fenced(*shape: int) -> torch.Tensor:
        """Zeros between numbers that are none."""
        size = torch.Size(shape).numel()
        fence = torch.full([1000], torch.nan)
        return torch.cat([fence, torch.zeros(size), fence])[1000:-1000].view(shape)

    T, D, W = 20, 3, 4
    x, weight, state = fenced(1, T, D), torch.ones(D, W), fenced(2, W - 1, D)
    for ends in ([5, 9, T], [0, 25, 30], [0, -3, T], [-50, 900, T], [0, 9, 12], [0, 0, 0]):
        bounds = torch.tensor(ends, dtype=torch.int32)
        y = short_convolution.convolve(x, weight, None, state, bounds, False)
        given = x, x, weight, None, state, bounds, False, True
        for found in (y, *short_convolution.convolve_backward(*given)):
            assert not found.any(), (ends, found)


def check_far_rows() -> None:
    """Raise, or crash, where an offset beyond 32 bits has wrapped round.

    The rows of x, or a token's heads, lie far apart in a file without content between them, which
    takes no room.
    """
    import tempfile

    import torch

    from subquad.engines.convolution import gpu as short_convolution
    from subquad.engines.cross_entropy import gpu as loss
    from subquad.engines.gates import gpu as activation
    from subquad.engines.matrix.gpu import step as matrix_step
    from subquad.engines.norm import gpu as norm

    tokens, channels, apart = 20, 8, 2**27 + 2**25
    near, dy = torch.randn(2, 1, tokens, channels, dtype=torch.bfloat16).unbind(0)
    weight = torch.randn(channels, 4)
    with tempfile.NamedTemporaryFile() as file:
        size = apart * (tokens - 1) + channels
        far = torch.from_file(file.name, shared=True, size=size, dtype=torch.bfloat16)
        far = far.as_strided((1, tokens, channels), (apart * tokens, apart, 1))
        far.copy_(near)
        for convolved in ((None, None, None, True), (None, None, None, False)):
            y, same = (short_convolution.convolve(x, weight, *convolved) for x in (far, near))
            assert torch.equal(y, same)
        options = (weight, None, None, None, True, False)
        grads, same = (short_convolution.convolve_backward(dy, x, *options) for x in (far, near))
        assert all(torch.equal(one, other) for one, other in zip(grads, same))
        options = (None, None, None, None, channels, False, 1e-5, 1.0, None)
        assert torch.equal(norm.norm(far, *options), norm.norm(near, *options))
        results = [
            (
                activation.silu_product(*pair),
                *activation.silu_product_backward(dy, *pair),
                activation.log_sigmoid(pair[0], 0.25),
                activation.log_sigmoid_backward(dy, pair[0], 0.25),
            )
            for pair in ((far, near), (near, far), (near, near))
        ]
        for found in results[:2]:
            assert all(torch.equal(one, other) for one, other in zip(found, results[2]))
        labels, dlosses = torch.randint(0, channels, (1, tokens)), torch.randn(1, tokens)
        (losses, sums), (same, _) = (loss.cross_entropy(x, labels) for x in (far, near))
        assert torch.equal(losses, same)
        options = (labels, sums)
        grad, same = (loss.cross_entropy_backward(dlosses, x, *options) for x in (far, near))
        assert torch.equal(grad, same)
        far, near = far[None], near[None]  # one token with as many heads as there were tokens
        steps = (matrix_step.step(x, near, near, *[None] * 5, 1.0, None) for x in (far, near))
        assert all(torch.equal(one, other) for one, other in zip(*steps))


if __name__ == "__main__":
    main()
