"""The least cap: the one from which on every cap works.

Pages are larger under larger caps, so an operation takes more of them; what works under a cap need
not work under one that is a little larger. So the sizes of pages are looked at from the largest
down, each for the caps that it is taken for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from penstock.forecast.host import Waiting
from penstock.forecast.parts import Part
from penstock.forecast.target import Target

__all__ = [
    "LeastCap",
    "Tiers",
    "charged_tables",
    "find_least_cap",
    "frames_under",
    "need_under",
]

Tiers = Callable[[int], Sequence[Waiting]]
"""Where the parts wait, by the size of pages."""


@dataclass(frozen=True)
class LeastCap:
    """The least cap from which on every one works.

    Parameters
    ----------
    nbytes
        The cap.
    needed_by
        The operation that needs it: the largest tensor that it reads, and how many more; empty
        where there are no weights.
    needed
        Bytes that it reads, in whole pages.
    tables
        Bytes of page tables that are charged beside it.
    """

    nbytes: int
    needed_by: str
    needed: int
    tables: int


def find_least_cap(parts: Sequence[Part], target: Target, tiers: Tiers) -> LeastCap:
    """Find the least cap under which any of the parts can run, the others giving way."""
    above: int | None = None  # the least cap of the larger pages
    found = LeastCap(1, "", 0, 0)
    for start, page_size in sorted(target.page_sizes, reverse=True):
        need = _need(parts, target, page_size, tiers)
        if above is not None and need.nbytes > above:
            return found  # under caps just below that one it does not work
        found = LeastCap(max(start, need.nbytes), need.needed_by, need.needed, need.tables)
        if need.nbytes > start:
            return found
        above = start
    return found


def _need(parts: Sequence[Part], target: Target, page_size: int, tiers: Tiers) -> LeastCap:
    """Return the least cap with pages of one size."""
    needed, by = 0, ""
    for part in parts:
        laid = part.laid(page_size)
        frames = max(laid.least_pages, min(1, laid.page_count))  # the planner wants one at least
        nbytes = frames * page_size if target.pager == "frames" else laid.least_bytes
        if nbytes > needed and laid.largest is not None:
            needed, by = nbytes, part.describe(laid.largest)
    tables = charged_tables(target, tiers(page_size))
    return LeastCap(max(1, needed + tables), by, needed, tables)


def need_under(cap: int, parts: Sequence[Part], target: Target, tiers: Tiers) -> LeastCap:
    """Return what is needed with the pages that a cap has; it works if that is no more."""
    need = _need(parts, target, target.page_size(cap), tiers)
    return replace(need, nbytes=max(need.nbytes, target.page_sizes[0][0]))


def charged_tables(target: Target, tiers: Sequence[Waiting]) -> int:
    """Return what is charged for addressing the host memory of all parts."""
    return sum(target.page_tables(waiting.pinned + waiting.mapped) for waiting in tiers)


def frames_under(cap: int, page_size: int, tables: int) -> int:
    """Return how many pages may be in place under a cap."""
    return max(0, cap - tables) // page_size
