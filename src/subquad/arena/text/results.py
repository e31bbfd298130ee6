"""What the arena was asked, planned and found: plain records that go to JSON and back unchanged.

Units, everywhere: bits per byte, seconds, tokens per second, bytes. Nothing here is rounded.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from subquad.arena.entrants import Entrant, check_rows, labels
from subquad.arena.records import DecodeTiming, Shape
from subquad.arena.text.rates import swept_rate

DEFAULT_ROWS = ("softmax_attention", "mamba", "mamba2", "gla", "gated_deltanet")


@dataclass(frozen=True)
class ArenaConfig:
    """The question. Runs with equal configs see the same batches in the same order.

    rows:       the entrants, each a row of the table, or one with options of its mixer:
                `mamba2:state_size=32`.
    parameters: trainable parameters of every model, embeddings counted once (they are tied).
    minutes:    wall-clock budget for everything, from which one number of steps for all rows is
                derived; ignored where `steps` is given.
    lr:         peak learning rate of every row; of several, each row is trained at each, and shown
                at the one that ends its training best. None: each row's own, of a sweep at the
                demo's size (rates.py).
    contexts:   context lengths, in tokens, at which decoding is timed and the cache weighed.
    """

    rows: tuple[str, ...] = DEFAULT_ROWS
    parameters: int = 1_000_000
    data: str = "stdlib"
    steps: int | None = None
    minutes: float = 6.0
    seq_len: int = 256
    batch_size: int = 4
    lr: float | tuple[float, ...] | None = None
    seed: int = 0
    contexts: tuple[int, ...] = (128, 2048, 16384)
    heldout_tokens: int = 65_536
    prompt: str = "def read"
    sample_tokens: int = 240
    device: str = "auto"

    def __post_init__(self) -> None:
        # JSON has no tuples; a config read back must equal the one written.
        object.__setattr__(self, "rows", labels(self.rows))
        object.__setattr__(self, "contexts", tuple(sorted(self.contexts)))
        if isinstance(self.lr, list | tuple):
            rates = tuple(sorted(set(self.lr)))
            object.__setattr__(self, "lr", rates[0] if len(rates) == 1 else rates)
        check_rows(self.rows)
        for name in ("parameters", "seq_len", "batch_size", "minutes"):
            _require_positive(name, getattr(self, name))
        if self.lr == ():
            raise ValueError("lr must be a positive number or several, got none")
        for rate in self.lr if isinstance(self.lr, tuple) else (self.lr,):
            if rate is not None:
                _require_positive("lr", rate)
        if self.steps is not None:
            _require_positive("steps", self.steps)
        if not self.contexts or self.contexts[0] < 1:
            raise ValueError(f"contexts must be positive token counts, got {list(self.contexts)}")
        if not self.prompt:
            raise ValueError("prompt must not be empty: every row continues the same text")

    def rates(self, row: str) -> tuple[float, ...]:
        """The learning rates of a row of the table, from the smallest."""
        lr = swept_rate(row) if self.lr is None else self.lr
        return lr if isinstance(lr, tuple) else (lr,)

    def entrants(self) -> list[Entrant]:
        """The rows, read."""
        return [Entrant.parse(row) for row in self.rows]


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class Training:
    """The curve of one row. Entry i of each list belongs to optimiser step i + 1."""

    bits_per_byte: list[float]  # of the training batch, before the step
    seconds: list[float]  # of the step alone
    tokens_per_step: int

    @property
    def tokens_per_second(self) -> float:
        """From the median step, so that a hiccup of the machine does not count."""
        return self.tokens_per_step / sorted(self.seconds)[len(self.seconds) // 2]


@dataclass(frozen=True)
class Attempt:
    """A row at one learning rate, by the mean over the last tenth of its training.

    Losses are of batches before the step on them; the held-out text has no say in the choice.
    """

    lr: float
    bits_per_byte: float | None  # None: training broke off, its loss was no number


@dataclass(frozen=True)
class RowResult:
    """All about one finished row; heldout_bits[i] and heldout_bytes[i] are held-out window i's."""

    shape: Shape
    training: Training
    heldout_bits: list[float]
    heldout_bytes: list[int]
    decode: list[DecodeTiming]
    sample: str
    label: str = ""  # as it was asked for, options included; empty for the row's name
    # Where several learning rates were tried: the best, and what each ended with (`Attempt`).
    lr: float | None = None
    attempts: list["Attempt"] = field(default_factory=list)

    @property
    def row(self) -> str:
        """The row of the table."""
        return self.shape.row

    @property
    def name(self) -> str:
        """What distinguishes this entrant from the others: `gla`, or `gla:num_heads=4`."""
        return self.label or self.row

    @property
    def bits_per_byte(self) -> float:
        return sum(self.heldout_bits) / sum(self.heldout_bytes)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "RowResult":
        return cls(
            shape=Shape(**record["shape"]),
            training=Training(**record["training"]),
            heldout_bits=record["heldout_bits"],
            heldout_bytes=record["heldout_bytes"],
            decode=[DecodeTiming(**timing) for timing in record["decode"]],
            sample=record["sample"],
            # Results written before there were options and several learning rates have no:
            label=record.get("label", ""),
            lr=record.get("lr"),
            attempts=[Attempt(**attempt) for attempt in record.get("attempts", [])],
        )


