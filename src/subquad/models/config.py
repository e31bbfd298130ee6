"""What a subquad language model is made of, as a transformers configuration."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from subquad.errors import fail
from subquad.layers.block_layout import BlockLayout
from subquad.layers.channel_mixers import CHANNEL_MIXERS
from subquad.mixers import MIXERS
from subquad.mixers.base import Depth, Mixer, takes_depth
from subquad.models.tokenizer import BOS, EOS, PAD, VOCAB_SIZE

_MOST_LAYERS = 1 << 16


class SubquadConfig(PreTrainedConfig):
    """The shape of a `SubquadForCausalLM`: which rows of the table, how wide, how deep.

    Args:
        vocab_size: tokens. The default, 259, is `ByteTokenizer`'s: 256 bytes, bos, eos, pad.
        hidden_size: channels of the residual stream.
        num_hidden_layers: blocks, all of the row `mixer`. Overridden by `layers`.
        mixer: the row's name, one of `subquad.mixers.MIXERS`.
        layers: the row of each block, for hybrids: `["mamba2", "mamba2", "softmax_attention"]`. A
            row may bring options for its layer: `[("gla", {"num_heads": 8}), "gla"]`.
        mixer_options: `{row: {keyword: value}}`, handed to that row's constructor; what is left
            out is as published.
        block: what to change of the rows' published blocks, by the fields of `BlockLayout`:
            `{"norm": "layer", "channel_mixer": "gelu"}`.
        intermediate_size: channels inside the channel mixer beside each mixer. None takes its
            default (of the usual SwiGLU 8/3 of hidden_size, rounded up to a multiple of 32), and
            none beside rows that mix channels themselves (`has_channel_mixing`); 0 takes none
            anywhere; a number takes it everywhere.
        norm_eps: added to the mean square in every RMSNorm of the blocks.
        residual_in_fp32: keep the sum over blocks in float32 whatever dtype the weights have.
        tie_word_embeddings: the read-out shares the embedding's weights.
        initializer_range: standard deviation of embeddings and MLPs at the start; mixers start as
            published.
        use_cache: return a `SubquadCache`, except in training or where a call says otherwise.
        bos_token_id, eos_token_id, pad_token_id: None means `ByteTokenizer`'s when vocab_size is
            259, and none otherwise.

    Raises:
        ValueError: an unknown row, an option that the row does not take, sizes that do not fit,
            or an argument that is probably a misspelt one of these.
    """

    model_type = "subquad"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    num_hidden_layers: int = 4
    mixer: str = "gated_deltanet"
    layers: list[Any] | None = None
    mixer_options: dict[str, dict[str, Any]] | None = None
    block: dict[str, Any] | None = None
    intermediate_size: int | None = None
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        own = list(SubquadConfig.__annotations__)
        for name in kwargs:
            _refuse_misspelling(name, own)
            _refuse_mixer_option(name, self.mixer)
        if self.layers is not None:
            if not isinstance(self.layers, list | tuple) or not self.layers:
                raise fail(
                    "layers",
                    repr(self.layers),
                    "a list with one row name a block",
                    'for example layers=["mamba2", "softmax_attention"]',
                )
            self.layers = [list(x) if isinstance(x, tuple) else x for x in self.layers]
            for position, layer in enumerate(self.layers):
                _check_layer(position, layer)
            self.num_hidden_layers = len(self.layers)
        if self.vocab_size == VOCAB_SIZE:
            ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
            for name, value in ids.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        super().__post_init__(**kwargs)
        self._check_sizes()
        self._check_token_ids()
        self._check_mixers()

    @property
    def rows(self) -> list[str]:
        """The row of each block, from the first."""
        if not self.layers:
            return [self.mixer] * self.num_hidden_layers
        return [layer if isinstance(layer, str) else layer[0] for layer in self.layers]

    def mixer_kwargs(self, index: int) -> dict[str, Any]:
        """The options that the mixer of this layer is built with."""
        options = (self.mixer_options or {}).get(self.rows[index], {})
        layer = self.layers[index] if self.layers else ""
        return options if isinstance(layer, str) else options | layer[1]

    def make_mixer(self, index: int) -> Mixer:
        """The mixer of this layer."""
        cls, options = MIXERS[self.rows[index]], self.mixer_kwargs(index)
        if takes_depth(cls):
            options = options | {"depth": Depth(index, self.num_hidden_layers)}
        return cls(self.hidden_size, **options)

    def layout(self, index: int) -> BlockLayout:
        """How the block of this layer is put together."""
        published = MIXERS[self.rows[index]].layout
        return replace(published, **self.block) if self.block else published

    def mlp_size(self, index: int) -> int:
        """Inner channels of the channel mixer in this layer; 0 for none."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if MIXERS[self.rows[index]].has_channel_mixing:
            return 0
        return CHANNEL_MIXERS[self.layout(index).channel_mixer].default_size(self.hidden_size)

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            _check_integer(name, getattr(self, name), at_least=1)
        if self.num_hidden_layers > _MOST_LAYERS:  # a config may come from anywhere
            raise fail(
                "num_hidden_layers",
                self.num_hidden_layers,
                f"at most {_MOST_LAYERS}",
                "count again",
            )
        if self.intermediate_size is not None:
            _check_integer("intermediate_size", self.intermediate_size, at_least=0)
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise fail(name, repr(value), "a number above 0", "the default suits most models")

    def _check_token_ids(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list | tuple) else [value]:
                known = isinstance(token, int) and 0 <= token < self.vocab_size
                if token is not None and not known:
                    raise fail(
                        name,
                        repr(value),
                        f"None or a token below vocab_size = {self.vocab_size}",
                        "take it from the tokenizer that vocab_size was taken from",
                    )

    def _check_mixers(self) -> None:
        argument = "layers" if self.layers else "mixer"
        for row in self.rows:
            own = "a row of your own is known once the module that registers it is imported"
            _check_choice(argument, row, MIXERS, hint=own)
        if self.mixer_options is not None and not isinstance(self.mixer_options, dict):
            raise fail(
                "mixer_options",
                repr(self.mixer_options),
                "a dict of dicts",
                'mixer_options={"gla": {"num_heads": 4}}',
            )
        for row, options in (self.mixer_options or {}).items():
            form = 'the form is mixer_options={"gla": {"num_heads": 4}}'
            _check_choice("mixer_options", row, MIXERS, hint=form)
            if row not in self.rows:
                raise fail(
                    "mixer_options",
                    f"options for {row!r}",
                    f"rows of this model: {sorted(set(self.rows))}",
                    "leave out what no layer uses",
                )
            if not isinstance(options, dict):
                raise fail(f"mixer_options[{row!r}]", repr(options), "a dict", '{"num_heads": 4}')
            for option, value in options.items():
                check_mixer_option(row, option, value)
        for index, layer in enumerate(self.layers or []):
            for option, value in ({} if isinstance(layer, str) else layer[1]).items():
                check_mixer_option(self.rows[index], option, value)
        if self.block is not None:
            fields = tuple(field.name for field in dataclass_fields(BlockLayout))
            if not isinstance(self.block, dict):
                raise fail("block", repr(self.block), "a dict of BlockLayout's fields", "{...}")
            for name in self.block:
                _check_choice("block", name, fields)
            self.layout(0)  # which looks at the values
        seen = []
        for index, row in enumerate(self.rows):
            kind = (row, self.mixer_kwargs(index))
            if kind not in seen:
                self._check_mixer_builds(index)
                seen.append(kind)

    def _check_mixer_builds(self, index: int) -> None:
        """Let the mixer itself judge its sizes, on the meta device, where that costs nothing."""
        try:
            with torch.device("meta"):
                self.make_mixer(index)
        except ValueError as error:
            row = self.rows[index]
            raise ValueError(f"{row} with hidden_size={self.hidden_size}: {error}") from error


