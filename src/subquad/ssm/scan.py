"""All prefixes of an associative operation at once, in log2(T) rounds of batched work."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Elements = tuple[Tensor, ...]


def associative_scan(
    combine: Callable[[Elements, Elements], Elements], elements: Sequence[Tensor]
) -> Elements:
    """e_0, e_0 e_1, e_0 e_1 e_2, ...: about 2 T combinations (Blelloch 1990).

    Args:
        combine: takes two tuples of tensors [K,...], earlier and later elements, to their products.
        elements: tensors [T,...], one element a row.
    """
    elements = tuple(elements)
    T = elements[0].shape[0]
    if T == 1:
        return elements
    pairs = combine(_rows(elements, slice(0, T - 1, 2)), _rows(elements, slice(1, T, 2)))
    odd = associative_scan(combine, pairs)  # prefixes that end at 1, 3, 5, ...
    if T == 2:
        even = _rows(elements, slice(0, 1))
    else:
        later = combine(_rows(odd, slice(0, (T - 1) // 2)), _rows(elements, slice(2, T, 2)))
        even = tuple(torch.cat([e[:1].expand_as(x[:1]), x]) for e, x in zip(elements, later))
    return tuple(_interleave(e, o) for e, o in zip(even, odd))


def _rows(elements: Elements, rows: slice) -> Elements:
    return tuple(e[rows] for e in elements)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """even[0], odd[0], even[1], odd[1], ...; there may be one more of the even."""
    n = len(odd)
    mixed = torch.stack([even[:n].expand_as(odd), odd], 1).flatten(0, 1)
    return torch.cat([mixed, even[n:].expand(len(even) - n, *mixed.shape[1:])])
