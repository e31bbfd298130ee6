"""The recurrences: what they are (reference, spec, table) and how they are computed (forms)."""

from subquad.recurrence.api import explain, linear_recurrence
from subquad.recurrence.convolution import short_convolution
from subquad.recurrence.diagonal import selective_scan
from subquad.recurrence.explanation import Explanation, watch
from subquad.recurrence.lti import diagonal_ssm
from subquad.recurrence.reference import Delta, LowRank
from subquad.recurrence.spec import Recurrence
from subquad.recurrence.table import ROWS, Row

__all__ = [
    "ROWS",
    "Delta",
    "Explanation",
    "LowRank",
    "Recurrence",
    "Row",
    "diagonal_ssm",
    "explain",
    "linear_recurrence",
    "selective_scan",
    "short_convolution",
    "watch",
]
