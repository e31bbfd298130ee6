"""The results for people: a table for the terminal and one self-contained HTML page."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.text import Text

from subquad.arena.columns import NumberTable
from subquad.arena.drawing import byte_count, count, looks
from subquad.arena.measure import DECODE_STEPS, DECODE_WARM_UP
from subquad.arena.page import render
from subquad.arena.records import DecodeTiming
from subquad.arena.text import plots
from subquad.arena.text.results import (
    ArenaConfig,
    ArenaResults,
    RowResult,
    difference,
)
from subquad.files import write_atomically, write_json
from subquad.table import ROWS

_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


def write_report(results: ArenaResults, folder: Path) -> Path:
    """Write results.json and, once a row is finished, report.html; return the page's path."""
    write_json(folder / "results.json", results.to_json())
    page = folder / "report.html"
    if results.rows:
        write_atomically(page, render_html(results))
    return page


def terminal_table(results: ArenaResults) -> NumberTable:
    """The finished rows, for a rich Console."""
    contexts = [count(context) for context in results.config.contexts]
    heads = ["\nparams", "bits/\nbyte", "train\ntok/s"]
    heads += [f"{what}\n@{context}" for what in ("tok/s", "cache") for context in contexts]
    best = min((result.bits_per_byte for result in results.rows), default=None)
    rows = []
    for result in results.rows:
        is_best = result.bits_per_byte == best
        cells = [
            Text(count(result.shape.parameters)),
            Text(f"{result.bits_per_byte:.3f}", style="bold" if is_best else ""),
            Text(count(result.training.tokens_per_second)),
            *(Text(f"{timing.tokens_per_second:,.0f}") for timing in result.decode),
            *(Text(byte_count(t.cache_bytes).replace("iB", "")) for t in result.decode),
        ]
        rows.append((result.name, cells))
    return NumberTable("\nrow", heads, rows)


def render_html(results: ArenaResults) -> str:
    """The page, complete in one string. Needs at least one finished row."""
    if not results.rows:
        raise ValueError("results hold no finished row, so there is nothing to report yet")
    drawings = {
        "loss_wide": plots.loss_curves(results, 912, 380),
        "loss_narrow": plots.loss_curves(results, 440, 380),
        "time": plots.loss_against_time(results, 440, 340),
        "state": plots.quality_against_state(results, 440, 340),
        "decode": plots.decode_times(results, 440, 320),
        "cache": plots.cache_sizes(results, 440, 320),
    }
    config, first = results.config, results.rows[0]
    number = len(results.rows)
    return render(
        "text/report.html.jinja",
        drawings,
        title=f"{_NUMBERS[number] if number < len(_NUMBERS) else number} "
        f"sequence mixer{'s' if number != 1 else ''}, one budget",
        config=config,
        parameters=count(config.parameters),
        tokens=count(results.plan.steps * first.training.tokens_per_step),
        missing=results.missing,
        environment=results.plan.environment,
        findings=_findings(results),
        rows=_page_rows(results),
        contexts=[count(context) for context in config.contexts],
        smoothing=plots.smoothing_window(results.plan.steps),
        steps=results.plan.steps,
        budgeted=config.steps is None,
        heldout_tokens=count(len(first.heldout_bits) * config.seq_len),
        windows=len(first.heldout_bits),
        decode_warm_up=DECODE_WARM_UP,
        decode_steps=DECODE_STEPS,
        details=_details(results),
        learning_rates=learning_rates(results),
        one_rate=isinstance(config.lr, float),
        command=command_line(config, results.plan.steps),
    )


def command_line(config: ArenaConfig, steps: int) -> str:
    """The command that trains the same models on the same tokens, however fast the machine."""
    words = ["subquad", "arena", "--steps", str(steps)]
    flags = ("rows", "parameters", "data", "seq_len", "batch_size", "lr", "seed")
    defaults = {field.name: field.default for field in fields(ArenaConfig)}
    for name in flags:
        value = getattr(config, name)
        if value != defaults[name]:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def learning_rates(results: ArenaResults) -> str:
    """Which each row was trained at, and where several were tried, how it did at each."""
    lr = results.config.lr
    if lr is None:
        own = ", ".join(f"{result.name} {result.lr}" for result in results.rows)
        return f"{own}: each row's best of a sweep with a model of 1M parameters on this text"
    if not isinstance(lr, tuple):
        return f"{lr} at its peak, for every row"
    found = []
    for result in results.rows:
        ends = ", ".join(
            f"{a.lr}: {'broke off' if a.bits_per_byte is None else f'{a.bits_per_byte:.3f}'}"
            for a in result.attempts
        )
        found.append(f"{result.name} {result.lr} ({ends})")
    return (
        "each row's best of several, by bits per byte over the last tenth of its training: "
        + "; ".join(found)
    )


