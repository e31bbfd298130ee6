"""Files of caches: whatever has been done to one, loading it is right or one clear error."""

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from subquad import SubquadCache, SubquadConfig, SubquadForCausalLM


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = SubquadConfig(layers=["gla", "softmax_attention"], hidden_size=16)
    cache = SubquadForCausalLM(config)(torch.randint(1, 64, (2, 5)), use_cache=True).past_key_values
    path = tmp_path_factory.mktemp("cache") / "cache.safetensors"
    cache.save(path)
    return cache, path


def load_with(path, tmp_path, tensors=None, **metadata):
    """The saved cache with other tensors and metadata, and no sum, as older files have none."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        kept = {n: v for n, v in file.metadata().items() if n != "sha256"}
    changed = tmp_path / "changed.safetensors"
    save_file(load_file(path) | (tensors or {}), changed, metadata=kept | metadata)
    return SubquadCache.load(changed)


def test_a_file_without_a_sum_still_loads(saved, tmp_path):
    cache, path = saved
    assert repr(load_with(path, tmp_path)) == repr(SubquadCache.load(path)) == repr(cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "10000000000"}, "it says 10000000000 layers"),
        ({"num_layers": "0"}, "it says 0 layers"),
        ({"num_layers": "two"}, "invalid literal"),
        ({"num_layers": "1"}, "a tensor is called '1."),
        ({"columns": "-5"}, "-5 columns"),
        ({"columns": ""}, "invalid literal"),
        ({"tensors": {"x": torch.ones(2)}}, "a tensor is called 'x'"),
        ({"tensors": {"0.": torch.ones(2)}}, "a tensor is called '0.'"),
        ({"tensors": {"7.a": torch.ones(2)}}, "a tensor is called '7.a'"),
        ({"tensors": {"-1.a": torch.ones(2)}}, "a tensor is called '-1.a'"),
        ({"tensors": {"0.a": torch.ones(3)}}, r"0.a has shape \[3\]"),
        ({"tensors": {"0.a": torch.tensor(1.0)}}, r"0.a has shape \[\]"),
        ({"tensors": {"lengths": torch.ones(2)}}, "lengths are no counts"),
        ({"tensors": {"lengths": torch.tensor([3, -1])}}, "lengths are no counts"),
        ({"tensors": {"read": torch.tensor([3, -1])}}, "read are no counts"),
        ({"tensors": {"read": torch.tensor([3])}}, "read are no counts"),
    ],
)
def test_what_save_does_not_write_is_refused(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"^path: got .*which is damaged: .*{message}"):
        load_with(saved[1], tmp_path, **changes)


def test_every_flipped_bit_is_found(saved, tmp_path):
    """In the header or in the numbers; a byte changed at random is refused, or changes nothing."""
    cache, path = saved
    whole, chance = path.read_bytes(), random.Random(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    changed = tmp_path / "changed.safetensors"
    places = [*range(8), *(chance.randrange(header) for _ in range(150))]
    places += [chance.randrange(header, len(whole)) for _ in range(150)]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        changed.write_bytes(data)
        try:
            loaded = SubquadCache.load(changed)
        except ValueError as error:
            assert str(error).startswith("path: got "), error
        else:  # blanks at the end of the header, say
            assert place < header and repr(loaded) == repr(cache)
            for state, expected in zip(loaded.states, cache.states):
                assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("length", [0, 5, 8, 100, 1000, -1])
def test_a_truncated_file_is_refused(saved, tmp_path, length):
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(saved[1].read_bytes()[:length])
    with pytest.raises(ValueError, match=r"^path: got"):
        SubquadCache.load(changed)


def test_a_deeply_nested_header_is_refused(tmp_path):
    header = ("[" * 50_000 + "]" * 50_000).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"^path: got"):
        SubquadCache.load(tmp_path / "a")
    header = json.dumps({"__metadata__": {"format": "subquad-cache-1"}}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"^path: got .*num_layers"):
        SubquadCache.load(tmp_path / "a")


def test_what_is_no_file_is_not_waited_for(saved, tmp_path):
    with pytest.raises(ValueError, match="is no regular file"):
        SubquadCache.load(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="is no regular file"):
            SubquadCache.load(tmp_path / "pipe")
    if os.name != "nt":
        place = tmp_path / os.fsdecode(b"cache\xff")
        with pytest.raises(ValueError, match=r"^path: got .*expected a path in UTF-8"):
            saved[0].save(place)
