"""What other systems do not have is asked for, not assumed: macOS and Windows run these rooms."""

import ast
import os
from pathlib import Path

import pytest

from subquad import files

PACKAGE = Path(files.__file__).parent
ROOMS = ("cli", "arena", "train", "generate", "tasks")
PYTHON = [
    *(file for room in ROOMS for file in sorted((PACKAGE / room).rglob("*.py"))),
    *(PACKAGE / name for name in ("files.py", "models/folder.py", "models/cache_file.py")),
]
UNIX = {"fcntl", "resource", "termios", "pwd", "grp", "tty", "pty"}
ABSENT = {"SIGHUP", "SIGKILL", "SIGUSR1", "SIGPIPE", "geteuid", "fork", "sysconf", "getuid"}


@pytest.mark.parametrize("file", PYTHON, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_nothing_that_only_unix_has_is_taken_for_granted(file):
    module = ast.parse(file.read_text("utf-8"))
    for node in module.body:  # what is imported under a condition is not at this level
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not UNIX & set(names)
    for node in ast.walk(module):
        assert not (isinstance(node, ast.Attribute) and node.attr in ABSENT), ast.unparse(node)


def test_windows_syncs_files_and_no_directories(tmp_path, monkeypatch):
    opened = []
    real = os.open

    def record(path, flags, *rest):
        opened.append((Path(path).name, flags))
        return real(path, flags, *rest)

    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(files.os, "open", record)
    files.sync_tree(tmp_path)
    assert opened == [("a", os.O_RDWR)]  # which fsync needs there


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut after the rename would leave an empty file otherwise."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, name=name: (done.append(name), real(*a))
        )
    files.write_json(tmp_path / "results.json", {"a": 1})
    assert done[:2] == ["fsync", "replace"]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "results.json", {"a": float("nan")})
    assert files.read_json(tmp_path / "results.json") == {"a": 1}


def test_a_lock_is_taken_once(tmp_path):
    held = files.take_lock(tmp_path / ".lock")
    with pytest.raises(OSError):
        files.take_lock(tmp_path / ".lock")
    os.close(held)
    os.close(files.take_lock(tmp_path / ".lock"))
