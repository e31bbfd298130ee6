"""A launcher in two forms: an operator where somebody looks, a plain function where nobody does."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from subquad.engines.runtime.operator import operator

called = []


@operator("subquad_tests::scaled")
def scaled(x: Tensor, weight: Tensor | None, factor: float) -> Tensor:
    called.append("forward")
    return x.detach() * factor if weight is None else x.detach() * weight.detach() * factor


@scaled.register_fake
def _(x, weight, factor):
    return x.new_empty(x.shape)


@operator("subquad_tests::scaled_backward")
def scaled_backward(dy: Tensor, x: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    called.append("backward")
    return dy * weight * factor, (dy * x * factor).sum(0)


@scaled_backward.register_fake
def _(dy, x, weight, factor):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, ctx.factor = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, dy):
    return *scaled_backward(dy, *ctx.saved_tensors, ctx.factor), None


scaled.register_autograd(_gradients, setup=_save)


@operator("subquad_tests::fill", mutates=("state",))
def fill(x: Tensor, state: Tensor) -> Tensor:
    state.copy_(x)
    return x.clone()


@fill.register_fake
def _(x, state):
    return x.new_empty(x.shape)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def given():
    torch.manual_seed(0)
    called.clear()
    return torch.randn(5, 3, requires_grad=True), torch.randn(3, requires_grad=True)


@pytest.fixture
def dispatched(monkeypatch):
    """Names of the operators that were called through the dispatcher."""
    names = []
    for each in (scaled, scaled_backward, fill):

        def note(*args, op=each.op):
            names.append(op._name)
            return op(*args)

        monkeypatch.setattr(each, "op", note)
    return names


def expected(x, weight):
    return torch.autograd.grad((x * weight * 2.0).square().sum(), (x, weight))


def gradients(x, weight, call=lambda x, weight: scaled(x, weight, 2.0)):
    return torch.autograd.grad(call(x, weight).square().sum(), (x, weight))


def test_eager_calls_pass_the_dispatcher_by(given, dispatched):
    with torch.no_grad():
        torch.testing.assert_close(scaled(*given, 2.0), given[0] * given[1] * 2)
    with torch.inference_mode():
        scaled(*given, 2.0)
    torch.testing.assert_close(gradients(*given), expected(*given))
    parameters = [torch.nn.Parameter(t.detach().clone()) for t in given]
    torch.testing.assert_close(gradients(*parameters), expected(*parameters))
    assert dispatched == []
    assert called.count("forward") == 4 and called.count("backward") == 2


def test_memory_that_holds_the_negative_goes_by_the_dispatcher(given, dispatched, monkeypatch):
    x = torch.complex(given[0], given[0]).detach().conj().imag
    seen, launch = [], scaled._launch
    monkeypatch.setattr(scaled, "_launch", lambda *args: seen.append(args[0]) or launch(*args))
    torch.testing.assert_close(scaled(x, None, 2.0), -2 * given[0].detach())
    assert x.is_neg() and not seen and dispatched == ["scaled"]


def test_what_outlives_a_transform_goes_by_the_dispatcher(given, dispatched):
    outlived = []

    def leak(x):
        outlived.append(x)
        return x.square().sum()

    torch.func.grad(leak)(given[0].detach())
    y = torch._C._functorch.get_unwrapped(outlived[0]) * 2
    with torch.no_grad():
        torch.testing.assert_close(scaled(outlived[0], None, 2.0), y)
    assert dispatched == ["scaled"]


def test_only_what_needs_a_gradient_gets_one(given):
    x, weight = given
    dx = torch.autograd.grad(scaled(x, weight.detach(), 2.0).square().sum(), x)[0]
    torch.testing.assert_close(dx, expected(x, weight)[0])
    assert not scaled(x.detach(), None, 2.0).requires_grad


def test_modes_and_traces_see_the_operator(given):
    with Seen() as seen, torch.no_grad():
        scaled(*given, 2.0)
    assert seen.names == ["subquad_tests.scaled.default"]
    graph = make_fx(lambda x, weight: scaled(x, weight, 2.0))(*(t.detach() for t in given))
    assert "subquad_tests.scaled" in graph.code
    called.clear()
    with torch._subclasses.FakeTensorMode() as mode, torch.no_grad():
        fake = scaled(*(mode.from_tensor(t) for t in given), 2.0)
    assert fake.shape == (5, 3) and not called


def test_opcheck(given):
    torch.library.opcheck(scaled.op, (*given, 2.0))
    torch.library.opcheck(fill.op, (given[0].detach(), torch.zeros(5, 3)))


def test_compiled_whole(given):
    code = []

    def backend(graph, inputs):
        code.append(graph.code)
        return graph

    call = torch.compile(lambda x, w: scaled(x + 1, w, 2.0), fullgraph=True, backend=backend)
    x, weight = given
    wanted = torch.autograd.grad(((x + 1) * weight * 2).square().sum(), given)
    torch.testing.assert_close(gradients(x, weight, call), wanted)
    assert "subquad_tests.scaled" in code[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(given, reentrant):
    def call(x, weight):
        return checkpoint(lambda *g: scaled(*g, 2.0), x, weight, use_reentrant=reentrant)

    out = call(*given).square().sum()
    out.backward()
    torch.testing.assert_close([t.grad for t in given], list(expected(*given)))
    assert called.count("forward") == 2


def test_there_is_no_second_derivative(given):
    x, weight = given
    first = torch.autograd.grad(scaled(x, weight, 2.0).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def test_a_forward_derivative_is_refused_not_dropped(given):
    x, weight = given
    y = scaled(x, weight, 2.0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"tests::scaled: .* no forward deriv"):
            scaled(dual, None, 2.0)
        with pytest.raises(NotImplementedError, match="scaled_backward"):
            torch.autograd.grad(y, x, dual)
        torch.testing.assert_close(scaled(x.detach(), None, 2.0), 2 * x.detach())


def test_what_is_written_over_is_noticed():
    state = torch.ones(5, 3)
    product = (state * torch.ones(5, 3, requires_grad=True)).sum()  # keeps state for its gradient
    with torch.no_grad():
        fill(torch.zeros(5, 3), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        inside = torch.ones(5, 3)
        fill(torch.zeros(5, 3), inside)
    assert not inside.any()
