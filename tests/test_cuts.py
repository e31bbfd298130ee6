"""The property everything rests on: however the same tokens are cut, the logits are the same.

Twenty texts of unequal lengths are read once each, alone and in one pass. Then they are read again
in many small pieces, several texts to a call, in every way that a caller may choose. A cut is one
text's way through such a reading; each row of the table (and two hybrids) gets 200 of them.
"""

import copy
import random

import pytest
import torch
from torch import Tensor

from awake import awake
from subquad.mixers import MIXERS
from subquad.models import SubquadCache, SubquadConfig, SubquadForCausalLM

TEXTS = 20
LONGEST = 40
CALLS = 5
TOLERANCE = 1e-4
VOCAB = 61

# Small enough to be quick, and windows small enough to be left behind within a text.
OPTIONS = {
    "sliding_window_attention": {"window": 7},
    "mamba2": {"head_dim": 32, "state_size": 16},
    "retnet": {"num_heads": 2},
    "gla": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2},
}
STACKS = {row: [row, row] for row in MIXERS} | {
    "hybrid of three": ["gated_deltanet", "softmax_attention", "mamba2"],
    "hybrid of windows": ["sliding_window_attention", "deltanet", "linear_attention"],
}


class Reader:
    """A model, its texts, and their logits when each is read alone in one pass."""

    def __init__(self, layers: list[str]) -> None:
        torch.manual_seed(0)
        config = SubquadConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            layers=layers,
            intermediate_size=32,
            mixer_options={row: OPTIONS[row] for row in set(layers) & set(OPTIONS)},
        )
        self.model = awake(SubquadForCausalLM(config)).eval()
        rng = random.Random(1)
        lengths = [1, 2, LONGEST, *(rng.randint(1, LONGEST) for _ in range(TEXTS - 3))]
        self.texts = [torch.tensor([rng.randrange(VOCAB) for _ in range(n)]) for n in lengths]
        self.alone = [self.model(text[None]).logits[0] for text in self.texts]

    def check(self, got: list[list[Tensor]], how: str, pieces: list[list[int]]) -> None:
        for n, (parts, want) in enumerate(zip(got, self.alone)):
            logits = torch.cat(parts)
            assert logits.shape == want.shape
            error = (logits - want).abs().amax(-1)
            assert error.max() <= TOLERANCE, (
                f"{how}: text {n} cut into {pieces[n]} is off by {error.max():.2e}, "
                f"first at token {int((error > TOLERANCE).nonzero()[0])}"
            )


ON_GPU = [pytest.param((name, "cuda"), marks=pytest.mark.gpu, id=f"{name} cuda") for name in STACKS]
ON_CPU = [pytest.param((name, "cpu"), id=name) for name in STACKS]


@pytest.fixture(scope="module", params=ON_CPU + ON_GPU)
def reader(request: pytest.FixtureRequest):
    name, device = request.param
    with torch.device(device), torch.no_grad():
        yield Reader(STACKS[name])


def cut(length: int, pieces: int, rng: random.Random, at_least: int = 0) -> list[int]:
    """`length` as a sum of `pieces` numbers, many of them small."""
    left, sizes = length - at_least * pieces, []
    for _ in range(pieces - 1):
        size = rng.choice([0, 0, 1, rng.randint(0, left)])
        sizes.append(at_least + min(size, left))
        left -= sizes[-1] - at_least
    sizes.append(at_least + left)
    rng.shuffle(sizes)
    return sizes


