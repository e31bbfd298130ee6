"""A training step on a GPU without Python in between, as a CUDA graph.

A small model's step is some hundred kernels of a few microseconds each; launching them from Python
takes longer than running them, and processes that share a GPU take turns at every one of them. So
the step is captured once and replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from subquad.backend.fast_paths import are_fast_paths_on
from subquad.backend.gpu.capture import capture

_EAGER = 3  # like steps before the capture: kernels compile, libraries and the optimiser set up


class Captured:
    """Calls `step(*tensors)`, by a graph once some calls in a row had tensors of equal shapes.

    There is one graph; calls with tensors of other shapes or dtypes run as they are. A graph has
    memory of its own, as much as a step takes: where no more than half of that would be left for
    others (evaluations), nothing is captured.

    Args:
        step: looks at nothing but these tensors and what lies where it did before, and never waits
            for the GPU. What it leaves must lie where it did, too: parameters, optimiser states
            (`capturable`), sums. What it returns, such as gradients, the next call writes over.
        device: a GPU.
    """

    def __init__(self, step: Callable[..., Any], device: torch.device) -> None:
        self.step, self.device = step, device
        self.kinds: list[tuple[torch.Size, torch.dtype]] = []  # of the last call's tensors
        self.calls = 0  # of that kind in a row
        self.fit = True  # False once the step could not be captured
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []  # where the graph reads
        self.outputs: Any = None  # what the captured step returned
        self.side = torch.cuda.Stream(device)  # captures want another stream than the default

    def __call__(self, *tensors: Tensor) -> Any:
        kinds = _kinds(tensors)
        self.calls = self.calls + 1 if kinds == self.kinds else 1
        self.kinds = kinds
        if not are_fast_paths_on():
            return self._eagerly(tensors)
        if self.graph is None and self.fit:
            if self.calls == _EAGER:
                torch.cuda.empty_cache()  # of what others have left, as a model trained before
            elif self.calls > _EAGER:
                self._capture(tensors)
        if self.graph is None or kinds != _kinds(self.inputs):
            return self._eagerly(tensors)
        for own, new in zip(self.inputs, tensors):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.outputs

    def _eagerly(self, tensors: tuple[Tensor, ...]) -> Any:
        here = torch.cuda.current_stream(self.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side), warnings.catch_warnings():
            # The optimiser is made capturable, and warns when it is not being captured.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable")
            done = self.step(*(tensor.to(self.device, non_blocking=True) for tensor in tensors))
        here.wait_stream(self.side)
        return done

    def _capture(self, tensors: tuple[Tensor, ...]) -> None:
        """Record what a step does, without doing it."""
        if not self._has_room():
            self.fit = False
            return
        torch.cuda.empty_cache()  # of what the graph is about to get again
        # Copies: each call writes over them, and a batch on the device is the caller's.
        self.inputs = [tensor.to(self.device, copy=True) for tensor in tensors]
        try:
            here = torch.cuda.current_stream(self.device)
            graph, self.outputs = capture(lambda: self.step(*self.inputs), self.side, here)
        except RuntimeError as error:
            self.fit = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"training continues without a CUDA graph: {reason}", stacklevel=4)
        else:
            self.graph = graph

    def _has_room(self) -> bool:
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        return free >= cached / 2  # what is cached, the last eager step has taken


def _kinds(tensors: Iterable[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
