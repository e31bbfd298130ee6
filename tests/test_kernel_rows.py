"""How launchers of kernels find a tensor's tokens: one stride, and channels side by side."""

import math

import pytest
import torch

from subquad.backend.gpu.tensors import rows

x = torch.arange(2 * 5 * 3 * 4.0).view(2, 5, 3, 4)
SEEN = {  # tensors, how many of their axes hold the channels, and whether they are copied
    "whole": (x, 1, False),
    "heads": (x, 2, False),
    "all but a token": (x[:, :, 0], 1, False),
    "cut channels": (x[..., :2], 1, False),
    "cut channels of heads": (x[..., :2], 2, True),
    "cut heads": (x[:, :, 1:], 2, False),
    "cut heads, each a token": (x[:, :, 1:], 1, True),
    "cut tokens": (x[:, :3], 2, True),
    "cut tokens of one row": (x[:1, :3], 2, False),
    "every other token of one row": (x[:1, ::2], 2, False),
    "time first": (x.transpose(0, 1), 2, True),
    "time first, one row": (x[:1].transpose(0, 1), 2, False),
    "channels apart": (x.mT, 1, True),
    "one channel": (x[..., :1], 1, False),
    "one head": (x[:, :, 1:2], 2, False),
    "repeated": (x[:1, :1].expand(2, 5, 3, 4), 2, False),
    "a repeated row": (x[:1].expand(2, 5, 3, 4), 2, True),
    "one token": (x[0, 0], 2, False),
    "no token": (x[:, :0], 2, True),
}


@pytest.mark.parametrize("case", SEEN)
def test_tokens_lie_a_stride_apart(case):
    x, axes, copied = SEEN[case]
    found, stride = rows(x, axes)
    channels = math.prod(x.shape[-axes:])
    tokens = x.numel() // channels
    read = found.as_strided((tokens, channels), (stride, 1))
    assert torch.equal(read, x.reshape(tokens, channels))
    assert (found is not x) == copied
