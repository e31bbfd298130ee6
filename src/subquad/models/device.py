"""From `auto`, `cpu`, `cuda` ... to a device."""

import torch


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU. ValueError if this machine has no `name`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {name!r}, which this machine has not: {reason}") from None
    return device
