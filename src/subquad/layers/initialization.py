"""How parameters start: what `torch.nn.init` has no formula for."""

import math

import torch
from torch import Tensor, nn


def set_(parameter: nn.Parameter, value: Tensor) -> None:
    """Fill a parameter, unless transformers has just loaded it.

    While it loads a checkpoint transformers marks what it has loaded and makes `torch.nn.init`
    skip it; whatever is set by other means must check the mark itself.
    """
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(value)


def no_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter (a decay, a bias, a skip) that an optimiser should not pull to zero."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def set_step_size_(
    bias: nn.Parameter, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4
) -> None:
    """Fill a bias b such that the step size softplus(b) is log-uniform in [low, high].

    Gu and Dao 2023, "Mamba" (arXiv:2312.00752), section 3.6.
    """
    draw = torch.rand(bias.shape, device=bias.device)
    dt = torch.exp(math.log(low) + draw * (math.log(high) - math.log(low))).clamp(min=floor)
    set_(bias, dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt), exact for small dt


def set_log_uniform_(parameter: nn.Parameter, low: float, high: float) -> None:
    """Fill a parameter with log A, A uniform in [low, high], low > 0."""
    draw = torch.rand(parameter.shape, device=parameter.device)
    set_(parameter, torch.log(low + (high - low) * draw))
