"""One token through layers on the CPU: traced once from their own code, then run in one call.

Decoding reads every weight once for each token; the operations between are short. Called from the
interpreter one by one they cost as much as the reading, because the weights that stream through
the caches drive the interpreter out of them. So what layers compute for one token is recorded on a
tape of compiled kernels, and only the tape runs from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.decode.cpu.recording import Recording
from subquad.engines.runtime.eager import can_call_compiled_code
from subquad.engines.runtime.explanation import tell, watched


class Trace:
    """What has been recorded, to be run with other tensors in place of some.

    Weights are read anew in each run, wherever they lay at the time. Settings of modules, and
    whatever Python did besides calling operations, are as they were then.

    Args:
        recording: complete, and not used afterwards.
        inputs: from its `input`: whose place others take.
        results: what of it each run returns.
    """

    def __init__(
        self, recording: Recording, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        outputs = recording.outputs(results)
        self._inputs = [x.shape for x in inputs]
        self._outputs = [y.shape for y in outputs]
        self._told = recording.told
        self._tape = recording.tape
        self._tape.free([*inputs, *outputs])
        recording.enlarge_pages()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The outputs, new tensors; None where it cannot: other shapes, gradients, autocast...

        For one thread at a time.
        """
        if torch.is_autocast_enabled("cpu") or not can_call_compiled_code(inputs):
            return None
        for x, shape in zip(inputs, self._inputs, strict=True):
            if x.shape != shape or not x.is_contiguous():
                return None
        outputs = [torch.empty(s, dtype=torch.float32, device="cpu") for s in self._outputs]
        self._tape.run([*inputs, *outputs])
        if watched():
            for explanation in self._told:
                tell(explanation)
        return outputs
