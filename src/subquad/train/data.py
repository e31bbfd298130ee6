"""Real text as one long row of tokens, and batches that are a pure function of (seed, step).

A source is read into documents, the documents are split into train and held-out, and each side
becomes a `Tokens`: ids, with the number of bytes of text that each id stands for, so that losses
can be given in bits per byte whichever tokenizer is used. Everything lies in memory.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subquad.train.documents import Document, read_documents, split

_PIECE_BYTES = 1 << 20  # other tokenizers get the text in pieces of about this size


@dataclass(frozen=True)
class Tokens:
    """ids [N] and byte_counts [N]: bytes of text that each id stands for (separators: 0)."""

    ids: np.ndarray
    byte_counts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor, int]:
        """Inputs [B,T], targets [B,T] (the inputs one token later), bytes the targets stand for."""
        index = starts[:, None] + np.arange(seq_len + 1)
        ids = torch.from_numpy(self.ids[index].astype(np.int64))
        return ids[:, :-1], ids[:, 1:], int(self.byte_counts[index[:, 1:]].sum(dtype=np.int64))

    def window_count(self, seq_len: int) -> int:
        return max(0, (len(self) - 1) // seq_len)


class Batches:
    """Training windows, each epoch in a new order: a pure function of the step and these arguments.

    So a resumed run needs no data position but its step, and every model trained with the same
    seed, batch and length sees the same batches. An epoch visits each of its windows once, and
    begins at its own offset, so that windows are not cut at the same places every time.
    """

    def __init__(self, tokens: Tokens, *, batch_size: int, seq_len: int, seed: int) -> None:
        self.tokens, self.batch_size, self.seq_len, self.seed = tokens, batch_size, seq_len, seed
        # One window is given up to make room for the offset, unless there is only one.
        self.per_epoch = max(1, tokens.window_count(seq_len) - 1)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        """The batch of step 0, 1, ...: inputs and targets [B,T], bytes of text in the targets."""
        first = step * self.batch_size
        starts = [self._start(first + i) for i in range(self.batch_size)]
        return self.tokens.windows(np.array(starts), self.seq_len)

    def _start(self, index: int) -> int:
        epoch, position = divmod(index, self.per_epoch)
        if self._epoch[0] != epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            spare = len(self.tokens) - 1 - self.per_epoch * self.seq_len
            offset = random.integers(min(spare, self.seq_len - 1) + 1)
            order = random.permutation(self.per_epoch)
            self._epoch = (epoch, offset + order * self.seq_len)
        return int(self._epoch[1][position])


def heldout_starts(tokens: Tokens, seq_len: int, token_budget: int) -> np.ndarray:
    """Starts of at most `token_budget // seq_len` disjoint windows, spread evenly over the text."""
    total = tokens.window_count(seq_len)
    count = min(total, max(1, token_budget // seq_len))
    return (np.arange(count) * total // count) * seq_len


@dataclass(frozen=True)
class Corpus:
    """Both sides of a source, tokenised. `source` says where it came from."""

    source: str
    tokenizer: Any
    train: Tokens
    heldout: Tokens

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over all tokens: a run resumes only on the very data it began with."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.heldout):
            digest.update(np.ascontiguousarray(tokens.ids).data)
        return digest.hexdigest()

    def check(self, seq_len: int) -> None:
        """Raise ValueError unless both sides hold at least one window of `seq_len`."""
        for side, tokens in (("training", self.train), ("held-out", self.heldout)):
            if tokens.window_count(seq_len) == 0:
                raise ValueError(
                    f"seq_len: got {seq_len}, but {self.source} has {len(tokens)} {side} tokens "
                    "and a window needs seq_len + 1; use a shorter seq_len or more text"
                )


def load_corpus(source: str, *, tokenizer: Any = None) -> Corpus:
    """Read, split and tokenise `source`: `stdlib`, a file, a .jsonl file or a folder.

    `tokenizer`: None for bytes, a folder or tokenizer.json, or a tokenizer object. The result
    depends on the files' bytes and relative names only. Raises ValueError saying what is missing.
    """
    if tokenizer is None or isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    train, heldout = split(read_documents(source))
    return Corpus(source, tokenizer, encode(train, tokenizer), encode(heldout, tokenizer))


def load_tokenizer(path: str | Path | None) -> Any:
    """Bytes for None; else whatever tokenizer lies in the folder (or tokenizer.json) `path`."""
    if path is None:
        from subquad.models import ByteTokenizer

        return ByteTokenizer()
    if not (Path(path).is_dir() or Path(path).is_file()):
        raise ValueError(f"tokenizer: {path} does not exist; expected a folder or a tokenizer.json")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if Path(path).is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))  # type: ignore[no-untyped-call]
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain ones
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"tokenizer: {path} holds none that transformers can read: {reason}"
        ) from error


def encode(documents: list[Document], tokenizer: Any) -> Tokens:
    """Tokenise documents one after another, an end-of-text id (if there is one) after each."""
    end = tokenizer.eos_token_id
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    encoder = _encode_bytes if is_bytes(tokenizer) else _encode_pieces
    ids: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for document_ids, document_counts in encoder(documents, tokenizer):
        separator = [] if end is None else [end]
        ids += [document_ids.astype(dtype), np.array(separator, dtype)]
        counts += [document_counts, np.zeros(len(separator), document_counts.dtype)]
    return Tokens(np.concatenate(ids), np.concatenate(counts))


def is_bytes(tokenizer: Any) -> bool:
    """Whether ids 0 to 255 are the bytes themselves, so that text need not go through it at all."""
    from subquad.models import ByteTokenizer

    return isinstance(tokenizer, ByteTokenizer)


def _encode_bytes(
    documents: list[Document], tokenizer: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for document in documents:
        ids = np.frombuffer(document.text, np.uint8)
        yield ids, np.ones(len(ids), np.uint8)


def _encode_pieces(
    documents: list[Document], tokenizer: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            "tokenizer: bits per byte needs character offsets, which only a tokenizer of the "
            "tokenizers library gives; save it as a tokenizer.json"
        )
    for document in documents:
        pieces = [_encode_piece(piece, backend) for piece in _pieces(document.text)]
        yield np.concatenate([i for i, _ in pieces]), np.concatenate([c for _, c in pieces])


def _pieces(text: bytes) -> Iterable[bytes]:
    """The text in pieces of about a megabyte, cut after a line where possible."""
    start = 0
    while start < len(text):
        end = min(start + _PIECE_BYTES, len(text))
        if end < len(text):
            end = text.rfind(b"\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _encode_piece(piece: bytes, backend: Any) -> tuple[np.ndarray, np.ndarray]:
    """ids and bytes per id: from where a token starts to where the next one does.

    Bytes that are no UTF-8 count as the one byte they are, and the tokenizer sees U+FFFD.
    """
    characters = np.frombuffer(
        piece.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), np.uint32
    )
    invalid = (characters >= 0xDC80) & (characters <= 0xDCFF)
    width = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(np.where(invalid, 1, width))])
    text = np.where(invalid, np.uint32(0xFFFD), characters).tobytes().decode("utf-32-le")
    encoding = backend.encode(text, add_special_tokens=False)
    starts = np.maximum.accumulate(
        [0, *(start for start, _ in encoding.offsets[1:]), len(characters)]
    )
    counts = np.diff(bytes_before[starts])[: len(encoding.ids)].astype(np.uint32)
    return np.array(encoding.ids, np.uint32), counts
