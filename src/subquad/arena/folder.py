"""An arena's directory: begun once, continued only by the same question on the same machine."""

import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from subquad import __version__
from subquad.files import Damaged, check_path, read_json
from subquad.models.device import pick_device


class Stopped(KeyboardInterrupt):
    """A signal came while a row was in training, which has been saved."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.signal = number


def is_begun(out: Path) -> bool:
    """Whether an earlier call has left its plan; ValueError if `out` holds something else."""
    check_path("out", out)
    if (out / "plan.json").exists():
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is not empty and no arena; give another directory")
    return False


def read_back(file: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What `read` makes of a record that an earlier call has written; None if there is none.

    ValueError, naming the file, if it is not what was written.
    """
    if not file.exists():
        return None
    try:
        return read(read_json(file, most=1 << 30))
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise Damaged(
            f"{file} is damaged: {what}; without it, what it is about runs again"
        ) from None


def refuse_changes(
    out: Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    then: Mapping[str, Any],
    here: Mapping[str, Any],
) -> None:
    """ValueError unless the question is that of before, and the machine too.

    Half of the rows on another machine would be no comparison; give the same machine twice where
    nothing is left to run.
    """
    changed = [
        f"{name} was {old.get(name)}, now {new[name]}" for name in new if new[name] != old.get(name)
    ]
    changed += [
        f"{name} was {then.get(name)}, now {here[name]}"
        for name in here
        if name != "date" and here[name] != then.get(name)
    ]
    if changed:
        raise ValueError(
            f"out: {out} holds an arena begun otherwise ({'; '.join(changed)}); "
            "give another directory with --out, or delete this one"
        )


def describe_machine(device_name: str) -> dict[str, Any]:
    """What the speeds depend on, besides the code."""
    device = pick_device(device_name)
    return {
        "subquad": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "waiting_threads": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    """The CPU's name, which on Linux is in a file only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
