"""AdamW as language models use it, its schedule, and its state as plain named tensors."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from subquad.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices only.

    Vectors (biases, norms, D, dt_bias) and what a mixer marks `_no_weight_decay` (A_log) are
    exempt: pulling a decay rate to zero is not a prior, it is another model.
    """
    matrices: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            (exempt if free else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in (*matrices, *exempt)) or None
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=fused
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of step 0, 1, ...: linear warmup to `lr`, then half a cosine down to `min_lr_ratio * lr`."""
    warmup = config.warmup_steps
    if warmup is None:
        warmup = min(200, config.steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name:slot` -> tensor, fit for safetensors."""
    return {
        f"{name}:{slot}": value.contiguous()
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, slot = key.rsplit(":", 1)
        slots.setdefault(name, {})[slot] = value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Any] = {i: slots[name] for i, name in enumerate(ordered) if name in slots}
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
