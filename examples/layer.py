"""A layer: any cut of a sequence gives the same outputs, and the state never grows.

python examples/layer.py
"""

import torch

import subquad


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layer = subquad.mixers.GatedDeltaNet(hidden_size=128, num_heads=2)
    x = torch.randn(2, 300, 128)  # [B,T,hidden]

    whole, state = layer(x)  # all at once, in parallel, as in training

    past, pieces = None, []
    for piece in x.split([200, 99, 1], dim=1):  # in pieces, down to single tokens, as in decoding
        y, past = layer(piece, past)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)

    size = sum(tensor.nbytes for tensor in state.values())
    _, later = layer(torch.randn(2, 5000, 128), state)
    assert sum(tensor.nbytes for tensor in later.values()) == size
    print({name: tuple(tensor.shape) for name, tensor in state.items()})
    print(f"{size:,} bytes of state after 300 tokens, and as many after 5,300")

    with subquad.watch() as calls:  # what ran inside, and why
        layer(x)
    print(calls[-1])


if __name__ == "__main__":
    main()
