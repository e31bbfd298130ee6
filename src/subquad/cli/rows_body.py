"""`subquad table` and `subquad explain`: what the rows are, and what one runs on this machine."""

from __future__ import annotations

import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from subquad.cli import parse
from subquad.cli.compiling import note_compiling
from subquad.cli.terminal import say, screen
from subquad.engines import Explanation, watch
from subquad.errors import fail
from subquad.mixers import MIXERS, State
from subquad.models.device import pick_device
from subquad.table import ROWS, Row

_WIDE = 170  # from here on the table has a column for each fact


def table() -> list[dict[str, object]]:
    """Every row of the table with its formulas, costs, paper, and whether it runs yet."""
    return [row.as_dict(runs=name in MIXERS) for name, row in ROWS.items()]


def table_command(as_json: bool) -> None:
    """Print the table, for people or for programs."""
    if as_json:
        print(json.dumps(table(), indent=2, ensure_ascii=False))
        return
    console = screen()
    console.print(_wide_table() if console.width >= _WIDE else _narrow_table())
    running = sum(name in MIXERS for name in ROWS)
    say(console, f"\n{running} of {len(ROWS)} rows run. More of a row: subquad explain ROW")


def _wide_table() -> Table:
    page = _page("row", "runs", "recurrence", "state", "decode", "read", "train", "paper")
    for name, row in ROWS.items():
        facts = (row.write, row.state, row.decode, row.read, row.train, _authors(row))
        page.add_row(name, "yes" if name in MIXERS else "", *map(Text, facts))
    return page


def _narrow_table() -> Table:
    """The facts of a row below one another."""
    page = _page("row", "runs", "what it keeps; its state; costs; paper")
    for name, row in ROWS.items():
        costs = f"state {row.state}\ntrain {row.train}, decode {row.decode}\n{row.paper}"
        facts = Text.assemble(row.write, "\n", (costs, "dim"))
        page.add_row(name, "yes" if name in MIXERS else "", facts)
    return page


def _page(*columns: str) -> Table:
    page = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        page.add_column(column, no_wrap=number < 2, overflow="fold")
    return page


def _authors(row: Row) -> str:
    return row.paper.rsplit(", ", 1)[0]


def explain_command(
    name: str, hidden_size: int, tokens: int, batch: int, device: str, as_json: bool
) -> None:
    """Print a row's facts and, if it runs, what one layer of it runs here and how fast."""
    name = parse.row("row", name)
    for argument, value in (("hidden_size", hidden_size), ("tokens", tokens), ("batch", batch)):
        if value < 1:
            raise fail(argument, value, "a positive number", f"give {argument} >= 1")
    device = str(pick_device(device))
    facts = ROWS[name].as_dict(runs=name in MIXERS)
    with note_compiling():
        runs = _try(name, hidden_size, tokens, batch, device) if name in MIXERS else []
    if as_json:
        print(json.dumps(facts | {"here": runs}, indent=2, ensure_ascii=False))
        return
    console = screen()
    _print_facts(ROWS[name], console)
    if not runs:
        say(console, f"\n{name} is in the table but does not run yet.")
    for run in runs:
        _print_run(run, console)


def _try(
    name: str, hidden_size: int, tokens: int, batch: int, device: str
) -> list[dict[str, object]]:
    """Run one layer with random weights: all tokens at once, then one more."""
    torch.manual_seed(0)
    layer = MIXERS[name](hidden_size).to(device).eval()
    x = torch.randn(batch, tokens, hidden_size, device=device)
    one = torch.randn(batch, 1, hidden_size, device=device)
    state: State | None = None
    runs: list[dict[str, object]] = []
    with torch.inference_mode():
        for what, inputs in ((f"{batch} x {tokens} tokens", x), ("one more token", one)):
            with watch() as calls:
                _, after = layer(inputs, state)
            runs.append(
                {
                    "what": what,
                    "milliseconds": _median_ms(layer, inputs, state),
                    "state_bytes": sum(t.nbytes for t in after.values()),
                    "engine": [_call_dict(call) for call in calls],
                    "device": device,
                }
            )
            state = after
    return runs


def _median_ms(layer: torch.nn.Module, x: Tensor, state: State | None, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        layer(x, state)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _call_dict(call: Explanation) -> dict[str, object]:
    return {"form": call.form, "impl": call.impl, "chunk": call.chunk, "why": call.why}


def _print_facts(row: Row, console: Console) -> None:
    facts = {
        "row": row.name,
        "paper": row.paper,
        "recurrence": row.write,
        "read": row.read,
        "features": row.features,
        "engine": f"{row.engine}; forms {', '.join(row.recurrence.forms)}"
        + ("; time-invariant" if row.recurrence.time_invariant else ""),
        "state": f"{row.state} numbers a sequence and layer",
        "train": row.train,
        "decode": f"{row.decode} a token",
    }
    page = Table.grid(padding=(0, 1))
    for name, fact in facts.items():
        if fact:
            page.add_row(name, Text(fact))
    console.print(page)


def _print_run(run: dict[str, object], console: Console) -> None:
    what, device = run["what"], run["device"]
    say(console, f"\n{what} through one layer on {device}: {run['milliseconds']:.2f} ms")
    calls = run["engine"]
    assert isinstance(calls, list)
    page = Table.grid(padding=(0, 1))
    for call in calls:
        chunk = f", chunks of {call['chunk']}" if call["chunk"] else ""
        page.add_row(" ", Text(f"{call['form']} form{chunk}, impl {call['impl']}: {call['why']}"))
    page.add_row(" ", Text(f"state afterwards: {run['state_bytes']:,} bytes"))
    console.print(page)
