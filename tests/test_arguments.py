"""Input that contradicts itself, or that nobody would read, is refused; what can be honoured is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import subquad
from awake import awake
from subquad.models import SubquadCache

IDS = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def build(*rows: str) -> subquad.SubquadForCausalLM:
    torch.manual_seed(0)
    config = subquad.SubquadConfig(layers=list(rows), hidden_size=64, vocab_size=64)
    return awake(subquad.SubquadForCausalLM(config)).eval()


@torch.no_grad()
@pytest.mark.parametrize("row", ["gla", "softmax_attention"])
def test_a_mask_over_the_past_must_be_what_was_read(row, tmp_path):
    model, mask = build(row), torch.ones(2, 8, dtype=torch.int64)
    mask[0, 3:5] = 0
    cache = model(IDS[:, :5]).past_key_values
    cache.save(tmp_path / "cache.safetensors")
    for held in (cache, SubquadCache.load(tmp_path / "cache.safetensors")):
        with pytest.raises(ValueError, match=r"attention_mask: got 3 tokens in the past of seq"):
            model(IDS[:, 5:], attention_mask=mask, past_key_values=held)
    honest = model(IDS[:, :5], attention_mask=mask[:, :5]).past_key_values
    parts = model(IDS[:, 5:], attention_mask=mask, past_key_values=honest).logits
    whole = model(IDS, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_generate_leaves_of_a_sequence_that_ended_is_not_taken_for_its_past():
    model = build("gla")
    model.generation_config.eos_token_id = int(model(IDS).logits[0, -1].argmax())
    model.generation_config.pad_token_id = 0
    out = model.generate(IDS, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    text, cache = out.sequences, out.past_key_values
    assert (text[0] == 0).sum() == 4, "the first ends at once"
    more = torch.cat([text, IDS], 1)
    with pytest.raises(ValueError, match="goes on reading a sequence that has ended"):
        model.generate(
            more, attention_mask=(more != 0).long(), past_key_values=cache, max_new_tokens=2
        )


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("segment_ids", "seq_idx"),
        ("cache_params", "past_key_values"),
        ("attn_mask", "attention_mask"),
        ("positions_ids", "position_ids"),
        ("anything", "one of input_ids"),
    ],
)
def test_unknown_arguments_are_refused(name, instead):
    model = build("gla")
    with pytest.raises(ValueError, match=f"{name}: got an argument of that name; .*{instead}"):
        model(IDS, **{name: torch.ones(2, 8)})
    model(IDS, **{name: None})


def test_attention_weights_are_not_there_to_return():
    with pytest.raises(ValueError, match="output_attentions: got True"):
        build("gla")(IDS, output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("row", ["mamba2", "softmax_attention"])
def test_seq_idx_packs(row):
    model = build(row)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 4, 0, 0]])
    packed = model(IDS, seq_idx=seq_idx).logits
    for row, begin, end in ((0, 0, 3), (0, 3, 8), (1, 0, 6), (1, 6, 8)):
        alone = model(IDS[row : row + 1, begin:end]).logits
        torch.testing.assert_close(packed[row : row + 1, begin:end], alone, atol=1e-5, rtol=1e-4)


def test_wrong_seq_idx_is_named():
    model, good = build("gla"), torch.zeros(2, 8, dtype=torch.int64)
    cases = [
        ({"seq_idx": good[:, :5]}, r"seq_idx: got shape \(2, 5\)"),
        ({"seq_idx": good.float()}, "seq_idx: got torch.float32"),
        ({"seq_idx": good, "position_ids": good}, "seq_idx: got position_ids beside it"),
        ({"seq_idx": good, "past_key_values": model(IDS).past_key_values}, "a cache with a past"),
    ]
    for kwargs, error in cases:
        with pytest.raises(ValueError, match=error):
            model(IDS, **kwargs)


def test_reentrant_checkpointing_does_not_lose_gradients_silently():
    model = build("gla").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()  # nothing flows through states
    cache = build("gla").train()(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_reentrant: got True; expected False where grad"):
        model(IDS, labels=IDS, past_key_values=cache)
    carrying = build("rwkv7", "rwkv7").train()
    carrying.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        carrying(IDS, labels=IDS)


def test_two_segments_have_the_gradients_of_one():
    gradients = []
    for checkpointing in (False, True):
        model = build("gla", "mamba2").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        cache = model(IDS[:, :4], use_cache=True).past_key_values
        model(IDS[:, 4:], labels=IDS[:, 4:], past_key_values=cache).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want)


def test_label_smoothing_looks_at_the_next_token(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Keeping(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.kept = (loss[0] if isinstance(loss, tuple) else loss).detach()
            return loss

    model = build("gla").train()
    arguments = TrainingArguments(
        tmp_path, label_smoothing_factor=0.1, max_steps=1, per_device_train_batch_size=2,
        report_to=[], use_cpu=True, learning_rate=0.0,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    trainer = Keeping(model, arguments, train_dataset=rows)
    trainer.train()
    with torch.no_grad():
        logits = model(IDS).logits[:, :-1].log_softmax(-1)
    likelihood = logits.gather(-1, IDS[:, 1:, None]).mean()
    want = -(0.9 * likelihood + 0.1 * logits.mean())
    torch.testing.assert_close(trainer.kept.cpu(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", ["import subquad", "import transformers, subquad"])
def test_auto_classes_know_our_models_after_import_subquad(tmp_path, first):
    build("gla").save_pretrained(tmp_path)
    code = f"""
import sys
{first}
assert "subquad.models" not in sys.modules
from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["SubquadConfig", "SubquadForCausalLM"], done.stderr[-2000:]


def test_import_subquad_imports_neither_transformers_nor_torch():
    code = "import sys, subquad; print({'torch', 'transformers', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class Scaled(torch.Tensor):
    """A weight with an operation of its own, as quantised ones have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            plain = weight.as_subclass(torch.Tensor)
            return nn.functional.linear(x, 2 * plain, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("row", ["gla", "mamba2", "gated_deltanet", "softmax_attention", "s4d"])
def test_projections_that_are_not_plain_are_called_as_modules(row):
    model = build(row)
    block = model.model.layers[0]
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        before = model(IDS).logits
        one = model(IDS[:1, :1], past_key_values=model(IDS[:1]).past_key_values).logits
    for linear in linears:
        weight = (linear.weight.detach() / 2).as_subclass(Scaled)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-4)
        again = model(IDS[:1, :1], past_key_values=model(IDS[:1]).past_key_values).logits
        torch.testing.assert_close(again, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("row", ["gla", "mamba2", "softmax_attention", "rwkv7"])
def test_backward_hooks_of_projections_are_called(row):
    model, called = build(row).train(), []
    linears = [m for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        linear.register_full_backward_hook(lambda module, *_: called.append(module))
    model(IDS, labels=IDS).loss.backward()
    assert set(called) == set(linears)


def test_storages_stay_resizable():
    """FSDP frees parameters and fills them again; `x.numpy()` would forbid it."""
    for row in ("mamba", "mamba2", "gla", "gated_deltanet", "s4d"):
        model = build(row).train()
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            model(IDS[:1, :1], past_key_values=model(IDS[:1]).past_key_values)
        for name, parameter in model.named_parameters():
            assert parameter.untyped_storage().resizable(), (row, name)
