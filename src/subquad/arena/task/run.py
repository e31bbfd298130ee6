"""The arena on a task: plan, then train and test row after row, so that stopping loses little.

DIR/plan.json            what was asked and settled
DIR/ROW/result.json      all about the row, once it is finished; until then
DIR/ROW/unfinished/      what its training continues from
DIR/results.json         everything in one file
DIR/report.html          everything on one page
"""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from subquad.arena.entrants import Entrant
from subquad.arena.equalise import count_shape, equal_shape, narrow_options
from subquad.arena.folder import Stopped, describe_machine, is_begun, read_back, refuse_changes
from subquad.arena.records import Shape
from subquad.arena.task.results import (
    Outcome,
    TaskArenaConfig,
    TaskArenaResults,
    TaskPlan,
    TaskRowResult,
)
from subquad.files import remove, write_json
from subquad.table import ROWS
from subquad.tasks import Recipe, Task
from subquad.tasks.model import TaskModel
from subquad.tasks.scoring import score
from subquad.train import TrainConfig, TrainingError, autocast_dtype
from subquad.train.task import TaskResult, train_task

Record = dict[str, Any]
_FEWEST = 8  # sequences in a test, however long they are


def run_task_arena(
    config: TaskArenaConfig,
    out: Path | None = None,
    on_event: Callable[[Record], None] = lambda record: None,
) -> TaskArenaResults:
    """Train and test every row of `config`; continue what an earlier call left in `out`.

    Ctrl-C keeps the row in training and returns what is finished; the same call continues from
    there, also after a kill, which costs a minute of training at most.

    Args:
        config: the question.
        out: a directory, made if need be; None writes nothing.
        on_event: called with {"kind": "plan" | "row" | "measure", ...} and, "row" added, with every
            record of `train_task`.

    Raises:
        ValueError: a setting that does not fit, or `out` holds another arena.
    """
    plan = _read_plan(config, out) if out else None
    if plan is None:
        plan = make_plan(config)
        if out:
            write_json(out / "plan.json", asdict(plan))
    on_event({"kind": "plan", "plan": plan})
    finished, stopped_by = [], None
    for entrant in config.entrants():
        result = _read_row(out / entrant.folder) if out else None
        kept = out / entrant.folder / "unfinished" if out else None
        if result is None:
            try:
                result = _run_row(entrant, plan, kept, on_event)
            except KeyboardInterrupt as stopped:  # in training, `train_task` itself stops
                stopped_by = getattr(stopped, "signal", signal.SIGINT)
                break
            if out and kept:
                write_json(out / entrant.folder / "result.json", asdict(result))
                remove(kept)
        finished.append(result)
        on_event({"kind": "row", "row": entrant.label, "result": result})
    return TaskArenaResults(plan, finished, stopped_by)


def make_plan(config: TaskArenaConfig) -> TaskPlan:
    """Recipe and shapes: of equal parameters at equal depth, or of equal width and depth."""
    recipe, vocab_size = config.recipe(), max(1, config.build().vocab_size)
    parameters = None
    if config.hidden_size is None:
        reference = _shape(Entrant.parse("softmax_attention"), recipe, vocab_size)
        parameters = config.parameters or reference.parameters
    shapes = {}
    for entrant in config.entrants():
        if parameters is None:
            shapes[entrant.label] = _shape(entrant, recipe, vocab_size)
        else:
            shapes[entrant.label] = equal_shape(
                entrant.row,
                parameters,
                vocab_size,
                layers=recipe.layers,
                options=entrant.options,
            )
    return TaskPlan(config, describe_machine(config.device), recipe, parameters, shapes)


def _shape(entrant: Entrant, recipe: Recipe, vocab_size: int) -> Shape:
    """The recipe's own shape."""
    model = {
        "mixer": entrant.row,
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.layers,
        **narrow_options(entrant.row, recipe.hidden_size, entrant.options),
    }
    return count_shape(entrant.row, model, vocab_size)


