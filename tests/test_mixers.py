"""What holds for every mixer, tested by its being in MIXERS: however cut, the same outputs."""

import inspect
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.mixers import MIXERS, Mixer, State, attention

HIDDEN = 32
# Small, and away from the defaults wherever an option changes the path taken.
OPTIONS: dict[str, list[dict]] = {
    "softmax_attention": [{"num_heads": 4, "num_kv_heads": 2}, {"num_heads": 2, "qkv_bias": True}],
    "sliding_window_attention": [
        {"num_heads": 4, "num_kv_heads": 2, "window": 5},
        {"num_heads": 2, "window": 1},
        {"num_heads": 2, "window": 1000},
    ],
    "linear_attention": [
        {"num_heads": 2},
        {"num_heads": 2, "feature_map": "relu"},
        {"num_heads": 2, "feature_map": "identity", "normalise": False},
    ],
    "retnet": [{"num_heads": 4}],
    "gla": [{"num_heads": 2}],
    "mamba": [{"state_size": 4}, {"state_size": 3, "conv_bias": False, "bias": True}],
    "mamba2": [
        {"head_dim": 16, "state_size": 8, "num_groups": 2},
        {"head_dim": 32, "state_size": 8, "conv_bias": False, "bias": True},
    ],
    "s4d": [{"state_size": 8}, {"state_size": 4, "init": "legs"}],
    "deltanet": [{"num_heads": 2}, {"num_heads": 2, "allow_negative_eigenvalues": True}],
    "gated_deltanet": [
        {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5},
        {"num_heads": 3, "allow_negative_eigenvalues": True},
    ],
}
VARIANTS = [
    pytest.param(name, options, id="-".join([name, *(f"{k}={v}" for k, v in options.items())]))
    for name in MIXERS
    for options in OPTIONS.get(name, [{}])
]
every_variant = pytest.mark.parametrize("name, options", VARIANTS)
every_mixer = pytest.mark.parametrize("name", MIXERS)


def build(name: str, options: dict | None = None, seed: int = 0) -> Mixer:
    """A small mixer whose projections are large enough for every gate and norm to matter."""
    torch.manual_seed(seed)
    mixer = MIXERS[name](HIDDEN, **(OPTIONS.get(name, [{}])[0] if options is None else options))
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return mixer


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def cut(total: int, chance: random.Random) -> list[int]:
    """Bounds 0 < ... < total of a random number of pieces."""
    inner = chance.sample(range(1, total), chance.randint(0, min(8, total - 1)))
    return [0, *sorted(inner), total]


