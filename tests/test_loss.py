"""Cross-entropy beside transformers' and PyTorch's, and where a model's loss is left to others."""

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.engines.cross_entropy.api import cross_entropy
from subquad.models import loss

V = 50


@pytest.fixture
def batch():
    torch.manual_seed(0)
    labels = torch.randint(V, (2, 9))
    labels[0, :4] = -100
    return torch.randn(2, 9, V, requires_grad=True), labels


def test_cross_entropy_of_each_label(batch):
    logits, labels = batch
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert torch.equal(cross_entropy(logits, labels), want.view(2, 9))
    assert torch.equal(cross_entropy(logits, labels.int()), want.view(2, 9))
    assert torch.equal(cross_entropy(logits[1, 2], labels[1, 2]), want[11])
    assert cross_entropy(logits[:0], labels[:0]).shape == (0, 9)
    assert cross_entropy(logits.double(), labels).dtype == torch.float64
    half = logits.bfloat16()
    assert torch.equal(cross_entropy(half, labels), cross_entropy(half.float(), labels))


def test_labels_of_another_shape_are_refused(batch):
    logits, labels = batch
    for wrong in (labels[:, 1:], labels.flatten(), labels[..., None]):
        with pytest.raises(ValueError, match=r"^labels: got shape .* Fix: give a label for each"):
            cross_entropy(logits, wrong)
    with pytest.raises(ValueError, match=r"^labels: got shape"):
        cross_entropy(logits.sum(), labels.sum())


@pytest.mark.parametrize("more", ["nothing", "int", "tensor", "shifted", "none counts"])
def test_the_next_tokens_loss_is_transformers_own(batch, more):
    logits, labels = batch
    given = {"int": {"num_items_in_batch": 7}, "tensor": {"num_items_in_batch": torch.tensor(7)}}
    given["shifted"] = {"shift_labels": labels.flip(1)}
    if more == "none counts":
        labels = torch.full_like(labels, -100)
    options = given.get(more, {})
    found = loss.next_token_loss(logits, labels, **options)
    want = ForCausalLMLoss(logits, labels, V, **options)
    torch.testing.assert_close(found, want, equal_nan=True)
    assert want.isnan() == (more == "none counts")
    mine, theirs = (torch.autograd.grad(one, logits)[0] for one in (found, want))
    torch.testing.assert_close(mine, theirs)


@pytest.fixture
def fused(monkeypatch):
    """Calls that went to the kernels' loss, were this a GPU."""
    calls = []

    def note(*given):
        calls.append(given)
        return torch.tensor(0.0)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(loss, "next_token_loss", note)
    return calls


def build():
    config = SubquadConfig(mixer="gla", hidden_size=16, num_hidden_layers=1, vocab_size=V)
    return SubquadForCausalLM(config)


def test_a_models_loss_is_computed_by_kernels_where_nobody_asked_for_another(fused, batch):
    model = build()
    loss.loss_of(model, *batch)
    loss.loss_of(model, *batch, num_items_in_batch=3, shift_labels=batch[1], cu_seq_lens_q=None)
    assert [given[2:] for given in fused] == [(None, None), (3, batch[1])]


def test_a_loss_that_somebody_asked_for_is_left_to_them(fused, batch):
    logits, labels = batch
    own = build()
    own.loss_function = lambda *given, **options: logits.mean()
    assert loss.loss_of(own, *batch) == logits.mean()
    other = build()
    other.loss_type = "ForMaskedLM"
    flat = logits.flatten(0, 1), labels.flatten()
    torch.testing.assert_close(loss.loss_of(other, *batch), F.cross_entropy(*flat))
    labels = labels.clamp(min=0)
    want = ForCausalLMLoss(logits, labels, V, ignore_index=3)
    torch.testing.assert_close(loss.loss_of(build(), logits, labels, ignore_index=3), want)
    with pytest.raises(RuntimeError, match="shape"):  # a read-out of another size than configured
        loss.loss_of(build(), logits[..., 1:], labels)
    assert not fused
