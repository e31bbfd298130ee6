"""Rows, and uses of a model, that nobody here wrote: decoding computes what the modules compute.

Each row is decoded by the decoder and, in a copy, module by module.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import subquad
from subquad.decode.cpu import decoder
from subquad.decode.cpu.decoder import Decoder
from subquad.mixers import MIXERS
from subquad.mixers.base import Mixer
from test_decoder import IDS, build, calls, close, decode  # noqa: F401


def traced(model: nn.Module) -> list[bool]:
    """Of each block."""
    pieces = model.model.decoder._pieces
    return [piece.trace is not None for piece in pieces for _ in piece.layers]


def undecoded(model: nn.Module) -> nn.Module:
    """A copy that calls every module."""
    twin = copy.deepcopy(model)
    twin.model.decoder = lambda *_: None
    return twin


class Leaky(Mixer):
    """h_t = sigmoid(a) h_{t-1} + W x_t: a row as a user writes it."""

    row = "leaky"
    state_names = ("h",)

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.W = nn.Linear(hidden_size, hidden_size)
        self.a = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("level", torch.ones(hidden_size))
        self.scale = 1.0
        self.reset_parameters()

    def forward(self, x, state=None, *, cu_seqlens=None):
        past = self.check_inputs(x, state, cu_seqlens)
        h = past["h"] if past else x.new_zeros(x.shape[0], self.hidden_size)
        outputs = []
        for x_t in self.W(x).unbind(1):
            h = self.step(h, x_t)
            outputs.append(h)
        return torch.stack(outputs, 1) * self.scale, {"h": h}

    def step(self, h: Tensor, x: Tensor) -> Tensor:
        return self.a.sigmoid() * h + x * self.level


class Counting(Leaky):
    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.steps = 0

    def step(self, h, x):
        self.steps += 1
        return super().step(h, x) * (1 + self.steps)


class CountingInAList(Counting):
    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.log = []

    def step(self, h, x):
        self.log.append(x.shape)
        return Leaky.step(self, h, x) * len(self.log)


class CountingInABuffer(Leaky):
    def step(self, h, x):
        self.level = self.level + 1
        return super().step(h, x)


class AddingAttributes(Leaky):
    def step(self, h, x):
        name = f"seen_{len(vars(self))}"
        setattr(self, name, 0)
        return super().step(h, x) * len(vars(self))


class AddingAndFailing(AddingAttributes):
    def step(self, h, x):
        return (super().step(h, x) / 100).sin()


class Branching(Leaky):
    def step(self, h, x):
        return super().step(h, x if x.sum() > 0 else -x)


class Swallowing(Leaky):
    def step(self, h, x):
        try:
            if float(x.sum()) > 0:
                x = -x
        except Exception:
            x = 2 * x
        return super().step(h, x)


class Fused(Leaky):
    @staticmethod
    @torch.compile(backend="eager")
    def fused(a, h, x):
        return a.sigmoid() * h + x

    def step(self, h, x):
        return self.fused(self.a, h, x)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 2)


class OwnFunction(Leaky):
    def step(self, h, x):
        return super().step(h, Custom.apply(x))


class Growing(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        past = self.check_inputs(x, state, cu_seqlens)
        rows = torch.cat([past["h"], self.W(x)], 1) if past else self.W(x)
        y = x * rows[:, :1] + rows[:, -x.shape[1] :] if x.shape[1] == 1 else x * rows[:, :1] + rows
        return y, {"h": rows}


class MoreState(Leaky):
    """Has a second state from its first single token on."""

    def check_inputs(self, x, state, cu_seqlens):
        return state or {}

    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        if x.shape[1] == 1:
            past = state.get("extra", torch.zeros(1, self.hidden_size))
            after["extra"] = past + x[:, 0]
            y = y + past[:, None]
        return y, after


class TwoSteps(Leaky):
    """Two steps of a delta rule for each token, as DeltaProduct."""

    def forward(self, x, state=None, *, cu_seqlens=None):
        past = self.check_inputs(x, state, cu_seqlens)
        B, T, D = x.shape
        v = torch.stack([self.W(x), x], 2).view(B, 2 * T, 1, D)
        k = subquad.engines.norm.api.l2_norm(v, D)
        beta = torch.stack([x[..., :1], x[..., 1:2]], 2).sigmoid().view(B, 2 * T, 1)
        o, h = subquad.linear_recurrence(
            k, k, v, erase=subquad.Delta(beta), state=past.get("h"), cu_seqlens=cu_seqlens
        )
        return o.view(B, T, 2, D)[:, :, 1], {"h": h}


class Training(Leaky):
    def step(self, h, x):
        return super().step(h, F.dropout(x, 0.5, self.training))


ROWS = {  # and whether they are traced
    Leaky: True,
    Counting: False,
    CountingInAList: False,
    CountingInABuffer: False,
    AddingAttributes: False,
    AddingAndFailing: False,
    Branching: False,
    Swallowing: False,
    Fused: True,  # as what it was made of: modes keep compiled graphs away
    OwnFunction: False,
    Growing: False,
    MoreState: False,
    TwoSteps: False,
    Training: False,
}


@pytest.fixture
def rows(monkeypatch):
    """Build a model with a row of the user's between two of ours."""

    def make(kind: type[Mixer], layers=("gla", "leaky", "mamba2")) -> nn.Module:
        monkeypatch.setitem(MIXERS, "leaky", kind)
        return build(list(layers))

    return make


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_a_users_row_computes_what_it_computes(kind, rows, monkeypatch):
    model = rows(kind)
    twin = undecoded(model)
    assert close(decode(model), decode(twin), 1e-5)
    assert traced(model) == [True, ROWS[kind], True]
    monkeypatch.setattr(decoder, "Recording", None)  # what was refused is not tried again
    assert close(decode(model), decode(twin), 1e-5)
    for name in ("steps", "log"):
        mine, others = (getattr(m.model.layers[1].mixer, name, None) for m in (model, twin))
        assert mine == others  # being traced was no call


