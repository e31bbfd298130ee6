"""The switch that has engines look at values."""

import pytest
import torch

import subquad
from subquad import Delta


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 16) for _ in range(3))
    return {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v}


def wrong(inputs):
    beta = torch.ones(1, 200, 1).expand(1, 200, 2)
    nan = inputs["v"].clone()
    nan[0, 3, 1, 2] = torch.nan
    return {
        "k: got keys with beta": inputs | {"k": 3 * inputs["k"], "erase": Delta(beta)},
        "v: got NaN or infinity": inputs | {"v": nan},
        "log_decay: got 0.5: a state that grows": inputs | {"log_decay": torch.full((2,), 0.5)},
        "log_decay: got NaN": inputs | {"log_decay": torch.full((2,), torch.nan)},
        "value_log_decay: got 2": inputs | {"value_log_decay": torch.full((2, 16), 2.0)},
        "erase.beta: got -1": inputs | {"erase": Delta(-beta)},
        "state: got NaN": inputs | {"state": torch.full((1, 2, 16, 16), torch.inf)},
    }


@pytest.mark.parametrize("error", wrong({"k": torch.zeros(1), "v": torch.zeros(1, 4, 2, 3)}))
def test_values_from_which_nonsense_follows_are_refused(error, inputs):
    arguments = wrong(inputs)[error]
    subquad.linear_recurrence(**arguments)  # unsaid
    with subquad.checks(True), pytest.raises(ValueError, match=f"^{error}"):
        subquad.linear_recurrence(**arguments)
    subquad.linear_recurrence(**arguments)


def test_good_values_pass(inputs):
    with subquad.checks(True):
        beta = 2 * torch.rand(1, 200, 2)
        decay = torch.full((2,), -torch.inf)
        subquad.linear_recurrence(**inputs, erase=Delta(beta), log_decay=decay)


def test_explain_says_what_the_caller_must_see_to(inputs):
    told = subquad.explain(**inputs, erase=Delta(torch.ones(1, 200, 2)))
    assert "beta |k|^2 <= 2" in told.note and told.note in str(told)
    assert "note" not in str(subquad.explain(**inputs))