@torch.no_grad()
def test_texts_depend_on_their_past(reader: Reader) -> None:
    """Without this, the other tests could not fail: a leak has to be visible."""
    text = reader.texts[2]
    other = text.clone()
    other[2] = (other[2] + 1) % VOCAB
    change = (reader.model(other[None]).logits[0] - reader.alone[2]).abs().amax(-1)
    assert change[:2].max() <= TOLERANCE  # not zero: a convolution by FFT rounds
    assert change[3] > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_padded_anywhere(reader: Reader, seed: int) -> None:
    """Batches with holes: left, right, in the middle, and rows with nothing in a call. 100 cuts."""
    rng = random.Random(seed)
    pieces = [cut(len(text), CALLS, rng) for text in reader.texts]
    got: list[list[Tensor]] = [[] for _ in reader.texts]
    done = [0] * TEXTS
    cache, seen = None, torch.zeros(TEXTS, 0, dtype=torch.long)
    for call in range(CALLS):
        width = max(1, max(sizes[call] for sizes in pieces) + rng.randint(0, 2))
        ids, mask = torch.full((TEXTS, width), VOCAB - 1), torch.zeros(TEXTS, width).long()
        places = [_places(sizes[call], width, rng) for sizes in pieces]
        for n, place in enumerate(places):
            ids[n, place] = reader.texts[n][done[n] : done[n] + len(place)]
            mask[n, place] = 1
            done[n] += len(place)
        seen = torch.cat([seen, mask], dim=1)
        whole = rng.random() < 0.5  # a mask may cover the past, or only what is new
        out = reader.model(
            ids, attention_mask=seen if whole else mask, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        assert out.logits[mask == 0].abs().sum() == 0
        for n, place in enumerate(places):
            got[n].append(out.logits[n, place])
    assert cache.get_seq_length() == seen.shape[1]
    assert cache.lengths.tolist() == [len(text) for text in reader.texts]
    reader.check(got, f"padded, seed {seed}", pieces)


def _places(count: int, width: int, rng: random.Random) -> list[int]:
    left = rng.choice([0, width - count])
    scattered = sorted(rng.sample(range(width), count))
    return rng.choice([list(range(left, left + count)), scattered])


@torch.no_grad()
@pytest.mark.parametrize("seed", range(2))
def test_packed_by_cu_seqlens(reader: Reader, seed: int) -> None:
    """Texts end to end in one row; those that are finished leave the cache. 40 cuts."""
    rng = random.Random(100 + seed)
    calls = [min(len(text), rng.randint(1, CALLS)) for text in reader.texts]
    pieces = [cut(len(text), n, rng, at_least=1) for text, n in zip(reader.texts, calls)]
    got: list[list[Tensor]] = [[] for _ in reader.texts]
    live, done, cache = list(range(TEXTS)), [0] * TEXTS, None
    for call in range(CALLS):
        stay = [i for i, n in enumerate(live) if call < len(pieces[n])]
        live = [live[i] for i in stay]
        if not live:
            break
        if cache is not None:
            cache.batch_select_indices(torch.tensor(stay))
        sizes = [pieces[n][call] for n in live]
        ids = torch.cat([reader.texts[n][done[n] : done[n] + s] for n, s in zip(live, sizes)])
        bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        out = reader.model(ids[None], cu_seqlens=bounds, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for n, size, logits in zip(live, sizes, out.logits[0].split(sizes)):
            got[n].append(logits)
            done[n] += size
    reader.check(got, f"packed, seed {100 + seed}", pieces)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(2))
def test_packed_by_restarting_positions(reader: Reader, seed: int) -> None:
    """Four rows of five texts each, the rows cut across the texts, some with padding. 40 cuts."""
    rng = random.Random(200 + seed)
    rows = [reader.texts[i::4] for i in range(4)]
    stream = torch.zeros(4, max(sum(map(len, row)) for row in rows), dtype=torch.long)
    positions, mask = torch.zeros_like(stream), torch.zeros_like(stream)
    for i, row in enumerate(rows):
        size = sum(map(len, row))
        stream[i, :size] = torch.cat(row)
        positions[i, :size] = torch.cat([torch.arange(len(text)) for text in row])
        mask[i, :size] = 1
    sizes = [size for size in cut(stream.shape[1], CALLS, rng) if size]
    cache, logits, start = None, [], 0
    for size in sizes:
        window = slice(start, start + size)
        out = reader.model(
            stream[:, window],
            attention_mask=mask[:, window],
            position_ids=positions[:, window],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits)
        start += size
    joined = torch.cat(logits, dim=1)
    got: list[list[Tensor]] = [[] for _ in reader.texts]
    for i, row in enumerate(rows):
        start = 0
        for j, text in enumerate(row):
            got[4 * j + i] = [joined[i, start : start + len(text)]]
            start += len(text)
    reader.check(got, f"positions, seed {200 + seed}", [sizes] * TEXTS)


@torch.no_grad()
def test_full_rows_in_pieces(reader: Reader) -> None:
    """No padding at all: a text with itself, two rows, cut ten ways (prefill and decode too)."""
    text, want = reader.texts[2], reader.alone[2]
    ids = text.expand(2, -1)
    rng = random.Random(300)
    ways = [[1] * LONGEST, [LONGEST - 3, 1, 1, 1], *(cut(LONGEST, CALLS, rng) for _ in range(8))]
    for sizes in ways:
        cache, logits = None, []
        for piece in ids.split([size for size in sizes if size], dim=1):
            out = reader.model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        error = (torch.cat(logits, dim=1) - want).abs().max()
        assert error <= TOLERANCE, f"full rows cut into {sizes} are off by {error:.2e}"


@torch.no_grad()
def test_left_padding_and_a_second_turn(reader: Reader) -> None:
    """All texts left-padded in one call, then all go on together without padding."""
    texts, width = reader.texts, LONGEST
    ids, mask = torch.zeros(TEXTS, width).long(), torch.zeros(TEXTS, width).long()
    for n, text in enumerate(texts):
        ids[n, width - len(text) :] = text
        mask[n, width - len(text) :] = 1
    more = texts[2][:6].expand(TEXTS, -1)
    first = reader.model(ids, attention_mask=mask, use_cache=True)
    got = [[first.logits[n, width - len(text) :]] for n, text in enumerate(texts)]
    reader.check(got, "left-padded", [[len(text)] for text in texts])
    second = reader.model(more, past_key_values=first.past_key_values).logits
    for n in (0, 1, 2, 7):
        want = reader.model(torch.cat([texts[n], more[n]])[None]).logits[0, -6:]
        assert (second[n] - want).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_snapshot_stays_as_it_was(reader: Reader, tmp_path) -> None:
    """Two continuations may start from one state, from its copy, or from its file."""
    text, want = reader.texts[2], reader.alone[2]
    cache = reader.model(text[None, :20], use_cache=True).past_key_values
    snapshot = copy.copy(cache)
    path = tmp_path / "state.safetensors"
    cache.save(path)
    reader.model((text[None, 20:] + 1) % VOCAB, past_key_values=cache)
    for start in (snapshot, SubquadCache.load(path, device=text.device)):
        assert start.get_seq_length() == 20
        logits = reader.model(text[None, 20:], past_key_values=start).logits[0]
        assert (logits - want[20:]).abs().max() <= TOLERANCE