_OF_MODELS = ("depth",)  # keywords of constructors that the model passes, not the user


def mixer_option_defaults(row: str) -> dict[str, Any]:
    """The keywords that a row's constructor takes, its parents' included where it hands them on."""
    defaults: dict[str, Any] = {}
    for cls in MIXERS[row].__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        own = {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in _OF_MODELS
        }
        defaults = own | defaults
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return defaults


def check_mixer_option(row: str, option: str, value: object) -> None:
    """ValueError unless the row takes the option, and the value fits its default: true or false,
    or a number.

    Any text is true to Python, and so would switch on what it was meant to switch off.
    """
    name = f"mixer_options[{row!r}]"
    defaults = mixer_option_defaults(row)
    _check_choice(name, option, defaults)
    default = defaults[option]
    if isinstance(default, bool) and not isinstance(value, bool):
        raise fail(f"{name}[{option!r}]", repr(value), "True or False", f"the default is {default}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float) and not is_number:
        raise fail(f"{name}[{option!r}]", repr(value), "a number", f"the default is {default}")


def _check_layer(position: int, layer: object) -> None:
    """A row's name, or it and options."""
    pair = isinstance(layer, list) and len(layer) == 2
    if not isinstance(layer, str) and not (
        pair and isinstance(layer[0], str) and isinstance(layer[1], dict)  # type: ignore[index]
    ):
        expected = "a row's name, or a pair (name, options)"
        fix = 'for example layers=[("gla", {"num_heads": 8}), "softmax_attention"]'
        raise fail(f"layers[{position}]", repr(layer), expected, fix)


def _check_integer(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise fail(name, repr(value), f"an integer of at least {at_least}", "count again")


def _check_choice(name: str, value: object, choices: Iterable[str], hint: str = "") -> None:
    choices = list(choices)
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=3)
    fix = f"perhaps {' or '.join(map(repr, close))}" if close else "pick one of these"
    if hint:
        fix += f"; {hint}"
    raise fail(name, repr(value), f"one of {', '.join(choices) or 'nothing (it takes none)'}", fix)


def _refuse_mixer_option(name: str, mixer: str) -> None:
    """What a row's constructor takes does nothing here: transformers would only store it."""
    if any(name in mixer_option_defaults(row) for row in MIXERS):
        fix = f"write mixer_options={{{mixer!r}: {{{name!r}: ...}}}}"
        raise fail(name, "an option of mixers", "options of the model", fix)


def _refuse_misspelling(name: str, own: list[str]) -> None:
    """transformers keeps any argument it does not know; one that is nearly ours is a mistake."""
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
    if close:
        raise fail(name, "an argument of that name", f"{close[0]!r}", f"write {close[0]}")
