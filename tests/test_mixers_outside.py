"""The mixers against other people's code: shared random weights, outputs equal to 1e-4."""

import inspect

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Mamba2Config, MistralConfig, Qwen3NextConfig
from transformers.models.llama import modeling_llama
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3_next import modeling_qwen3_next

from subquad.mixers import (
    GLA,
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    Mamba2,
    RetNet,
    SlidingWindowAttention,
    SoftmaxAttention,
    deltanet,
    gated_deltanet,
    gla,
    linear_attention,
    retnet,
)

HIDDEN = 48


def tokens(T: int, B: int = 2) -> Tensor:
    return torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(1))


def excite(module: nn.Module) -> nn.Module:
    """Random weights large enough for every gate and norm to matter."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        elif name != "A_log":
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().mean() > 1e-2  # the tolerance below means something
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def use_torch_paths(module, monkeypatch) -> None:
    """Undo transformers' dispatch of its kernels to installed packages that need a GPU."""
    for name, value in list(vars(module).items()):
        if inspect.isfunction(value) and hasattr(value, "__wrapped__"):
            monkeypatch.setattr(module, name, inspect.unwrap(value))


@pytest.mark.parametrize("T", [1, 16, 70])
@pytest.mark.parametrize("num_groups", [1, 2])
@torch.no_grad()
def test_mamba2_is_transformers(T, num_groups, monkeypatch):
    use_torch_paths(modeling_mamba2, monkeypatch)
    config = Mamba2Config(
        hidden_size=HIDDEN,
        expand=2,
        head_dim=24,
        num_heads=4,
        state_size=16,
        n_groups=num_groups,
        chunk_size=16,
        num_hidden_layers=1,
    )
    theirs = excite(modeling_mamba2.Mamba2Mixer(config, layer_idx=0))
    ours = Mamba2(HIDDEN, head_dim=24, state_size=16, num_groups=num_groups)
    weights = {k.replace("conv1d.", "conv."): v for k, v in theirs.state_dict().items()}
    weights["conv.weight"] = weights["conv.weight"].squeeze(1)
    ours.load_state_dict(weights)
    x = tokens(T)
    assert_close(ours(x)[0], theirs(x))


@pytest.mark.parametrize("T", [1, 16, 70])
@pytest.mark.parametrize("num_v_heads", [2, 6])
@torch.no_grad()
def test_gated_deltanet_is_qwen3_next(T, num_v_heads, monkeypatch):
    use_torch_paths(modeling_qwen3_next, monkeypatch)
    Hk, H, K, V = 2, num_v_heads, 8, 12
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_key_heads=Hk,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = excite(modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, layer_idx=0))
    ours = GatedDeltaNet(
        HIDDEN,
        num_heads=Hk,
        num_v_heads=H,
        head_dim=K,
        expand_v=V / K,
        norm_eps=config.rms_norm_eps,
    )
    weights = theirs.state_dict()
    r = H // Hk  # theirs interleaves by key head, ours lays one kind after the other
    qkvz = weights.pop("in_proj_qkvz.weight").view(Hk, -1, HIDDEN).split((K, K, r * V, r * V), 1)
    ba = weights.pop("in_proj_ba.weight").view(Hk, -1, HIDDEN).split((r, r), 1)
    weights["in_proj.weight"] = torch.cat([w.flatten(0, 1) for w in (*qkvz, *ba)])
    weights["conv.weight"] = weights.pop("conv1d.weight").squeeze(1)
    weights["o_proj.weight"] = weights.pop("out_proj.weight")
    ours.load_state_dict(weights)
    x = tokens(T)
    assert_close(ours(x)[0], theirs(x))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_attention_is_llama_and_mistral(window, num_kv_heads):
    T, options = 40, {"num_heads": 4, "num_kv_heads": num_kv_heads}
    shared = {"hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": num_kv_heads}
    if window is None:
        config = LlamaConfig(**shared, attn_implementation="eager")
        theirs = modeling_llama.LlamaAttention(config, layer_idx=0)
        ours = SoftmaxAttention(HIDDEN, **options)
    else:
        config = MistralConfig(**shared, sliding_window=window, attn_implementation="eager")
        theirs = modeling_mistral.MistralAttention(config, layer_idx=0)
        ours = SlidingWindowAttention(HIDDEN, window=window, **options)
    excite(theirs)
    parts = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    ours.qkv_proj.weight.copy_(torch.cat([part.weight for part in parts]))
    ours.o_proj.weight.copy_(theirs.o_proj.weight)

    x, t = tokens(T), torch.arange(T)
    rotary = modeling_llama.LlamaRotaryEmbedding(config)(x, t[None])
    visible = t <= t[:, None]
    if window is not None:
        visible &= t > t[:, None] - window
    mask = torch.zeros(T, T).masked_fill(~visible, float("-inf"))[None, None]
    assert_close(ours(x)[0], theirs(x, rotary, mask)[0])


