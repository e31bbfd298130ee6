"""Hyena: gates around a convolution whose filter a small network writes, as long as the sequence.

B batch   T time   S earlier tokens   D hidden channels   L lags
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from subquad.engines import long_convolution, short_convolution
from subquad.errors import fail
from subquad.layers.growing import append, end_together
from subquad.layers.initialization import no_weight_decay, set_
from subquad.layers.projection import project
from subquad.mixers.base import Mixer, State


class HyenaFilter(nn.Module):
    """h_l for each lag: a network of sines over features of l, times a window that decays.

    Poli et al. 2023 (arXiv:2302.10866, eq. 7 and appendix D.3): features are l / L and e^{i f l},
    windows decay at rates spread over the channels.

    Args:
        channels: D.
        width: of the network's hidden layers.
        bands: frequencies f among the features.
        max_length: lags that the features are scaled for; more are extrapolated.
    """

    def __init__(self, channels: int, width: int, bands: int, max_length: int) -> None:
        super().__init__()
        self.bands, self.max_length = bands, max_length
        sizes = (2 * bands + 1, width, width, width)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, channels, bias=False)
        self.frequency = no_weight_decay(nn.Parameter(torch.empty(width)))  # of the sines
        self.rate = no_weight_decay(nn.Parameter(torch.empty(channels)))  # of the windows
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Layers as PyTorch starts them, sines of frequency 1, windows that leave 1 % after 0.3 to
        1.5 of max_length."""
        for layer in (*self.layers, self.out):
            layer.reset_parameters()
        nn.init.ones_(self.frequency)
        slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
        set_(self.rate, torch.linspace(slow, fast, self.rate.shape[0]))

    def forward(self, length: int) -> Tensor:
        """[length,D] in the weights' dtype."""
        device, dtype = self.rate.device, self.out.weight.dtype
        lag = torch.arange(length, device=device, dtype=torch.float32)
        t = lag / max(1, self.max_length - 1)
        f = torch.linspace(1e-4, max(self.bands - 1, 1e-4), self.bands, device=device)
        angle = 2 * math.pi / self.max_length * lag[:, None] * f
        z = torch.cat([t[:, None], angle.cos(), -angle.sin()], -1).to(dtype)
        for layer in self.layers:
            z = (self.frequency * layer(z)).sin()
        return self.out(z) * (-t[:, None] * self.rate.abs()).exp().to(dtype)


class Hyena(Mixer):
    """Poli et al. 2023, "Hyena Hierarchy" (arXiv:2302.10866, definition 3.1, order 2).

        x0, x1, v = conv(W x)      z = h * (x1 . v) + bias x1 . v      y = Wo (x0 . z)

    conv is a short convolution, h the long filter. Decoding sums over all earlier tokens: the
    state grows with the sequence, and a token costs O(T).

    State: conv [B,W-1,3D] and past [B,S,D], what the long filter reads (rows of different lengths
    end together; before its first token a row holds zeros).

    Args:
        hidden_size: width of the input and output.
        conv_width: taps of the short convolution.
        filter_width: hidden channels of the network that writes the filter.
        filter_bands: frequencies among its features.
        max_length: tokens that the filter's features and windows are scaled for.
    """

    row = "hyena"
    state_names = ("conv", "past")
    growing = ("past",)

    def __init__(
        self,
        hidden_size: int,
        *,
        conv_width: int = 3,
        filter_width: int = 64,
        filter_bands: int = 1,
        max_length: int = 2048,
    ) -> None:
        super().__init__(
            hidden_size,
            conv_width=conv_width,
            filter_width=filter_width,
            filter_bands=filter_bands,
            max_length=max_length,
        )
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.conv_weight = nn.Parameter(torch.empty(3 * hidden_size, conv_width))
        self.conv_bias = no_weight_decay(nn.Parameter(torch.empty(3 * hidden_size)))
        self.filter = HyenaFilter(hidden_size, filter_width, filter_bands, max_length)
        self.bias = no_weight_decay(nn.Parameter(torch.empty(hidden_size)))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections as everywhere, the short convolution as PyTorch's, a normal bias."""
        super().reset_parameters()
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.normal_(self.bias)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        before = past.get("past")
        if before is not None and before.shape[2:] != (self.hidden_size,):
            got = f"shape {tuple(before.shape)}"
            raise fail("state['past']", got, f"[B,S,{self.hidden_size}]", "pass what it returned")
        u = project(self.in_proj, x)
        given = (u, self.conv_weight, self.conv_bias)
        u, conv = short_convolution(*given, state=past.get("conv"), cu_seqlens=cu_seqlens)
        x0, x1, v = u.chunk(3, dim=-1)
        w = x1 * v
        if cu_seqlens is None:
            z, kept = self._convolve(w, before)
        else:
            z, kept = self._convolve_packed(w, before, cu_seqlens)
        z = torch.addcmul(z, w, self.bias.to(w.dtype))
        return project(self.out_proj, x0 * z), {"conv": conv, "past": kept}

    def _convolve(self, w: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The long filter's outputs for w [B,T,D], and all that it may read later."""
        kept = w if before is None else append(before, w)
        return long_convolution(kept, self.filter(kept.shape[1]), w.shape[1]), kept

    def _convolve_packed(
        self, w: Tensor, before: Tensor | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each sequence by itself."""
        pieces = w.split(cu_seqlens.diff().tolist(), dim=1)
        own = [None] * len(pieces) if before is None else before.split(1)
        z, kept = zip(*(self._convolve(piece, past) for piece, past in zip(pieces, own)))
        return torch.cat(z, 1), end_together(kept)
