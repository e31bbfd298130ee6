"""Traces: the operations they know equal PyTorch's, and what they do not know is refused."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import subquad
from subquad import SubquadConfig, SubquadForCausalLM
from subquad.decode.cpu.operations import Untraceable
from subquad.decode.cpu.recording import Recording
from subquad.decode.cpu.trace import Trace
from subquad.engines import selective_scan, short_convolution
from subquad.engines.norm.api import gated_rms_norm, l2_norm, rms_norm
from subquad.engines.projection.api import linear
from subquad.engines.runtime.eager import can_call_compiled_code
from subquad.mixers import MIXERS
from subquad.mixers.base import Mixer

X = torch.cat([torch.randn(1, 2, 34), 30 * torch.randn(1, 2, 6)], -1)  # large ones among them
Z = torch.randn(1, 2, 40)
BIAS = nn.Parameter(torch.randn(40))


def trace(layers, examples):
    """Of a function from tensors to tensors."""
    recording = Recording()
    inputs = [recording.input(x.shape) for x in examples]
    return Trace(recording, inputs, recording.record(layers, inputs))


OPERATIONS = {
    "exp": lambda x, z: x.exp() + torch.exp(z),
    "exp at its ends": lambda x, z: torch.cat([(x * 100).exp(), (-(x * x) * 9 - 80).exp()]),
    "sigmoid": lambda x, z: x.sigmoid() + torch.sigmoid(z),
    "silu": lambda x, z: F.silu(x),
    "softplus": lambda x, z: F.softplus(x),
    "logsigmoid": lambda x, z: F.logsigmoid(x),
    "elu": lambda x, z: F.elu(x) + 1,
    "relu": lambda x, z: F.relu(x) + z.relu(),
    "gelu": lambda x, z: F.gelu(x),
    "glu": lambda x, z: F.glu(x),
    "tanh abs": lambda x, z: x.tanh() + torch.abs(z) * x.detach(),
    "log": lambda x, z: (x.abs() + 1e-3).log() + torch.log1p(z.abs() * 1e-4) + z.square(),
    "logaddexp": lambda x, z: torch.logaddexp(x, z),
    "maximum": lambda x, z: torch.maximum(x, z) + BIAS.maximum(x[..., :1]),
    "sum": lambda x, z: x.sum(-1, keepdim=True) + torch.sum(z, dim=-1).unsqueeze(-1),
    "softmax": lambda x, z: x.softmax(-1) + F.softmax(z, dim=-1),
    "lerp": lambda x, z: torch.lerp(x, z, BIAS) + x.lerp(z, 0.25),
    "neg": lambda x, z: -x + torch.neg(z),
    "numbers": lambda x, z: 2 - (3 * x + 1) / 7 - 0.5 + z * 2,
    "add sub mul div": lambda x, z: (x + z) * (x - z) / (z * z + 1),
    "broadcast": lambda x, z: x * z[..., :1] + BIAS * z[:, :1] - BIAS,
    "addcmul": lambda x, z: torch.addcmul(x, z, BIAS, value=0.5),
    "views": lambda x, z: x.view(1, 2, 8, 5).transpose(2, 3).flatten(1) + z.reshape(1, 80),
    "pieces": lambda x, z: x.split((30, 10), -1)[0][..., ::2] * z.chunk(2, -1)[1][..., :15],
    "pad": lambda x, z: F.pad(x, (1, 2), value=3.0) + F.pad(z, (0, 3, 0, 0)),
    "cat": lambda x, z: torch.cat((x * 2, z), -1),
    "stack": lambda x, z: torch.stack((x[..., 0::2] * 2, z[..., 1::2]), -1).flatten(-2),
    "casts that change nothing": lambda x, z: x.float().to(z.dtype) + 1,
    "constants": lambda x, z: x * torch.arange(40.0) + torch.linspace(0, 1, 40),
    "an input": lambda x, z: x,
    "a part of an input": lambda x, z: z[..., 3:9],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pytorchs(name):
    operation = OPERATIONS[name]
    traced = trace(lambda t: [operation(*t)], [X, Z])
    for scale in (1.0, -0.5):  # other numbers than it was traced with
        x, z = scale * X, Z + scale
        [got] = traced.run([x, z])
        want = operation(x, z).detach()
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


def test_special_numbers_keep_their_meaning():
    x = torch.tensor([[[float("nan"), float("inf"), -float("inf"), 0.0, -200.0, 200.0]]])
    for operation in (torch.exp, torch.sigmoid, F.softplus, F.relu, F.elu, torch.tanh, torch.abs):
        [got] = trace(lambda t, f=operation: [f(t[0])], [x]).run([x])
        np.testing.assert_allclose(got, operation(x), rtol=2e-6, atol=1e-30)


def test_outputs_never_share_memory():
    def twice(tensors):
        y = tensors[0] + 1
        return [y, y, y[..., :3], tensors[0]]

    outputs = trace(twice, [X]).run([X])
    for got, want in zip(outputs, (X + 1, X + 1, (X + 1)[..., :3], X)):
        assert torch.equal(got, want)
    assert len({y.data_ptr() for y in (*outputs, X)}) == 5


def draw(*shape):
    return torch.randn(*shape)


LOW_RANK = subquad.LowRank(draw(1, 1, 4, 8) / 8, draw(1, 1, 4, 8) / 8)
QKV = (draw(1, 1, 2, 8), draw(1, 1, 2, 8), draw(1, 1, 4, 6))
ENGINES = {
    "no decay": lambda s: subquad.linear_recurrence(*QKV, state=s),
    "fixed": lambda s: subquad.linear_recurrence(*QKV, -torch.arange(1.0, 5), state=s),
    "delta": lambda s: subquad.linear_recurrence(
        *QKV, -torch.ones(4, 8), subquad.Delta(torch.ones(1, 1, 4)), scale=2.0, state=s
    ),
    "low rank": lambda s: subquad.linear_recurrence(*QKV, erase=LOW_RANK, state=s),
    "bonus": lambda s: subquad.linear_recurrence(*QKV, bonus=torch.ones(4, 8), state=s),
    "scan": lambda s: selective_scan(
        SCAN[0], SCAN[1], SCAN[2], SCAN[3], SCAN[3], state=s.reshape(1, 24, 8)
    ),
    "scan and skip": lambda s: selective_scan(*SCAN[:4], SCAN[3], SCAN[4], s.reshape(1, 24, 8)),
}
SCAN = (draw(1, 1, 24), draw(1, 1, 24).exp(), -draw(24, 8).exp(), draw(1, 1, 8), draw(24))


@pytest.mark.parametrize("name", ENGINES)
def test_engines_are_what_they_are_untraced(name):
    state = draw(1, 4, 8, 6)
    traced = trace(lambda t: ENGINES[name](*t), [state])
    for start in (state, 2 * state):
        for got, want in zip(traced.run([start]), ENGINES[name](start)):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


def scripted(x):
    return x.sin() * x


with warnings.catch_warnings(action="ignore"):  # it is deprecated, and in use
    scripted = torch.jit.script(scripted)


def unseen(x):
    with torch._C.DisableTorchFunction():
        return x.sin()


def by_another_way(x):
    try:
        return x.sin()
    except Exception:
        return x


class OfItsOwn(Tensor):
    pass


PLACE, PLACES, WEIGHT = torch.tensor(1), torch.tensor([0, 2]), torch.randn(30, 40)
REFUSED = {
    "add alpha": lambda x: torch.add(x, x, alpha=0.5),
    "floor": lambda x: torch.div(x, x, rounding_mode="floor"),
    "out": lambda x: torch.exp(x, out=torch.empty(1, 2, 40)),
    "out of a constant": lambda x: x + torch.zeros(1, 2, 40, out=x),
    "by a tiny number": lambda x: x / 1e-40,
    "a constant by value": lambda x: x * torch.full((40,), x[0, 0, 0]),
    "a size by value": lambda x: x * torch.arange(PLACE)[:1],
    "a place by value": lambda x: x[:, PLACE],
    "a part by value": lambda x: x[:, :PLACE],
    "a start by value": lambda x: x.narrow(1, PLACE, 1),
    "places in a tensor": lambda x: x[..., PLACES],
    "places in a list": lambda x: x[..., [0, 2]],
    "places by truth": lambda x: x[x.new_ones(1, 2, 40) > 0],
    "several rows": lambda x: F.linear(x, WEIGHT),
    "a vector of weights": lambda x: F.linear(x[:, 1], WEIGHT[0]),
    "a row of another shape": lambda x: F.linear(x[:, 1].unflatten(1, (40, 1)), WEIGHT),
    "one bias for all": lambda x: F.linear(x[:, 1], WEIGHT, BIAS[:1]),
    "one gate for all": lambda x: gated_rms_norm(x, x[..., :1], 40, None, 1e-5, gate_first=True),
    "weights of another norm": lambda x: rms_norm(x, 20, BIAS[:30], 1e-5),
    "parts of a norm": lambda x: rms_norm(x, 16, None, 1e-5),
    "scripted": scripted,
    "unseen": unseen,
    "by another way": by_another_way,
    "vmap": lambda x: torch.vmap(lambda row: row * 2, 1, 1)(x),
    "grad": lambda x: torch.func.grad(lambda y: (y * y).sum())(x),
    "numpy's": lambda x: x + torch.from_numpy(np.ones(40, np.float32)),
    "a class of its own": lambda x: x + torch.ones(40).as_subclass(OfItsOwn),
    "an error": lambda x: x.view(7),
    "its version": lambda x: x * x._version,
    "sin": lambda x: x.sin(),
    "a value": lambda x: x if x.sum() > 0 else -x,
    "a number": lambda x: x * x[0, 0, 0].item(),
    "in place": lambda x: (x + 1).mul_(2),
    "written to": lambda x: x.index_fill(-1, torch.tensor([0]), 1.0),
    "random": lambda x: x + torch.randn(40),
    "dropout": lambda x: F.dropout(x),
    "half": lambda x: x.half().float(),
    "integers": lambda x: x + torch.arange(40),
    "other softplus": lambda x: F.softplus(x, beta=2.0),
    "numpy": lambda x: x + torch.from_numpy(x.numpy() * 2),
    "list": lambda x: x + sum(x.flatten().tolist()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unknown_is_refused(name):
    with pytest.raises(Untraceable):
        trace(lambda t: [REFUSED[name](t[0])], [X])


ENGINES_REFUSED = {
    "two tokens": lambda s: subquad.linear_recurrence(
        *(x.expand(1, 2, -1, -1) for x in QKV), state=s
    ),
    "asked for otherwise": lambda s: subquad.linear_recurrence(*QKV, state=s, impl="torch"),
    "no state": lambda s: subquad.linear_recurrence(*QKV),
    "wrong state": lambda s: subquad.linear_recurrence(*QKV, state=s[:, :2]),
    "two scans": lambda s: selective_scan(
        *(x.expand(1, 2, -1) for x in SCAN[:2]), SCAN[2], *[SCAN[3].expand(1, 2, -1)] * 2,
        state=s.reshape(1, 24, 8),
    ),
    "another scan": lambda s: selective_scan(
        *SCAN[:3], SCAN[3][..., :4], SCAN[3], state=s.reshape(1, 24, 8)
    ),
    "relu": lambda s: short_convolution(*SCAN[::2][:2], None, "relu", s.view(1, 8, 24)[:, 1:]),
    "taps": lambda s: short_convolution(*SCAN[::2][:2], state=s.view(1, 8, 24)),
    "two filters": lambda s: short_convolution(
        SCAN[0].expand(1, 2, -1), SCAN[2], state=s.view(1, 8, 24)[:, 1:]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINES_REFUSED)
def test_calls_of_engines_that_are_not_one_token_are_refused(name):
    with pytest.raises(Untraceable):
        trace(lambda t: ENGINES_REFUSED[name](*t), [draw(1, 4, 8, 6)])


def test_what_is_refused_leaves_nothing_on_the_tape():
    recording = Recording()
    x = recording.input((1, 4))
    y = recording.record(lambda x: F.linear(x, WEIGHT[:3, :4]), x)
    with pytest.raises(Untraceable, match="sin"):
        recording.record(lambda y: (F.linear(y, WEIGHT[:5, :3]) * 2).sin(), y)
    z = recording.record(lambda y: y + 1, y)
    given = draw(1, 4)
    [got] = Trace(recording, [x], [z]).run([given])
    torch.testing.assert_close(got, given @ WEIGHT[:3, :4].T + 1)
    assert len(recording.weights) == 1


class Leaky(Mixer):
    """h_t = sigmoid(a) h_{t-1} + W x_t: a row as a user writes it."""

    row = "leaky"
    state_names = ("h",)

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.W = nn.Linear(hidden_size, hidden_size)
        self.a = nn.Parameter(torch.zeros(hidden_size))
        self.calls = 0
        self.reset_parameters()

    def forward(self, x, state=None, *, cu_seqlens=None):
        past = self.check_inputs(x, state, cu_seqlens)
        h = past["h"] if past else x.new_zeros(x.shape[0], self.hidden_size)
        outputs = []
        for x_t in self.W(x).unbind(1):
            h = self.a.sigmoid() * h + x_t
            outputs.append(h)
        return torch.stack(outputs, 1), {"h": h}


class Counting(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        self.calls += 1
        return super().forward(x, state, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("kind", [Leaky, Counting])
def test_a_users_row_is_traced_unless_it_changes_itself(kind, monkeypatch):
    monkeypatch.setitem(MIXERS, "leaky", kind)
    config = SubquadConfig(vocab_size=50, hidden_size=32, layers=["leaky", "gla"])
    model = SubquadForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        want = model(ids).logits[:, 4:]
        cache = model(ids[:, :4]).past_key_values
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-5)
    pieces = model.model.decoder._pieces
    traced = [piece.trace is not None for piece in pieces]
    assert traced == ([True] if kind is Leaky else [False, True])
    if kind is Counting:
        assert model.model.layers[0].mixer.calls >= 10


def test_engines_show_themselves_to_torch_function():
    """One call of an engine, not what it does within."""
    seen = []

    class Watcher(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q = torch.randn(1, 5, 2, 4)
    want = subquad.linear_recurrence(q, q, q)
    with Watcher():
        got = subquad.linear_recurrence(q, q, q)
    assert seen == [subquad.linear_recurrence]
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    with torch.device("cpu"):  # a mode of torch's own
        assert torch.equal(subquad.linear_recurrence(q, q, q)[0], want[0])


class Watcher(TorchFunctionMode):
    """Which functions were called, and what a change of theirs to the result would be worth."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_engines_called_by_keywords_show_themselves_too():
    q = torch.randn(1, 1, 2, 4)
    with Watcher() as watcher, torch.no_grad():
        subquad.linear_recurrence(q=q, k=q, v=q, state=torch.zeros(1, 2, 4, 4))
        linear(x=torch.randn(1, 1, 512), weight=torch.randn(512, 512))
        l2_norm(x=q, size=4)
    assert [f for f in watcher.seen if not f.__module__.startswith("torch")] == [
        subquad.linear_recurrence, linear, l2_norm,
    ]  # fmt: skip


def test_compiled_code_is_not_called_behind_a_mode():
    x = torch.ones(2, 3)
    assert can_call_compiled_code([x])
    with Watcher():
        assert not can_call_compiled_code([x])
    with torch.device("cpu"):  # sees every function too, but only says where tensors are made
        assert can_call_compiled_code([x])
        with Watcher():
            assert not can_call_compiled_code([x])


def test_a_projection_of_other_shapes_is_pytorchs():
    x, weight = torch.randn(1, 1, 512), torch.randn(512, 512)
    assert linear(torch.randn(1 << 16), torch.randn(1 << 16)).ndim == 0
    torch.testing.assert_close(linear(x, weight, torch.ones(1)), F.linear(x, weight) + 1)
    with pytest.raises(RuntimeError):
        linear(x.mT, weight)
    with pytest.raises(RuntimeError):
        linear(x, weight, torch.ones(3))


def test_compiled_code_makes_results_of_float32_only():
    before = torch.get_default_dtype()
    x, w = torch.randn(1, 1, 512), torch.randn(512, 512)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(linear(x, w), F.linear(x, w))
    finally:
        torch.set_default_dtype(before)
