"""The arena: measure, plan, then train row after row, so that stopping loses little.

What lies where:

    DIR/plan.json        what was asked and settled, written before training
    DIR/ROW/             an ordinary training run (`subquad generate DIR/ROW` works); of several
                         learning rates one each: DIR/ROW/lr=0.001/
    DIR/ROW/result.json  all about the row, once it is finished
    DIR/results.json     everything in one file
    DIR/report.html      everything on one page
"""

import math
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from subquad.arena.equalise import equal_shape
from subquad.arena.folder import Stopped, describe_machine, is_begun, read_back, refuse_changes
from subquad.arena.measure import decode_timings, heldout_windows
from subquad.arena.records import Shape
from subquad.arena.text.results import (
    ArenaConfig,
    ArenaResults,
    Attempt,
    Plan,
    RowResult,
    Training,
    settled_rates,
)
from subquad.files import write_json
from subquad.generate import stream
from subquad.train import Corpus, TrainConfig, TrainingError, TrainResult, load_corpus, train

Record = dict[str, Any]
_CALIBRATION_STEPS = 8
_CALIBRATION_WARM_UP = 3  # compiling and first allocations
_LEAST_STEPS = 20  # a budget too short for this many is overrun rather than meaningless


def run_arena(
    config: ArenaConfig,
    out: Path,
    on_event: Callable[[Record], None] = lambda record: None,
) -> ArenaResults:
    """Train and measure every row of `config`; continue what an earlier call left in `out`.

    Ctrl-C saves a checkpoint of the row in training and returns what is finished; the same call
    continues from there. Rows already finished are read back, not trained again.

    Args:
        config: the question.
        out: a directory, made if need be.
        on_event: called with {"kind": "measure" | "plan" | "row", ...} and, "row" added, with every
            record of `subquad.train`.

    Raises:
        ValueError: a setting that does not fit, or `out` holds another arena.
        KeyboardInterrupt: stopped while planning, when nothing is worth keeping.
    """
    began = perf_counter()
    corpus = load_corpus(config.data)
    plan = _read_plan(config, out)
    if plan is None:
        plan = _make_plan(config, corpus, began, on_event)
        write_json(out / "plan.json", asdict(plan))
    on_event({"kind": "plan", "plan": plan})
    finished, failures, stopped_by = [], {}, None
    for entrant in config.entrants():
        folder = out / entrant.folder
        result = _read_row(folder)
        if result is None:
            try:
                result = _run_row(entrant.label, plan, corpus, folder, on_event)
            except KeyboardInterrupt as stopped:  # in training, `train` itself stops and saves
                stopped_by = getattr(stopped, "signal", signal.SIGINT)
                break
            except TrainingError as error:  # the others have done nothing wrong
                failures[entrant.label] = str(error)
                text = f"gave up: {error}"
                on_event({"kind": "message", "row": entrant.label, "text": text})
                continue
        finished.append(result)
        on_event({"kind": "row", "row": entrant.label, "result": result})
    return ArenaResults(plan, finished, failures, stopped_by)


def _make_plan(
    config: ArenaConfig, corpus: Corpus, began: float, on_event: Callable[[Record], None]
) -> Plan:
    """Shapes, decode timings and the number of steps. `began`: when the time budget started."""
    vocab_size = len(corpus.tokenizer)
    shapes = {
        entrant.label: equal_shape(
            entrant.row, config.parameters, vocab_size, options=entrant.options
        )
        for entrant in config.entrants()
    }
    text = torch.from_numpy(corpus.heldout.ids[: max(config.contexts)].astype("int64"))
    rates = settled_rates(config)
    decode, step_seconds, other_seconds = {}, 0.0, 0.0
    for row, shape in shapes.items():
        on_event({"kind": "measure", "row": row, "what": "training"})
        settings = _train_config(config, shape, _CALIBRATION_STEPS, rates[row][0])
        trained = train(settings, corpus=corpus)
        if trained.interrupted:
            raise Stopped(trained.stopped_by)
        seconds = median(_step_seconds(trained)[_CALIBRATION_WARM_UP:])
        # Timing the steps of a model does not need its final weights: they do not change the work.
        on_event({"kind": "measure", "row": row, "what": "decoding"})
        decode[row] = decode_timings(trained.model, text, config.contexts)
        step_seconds += seconds * len(rates[row])
        # Scoring a token takes a third of training on it; a sample goes token by token.
        scoring = config.heldout_tokens / (config.batch_size * config.seq_len) * seconds / 3
        other_seconds += scoring + config.sample_tokens * decode[row][0].seconds_per_token
    steps = config.steps
    if steps is None:
        left = config.minutes * 60 - (perf_counter() - began) - other_seconds
        steps = max(_LEAST_STEPS, int(left / step_seconds))
    return Plan(config, describe_machine(config.device), steps, shapes, decode, rates)


