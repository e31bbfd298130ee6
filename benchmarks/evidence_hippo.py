"""First evidence 5: how well HiPPO-LegS reconstructs a signal, by discretisation; no training.

python benchmarks/evidence.py hippo --size small
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_report import machine_text, save

from subquad import tasks
from subquad.arena.folder import describe_machine
from subquad.files import write_atomically, write_json
from subquad.ssm.hippo import HiPPO

METHODS = ("bilinear", "zoh", "backward_euler", "euler")
# The same at N = 64, T = 1000 and 10 waves by an independent run before this library: mean squared
# error of one signal of unit variance.
REFERENCE = {"bilinear": 0.0017, "zoh": 0.0023, "backward_euler": 0.042, "euler": 0.076}
SIZES = {
    "small": {"orders": (8, 16, 32, 64), "length": 1000, "signals": 16},
    "published": {"orders": (16, 32, 64, 128, 256), "length": 10_000, "signals": 64},
}


def run_hippo(size: str, out: Path, seed: int = 0) -> None:
    """Project band-limited signals, reconstruct all of their past, and write what is lost."""
    if size not in SIZES:
        raise SystemExit(f"hippo has sizes {list(SIZES)}")
    settings = SIZES[size]
    length = settings["length"]
    task = tasks.get("hippo", preset="published", length=length)
    _, signals = task.signals(np.random.default_rng([1, seed, 0]), settings["signals"])
    f = torch.from_numpy(signals)
    errors: dict[str, dict[int, dict[str, float] | None]] = {}
    for method in METHODS:
        errors[method] = {}
        for order in settings["orders"]:
            errors[method][order] = measure(HiPPO("legs", order), f, method)
            print(method, order, errors[method][order], flush=True)
    record = {
        "experiment": "hippo",
        "size": size,
        "seed": seed,
        "task": {"length": length, "band": task.band, "waves": task.waves},
        "signals": settings["signals"],
        "measure": "legs",
        "metric": "NMSE over the whole past, at its end",
        "reference": {"source": "an independent run, N = 64, T = 1000", "mse": REFERENCE},
        "nmse": errors,
        "verdict": verdict(errors, settings["orders"]),
        "environment": describe_machine("cpu"),
    }
    write_json(out / f"hippo-{size}.json", record)
    write_atomically(out / f"hippo-{size}.md", page(record, settings["orders"]))
    plot(record, out / f"hippo-{size}.svg")
    print(page(record, settings["orders"]))


def measure(memory: HiPPO, f: torch.Tensor, method: str) -> dict[str, float] | None:
    """NMSE of the reconstruction: mean, least and largest over signals. None if it diverges."""
    length = f.shape[-1]
    try:
        c = memory.project(f, method, at=[length])[..., 0, :]
    except ValueError:  # refused as unstable
        return None
    g = memory.reconstruct(c, length)
    each = (g - f).square().mean(-1) / f.square().mean(-1)
    return {
        name: float(v) for name, v in zip(("mean", "least", "most"), (each.mean(), *each.aminmax()))
    }


def verdict(errors: dict[str, Any], orders: tuple[int, ...]) -> list[dict[str, Any]]:
    last = orders[-1]
    mean = {m: errors[m][last]["mean"] if errors[m][last] else float("inf") for m in METHODS}
    good, bad = ("bilinear", "zoh"), ("backward_euler", "euler")
    falls = all(
        errors[m][a] and errors[m][b] and errors[m][b]["mean"] < errors[m][a]["mean"]
        for m in good
        for a, b in pairwise(orders)
    )
    return [
        {
            "claim": f"bilinear and exact hold reconstruct with NMSE below 0.01 at N = {last}",
            "holds": all(mean[m] < 0.01 for m in good),
        },
        {
            "claim": "both Euler methods are at least ten times worse",
            "holds": min(mean[m] for m in bad) > 10 * max(mean[m] for m in good),
        },
        {"claim": "with bilinear and exact hold the error falls with every N", "holds": falls},
    ]


def page(record: dict[str, Any], orders: tuple[int, ...]) -> str:
    """The table and the verdict in Markdown."""
    errors, task = record["nmse"], record["task"]
    lines = [
        f"# HiPPO reconstruction, {record['size']} size",
        "",
        "What is lost of a signal's whole past, by discretisation and number of coefficients N?",
        "",
        f"HiPPO-LegS, {record['signals']} signals of {task['length']:,} samples, {task['waves']} "
        f"sines up to {task['band']:g} cycles, seed {record['seed']}; NMSE, mean over signals; "
        f"{machine_text(record['environment'])}. Beside it the mean squared error of "
        f"{record['reference']['source']}.",
        "",
        f"| method | {' | '.join(f'N = {n}' for n in orders)} | reference, N = 64 |",
        f"|---|{'--:|' * (len(orders) + 1)}",
    ]
    for method in METHODS:
        cells = [f"{e['mean']:.2g}" if (e := errors[method][n]) else "unstable" for n in orders]
        lines.append(f"| {method} | {' | '.join(cells)} | {REFERENCE[method]:g} |")
    lines += ["", "Verdict:", ""]
    lines += [
        f"- {v['claim']}: **{'holds' if v['holds'] else 'does not hold'}**"
        for v in record["verdict"]
    ]
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in METHODS:
        points = [(n, e["mean"]) for n, e in record["nmse"][method].items() if e]
        if points:
            axes.plot(*zip(*points), marker="o", label=method)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("coefficients N")
    axes.set_ylabel("NMSE of the whole past")
    axes.set_title(f"HiPPO-LegS, {record['task']['length']:,} samples")
    axes.legend()
    save(figure, file)
