"""One process a directory: a lock that the system frees however its holder ends."""

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_lock(file: Path) -> int:
    """Lock `file`, made if need be; close the descriptor to free it. OSError if it is taken."""
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        _take(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