class Recorded:
    """`linear_recurrence` as a mixer module sees it, keeping what went in and came out."""

    def __init__(self, module, monkeypatch, name: str = "linear_recurrence") -> None:
        self.call = getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, q, k, v, **options):
        self.q, self.k, self.v, self.options = q, k, v, options
        self.o, *self.others = results = self.call(q, k, v, **options)
        return results


def by_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B,T,H,...] -> [B,H,T,...]."""
    return tuple(each.transpose(1, 2) for each in tensors)


class TestRecurrencesAreFlas:
    """flash-linear-attention's naive functions, on what each mixer gives its recurrence."""

    T = 70

    @torch.no_grad()
    def test_gla(self, monkeypatch):
        naive = pytest.importorskip("fla.ops.gla.naive")
        seen = Recorded(gla, monkeypatch)
        excite(GLA(HIDDEN, num_heads=2))(tokens(self.T))
        log_decay = seen.options["log_decay"]
        o, state = naive.naive_recurrent_gla(
            seen.q, seen.k, seen.v, log_decay, output_final_state=True
        )
        assert_close(seen.o, o)
        assert_close(seen.others[0], state)

    @torch.no_grad()
    def test_retnet(self, monkeypatch):
        naive = pytest.importorskip("fla.ops.retention.naive")
        seen = Recorded(retnet, monkeypatch)
        excite(RetNet(HIDDEN, num_heads=4))(tokens(self.T))
        (o,) = by_heads(naive.naive_retention(*by_heads(seen.q, seen.k, seen.v)))
        assert_close(seen.o, o)

    @pytest.mark.parametrize("negative", [False, True])
    @torch.no_grad()
    def test_deltanet(self, negative, monkeypatch):
        naive = pytest.importorskip("fla.ops.delta_rule.naive")
        seen = Recorded(deltanet, monkeypatch)
        mixer = DeltaNet(HIDDEN, num_heads=2, allow_negative_eigenvalues=negative)
        excite(mixer)(tokens(self.T))
        beta = seen.options["erase"].beta
        assert (beta.max() > 1) == negative
        o, state = naive.delta_rule_recurrence(*by_heads(seen.q, seen.k, seen.v, beta))
        assert_close(seen.o, *by_heads(o))
        assert_close(seen.others[0], state)

    @torch.no_grad()
    def test_gated_deltanet(self, monkeypatch):
        naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
        seen = Recorded(gated_deltanet, monkeypatch)
        excite(GatedDeltaNet(HIDDEN, num_heads=3))(tokens(self.T))
        beta, log_decay = seen.options["erase"].beta, seen.options["log_decay"]
        o, state = naive.naive_recurrent_gated_delta_rule(
            seen.q, seen.k, seen.v, beta, log_decay, output_final_state=True
        )
        assert_close(seen.o, o)
        assert_close(seen.others[0], state)

    @pytest.mark.parametrize("feature_map", ["elu1", "relu"])
    @torch.no_grad()
    def test_linear_attention(self, feature_map, monkeypatch):
        """The naive function divides itself; ours gives what to divide by."""
        naive = pytest.importorskip("fla.ops.linear_attn.naive")
        seen = Recorded(linear_attention, monkeypatch, "normalised_recurrence")
        excite(LinearAttention(HIDDEN, num_heads=2, feature_map=feature_map))(tokens(self.T))
        o, _ = naive.naive_recurrent_linear_attn(seen.q, seen.k, seen.v, scale=1.0, normalize=True)
        first = 8  # with relu the first denominators may be 0, where the two eps differ
        n = seen.others[0].unsqueeze(-1)
        assert_close((seen.o / (n + 1e-6))[:, first:], o[:, first:])


@torch.no_grad()
def test_linear_attention_is_the_quadratic_form():
    """Katharopoulos et al., equation 7: weights phi(q).phi(k), normalised over the past."""
    mixer, x = excite(LinearAttention(HIDDEN, num_heads=2)), tokens(30)
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # [B,H,T,D]
    weights = ((nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).mT).tril()
    o = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    assert_close(mixer(x)[0], mixer.o_proj(o.transpose(1, 2).flatten(-2)))
