"""What a training run is: one frozen dataclass that checks itself and goes to JSON and back."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subquad.errors import pick
from subquad.files import Damaged, read_json
from subquad.table import ROWS

if TYPE_CHECKING:
    from subquad.models import SubquadConfig

# What a resumed run may change, and says and records where it does: how long and how carefully it
# trains, and the schedule of the steps to come. Not what decides the model or the order of the
# data, with which it would be another run. (More `steps` stretches the cosine.)
CHANGEABLE = frozenset({"steps", "eval_every", "checkpoint_every", "keep", "device", "accumulate"})
CHANGEABLE |= {"lr", "min_lr_ratio", "warmup_steps", "weight_decay", "betas", "grad_clip"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. The same on the same machine ends in the same weights.

    Lengths are counted in tokens, batches in sequences, intervals in optimizer steps.
    Raises ValueError naming the field, what came and what was expected.
    """

    model: "str | Mapping[str, Any] | SubquadConfig" = "gated_deltanet"
    """A row name, the keywords of a SubquadConfig, or a SubquadConfig. Stored as the keywords."""
    init_from: str | None = None
    """A run or a model folder whose weights are the start; None draws them from the seed."""
    data: str = "stdlib"
    """`stdlib` (Python's own library on this machine), a text file, a .jsonl file, or a folder."""
    tokenizer: str | None = None
    """None for bytes; else a Hugging Face tokenizer folder or a `tokenizer.json`."""

    steps: int = 1000
    batch_size: int = 8
    """Sequences in one optimizer step."""
    seq_len: int = 256
    """Predicted tokens in one sequence."""
    accumulate: int = 1
    """Forward and backward passes that one batch is spread over; must divide `batch_size`."""

    lr: float = 3e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The cosine ends at `min_lr_ratio * lr`."""
    warmup_steps: int | None = None
    """Linear warmup; None means a tenth of the steps, at most 200."""
    weight_decay: float = 0.1
    """On matrices only: decays, biases, norms and whatever a mixer marks are exempt."""
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 leaves gradients alone."""

    seed: int = 0
    device: str = "auto"
    """`auto` (the GPU if there is one), `cpu`, `cuda`, `cuda:1` ..."""
    precision: str = "auto"
    """`float32`, `bf16` (autocast; the weights stay float32), or `auto`: bf16 on a GPU only."""

    eval_every: int = 100
    eval_tokens: int = 65_536
    """Held-out tokens scored at each evaluation, in windows spread evenly over that text."""
    checkpoint_every: int = 100
    keep: int = 3
    """Checkpoints kept. With 1 there is no older one to fall back on if it is damaged."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _model_keywords(self.model))
        if isinstance(self.betas, list):  # as JSON gives it
            object.__setattr__(self, "betas", tuple(self.betas))
        for name, (accepts, expected) in _RULES.items():
            if not accepts(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected {expected}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: got {self.accumulate}; expected a divisor of "
                f"batch_size={self.batch_size}"
            )

    @property
    def model_keywords(self) -> dict[str, Any]:
        """`model` as the keywords of a SubquadConfig, whatever it was given as."""
        assert isinstance(self.model, dict)
        return self.model

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Inverse of `to_json`. Raises ValueError on a key that no field has."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown training settings {unknown}; expected some of {sorted(known)}"
            )
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Read a run directory's (or a file's) config. ValueError if it is not one."""
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            values = read_json(file)
            return cls.from_json(values.get("train", values))
        except FileNotFoundError:
            raise ValueError(f"{file} does not exist, so {path} is no training run") from None
        except (Damaged, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is not a training config: {error}") from None

    def changes_since(self, before: "TrainConfig", where: str) -> dict[str, list[Any]]:
        """Settings that differ: name -> [before, now]. ValueError for what no run may change."""
        old, new = before.to_json(), self.to_json()
        changes = {name: [old[name], new[name]] for name in new if old[name] != new[name]}
        if refused := sorted(set(changes) - CHANGEABLE):
            pairs = ((name, *changes[name]) for name in refused)
            listed = ", ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in pairs)
            raise ValueError(f"resume: {where} began with other settings: {listed}")
        return changes


def _model_keywords(model: Any) -> dict[str, Any]:
    if isinstance(model, str):
        return {"mixer": pick("mixer", model, ROWS)}
    keywords = model.to_dict() if hasattr(model, "to_dict") else model
    if not isinstance(keywords, Mapping):
        raise ValueError(
            f"model: got {type(model).__name__}; expected a row name, a dict of SubquadConfig's "
            "keywords, or a SubquadConfig"
        )
    # There and back through JSON, so that a config read from a file equals the one written.
    return _with_row_names(json.loads(json.dumps(dict(keywords))))


def _with_row_names(keywords: dict[str, Any]) -> dict[str, Any]:
    """Rows in any case, by their names; SubquadConfig judges whatever else is there."""
    if isinstance(keywords.get("mixer"), str):
        keywords["mixer"] = pick("mixer", keywords["mixer"], ROWS)
    if isinstance(keywords.get("layers"), list):
        keywords["layers"] = [
            pick("layers", row, ROWS) if isinstance(row, str) else row for row in keywords["layers"]
        ]
    return keywords


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) < _TOO_LARGE


_TOO_LARGE = 1e38  # in float32, in which weights are updated, this is next to infinity
_Rule = tuple[Callable[[Any], bool], str]
_COUNT: _Rule = (lambda v: _integer(v, 1), "an integer of at least 1")
_NOT_NEGATIVE: _Rule = (lambda v: _number(v) and v >= 0, "a number of at least 0")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("steps", "batch_size", "seq_len", "accumulate"), _COUNT),
    **dict.fromkeys(("eval_every", "eval_tokens", "checkpoint_every", "keep"), _COUNT),
    "lr": (lambda v: _number(v) and v > 0, "a positive number below 1e38"),
    "min_lr_ratio": (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "warmup_steps": (lambda v: v is None or _integer(v, 0), "None or an integer of at least 0"),
    "weight_decay": _NOT_NEGATIVE,
    "grad_clip": _NOT_NEGATIVE,
    "betas": (
        lambda v: (
            isinstance(v, tuple) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v)
        ),
        "two numbers from 0 to below 1",
    ),
    "seed": (lambda v: _integer(v, 0) and v < 2**63, "an integer from 0 to 2**63 - 1"),
    "precision": (lambda v: v in ("auto", "float32", "bf16"), "auto, float32 or bf16"),
    "data": (lambda v: isinstance(v, str) and v != "", "a file, a folder or `stdlib`"),
    "device": (lambda v: isinstance(v, str), "a string"),
    **dict.fromkeys(
        ("tokenizer", "init_from"), (lambda v: v is None or isinstance(v, str), "None or a string")
    ),
}
