"""`subquad hippo`: what it prints, what it draws, what it refuses."""

import re
import sys

import numpy as np
import pytest

from subquad.cli import main
from subquad.ssm.signals import MADE, make


@pytest.fixture
def hippo(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty directory: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["subquad", "hippo", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            main()
        text = capsys.readouterr()
        return exit.value.code, text.out, text.err

    return run


def errors(out):
    """The numbers of the table's rows: {samples read: (whole, oldest, newest) in percent}."""
    rows = re.findall(r"^ *([\d,]+) +([\d,]+) +(\S+) % +(\S+) % +(\S+) %$", out, re.M)
    return {int(t.replace(",", "")): tuple(map(float, rest)) for t, _, *rest in rows}


def test_the_default_is_remembered_and_drawn(hippo, tmp_path):
    code, out, _ = hippo()
    assert code == 0 and "1,000 samples" in out and "64 numbers" in out
    assert set(errors(out)) == {250, 500, 750, 1000}
    assert all(error < 1 for row in errors(out).values() for error in row)
    picture = tmp_path / "runs" / "hippo.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture.name) in out


@pytest.mark.parametrize("measure", ["legt", "lmu", "decay"])
def test_other_measures_forget_the_beginning(hippo, measure):
    code, out, _ = hippo("waves", "--measure", measure, "--length", 600, "--method", "bilinear")
    assert code == 0 and "150" in out  # the window: a quarter
    assert errors(out)[600][2] < 5  # the newest fifth of what is covered


def test_what_cannot_be_remembered_is_told_so(hippo):
    assert errors(hippo("noise", "--size", 8)[1])[1000][0] > 50
    assert 2 < errors(hippo("steps")[1])[1000][0] < 50


def test_files_of_numbers(hippo, tmp_path):
    f = make("waves", 200)
    np.save(tmp_path / "one.npy", f.numpy())
    np.save(tmp_path / "two.npy", np.stack([f.numpy() * 0, f.numpy()], 1))
    lines = [f"2020-01-{k},{x}" for k, x in enumerate(f.tolist())]
    (tmp_path / "dated.csv").write_text("\n".join(["date,close", *lines]))
    (tmp_path / "blanks.txt").write_text("# t f\n" + "\n".join(f"{k} {x}" for k, x in enumerate(f)))
    tables = [
        hippo(*words, "--out", "x.png")[1]
        for words in (
            ("one.npy",),
            ("two.npy", "--column", 2),
            ("dated.csv",),  # the one column that is all numbers
            ("dated.csv", "--column", "close"),
        )
    ]
    assert len(errors(tables[0])) == 4
    assert all(errors(table) == errors(tables[0]) for table in tables)
    (tmp_path / "semicolons.csv").write_text("\n".join(f"{x};0" for x in f.tolist()))
    assert errors(hippo("semicolons.csv", "--column", 1)[1]) == errors(tables[0])


@pytest.mark.parametrize(
    "words, message",
    [
        (["nope"], "signal: got 'nope'"),
        (["nope.csv"], "No such file"),
        (["/dev/zero"], "signal: got '/dev/zero'; expected a file of numbers"),
        (["."], "signal: got '.'; expected a file of numbers"),
        (["--measure", "lagt"], "measure: "),
        (["--method", "rk4"], "method: "),
        (["--size", 0], "size: got 0"),
        (["--length", 1], "length: "),
        (["--window", 5], "window: "),
        (["--measure", "legt", "--window", -5], "window: "),
        (["--measure", "legt", "--method", "euler"], "method: got 'euler', which is unstable"),
        (["--out", "x.jpg"], "out: "),
        (["empty.txt"], "which is empty"),
        (["header.csv"], "no rows"),
        (["gap.txt"], "sample 2 that is no finite number"),
        (["one.txt"], "1 samples"),
        (["ragged.csv"], "row 2 with 1 columns"),
        (["two.csv"], "column: got none; expected one of a, b"),
        (["two.csv", "--column", "c"], "column: got 'c'"),
        (["two.csv", "--column", 3], "column: got '3'"),
        (["binary.csv"], "not text"),
        (["binary.npy"], "objects (pickles) are never loaded"),
        (["objects.npy"], "objects (pickles) are never loaded"),
        (["cube.npy"], "shape (2, 2, 2)"),
        (["complex.npy"], "real"),
    ],
)
def test_what_is_refused(hippo, tmp_path, words, message):
    texts = {
        "empty.txt": "# nothing\n\n",
        "header.csv": "a,b\n",
        "gap.txt": "1\nnan\n3\n",
        "one.txt": "1\n",
        "ragged.csv": "1,2\n3\n",
        "two.csv": "a,b\n1,2\n3,4\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name in ("binary.csv", "binary.npy"):
        (tmp_path / name).write_bytes(bytes(range(128, 256)))
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "complex.npy", np.array([1j, 2.0]))
    code, out, err = hippo(*words)
    assert code == 1 and message in err and err.count("\n") == 1
    assert "Drawing" not in out


def test_made_signals_have_mean_zero_and_variance_one():
    for name in MADE:
        f = make(name, 500)
        assert abs(f.mean()) < 1e-12 and abs(f.std() - 1) < 1e-12
        assert not f.equal(make(name, 500, seed=1))