def test_random_numbers_are_drawn_for_each_token(rows):
    model = rows(Training).train()
    torch.manual_seed(0)
    got = decode(model)
    torch.manual_seed(0)
    assert close(got, decode(undecoded(model)), 1e-5)


class Sub(Leaky):
    def step(self, h, x):
        return 0.5 * h + x


def patch_class(model: nn.Module, monkeypatch) -> None:
    monkeypatch.setattr(Leaky, "step", Sub.step)


def patch_linear(model: nn.Module, monkeypatch) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 1.5)


def change_class(model: nn.Module, monkeypatch) -> None:
    model.model.layers[1].mixer.__class__ = Sub


def move_buffer(model: nn.Module, monkeypatch) -> None:
    level = model.model.layers[1].mixer.level
    level.data = 2 * level


def set_buffer(model: nn.Module, monkeypatch) -> None:
    model.model.layers[1].mixer.level = torch.full((64,), 2.0)


def write_buffer(model: nn.Module, monkeypatch) -> None:
    model.model.layers[1].mixer.level.mul_(2)


def add_attribute(model: nn.Module, monkeypatch) -> None:
    monkeypatch.setattr(Leaky, "step", lambda self, h, x: h + x * getattr(self, "gain", 1.0))
    decode(model)
    model.model.layers[1].mixer.gain = 3.0


def transpose(model: nn.Module, monkeypatch) -> None:
    weight = model.model.layers[1].mixer.W.weight
    weight.data = weight.data.t()


def replace_block(model: nn.Module, monkeypatch) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    model.model.layers[1].mixer.scale = 2.0


def set_last_norm(model: nn.Module, monkeypatch) -> None:
    model.model.norm.eps = 3.0


def parametrize(model: nn.Module, monkeypatch) -> None:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    nn.utils.parametrize.register_parametrization(
        model.model.layers[1].mixer.W, "weight", Doubled()
    )


def tie(model: nn.Module, monkeypatch) -> None:
    mixer, mlp = model.model.layers[1].mixer, model.model.layers[1].mlp
    mlp.down.weight = nn.Parameter(torch.randn(64, 64))
    mlp.gate.weight = mlp.up.weight = mixer.W.weight = mlp.down.weight


