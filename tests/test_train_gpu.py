"""Training on a CUDA device (`pytest -m gpu`): captured steps do what the steps would have done."""

import signal

import pytest
import torch

from subquad.train import TrainConfig, train
from subquad.train.captured import Captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def settings(row, **others):
    model = {"mixer": row, "hidden_size": 64, "num_hidden_layers": 2}
    often = {"eval_every": 6, "checkpoint_every": 6, "eval_tokens": 512}
    return TrainConfig(
        model=model, steps=12, batch_size=4, seq_len=96, device="cuda", **often, **others
    )


@pytest.fixture
def graphs(monkeypatch):
    """What was captured."""
    found, real = [], Captured._capture

    def kept(self, tensors):
        real(self, tensors)
        found.append(self.graph)

    monkeypatch.setattr(Captured, "_capture", kept)
    return found


@pytest.mark.parametrize("row", ["mamba2", "gla", "gated_deltanet", "softmax_attention"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_captured_steps_are_the_steps(row, accumulate, graphs, monkeypatch):
    config = settings(row, accumulate=accumulate, precision="float32")
    replayed = train(config)
    assert len(graphs) == 1 and graphs[0] is not None
    monkeypatch.setattr(Captured, "_capture", lambda self, tensors: None)
    eager = train(config)
    assert len(replayed.history) == len(eager.history)
    for a, b in zip(replayed.history, eager.history):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a.get("grad_norm") == pytest.approx(b.get("grad_norm"), rel=1e-2)


def test_a_run_goes_on_from_its_checkpoint(graphs, tmp_path):
    whole = train(settings("mamba2"), tmp_path / "whole")
    first = settings("mamba2")
    stopped = train(first, tmp_path / "cut", on_event=_Stop(at=8))
    assert stopped.interrupted and stopped.step == 8
    resumed = train(first, tmp_path / "cut", resume=True)
    assert resumed.step == 12 and len(graphs) == 3
    for a, b in zip(whole.history, resumed.history):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_a_loss_that_is_no_number_changes_no_weight(graphs, monkeypatch):
    from subquad.train import session

    real, seen = session.token_losses, []
    poison = torch.zeros((), device="cuda")
    monkeypatch.setattr(session, "token_losses", lambda *given: real(*given) + poison)

    def watch(event):
        if event["kind"] == "train" and event["step"] == 8:  # a replay reads it, too
            poison.fill_(torch.nan)

    kept = session.Session.__init__

    def keep(self, *given):
        kept(self, *given)
        seen.append(self)

    monkeypatch.setattr(session.Session, "__init__", keep)
    with pytest.raises(session.TrainingError, match="step 9: the loss is nan"):
        train(settings("mamba2"), on_event=watch)
    assert graphs[0] is not None
    assert all(p.isfinite().all() for p in seen[0].model.parameters())
    assert seen[0].captured is None


class _Stop:
    """Ends a run as a signal would, after so many steps."""

    def __init__(self, at):
        self.at = at

    def __call__(self, event):
        if event["kind"] == "train" and event["step"] == self.at:
            signal.raise_signal(signal.SIGTERM)
