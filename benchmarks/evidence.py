"""First evidence: does what the papers found hold for our rows? One command an experiment.

    python benchmarks/evidence.py parity --size small
    python benchmarks/evidence.py selective_copying --size published --device cuda

Sizes: small (CPU, a few minutes a row), medium (one GPU, minutes a row) and published. Every row,
learning rate and seed is an arena of its own under runs/evidence, so what was stopped goes on, and
`--only ROWS` does a part. docs/results/evidence gets NAME-SIZE.json (configs, seeds, curves, every
value), .svg and .md: the paper's figure beside ours, and a verdict that follows from the numbers.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from subquad.arena.entrants import Entrant
from subquad.arena.results import write_atomically, write_json
from subquad.arena.task_results import TaskArenaConfig, TaskPlan, TaskRowResult
from subquad.arena.task_run import run_task_arena

NEGATIVE = "allow_negative_eigenvalues"
LINEAR = ("linear_attention", "retnet", "gla", "mamba", "mamba2", "deltanet", "gated_deltanet")
EVERY = ("softmax_attention", "sliding_window_attention", *LINEAR, "s4d")
# Who stops when it is solved as trained has not yet learnt to do it at other lengths.
TO_THE_END = {"until_solved": False}
Values = dict[str, dict[str, float | None]]  # by label and test: the median over seeds


@dataclass(frozen=True)
class Size:
    """Configs to run (each for every row), learning rates of which the best counts, and seeds."""

    settings: tuple[dict[str, Any], ...]
    lrs: tuple[float | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    note: str = ""  # in what it differs from the paper


@dataclass(frozen=True)
class Experiment:
    """A question, what the paper found, and claims that our numbers bear out or not."""

    question: str
    paper: str
    reported: dict[str, str]  # by row: the paper's figure
    rows: tuple[str, ...]
    sizes: dict[str, Size]
    claims: tuple[tuple[str, Callable[[Values], bool]], ...]
    against: str = "positions"  # what the plot has on its x axis
    quantity: str = "accuracy"


def at(values: Values, label: str, place: int) -> float:
    """The value of a row on its first (0) or last (-1) test; 0 where it was not run."""
    tests = [value for value in values[label].values() if value is not None]
    return tests[place] if tests else 0.0


def fails(values: Values, labels: tuple[str, ...], place: int, below: float = 0.99) -> bool:
    return all(at(values, label, place) < below for label in labels)


def widths(values: Values, row: str) -> list[float]:
    """First-test values of one row, in the order of its widths."""
    labels = [label for label in values if label.split(" ")[0] == row]
    if not labels:
        raise KeyError(row)
    return [at(values, label, 0) for label in labels]


EXPERIMENTS = {
    "selective_copying": Experiment(
        question="Who can keep some tokens and let the noise between them pass?",
        paper="Gu and Dao 2023, arXiv:2312.00752, table 1 (L = 4096; 2 layers, d = 64)",
        reported={"mamba": "99.8 (S6 in Mamba)", "s4d": "56.4 (S4 in Mamba), 18.3 (S4 alone)"},
        rows=EVERY,
        sizes={
            "small": Size(
                ({"preset": "small"},),
                note="64 of noise and 8 symbols of 8, not 4096 and 16 of 14.",
            ),
            "medium": Size(
                ({"preset": "medium", "hidden_size": 64},), note="256 of noise, not 4096."
            ),
            "published": Size(({"preset": "published", "hidden_size": 64},)),
        },
        claims=(
            ("mamba solves it", lambda v: at(v, "mamba", 0) >= 0.99),
            ("s4d, being time-invariant, does not", lambda v: at(v, "s4d", 0) < 0.99),
        ),
    ),
    "induction_heads": Experiment(
        question="Trained at one length: up to which length is the induction head right?",
        paper="Gu and Dao 2023, arXiv:2312.00752, table 2 (trained at 256, 2 layers, d = 64)",
        reported={"mamba": "100 up to 2^20", "softmax_attention": "falls beyond twice 256"},
        rows=EVERY,
        sizes={
            "small": Size(
                ({"preset": "small", **TO_THE_END},), note="Trained at 64 and tested to 4096."
            ),
            "published": Size(
                ({"preset": "published", "hidden_size": 64, **TO_THE_END},), lrs=(1e-3, 2e-4)
            ),
        },
        claims=(
            ("mamba solves it as trained", lambda v: at(v, "mamba", 0) >= 0.99),
            ("mamba still solves it at the longest test", lambda v: at(v, "mamba", -1) >= 0.99),
            (
                "softmax_attention solves it as trained and not at the longest test it was given",
                lambda v: (
                    at(v, "softmax_attention", 0) >= 0.99 and at(v, "softmax_attention", -1) < 0.9
                ),
            ),
        ),
    ),
    "mqar": Experiment(
        question="How much is recalled with a state of how many bytes?",
        paper="Arora et al. 2023, arXiv:2312.04927, figure 2; Dao and Gu 2024, figure 8",
        reported={"softmax_attention": "solves every size", "mamba2": "the better the larger N"},
        rows=EVERY,
        sizes={
            "small": Size(
                tuple({"preset": "small", "hidden_size": d, "steps": 1500} for d in (16, 32, 64))
            ),
            "medium": Size(
                tuple(
                    {"preset": "medium", "hidden_size": d, "steps": 20_000} for d in (32, 64, 128)
                ),
                lrs=(3e-3, 1e-3),
            ),
            "published": Size(
                tuple({"preset": "published", "hidden_size": d} for d in (64, 128, 256, 512)),
                lrs=(1e-4, 4.6e-4, 2.2e-3, 1e-2),
            ),
        },
        claims=(
            (
                "softmax_attention solves it at its greatest width",
                lambda v: widths(v, "softmax_attention")[-1] >= 0.99,
            ),
            (
                "every row with a fixed state recalls more at its greatest width than at its least",
                lambda v: all(widths(v, row)[-1] > widths(v, row)[0] for row in LINEAR),
            ),
        ),
        against="state_bytes",
    ),
    "parity": Experiment(
        question="Do negative eigenvalues make the difference?",
        paper="Grazzi et al. 2024, arXiv:2411.12537, section 5.1 (trained to 40, tested to 256)",
        reported={
            f"deltanet:{NEGATIVE}": "solved",
            "deltanet": "near guessing",
            "mamba": "near guessing",
            "softmax_attention": "near guessing",
        },
        rows=(f"deltanet:{NEGATIVE}", f"gated_deltanet:{NEGATIVE}", *EVERY),
        sizes={
            "small": Size(
                ({"preset": "small", "steps": 1000, **TO_THE_END},),
                note="Asked at every bit; the figures are means over all bits, of which the early "
                "ones are easy. The paper asks at the last.",
            ),
            "medium": Size(
                ({"preset": "small", "steps": 10_000, **TO_THE_END},),
                (3e-3, 1e-3),
                (0, 1, 2),
                note="Asked at every bit; the paper asks at the last.",
            ),
            "published": Size(
                ({"preset": "published", "hidden_size": 128, **TO_THE_END},),
                (1e-3, 5e-4),
                (0, 1, 2),
            ),
        },
        claims=(
            (
                "deltanet with negative eigenvalues solves it at the longest test",
                lambda v: at(v, f"deltanet:{NEGATIVE}", -1) >= 0.99,
            ),
            (
                "no row without them does",
                lambda v: fails(v, EVERY, -1),
            ),
        ),
        quantity="scaled accuracy",
    ),
}


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
