"""An experiment's results as JSON, a plot and a page: the paper's figure beside ours, a verdict."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from evidence_jobs import Job, Part
from experiments import EXPERIMENTS, Experiment, Values, at

from subquad.arena.task.results import TaskArenaResults, TaskPlan, TaskRowResult
from subquad.files import write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVE = 100  # points of a learning curve that are kept


class Run(NamedTuple):
    """A job and what came of it."""

    job: Job
    results: TaskArenaResults

    @property
    def row(self) -> TaskRowResult:
        return self.results.rows[0]

    @property
    def plan(self) -> TaskPlan:
        return self.results.plan


def counts(run: Run, least_part: float) -> bool:
    """Whether it was trained for long enough to say something about the row."""
    return not run.row.cut or run.row.steps >= least_part * run.plan.recipe.steps


def best_of(found: Sequence[Run]) -> tuple[Values, dict[str, list[Run]]]:
    """By label: test values of the best learning rate, medians over its seeds; and its runs.

    The best is the one with the greatest median as trained; of rates equal to two decimals, the one
    with the greatest mean of the other tests. Rates of which fewer seeds count than of others are
    left out: the best of one seed is easily above the median of two. Likewise a rate at which some
    seed diverged, unless there is none at which none did.
    """
    values: Values = {}
    chosen: dict[str, list[Run]] = {}
    for label in dict.fromkeys(run.job.label for run in found):
        rates: dict[float | None, list[Run]] = {}
        for run in found:
            if run.job.label == label:
                rates.setdefault(run.job.lr, []).append(run)
        most = max(map(len, rates.values()))
        tests = {lr: _medians(runs) for lr, runs in rates.items() if len(runs) == most}
        best = max(tests, key=lambda lr: (-_diverged(rates[lr]), *_merit(tests[lr])))
        values[label], chosen[label] = tests[best], rates[best]
    return values, chosen


def _diverged(runs: Sequence[Run]) -> int:
    return sum(bool(run.row.failure) for run in runs)


def _medians(runs: Sequence[Run]) -> dict[str, float | None]:
    medians: dict[str, float | None] = {}
    for tests in zip(*(run.row.tests for run in runs)):
        known = [test.value for test in tests if test.value is not None]
        medians[tests[0].name] = median(known) if known else None
    return medians


def _merit(tests: dict[str, float | None]) -> tuple[float, float]:
    known = [value for value in tests.values() if value is not None]
    return (round(known[0], 2), fmean(known)) if known else (-1.0, -1.0)


def verdicts(
    experiment: Experiment, values: Values, missing: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Each claim with whether our numbers bear it out; None while rows it needs are missing.

    Of a row with a width missing none counts: its least would not be the least that was asked.
    """
    partly = {label.split(" ")[0] for label in missing}
    known = {label: tests for label, tests in values.items() if label.split(" ")[0] not in partly}
    answers: list[dict[str, Any]] = []
    for text, holds in experiment.claims:
        try:
            answers.append({"claim": text, "holds": holds(known)})
        except KeyError:  # a row that was not run
            answers.append({"claim": text, "holds": None})
    return answers


def write(part: Part, found: Sequence[Run], out: Path) -> None:
    """NAME-SIZE.json, .md and .svg in `out`."""
    experiment = EXPERIMENTS[part.name]
    places = list(experiment.rows)
    found = sorted(found, key=lambda run: (places.index(run.job.row), run.row.shape.parameters))
    counted = [run for run in found if counts(run, part.plan.least_part)]
    values, chosen = best_of(counted)
    labels = dict.fromkeys(job.label for job in part.jobs())
    missing = [label for label in labels if label not in values]
    record = {
        "experiment": part.name,
        "size": part.label.removeprefix(f"{part.name}-"),
        "question": experiment.question,
        "paper": {
            "source": experiment.paper,
            "reported": experiment.reported,
            "seen": experiment.seen,
        },
        "environment": found[0].plan.environment,
        "recipe": asdict(found[0].plan.recipe),
        "note": part.plan.note,
        "values": values,
        "chosen": {label: _chosen(runs) for label, runs in chosen.items()},
        "verdict": verdicts(experiment, values, missing),
        "missing": missing,
        "cut_too_early": [
            {"label": run.job.label, "lr": run.job.lr, "seed": run.job.seed, "steps": run.row.steps}
            for run in found
            if run not in counted
        ],
        "runs": [_run(run) for run in found],
    }
    write_json(out / f"{part.label}.json", record)
    write_atomically(out / f"{part.label}.md", page(record))
    plot(experiment, values, chosen, out / f"{part.label}.svg", f"{part.name}, {record['size']}")
    print(page(record))


def _chosen(runs: Sequence[Run]) -> dict[str, Any]:
    first = runs[0].row
    return {
        "lr": runs[0].plan.recipe.lr,
        "steps": [run.row.steps for run in runs],
        "values": [run.row.tests[0].value for run in runs],
        "cut": any(run.row.cut for run in runs),
        "diverged": _diverged(runs),
        "parameters": first.shape.parameters,
        "state_bytes": first.state_bytes,
    }


