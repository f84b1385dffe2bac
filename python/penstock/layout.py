"""Where each tensor of a model lies in its region."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from penstock.weights import Slot, Source

__all__ = ["ALIGNMENT", "Placement", "lay_out"]

ALIGNMENT = 512
"""Bytes. What torch's CUDA allocator gives, and more than any CPU kernel asks for: libraries choose
their order of summation by alignment, so equal bits need equal alignment."""

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
    """

    slot: Slot
    source: Source
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Size on the region in bytes."""
        return math.prod(self.source.shape) * self.dtype.itemsize

    @property
    def converts(self) -> bool:
        """Whether the source has another dtype."""
        return self.dtype != self.source.dtype


def lay_out(
    slots: list[Slot], pairs: dict[int, Source], dtype: torch.dtype | None
) -> tuple[list[Placement], int]:
    """Place tensors one behind the other, in the order of the module, which is mostly that of use.

    Parameters
    ----------
    slots, pairs
        From `find_slots` and `match`.
    dtype
        What 16, 32 and 64 bit floating-point tensors become; None leaves them as the weights have
        them. Others (integers, 8 bit formats) are never converted.

    Returns
    -------
    tuple
        The placements, and the bytes of the region.
    """
    placements = []
    end = 0
    for index, source in pairs.items():
        target = dtype if dtype is not None and source.dtype in _CONVERTIBLE else source.dtype
        placement = Placement(slots[index], source, target, end)
        placements.append(placement)
        end += -(-placement.nbytes // ALIGNMENT) * ALIGNMENT
    return placements, end