def _page_rows(results: ArenaResults) -> list[dict[str, Any]]:
    best = min(results.rows, key=lambda result: result.bits_per_byte)
    look = looks(result.name for result in results.rows)
    return [
        {
            "row": result.name,
            "colour": look[result.name].colour,
            "about": ROWS[result.row],
            "is_best": result is best,
            "bits_per_byte": f"{result.bits_per_byte:.3f}",
            "above_best": "best" if result is best else _above(result, best),
            "train_speed": f"{result.training.tokens_per_second:,.0f}",
            "parameters": f"{result.shape.parameters:,}",
            "layers": result.shape.model["num_hidden_layers"],
            "hidden_size": result.shape.model["hidden_size"],
            "continuation": result.sample,
            "decode": [
                {
                    "context": count(timing.context),
                    "speed": f"{timing.tokens_per_second:,.0f}",
                    "cache": byte_count(timing.cache_bytes),
                }
                for timing in result.decode
            ],
        }
        for result in results.rows
    ]


def _above(result: RowResult, best: RowResult) -> str:
    gap, error = difference(result, best)
    return f"+{gap:.3f} ± {error:.3f}"


def _findings(results: ArenaResults) -> list[str]:
    """Two or three sentences that follow from the numbers alone."""
    rows = sorted(results.rows, key=lambda result: result.bits_per_byte)
    best, others = rows[0], rows[1:]
    text = f"Best held-out quality: {best.name}, {best.bits_per_byte:.3f} bits per byte"
    if others:
        gap, error = difference(others[0], best)
        clear = gap > 2 * error
        text += f"; next {others[0].name}, {gap:.3f} ± {error:.3f} above"
        text += "." if clear else ", too close to call on this text."
    else:
        text += "."
    contexts = results.config.contexts
    if len(contexts) < 2:
        return [text]
    span = f"From {count(contexts[0])} to {count(contexts[-1])} tokens of context"
    flat = [row for row in results.rows if row.decode[0].cache_bytes == row.decode[-1].cache_bytes]
    grown = [row for row in results.rows if row not in flat]
    sentences = [text]
    if flat:
        sentences.append(f"{span} the cache does not grow for {_listed(flat)}.")
    for row in grown:
        growth = _growth(row.decode, "cache_bytes")
        slower = _growth(row.decode, "seconds_per_token")
        sentences.append(
            f"{span} the cache of {row.name} grows {growth:.3g} times"
            f" and its decoding step takes {slower:.2g} times as long."
        )
    return sentences


def _growth(decode: list[DecodeTiming], what: str) -> float:
    return float(getattr(decode[-1], what) / getattr(decode[0], what))


def _listed(rows: list[RowResult]) -> str:
    names = [row.name for row in rows]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _details(results: ArenaResults) -> list[tuple[str, str]]:
    environment, rows = results.plan.environment, results.rows
    return [
        ("Machine", f"{environment['processor']}, {environment['platform']}"),
        (
            "Device",
            f"{environment['device']}, {environment['threads']} threads, "
            f"OMP_WAIT_POLICY {environment['waiting_threads']}",
        ),
        (
            "Versions",
            ", ".join(
                f"{name} {environment[name]}"
                for name in ("subquad", "torch", "transformers", "python")
            ),
        ),
        ("Seed", str(results.config.seed)),
        ("Learning rate", learning_rates(results)),
        (
            "Embedding",
            "; ".join(f"{row.name} {row.shape.embedding_parameters:,}" for row in rows)
            + " of the parameters",
        ),
        ("Models", "; ".join(f"{row.name}: {row.shape.description}" for row in rows)),
        *((f"{row} gave up", reason) for row, reason in results.failures.items()),
    ]
