"""The table: every published row, by family. A row runs once a mixer of its name exists.

from subquad import ROWS

ROWS["gla"].recurrence
"""

from subquad.table import aft, attention, classic, decaying, delta, linear, rwkv, ssm, xlstm
from subquad.table.row import Row
from subquad.table.spec import Recurrence

_FAMILIES = (attention, linear, aft, rwkv, decaying, xlstm, delta, ssm, classic)

ROWS: dict[str, Row] = {row.name: row for family in _FAMILIES for row in family.ROWS}

__all__ = ["ROWS", "Recurrence", "Row"]
