"""What `subquad train` does with its arguments: settle the config, train, say where things are."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from subquad.errors import fail
from subquad.models import SubquadConfig
from subquad.train.config import TrainConfig
from subquad.train.loop import TrainResult, train
from subquad.train.progress import show_progress


def train_command(
    run_dir: Path | None,
    *,
    given: dict[str, Any],
    model: dict[str, Any],
    settings: list[str],
    base: Path | None,
    resume: bool,
) -> None:
    """Train as the command line says. `given` and `model` hold the options that were written."""
    if resume and run_dir is None:
        raise ValueError("--resume: name the run directory to continue, as in: train RUN --resume")
    if resume and base is not None:
        raise ValueError("--config: a resumed run keeps its own settings; leave --config out")
    config = settle(base or (run_dir if resume else None), given, model, settings)
    title = row_name(config)
    run_dir = run_dir or Path("runs") / title
    console = Console(stderr=True)
    with show_progress(title, console) as on_event:
        result = train(config, run_dir, resume=resume, on_event=on_event)
    console.print(summary(result), highlight=False, markup=False, soft_wrap=True)


def settle(
    base: Path | None, given: dict[str, Any], model: dict[str, Any], settings: list[str]
) -> TrainConfig:
    """The base's settings (or the defaults), overridden by the options, overridden by `--set`."""
    values = (TrainConfig() if base is None else TrainConfig.load(base)).to_json()
    values |= given
    keywords = values["model"]
    if "layers" in model:
        keywords |= parse_layers(model.pop("layers"))
    elif "mixer" in model:
        keywords.pop("layers", None)
    keywords |= model
    for setting in settings:
        name, value = parse_setting(setting)
        target, *rest = name.split(".", 1)
        if rest and target != "model":
            raise ValueError(f"--set: got {setting!r}; only names after `model.` have a dot")
        if rest and not hasattr(SubquadConfig(), rest[0]):
            raise fail(
                f"--set model.{rest[0]}", "no such field", "one of SubquadConfig", "look it up"
            )
        if rest:
            keywords[rest[0]] = value
        else:
            values[target] = value
    return TrainConfig.from_json(values)


def parse_layers(text: str) -> dict[str, Any]:
    """`4` -> that many layers; `mamba2,softmax_attention` -> these."""
    if text.isdigit():
        return {"num_hidden_layers": int(text), "layers": None}
    rows = [row.strip() for row in text.split(",")]
    return {"layers": rows, "num_hidden_layers": len(rows)}


def parse_setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON, or as plain text where it is none."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--set: got {text!r}; expected name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def row_name(config: TrainConfig) -> str:
    """The run's row, or `hybrid` when its layers differ."""
    model = config.model_keywords
    rows = set(model.get("layers") or [model.get("mixer", "gated_deltanet")])
    return rows.pop() if len(rows) == 1 else "hybrid"


def summary(result: TrainResult) -> str:
    run = result.run_dir
    if result.interrupted:
        return (
            f"stopped and saved after step {result.step}; go on with: subquad train {run} --resume"
        )
    return (
        f"done: {result.bits_per_byte:.4f} held-out bits/byte after {result.step} steps; "
        f"the model is in {run}/model. Hear it: subquad generate {run}"
    )
