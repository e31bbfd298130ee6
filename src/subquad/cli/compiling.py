"""A word while kernels compile: on a machine's first use that takes tens of seconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watch_compiler(on_compile: Callable[[], None]) -> Iterator[None]:
    """Within, call `on_compile` once, when numba first compiles what no cache of it holds."""
    from numba.core import event

    class Listener(event.Listener):
        noted = False

        def on_start(self, event: Any) -> None:
            if not self.noted:
                self.noted = True
                on_compile()

        def on_end(self, event: Any) -> None:
            """Called for every kernel, of which there are many."""

    listener = Listener()
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)


@contextmanager
def note_compiling() -> Iterator[None]:
    """Within, the first compilation is noted on stderr."""
    from subquad.cli.terminal import say, sidelines
    from subquad.train.progress import COMPILING

    with watch_compiler(lambda: say(sidelines(), COMPILING)):
        yield