def in_pieces(mixer: Mixer, x: Tensor, bounds: list[int], state: State | None = None):
    outputs = []
    for start, end in pairwise(bounds):
        y, state = mixer(x[:, start:end], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_same_state(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for entry in actual:
        assert_close(actual[entry], expected[entry])


@every_variant
@torch.no_grad()
def test_any_cut_gives_the_same_outputs_and_state(name, options):
    mixer, x = build(name, options), tokens(2, 150)
    whole, end = mixer(x)
    chance = random.Random(name)
    prefill_then_decode = [0, 120, *range(121, 151)]
    for bounds in [prefill_then_decode, *(cut(150, chance) for _ in range(6))]:
        y, state = in_pieces(mixer, x, bounds)
        assert_close(y, whole)
        assert_same_state(state, end)


@every_variant
@torch.no_grad()
def test_packed_sequences_are_as_if_alone(name, options):
    """Packed from nothing, packed onwards from states, then onwards as a batch of unequal rows."""
    mixer, chance = build(name, options), random.Random(name)
    N = 3
    pieces = [[chance.randint(1, 70), chance.randint(1, 9), 1, 4] for _ in range(N)]
    sequences = [tokens(1, sum(sizes), seed=n) for n, sizes in enumerate(pieces)]
    alone = [mixer(x) for x in sequences]
    done, state = [0] * N, None
    for step in range(4):
        sizes = [pieces[n][step] for n in range(N)]
        new = [sequences[n][:, done[n] : done[n] + sizes[n]] for n in range(N)]
        if step < 2:
            ends = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
            y, state = mixer(torch.cat(new, dim=1), state, cu_seqlens=ends)
            outputs = y.split(sizes, dim=1)
        else:
            y, state = mixer(torch.cat(new), state)
            outputs = y.split(1)
        for n in range(N):
            assert_close(outputs[n], alone[n][0][:, done[n] : done[n] + sizes[n]])
            done[n] += sizes[n]
    for n in range(N):
        for entry, tensor in alone[n][1].items():
            mine = state[entry][n : n + 1]
            if entry in mixer.growing:  # rows end together; shorter ones have empty slots
                mine = mine[:, mine.shape[1] - tensor.shape[1] :]
            assert_close(mine, tensor)


@every_variant
def test_gradients_reach_everything_and_cross_a_cut(name, options):
    mixer, x = build(name, options), tokens(2, 20).requires_grad_()
    weight = tokens(2, 20, seed=5)
    leaves = [x, *mixer.parameters()]
    whole = torch.autograd.grad((mixer(x)[0] * weight).sum(), leaves)
    pieces = torch.autograd.grad((in_pieces(mixer, x, [0, 7, 8, 20])[0] * weight).sum(), leaves)
    names = ["x", *(n for n, _ in mixer.named_parameters())]
    for leaf, one, other in zip(names, whole, pieces):
        assert one.abs().sum() > 0, f"no gradient reaches {leaf}"
        assert (other - one).norm() <= 1e-4 * one.norm(), leaf


@every_variant
@torch.no_grad()
def test_the_future_does_not_matter(name, options):
    mixer, x = build(name, options), tokens(2, 90)
    y, _ = mixer(x)
    for t in (1, 40, 64, 89):
        changed = x.clone()
        changed[:, t:] = tokens(2, 90 - t, seed=9)
        again, _ = mixer(changed)
        assert_close(again[:, :t], y[:, :t])
        assert (again[:, t] - y[:, t]).abs().max() > 1e-3


@every_mixer
@torch.no_grad()
def test_rows_are_reordered_by_index_select(name):
    mixer, x, more = build(name), tokens(3, 12), tokens(3, 4, seed=2)
    _, state = mixer(x)
    rows = torch.tensor([2, 0, 0, 1])
    moved, _ = mixer(more[rows], {k: v.index_select(0, rows) for k, v in state.items()})
    assert_close(moved, mixer(more, state)[0][rows])


@every_mixer
@torch.no_grad()
def test_a_state_is_never_changed(name):
    mixer, x = build(name), tokens(2, 12)
    _, state = mixer(x)
    before = {entry: tensor.clone() for entry, tensor in state.items()}
    first, _ = mixer(tokens(2, 1, seed=3), state)
    mixer(tokens(2, 5, seed=4), state)
    for entry, tensor in state.items():
        assert torch.equal(tensor, before[entry]), entry
    assert torch.equal(mixer(tokens(2, 1, seed=3), state)[0], first)


@every_mixer
@torch.no_grad()
def test_the_state_is_what_the_class_says(name):
    mixer = build(name)
    _, state = mixer(tokens(2, 12))
    assert set(state) == set(mixer.state_names)
    for entry, tensor in state.items():
        assert tensor.shape[0] == 2 and tensor.is_contiguous()
        # what is kept must not hold on to the far larger tensor that it was cut from
        assert tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes + 64, entry
    if "recurrent" in state:
        assert state["recurrent"].dtype in (torch.float32, torch.complex64)


@every_mixer
@torch.no_grad()
def test_bfloat16_autocast(name):
    mixer, x = build(name), tokens(2, 70)
    exact, _ = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = in_pieces(mixer, x, [0, 66, 67, 70])
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 0.05 * exact.norm()
    if "recurrent" in state:
        assert state["recurrent"].dtype in (torch.float32, torch.complex64)


@every_mixer
@torch.no_grad()
def test_bfloat16_weights(name):
    mixer, x = build(name).to(torch.bfloat16), tokens(2, 70).to(torch.bfloat16)
    y, state = in_pieces(mixer, x, [0, 66, 67, 70])
    exact, _ = mixer.float()(x.float())  # the rounded weights, computed with precisely
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 0.05 * exact.norm()
    if "recurrent" in state:
        assert state["recurrent"].dtype in (torch.float32, torch.complex64)


@every_mixer
@torch.no_grad()
def test_float64(name):
    mixer, x = build(name).double(), tokens(2, 70).double()
    whole, end = mixer(x)
    y, state = in_pieces(mixer, x, [0, 66, 67, 70])
    torch.testing.assert_close(y, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-9)
    assert (build(name)(x.float())[0] - y).norm() < 1e-4 * y.norm()


@every_mixer
@torch.no_grad()
def test_state_dict_round_trip(name):
    mixer, other = build(name), build(name, seed=7)
    x = tokens(1, 9)
    assert (other(x)[0] - mixer(x)[0]).abs().max() > 1e-3
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x)[0], mixer(x)[0])


@every_mixer
def test_reset_parameters_fills_every_parameter(name):
    mixer = build(name)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(3)
    mixer.reset_parameters()
    for entry, parameter in mixer.named_parameters():
        assert parameter.isfinite().all(), entry
    loaded = dict(mixer.named_parameters())
    if "dt_bias" in loaded:  # what transformers has loaded stays as it is
        before = loaded["dt_bias"].clone()
        loaded["dt_bias"]._is_hf_initialized = True
        mixer.reset_parameters()
        assert torch.equal(loaded["dt_bias"], before)


