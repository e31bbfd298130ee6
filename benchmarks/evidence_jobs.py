"""One row, learning rate and seed is a job, an arena of its own; many run side by side.

A small model keeps neither a core nor a GPU busy: processes share each GPU. What is finished stays
in its folder, so that the same command goes on with what is missing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from experiments import EXPERIMENTS, Size

from subquad.arena.entrants import Entrant
from subquad.arena.task.results import TaskArenaConfig, TaskArenaResults
from subquad.arena.task.run import run_task_arena

_LEAST = 20.0  # seconds of training below which a job is not begun


@dataclass(frozen=True)
class Part:
    """What is asked for: an experiment at a size, perhaps with other steps, rates and seeds."""

    name: str
    size: str
    steps: int | None = None
    lrs: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None
    device: str = "auto"

    @classmethod
    def parse(cls, text: str, size: str, device: str, **rest: Any) -> "Part":
        """`NAME`, `NAME:SIZE` or `NAME:SIZE@DEVICE`. ValueError: no such experiment or size."""
        text, _, own_device = text.partition("@")
        name, _, own_size = text.partition(":")
        part = cls(name, own_size or size, device=own_device or device, **rest)
        if name not in EXPERIMENTS:
            raise ValueError(f"got {name!r}; expected one of {', '.join(EXPERIMENTS)} or hippo")
        if part.size not in EXPERIMENTS[name].sizes:
            raise ValueError(f"{name} has sizes {list(EXPERIMENTS[name].sizes)}, not {part.size!r}")
        return part

    @property
    def label(self) -> str:
        """`parity-small`, as files are called."""
        steps = f"-{self.steps}-steps" if self.steps else ""
        return f"{self.name}-{self.size}{steps}"

    @property
    def plan(self) -> Size:
        plan = EXPERIMENTS[self.name].sizes[self.size]
        if self.steps:
            settings = tuple(s | {"steps": self.steps} for s in plan.settings)
            plan = replace(plan, settings=settings)
        return replace(plan, lrs=self.lrs or plan.lrs, seeds=self.seeds or plan.seeds)

    def jobs(self) -> Iterator["Job"]:
        """Every row at every width, learning rate and seed.

        All rows at one learning rate before the next: where time runs out, rows were tried alike.
        """
        plan, rows = self.plan, EXPERIMENTS[self.name].rows
        for lr, seed, settings, row in product(plan.lrs, plan.seeds, plan.settings, rows):
            width = f" d={settings['hidden_size']}" if len(plan.settings) > 1 else ""
            yield Job(self, settings, row, f"{row}{width}", width, lr, seed)


@dataclass(frozen=True)
class Job:
    """A row of a part. `place` is its folder below that of the part."""

    part: Part
    settings: dict[str, Any]
    row: str
    label: str
    width: str
    lr: float | None
    seed: int

    @property
    def place(self) -> str:
        place = f"{Entrant.parse(self.row).folder}{self.width} lr={self.lr} seed={self.seed}"
        return place.replace(" ", "_")

    def folder(self, work: Path) -> Path:
        return work / self.part.label / self.place

    def is_done(self, work: Path) -> bool:
        return any(self.folder(work).glob("*/result.json"))

    def run(self, work: Path, seconds: float | None = None) -> TaskArenaResults:
        """Run it, or read what is there. KeyboardInterrupt where it was stopped."""
        config = TaskArenaConfig(
            task=self.part.name,
            rows=(self.row,),
            lr=self.lr,
            seed=self.seed,
            device=self.part.device,
            **{"seconds": seconds} | self.settings,
        )
        folder = self.folder(work)
        if self.is_done(work):  # perhaps elsewhere, and by another clock
            config = replace(config, seconds=_planned_seconds(folder))
        else:  # what was begun on another machine or by another clock begins again
            (folder / "plan.json").unlink(missing_ok=True)
        results = run_task_arena(config, folder)
        if not results.rows:
            raise KeyboardInterrupt
        return results


def _planned_seconds(folder: Path) -> float | None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    seconds: float | None = plan["config"].get("seconds")
    return seconds


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    slot: str
    job: Job


def run_side_by_side(
    jobs: list[Job], work: Path, slots: list[str], seconds: float, reserve: float
) -> list[Job]:
    """Run jobs in processes, in their order, each as soon as a slot of its device is free.

    Args:
        jobs: those of device "cpu" go to slots "cpu", all others to the other slots.
        slots: "cpu", or the number of a GPU; each runs one job at a time.
        seconds: of wall clock for everything.
        reserve: of these for tests in the end; training is cut off before.

    Returns:
        The jobs that are not finished.
    """
    began = time.time()
    waiting, free, running = list(jobs), list(slots), list[_Running]()
    until = began + seconds - reserve
    while (waiting or running) and time.time() < began + seconds:
        for slot in list(free):
            fits = (job for job in waiting if (job.part.device == "cpu") == (slot == "cpu"))
            job = next(fits, None) if time.time() < until - _LEAST else None
            if job is not None:
                waiting.remove(job)
                free.remove(slot)
                running.append(_Running(_start(job, work, slot, until), slot, job))
        if not running:
            break
        time.sleep(0.1)
        for one in [r for r in running if r.process.poll() is not None]:
            running.remove(one)
            free.append(one.slot)
            _tell(one, work, time.time() - began)
    for one in running:
        one.process.kill()
    for one in running:
        one.process.wait()
    return [job for job in jobs if not job.is_done(work)]


def _start(job: Job, work: Path, slot: str, until: float) -> subprocess.Popen[bytes]:
    part, folder = job.part, job.folder(work)
    words = [str(Path(__file__).with_name("evidence.py")), f"{part.name}:{part.size}@{part.device}"]
    words += ["--place", job.place, "--until", str(until), "--work", str(work)]
    if part.steps:
        words += ["--steps", str(part.steps)]
    for flag, values in (("--lrs", part.lrs), ("--seeds", part.seeds)):
        if values:
            words += [flag, ",".join(map(str, values))]
    visible = {"CUDA_VISIBLE_DEVICES": "" if slot == "cpu" else slot, "OMP_NUM_THREADS": "1"}
    log = folder.parent / f"{job.place}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *words], stdout=file, stderr=file, env=os.environ | visible
        )


def _tell(one: _Running, work: Path, seconds: float) -> None:
    said = "failed"
    if one.job.is_done(work):
        (row,) = one.job.run(work).rows
        shown = [f"{test.value:.2f}" for test in row.tests if test.value is not None]
        each = 1000 * row.seconds / max(1, row.steps)
        cut = " cut" if row.cut else ""
        said = f"{row.steps}{cut} steps of {each:.1f} ms: {' '.join(shown)} {row.failure}"
    print(
        f"{seconds:4.0f} s {one.slot:>3} {one.job.part.label}/{one.job.place}: {said}", flush=True
    )
