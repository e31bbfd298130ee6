"""The wheel holds the whole library, and runs where only the wheel is."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import subquad

ROOT = Path(__file__).parents[1]
FORWARD = """
import torch, subquad
assert subquad.__file__.startswith(SITE), subquad.__file__
layers = ["s4d", "softmax_attention"]
model = subquad.SubquadForCausalLM(subquad.SubquadConfig(layers=layers, hidden_size=32))
ids = torch.arange(10)[None]
assert model(ids, labels=ids).loss.isfinite()
"""
# Compiled code is compiled anew in a new place, which takes a minute.
TRAINS = (
    FORWARD.replace("s4d", "gla")
    + """
model(ids, labels=ids).loss.backward()
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 13)
"""
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make wheel` builds it; by the build backend that is here, where there is one."""
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
    ]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    if "hatchling" in done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("pip cannot get hatchling, which builds the wheel, and it is not installed")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_every_file_of_the_library(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("subquad/")}
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for pattern in ("*.py", "*.jinja", "py.typed")
        for path in (source / "subquad").rglob(pattern)
    }
    assert "subquad/py.typed" in wanted and "subquad/arena/text/report.html.jinja" in wanted
    assert held == wanted


def test_it_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        entries = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Version"] == subquad.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "subquad = subquad.cli:main" in entries
    needed = {text.split(">")[0] for text in metadata.get_all("Requires-Dist") if ";" not in text}
    assert {"torch", "transformers", "numba"} <= needed


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), str(wheel)], check=True)
    return folder


def run(site: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_command_runs(site: Path, tmp_path: Path) -> None:
    assert subquad.__version__ in run(site, tmp_path, "-m", "subquad", "--version")


@pytest.mark.parametrize(
    "program", [FORWARD, pytest.param(TRAINS, marks=pytest.mark.slow)], ids=["forward", "training"]
)
def test_its_models_run(site: Path, tmp_path: Path, program: str) -> None:
    run(site, tmp_path, "-c", f"SITE = {str(site)!r}\n{program}")
