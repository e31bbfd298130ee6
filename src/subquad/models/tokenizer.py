"""Text as bytes: the tokenizer that needs no training, no download and no vocabulary file."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 259
_SETTINGS = {
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "pad_token": "<|pad|>",
    # generate() continues from the last column, so a batch of prompts must end together.
    "padding_side": "left",
    # Text that happens to spell "<|eos|>" is seven bytes of text, not the end of it.
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


class ByteTokenizer(PreTrainedTokenizerFast):
    """Token i is byte i of the text in UTF-8; 256, 257 and 258 are bos, eos and pad.

    `decode(encode(text)) == text` for every text. Nothing is added around it. Bytes that are not
    UTF-8 decode as U+FFFD. Saves and loads like any tokenizer; `AutoTokenizer` gives back one
    that does the same, also where subquad is not installed.
    """

    def __init__(self, **kwargs: Any) -> None:
        for name in ("tokenizer_object", "tokenizer_file", "backend"):
            kwargs.pop(name, None)  # from_pretrained passes these; there is only one byte tokenizer
        super().__init__(tokenizer_object=_byte_level(), **{**_SETTINGS, **kwargs})


def _byte_level() -> Tokenizer:
    """The byte-level alphabet of GPT-2 in the order of the bytes, and not one merge."""
    letters = _letters()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> list[str]:
    """The printable letter that ByteLevel writes for each byte: itself, or the next from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
