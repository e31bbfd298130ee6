"""One token through a layer on the CPU, recorded once and then run in one call.

Decoding reads every weight once for each token; the operations between are short. Called from the
interpreter one by one they cost as much as the reading, because the weights that stream through
the caches drive the interpreter out of them. So a layer writes its token on a `Token`, in
the words of `forward`, and runs that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.recurrence.api import explain
from subquad.recurrence.diagonal import explain_token
from subquad.recurrence.eager import can_call_compiled_code
from subquad.recurrence.explanation import Explanation, tell, watched
from subquad.recurrence.reference import Delta


class Token:
    """Operations on one token, float32 on the CPU: each is recorded, and computes when run.

    What an operation returns has its memory already, so views of it (`split`, `view`, `chunk`) may
    be given to the next; operations of PyTorch would read numbers that are not there yet. All
    tensors are contiguous. Each operation is that of the same name elsewhere in the library, or in
    `torch.nn.functional`.
    """

    def __init__(self) -> None:
        # Compiles, and imports numba, when first used.
        from subquad.kernels import (
            gates_cpu,
            linear_cpu,
            matrix_step_cpu,
            norm_cpu,
            pages,
            selective_scan_cpu,
            short_convolution_cpu,
            tape,
        )

        self._gates, self._linear, self._norm = gates_cpu, linear_cpu, norm_cpu
        self._matrix, self._scan = matrix_step_cpu, selective_scan_cpu
        self._convolution, self._pages = short_convolution_cpu, pages
        self._tape = tape.Tape()
        self._told: list[Explanation] = []
        self._weights: list[Tensor] = []

    # ---- projections, norms, gates

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N] by weight [N,K]."""
        y = torch.empty(*x.shape[:-1], weight.shape[0])
        self._linear.record(self._tape, x, weight, bias, y)
        self._weights.append(weight)
        return y

    def rms_norm(self, x: Tensor, size: int, weight: Tensor | None, eps: float) -> Tensor:
        return self._normalise(x, size, weight, None, False, eps)

    def gated_rms_norm(
        self,
        x: Tensor,
        gate: Tensor,
        size: int,
        weight: Tensor | None,
        eps: float,
        *,
        gate_first: bool,
    ) -> Tensor:
        return self._normalise(x, size, weight, gate, gate_first, eps)

    def l2_norm(self, x: Tensor, size: int, eps: float = 1e-6) -> Tensor:
        return self._normalise(x, size, None, None, False, eps / size, size**-0.5)

    def add(self, x: Tensor, z: Tensor) -> Tensor:
        y = torch.empty(x.shape)
        self._gates.add(self._tape, x, z, y)
        return y

    def silu_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """x * silu(gate)."""
        y = torch.empty(x.shape)
        self._gates.silu_gate(self._tape, x, gate, y)
        return y

    def sigmoid(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """scale * sigmoid(x)."""
        y = torch.empty(x.shape)
        self._gates.sigmoids(self._tape, x, scale, y)
        return y

    def softplus(self, x: Tensor, bias: Tensor) -> Tensor:
        """softplus(x + bias)."""
        y = torch.empty(x.shape)
        self._gates.softplus(self._tape, x, bias, 1.0, 1.0, y)
        return y

    def logsigmoid(self, x: Tensor, scale: float) -> Tensor:
        """scale * log(sigmoid(x))."""
        y = torch.empty(x.shape)
        self._gates.softplus(self._tape, x, None, -1.0, -scale, y)
        return y

    def negative_exp(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """-exp(x) * factor: decay rates from their logarithms."""
        y = torch.empty(x.shape if factor is None else factor.shape)
        self._gates.rates(self._tape, x, factor, y)
        return y

    def scaled(self, x: Tensor, scale: Tensor, base: Tensor | None = None) -> Tensor:
        """base + scale * x for x, base [..., H, D] and scale [..., H]."""
        y = torch.empty(x.shape)
        self._gates.scaled(self._tape, x, scale, base, y)
        return y

    def _normalise(
        self,
        x: Tensor,
        size: int,
        weight: Tensor | None,
        gate: Tensor | None,
        gate_first: bool,
        eps: float,
        scale: float = 1.0,
    ) -> Tensor:
        y = torch.empty(x.shape)
        self._norm.record(self._tape, x, size, weight, gate, gate_first, eps, scale, y)
        return y

    # ---- what has a state

    def short_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With silu; y like x and the next state."""
        y, new = torch.empty(x.shape), torch.empty(state.shape)
        self._convolution.record(self._tape, x, weight, bias, state, True, y, new)
        return y, new

    def linear_recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None = None,
        erase: Delta | None = None,
        scale: float | None = None,
        *,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        self._told.append(explain(q, k, v, log_decay, erase, scale=scale, state=state))
        o, new = torch.empty(v.shape), torch.empty(state.shape)
        beta = None if erase is None else erase.beta
        scale = q.shape[3] ** -0.5 if scale is None else scale
        inputs = (q, k, v, log_decay, beta, None, None, None, scale, state)
        self._matrix.record(self._tape, *inputs, o, new)
        return o, new

    def selective_scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._told.append(explain_token(x, A))
        y, new = torch.empty(x.shape), torch.empty(state.shape)
        self._scan.record(self._tape, x, dt, A, B, C, D, state, y, new)
        return y, new

    # ---- running

    def finish(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Nothing more is recorded; `run` reads others in place of `inputs` and makes `outputs`."""
        self._inputs = [x.shape for x in inputs]
        self._outputs = [x.shape for x in outputs]
        self._tape.free([*inputs, *outputs])
        self._pages.enlarge_pages(self._weights)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs, new tensors; None where it cannot: other shapes, gradients, autocast...

        For one thread at a time.
        """
        if torch.is_autocast_enabled("cpu") or not can_call_compiled_code(inputs):
            return None
        for x, shape in zip(inputs, self._inputs):
            if x.shape != shape or not x.is_contiguous():
                return None
        outputs = [torch.empty(shape) for shape in self._outputs]
        self._tape.run([*inputs, *outputs])
        if watched():
            for explanation in self._told:
                tell(explanation)
        return outputs