def _run_row(
    row: str, plan: Plan, corpus: Corpus, folder: Path, on_event: Callable[[Record], None]
) -> RowResult:
    """Train one row, score it and let it write. KeyboardInterrupt if it was stopped on the way."""
    config, shape = plan.config, plan.shapes[row]
    trained, attempts = _train_row(row, plan, corpus, folder, on_event)
    settings = trained.config
    on_event({"kind": "measure", "row": row, "what": "held-out text"})
    bits, sizes = heldout_windows(trained.model, corpus.heldout, settings, config.heldout_tokens)
    pieces = stream(
        trained.model.eval(),
        corpus.tokenizer,
        config.prompt,
        max_new_tokens=config.sample_tokens,
        seed=config.seed,
    )
    sample = "".join(pieces)
    losses = [record["bits_per_byte"] for record in trained.history if record["kind"] == "train"]
    tokens = config.batch_size * config.seq_len
    training = Training(losses, _step_seconds(trained), tokens)
    decode, lr = plan.decode[row], settings.lr
    result = RowResult(shape, training, bits, sizes, decode, sample, row, lr, attempts)
    write_json(folder / "result.json", asdict(result))
    return result


def _train_row(
    row: str, plan: Plan, corpus: Corpus, folder: Path, on_event: Callable[[Record], None]
) -> tuple[TrainResult, list[Attempt]]:
    """The row at its best learning rate, and how it did at each where there are several."""
    rates, attempts = plan.rates[row], []
    best, least = None, math.inf
    for lr in rates:
        own = folder if len(rates) == 1 else folder / f"lr={lr}"
        if len(rates) > 1:
            on_event({"kind": "measure", "row": row, "what": f"learning rate {lr}"})
        try:
            trained = train(
                _train_config(plan.config, plan.shapes[row], plan.steps, lr),
                own,
                resume=own.exists(),
                on_event=lambda record: on_event({**record, "row": row}),
                corpus=corpus,
            )
        except TrainingError:  # too fast; another rate may do
            if best is None and lr == rates[-1]:
                raise
            attempts.append(Attempt(lr, None))
            continue
        if trained.interrupted:
            raise Stopped(trained.stopped_by)
        end = _end(trained)
        attempts.append(Attempt(lr, end))
        if best is None or end < least:
            best, least = trained, end
    assert best is not None
    return best, attempts if len(rates) > 1 else []


def _end(trained: TrainResult) -> float:
    """Bits per byte over the last tenth of the training."""
    losses = [record["bits_per_byte"] for record in trained.history if record["kind"] == "train"]
    last = losses[-max(1, len(losses) // 10) :]
    return float(sum(last) / len(last))


def _train_config(config: ArenaConfig, shape: Shape, steps: int, lr: float) -> TrainConfig:
    """The same for every row but for the model."""
    return TrainConfig(
        model=shape.model,
        data=config.data,
        steps=steps,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        lr=lr,
        seed=config.seed,
        device=config.device,
        eval_every=steps,
        eval_tokens=16 * config.seq_len,  # a glance; the arena scores the finished model itself
        checkpoint_every=max(100, steps // 4),
        keep=1,
    )


def _step_seconds(trained: TrainResult) -> list[float]:
    tokens = trained.config.batch_size * trained.config.seq_len
    return [tokens / r["tokens_per_second"] for r in trained.history if r["kind"] == "train"]


def _read_plan(config: ArenaConfig, out: Path) -> Plan | None:
    """The plan of an earlier call in `out`, or None; ValueError if it was another arena's."""
    if not is_begun(out):
        return None
    plan: Plan = read_back(out / "plan.json", Plan.from_json)
    unfinished = not all((out / e.folder / "result.json").exists() for e in config.entrants())
    here = describe_machine(config.device) if unfinished else plan.environment
    refuse_changes(out, asdict(plan.config), asdict(config), plan.environment, here)
    return plan


def _read_row(folder: Path) -> RowResult | None:
    result: RowResult | None = read_back(folder / "result.json", RowResult.from_json)
    return result
