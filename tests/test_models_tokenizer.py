"""Bytes in, bytes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from subquad.models import ByteTokenizer, SubquadConfig

TOKENIZER = ByteTokenizer()
HARD = ["", " ", "  two\n\n\tthree ", "é\u00ad\u0301 \U0001f600", "\x00\x7f\x80ÿ", "<|eos|><|pad|>"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def check(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@given(st.text(st.characters(codec="utf-8")))
def test_every_text_comes_back(text) -> None:
    check(TOKENIZER, text)


@pytest.mark.parametrize("text", HARD)
def test_loaded_tokenizer_does_the_same(loaded, text) -> None:
    check(TOKENIZER, text)
    check(loaded, text)


def test_every_byte_is_its_own_token(loaded) -> None:
    for tokenizer in (TOKENIZER, loaded):
        assert len(tokenizer) == SubquadConfig().vocab_size == 259
        letters = tokenizer.convert_ids_to_tokens(list(range(256)))
        assert len(set(letters)) == 256
        assert tokenizer.decode([0xC3, 0xA9, 0xFF]) == "é\ufffd"


def test_special_tokens(loaded) -> None:
    config = SubquadConfig()
    for tokenizer in (TOKENIZER, loaded):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(tokenizer, name) == getattr(config, name) >= 256
        ids = [*b"ab", tokenizer.eos_token_id]
        assert tokenizer.decode(ids) == "ab<|eos|>"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_batches_are_padded_on_the_left(loaded) -> None:
    for tokenizer in (TOKENIZER, loaded):
        batch = tokenizer(["abc", "d"], padding=True)
        assert batch["input_ids"] == [[97, 98, 99], [258, 258, 100]]
        assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
        assert set(batch) == {"input_ids", "attention_mask"}


def test_from_pretrained_of_the_class_itself(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    check(ByteTokenizer.from_pretrained(tmp_path), HARD[3])
