"""The language model as transformers knows models: construction, files, gradients, precision."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from awake import awake
from subquad.mixers import MIXERS
from subquad.models import SubquadCache, SubquadConfig, SubquadForCausalLM, SubquadModel

HYBRID = ["gated_deltanet", "softmax_attention", "mamba2"]
STACKS = [[row] for row in MIXERS] + [HYBRID]


def build(layers: list[str] = HYBRID, seed: int = 0, **kwargs) -> SubquadForCausalLM:
    torch.manual_seed(seed)
    return awake(SubquadForCausalLM(SubquadConfig(hidden_size=64, layers=layers, **kwargs))).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layers", STACKS, ids="+".join)
def test_save_and_load(layers, ids, tmp_path) -> None:
    model = build(layers)
    with torch.no_grad():  # away from anything an initialisation might draw again
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SubquadForCausalLM
    assert loaded.config.rows == layers
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    marks = [getattr(p, "_no_weight_decay", False) for p in model.parameters()]
    assert [getattr(p, "_no_weight_decay", False) for p in loaded.parameters()] == marks
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is SubquadModel
    want = model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(body(ids).last_hidden_state, want)


@pytest.mark.parametrize("layers", STACKS, ids="+".join)
def test_missing_weights_are_drawn_and_loaded_ones_kept(layers, tmp_path) -> None:
    """Drop each parameter of the first mixer in turn from the file: only that one may change."""
    model = build(layers, num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for dropped in [name for name in weights if ".layers.0.mixer." in name]:
        rest = {name: tensor for name, tensor in weights.items() if name != dropped}
        save_file(rest, path, metadata={"format": "pt"})
        loose = SubquadForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
        loaded = loose.state_dict()
        for name, tensor in rest.items():
            assert torch.equal(loaded[name], tensor), f"{name}, when {dropped} was missing"
        assert loaded[dropped].isfinite().all()
        assert not torch.equal(loaded[dropped], weights[dropped])


@pytest.mark.parametrize("row", MIXERS)
def test_mixers_start_as_published(row) -> None:
    """transformers' own initialisation must not have the last word over a mixer's."""
    config = SubquadConfig(hidden_size=64, layers=[row], initializer_range=1e-6)
    mixer = SubquadForCausalLM(config).model.layers[0].mixer
    drawn = {n: p.detach().std() for n, p in mixer.named_parameters() if p.ndim == 2}
    torch.manual_seed(0)
    mixer.reset_parameters()
    for name, parameter in mixer.named_parameters():
        if name in drawn:
            torch.testing.assert_close(parameter.std(), drawn[name], rtol=0.2, atol=0)


def test_a_mixer_option_of_the_model_is_refused() -> None:
    """transformers would keep it and no mixer would ever see it."""
    with pytest.raises(ValueError, match=r"num_heads: .*mixer_options=\{'gla'"):
        SubquadConfig(mixer="gla", num_heads=4)


@pytest.mark.parametrize("row", ["mamba", "mamba2"])
def test_deep_models_start_with_smaller_outputs(row) -> None:
    """Mamba divides its last projection by the root of the depth; loaded weights are left alone."""
    shallow, deep = build([row]), build([row] * 4)
    weights = [m.model.layers[0].mixer.out_proj.weight.std() for m in (shallow, deep)]
    torch.testing.assert_close(weights[1], weights[0] / 2, rtol=0.1, atol=0)


@pytest.mark.parametrize("layers", STACKS, ids="+".join)
def test_bfloat16_keeps_recurrence_parameters_in_float32(layers, ids, tmp_path) -> None:
    model = build(layers)
    model.save_pretrained(tmp_path)
    half = SubquadForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    own = {
        f"model.layers.{i}.mixer.{name}"
        for i, block in enumerate(half.model.layers)
        for name, _ in block.mixer.named_parameters(recurse=False)
    } | {
        f"model.layers.{i}.mlp.{name}"
        for i, block in enumerate(half.model.layers)
        if block.mlp is not None
        for name, _ in block.mlp.named_parameters(recurse=False)
    }
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if name in own else torch.bfloat16), name
    want = model(ids).logits
    out = half(ids)
    assert out.logits.dtype == torch.bfloat16
    assert (out.logits - want).abs().max() < 0.05 * want.abs().max()
    again = half(ids, past_key_values=out.past_key_values).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(ids, use_cache=True)
        cast_again = model(ids, past_key_values=cast.past_key_values).logits
    assert again.isfinite().all()
    assert (cast.logits - want).abs().max() < 0.05 * want.abs().max()
    assert (cast_again - again).abs().max() < 0.05 * want.abs().max()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("layers", STACKS, ids="+".join)
def test_gradient_checkpointing_changes_no_gradient(layers, ids) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(layers).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        assert plain is not None and plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("layers", STACKS, ids="+".join)
def test_gradients_flow_through_padding_and_cache(layers, ids) -> None:
    """A loss after padding, in a second call, has the gradients of the whole."""
    model = build(layers)
    parameters = list(model.parameters())
    labels = ids.clone()
    labels[:, :10] = -100
    want = torch.autograd.grad(model(ids, labels=labels).loss, parameters)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    padded = torch.nn.functional.pad(ids[:, 9:], (2, 1))
    mask = torch.nn.functional.pad(torch.ones_like(ids[:, 9:]), (2, 1))
    logits = model(padded, attention_mask=mask, past_key_values=cache).logits[:, 2:-2]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 10:].flatten())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), want, rtol=1e-3, atol=1e-6)


def test_loss(ids) -> None:
    model = build()
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    predicted, wanted = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    want = torch.nn.functional.cross_entropy(predicted, wanted, ignore_index=-100)
    torch.testing.assert_close(out.loss, want)
    assert torch.equal(model(ids, labels=labels.int()).loss, out.loss)
    count = int((labels[:, 1:] != -100).sum())
    summed = model(ids, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * summed, want)
    as_tuple = model(ids, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], want)


def test_logits_to_keep_and_embeddings_and_hidden_states(ids) -> None:
    model = build()
    full = model(ids, output_hidden_states=True)
    # Not to the bit: a matrix product of fewer rows may sum in another order.
    kept = model(ids, logits_to_keep=3).logits
    torch.testing.assert_close(kept, full.logits[:, -3:], atol=1e-6, rtol=1e-5)
    kept = model(ids, logits_to_keep=torch.tensor([0, 4])).logits
    torch.testing.assert_close(kept, full.logits[:, [0, 4]], atol=1e-6, rtol=1e-5)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, full.logits)
    assert len(full.hidden_states) == 1 + len(HYBRID)
    assert torch.equal(full.hidden_states[0], embedded)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(ids[:1, 4:], output_hidden_states=True).hidden_states
    for mine, want in zip(padded, alone):
        assert mine[0, :4].abs().max() == 0
        torch.testing.assert_close(mine[0, 4:], want[0])


def test_a_cache_that_came_in_is_left_alone_without_use_cache(ids) -> None:
    model = build()
    cache = model(ids, use_cache=True).past_key_values
    states = cache.states
    first = model(ids, past_key_values=cache, use_cache=False)
    assert first.past_key_values is None
    assert cache.states is states
    assert cache.get_seq_length() == ids.shape[1]
    assert torch.equal(model(ids, past_key_values=cache).logits, first.logits)
    assert cache.get_seq_length() == 2 * ids.shape[1]


def test_untied_and_resized(ids) -> None:
    model = build(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.resize_token_embeddings(300)
    assert model(ids).logits.shape[-1] == 300
    assert model.config.vocab_size == 300


def test_hybrids_and_sizes() -> None:
    model = build(["mamba2", "gla"])
    assert model.model.layers[0].mlp is None
    assert model.model.layers[1].mlp.gate.out_features == 192  # 8/3 of 64, in 32s
    assert build(["mamba2"], intermediate_size=48).model.layers[0].mlp.up.out_features == 48
    assert build(["gla"], intermediate_size=0).model.layers[0].mlp is None


@pytest.mark.parametrize("row", MIXERS)
def test_compiles_into_one_graph(row, ids) -> None:
    torch._dynamo.reset()
    model = build([row])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss = compiled(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


def test_compiled_hybrid_trains_and_returns_a_cache(ids) -> None:
    torch._dynamo.reset()
    model = build(["gla", "softmax_attention"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want, got = model(ids), compiled(ids)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
        again = [model(ids, past_key_values=out.past_key_values).logits for out in (want, got)]
    torch.testing.assert_close(*again, rtol=1e-4, atol=1e-5)
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_importing_subquad_imports_no_transformers() -> None:
    code = "import subquad, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the cache


def test_cache_files(ids, tmp_path) -> None:
    model = build()
    cache = model(ids, use_cache=True).past_key_values
    path = tmp_path / "state.safetensors"
    cache.save(path)
    loaded = SubquadCache.load(path)
    assert repr(loaded) == repr(cache)
    assert loaded.nbytes == cache.nbytes > 0
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    with pytest.raises(FileNotFoundError):
        SubquadCache.load(tmp_path / "none.safetensors")
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="path: got format None"):
        SubquadCache.load(path)
    path.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="path"):
        SubquadCache.load(path)


def test_a_save_that_fails_leaves_the_old_file(ids, tmp_path, monkeypatch) -> None:
    model = build()
    cache = model(ids, use_cache=True).past_key_values
    path = tmp_path / "state.safetensors"
    cache.save(path)
    before = path.read_bytes()
    model(ids, past_key_values=cache)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("subquad.models.cache.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("layers", STACKS, ids="+".join)
def test_cache_rows(layers, ids) -> None:
    model = build(layers)
    ids = torch.cat([ids, ids.flip(1)])
    cache = model(ids, use_cache=True).past_key_values
    order = torch.tensor([2, 0, 0, 3])
    cache.reorder_cache(order)
    want = model(torch.cat([ids[order], ids[:, :4]], dim=1)).logits[:, -4:]
    got = model(ids[:, :4], past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    one = model(ids[:1], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 3
    more = model(ids[:3, :4], past_key_values=cache).logits
    joined = torch.cat([ids[:1].expand(3, -1), ids[:3, :4]], dim=1)
    torch.testing.assert_close(more, model(joined).logits[:, -4:], rtol=1e-4, atol=1e-4)
    assert one.past_key_values is cache


def test_crop_works_only_where_nothing_is_lost(ids) -> None:
    cache = build()(ids, use_cache=True).past_key_values
    cache.crop(0)
    cache.crop(ids.shape[1])
    for tokens in (-1, 5):
        with pytest.raises(ValueError, match=r"crop: got .* of 17 tokens"):
            cache.crop(tokens)


# ---- what is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixer": "gated_delta_net"}, r"mixer: got 'gated_delta_net'.*perhaps 'gated_delt"),
        ({"layers": ["mamba2", "attention"]}, r"layers: got 'attention'"),
        ({"layers": []}, r"layers: got \[\]"),
        ({"layers": "mamba2"}, r"layers: got 'mamba2'; expected a list"),
        (
            {"mixer": "gla", "mixer_options": {"gla": {"num_head": 4}}},
            r"Fix: perhaps 'num_heads'\.$",
        ),
        ({"mixer": "gla", "mixer_options": {"num_heads": 4}}, r"mixer_options: got 'num_heads'"),
        ({"mixer": "gla", "mixer_options": {"gla": 4}}, r"mixer_options\['gla'\]: got 4"),
        (
            {
                "mixer": "deltanet",
                "mixer_options": {"deltanet": {"allow_negative_eigenvalues": "flase"}},
            },
            r"\['allow_negative_eigenvalues'\]: got 'flase'; expected True or False",
        ),
        (
            {"mixer": "gla", "mixer_options": {"gla": {"norm_eps": "1e-5"}}},
            r"\['norm_eps'\]: got '1e-5'; expected a number",
        ),
        ({"mixer": "gla", "mixer_options": {"retnet": {}}}, r"rows of this model: \['gla'\]"),
        ({"mixer": "gla", "mixer_options": ["gla"]}, r"mixer_options: got \['gla'\]"),
        ({"mixer": "gla", "hidden_size": 66}, r"gla with hidden_size=66: .*num_heads"),
        ({"hidden_size": 0}, r"hidden_size: got 0; expected an integer of at least 1"),
        ({"hidden_size": 64.0}, r"hidden_size: got 64.0"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers: got -1"),
        ({"intermediate_size": -2}, r"intermediate_size: got -2"),
        ({"norm_eps": 0}, r"norm_eps: got 0"),
        ({"initializer_range": float("inf")}, r"initializer_range: got inf"),
        ({"eos_token_id": "<eos>"}, r"eos_token_id: got '<eos>'"),
        ({"pad_token_id": 1.5}, r"pad_token_id: got 1.5"),
        ({"vocab_size": 100, "eos_token_id": 100}, r"eos_token_id: got 100.*vocab_size = 100"),
        ({"hiden_size": 64}, r"hiden_size: .*'hidden_size'"),
        ({"layer": ["gla"]}, r"layer: .*'layers'"),
    ],
)
def test_bad_configurations(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        SubquadConfig(**{"hidden_size": 64, **kwargs})


def test_bad_calls(ids) -> None:
    model = build()
    ones, positions = torch.ones_like(ids), torch.arange(17).expand(2, -1)
    jump = positions.clone()
    jump[1, 9:] += 1
    cases = [
        ({}, r"input_ids, inputs_embeds: got neither"),
        ({"input_ids": ids[:, :0]}, r"input_ids: got shape \(2, 0\)"),
        ({"inputs_embeds": torch.randn(2, 17, 3)}, r"inputs_embeds: got shape \(2, 17, 3\)"),
        ({"inputs_embeds": ids}, r"inputs_embeds: got shape \(2, 17\)"),
        ({"input_ids": ids[0]}, r"input_ids: got shape \(17,\); expected \[B, T\]"),
        ({"input_ids": ids.float()}, r"input_ids: got torch.float32"),
        ({"input_ids": ids.tolist()}, r"input_ids: got list"),
        ({"input_ids": ids - ids.max() - 1}, r"input_ids: got token -\d+; expected tokens from 0"),
        ({"input_ids": ids + model.config.vocab_size}, r"input_ids: got token \d+; expected tok"),
        ({"input_ids": ids, "labels": ids[:, 1:]}, r"labels: got shape \(2, 16\)"),
        ({"input_ids": ids, "labels": ids.float()}, r"labels: got torch.float32"),
        ({"input_ids": ids, "labels": ids * 0 - 1}, r"labels: got token -1; expected .*-100"),
        ({"input_ids": ids, "logits_to_keep": -1}, r"logits_to_keep: got -1; expected 0 \(all\)"),
        ({"input_ids": ids, "attention_mask": ones[None, None]}, r"attention_mask.*cu_seqlens"),
        (
            {"input_ids": ids, "attention_mask": ones[:, :-1]},
            r"attention_mask: got shape \(2, 16\)",
        ),
        ({"input_ids": ids, "attention_mask": 2 * ones}, r"attention_mask: got values such as 2"),
        ({"input_ids": ids, "attention_mask": -1e9 * (positions > 9)}, "attention_mask: got val"),
        ({"input_ids": ids, "position_ids": jump}, r"position_ids: got 10 in row 1; expected 9"),
        ({"input_ids": ids, "position_ids": positions + 1}, r"position_ids: got 1 in row 0"),
        (
            {"input_ids": ids, "position_ids": positions[:, 1:]},
            r"position_ids: got shape \(2, 16\)",
        ),
        ({"input_ids": ids, "cu_seqlens": torch.tensor([0, 17])}, r"cu_seqlens: got batch 2"),
        ({"input_ids": ids[:1], "cu_seqlens": torch.tensor([0, 9, 9, 17])}, r"cu_seqlens: .*incr"),
        ({"input_ids": ids, "past_key_values": object()}, r"past_key_values: got object"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**kwargs)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: got a cache of 2 rows"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: got a cache of 3 layers; expected 1"):
        build(["gla"])(ids, past_key_values=cache)
    packed = {"input_ids": ids[:1], "cu_seqlens": torch.tensor([0, 9, 17])}
    with pytest.raises(ValueError, match="attention_mask: got padding"):
        model(**packed, attention_mask=ones[:1] * (positions[:1] > 3))
    with pytest.raises(ValueError, match="position_ids: got 9 in row 1; expected 0"):
        model(**packed, position_ids=positions[:1])


def test_flash_attention_names_of_packed_inputs_are_understood(ids) -> None:
    """What transformers' DataCollatorWithFlattening hands over must never leak."""
    model = build()
    bounds = torch.tensor([0, 9, 17], dtype=torch.int32)
    want = model(ids[:1], cu_seqlens=bounds).logits
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}
    assert torch.equal(model(ids[:1], position_ids=positions, **flash).logits, want)
    assert torch.equal(model(ids[:1], position_ids=positions).logits, want)
    assert not torch.allclose(model(ids[:1]).logits, want, atol=1e-2)
