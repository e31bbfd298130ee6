"""Data: deterministic, split without leaks, counted in bytes, batched by the step alone."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from subquad.train import TrainConfig
from subquad.train.data import (
    Batches,
    Tokens,
    encode,
    heldout_starts,
    load_corpus,
    load_tokenizer,
)
from subquad.train.documents import HELD_OUT_SHARE, Document, read_documents, split

BYTES = load_tokenizer(None)


def documents(count: int) -> list[Document]:
    return [Document(f"file{i}.txt", f"text number {i}\n".encode() * 3) for i in range(count)]


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory):
    """A small BPE tokenizer that merges, as a tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # drops spaces: their bytes must count
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog did not"] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_stdlib_excludes_packages_and_repeats_itself_exactly():
    first, second = read_documents("stdlib"), read_documents("stdlib")
    assert first == second
    names = [d.name for d in first]
    assert "argparse.py" in names and len(first) > 300
    assert not any("site-packages" in name or "dist-packages" in name for name in names)
    assert len({d.text for d in first}) == len(first)


def test_split_by_hash_covers_everything_and_is_stable():
    many = documents(1000)
    train, heldout = split(many)
    assert sorted(train + heldout) == sorted(many)
    assert 0.5 < len(heldout) * HELD_OUT_SHARE / len(many) < 1.5
    # A document's side does not depend on which others are there.
    fewer_train, fewer_heldout = split(many[::2])
    assert set(fewer_train) <= set(train) and set(fewer_heldout) <= set(heldout)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=8))
def test_split_of_few_documents_cuts_the_text_once(texts):
    train, heldout = split([Document(str(i), text) for i, text in enumerate(texts)])
    assert b"".join(d.text for d in train + heldout) == b"".join(texts)


def test_bytes_are_themselves_with_a_separator_between_documents():
    garbage = bytes(range(256))
    tokens = encode([Document("a", garbage), Document("b", b"xy")], BYTES)
    end = BYTES.eos_token_id
    assert tokens.ids.tolist() == [*range(256), end, *b"xy", end]
    assert tokens.byte_counts.tolist() == [1] * 256 + [0] + [1, 1] + [0]


def test_the_fast_path_is_what_the_byte_tokenizer_does():
    text = "naïve café \U0001f40d\n\ttabs"
    assert encode([Document("a", text.encode())], BYTES).ids[:-1].tolist() == BYTES.encode(text)


@settings(deadline=None, max_examples=60)
@given(text=st.one_of(st.text(max_size=300).map(str.encode), st.binary(max_size=300)))
def test_every_byte_is_counted_once_whatever_the_tokenizer(word_pieces, text):
    text = b"the " + text
    tokens = encode([Document("a", text)], load_tokenizer(word_pieces))
    assert tokens.byte_counts.sum() == len(text)
    assert len(tokens.ids) == len(tokens.byte_counts)


def test_long_documents_go_through_other_tokenizers_in_pieces(word_pieces, monkeypatch):
    monkeypatch.setattr("subquad.train.data._PIECE_BYTES", 64)
    text = b"the cat sat on the mat\n" * 40
    tokenizer = load_tokenizer(word_pieces)
    tokens = encode([Document("a", text)], tokenizer)
    assert tokens.ids.tolist() == tokenizer.encode(text.decode(), add_special_tokens=False)
    assert tokens.byte_counts.sum() == len(text)


def test_a_tokenizer_folder_loads(tmp_path):
    BYTES.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode("abc") == [97, 98, 99]


def test_batches_are_a_function_of_the_step():
    tokens = Tokens(np.arange(1000, dtype=np.uint16), np.ones(1000, np.uint8))

    def make(seed):
        return Batches(tokens, batch_size=3, seq_len=10, seed=seed)

    in_order, backwards = make(7), make(7)
    wanted = [in_order.batch(step) for step in range(80)]
    for step in reversed(range(80)):
        inputs, targets, n_bytes = backwards.batch(step)
        assert (inputs == wanted[step][0]).all() and (targets == wanted[step][1]).all()
        assert (targets == inputs + 1).all() and n_bytes == 30
    assert (make(8).batch(0)[0] != wanted[0][0]).any()


def test_an_epoch_visits_each_window_once_and_the_next_differs():
    tokens = Tokens(np.arange(1005, dtype=np.uint16), np.ones(1005, np.uint8))
    batches = Batches(tokens, batch_size=1, seq_len=10, seed=0)

    def epoch(n):
        steps = range(n * batches.per_epoch, (n + 1) * batches.per_epoch)
        return [int(batches.batch(s)[0][0, 0]) for s in steps]

    first, second = epoch(0), epoch(1)
    assert len(set(first)) == batches.per_epoch == 99
    assert {b - a for a, b in zip(sorted(first), sorted(first)[1:])} == {10}
    assert first != second
    assert sorted(first) != sorted(second)  # the offset moved too


