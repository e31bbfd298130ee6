"""The mixers by the name of their row: the published ones, and those that users register."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TypeVar

from subquad.errors import fail
from subquad.mixers.base import Mixer
from subquad.table import ROWS, Row

PLACES = {
    "softmax_attention": "attention:SoftmaxAttention",
    "sliding_window_attention": "attention:SlidingWindowAttention",
    "linear_attention": "linear_attention:LinearAttention",
    "hyena": "hyena:Hyena",
    "rwkv7": "rwkv7:RWKV7",
    "retnet": "retnet:RetNet",
    "lightning_attention": "lightning_attention:LightningAttention",
    "hgrn2": "hgrn2:HGRN2",
    "gsa": "gsa:GSA",
    "mlstm": "mlstm:MLSTM",
    "gla": "gla:GLA",
    "mamba": "mamba:Mamba",
    "mamba2": "mamba2:Mamba2",
    "deltanet": "deltanet:DeltaNet",
    "gated_deltanet": "gated_deltanet:GatedDeltaNet",
    "s4d": "s4d:S4D",
}
"""Where the published mixers are: the row's name, then the file in this folder and the class."""


class _Mixers(MutableMapping[str, type[Mixer]]):
    """Mixers by name, each imported when it is first asked for."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._held: dict[str, str | type[Mixer]] = dict(places)

    def __getitem__(self, name: str) -> type[Mixer]:
        held = self._held[name]
        if isinstance(held, str):
            module, _, cls = held.partition(":")
            held = getattr(importlib.import_module(f"subquad.mixers.{module}"), cls)
            self._held[name] = held
        return held

    def __setitem__(self, name: str, cls: type[Mixer]) -> None:
        self._held[name] = cls

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __repr__(self) -> str:
        return f"MIXERS({', '.join(self)})"


MIXERS: MutableMapping[str, type[Mixer]] = _Mixers(PLACES)
"""The mixers by the name of their row in the table."""

AnyMixer = TypeVar("AnyMixer", bound=type[Mixer])


def register(row: Row) -> Callable[[AnyMixer], AnyMixer]:
    """Class decorator: a mixer of your own becomes a row like any other.

        @subquad.mixers.register(Row("my_row", Recurrence(decay="token_key"), "my paper"))
        class MyRow(Mixer): ...

    From then on, in this process, `SubquadConfig(mixer="my_row")` and everything that stands on it
    know the row, so import the module before loading a model saved with it. Registering a class of
    the same module and name again replaces it, as running a notebook's cell twice does.

    Args:
        row: what kind of recurrence it is; its name becomes the class's `row`. One of
            `subquad.ROWS` itself, where that has no mixer yet.

    Raises:
        ValueError: the name is no identifier or is taken, or the class is no mixer that models can
            build: `cls(hidden_size, *, option=default, ...)`, with `forward` and `state_names`.
    """
    if not row.name.isidentifier():
        raise fail("row.name", repr(row.name), "an identifier like 'my_row'", "rename the row")

    def add(cls: AnyMixer) -> AnyMixer:
        _check_class(cls)
        _check_free(row, cls)
        cls.row = row.name
        MIXERS[row.name] = cls
        ROWS[row.name] = row
        return cls

    return add


def _check_free(row: Row, cls: type[Mixer]) -> None:
    own = vars(cls).get("row", row.name)
    if own != row.name:
        raise fail(f"class {cls.__name__}", f"row = {own!r}", "a class without one", "subclass it")
    taken = MIXERS.get(row.name)
    if taken is None and ROWS.get(row.name, row) is row:  # new, or listed but not running yet
        return
    if taken is None or _place(taken) != _place(cls):
        owner = "the table" if taken is None else ".".join(_place(taken))
        raise fail("row.name", repr(row.name), "a name of its own", f"rename it: {owner} has this")


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _check_class(cls: type) -> None:
    name = getattr(cls, "__name__", repr(cls))
    if not (isinstance(cls, type) and issubclass(cls, Mixer)) or inspect.isabstract(cls):
        expected = "a subclass of subquad.mixers.Mixer with a forward"
        raise fail("class", name, expected, "decorate the mixer's class")
    if not hasattr(cls, "state_names"):
        expected = 'state_names, such as ("recurrent",): the entries of the state it returns'
        raise fail(f"class {name}", "no state_names", expected, "add them to the class")
    first, *options = inspect.signature(cls).parameters.values()
    keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    if first.name != "hidden_size" or any(option.kind not in keyword for option in options):
        expected = "__init__(self, hidden_size, *, option=default, ...)"
        got = f"__init__{inspect.signature(cls)}"
        raise fail(f"class {name}", got, expected, "put a * after hidden_size")
