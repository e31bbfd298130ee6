"""Work on a GPU recorded as a CUDA graph, to be replayed without Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


def capture(
    work: Callable[[], T], side: torch.cuda.Stream, here: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of `work()`, and what it returned: tensors that each replay writes over.

    It must have run before on the stream `side`, so that kernels are compiled and libraries set
    up; `here` is the current stream. Raises RuntimeError for work that waits for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile: none of the graph's business.
    recording = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
    # Where a capture's end fails, torch leaves `side` current: `here` again in any case.
    with torch.cuda.stream(here), recording:
        result = work()
    return graph, result


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Captures want another stream than the default. One for all: each stream that multiplies
    matrices gets a workspace that stays."""
    return torch.cuda.Stream(device)
