"""A run's metrics.jsonl: one record a line, checked as it is read."""

import json
from pathlib import Path
from typing import Any

_LONGEST = 1 << 20  # bytes of a line
_NUMBERS = {  # what a record of each kind must have beside its step
    "train": ("loss", "bits_per_byte", "tokens_per_second"),
    "eval": ("bits_per_byte",),
    "change": (),
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a last line torn by a kill is left out.

    Raises ValueError naming the line if one is no record.
    """
    records = []
    with Path(path).open("rb") as lines:
        for number in range(1, 1 << 62):
            line = lines.readline(_LONGEST)
            if not line.endswith(b"\n") and len(line) < _LONGEST:
                break
            try:
                records.append(_checked(json.loads(line)))
            except (ValueError, RecursionError) as error:
                fix = "Fix: delete the file; the run continues without that history"
                raise ValueError(f"{path}, line {number} is damaged: {error}. {fix}.") from None
    return records


def _checked(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or record.get("kind") not in _NUMBERS:
        raise ValueError("it is no record of a run")
    step = record.get("step")
    names = _NUMBERS[record["kind"]]
    numbers = all(isinstance(record.get(name), int | float) for name in names)
    if not isinstance(step, int) or not numbers:
        raise ValueError(f"it lacks one of step, {', '.join(names)}")
    return record


def lost_steps(records: list[dict[str, Any]], step: int) -> str:
    """Which steps up to `step` have no record, in words; "" if none."""
    seen = {record["step"] for record in records if record["kind"] == "train"}
    lost = [number for number in range(1, step + 1) if number not in seen]
    if not lost:
        return ""
    return f"metrics.jsonl has lost {len(lost)} records, of steps {lost[0]} to {lost[-1]}"
