"""The model of a row on a task: from its inputs to its answers.

B sequences   T positions   D hidden channels   n positions at which something is asked
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from subquad.engines.cross_entropy.api import cross_entropy
from subquad.models import SubquadCache, SubquadConfig, SubquadForCausalLM
from subquad.tasks.base import Task


class TaskModel(nn.Module):
    """`SubquadForCausalLM` for tokens; for signals its blocks between two linear maps.

    Args:
        task: gives the vocabulary or the channels.
        keywords: of SubquadConfig, without the vocabulary.
    """

    def __init__(self, task: Task, **keywords: Any) -> None:
        super().__init__()
        config = SubquadConfig(vocab_size=max(1, task.vocab_size), **keywords)
        language = SubquadForCausalLM(config)
        self.body = language.model
        self.encoder: nn.Module | None = None
        self.head: nn.Module = language.lm_head
        if task.channels:
            self.encoder = nn.Linear(task.channels, config.hidden_size)
            self.head = nn.Linear(config.hidden_size, 1)
            del self.body.embed_tokens  # nothing reads it, so it must not count

    def hidden(self, inputs: Tensor, cache: SubquadCache | None, keep: bool) -> tuple[Tensor, Any]:
        """The last hidden states [B,T,D] and, with `keep`, the cache to go on from."""
        given = {"input_ids": inputs}
        if self.encoder is not None:
            given = {"inputs_embeds": self.encoder(inputs)}
        output = self.body(**given, past_key_values=cache, use_cache=keep)
        return output.last_hidden_state, output.past_key_values

    def answer(self, hidden: Tensor, where: Tensor) -> Tensor:
        """The answers, [n,vocabulary] or [n], at these n of the B*T positions of [B,T,D]."""
        said = self.head(hidden.flatten(0, 1).index_select(0, where)).float()
        return said if self.encoder is None else said[:, 0]

    def loss(self, inputs: Tensor, where: Tensor, due: Tensor) -> Tensor:
        """Mean cross entropy (nats) or squared error of what is due, [n], at places [n] of B*T."""
        hidden, _ = self.hidden(inputs, None, keep=False)
        return losses(self.answer(hidden, where), due).mean()


def losses(said: Tensor, due: Tensor) -> Tensor:
    """Of each answer [n]: cross entropy in nats for tokens, squared error for numbers."""
    if due.is_floating_point():
        return (said - due).square()
    return cross_entropy(said, due)
