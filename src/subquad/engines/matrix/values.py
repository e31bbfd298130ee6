"""What values a call may have, looked at where `subquad.checks` is on."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.engines.matrix.call import Call
from subquad.engines.matrix.reference import Delta
from subquad.errors import fail

SLACK = 1e-3  # what rounding in half precision may add to a norm


def check_values(call: Call) -> None:
    """ValueError for numbers from which the recurrence makes nonsense without a word."""
    if call.q.is_meta or torch.compiler.is_compiling():
        return
    with torch.no_grad():
        named = {"q": call.q, "k": call.k, "v": call.v, "bonus": call.bonus, "state": call.state}
        for name, x in named.items():
            if x is not None and not bool(x.isfinite().all()):
                raise fail(name, "NaN or infinity", "finite numbers", "look at what made it")
        for name in ("log_decay", "value_log_decay"):
            _check_decay(name, getattr(call, name))
        if isinstance(call.erase, Delta):
            _check_delta(call.k, call.erase.beta)


def _check_decay(name: str, decay: Tensor | None) -> None:
    if decay is None:
        return
    if bool(decay.isnan().any()):
        raise fail(name, "NaN", "numbers <= 0", "look at what made it")
    largest = float(decay.max())
    if largest > SLACK:
        got = f"{largest:.3g}: a state that grows by e^{largest:.3g} a token"
        raise fail(name, got, "logarithms of a decay, <= 0", "F.logsigmoid(x), or -softplus(x)")


def _check_delta(k: Tensor, beta: Tensor) -> None:
    """I - beta k k^T has the eigenvalue 1 - beta |k|^2, which must not be below -1."""
    if not bool(beta.isfinite().all()):
        raise fail("erase.beta", "NaN or infinity", "numbers from 0 to 2", "look at what made it")
    square = k.float().square().sum(-1).repeat_interleave(beta.shape[2] // k.shape[2], 2)
    share = float((beta.float() * square).max())
    if share > 2 + SLACK:
        got = f"keys with beta |k|^2 up to {share:.3g}"
        expected = "at most 2: else the delta rule multiplies what it should erase"
        raise fail("k", got, expected, "keys of norm 1: subquad.mixers.l2_norm(k, K)")
    if bool((beta < -SLACK).any()):
        raise fail(
            "erase.beta", f"{float(beta.min()):.3g}", "numbers from 0 to 2", "beta.sigmoid()"
        )
