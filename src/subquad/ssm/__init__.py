"""Continuous time: linear systems, their memory, and filtering them out of noise.

StateSpace(A, B, C, D)     discretize, solve, frequency_response; then simulate and convolve
HiPPO("legs", N)           a memory of the whole past in N numbers; nplr and s4_kernel: its use
GaussianStateSpace(...)    a system with noise: filter, smooth, log_likelihood, sample
"""

from subquad.ssm.cauchy import s4_kernel
from subquad.ssm.continuous import StateSpace
from subquad.ssm.discrete import DiscreteStateSpace
from subquad.ssm.discretize import zero_order_hold
from subquad.ssm.gaussian import GaussianStateSpace
from subquad.ssm.hippo import HiPPO
from subquad.ssm.initial import poles
from subquad.ssm.kalman import Filtered, Smoothed
from subquad.ssm.legendre import legs, legt, lmu
from subquad.ssm.matrix import DPLR, Diagonal
from subquad.ssm.nplr import NPLR, nplr

__all__ = [
    "DPLR",
    "NPLR",
    "Diagonal",
    "DiscreteStateSpace",
    "Filtered",
    "GaussianStateSpace",
    "HiPPO",
    "Smoothed",
    "StateSpace",
    "legs",
    "legt",
    "lmu",
    "nplr",
    "poles",
    "s4_kernel",
    "zero_order_hold",
]
