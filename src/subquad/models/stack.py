"""The stack: embedding, blocks and norm; tokens in, hidden states out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from subquad.decode.cpu.decoder import Decoder
from subquad.engines.runtime.validation import check_tensor
from subquad.errors import fail
from subquad.layers.norms import at_least_float32, normed
from subquad.mixers import MIXERS
from subquad.mixers.base import Mixer, State
from subquad.models.arguments import check_known, positions_from
from subquad.models.block import Block
from subquad.models.cache import SubquadCache
from subquad.models.config import SubquadConfig
from subquad.models.folder import check_model, save_whole
from subquad.models.packing import Packing, check_past, pack, pack_given
from subquad.models.start import draw_missing, float32_names
from subquad.models.tokens import embed


class SubquadPreTrainedModel(PreTrainedModel):
    """What transformers must know of our models."""

    config_class = SubquadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    # Assisted decoding must take tokens back, which a recurrent state cannot.
    _is_stateful = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: our initialisation leaves loaded weights alone, as that of built-in models does.

        Of code that it takes for custom, transformers initialises no module without parameters of
        its own; most mixers have none, only their projections do.
        """
        return False

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', but a local folder is checked first, and pickles are never loaded.

        With `ignore_mismatched_sizes=True` it is not: what fits is loaded, the rest drawn.

        Raises:
            ValueError: naming the file or the tensor that is missing or is not as it was saved, or
                the family of a folder that is not ours.
        """
        path = pretrained_model_name_or_path
        folder = Path(path or "", kwargs.get("subfolder", ""))
        others = ("gguf_file", "variant", "state_dict", "ignore_mismatched_sizes")
        plain = path is not None and not any(kwargs.get(name) for name in others)
        if plain and (folder / "config.json").exists():
            check_model(folder, cls, kwargs.get("config"))
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        return super().from_pretrained(path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', but wholly or not at all, and with SHA256SUMS."""
        shared = args or any(kwargs.get(n) for n in ("push_to_hub", "distributed_checkpoint"))
        adapters = getattr(self, "_hf_peft_config_loaded", False)
        if shared or adapters or not kwargs.get("is_main_process", True):
            super().save_pretrained(save_directory, *args, **kwargs)
        else:
            write = partial(super().save_pretrained, **kwargs)
            save_whole(Path(save_directory), write)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Mixer):
            draw_missing(module, self.config.num_hidden_layers, module.shrunk_by_depth)
        elif getattr(module, "starts_itself", False):
            draw_missing(module, self.config.num_hidden_layers)
        elif isinstance(module, Block):
            module.mark_undecayed()
        else:
            super()._init_weights(module)


