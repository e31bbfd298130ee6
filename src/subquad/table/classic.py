"""Nonlinear recurrences: what came before."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "lstm",
        Recurrence("nonlinear"),
        "Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735",
        "gates that see h_{t-1}",
        "c_t = f_t c_{t-1} + i_t z_t",
        "h_t = o_t tanh(c_t)",
        "2·d",
    ),
)
