"""The language model: the stack and a read-out; one class for every mix of rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from subquad.decode.gpu.graph import replay as replay_step
from subquad.errors import fail
from subquad.layers.projection import is_watched, project
from subquad.mixers.base import State
from subquad.models.cache import SubquadCache
from subquad.models.config import SubquadConfig
from subquad.models.loss import loss_of
from subquad.models.stack import SubquadModel, SubquadPreTrainedModel
from subquad.models.tokens import check_labels

_FORWARD = SubquadModel.forward


class SubquadForCausalLM(SubquadPreTrainedModel, GenerationMixin):
    """`SubquadModel` and a read-out over the vocabulary, for training and `generate()`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        self.model = SubquadModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SubquadCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        replay: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with labels the mean cross-entropy of the next token.

        Arguments not named here are `SubquadModel.forward`'s.

        Args:
            labels: [B,T]; shifted inside, so pass input_ids. -100 takes a position out of the
                loss. Only the labels decide what counts: set -100 at padding and at the first
                token of each packed text, as transformers' collators do, or the model is also
                asked to guess a text's start from the end of another.
            logits_to_keep: logits of the last n positions only (0 for all), or of the positions
                in a 1-D tensor.
            replay: this is one step of many, as in generate(): if it is one token a sequence, on a
                GPU, and all states have a constant size, replay it as a captured CUDA graph. The
                cache's states are then overwritten by the next step; `copy.copy(cache)` keeps them.
            kwargs: for the loss, such as the Trainer's `num_items_in_batch`.
        """
        if replay and not (output_hidden_states or self.config.output_hidden_states):
            others = (attention_mask, position_ids, inputs_embeds, labels, cu_seqlens, seq_idx)
            plain = use_cache is not False and all(x is None for x in others)
            if plain and isinstance(past_key_values, SubquadCache) and input_ids is not None:
                logits = self._replay(input_ids, past_key_values)
                if logits is not None:
                    return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            seq_idx=seq_idx,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        if not isinstance(logits_to_keep, int):
            last: slice | Tensor = logits_to_keep
        elif logits_to_keep < 0:
            fix = "give how many of the last positions to keep"
            raise fail("logits_to_keep", logits_to_keep, "0 (all) or more, or positions", fix)
        else:
            last = slice(-logits_to_keep, None)
        logits = project(self.lm_head, outputs.last_hidden_state[:, last])
        loss = None
        if labels is not None:
            labels = check_labels(labels, logits.shape[:-1], self.config.vocab_size)
            loss = loss_of(self, logits, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _replay(self, tokens: Tensor, cache: SubquadCache) -> Tensor | None:
        """Not where `step` would skip something added to the stack, nor with a wrong cache."""
        if type(self.model).forward is not _FORWARD or is_watched(self.model):
            return None
        return replay_step(self, tokens, cache) if len(cache) == len(self.model.layers) else None

    def step(self, tokens: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Logits [B,1,vocabulary] of tokens [B,1] after `states`, and the next states, by layer."""
        x = self.model._embed(tokens, None)
        hidden, states = self.model._run(x, list(states), None, False)
        return self.lm_head(hidden[-1]), states

    # generate() reads in this signature that inputs_embeds are understood.
    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SubquadCache | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        decoding = next_sequence_length == 1 and not is_first_iteration
        if decoding and past_key_values is not None:
            # The padding is behind us: new tokens are real in every row, so spare the look.
            inputs["attention_mask"] = None
            inputs["replay"] = True
        return inputs

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: positions are counted from the tokens, and need no checking if none are given."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise fail(
                "cache_implementation",
                repr(kind),
                "None",
                "leave it out: a SubquadCache is all it needs",
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SubquadCache(self.config.num_hidden_layers)
