"""The engines: a reference specifies each operation, and equivalent forms of it run fast.

Each operation has a folder: `api.py` checks the arguments and chooses, `reference.py` is the
specification, `cpu.py` compiled code, `gpu.py` launches and `kernels.py` the Triton kernels.
"""

from subquad.engines.convolution.api import short_convolution
from subquad.engines.invariant.api import diagonal_ssm
from subquad.engines.invariant.long_convolution import long_convolution
from subquad.engines.matrix.api import explain, linear_recurrence
from subquad.engines.matrix.normalised import normalised_recurrence
from subquad.engines.matrix.reference import Delta, LowRank
from subquad.engines.runtime.explanation import Explanation, watch
from subquad.engines.selective.api import selective_scan
from subquad.engines.stabiliser.api import stabilise

__all__ = [
    "Delta",
    "Explanation",
    "LowRank",
    "diagonal_ssm",
    "explain",
    "linear_recurrence",
    "long_convolution",
    "normalised_recurrence",
    "selective_scan",
    "short_convolution",
    "stabilise",
    "watch",
]