def take_optimiser_step(model: nn.Module, monkeypatch) -> None:
    with torch.enable_grad():
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def make_subclass(model: nn.Module, monkeypatch) -> None:
    class Doubling(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                plain = [x.as_subclass(Tensor) if isinstance(x, Doubling) else x for x in args]
                return func(*plain, **(kwargs or {})) * (2 if "linear" in func.__name__ else 1)

    W = model.model.layers[1].mixer.W
    W._parameters["weight"] = W.weight.detach().as_subclass(Doubling)


def to_meta_and_back(model: nn.Module, monkeypatch) -> None:
    state = {name: 0.9 * w for name, w in model.state_dict().items()}
    model.model.layers[1].to_empty(device="meta")
    model.load_state_dict(state, assign=True)


CHANGES = [
    patch_class, patch_linear, change_class, move_buffer, set_buffer, write_buffer, add_attribute,
    transpose, replace_block, set_last_norm, parametrize, tie, take_optimiser_step, make_subclass,
    to_meta_and_back,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_tokens_counts_from_the_next(change, rows, monkeypatch):
    model = rows(Leaky)
    with torch.no_grad():
        cache = model(IDS[:, :8]).past_key_values
        model(IDS[:, 8:9], past_key_values=cache)  # traced as it was
        before = model(IDS[:, 9:10], past_key_values=copy.copy(cache)).logits
        change(model, monkeypatch)
        assert isinstance(model.model.decoder, Decoder)
        got = model(IDS[:, 9:10], past_key_values=copy.copy(cache)).logits
        model.model.decoder = lambda *_: None
        want = model(IDS[:, 9:10], past_key_values=copy.copy(cache)).logits
    assert not close(got, before, 1e-3) and close(got, want, 1e-5)


def test_a_compiled_block_is_called_as_compiled(rows):
    model, seen = rows(Leaky), []
    decode(model)

    def backend(graph, examples):
        return lambda *args: (seen.append(1), graph(*args))[1]

    model.model.layers[1].compile(backend=backend, dynamic=False)
    assert close(decode(model), decode(undecoded(model)), 1e-5)
    assert traced(model) == [True, False, True] and len(seen) >= 16


def test_functional_call_decodes_with_its_weights(rows):
    model = rows(Leaky)
    before = decode(model)
    weights = {n: (0.5 * w).detach() for n, w in model.named_parameters()}
    with torch.no_grad():
        cache = model(IDS[:, :8]).past_key_values
        given = {"input_ids": IDS[:, 8:9], "past_key_values": cache, "use_cache": False}
        got = torch.func.functional_call(model, weights, (), given).logits
        other = copy.deepcopy(model)
        other.load_state_dict(weights, strict=False)
        want = undecoded(other)(**given).logits
    assert close(got, want, 1e-5) and not close(got[0], before[:1], 1e-3)
    assert torch.equal(decode(model), before)


class Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("first", [True, False], ids=["from the first token", "later"])
def test_a_mode_sees_every_function(first, calls):  # noqa: F811
    model = build(["gla", "mamba2"])
    if not first:
        decode(model)
    calls.clear()
    want = decode(undecoded(model))
    with Watcher() as watcher:
        got = decode(model)
    assert close(got, want, 1e-5) and not calls
    assert watcher.seen.count(subquad.linear_recurrence) == 2 * 17


def test_a_device_as_a_mode_slows_nothing(calls):  # noqa: F811
    model = build(["gla", "mamba2"])
    want = decode(model)
    calls.clear()
    with torch.device("cpu"):
        assert torch.equal(decode(model), want)
    assert len(calls) == 16


def test_a_global_hook_is_not_shown_a_trace():
    model, seen = build(["gla"]), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        decode(model)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 17 * 7


def test_another_default_dtype_changes_nothing():
    model = build(["gla", "mamba", "gated_deltanet"])
    with torch.no_grad():
        cache = model(IDS[:, :8]).past_key_values
        want = model(IDS[:, 8:9], past_key_values=copy.copy(cache)).logits
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                for twin in (model, copy.deepcopy(model)):
                    got = twin(IDS[:, 8:9], past_key_values=copy.copy(cache)).logits
                    assert got.dtype == torch.float32 and close(got, want, 1e-5)
            finally:
                torch.set_default_dtype(torch.float32)


def test_a_first_token_under_autocast_does_not_decide():
    model = build(["gla", "mamba2"])
    want = decode(undecoded(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decode(model)
    assert close(decode(model), want, 1e-5)


def test_inference_mode_and_no_grad_take_turns():
    model = build(["gla", "mamba2"])
    want = decode(model)
    model.model.decoder = Decoder()
    with torch.inference_mode():
        assert torch.equal(decode(model), want)
    assert torch.equal(decode(model), want)


def test_states_that_do_not_fit_are_refused_as_ever():
    model = build(["gla", "deltanet"])
    with torch.no_grad():
        cache = model(IDS[:, :8]).past_key_values
        model(IDS[:, 8:9], past_key_values=cache)
        x, good = torch.randn(1, 1, 64), cache.states
        for change in (
            lambda s: s.pop("recurrent"),
            lambda s: s.update(other=s["recurrent"]),
            lambda s: s.update(recurrent=s["recurrent"][:, :, :3]),
            lambda s: s.update(recurrent=s["recurrent"].half()),
        ):
            wrong = [dict(state) for state in good]
            change(wrong[1])
            with pytest.raises(ValueError, match="state"):
                model.model._run(x, wrong, None, False)
        strided = [{n: t.mT.contiguous().mT for n, t in state.items()} for state in good]
        got, want = (model.model._run(x, s, None, False)[0][0] for s in (strided, good))
    assert close(got, want, 1e-5)


def test_an_interrupted_trace_is_made_again(monkeypatch):
    model = build(["gla", "mamba2"])
    want = decode(model)
    norm = model.model.layers[0].mixer.norm
    was, norm.eps = norm.eps, 1.0

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder, "Fingerprint", interrupt)
        decode(model)
    norm.eps = was
    assert torch.equal(decode(model), want)
