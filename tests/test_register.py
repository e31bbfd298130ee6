"""Mixers from outside become rows, and are refused with a reason where they cannot."""

import re

import pytest
import torch

from subquad.mixers import GLA, MIXERS, Mixer, register
from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.table import ROWS, Recurrence, Row

ROW = Row("mean_so_far", Recurrence("average", "none", read_out="own"), "this test")


@pytest.fixture(autouse=True)
def _forget_afterwards():
    mixers, rows = dict(MIXERS), dict(ROWS)
    yield
    for registry, before in ((MIXERS, mixers), (ROWS, rows)):
        registry.clear()
        registry.update(before)


def mean_so_far():
    """A new class each time, as if its definition ran again."""

    class MeanSoFar(Mixer):
        state_names = ("total", "count")

        def __init__(self, hidden_size: int, *, scale: float = 1.0) -> None:
            super().__init__(hidden_size)
            self.scale = scale

        def forward(self, x, state=None, *, cu_seqlens=None):
            past = self.check_inputs(x, state, cu_seqlens)
            count = past.get("count", x.new_zeros(len(x))) + x.shape[1]
            total = past.get("total", torch.zeros_like(x[:, 0]))[:, None] + x.cumsum(1)
            steps = torch.arange(1 - x.shape[1], 1) + count[:, None]
            y = self.scale * total / steps[..., None]
            return y, {"total": total[:, -1], "count": count}

    return MeanSoFar


def test_a_registered_mixer_is_a_row_for_models_and_saved_models(tmp_path):
    cls = register(ROW)(mean_so_far())
    assert cls.row == "mean_so_far" and MIXERS["mean_so_far"] is cls
    assert ROWS["mean_so_far"].as_dict(runs=True)["forms"] == ["recurrent", "scan"]
    options = {"mean_so_far": {"scale": 0.5}}
    config = SubquadConfig(hidden_size=32, layers=["mean_so_far", "gla"], mixer_options=options)
    model = SubquadForCausalLM(config).eval()
    assert model.model.layers[0].mixer.scale == 0.5
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 256, (2, 9))
    again = SubquadForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    cache = model(ids[:, :4]).past_key_values
    assert (
        model(ids[:, 4:], past_key_values=cache).logits - model(ids).logits[:, 4:]
    ).abs().max() < 1e-4


def test_the_same_definition_may_run_twice_and_replaces():
    register(ROW)(mean_so_far())
    second = register(ROW)(mean_so_far())
    assert MIXERS["mean_so_far"] is second


def test_a_listed_row_without_a_mixer_can_be_given_one():
    idle = next((name for name in ROWS if name not in MIXERS), None)
    if idle is None:
        pytest.skip("every row of the table runs")
    assert MIXERS.get(register(ROWS[idle])(mean_so_far()).row) is not None
    del MIXERS[idle]
    with pytest.raises(ValueError, match="the table has this"):
        register(Row(idle, Recurrence(), "another"))(mean_so_far())


class Positional(Mixer):
    state_names = ()

    def __init__(self, hidden_size: int, heads: int = 4) -> None:
        super().__init__(hidden_size)

    def forward(self, x, state=None, *, cu_seqlens=None):
        return x, {}


class Nameless(Mixer):
    def forward(self, x, state=None, *, cu_seqlens=None):
        return x, {}


class Abstract(Mixer):
    state_names = ()


@pytest.mark.parametrize(
    "row, cls, complaint",
    [
        (ROW, torch.nn.Linear, "class: got Linear; expected a subclass of subquad.mixers.Mixer"),
        (ROW, Abstract, "class: got Abstract"),
        (ROW, Nameless, "class Nameless: got no state_names"),
        (ROW, Positional, "put a * after hidden_size"),
        (ROW, GLA, "class GLA: got row = 'gla'"),
        (Row("gla", Recurrence(), "another"), None, "subquad.mixers.gla.GLA has this"),
        (Row("my row", Recurrence(), ""), None, "row.name: got 'my row'; expected an identifier"),
    ],
)
def test_what_cannot_be_a_row_is_refused(row, cls, complaint):
    before = dict(MIXERS), dict(ROWS)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        register(row)(cls or mean_so_far())
    assert before == (MIXERS, ROWS)
    assert GLA.row == "gla"