def test_the_shortest_possible_text_still_makes_batches():
    tokens = Tokens(np.arange(11, dtype=np.uint16), np.ones(11, np.uint8))
    inputs, targets, _ = Batches(tokens, batch_size=2, seq_len=10, seed=0).batch(5)
    assert inputs.tolist() == [list(range(10))] * 2 and targets[0, -1] == 10


def test_heldout_windows_are_disjoint_and_spread_over_the_text():
    tokens = Tokens(np.zeros(10_001, np.uint16), np.ones(10_001, np.uint8))
    assert heldout_starts(tokens, 100, 1 << 30).tolist() == list(range(0, 10_000, 100))
    some = heldout_starts(tokens, 100, 1000)
    assert len(some) == 10 and np.diff(some).min() >= 100 and some[-1] >= 9000


def test_jsonl_and_folders(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "tw\\u00f6", "id": 3}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_bytes(b"\xff\x00plain")
    (tmp_path / ".hidden").write_text("no")
    assert read_documents(str(tmp_path)) == [
        Document("a.jsonl:1", b"one"),
        Document("a.jsonl:3", "twö".encode()),
        Document("sub/b.txt", b"\xff\x00plain"),
    ]


@pytest.mark.parametrize(
    "line", ["not json", '{"txt": "x"}', '{"text": 3}', '["text"]', '"text"', '{"text": null}']
)
def test_bad_jsonl_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_documents(str(path))


def test_bad_sources_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected `stdlib`"):
        load_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match=r"tokenizer: .* does not exist"):
        load_corpus("stdlib", tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="tokenizer: "):
        load_corpus("stdlib", tokenizer=str(tmp_path))


def test_text_shorter_than_a_window_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("ten words are not enough for anything at all here\n" * 4)
    corpus = load_corpus(str(path))
    corpus.check(5)
    with pytest.raises(ValueError, match=r"seq_len: got 100, but .* held-out tokens"):
        corpus.check(100)


def test_fingerprint_sees_a_changed_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(json.dumps(list(range(1000))))
    before = load_corpus(str(path)).fingerprint
    assert load_corpus(str(path)).fingerprint == before
    path.write_text(path.read_text().replace("777", "778"))
    assert load_corpus(str(path)).fingerprint != before


# ---- what is no text


def test_a_folder_is_read_without_the_runs_and_arenas_in_it(tmp_path):
    """Also one that was made there since: a run must find the same text when it is resumed."""
    (tmp_path / "a.txt").write_text("text")
    before = read_documents(str(tmp_path))
    run = tmp_path / "deep" / "run"
    run.mkdir(parents=True)
    for name in (".lock", "config.json", "metrics.jsonl"):
        (run / name).write_text("{}\n")
    arena = tmp_path / "arena"
    arena.mkdir()
    (arena / "plan.json").write_text('{"config": {}, "environment": {}}')
    (arena / "report.html").write_text("<p>")
    assert read_documents(str(tmp_path)) == before
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "plan.json").write_text('{"config": {}}')  # anybody's
    assert len(read_documents(str(tmp_path))) == 2


def test_the_order_is_that_of_the_names(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", "a/b/c.txt", "a-b/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [document.name for document in read_documents(str(tmp_path))]
    paths = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert names == [p.relative_to(tmp_path).as_posix() for p in paths]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
def test_what_has_no_end_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match=r"data: .* is no regular file; expected `stdlib`"):
            read_documents(str(source))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert [document.name for document in read_documents(str(tmp_path))] == ["a.txt"]
    with pytest.raises(ValueError, match=r"tokenizer: .* does not exist"):
        load_tokenizer(tmp_path / "pipe")


def test_an_empty_source_is_not_the_working_directory():
    with pytest.raises(ValueError, match="data: '' does not exist"):
        read_documents("")
    with pytest.raises(ValueError, match="data: got ''"):
        TrainConfig(data="")


def test_lines_without_bounds_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_documents(str(file))
    monkeypatch.setattr("subquad.train.documents._LONGEST_LINE", 100)
    file.write_text('{"text": "a"}\n{"text": "' + "b" * 100 + '"}\n')
    with pytest.raises(ValueError, match="line 2 is longer than"):
        read_documents(str(file))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"model": 3}', b"\xff\xfe", b"[" * 10**5])
@pytest.mark.parametrize("folder", [True, False])
def test_a_broken_tokenizer_is_one_clear_error(tmp_path, content, folder):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^tokenizer: .* holds none that transformers can read"):
        load_tokenizer(tmp_path if folder else file)
