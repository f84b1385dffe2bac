"""Where each tensor of a model lies in its region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from penstock.loading.slots import Slot
from penstock.loading.weights import Source

__all__ = [
    "ALIGNMENT",
    "Placement",
    "Reserved",
    "converted",
    "is_small",
    "lay_out",
    "lay_out_beside",
    "pack",
    "small_are_first",
]

ALIGNMENT = 512
"""Bytes. What torch's CUDA allocator gives, and more than any CPU kernel asks for: libraries choose
their order of summation by alignment, so equal bits need equal alignment."""

_SMALL = 64  # of such a tensor's size, or more, are in a page
_SYSTEM_PAGE = 4096  # the smallest that a system makes resident
_CONVERTIBLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Placement:
    """One tensor of a model on its region.

    Parameters
    ----------
    dtype
        What it has on the region; differs from the source's where a conversion was asked for.
    offset
        First byte in the region.
    stride
        As the module made the tensor, where that is dense but not row-major (a transposed or
        channels-last weight): another order of elements could give other bits.
    """

    slot: Slot
    source: Source
    dtype: torch.dtype
    offset: int
    stride: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The first one that the module has it under."""
        return self.slot.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Size on the region in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def least_nbytes(self) -> int:
        """The least of it that may be read at once: a stack's parts can be read alone."""
        is_stack = len(self.shape) == 3 and self.stride is None
        return self.nbytes // self.shape[0] if is_stack else self.nbytes

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the tensor on the region, in elements."""
        if self.stride is not None:
            return self.stride
        return torch.empty(self.shape, device="meta").stride()

    @property
    def converts(self) -> bool:
        """Whether the source has another dtype."""
        return self.dtype != self.source.dtype

    @property
    def is_verbatim(self) -> bool:
        """Whether the region holds the very bytes of the source."""
        return not self.converts and self.stride is None


@dataclass(frozen=True)
class Reserved:
    """Room on a model's region for a tensor that the module does not have, and that comes later.

    Parameters
    ----------
    kind, of
        What it is for ("gradient"), and the name of the module's tensor that it belongs to.
    strides
        In elements.
    offset
        First byte in the region.
    """

    kind: str
    of: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.kind} of {self.of}"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def least_nbytes(self) -> int:
        """Zero: when it is used is not guessed."""
        return 0


def lay_out(
    slots: list[Slot], pairs: dict[int, Source], dtype: torch.dtype | None, *, page_size: int
) -> tuple[list[Placement], int]:
    """Place tensors one behind the other, in the order of the module, which is mostly that of use.

    Small ones (norms, biases) come first where a page holds all of them: it is read in every other
    step, so it stays, and they take nobody else's page along.

    Parameters
    ----------
    slots, pairs
        From `find_slots` and `match`.
    dtype
        What 16, 32 and 64 bit floating-point tensors become; None leaves them as the weights have
        them. Others (integers, 8 bit formats) are never converted.
    page_size
        Of the region, in bytes.

    Returns
    -------
    tuple
        The placements, and the bytes of the region: whole system pages.
    """
    placements = [
        Placement(
            slots[index], source, converted(source.dtype, dtype), 0, _stride(slots[index].current)
        )
        for index, source in pairs.items()
    ]
    offsets, nbytes = pack([each.nbytes for each in placements], page_size)
    placed = [replace(each, offset=at) for each, at in zip(placements, offsets, strict=True)]
    return sorted(placed, key=lambda each: each.offset), nbytes


def converted(source: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Return what a tensor has on the region; see `lay_out`."""
    return dtype if dtype is not None and source in _CONVERTIBLE else source


def pack(sizes: Sequence[int], page_size: int) -> tuple[list[int], int]:
    """Place tensors by their sizes alone, in the order of the module; see `lay_out`.

    Parameters
    ----------
    sizes
        Of each tensor, in bytes.

    Returns
    -------
    tuple
        The first byte of each, and the bytes of the region.
    """
    order = list(range(len(sizes)))
    if small_are_first(sizes, page_size):
        order.sort(key=lambda index: not is_small(sizes[index], page_size))
    offsets = [0] * len(sizes)
    end = 0
    for index in order:
        offsets[index] = end
        end += _room(sizes[index])
    return offsets, _whole_pages(end)


def lay_out_beside(beside: Sequence[Reserved], end: int) -> tuple[list[Reserved], int]:
    """Place what is reserved behind all else, in its order.

    Parameters
    ----------
    end
        Bytes of the region so far.

    Returns
    -------
    tuple
        The same with offsets, and the bytes of the region.
    """
    placed = []
    for reserved in beside:
        placed.append(replace(reserved, offset=end))
        end += _room(reserved.nbytes)
    return placed, _whole_pages(end)


def small_are_first(sizes: Sequence[int], page_size: int) -> bool:
    """Whether the first page holds all small tensors of these sizes, in any order of the module."""
    return sum(_room(size) for size in sizes if is_small(size, page_size)) <= page_size


def is_small(size: int, page_size: int) -> bool:
    """Whether a tensor of that size is one of the small ones of `lay_out`."""
    return size * _SMALL <= page_size


def _room(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // _SYSTEM_PAGE) * _SYSTEM_PAGE


def _stride(tensor: torch.Tensor) -> tuple[int, ...] | None:
    dense = torch.empty_like(tensor, device="meta").stride()  # keeps any dense order
    if tensor.is_contiguous() or dense != tensor.stride():
        return None
    return tuple(dense)
