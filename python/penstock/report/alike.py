"""Tensors that are alike, as one row: those of all layers, which differ in a number only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Alike", "group_alike"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Alike:
    """Tensors of one dtype and shape whose names differ in numbers only.

    Parameters
    ----------
    name
        Theirs, with ranges where they differ: `layers.[0-31].weight`.
    count
        How many they are.
    nbytes
        Of each.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: int


def group_alike(tensors: Iterable[_Tensor]) -> list[Alike]:
    """Group tensors, those first that take the most bytes together."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[_Tensor]] = {}
    for tensor in tensors:
        form = _NUMBER.sub("\0", tensor.name)
        groups.setdefault((form, tensor.dtype, tensor.shape), []).append(tensor)
    rows = [
        Alike(_name([each.name for each in same]), dtype, shape, len(same), same[0].nbytes)
        for (_, dtype, shape), same in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row.count * row.nbytes, row.name))


def _name(names: Sequence[str]) -> str:
    numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    texts = iter([_range(sorted(set(column))) for column in zip(*numbers, strict=True)])
    return _NUMBER.sub(lambda _: next(texts), names[0])


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers[-1] - numbers[0] + 1 == len(numbers)
    return f"[{numbers[0]}-{numbers[-1]}]" if whole else "[" + ",".join(map(str, numbers)) + "]"
