"""How the scan's work is cut: tiles by shape class, sequences into segments."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.backend.gpu.launch import Launch, launch_of
from subquad.engines.matrix.kind import decay_kind

NONE, HEAD_FIXED, HEAD, KEY = range(4)  # kinds of gate, as scan.py numbers them
PIECE = 256  # tokens a program of the gate sums; segments are multiples of it
SHORTEST_SEGMENT = 1024  # tokens; shorter ones cost more in their extra pass than they give back
WARPS_PER_PROCESSOR = 8  # as many as fit at once; what a split of the sequence aims at


_GATES = {"none": NONE, "fixed_head": HEAD_FIXED, "token_head": HEAD} | dict.fromkeys(
    ("fixed_key", "token_key"), KEY
)


def gate_kind(log_decay: Tensor | None) -> int:
    """As the kernels number them: they know a fixed decay per head, not per key channel."""
    return _GATES[decay_kind(log_decay)]


class Tiles(NamedTuple):
    chunk: int  # tokens a step
    columns: int  # output channels a program
    warps: int
    stages: int
    slices: int = 1  # programs that share the contracted channels out; their outputs are added


def choose_tiles(contracted: int, width: int, dtype: torch.dtype, gate: int, slopes: bool) -> Tiles:
    """Tile sizes by shape class, measured with benchmarks/tune.py; figures in docs/kernels.md.

    contracted, width: channels of the reader and of the output; slopes: gradients of q and k where
    there are gates. Never fewer than 64 columns, even where the head has fewer: with fewer, the
    products read beside their operands on Hopper (triton-lang/triton#11366; seen here on 3.6).
    """
    wide = padded(contracted) > 128
    if dtype != torch.bfloat16:  # twice the bytes, and several passes per product
        return Tiles(32, 64, 8 if wide else 4, 1)
    if gate == KEY:
        return Tiles(32, 64, 8, 2) if wide else Tiles(32, 64, 4, 3)
    if slopes and wide:
        return Tiles(32, 128 if width > 64 else 64, 8, 2)
    if slopes:
        return Tiles(32, 128 if padded(contracted) <= 64 < width else 64, 4, 3)
    if wide:
        return Tiles(32, 64, 4, 2)
    return Tiles(32, 64, 4, 4) if width <= 64 else Tiles(32, 128, 8, 4)


def share_out(
    contracted: int, width: int, dtype: torch.dtype, gate: int, slopes: bool, rows: int,
    device: torch.device,
) -> Tiles:  # fmt: skip
    """`choose_tiles` for so many rows (segments of heads), which may be too few for the GPU.

    A wide head's programs are few and slow, as each holds all of the contracted channels. Where
    they leave processors idle, two slices take half of them each, as two narrower heads would; not
    where all are busy, as what slices write is float32, and still to be added.
    """
    tiles = choose_tiles(contracted, width, dtype, gate, slopes)
    if padded(contracted) <= 128 or rows * blocks(width, tiles) >= processors(device):
        return tiles
    narrow = choose_tiles(-(-contracted // 2), width, dtype, gate, slopes)
    return Tiles(narrow.chunk, 64, 4, narrow.stages, 2)


def padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def blocks(size: int, tiles: Tiles) -> int:
    return -(-size // tiles.columns)


def programs(size: int, tiles: Tiles) -> int:
    """Programs of one segment of one head with `size` output channels."""
    return blocks(size, tiles) * tiles.slices


class Layout(NamedTuple):
    """Segments of the token axis; if packed, `table` [segments, 5] has what segments.py finds."""

    table: Tensor | None
    offsets: Tensor | None  # [sequences + 1], the first segment of each (packed)
    tokens: int
    length: int  # of a segment, at most
    per_row: int
    segments: int
    sequences: int

    @property
    def boundaries(self) -> int:
        """Places between two segments of a sequence."""
        return self.segments - self.sequences

    @property
    def split(self) -> bool:
        return self.boundaries > 0

    def walk(self, anything: Tensor) -> tuple[Tensor, int, int, int]:
        """The arguments from which every kernel finds its segment."""
        table = anything if self.table is None else self.table
        return table, self.tokens, self.length, self.per_row


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=8)
def roomy(device: torch.device) -> bool:
    """Whether a program has more than 200 KiB of shared memory, as on Hopper and its successor."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def segment_length(batch: int, tokens: int, warps: int, device: torch.device) -> int:
    """Split a sequence where its programs, of so many warps in all, would leave processors idle.

    Rounded down: one program more than fit at once would make all of them wait for it.
    """
    wanted = WARPS_PER_PROCESSOR * processors(device) // (warps * batch)
    if wanted < 3:  # nearly full already: the extra pass costs more
        return -(-tokens // PIECE) * PIECE
    length = max(SHORTEST_SEGMENT, -(-tokens // wanted))
    return -(-length // PIECE) * PIECE


def lay_out(
    batch: int, tokens: int, length: int, cu_seqlens: Tensor | None, chunk: int, queue: list[Launch]
) -> Layout:
    """Cut all sequences into segments of `length` tokens (a multiple of PIECE, or the chunk).

    No value on the device is read: packed sequences get as many segments as they could need,
    and those left over are empty.
    """
    per_row = -(-tokens // length)
    if cu_seqlens is None:
        return Layout(None, None, tokens, length, per_row, batch * per_row, batch)
    from subquad.engines.matrix.gpu.segments_kernel import count_segments, cut_segments

    cu_seqlens = cu_seqlens.contiguous()
    sequences = cu_seqlens.shape[0] - 1
    segments = per_row + sequences - 1
    new = partial(torch.empty, device=cu_seqlens.device, dtype=torch.int64)
    bounds, offsets, firsts = (new(sequences + 1) for _ in range(3))
    table = new(segments, 5)
    queue.append(launch_of(
        count_segments, (1,),
        cu_seqlens, bounds, offsets, firsts, sequences, tokens, length, C=chunk, BLOCK=1024,
    ))  # fmt: skip
    queue.append(launch_of(
        cut_segments, (-(-segments // 128),),
        bounds, offsets, firsts, table, sequences, segments, length,
        (sequences - 1).bit_length(), C=chunk, BLOCK=128,
    ))  # fmt: skip
    return Layout(table, offsets, tokens, length, per_row, segments, sequences)
