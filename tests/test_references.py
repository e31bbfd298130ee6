"""Rows against implementations that were not written here, with shared random weights."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor, nn

from awake import awake
from subquad import mixers
from subquad.mixers.base import Depth
from subquad.models import SubquadConfig, SubquadForCausalLM


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """To a share of the reference's spread."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.std()


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Its weights away from anything an initialisation might make special."""
    torch.manual_seed(seed)
    for parameter in awake(module).parameters():
        parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(1.0))
    return module


@pytest.mark.parametrize("index", [0, 2])
def test_lightning_attention_is_minimaxs(index):
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_dim=16,
        num_hidden_layers=4, block_size=8, layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    theirs = drawn(MiniMaxLightningAttention(config, index)).eval()
    ours = mixers.LightningAttention(48, num_heads=3, depth=Depth(index, 4))
    by_head = theirs.qkv_proj.weight.unflatten(0, (3, 3, 16))  # [H,(q,k,v),D,hidden]
    ours.qkv_proj.weight.copy_(by_head.transpose(0, 1).flatten(0, 2))
    for name in ("output_gate", "norm", "out_proj"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    x = torch.randn(2, 29, 48)
    want, state = theirs(x, None, None)
    got, new = ours(x)
    close(got, want)
    close(new["recurrent"], state)


def test_hgrn2_is_flas_recurrence():
    from fla.ops.gla.naive import naive_recurrent_gla

    model = SubquadForCausalLM(SubquadConfig(layers=["hgrn2"] * 3, hidden_size=32))
    model = drawn(model)
    layer = model.model.layers[2].mixer
    x = torch.randn(2, 21, 32)
    q, f, v = layer.in_proj(x).chunk(3, -1)
    bounds = model.model.shared["hgrn2"].weight.softmax(0).cumsum(0)
    bound = (bounds - bounds[0])[2]
    f = bound + (1 - bound) * f.sigmoid()
    q, k, v, g = (t.unflatten(-1, (1, 32)) for t in (q * q.sigmoid(), 1 - f, v, f.log()))
    o, _ = naive_recurrent_gla(q, k, v, g)
    want = layer.o_proj(layer.norm(o.flatten(-2)))
    close(layer(x, shared=model.model.shared["hgrn2"])[0], want)


def test_gsa_is_flas_recurrence():
    from fla.ops.gsa.naive import naive_recurrent_gsa

    layer = drawn(mixers.GSA(32, num_heads=4, num_kv_heads=2, num_slots=6))
    x = torch.randn(2, 19, 32)
    q, k, v, gate = layer.in_proj(x).split(layer.sizes, -1)
    silu = nn.functional.silu
    q, k, v = (silu(t).unflatten(-1, (-1, 8)) for t in (q, k, v))
    g = nn.functional.logsigmoid(gate.unflatten(-1, (2, 6))) / 8
    k, v, g = (t.repeat_interleave(2, 2) for t in (k, v, g))
    o, _ = naive_recurrent_gsa(q, k, v, 1 - g.exp(), g, scale=1.0)
    close(layer(x)[0], layer.o_proj(layer.norm(silu(o.flatten(-2)))))


def rwkv7_weights(model: SubquadForCausalLM) -> dict[str, Tensor]:
    """Under the names that RWKV's own files have."""
    z = {
        "emb.weight": model.model.embed_tokens.weight,
        "blocks.0.ln0.weight": model.model.embed_norm.weight,
        "blocks.0.ln0.bias": model.model.embed_norm.bias,
        "ln_out.weight": model.model.norm.weight,
        "ln_out.bias": model.model.norm.bias,
        "head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.model.layers):
        at, m = f"blocks.{i}.", block.mixer
        for ours, norm in (("ln1", block.mixer_norm), ("ln2", block.mlp_norm)):
            z |= {f"{at}{ours}.weight": norm.weight, f"{at}{ours}.bias": norm.bias}
        att = at + "att."
        z |= {f"{att}x_{n}": m.mix[j][None, None] for j, n in enumerate("rwkvag")}
        loras = {"w": m.w_lora, "a": m.a_lora, "g": m.g_lora, "v": m.v_lora or m.a_lora}
        for n, lora in loras.items():  # the first layer's v is in their files, and not used
            z |= {f"{att}{n}1": lora.down.weight.T, f"{att}{n}2": lora.up.weight.T}
            if lora.bias is not None:
                z[f"{att}{n}0"] = lora.bias[None, None]
        z |= {f"{att}{n}": getattr(m, n)[None, None] for n in ("k_k", "k_a")}
        z[f"{att}r_k"] = m.r_k
        names = {"receptance": "r", "key": "k", "value": "v", "output": "o"}
        z |= {f"{att}{n}.weight": getattr(m, f"{p}_proj").weight for n, p in names.items()}
        z |= {f"{att}ln_x.weight": m.norm_weight, f"{att}ln_x.bias": m.norm_bias}
        z |= {
            f"{at}ffn.x_k": block.mlp.mix[None, None],
            f"{at}ffn.key.weight": block.mlp.up.weight,
            f"{at}ffn.value.weight": block.mlp.down.weight,
        }
    return {name: t.detach().clone().contiguous() for name, t in z.items()}


def test_rwkv7_is_rwkvs(tmp_path, monkeypatch):
    """The whole model against the `rwkv` package: at once, then token by token."""
    monkeypatch.setitem(os.environ, "RWKV_V7_ON", "1")
    monkeypatch.setitem(os.environ, "RWKV_JIT_ON", "0")
    monkeypatch.setitem(os.environ, "RWKV_CUDA_ON", "0")
    monkeypatch.delitem(sys.modules, "rwkv.model", raising=False)
    rwkv = pytest.importorskip("rwkv.model")
    config = SubquadConfig(
        layers=["rwkv7"] * 3, hidden_size=128, vocab_size=65, tie_word_embeddings=False
    )
    model = drawn(SubquadForCausalLM(config)).eval()
    torch.save(rwkv7_weights(model), tmp_path / "model.pth")
    theirs = rwkv.RWKV(model=str(tmp_path / "model"), strategy="cpu fp32")
    ids = torch.randint(65, (40,)).tolist()
    want, state = theirs.forward(ids[:30], None, full_output=True)
    outputs = model(torch.tensor([ids[:30]]), use_cache=True)
    close(outputs.logits[0], want)
    for token in ids[30:]:
        want, state = theirs.forward([token], state)
        outputs = model(torch.tensor([[token]]), past_key_values=outputs.past_key_values)
        close(outputs.logits[0, 0], want)


def test_mlstm_is_xlstms():
    layer = pytest.importorskip("xlstm.blocks.mlstm.layer")
    config = layer.mLSTMLayerConfig(
        embedding_dim=32, num_heads=4, context_length=33, _num_blocks=2, qkv_proj_blocksize=4
    )
    theirs = drawn(layer.mLSTMLayer(config))
    ours = mixers.MLSTM(32, num_heads=4)
    cell = theirs.mlstm_cell
    for name, there in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj")):
        getattr(ours, name).weight.copy_(getattr(theirs, there).weight)
    ours.up_proj.weight.copy_(theirs.proj_up.weight)
    ours.down_proj.weight.copy_(theirs.proj_down.weight)
    ours.conv.weight.copy_(theirs.conv1d.conv.weight.squeeze(1))
    ours.conv.bias.copy_(theirs.conv1d.conv.bias)
    ours.gate_proj.weight.copy_(torch.cat([cell.igate.weight, cell.fgate.weight]))
    ours.gate_proj.bias.copy_(torch.cat([cell.igate.bias, cell.fgate.bias]))
    ours.norm_weight.copy_(1 + cell.outnorm.weight)
    ours.skip.copy_(theirs.learnable_skip)
    x = 3 * torch.randn(2, 33, 32)
    want = theirs(x)
    close(ours(x)[0], want)
    state = their_state = None
    first, state = ours(x[:, :20])
    for t in range(33):  # and their step form
        y, their_state = theirs.step(x[:, t : t + 1], **(their_state or {}))
        close(y, want[:, t : t + 1])
    for t in range(20, 33):
        y, state = ours(x[:, t : t + 1], state)
        close(y, want[:, t : t + 1])
    close(first, want[:, :20])


def test_hyena_is_its_definition():
    """No package runs it here: the Toeplitz matrices of the paper's section 3.2, in float64."""
    layer = drawn(mixers.Hyena(8, filter_width=16, filter_bands=2, max_length=50)).double()
    x = torch.randn(2, 23, 8, dtype=torch.float64)
    u = layer.in_proj(x).transpose(1, 2)
    u = nn.functional.conv1d(
        nn.functional.pad(u, (2, 0)), layer.conv_weight[:, None], layer.conv_bias, groups=24
    )
    x0, x1, v = u.chunk(3, 1)  # [B,D,T]
    lags = torch.arange(23, dtype=torch.float64)
    t = lags / 49
    f = torch.linspace(1e-4, 1, 2, dtype=torch.float64)
    wave = torch.exp(-1j * f * (2 * torch.pi * lags / 50)[:, None])
    h = torch.cat([t[:, None], wave.real, wave.imag], 1)
    for hidden in layer.filter.layers:
        h = torch.sin(layer.filter.frequency * hidden(h))
    h = layer.filter.out(h) * torch.exp(-t[:, None] * layer.filter.rate.abs())  # [T,D]
    toeplitz = torch.zeros(8, 23, 23, dtype=torch.float64)
    for i in range(23):
        for j in range(i + 1):
            toeplitz[:, i, j] = h[i - j]
    w = x1 * v
    z = torch.einsum("dts,bds->bdt", toeplitz, w) + layer.bias[:, None] * w
    want = layer.out_proj((x0 * z).transpose(1, 2))
    close(layer(x)[0], want, 1e-6)