def difference(row: RowResult, best: RowResult) -> tuple[float, float]:
    """Held-out bits per byte of `row` above `best`, and the standard error of that difference.

    Both saw the same windows, so windows are compared in pairs: what makes a window hard for
    every model cancels. The error covers the choice of held-out text and nothing else.
    """
    total = sum(row.heldout_bytes)
    gaps = [a - b for a, b in zip(row.heldout_bits, best.heldout_bits)]
    mean = sum(gaps) / total
    windows = len(gaps)
    if windows < 2:
        return mean, float("nan")
    residuals = [gap - mean * size for gap, size in zip(gaps, row.heldout_bytes)]
    variance = sum(r * r for r in residuals) * windows / (windows - 1)
    return mean, variance**0.5 / total


@dataclass(frozen=True)
class Plan:
    """What is settled before any row is trained, so that a stopped run can continue with the same.

    rates: the learning rates of each row, by label.
    """

    config: ArenaConfig
    environment: dict[str, Any]  # versions, machine, threads, date
    steps: int
    shapes: dict[str, Shape]
    decode: dict[str, list[DecodeTiming]]
    rates: dict[str, list[float]]

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Plan":
        config = ArenaConfig(**record["config"])
        return cls(
            config=config,
            environment=record["environment"],
            steps=record["steps"],
            shapes={row: Shape(**shape) for row, shape in record["shapes"].items()},
            decode={
                row: [DecodeTiming(**timing) for timing in timings]
                for row, timings in record["decode"].items()
            },
            # Plans written before rows had rates of their own have those of the config.
            rates=record.get("rates") or settled_rates(config),
        )


def settled_rates(config: ArenaConfig) -> dict[str, list[float]]:
    """The learning rates of each row, by label."""
    return {entrant.label: list(config.rates(entrant.row)) for entrant in config.entrants()}


@dataclass(frozen=True)
class ArenaResults:
    """The answer so far: finished rows, in the order asked for.

    failures:   why training broke off, by the row; the same call tries again.
    stopped_by: the signal that ended the call, if one did; not kept in files.
    """

    plan: Plan
    rows: list[RowResult]
    failures: dict[str, str] = field(default_factory=dict)
    stopped_by: int | None = field(default=None, compare=False)

    @property
    def config(self) -> ArenaConfig:
        return self.plan.config

    @property
    def missing(self) -> list[str]:
        """Rows not reached yet."""
        finished = {result.name for result in self.rows} | self.failures.keys()
        return [row for row in self.config.rows if row not in finished]

    def to_json(self) -> dict[str, Any]:
        """A summary first, for readers in a hurry; then everything, from which it was computed."""
        summary = [
            {
                "row": result.name,
                "parameters": result.shape.parameters,
                "lr": result.lr,
                "heldout_bits_per_byte": result.bits_per_byte,
                "train_tokens_per_second": result.training.tokens_per_second,
                "decode_tokens_per_second": {t.context: t.tokens_per_second for t in result.decode},
                "cache_bytes": {t.context: t.cache_bytes for t in result.decode},
            }
            for result in self.rows
        ]
        return {
            "summary": summary,
            "missing": self.missing,
            "failures": self.failures,
            "plan": asdict(self.plan),
            "rows": [asdict(result) for result in self.rows],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "ArenaResults":
        rows = [RowResult.from_json(row) for row in record["rows"]]
        return cls(Plan.from_json(record["plan"]), rows, record.get("failures", {}))
