"""How blocks are put together: layouts, options a layer, depth, shared modules, carried tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from awake import awake
from subquad import SubquadConfig, SubquadForCausalLM, mixers
from subquad.layers.block_layout import BlockLayout
from subquad.mixers.base import Depth

IDS = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))


def build(**kwargs) -> SubquadForCausalLM:
    torch.manual_seed(0)
    return awake(SubquadForCausalLM(SubquadConfig(hidden_size=64, **kwargs))).eval()


def test_a_layer_has_options_of_its_own(tmp_path):
    layers = [("gla", {"num_heads": 8}), "gla", ["softmax_attention", {"num_heads": 2}]]
    model = build(layers=layers, mixer_options={"gla": {"num_heads": 2}})
    heads = [block.mixer.num_heads for block in model.model.layers]
    assert heads == [8, 2, 2] and model.config.rows == ["gla", "gla", "softmax_attention"]
    model.save_pretrained(tmp_path)
    again = SubquadForCausalLM.from_pretrained(tmp_path)
    assert [block.mixer.num_heads for block in again.model.layers] == heads
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ([("gla",)], r"layers\[0\]: got \['gla'\]; expected a row's name, or a pair"),
        ([("gla", 3)], r"layers\[0\]: got \['gla', 3\]"),
        ([("gla", {"heads": 3})], r"mixer_options\['gla'\]: got 'heads'"),
        (["gla", ("gla", {"num_heads": 7})], r"gla with hidden_size=64: .*num_heads: got 14"),
        ([("galla", {})], "layers: got 'galla'.*perhaps 'gla'"),
    ],
)
def test_wrong_layers_are_named(layers, error):
    with pytest.raises(ValueError, match=error):
        SubquadConfig(layers=layers, hidden_size=64)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ({"nrom": "layer"}, "block: got 'nrom'.*perhaps 'norm'"),
        ({"norm": "batch"}, "norm: got 'batch'; expected one of rms, layer"),
        ({"alpha": "2"}, "alpha: got '2'; expected a number"),
        (["norm"], "block: got .*; expected a dict"),
    ],
)
def test_wrong_layouts_are_named(block, error):
    with pytest.raises(ValueError, match=error):
        SubquadConfig(mixer="gla", hidden_size=64, block=block)


@torch.no_grad()
@pytest.mark.parametrize("residual", ["pre", "post", "normed", "parallel"])
def test_residuals(residual):
    block = {"residual": residual, "norm": "layer", "channel_mixer": "gelu"}
    if residual == "normed":
        block |= {"alpha": 3.5, "beta": 0.5}
    model = build(mixer="gla", num_hidden_layers=1, block=block)
    layer = model.model.layers[0]
    x = torch.randn(2, 9, 64)
    f, g, a, b = (
        lambda x: layer.mixer(x)[0], layer.mlp, layer.mixer_norm, layer.mlp_norm
    )  # fmt: skip
    if residual == "pre":
        y = x + f(a(x))
        y = y + g(b(y))
    elif residual == "post":
        y = x + a(f(x))
        y = y + b(g(y))
    elif residual == "normed":
        y = 3.5 * a(x) + 0.5 * f(a(x))
        y = 3.5 * b(y) + 0.5 * g(b(y))
    else:
        y = x + f(a(x)) + g(b(x))
    torch.testing.assert_close(layer(x)[0], y)


def test_the_published_layout_is_the_rows():
    model = build(layers=["rwkv7", "gla"])
    first, second = model.model.layers
    assert first.layout == mixers.RWKV7.layout and second.layout == BlockLayout()
    assert isinstance(first.mixer_norm, nn.LayerNorm)
    assert isinstance(model.model.embed_norm, nn.LayerNorm)
    assert build(layers=["gla"]).model.embed_norm is None


@torch.no_grad()
def test_a_channel_mixers_state_is_part_of_the_blocks():
    model = build(layers=["rwkv7", "rwkv7"])
    outputs = model(IDS, use_cache=True)
    (state, _) = outputs.past_key_values.states
    assert set(state) == {"shift", "recurrent", "mlp.shift"}
    whole = model(torch.cat([IDS, IDS], 1)).logits[:, 12:]
    parts = model(IDS, past_key_values=outputs.past_key_values).logits
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_one_layer_carries_reaches_the_next():
    """RWKV-7's later layers mix their values with the first layer's, here one row apart."""
    model = build(layers=["rwkv7", "gla", "rwkv7"])
    assert model.model.layers[2].mixer.v_lora is not None
    before = model(IDS).logits
    with torch.no_grad():
        model.model.layers[2].mixer.v_lora.bias.fill_(-30.0)  # none of the first layer's values
    assert (model(IDS).logits - before).abs().max() > 1e-3
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    logits = model(tokens).logits[:, 11:-1]
    assert torch.equal(logits.argmax(-1), tokens[:, 12:])


@torch.no_grad()
def test_shared_modules_belong_to_the_model():
    model = build(layers=["hgrn2", "gla", "hgrn2"])
    names = [name for name, _ in model.named_parameters() if "shared" in name]
    assert names == ["model.shared.hgrn2.weight"]
    before = model(IDS).logits
    model.model.shared["hgrn2"].weight[2] += 3.0
    assert (model(IDS).logits - before).abs().max() > 1e-4
    assert len(build(layers=["gla"]).model.shared) == 0


def test_depth_counts_from_nought():
    model = build(layers=["lightning_attention", "gla", "lightning_attention"])
    assert [layer.mixer.depth for layer in model.model.layers[::2]] == [Depth(0, 3), Depth(2, 3)]
    assert Depth(0, 1).fraction == 0 and Depth(2, 3).fraction == 1
    with pytest.raises(ValueError, match=r"depth: got layer 3 of 3; expected 0 <= index < total"):
        Depth(3, 3)
    with pytest.raises(ValueError, match=r"mixer_options.*got 'depth'"):
        SubquadConfig(mixer="hgrn2", mixer_options={"hgrn2": {"depth": 1}})


@torch.no_grad()
@pytest.mark.parametrize("row", ["rwkv7", "hgrn2", "gsa", "mlstm", "lightning_attention"])
def test_decoded_tokens_are_traced(row):
    """None of what these rows need takes them off the CPU's one-token path."""
    model = build(layers=[row, row])
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    pieces = model.model.decoder._pieces
    assert [piece.trace is not None for piece in pieces] == [True]
    logits = model(tokens).logits[:, 11:-1]
    assert torch.equal(logits.argmax(-1), tokens[:, 12:])
