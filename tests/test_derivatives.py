"""Derivatives of derivatives: compiled operators give way to forms that PyTorch can follow."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from subquad import Delta, SubquadConfig, SubquadForCausalLM, explain, linear_recurrence
from subquad.engines import selective_scan, short_convolution, watch

B, T, H, K, V = 2, 70, 2, 5, 3
PACKED = torch.tensor([0, 1, 40, 70])


def second_gradients(f: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """Of the squared norm of the first gradients of a fixed function of what `f` returns."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = sum(torch.sin(y + i).sum() for i, y in enumerate(f(*leaves)))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(penalty, leaves))


def check(compiled, exact, inputs: list[Tensor]) -> None:
    """In float32 against the reference form in float64."""
    found = second_gradients(compiled, inputs)
    due = second_gradients(exact, [x.double() for x in inputs])
    for a, b in zip(found, due, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("erase", [False, True], ids=["no erase", "delta"])
@pytest.mark.parametrize("gates", [(), (H,), (H, K), (1, T, H), (1, T, H, K)], ids=str)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["rows", "packed"])
def test_of_the_matrix_recurrence(erase, gates, cu_seqlens):
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, T, H, K), dim=-1)
    state = torch.randn(1 if cu_seqlens is None else 3, H, K, V)
    given = {"q": torch.randn(1, T, H, K), "k": k, "v": torch.randn(1, T, H, V), "state": state}
    if gates:
        given["log_decay"] = -torch.rand(gates)
    if erase:
        given["beta"] = torch.rand(1, T, H)

    def run(form: str):
        def f(*tensors):
            named = dict(zip(given, tensors, strict=True))
            if erase:
                named["erase"] = Delta(named.pop("beta"))
            return linear_recurrence(**named, cu_seqlens=cu_seqlens, form=form)

        return f

    inputs = list(given.values())
    with watch() as calls:
        run("auto")(*inputs)
    assert calls[0].impl == "numba"
    check(run("auto"), run("recurrent"), inputs)


def test_of_a_tensor_that_is_given_twice():
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(1, T, H, K), dim=-1)
    check(
        lambda x: linear_recurrence(x, x, x),
        lambda x: linear_recurrence(x, x, x, form="recurrent"),
        [x],
    )


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["rows", "packed"])
def test_of_the_short_convolution(cu_seqlens):
    torch.manual_seed(0)
    N = 1 if cu_seqlens is None else 3
    inputs = [torch.randn(1, T, 8), torch.randn(8, 4), torch.randn(8), torch.randn(N, 3, 8)]

    def f(x, weight, bias, state):
        return short_convolution(x, weight, bias, "silu", state, cu_seqlens)

    check(f, f, inputs)  # float64 runs in plain PyTorch


@pytest.mark.parametrize("impl", ["numba", "torch"])
def test_of_the_selective_scan(impl):
    torch.manual_seed(0)
    x, dt, A = torch.randn(B, T, 4), torch.rand(B, T, 4), -torch.rand(4, 3) - 0.1
    inputs = [x, dt, A, torch.randn(B, T, 3), torch.randn(B, T, 3), torch.randn(4)]
    check(
        lambda *given: selective_scan(*given, impl=impl),
        lambda *given: selective_scan(*given, impl="reference"),
        inputs,
    )


@pytest.mark.parametrize("needed", [[0], [0, 1], [2], [5]], ids=["q", "q, k", "v", "state"])
def test_of_some_inputs_where_not_every_output_depends_on_them(needed):
    """The final state does not depend on q; what the operator returns looks as if it did."""
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, T, H, K), dim=-1)
    given = [torch.randn(1, T, H, K), k, torch.randn(1, T, H, V), -torch.rand(1, T, H)]
    given += [torch.rand(1, T, H), torch.randn(1, H, K, V)]

    def run(form: str, dtype: torch.dtype):
        def f(*some):
            q, k, v, g, beta, state = (
                some[needed.index(i)] if i in needed else x.to(dtype) for i, x in enumerate(given)
            )
            return linear_recurrence(q, k, v, g, Delta(beta), state=state, form=form)

        return f

    inputs = [given[i] for i in needed]
    check(run("auto", torch.float32), run("recurrent", torch.float64), inputs)


def test_of_a_skip_that_the_last_state_does_not_depend_on():
    torch.manual_seed(0)
    x, dt, A = torch.randn(B, T, 4), torch.rand(B, T, 4), -torch.rand(4, 3) - 0.1
    inputs = [x, dt, A, torch.randn(B, T, 3), torch.randn(B, T, 3)]

    def run(impl: str):
        return lambda C: selective_scan(*(t.to(C.dtype) for t in inputs[:4]), C, impl=impl)

    check(run("numba"), run("reference"), inputs[4:])


def recurrence(x: Tensor) -> Tensor:
    return linear_recurrence(x, x, x, -x.square(), Delta(x[..., 0].sigmoid()))[0]


def scan(x: Tensor) -> Tensor:
    A = -torch.arange(1.0, 4)[None].expand(K, 3)
    x = x[:, :, 0]
    return selective_scan(x, x.square(), A, x[..., :3], x[..., :3])[0]


def convolution(x: Tensor) -> Tensor:
    return short_convolution(x.flatten(-2), torch.ones(H * K, 4), activation="silu")[0]


