"""generate(): every way of decoding, against the plainest one."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from subquad.mixers import MIXERS
from subquad.models import SubquadCache, SubquadConfig, SubquadForCausalLM

HYBRID = ["gated_deltanet", "softmax_attention", "mamba2"]
STACKS = [[row] for row in MIXERS] + [HYBRID]
NEW = 6


def build(layers: list[str]) -> SubquadForCausalLM:
    torch.manual_seed(0)
    model = SubquadForCausalLM(SubquadConfig(hidden_size=64, layers=layers)).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that the past, not only the last token, decides
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=STACKS, ids="+".join)
def model(request: pytest.FixtureRequest) -> SubquadForCausalLM:
    return build(request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def greedily(model: SubquadForCausalLM, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """Reads everything again for every token: nothing is remembered, so nothing can be wrong."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy(model, ids) -> None:
    want = greedily(model, ids)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), want)
    without = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=False)
    assert torch.equal(without, want)
    chunked = model.generate(ids, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(chunked, want)
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(embedded, want[:, 11:])


def test_left_padded_batch_equals_singles(model, ids) -> None:
    sizes = (11, 7, 2)
    padded = torch.full_like(ids, 258)
    mask = torch.zeros_like(ids)
    for row, size in enumerate(sizes):
        padded[row, 11 - size :] = ids[row, :size]
        mask[row, 11 - size :] = 1
    want = torch.stack([greedily(model, ids[r : r + 1, :n])[0, n:] for r, n in enumerate(sizes)])
    for options in ({}, {"prefill_chunk_size": 3}, {"use_cache": False}):
        got = model.generate(
            padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options
        )
        assert torch.equal(got[:, 11:], want), options
    inferred = model.generate(padded, max_new_tokens=NEW, do_sample=False)  # from pad_token_id
    assert torch.equal(inferred[:, 11:], want)


def test_sampling_does_not_depend_on_the_cache(model, ids) -> None:
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        sampled.append(
            model.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=20, use_cache=use_cache)
        )
    assert torch.equal(*sampled)
    assert not torch.equal(sampled[0], greedily(model, ids))


def test_beams_do_not_depend_on_the_cache(model, ids) -> None:
    """Beam search reorders the cache at every step; without a cache there is nothing to reorder."""
    options = {"max_new_tokens": NEW, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for attention_mask in (None, mask):
        want = model.generate(ids, attention_mask=attention_mask, use_cache=False, **options)
        got = model.generate(ids, attention_mask=attention_mask, **options)
        assert torch.equal(got, want)


def test_second_turn(model, ids) -> None:
    """The whole conversation again with the cache of the first turn, as chat programs do."""
    first = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, SubquadCache)
    assert cache.get_seq_length() == 11 + NEW - 1  # the last token is yet to be read
    conversation = torch.cat([first.sequences, ids[:, :5]], dim=1)
    want = greedily(model, conversation)
    ways: list[dict] = [{}]
    if Version(transformers.__version__) >= Version("5.23"):
        # Before (seen in 5.17) it cut the mask as if nothing had been read; we refuse such a mask.
        ways.append({"prefill_chunk_size": 2})
    for options in ways:
        got = model.generate(
            conversation,
            past_key_values=copy.copy(cache),
            max_new_tokens=NEW,
            do_sample=False,
            **options,
        )
        assert torch.equal(got, want)


def test_second_turn_with_padding(model, ids) -> None:
    """Unequal first prompts and unequal second ones: padding in the middle of the conversation."""
    prompts, replies = ids[:2, :7], ids[1:, :4]
    mask = torch.ones(2, 7 + NEW + 4, dtype=torch.long)
    mask[1, :3] = 0
    mask[0, 7 + NEW : 7 + NEW + 2] = 0
    first = model.generate(
        prompts,
        attention_mask=mask[:, :7],
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
    )
    conversation = torch.cat([first.sequences, replies], dim=1)
    got = model.generate(
        conversation,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=NEW,
        do_sample=False,
    )
    for row in range(2):
        real = conversation[row : row + 1, mask[row].bool()]
        assert torch.equal(got[row, -NEW:], greedily(model, real)[0, -NEW:])


def test_one_prompt_many_continuations(ids) -> None:
    """A shared prefix is read once and repeated for several answers."""
    model = build(HYBRID)
    cache = model(ids[:1, :8], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    prompts = torch.cat([ids[:1, :8].expand(3, -1), ids[:, 8:]], dim=1)
    got = model.generate(prompts, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, greedily(model, prompts))


def test_memory_of_linear_rows_does_not_grow(ids) -> None:
    model = build(["gated_deltanet", "mamba2"])
    sizes = [
        model.generate(
            ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True
        ).past_key_values.nbytes
        for new in (2, 40)
    ]
    assert sizes[0] == sizes[1] > 0


def test_what_is_refused(ids) -> None:
    model = build(HYBRID)
    with pytest.raises(ValueError, match="past_key_values: got DynamicCache"):
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation: got 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=2)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"input_ids: got shape .* the whole text"):
        model.generate(ids[:, :2], past_key_values=cache, max_new_tokens=2)
