"""First evidence: does what the papers found hold for our rows? One command an experiment.

    python benchmarks/evidence.py parity --size small
    python benchmarks/evidence.py selective_copying:long induction_heads:medium parity:medium@cpu \\
        --gpus 0,1,2,3 --jobs 40 --cpu-jobs 24 --deadline 540

Sizes: small and short (CPU, a few minutes a row), medium, long and large-batches (GPUs, minutes a
row) and published; see experiments.py. Every row, learning rate and seed is an arena of its own
under runs/evidence, so what was stopped goes on, and `--only "gla,mamba d=32"` does a part.
docs/results/evidence gets NAME-SIZE.json (configs, seeds, curves, every value), .svg and .md: the
paper's figure beside ours, and a verdict that follows from the numbers. With `--jobs` many run side
by side, up to a deadline at which they save what they have.
"""

import argparse
import time
from pathlib import Path

from evidence_jobs import Job, Part, run_side_by_side
from evidence_report import Run, write


def chosen(jobs: list[Job], only: str) -> list[Job]:
    """The jobs of these rows, or of a row at one width (`mamba d=32`); all where none is named."""
    names = {name.strip() for name in only.split(",") if name.strip()}
    known = dict.fromkeys(name for job in jobs for name in (job.row, job.label))
    if not names <= set(known):
        raise SystemExit(f"--only: got {only!r}; expected some of {', '.join(known)}")
    return [job for job in jobs if not names or names & {job.row, job.label}]


def run_in_turn(jobs: list[Job], asked: list[Job], work: Path) -> list[Run]:
    """Run what is asked and not yet there; returns all that is there."""
    found = []
    for job in jobs:
        if job not in asked and not job.is_done(work):
            continue
        if not job.is_done(work):
            print(f"{job.part.label}: {job.place}", flush=True)
        found.append(Run(job, job.run(work)))
    return found


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    hippo = [text for text in args.experiments if text.partition(":")[0] == "hippo"]
    for text in hippo:
        from evidence_hippo import run_hippo

        run_hippo(text.partition(":")[2] or args.size, args.out)
    rest = {"steps": args.steps, "lrs": args.lrs or None, "seeds": args.seeds or None}
    trained = [text for text in args.experiments if text not in hippo]
    try:
        parts = [Part.parse(text, args.size, args.device, **rest) for text in trained]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    jobs = [job for part in parts for job in part.jobs()]
    asked = chosen(jobs, args.only)
    if args.place:
        (job,) = (job for job in jobs if job.place == args.place)
        job.run(args.work, args.until and args.until - time.time())
        return
    if args.jobs or args.cpu_jobs:
        gpus = args.gpus.split(",")
        slots = [gpus[i % len(gpus)] for i in range(args.jobs)] + ["cpu"] * args.cpu_jobs
        asked = [job for job in asked if not job.is_done(args.work)]
        left = run_side_by_side(asked, args.work, slots, args.deadline, args.reserve)
        print(f"{len(left)} of {len(asked)} are not finished: {[job.place for job in left]}")
        return
    for part in parts:
        mine = [job for job in jobs if job.part == part]
        if args.report:
            found = [Run(job, job.run(args.work)) for job in mine if job.is_done(args.work)]
        else:
            found = run_in_turn(mine, asked, args.work)
        if not found:
            raise SystemExit(f"{part.label}: nothing is there to report under {args.work}")
        write(part, found, args.out)


def rates(text: str) -> tuple[float, ...]:
    """`0.001,0.003`. ValueError, which argparse tells by this name: no numbers."""
    return tuple(float(lr) for lr in text.split(","))


def seeds(text: str) -> tuple[int, ...]:
    """`0,1`. ValueError likewise."""
    return tuple(int(seed) for seed in text.split(","))


def steps(text: str) -> int:
    """`3000`. ValueError likewise, and for none: an argument of 0 would be as good as left out."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+", help="NAME, NAME:SIZE or NAME:SIZE@DEVICE")
    parser.add_argument("--size", default="small", help="where a name has none of its own")
    parser.add_argument("--device", default="auto", help="likewise")
    parser.add_argument(
        "--only", default="", help="run these rows, or rows at a width (mamba d=32), only"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--steps", type=steps, help="instead of the recipe's; goes into the names")
    parser.add_argument("--lrs", default=(), type=rates, help="likewise, with commas between")
    parser.add_argument("--seeds", default=(), type=seeds, help="with commas between")
    parser.add_argument("--jobs", type=int, default=0, help="processes that share the GPUs")
    parser.add_argument("--gpus", default="0", help="their numbers, with commas between")
    parser.add_argument("--cpu-jobs", type=int, default=0, help="processes for NAME:SIZE@cpu")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds for all jobs")
    parser.add_argument("--reserve", type=float, default=60.0, help="of these for the last tests")
    parser.add_argument("--place", help=argparse.SUPPRESS)  # the one job of a process
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/evidence"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
