"""A call of `linear_recurrence`: its arguments together, checked, with what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.engines.matrix.kind import LAYOUT, decay_kind, is_fixed, is_layout
from subquad.engines.matrix.reference import Delta, Erase, LowRank, parts
from subquad.engines.runtime.validation import (
    check_cu_seqlens,
    check_shape,
    check_state,
    check_tensor,
)
from subquad.errors import fail
from subquad.table import Recurrence

_NUMBERS = (int, float)  # not a union: torch.compile before 2.7 cannot see through that


@dataclass(frozen=True)
class Call:
    """The arguments together; `linear_recurrence` says what they are. Make one by `checked`."""

    q: Tensor  # [B,T,Hk,K]
    k: Tensor  # [B,T,Hk,K]
    v: Tensor  # [B,T,H,V]
    log_decay: Tensor | None  # [H], [H,K], [B,T,H] or [B,T,H,K]
    erase: Erase
    bonus: Tensor | None  # [H,K]
    scale: float  # of the read
    state: Tensor | None  # [N,H,K,V], N = B unless packed
    cu_seqlens: Tensor | None  # [N+1]
    value_log_decay: Tensor | None = None  # [H,V] or [B,T,H,V]

    @staticmethod
    def checked(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        erase: Erase,
        bonus: Tensor | None,
        scale: float | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        value_log_decay: Tensor | None = None,
    ) -> Call:
        """Of arguments as they came. ValueError where they do not fit each other."""
        if scale is not None and not (isinstance(scale, _NUMBERS) and math.isfinite(scale)):
            raise fail("scale", repr(scale), "a finite number, or None for K**-0.5", "pass a float")
        check_tensor("q", q, 4, "[B,T,Hk,K]")
        scale = q.shape[3] ** -0.5 if scale is None and q.shape[3] else float(scale or 0.0)
        call = Call(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens, value_log_decay)
        call._check_sequences()
        call._check_gates()
        call._check_state()
        return call

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that gradients may flow to."""
        gates = (self.log_decay, self.value_log_decay, *parts(self.erase), self.bonus)
        given = (self.q, self.k, self.v, *gates, self.state)
        return tuple(x for x in given if x is not None)

    @property
    def rows(self) -> int:
        """N: sequences, each with a state of its own."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return self.rows, self.v.shape[2], self.q.shape[3], self.v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Of the state, and of the arithmetic outside the reference."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32

    def _check_sequences(self) -> None:
        q, k, v = self.q, self.k, self.v
        check_tensor("k", k, 4, "[B,T,Hk,K]", q)
        check_tensor("v", v, 4, "[B,T,H,V]", q)
        for name, x in (("q", q), ("v", v)):
            if 0 in x.shape:
                raise fail(name, f"shape {tuple(x.shape)}", "no empty dimension", "drop the call")
        (B, T, Hk, K), (H, V) = q.shape, v.shape[2:]
        check_shape("k", k, (B, T, Hk, K), "the shape of q, [B,T,Hk,K]")
        check_shape("v", v, (B, T, H, V), "[B,T,H,V] with q's B and T")
        if H % Hk:
            raise fail("v", f"{H} heads", f"a multiple of the {Hk} key heads", "change H or Hk")
        if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
            got = f"{q.dtype}, {k.dtype}, {v.dtype}"
            raise fail("q, k, v", got, "one dtype", "cast them to one")

    def _check_gates(self) -> None:
        q, log_decay, erase, bonus = self.q, self.log_decay, self.erase, self.bonus
        (B, T, _, K), H = q.shape, self.v.shape[2]
        if log_decay is not None:
            shapes: dict[str, tuple[int, ...]] = {
                "fixed_head": (H,),
                "fixed_key": (H, K),
                "token_head": (B, T, H),
                "token_key": (B, T, H, K),
            }
            if isinstance(log_decay, Tensor) and not is_layout(log_decay):
                raise fail("log_decay", f"shape {tuple(log_decay.shape)}", LAYOUT, "reshape it")
            shape = shapes[decay_kind(log_decay)] if isinstance(log_decay, Tensor) else ()
            check_tensor("log_decay", log_decay, len(shape), LAYOUT, q)
            check_shape("log_decay", log_decay, shape, LAYOUT)
        if self.value_log_decay is not None:
            self._check_value_decay(self.value_log_decay)
        if isinstance(erase, Delta):
            check_tensor("erase.beta", erase.beta, 3, "[B,T,H]", q)
            check_shape("erase.beta", erase.beta, (B, T, H), "[B,T,H]")
        elif isinstance(erase, LowRank):
            for name, x in (("erase.a", erase.a), ("erase.b", erase.b)):
                check_tensor(name, x, 4, "[B,T,H,K]", q)
                check_shape(name, x, (B, T, H, K), "[B,T,H,K]")
        elif erase is not None:
            expected = "None, Delta(beta) or LowRank(a, b)"
            raise fail("erase", type(erase).__name__, expected, "wrap the tensors")
        if bonus is not None:
            if erase is not None:
                fix = "pass bonus=None or erase=None"
                raise fail("bonus", "a bonus and an erase", "one of them", fix)
            check_tensor("bonus", bonus, 2, "[H,K]", q)
            check_shape("bonus", bonus, (H, K), "[H,K]")

    def _check_value_decay(self, w: Tensor) -> None:
        (B, T, _, _), (H, V) = self.q.shape, self.v.shape[2:]
        name, layout = "value_log_decay", "[H,V] or [B,T,H,V]"
        if self.erase is not None or self.bonus is not None:
            got = "a decay along values and an erase or a bonus"
            raise fail(name, got, "one of them", "pass value_log_decay=None, or no erase and bonus")
        per_token = not isinstance(w, Tensor) or w.ndim != 2
        shape = (B, T, H, V) if per_token else (H, V)
        check_tensor(name, w, len(shape), layout, self.q)
        check_shape(name, w, shape, layout)

    def _check_state(self) -> None:
        q, state, layout = self.q, self.state, "[B,H,K,V]"
        if self.cu_seqlens is not None:
            check_cu_seqlens(self.cu_seqlens, q.shape[1], q.shape[0], q)
            layout = "[N,H,K,V]"
        if state is not None:
            check_state(state, self.state_shape, layout, self.dtype, q)


def recurrence_of(call: Call) -> Recurrence:
    """The kind of recurrence that these arguments make."""
    erase = "delta" if isinstance(call.erase, Delta) else "low_rank"
    decay = decay_kind(call.log_decay)
    if call.value_log_decay is not None and decay != "none":
        decay = "token_key_value"
    elif call.value_log_decay is not None:
        decay = "fixed_value" if is_fixed(call.value_log_decay) else "token_value"
    return Recurrence(
        decay=decay,
        erase="none" if call.erase is None else erase,
        read_out="plain" if call.bonus is None else "bonus",
    )
