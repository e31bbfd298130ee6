"""A state space: one system as a recurrence and as a convolution, and a state that remembers.

python examples/state_space.py
"""

import math

import torch

from subquad.ssm import HiPPO, StateSpace


def main() -> None:
    # A mass on a spring, pushed by u, sampled every 50 ms.
    spring = StateSpace(A=[[0.0, 1.0], [-4.0, -0.4]], B=[[0.0], [1.0]], C=[[1.0, 0.0]])
    digital = spring.discretize(0.05)
    torch.manual_seed(0)
    u = torch.randn(400, 1, dtype=torch.float64)
    stepped, _ = digital.simulate(u)  # step by step, as an RNN decodes
    convolved = digital.convolve(u)  # all at once, as S4 trains
    assert torch.allclose(stepped, convolved)
    print(f"recurrence and convolution differ by {(stepped - convolved).abs().max():.1e}")

    # HiPPO: 64 numbers that hold all of the past, at any time.
    t = torch.arange(1000, dtype=torch.float64) / 1000
    signal = torch.sin(2 * math.pi * 7 * t * t)  # a rising tone
    memory = HiPPO("legs", N=64)
    c = memory.project(signal)  # [1000,64], the state after every sample
    for end in (250, 1000):
        error = (memory.reconstruct(c[end - 1], end) - signal[:end]).abs().max()
        assert error < 0.01
        print(f"the first {end} samples, from 64 numbers: off by at most {error:.1e}")


if __name__ == "__main__":
    main()