@pytest.mark.parametrize("engine", [recurrence, scan, convolution])
def test_many_gradients_at_once_are_those_one_by_one(engine):
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for them."""
    torch.manual_seed(0)
    x = torch.randn(1, T, H, K, requires_grad=True)
    y = engine(x)
    many = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    due = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in many]
    torch.testing.assert_close(found, torch.stack(due))


@pytest.mark.parametrize("engine", [recurrence, scan, convolution])
def test_transforms_of_functions_are_what_backward_gives(engine):
    """They know nothing of compiled operators: forward derivatives of these would be zeros."""
    torch.manual_seed(0)
    x, direction = torch.randn(2, 3, 1, T, H, K)

    def loss(x: Tensor) -> Tensor:
        return engine(x).square().sum()

    leaf = x.clone().requires_grad_()
    (due,) = torch.autograd.grad(sum(map(loss, leaf)), leaf)
    moved = torch.func.jvp(loss, (x[0],), (direction[0],))[1]
    torch.testing.assert_close(moved, (due[0] * direction[0]).sum(), rtol=1e-4, atol=1e-2)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(x[0], direction[0]))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, moved)
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), due[0], rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(each, due, rtol=1e-4, atol=1e-4)


def test_transforms_of_a_packed_scan():
    torch.manual_seed(0)
    x, dt = torch.randn(2, 1, T, 4), torch.rand(1, T, 4)
    A, B_, state = -torch.rand(4, 3), torch.randn(1, T, 3), torch.randn(3, 4, 3)

    def loss(x: Tensor, impl: str = "auto") -> Tensor:
        y, last = selective_scan(x, dt, A, B_, B_, state=state, cu_seqlens=PACKED, impl=impl)
        return y.square().sum() + last.square().sum()

    leaf = x.clone().requires_grad_()
    (due,) = torch.autograd.grad(sum(map(loss, leaf)), leaf)
    each = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(each, due, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"impl: got 'numba' .* outside forward derivatives"):
        torch.func.grad(loss)(x[0], "numba")


@pytest.mark.parametrize("row", ["gated_deltanet", "mamba", "mamba2"])
def test_a_hessian_of_a_model_times_a_vector(row):
    """Compiled in float32, and in float64, which runs in plain PyTorch."""
    torch.manual_seed(0)
    model = SubquadForCausalLM(SubquadConfig(hidden_size=32, num_hidden_layers=1, mixer=row))
    ids = torch.randint(0, 256, (2, 30))
    direction = torch.randn_like(model.model.embed_tokens.weight)

    def product() -> Tensor:
        weight = model.model.embed_tokens.weight
        loss = model(input_ids=ids, labels=ids).loss
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(gradient, weight, direction.to(weight.dtype))[0]

    found = product()
    model.double()
    due = product()
    assert (found - due).norm() <= 1e-4 * due.norm()


@pytest.mark.parametrize("gates", [(), (1, T, H), (1, T, H, K)], ids=str)
def test_autocast_around_a_backward_pass_changes_no_gradient(gates):
    torch.manual_seed(0)
    leaves = [torch.randn(1, T, H, K, requires_grad=True) for _ in range(3)]
    log_decay = -torch.rand(gates) if gates else None

    def gradients(autocast: bool, create_graph: bool):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            o, _ = linear_recurrence(*leaves, log_decay=log_decay)
            return torch.autograd.grad(o.square().sum(), leaves, create_graph=create_graph)

    want = gradients(autocast=False, create_graph=False)
    due = torch.autograd.grad(sum(map(torch.sum, gradients(False, True))), leaves)
    first = gradients(autocast=True, create_graph=True)
    second = torch.autograd.grad(sum(map(torch.sum, first)), leaves)
    for a, b in zip((*first, *second), (*want, *due), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["rows", "packed"])
def test_an_exported_program_has_gradients(cu_seqlens):
    """Also one that was exported with inputs of which none were to be asked for."""
    torch.manual_seed(0)

    class Layer(torch.nn.Module):
        def forward(self, x, k, g, A, cu_seqlens):
            dt = torch.sigmoid(g)
            y, _ = selective_scan(x, dt, A, k, k, cu_seqlens=cu_seqlens)
            q, v = (t.unflatten(-1, (H, -1)) for t in (k, y))
            return linear_recurrence(q, q, v, log_decay=-dt[..., :H], cu_seqlens=cu_seqlens)[0]

    x, k, g = torch.randn(1, T, 6), 0.3 * torch.randn(1, T, 4), torch.randn(1, T, 6)
    given = (x, k, g, -torch.rand(6, 4), cu_seqlens)
    program = torch.export.export(Layer(), given).module()
    found = []
    for layer in (program, Layer()):
        leaves = [t.clone().requires_grad_() for t in given[:4]]
        layer(*leaves, cu_seqlens).square().sum().backward()
        found.append([t.grad for t in leaves])
    for a, b in zip(*found, strict=True):
        assert b.norm() > 0 and (a - b).norm() <= 1e-6 * b.norm()


def test_gpu_kernels_are_not_asked_for_what_they_would_drop(monkeypatch):
    """Forward derivatives through them would be zeros, and torch.func's gradients fail."""
    from subquad.engines.matrix.gpu import scan as matrix

    monkeypatch.setattr(matrix, "supported", lambda *args: None)  # as on a GPU
    monkeypatch.setattr(Tensor, "is_cuda", True)
    x = torch.randn(2, 1, T, H, K)

    def impl(x: Tensor, asked: str = "auto") -> str:
        return explain(x, x, x, impl=asked).impl

    def look(x: Tensor) -> Tensor:
        assert impl(x) == "torch"
        with pytest.raises(
            ValueError, match=r"impl: got 'triton'.*neither forward deriv.* nor vmap"
        ):
            impl(x, "triton")
        return x.sum()

    assert impl(x[0]) == impl(x[0], "triton") == "triton"
    torch.func.grad(look)(x[0])
    torch.func.vmap(look)(x)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x[0], x[1]))
