"""Checkpoints: whole or absent, and never believed without their sums."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from subquad.files import SUMS
from subquad.train import checkpoint
from subquad.train.checkpoint import CheckpointError


def writer(step):
    def write(folder):
        save_file({"x": torch.full((1000,), float(step))}, folder / "model.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step}))

    return write


def save(root, step, keep=3):
    return checkpoint.save(root, step, writer(step), keep=keep)


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_save_verify_and_keep(tmp_path):
    for step in (5, 10, 15, 20):
        path = save(tmp_path, step)
        checkpoint.verify(path)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [10, 15, 20]
    assert {p.name for p in tmp_path.iterdir()} == {f"step-{s:08d}" for s in (10, 15, 20)}
    assert load_file(path / "model.safetensors")["x"][0] == 20


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", SUMS])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_bit_anywhere_is_found_and_the_previous_is_used(tmp_path, name, where):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    size = (bad / name).stat().st_size
    flip(bad / name, min(size - 1, int(where * size)))
    said = []
    assert checkpoint.newest_good(tmp_path, said.append) == good
    assert len(said) == 1 and (name in said[0] or name == SUMS) and "damaged" in said[0]
    assert save(tmp_path, 2).exists()  # its place is free again
    assert checkpoint.newest_good(tmp_path, said.append) == checkpoint.path_of(tmp_path, 2)


def test_missing_and_foreign_files_are_found(tmp_path):
    path = save(tmp_path, 1)
    (path / "extra").touch()
    with pytest.raises(CheckpointError, match="extra"):
        checkpoint.verify(path)
    (path / "extra").unlink()
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.verify(path)


def test_nothing_good_is_an_error_not_a_fresh_start(tmp_path):
    assert checkpoint.newest_good(tmp_path, print) is None
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.json", 3)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        checkpoint.newest_good(tmp_path, lambda text: None)
    assert len(checkpoint.checkpoints(tmp_path)) == 2  # the evidence stays


def test_clean_removes_only_leftovers(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".unfinished-2").mkdir()
    (tmp_path / ".unfinished-2" / "model.safetensors").touch()
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_writer_that_fails_leaves_the_others_alone(tmp_path):
    save(tmp_path, 1, keep=1)

    def fails(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*step-00000001"):
        checkpoint.save(tmp_path, 2, fails, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.verify(tmp_path / "step-00000001")


def test_a_disk_that_refuses_midway(tmp_path):
    """The system itself stops the write, through safetensors' own code, at 2,000 bytes."""
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")
def test_an_unwritable_place(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            save(tmp_path, 1)
    finally:
        tmp_path.chmod(0o700)
