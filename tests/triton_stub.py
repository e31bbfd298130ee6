"""Triton without a GPU and without its compiler: what would be launched is written down.

Import it before any kernel. All of Triton's Python between `kernel[grid](...)` and the launcher
runs, on CPU tensors, as on a Hopper GPU.
"""

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler


class Launched(NamedTuple):
    kernel: str  # and all that it was compiled for
    grid: tuple[int, int, int]
    arguments: tuple


launched: list[Launched] = []


class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


class Uncompiled(compiler.CompiledKernel):
    def __init__(self, source: Any, options: dict) -> None:
        self.src, self.module, self.function, self.packed_metadata = source, True, None, None
        self.name = f"{source.fn.__name__} {source.hash()} {sorted(options.items(), key=str)}"
        self._run = self.write_down

    def __del__(self) -> None:  # Triton's own may unload a module
        pass

    def write_down(self, x: int, y: int, z: int, *rest: Any) -> None:
        # rest: stream, function, two kinds of metadata, two hooks, then the kernel's arguments
        launched.append(Launched(self.name, (x, y, z), rest[6:]))


def compile_nothing(src: Any, target: Any = None, options: Any = None, **rest: Any) -> Uncompiled:
    return Uncompiled(src, options)


triton.runtime.driver.set_active(Driver())
compiler.compile = triton.compiler.compile = compile_nothing
