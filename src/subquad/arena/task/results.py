"""What an arena on a task was asked, planned and found: records that go to JSON and back."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from subquad import tasks
from subquad.arena.entrants import Entrant, check_rows, labels, split_rows
from subquad.arena.records import Shape
from subquad.errors import choose, fail
from subquad.tasks import Recipe, Task
from subquad.tasks.base import check_count, check_flag, check_number

DEFAULT_ROWS = ("softmax_attention", "mamba", "mamba2", "gla", "gated_deltanet", "s4d")
_TESTS_WHILE_TRAINING = 20


@dataclass(frozen=True, kw_only=True)
class TaskArenaConfig:
    """The question. Rows see the same batches in the same order. None is the recipe's value.

    rows:            row names, or `row:option=value` with options of the mixer.
    settings:        of the task, over the preset's.
    parameters:      of every model, within 5 %; None: those of softmax attention in the recipe's
                     shape.
    layers:          of every model.
    hidden_size:     of every model, which are then equally wide, and not of equal parameters.
    eval_every:      steps between tests while training.
    test_sequences:  in a test while training; in the end, at each length, up to `test_tokens`.
    until_solved:    stop a row at its first solved test.
    seconds:         of wall clock to train a row; the learning rate then falls by the clock where
                     that is further on than the steps. None: however long the steps take.
    precision:       `float32`, `bf16`, or `auto`: bf16 on a GPU only.
    quadratic_limit: longest test for rows whose cost of a token grows with the context.
    """

    task: str
    preset: str = "small"
    settings: dict[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = DEFAULT_ROWS
    parameters: int | None = None
    layers: int | None = None
    hidden_size: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    eval_every: int | None = None
    test_sequences: int = 256
    test_tokens: int = 1 << 20
    until_solved: bool = True
    seconds: float | None = None
    precision: str = "auto"
    quadratic_limit: int = 1 << 14
    device: str = "auto"

    def __post_init__(self) -> None:
        rows = split_rows(self.rows) if isinstance(self.rows, str) else self.rows
        object.__setattr__(self, "rows", labels(rows))
        # JSON has no tuples; a config read back must equal the one written.
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))
        choose("task", self.task, tuple(tasks.TASKS))
        self.build().tests()  # lets the task judge its settings, before anything is trained
        check_rows(self.rows)
        for name in ("parameters", "layers", "hidden_size", "steps", "batch_size", "eval_every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("test_sequences", "test_tokens", "quadratic_limit"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, least=0)
        for name in ("lr", "seconds"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), most=math.inf)
        choose("precision", self.precision, ("auto", "float32", "bf16"))
        check_flag("until_solved", self.until_solved)
        if self.parameters is not None and self.hidden_size is not None:
            got = f"{self.hidden_size}, with parameters = {self.parameters}"
            raise fail("hidden_size", got, "one of the two", "models are equally large or wide")

    def build(self) -> Task:
        """The task itself."""
        return tasks.get(self.task, preset=self.preset, **self.settings)

    def entrants(self) -> list[Entrant]:
        return [Entrant.parse(row) for row in self.rows]

    def recipe(self) -> Recipe:
        """The preset's, with what this config says otherwise."""
        base = asdict(tasks.TASKS[self.task].recipes[self.preset])
        names = ("steps", "batch_size", "lr", "layers", "hidden_size")
        own = {name: getattr(self, name) for name in names}
        return Recipe(**base | {name: value for name, value in own.items() if value is not None})

    def steps_between_tests(self) -> int:
        return self.eval_every or max(1, self.recipe().steps // _TESTS_WHILE_TRAINING)


@dataclass(frozen=True)
class TaskPlan:
    """What is settled before any row is trained. `shapes` by label."""

    config: TaskArenaConfig
    environment: dict[str, Any]
    recipe: Recipe
    parameters: int | None  # asked of every row; None: equally wide
    shapes: dict[str, Shape]

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "TaskPlan":
        return cls(
            config=TaskArenaConfig(**record["config"]),
            environment=record["environment"],
            recipe=Recipe(**record["recipe"]),
            parameters=record["parameters"],
            shapes={label: Shape(**shape) for label, shape in record["shapes"].items()},
        )


@dataclass(frozen=True)
class Outcome:
    """A trained model on one of the task's tests; `value` None if it was not run, with the reason.

    error: standard error of `accuracy`, of the choice of test sequences alone; None of a signal.
    """

    name: str
    positions: int
    value: float | None
    accuracy: float | None = None
    whole: float | None = None
    error: float | None = None
    answers: int = 0
    sequences: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class TaskRowResult:
    """All about one row. Entry i of `losses` belongs to `loss_steps[i]`, as with `values`."""

    label: str
    shape: Shape
    steps: int
    seconds: float
    solved: int | None
    loss_steps: list[int]
    losses: list[float]
    value_steps: list[int]
    values: list[float]
    tests: list[Outcome]
    state_bytes: int  # of one sequence, all layers, after the training length
    failure: str = ""  # why the training ended early
    cut: bool = False  # the time was over before the steps were done
    # Of training, at each of `values`; none in results written before this was recorded.
    value_seconds: list[float] = field(default_factory=list)

    @property
    def row(self) -> str:
        return self.label

    @property
    def value(self) -> float | None:
        """The metric as trained."""
        return self.tests[0].value

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "TaskRowResult":
        shape, tests = Shape(**record["shape"]), [Outcome(**t) for t in record["tests"]]
        return cls(**record | {"shape": shape, "tests": tests})


@dataclass(frozen=True)
class TaskArenaResults:
    """The answer so far: finished rows, in the order asked for.

    stopped_by: the signal that ended the call, if one did; not kept in files.
    """

    plan: TaskPlan
    rows: list[TaskRowResult]
    stopped_by: int | None = field(default=None, compare=False)

    @property
    def config(self) -> TaskArenaConfig:
        return self.plan.config

    @property
    def missing(self) -> list[str]:
        finished = {result.label for result in self.rows}
        return [label for label in self.config.rows if label not in finished]

    def to_json(self) -> dict[str, Any]:
        task = self.config.build()
        summary = [
            {
                "row": result.label,
                "parameters": result.shape.parameters,
                "metric": task.metric,
                "solved_at_step": result.solved,
                "state_bytes": result.state_bytes,
                "tests": {test.name: test.value for test in result.tests},
            }
            for result in self.rows
        ]
        return {
            "summary": summary,
            "missing": self.missing,
            "plan": asdict(self.plan),
            "rows": [asdict(result) for result in self.rows],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "TaskArenaResults":
        rows = [TaskRowResult.from_json(row) for row in record["rows"]]
        return cls(TaskPlan.from_json(record["plan"]), rows)