def _run(run: Run) -> dict[str, Any]:
    """All of a run, its curves thinned."""
    result = asdict(run.row)
    for name in ("loss_steps", "losses"):
        kept = result[name][:: -(-len(result[name]) // _CURVE) or 1]
        result[name] = [float(f"{value:.4g}") if name == "losses" else value for value in kept]
    asked = {"label": run.job.label, "lr": run.job.lr, "seed": run.job.seed}
    config, machine = asdict(run.plan.config), run.plan.environment
    return asked | {"config": config, "environment": machine, "result": result}


def page(record: dict[str, Any]) -> str:
    """The table and the verdict in Markdown."""
    values: Values = record["values"]
    tests = list(next(iter(values.values())))
    reported = record["paper"]["reported"]
    seeds = len({run["seed"] for run in record["runs"]})
    lines = [
        f"# {record['experiment']}, {record['size']} size",
        "",
        record["question"],
        "",
        f"Paper: {record['paper']['source']}; {record['paper']['seen']}.",
        "",
        f"Ours: {_conditions(record)} {record['note']}".strip(),
        "",
        f"| row | {' | '.join(tests)} | lr | steps | parameters | state, bytes | paper |",
        f"|---|{'--:|' * (len(tests) + 4)}---|",
    ]
    for label, row in values.items():
        best = record["chosen"][label]
        cells = ["not run" if row[test] is None else f"{row[test]:.3f}" for test in tests]
        steps = f"{min(best['steps']):,}" + (", cut" if best["cut"] else "")
        if len(best["steps"]) < seeds:
            steps += f", {len(best['steps'])} of {seeds} seeds"
        if best["diverged"]:
            steps += f", {best['diverged']} diverged"
        cells += [f"{best['lr']:g}", steps, f"{best['parameters']:,}", f"{best['state_bytes']:,}"]
        lines.append(f"| `{label}` | {' | '.join(cells)} | {reported.get(label.split()[0], '')} |")
    lines += _by_seed(record)
    lines += ["", "Verdict:", ""]
    said = {True: "holds", False: "does not hold", None: "not judged: rows are missing"}
    lines += [f"- {answer['claim']}: **{said[answer['holds']]}**" for answer in record["verdict"]]
    if record["missing"]:
        lines += ["", f"Not run, or cut off too early to count: {', '.join(record['missing'])}."]
    return "\n".join(lines) + "\n"


def _by_seed(record: dict[str, Any]) -> list[str]:
    """What the medians hide: a row that one seed solves and another does not."""
    said = []
    for label, best in record["chosen"].items():
        first = best["values"]
        if len(first) > 1:
            shown = ", ".join("diverged" if value is None else f"{value:.3f}" for value in first)
            said.append(f"`{label}` {shown}")
    return ["", f"As trained, seed by seed: {'; '.join(said)}."] if said else []


def _conditions(record: dict[str, Any]) -> str:
    """How it was run, in sentences."""
    recipe, runs = record["recipe"], record["runs"]
    machines = dict.fromkeys(machine_text(run["environment"]) for run in runs)
    dates = sorted(run["environment"]["date"] for run in runs)
    dates = list(dict.fromkeys((dates[0], dates[-1])))
    rates = sorted({run["lr"] or recipe["lr"] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    several = len(seeds) > 1
    sentences = [
        f"up to {recipe['steps']:,} steps of {recipe['batch_size']}, {recipe['layers']} layers, "
        f"learning rate{'s' if len(rates) > 1 else ''} {', '.join(f'{lr:g}' for lr in rates)}"
        f"{' (the best as trained counts)' if len(rates) > 1 else ''}, "
        f"seed{'s' if several else ''} {', '.join(map(str, seeds))}"
        f"{' (medians)' if several else ''}; {' and '.join(machines)}; {' to '.join(dates)}."
    ]
    if any(best["cut"] for best in record["chosen"].values()):
        rate = "was constant" if recipe["final_lr"] == 1 else "had fallen with it"
        sentences.append(f"Rows marked cut were ended by the clock; the learning rate {rate}.")
    return " ".join(sentences)


def machine_text(environment: dict[str, Any]) -> str:
    threads = environment["threads"]
    return (
        f"{environment['device']} ({environment['processor']}, {threads} thread"
        f"{'' if threads == 1 else 's'}, torch {environment['torch']})"
    )


def plot(
    experiment: Experiment,
    values: Values,
    chosen: dict[str, list[Run]],
    file: Path,
    title: str,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    against, lines = _lines(experiment, values, chosen)
    for index, (label, points) in enumerate(lines.items()):
        style = "-" if index < 10 else "--"  # there are ten colours
        axes.plot(*zip(*points), marker="o", markersize=4, linestyle=style, label=label)
    if against != "steps":
        axes.set_xscale("log", base=2)
    if against == "positions":
        tested = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(tested, [f"{x:,}" for x in tested], rotation=30 if len(tested) > 9 else 0)
        axes.minorticks_off()
    axes.set_xlabel(against)
    axes.set_ylabel(experiment.quantity)
    axes.set_title(title)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, file)


def save(figure: "Figure", file: Path) -> None:
    """As SVG, the same bytes for the same numbers: no date, and no random ids."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": file.stem}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})


Points = list[tuple[float, float]]


def _lines(
    experiment: Experiment, values: Values, chosen: dict[str, list[Run]]
) -> tuple[str, dict[str, Points]]:
    """What is on the x axis, and the points of each line: values against bytes of state, against
    the length of the test, or, where there is one length, against steps of training."""
    lines: dict[str, Points] = {}
    if experiment.against == "state_bytes":
        for label, runs in chosen.items():
            point = (runs[0].row.state_bytes, at(values, label, 0))
            lines.setdefault(label.split(" ")[0], []).append(point)
        return "bytes of state", lines
    if all(len(tests) == 1 for tests in values.values()):
        rows = {label: runs[0].row for label, runs in chosen.items()}
        return "steps", {n: list(zip(row.value_steps, row.values)) for n, row in rows.items()}
    for label, tests in values.items():
        known = zip(chosen[label][0].row.tests, tests.values())
        lines[label] = sorted((t.positions, value) for t, value in known if value is not None)
    return "positions", lines
