"""The table says what is true: names, formulas that follow from the specs, what runs."""

from __future__ import annotations

import json

import pytest
import torch
from rich.cells import cell_len

from subquad.cli.rows_body import explain_command, table, table_command
from subquad.mixers import MIXERS
from subquad.table import ROWS
from subquad.table.spec import FORMS

CONTRACT = (
    "softmax_attention sliding_window_attention linear_attention performer reformer aft_full "
    "aft_local aft_simple aft_conv rwkv4 rwkv5 rwkv6 rwkv7 retnet gated_retention "
    "lightning_attention gla hgrn2 dfw gateloop mamba mamba2 mlstm slstm deltanet gated_deltanet "
    "kda gated_rfa abc gsa lssl s4 s4d h3 hyena lstm"
)


def test_names_are_the_contract():
    assert set(CONTRACT.split()) <= set(ROWS)
    assert set(MIXERS) <= set(ROWS)


def test_json_has_every_fact(capsys):
    table_command(as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert rows == table() and len(rows) == len(ROWS)
    for row in rows:
        for key in ("recurrence", "read", "state_size", "train_complexity", "decode_complexity"):
            assert row[key], f"{row['name']} has no {key}"
        assert "arXiv:" in row["paper"] or "doi:" in row["paper"]
        assert row["runs"] == (row["name"] in MIXERS)
        assert row["engine"] in FORMS


@pytest.mark.parametrize("width", [60, 120, 200])
def test_the_page_fits(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    table_command(as_json=False)
    page = capsys.readouterr().out
    assert all(name in page for name in ROWS)
    assert max(cell_len(line.rstrip()) for line in page.splitlines()) <= width


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_state_sizes_are_the_real_ones(name):
    """A constant state is constant: the same bytes after 8 tokens as after 40."""
    layer = MIXERS[name](64)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 8, 64))
        _, longer = layer(torch.randn(1, 32, 64), state)
    same = [state[n].shape == longer[n].shape for n in state]
    row = ROWS[name]
    constant = row.recurrence.linear_time and not row.state_grows
    if constant:
        assert all(same)
    if name == "softmax_attention":
        assert not all(same)


@pytest.mark.parametrize("name", ["gla", "mamba", "s4d", "softmax_attention", "rwkv4"])
def test_explain_runs_a_layer(name, capsys):
    explain_command(name, 64, 100, 2, "cpu", as_json=True)
    page = json.loads(capsys.readouterr().out)
    assert page["name"] == name
    if name == "gla":
        forms = [run["engine"][0]["form"] for run in page["here"]]
        assert forms == ["chunked", "recurrent"]
    if name == "mamba":
        assert [run["engine"][0]["impl"] for run in page["here"]] == ["numba", "numba"]
    if name == "s4d":
        forms = [run["engine"][0]["form"] for run in page["here"]]
        assert forms == ["convolution", "recurrent"]
    if name not in MIXERS:
        assert page["here"] == []
    explain_command(name, 64, 100, 2, "cpu", as_json=False)
    assert ROWS[name].write in capsys.readouterr().out


def test_explain_refuses():
    with pytest.raises(ValueError, match="row: got 'rwkv8'"):
        explain_command("rwkv8", 64, 100, 1, "cpu", as_json=False)
    with pytest.raises(ValueError, match="tokens: got 0"):
        explain_command("gla", 64, 0, 1, "cpu", as_json=False)
