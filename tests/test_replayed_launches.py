"""A replayed call launches what the function launches: every kernel, grid, argument and result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_replayed_calls_launch_what_the_functions_launch():
    pytest.importorskip("triton", minversion="3.3")  # older: nothing is replayed
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "replayed_launches.py"],
        env={name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 145 and len({name for name, *_ in found}) == 20
    for name, launches, replays, *equal in found:
        assert launches and replays == 1 and equal == [True, True], (name, launches, replays, equal)
