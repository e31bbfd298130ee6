"""Decoding in one compiled call: the same numbers as module by module, and given up when it must.

`calls` counts how often a tape ran, so that no test passes because nothing was traced.
"""

import copy
import os
import pickle
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import subquad
from subquad.backend.cpu import tape
from subquad.backend.cpu.compile import at
from subquad.backend.cpu.tape import kernel
from subquad.backend.cpu.team import Team, share, team
from subquad.engines.projection.cpu import linear
from subquad.mixers import MIXERS
from subquad.models import SubquadConfig, SubquadForCausalLM

OPTIONS = {
    "deltanet": {"allow_negative_eigenvalues": True, "conv_width": 3, "num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "conv_width": 1},
    "gla": {"num_heads": 1, "gate_temperature": 4.0},
    "linear_attention": {"feature_map": "relu", "normalise": False, "num_heads": 2},
    "mamba": {"bias": True, "conv_bias": False, "state_size": 5},
    "mamba2": {"bias": True, "head_dim": 16, "state_size": 24, "num_groups": 2},
    "gsa": {"num_heads": 2, "num_kv_heads": 1, "num_slots": 5},
    "hgrn2": {"num_heads": 2, "lower_bounds": False},
    "lightning_attention": {"num_heads": 2, "head_dim": 12},
    "mlstm": {"num_heads": 2, "expand": 1},
    "rwkv7": {"head_dim": 16, "gate_rank": 5},
}
TRACED = sorted(OPTIONS)
HYBRID = ["gated_deltanet", "gla", "softmax_attention", "mamba", "retnet", "mamba2"]


def build(layers: list[str], options: dict | None = None, hidden: int = 64) -> SubquadForCausalLM:
    torch.manual_seed(0)
    config = SubquadConfig(
        vocab_size=300, hidden_size=hidden, layers=layers, mixer_options=options or {}
    )
    model = SubquadForCausalLM(config).eval()
    with torch.no_grad():  # nothing stays at zero or one, where a mistake would not show
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


@pytest.fixture
def calls(monkeypatch):
    """One entry for each tape that ran."""
    ran, run = [], tape.Tape.run
    monkeypatch.setattr(tape.Tape, "run", lambda *args: (ran.append(1), run(*args))[1])
    return ran


IDS = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decode(model: nn.Module, start: int = 8) -> Tensor:
    """Logits [T-start, V] of the tokens that are read one by one."""
    cache = model(IDS[:, :start]).past_key_values
    tokens = IDS[:, start:].split(1, dim=1)
    return torch.cat([model(t, past_key_values=cache).logits[0] for t in tokens])


@torch.no_grad()
def at_once(model: nn.Module, start: int = 8) -> Tensor:
    return model(IDS).logits[0, start:]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


@pytest.mark.parametrize("options", [False, True], ids=["published", "other options"])
@pytest.mark.parametrize("row", TRACED)
def test_a_traced_row_is_the_row(row, options, calls):
    model = build([row] * 3, {row: OPTIONS[row]} if options else None)
    assert close(decode(model), at_once(model))
    assert len(calls) == 16  # the three blocks and the norm together, each token


def test_in_a_hybrid_what_can_be_is_traced(calls):
    model = build(HYBRID)
    assert close(decode(model), at_once(model))
    assert len(calls) == 3 * 16


def test_every_row_that_can_be_traced_is_tested():
    """The others: attention, whose state grows; retnet, which counts in integers; s4d's complex
    numbers."""
    traced = []
    for row in MIXERS:
        model = build([row])
        decode(model)
        if any(piece.trace is not None for piece in model.model.decoder._pieces):
            traced.append(row)
    assert sorted(traced) == TRACED


def test_old_states_stay_as_they_were(calls):
    model = build(HYBRID)
    with torch.no_grad():
        cache = model(IDS[:, :8]).past_key_values
        before = copy.deepcopy(cache.states)
        snapshot = copy.copy(cache)
        first = model(IDS[:, 8:9], past_key_values=cache).logits
        assert cache.states is not snapshot.states
        for old, kept in zip(before, snapshot.states):
            assert all(torch.equal(old[name], kept[name]) for name in old)
        assert torch.equal(model(IDS[:, 8:9], past_key_values=snapshot).logits, first)


def swap_data(p: nn.Parameter) -> None:
    p.data = p.data * 0.5


CHANGES = {
    "in place": lambda m: m.model.layers[1].mixer.in_proj.weight.data.mul_(0.5),
    "other memory": lambda m: swap_data(m.model.layers[1].mixer.in_proj.weight),
    "another parameter": lambda m: setattr(
        m.model.layers[1].mixer.norm, "weight", nn.Parameter(torch.randn(64))
    ),
    "a setting": lambda m: setattr(m.model.layers[1].mixer, "beta_scale", 0.3),
    "another norm": lambda m: setattr(m.model, "norm", nn.LayerNorm(64)),
    "loaded": lambda m: m.load_state_dict({n: w * 0.9 for n, w in m.state_dict().items()}),
    "loaded by assignment": lambda m: m.load_state_dict(
        {n: w * 0.9 for n, w in m.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_count_from_the_next_token(change, calls):
    model = build(["gla", "deltanet", "mamba2"], {"deltanet": {"num_heads": 1}})
    before = decode(model)
    CHANGES[change](model)
    after = decode(model)
    assert not close(after, before)
    assert close(after, at_once(model))


def hook(model: nn.Module, seen: list) -> None:
    model.model.layers[1].mixer.o_proj.register_forward_hook(
        lambda m, i, o: seen.append(1) or o * 2
    )


def pre_hook(model: nn.Module, seen: list) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda m, i: seen.append(1))


def own_forward(model: nn.Module, seen: list) -> None:
    module = model.model.layers[1].mixer.conv
    forward = module.forward
    module.forward = lambda *args: (seen.append(1), forward(*args))[1]


def replaced(model: nn.Module, seen: list) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(1)
            return 2 * super().forward(x)

    old = model.model.layers[1].mixer.in_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.model.layers[1].mixer.in_proj = new


@pytest.mark.parametrize("change", [hook, pre_hook, own_forward, replaced])
def test_who_watches_a_module_sees_it_called(change, calls):
    model = build(["gla", "deltanet", "mamba2"])
    decode(model)
    seen: list[int] = []
    calls.clear()
    change(model, seen)
    got = decode(model)
    assert len(seen) == 1 + 16
    assert len(calls) == 2 * 16  # the blocks before and after
    assert close(got, at_once(model))


def test_a_global_hook_sees_every_module(calls):
    model, seen = build(["gla"]), []
    decode(model)
    calls.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        decode(model)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 17 * 7 and not calls


def test_lora_and_quantised_layers(calls):
    model = build(["gla", "mamba2"])
    plain = decode(model)
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["in_proj"])).eval()
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    adapted = decode(lora)
    assert not close(adapted, plain) and close(adapted, at_once(lora))
    calls.clear()
    assert close(decode(lora.merge_and_unload()), adapted) and len(calls) == 16
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    calls.clear()
    quantised = decode(model)
    model.model.decoder = lambda *_: None
    # Its scales are those of a call's tokens, so one pass over all of them is another model.
    assert not calls and not close(quantised, plain) and torch.equal(quantised, decode(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_go_module_by_module(dtype, calls):
    model = build(["gated_deltanet", "mamba"])
    decode(model)
    calls.clear()
    got = decode(model.to(dtype))
    assert not calls and close(got, at_once(model), 0.05 if dtype == torch.bfloat16 else 1e-6)


def test_gradients_batches_and_autocast_go_module_by_module(calls):
    model = build(["gated_deltanet", "mamba2"])
    decode(model)
    calls.clear()
    cache = model(IDS[:, :8]).past_key_values
    model(IDS[:, 8:9], past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].mixer.in_proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        pair = model(IDS[:, :8].repeat(2, 1)).past_key_values
        two = model(IDS[:, 8:9].repeat(2, 1), past_key_values=pair).logits
    assert torch.equal(two[0], two[1]) and close(two[0, -1], at_once(model)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decode(model).dtype == torch.bfloat16
    assert not calls


def test_copies_decode_with_weights_of_their_own(calls):
    model = build(["gated_deltanet", "mamba2"])
    want = decode(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(decode(twin), want)
        with torch.no_grad():
            twin.model.norm.weight.mul_(2)
        assert not close(decode(twin), want)
    assert torch.equal(decode(model), want)


def test_watch_is_told(calls):
    model = build(["gated_deltanet", "mamba", "gla"])
    with torch.no_grad():
        cache = model(IDS[:, :8]).past_key_values
        with subquad.watch() as told:
            model(IDS[:, 8:9], past_key_values=cache)
    assert len(calls) == 1
    assert [(e.impl, e.form) for e in told] == [("numba", "recurrent")] * 3


def test_several_threads_may_decode_one_model_at_once():
    model = build(["gated_deltanet", "mamba2"], hidden=128)
    want = decode(model)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: decode(model), range(12)))
    # Who finds the trace in use goes module by module, where sums have another order.
    assert all(close(got, want, 1e-5) for got in results)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    model = build(["gated_deltanet", "mamba2"], hidden=256)
    before = torch.get_num_threads()
    with torch.no_grad():
        cache = model(IDS[:, :8]).past_key_values
        want = model(IDS[:, 8:9], past_key_values=copy.copy(cache)).logits
        try:
            torch.set_num_threads(threads)
            assert torch.equal(model(IDS[:, 8:9], past_key_values=cache).logits, want)
        finally:
            torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes():
    """Of OpenMP's team and of ours it inherits no thread, and would wait for them for ever."""
    model, large = build(["gla", "mamba", "softmax_attention"]), torch.ones(1 << 20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = decode(model)
        assert large.exp().isfinite().all()  # torch, too, has begun with two threads
        child = os.fork()
        if child == 0:
            os._exit(_compute_in_a_child(model, large, want))
        until = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        assert os.waitstatus_to_exitcode(ended[1]) == 0
    finally:
        torch.set_num_threads(before)


def _compute_in_a_child(model: SubquadForCausalLM, large: Tensor, want: Tensor) -> int:
    """The child's exit status: 0 if all is well."""
    try:
        same = close(decode(model), want)  # other threads, other sums
        model(IDS, labels=IDS).loss.backward()
        ours = team()._process == os.getpid()
        return 0 if same and ours and bool(large.exp().isfinite().all()) else 1
    except BaseException:
        return 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N, K", [(1, 1), (7, 5), (8, 64), (33, 100), (300, 257), (1025, 64)])
def test_linear_is_the_product(N, K, bias):
    generator = torch.Generator().manual_seed(N)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, w, b = draw(1, 1, K), draw(N, K), draw(N) if bias else None
    want = x.double() @ w.double().T + (b.double() if bias else 0)
    for weight in (w, w.t().contiguous().t()):
        got = linear(x, weight, b)
        assert got.shape == want.shape
        scale = x.double().abs() @ w.double().abs().T + 1
        assert ((got - want).abs() <= 1e-6 * scale).all()


@kernel
def _count(arguments, unit):
    at(arguments, (unit + 1,))[unit] += np.float32(1.0)


def test_each_unit_is_done_once():
    """With more helpers than cores, and callers that find the team working for another."""
    units, rounds, callers = 501, 300, 3
    own = Team()
    own._grow(3)

    def work(counts: Tensor) -> None:
        for _ in range(rounds):
            share(own.board, 3, _count, counts.data_ptr(), units)

    counts = torch.zeros(callers, units)
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(work, counts))
    own.close()
    assert torch.equal(counts, torch.full((callers, units), float(rounds)))
    assert not any(thread.is_alive() for thread in own._threads)


def test_helpers_sleep_and_are_woken(monkeypatch):
    own = Team()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for _ in range(2):
        own.ready()
        assert wait(lambda: own._asleep[0] == 1)
    own.ready()
    assert own._asleep[0] == 0
    own.close()
    assert not own._threads[0].is_alive()


def wait(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()
