"""First evidence: does what the papers found hold for our rows? One command an experiment.

    python benchmarks/evidence.py parity --size small
    python benchmarks/evidence.py selective_copying --size published --device cuda

Sizes: small (CPU, a few minutes a row), medium (one GPU, minutes a row) and published. Every row,
learning rate and seed is an arena of its own under runs/evidence, so what was stopped goes on, and
`--only ROWS` does a part. docs/results/evidence gets NAME-SIZE.json (configs, seeds, curves, every
value), .svg and .md: the paper's figure beside ours, and a verdict that follows from the numbers.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from experiments import EXPERIMENTS, Experiment, Size, Values, at

from subquad.arena.entrants import Entrant
from subquad.arena.results import write_atomically, write_json
from subquad.arena.task_results import TaskArenaConfig, TaskPlan, TaskRowResult
from subquad.arena.task_run import run_task_arena


def run_experiment(
    name: str, plan: Size, only: list[str], device: str, work: Path
) -> list[tuple[str, float | None, int, TaskRowResult, TaskPlan]]:
    """Run what is not yet there; returns label, rate, seed, result and plan of all that is."""
    experiment, found = EXPERIMENTS[name], []
    for settings in plan.settings:
        width = f" d={settings['hidden_size']}" if len(plan.settings) > 1 else ""
        for row in experiment.rows:
            for lr in plan.lrs:
                for seed in plan.seeds:
                    config = TaskArenaConfig(
                        task=name, rows=(row,), lr=lr, seed=seed, device=device, **settings
                    )
                    place = f"{Entrant.parse(row).folder}{width} lr={lr} seed={seed}"
                    folder = work / place.replace(" ", "_")
                    if only and row not in only and not any(folder.glob("*/result.json")):
                        continue
                    print(f"{name}: {row}{width}, lr {lr or 'default'}, seed {seed}", flush=True)
                    results = run_task_arena(config, folder)
                    if not results.rows:
                        raise KeyboardInterrupt
                    found.append((f"{row}{width}", lr, seed, results.rows[0], results.plan))
    return found


def best_of(found: list[Any]) -> tuple[Values, dict[str, TaskRowResult]]:
    """By label: test values of the best learning rate, medians over seeds; and one of its runs."""
    values: Values = {}
    chosen: dict[str, TaskRowResult] = {}
    for label in dict.fromkeys(entry[0] for entry in found):
        runs: dict[Any, list[TaskRowResult]] = {}
        for _, lr, _, result, _ in [entry for entry in found if entry[0] == label]:
            runs.setdefault(lr, []).append(result)
        best = max(runs.values(), key=lambda rs: median(r.value or 0.0 for r in rs))
        chosen[label] = best[0]
        values[label] = {}
        for tests in zip(*(result.tests for result in best)):
            known = [test.value for test in tests if test.value is not None]
            values[label][tests[0].name] = median(known) if known else None
    return values, chosen


def verdicts(experiment: Experiment, values: Values) -> list[dict[str, Any]]:
    """Each claim with whether our numbers bear it out; None while rows it needs are missing."""
    answers: list[dict[str, Any]] = []
    for text, holds in experiment.claims:
        try:
            answers.append({"claim": text, "holds": holds(values)})
        except KeyError:  # a row that was not run
            answers.append({"claim": text, "holds": None})
    return answers


def write(name: str, size: str, note: str, found: list[Any], out: Path) -> None:
    """NAME-SIZE.json, .md and .svg."""
    experiment = EXPERIMENTS[name]
    values, chosen = best_of(found)
    answers = verdicts(experiment, values)
    missing = sorted(set(experiment.rows) - {label.split(" ")[0] for label in values})
    record = {
        "experiment": name,
        "size": size,
        "question": experiment.question,
        "paper": {"source": experiment.paper, "reported": experiment.reported},
        "environment": found[0][4].environment,
        "recipe": asdict(found[0][4].recipe),
        "note": note,
        "values": values,
        "state_bytes": {label: result.state_bytes for label, result in chosen.items()},
        "verdict": answers,
        "missing": missing,
        "runs": [
            {"label": label, "lr": lr, "seed": seed, "config": asdict(plan.config)}
            | {"result": asdict(result)}
            for label, lr, seed, result, plan in found
        ],
    }
    write_json(out / f"{name}-{size}.json", record)
    write_atomically(out / f"{name}-{size}.md", page(record))
    plot(experiment, values, chosen, out / f"{name}-{size}.svg", f"{name}, {size}")
    print(page(record))


def page(record: dict[str, Any]) -> str:
    """The table and the verdict in Markdown."""
    values: Values = record["values"]
    tests = list(next(iter(values.values())))
    shown = tests if len(tests) <= 6 else [tests[round(i * (len(tests) - 1) / 5)] for i in range(6)]
    reported = record["paper"]["reported"]
    recipe, environment = record["recipe"], record["environment"]
    lines = [
        f"# {record['experiment']}, {record['size']} size",
        "",
        record["question"],
        "",
        f"Paper: {record['paper']['source']}. Ours: up to {recipe['steps']:,} steps of "
        f"{recipe['batch_size']}, {recipe['layers']} layers, seeds "
        f"{sorted({run['seed'] for run in record['runs']})}, {environment['device']} "
        f"({environment['processor']}, {environment['threads']} threads), {environment['date']}. "
        f"{record['note']}".strip(),
        "",
        f"| row | {' | '.join(shown)} | steps | parameters | state, bytes | paper |",
        f"|---|{'--:|' * (len(shown) + 3)}---|",
    ]
    first = {run["label"]: run["result"] for run in reversed(record["runs"])}
    for label, row in values.items():
        cells = ["not run" if row[t] is None else f"{row[t]:.3f}" for t in shown]
        sizes = (first[label]["steps"], first[label]["shape"]["parameters"])
        cells += [f"{n:,}" for n in (*sizes, record["state_bytes"][label])]
        lines.append(f"| `{label}` | {' | '.join(cells)} | {reported.get(label.split()[0], '')} |")
    lines += ["", "Verdict:", ""]
    said = {True: "holds", False: "does not hold", None: "not judged: rows are missing"}
    lines += [f"- {answer['claim']}: **{said[answer['holds']]}**" for answer in record["verdict"]]
    if record["missing"]:
        lines += ["", f"Not run: {', '.join(record['missing'])}."]
    return "\n".join(lines) + "\n"


def plot(
    experiment: Experiment,
    values: Values,
    chosen: dict[str, TaskRowResult],
    file: Path,
    title: str,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float]]] = {}
    for label, tests in values.items():
        if experiment.against == "state_bytes":
            point = (chosen[label].state_bytes, at(values, label, 0))
            lines.setdefault(label.split(" ")[0], []).append(point)
        else:
            known = zip(chosen[label].tests, tests.values())
            lines[label] = sorted((t.positions, value) for t, value in known if value is not None)
    for label, points in lines.items():
        axes.plot(*zip(*points), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(experiment.against.replace("_", " "))
    axes.set_ylabel(experiment.quantity)
    axes.set_title(title)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "hippo"])
    parser.add_argument("--size", default="small", choices=["small", "medium", "published"])
    parser.add_argument("--only", default="", help="run these rows only; report what is there")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, help="instead of the recipe's; goes into the names")
    parser.add_argument("--seeds", help="with commas between")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/evidence"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.experiment == "hippo":
        from evidence_hippo import run_hippo

        run_hippo(args.size, args.out)
        return
    only = [row.strip() for row in args.only.split(",") if row.strip()]
    experiment, size = EXPERIMENTS[args.experiment], args.size
    if size not in experiment.sizes:
        parser.error(f"{args.experiment} has sizes {list(experiment.sizes)}")
    plan = experiment.sizes[size]
    if args.steps:
        plan = replace(plan, settings=tuple(s | {"steps": args.steps} for s in plan.settings))
        plan = replace(plan, note=f"{plan.note} {args.steps:,} steps only.".strip())
        size = f"{size}-{args.steps}-steps"
    if args.seeds:
        plan = replace(plan, seeds=tuple(int(seed) for seed in args.seeds.split(",")))
    folder = args.work / f"{args.experiment}-{size}"
    found = run_experiment(args.experiment, plan, only, args.device, folder)
    if not found:
        parser.error(f"--only: got {args.only}; expected some of {', '.join(experiment.rows)}")
    write(args.experiment, size, plan.note, found, args.out)


if __name__ == "__main__":
    main()