def _run_row(
    entrant: Entrant, plan: TaskPlan, kept: Path | None, on_event: Callable[[Record], None]
) -> TaskRowResult:
    """Train and test one row. KeyboardInterrupt if it was stopped on the way, and is kept."""
    config, shape, task = plan.config, plan.shapes[entrant.label], plan.config.build()
    settings = train_config(config, plan.recipe, shape)
    history: list[Record] = []  # of a training that breaks off, too

    def listen(record: Record) -> None:
        if record["kind"] != "message":
            history.append(record)
        on_event({**record, "row": entrant.label})

    trained, failure = None, ""
    try:
        trained = train_task(
            task,
            settings,
            sequences=config.test_sequences,
            until_solved=config.until_solved,
            seconds=config.seconds,
            keep=kept,
            on_event=listen,
        )
    except TrainingError as error:  # one row that diverges is a result, too
        failure = str(error)
    if trained is not None and trained.interrupted:
        raise Stopped(trained.stopped_by)
    if trained is not None:  # what was recorded before it was resumed included
        history = trained.history
    losses = [r for r in history if r["kind"] == "train"]
    values = [r for r in history if r["kind"] == "test"]
    return TaskRowResult(
        label=entrant.label,
        shape=shape,
        steps=history[-1]["step"] if history else 0,
        seconds=history[-1]["seconds"] if history else 0.0,
        solved=trained.solved if trained else None,
        loss_steps=[r["step"] for r in losses],
        losses=[r["loss"] for r in losses],
        value_steps=[r["step"] for r in values],
        values=[r["value"] for r in values],
        tests=_tests(entrant, config, task, trained, settings, on_event, failure),
        state_bytes=state_bytes(trained.model, task) if trained else 0,
        failure=failure,
        cut=trained is not None and trained.cut,
        value_seconds=[r["seconds"] for r in values],
    )


def train_config(config: TaskArenaConfig, recipe: Recipe, shape: Shape) -> TrainConfig:
    """The same for every row but for the model."""
    return TrainConfig(
        model=shape.model,
        data=f"task:{config.task}",
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        min_lr_ratio=recipe.final_lr,
        weight_decay=recipe.weight_decay,
        seed=config.seed,
        device=config.device,
        precision=config.precision,
        eval_every=config.steps_between_tests(),
    )


def _tests(
    entrant: Entrant,
    config: TaskArenaConfig,
    task: Task,
    trained: TaskResult | None,
    settings: TrainConfig,
    on_event: Callable[[Record], None],
    failure: str,
) -> list[Outcome]:
    """The trained model on every test of the task, at any length."""
    results = []
    grows = "T" in ROWS[entrant.row].decode
    for name, test in task.tests().items():
        positions = test.sample(1, split="test").inputs.shape[1]
        reason = failure
        if grows and positions > config.quadratic_limit:
            reason = f"longer than quadratic_limit = {config.quadratic_limit}"
        if reason or trained is None:
            results.append(Outcome(name, positions, None, reason=reason))
            continue
        on_event({"kind": "measure", "row": entrant.label, "what": name})
        results.append(_test(name, test, positions, trained.model, config, settings))
    return results


def _test(
    name: str,
    test: Task,
    positions: int,
    model: TaskModel,
    config: TaskArenaConfig,
    settings: TrainConfig,
) -> Outcome:
    device = next(model.parameters()).device
    dtype = autocast_dtype(settings, device)
    sequences = max(_FEWEST, min(config.test_sequences, config.test_tokens // positions))
    began = perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        # A seed of its own, or the tests while training would have chosen the model for these.
        found = score(model, test, test.test_batches(sequences, seed=config.seed + 1))
    whole = None if math.isnan(found.whole) else found.whole
    return Outcome(
        name=name,
        positions=positions,
        value=found.value,
        accuracy=found.accuracy,
        whole=whole,
        error=found.error,
        answers=found.answers,
        sequences=found.sequences,
        seconds=perf_counter() - began,
    )


@torch.inference_mode()
def state_bytes(model: TaskModel, task: Task) -> int:
    """Bytes that are kept of one sequence of the training length."""
    device = next(model.parameters()).device
    _, cache = model.eval().hidden(task.sample(1).to(device).inputs, None, keep=True)
    return int(cache.nbytes)


def _read_plan(config: TaskArenaConfig, out: Path) -> TaskPlan | None:
    if not is_begun(out):
        return None
    plan: TaskPlan = read_back(out / "plan.json", TaskPlan.from_json)
    then_asked, asked = _asked(plan.config, plan.recipe), _asked(config, config.recipe())
    finished = all((out / e.folder / "result.json").exists() for e in config.entrants())
    here = plan.environment if finished else describe_machine(config.device)
    refuse_changes(out, then_asked, asked, plan.environment, here)
    return plan


def _asked(config: TaskArenaConfig, recipe: Recipe) -> Record:
    """The question as JSON has it, and what the recipe says of settings that were left to it.

    The machine shows which device was meant: `auto` and `cuda` may be the same.
    """
    left = {
        f"recipe's {n}": v for n, v in asdict(recipe).items() if getattr(config, n, None) is None
    }
    question: Record = json.loads(json.dumps(asdict(replace(config, device="auto"))))
    return question | left


def _read_row(folder: Path) -> TaskRowResult | None:
    result: TaskRowResult | None = read_back(folder / "result.json", TaskRowResult.from_json)
    return result
