"""The config of a training run: defaults or another run's, options over those, `--set` over all."""

from pathlib import Path
from typing import Any

from subquad.cli import parse
from subquad.errors import choose, fail
from subquad.models import SubquadConfig
from subquad.train.build import check_tokenizer, model_at
from subquad.train.config import TrainConfig

_FIELDS = tuple(SubquadConfig.__annotations__)


def settle(
    base: Path | None,
    given: dict[str, Any],
    model: dict[str, Any],
    settings: list[str],
    start: Path | None = None,
) -> TrainConfig:
    """The base's settings (or the defaults), overridden by the options, overridden by `--set`.

    start: a folder from which weights are taken, and with them the model and the tokenizer.
    """
    values = (TrainConfig() if base is None else TrainConfig.load(base)).to_json()
    own, asked = _read_settings(settings)
    asked = _model_options(model) | asked
    values |= given | own
    if start is None:
        values["model"] = _merged(values["model"], asked)
        return TrainConfig.from_json(values)
    held, tokenizer = model_at(start)
    check_tokenizer(values["tokenizer"], tokenizer, start)
    _refuse_changes(start, held, _merged(values["model"] if base else {}, asked))
    values["model"] = {name: getattr(held, name) for name in _FIELDS}
    return TrainConfig.from_json(values | {"tokenizer": tokenizer, "init_from": str(start)})


def _merged(keywords: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Keywords of SubquadConfig with others over them. A mixer is that of every layer."""
    one_row = "mixer" in asked and "layers" not in asked
    return {n: v for n, v in keywords.items() if not (one_row and n == "layers")} | asked


def _model_options(model: dict[str, Any]) -> dict[str, Any]:
    """--mixer, --layers and --hidden-size as keywords of SubquadConfig."""
    keywords = dict(model)
    if "mixer" in keywords:
        keywords["mixer"] = parse.row("--mixer", keywords["mixer"])
    if "layers" in keywords:
        keywords |= parse.layers(keywords.pop("layers"))
    return keywords


def _read_settings(settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `--set` says of the training, and what of the model."""
    own: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for text in settings:
        name, value = parse.setting(text)
        target, *rest = name.split(".", 1)
        if not rest:
            own[name] = value
        elif target != "model":
            raise fail("--set", repr(text), "a dot only after `model.`", "leave the dot out")
        else:
            choose("--set", rest[0], _FIELDS)
            model[rest[0]] = value
    return own, model


def _refuse_changes(start: Path, held: SubquadConfig, asked: dict[str, Any]) -> None:
    """ValueError for an option that would make another model than the one in `start`."""
    keywords = {name: getattr(held, name) for name in _FIELDS}
    wanted = SubquadConfig(**_merged(keywords, asked))
    own = ("mixer", "layers", "num_hidden_layers")  # these decide the rows, in one way or another
    pairs = {name: (getattr(held, name), getattr(wanted, name)) for name in _FIELDS}
    changed = {name: pair for name, pair in pairs.items() if name not in own and pair[0] != pair[1]}
    if held.rows != wanted.rows:
        changed["layers"] = (held.rows, wanted.rows)
    for name, (has, wants) in changed.items():
        got = f"{wants!r}, where the model in {start} has {has!r}"
        raise fail(name, got, "what --from has", "leave it out, or leave --from out")


def row_name(config: TrainConfig) -> str:
    """The run's row, or `hybrid` when its layers differ."""
    model = config.model_keywords
    rows = set(model.get("layers") or [model.get("mixer", "gated_deltanet")])
    return rows.pop() if len(rows) == 1 else "hybrid"
