"""The recurrences: what they are (reference, spec, table) and how they are computed (forms)."""

from subquad.recurrence.api import Explanation, explain, linear_recurrence
from subquad.recurrence.convolution import short_convolution
from subquad.recurrence.reference import Delta, LowRank
from subquad.recurrence.spec import Recurrence

__all__ = [
    "Delta",
    "Explanation",
    "LowRank",
    "Recurrence",
    "explain",
    "linear_recurrence",
    "short_convolution",
]