class SubquadModel(SubquadPreTrainedModel):
    """Tokens in, hidden states out.

    Rows of a batch may be padded anywhere (`attention_mask`), hold several texts one after
    another (`position_ids` that restart at 0, or `cu_seqlens`), and go on from where an earlier
    call stopped (`past_key_values`), by any number of tokens: the result is what each text alone
    would give.
    """

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, index) for index in range(config.num_hidden_layers)]
        first, last = blocks[0].layout, blocks[-1].layout
        own = first.embed_norm
        self.embed_norm = first.make_norm(config.hidden_size, config.norm_eps) if own else None
        self.shared = nn.ModuleDict(_shared_modules(config))
        self.layers = nn.ModuleList(blocks)
        self.norm = last.make_norm(config.hidden_size, config.norm_eps)
        self._keep_in_fp32_modules_strict = float32_names(blocks)
        self.gradient_checkpointing = False
        self.decoder = Decoder()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SubquadCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the stack.

        Args:
            input_ids: [B,T] int; or inputs_embeds [B,T,hidden].
            attention_mask: [B,T], or [B,past+T] with the past's columns; 1 for tokens, 0 for
                padding, which no token sees and whose outputs are zero.
            position_ids: [B,T] or [1,T]; see `packing.pack`. They only mark where texts start.
            past_key_values: where an earlier call stopped. It is moved on in place, unless
                use_cache is False.
            use_cache: return the cache; by default, when one came in, or when not training.
            cu_seqlens: [N+1] int, the bounds of N texts laid end to end (B = 1); 0 first, T last.
                The cache then has N sequences. (transformers' `cu_seq_lens_q` will do too.)
            seq_idx: [B,T] int, the text that each token belongs to, as Mamba's models take it: a
                text starts wherever it changes. In place of position_ids, and without a past.
            output_hidden_states: also return every block's input and the final output.

        Raises:
            ValueError: naming the argument that does not fit, and the fix.
        """
        check_known(kwargs)
        x = self._embed(input_ids, inputs_embeds)
        if seq_idx is not None:
            position_ids = positions_from(seq_idx, x.shape[:2], position_ids, past_key_values)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        cache = _check_cache(past_key_values, len(self.layers))
        bounds = cu_seqlens if cu_seqlens is not None else kwargs.get("cu_seq_lens_q")
        rows = x.shape[0] if bounds is None else len(bounds) - 1
        cache.check_batch(rows)
        packings = _plan(x.shape[0], x.shape[1], attention_mask, position_ids, bounds, cache)
        if packings is None:
            hidden, states = self._run(x, cache.states, None, output_hidden_states)
            if use_cache:
                cache.advance(states, rows, x.shape[1], x.device)
        else:
            hidden, results = self._run_packed(x, cache.states, packings, output_hidden_states)
            if use_cache:
                columns = x.shape[1] if bounds is None else None
                cache.advance_packed(results, rows, columns, x.device)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The residual stream's start, [B,T,hidden]."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "both" if input_ids is not None else "neither"
            raise fail("input_ids, inputs_embeds", got, "exactly one of the two", "leave one out")
        if inputs_embeds is None:
            name, x = "input_ids", embed(self.embed_tokens, input_ids, self.config.vocab_size)
        else:
            name, layout = "inputs_embeds", f"[B, T, {self.config.hidden_size}]"
            x = check_tensor(name, inputs_embeds, 3, layout)
            if x.shape[2] != self.config.hidden_size:
                fix = "they go where the model's own embeddings of its tokens would"
                raise fail(name, f"shape {tuple(x.shape)}", layout, fix)
        if x.shape[1] == 0:
            raise fail(
                name,
                f"shape {tuple(x.shape[:2])}",
                "[B, T] with T >= 1",
                "with a cache that holds the past, give the tokens after it; to generate(), the "
                "whole text, or an attention_mask over it",
            )
        if self.embed_norm is not None:
            x = normed(self.embed_norm, x)
        return at_least_float32(x) if self.config.residual_in_fp32 else x

    def _run(
        self, x: Tensor, past: list[State | None], cu_seqlens: Tensor | None, keep_all: bool
    ) -> tuple[list[Tensor], list[State]]:
        """Run all blocks: each block's input (if keep_all) and the output; each layer's state."""
        modules = dict(self.shared.items())
        shared = [modules.get(row) for row in self.config.rows]
        self._refuse_reentrant(past)
        if cu_seqlens is None and not keep_all:
            decoded = self.decoder(self.layers, self.norm, x, past, shared)
            if decoded is not None:
                return [decoded[0]], decoded[1]
        hidden, states = [], []
        carried: dict[str, Tensor] = {}
        for block, state, module in zip(self.layers, past, shared):
            if keep_all:
                hidden.append(x)
            x, state, carried = block(x, state, cu_seqlens, carried, module)
            states.append(state)
        return [*hidden, normed(self.norm, x)], states

    def _refuse_reentrant(self, past: list[State | None]) -> None:
        """Reentrant checkpointing follows no tensor inside a dict: gradients through states, or
        through what layers carry to later ones, would be lost without a word."""
        if not (self.training and torch.is_grad_enabled() and self.gradient_checkpointing):
            return
        checkpoint = getattr(self.layers[0], "_gradient_checkpointing_func", None)
        if not getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            return
        tensors = [t for state in past if state is not None for t in state.values()]
        carries = any(getattr(block.mixer, "carries", ()) for block in self.layers)
        if carries or any(t.requires_grad for t in tensors):
            raise fail(
                "use_reentrant",
                True,
                "False where gradients flow through states or from layer to layer",
                'gradient_checkpointing_enable({"use_reentrant": False})',
            )

    def _run_packed(
        self, x: Tensor, past: list[State | None], packings: list[Packing], keep_all: bool
    ) -> tuple[list[Tensor], list[tuple[Packing, list[State]]]]:
        """Run each packing, and put its outputs where its tokens were, among zeros."""
        results = []
        dtype: Any = self.norm.weight.dtype
        inputs = [torch.zeros_like(x)] * (len(self.layers) if keep_all else 0)
        out = [*inputs, torch.zeros_like(x, dtype=dtype)]
        for packing in packings:
            initial = [packing.initial(state) for state in past]
            hidden, states = self._run(packing.gather(x), initial, packing.cu_seqlens, keep_all)
            out = [packing.scatter(h, into) for h, into in zip(hidden, out)]
            results.append((packing, states))
        return out, results


def _shared_modules(config: SubquadConfig) -> dict[str, nn.Module]:
    """What the layers of each row share, by row; most share nothing."""
    found = {}
    for index, row in enumerate(config.rows):
        if row not in found:
            options = config.mixer_kwargs(index)
            found[row] = MIXERS[row].shared(config.hidden_size, config.num_hidden_layers, **options)
    return {row: module for row, module in found.items() if module is not None}


def _check_cache(cache: object, num_layers: int) -> SubquadCache:
    """The cache that came in, or a new one."""
    if cache is None:
        return SubquadCache(num_layers)
    if not isinstance(cache, SubquadCache):
        name = type(cache).__name__
        raise fail("past_key_values", name, "a SubquadCache", "pass None, or what came back")
    if len(cache) != num_layers:
        got = f"a cache of {len(cache)} layers"
        raise fail("past_key_values", got, f"{num_layers}, as this model has", "pass None")
    return cache


def _plan(
    batch: int,
    length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    bounds: Tensor | None,
    cache: SubquadCache,
) -> list[Packing] | None:
    """How the call's tokens divide into sequences; None if its rows are just that."""
    known = (cache.lengths, cache.has_empty_rows)
    if bounds is not None:
        return pack_given(bounds, batch, length, attention_mask, position_ids, *known)
    past = cache.get_seq_length()
    check_past(attention_mask, length, past, cache.read)
    return pack(batch, length, attention_mask, position_ids, past, *known)