@every_mixer
@torch.no_grad()
def test_compiles_without_a_graph_break(name):
    mixer, x = build(name), tokens(2, 24)
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    y, state = compiled(x[:, :20])
    assert_close(torch.cat([y, compiled(x[:, 20:], state)[0]], dim=1), mixer(x)[0])


@pytest.mark.parametrize("hidden", [64, 128, 192, 256, 768, 1024])
@every_mixer
def test_defaults_fit_usual_widths(name, hidden):
    with torch.device("meta"):
        mixer = MIXERS[name](hidden)
    assert mixer.hidden_size == hidden and mixer.row == name
    x = torch.empty(2, 5, hidden, device="meta")  # sizes alone
    y, state = mixer(x)
    assert y.shape == mixer(x, state)[0].shape == x.shape and y.is_meta


class TestBadInput:
    @every_mixer
    def test_x(self, name):
        mixer = build(name)
        for x in (tokens(2, 4)[..., :-1], tokens(4), tokens(2, 0), "text"):
            with pytest.raises(ValueError, match=r"^x: got"):
                mixer(x)

    @every_mixer
    def test_state(self, name):
        mixer, x = build(name), tokens(2, 4)
        _, state = mixer(x)
        with pytest.raises(ValueError, match=r"^state: got \['other'\]; expected"):
            mixer(x, {"other": x})
        with pytest.raises(ValueError, match=r"^state\[.*1 rows; expected 2"):
            mixer(x, {entry: tensor[:1] for entry, tensor in state.items()})
        with pytest.raises(ValueError, match=r"state|normaliser"):
            wrong = {e: t[..., :-1] if t.ndim > 1 else t for e, t in state.items()}
            mixer(x, wrong)
        with pytest.raises(ValueError, match=r"^state: got Tensor; expected a dict"):
            mixer(x, x)
        if "recurrent" in state:
            rounded = state | {"recurrent": state["recurrent"].bfloat16()}
            with pytest.raises(
                ValueError, match=r"^state.*: got torch.bfloat16; expected.*float32"
            ):
                mixer(x, rounded)

    @every_mixer
    def test_cu_seqlens(self, name):
        mixer, x = build(name), tokens(1, 6)
        for bounds in ([0, 3], [1, 6], [0, 4, 4, 6], [0, 5, 3, 6]):
            with pytest.raises(ValueError, match=r"^cu_seqlens: got"):
                mixer(x, cu_seqlens=torch.tensor(bounds))
        with pytest.raises(ValueError, match=r"^cu_seqlens: got batch 2"):
            mixer(tokens(2, 6), cu_seqlens=torch.tensor([0, 3, 6]))
        _, state = mixer(x)
        with pytest.raises(ValueError, match=r"^state\[.*1 rows; expected 2"):
            mixer(x, state, cu_seqlens=torch.tensor([0, 3, 6]))

    @every_mixer
    def test_hidden_size(self, name):
        for hidden in (0, -8, 32.0, "32"):
            with pytest.raises(ValueError, match=r"^hidden_size: got"):
                MIXERS[name](hidden)

    @pytest.mark.parametrize(
        "name, options, argument",
        [
            ("softmax_attention", {"num_heads": 5}, "num_heads"),
            ("softmax_attention", {"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads"),
            ("softmax_attention", {"head_dim": 7}, "head_dim"),
            ("sliding_window_attention", {"window": 0}, "window"),
            ("linear_attention", {"feature_map": "tanh"}, "feature_map"),
            ("linear_attention", {"feature_map": "identity"}, "feature_map"),
            ("linear_attention", {"num_heads": 3}, "num_heads"),
            ("retnet", {"num_heads": 32}, "num_heads"),
            ("retnet", {"value_expand": 0}, "value_expand"),
            ("gla", {"num_heads": 3}, "num_heads"),
            ("mamba2", {"head_dim": 24}, "head_dim"),
            ("mamba2", {"head_dim": 16, "num_groups": 3}, "num_groups"),
            ("deltanet", {"num_heads": 0}, "num_heads"),
            ("gated_deltanet", {"num_heads": 5}, "num_heads"),
            ("gated_deltanet", {"num_heads": 2, "num_v_heads": 3}, "num_v_heads"),
            ("gated_deltanet", {"head_dim": 5, "expand_v": 1.5}, "expand_v"),
        ],
    )
    def test_options(self, name, options, argument):
        self._refuses(name, options, argument)

    @every_mixer
    def test_counts(self, name):
        """Every option whose default is a whole number takes positive whole numbers only."""
        parameters = inspect.signature(MIXERS[name].__init__).parameters.values()
        counts = [p.name for p in parameters if type(p.default) is int]
        counts += [p.name for p in parameters if p.name in ("num_heads", "head_dim")]
        assert counts or name == "linear_attention"
        for option in counts:
            for wrong in (0, -1, 1.5, "4", True):
                self._refuses(name, {option: wrong}, option)

    def _refuses(self, name, options, argument):
        with pytest.raises(ValueError, match=f"{argument}: got"):
            MIXERS[name](HIDDEN, **options)


@torch.no_grad()
def test_a_window_keeps_no_more_than_it_needs():
    mixer = build("sliding_window_attention")  # window 5
    _, state = mixer(tokens(2, 50))
    for _ in range(3):
        assert state["keys"].shape[1] == state["values"].shape[1] == 4
        _, state = mixer(tokens(2, 1), state)
    assert state["length"].tolist() == [53, 53]


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_full_attention():
    options = {"num_heads": 4, "num_kv_heads": 2}
    full = build("softmax_attention", options)
    window = build("sliding_window_attention", {**options, "window": 60})
    window.load_state_dict(full.state_dict())
    x = tokens(2, 60)
    assert_close(window(x)[0], full(x)[0])


@pytest.mark.parametrize(("window", "block"), [(5, 512), (70, 512), (70, 32), (None, 32)])
@pytest.mark.parametrize("remembered", [0, 40])
def test_attention_by_blocks_is_attention_with_one_mask(monkeypatch, window, block, remembered):
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    T, S = 200, 200 + remembered
    q, k, v = torch.randn(2, T, 4, 8), torch.randn(2, S, 2, 8), torch.randn(2, S, 2, 8)
    first = torch.tensor([0, 30 if remembered else 0])
    position, slot = torch.arange(S - T, S)[:, None], torch.arange(S)
    visible = (slot <= position) & (slot > position - (window or S))
    visible = visible & (slot >= first[:, None, None, None])
    inputs = [each.requires_grad_() for each in (q, k, v)]
    o = attention._sdpa_by_blocks(q, k, v, window, first)
    expected = attention._sdpa(q, k, v, visible)
    assert_close(o, expected)
    weight = torch.randn_like(o)
    ours = torch.autograd.grad((o * weight).sum(), inputs)
    for found, wanted in zip(ours, torch.autograd.grad((expected * weight).sum(), inputs)):
        assert_close(found, wanted)


class Written(TorchDispatchMode):
    """Counts the numbers that operations write."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numbers += sum(
            tensor.numel()
            for tensor in (result if isinstance(result, tuple) else (result,))
            if isinstance(tensor, torch.Tensor) and not tensor._is_view()
        )
        return result


def test_training_through_a_window_costs_as_much_for_every_token():
    mixer = MIXERS["sliding_window_attention"](16, num_heads=1, window=64)

    def numbers(length: int) -> int:
        with Written() as written:
            mixer(torch.randn(1, length, 16, requires_grad=True))[0].sum().backward()
        return written.numbers

    assert numbers(8192) < 2.2 * numbers(4096)


@every_variant
@pytest.mark.parametrize("how", ["eager", "compiled", "vmap"])
@torch.no_grad()
def test_a_row_out_of_a_batch_goes_on_as_if_it_had_been_alone(name, options, how):
    """Of unequal rows; keys of the shorter begin with empty slots, which nobody may see."""
    mixer, x = build(name, options), tokens(1, 18)
    _, states = mixer(x[:, :14], cu_seqlens=torch.tensor([0, 3, 14]))
    state = {entry: tensor[:1] for entry, tensor in states.items()}
    alone = torch.cat([x[:, :3], x[:, 14:]], dim=1)
    if how == "eager":
        y, _ = in_pieces(mixer, x[:, 14:], [0, 1, 4], state)
    elif how == "compiled":
        torch._dynamo.reset()
        y, _ = torch.compile(mixer, fullgraph=True, backend="eager")(x[:, 14:], state)
    else:
        several = {entry: tensor[None] for entry, tensor in state.items()}
        y = torch.vmap(mixer)(x[None, :, 14:], several)[0][0]
    assert_close(y, mixer(alone)[0][:, 3:])


@torch.no_grad()
def test_a_window_forgets_what_left_it():
    mixer, x = build("sliding_window_attention"), tokens(1, 40)  # window 5
    changed = x.clone()
    changed[:, :10] = tokens(1, 10, seed=2)
    difference = (mixer(changed)[0] - mixer(x)[0]).abs().amax(-1)[0]
    assert (difference[:14] > 1e-3).all()
    assert (difference[14:] < 1e-5).all()
