"""From a config to a model on a device."""

from typing import Any

import torch

from subquad.train.config import TrainConfig


def build_model(config: TrainConfig, tokenizer: Any) -> Any:
    """A SubquadForCausalLM with random weights; its vocabulary is the tokenizer's unless given."""
    from subquad.models import SubquadConfig, SubquadForCausalLM

    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    keywords = {"vocab_size": len(tokenizer), **special, **config.model_keywords}
    if keywords["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"model: vocab_size is {keywords['vocab_size']}, but the tokenizer has "
            f"{len(tokenizer)} ids"
        )
    return SubquadForCausalLM(SubquadConfig.from_dict(keywords))


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else None
