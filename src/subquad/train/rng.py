"""torch's random state as text, so that a checkpoint needs no pickle."""

import base64

import torch
from torch import Tensor


def rng_state(device: torch.device) -> dict[str, str]:
    """The CPU's generator, and the device's if it has its own."""
    state = {"cpu": _text(torch.get_rng_state())}
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device))
    return state


def set_rng_state(state: dict[str, str], device: torch.device) -> None:
    """Inverse of `rng_state`. A run that moves to another kind of device keeps what applies."""
    torch.set_rng_state(_tensor(state["cpu"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
