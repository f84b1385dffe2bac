"""Where the weights of each part will wait on the host, and what that takes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.forecast.parts import Part
from penstock.forecast.target import Target
from penstock.loading.fill import direct_extents
from penstock.loading.host_tiers import choose_tier, require_budget, ring_bytes
from penstock.sizes import format_bytes

__all__ = ["Waiting", "find_tiers"]


@dataclass(frozen=True)
class Waiting:
    """Where one part waits.

    Parameters
    ----------
    tier
        `"pinned"`, `"mapped"`, `"stream"`; `"managed"` where the pager has no tiers.
    pinned
        Bytes of pinned host memory.
    mapped
        Bytes of the page cache that the device is to address.
    host
        Bytes of host memory in all, without the page cache.
    spill
        Bytes of the spill file.
    read
        Bytes that are read from files before it can run.
    why
        Why the tier was chosen.
    """

    tier: str
    pinned: int
    mapped: int
    host: int
    spill: int
    read: int
    why: str


def find_tiers(
    parts: Sequence[Part], target: Target, page_size: int, *, host: str, budget: int | None
) -> list[Waiting]:
    """Find the tier of each part, as they would be registered one after the other.

    Raises
    ------
    CapExceededError
        If a tier needs more than the budget.
    """
    found: list[Waiting] = []
    for part in parts:
        nbytes = part.laid(page_size).nbytes
        taken = sum(waiting.host for waiting in found)
        found.append(_find(part, nbytes, target, page_size, host, budget, taken))
    return found


def _find(
    part: Part,
    nbytes: int,
    target: Target,
    page_size: int,
    host: str,
    budget: int | None,
    taken: int,
) -> Waiting:
    if target.pager == "managed":
        if target.is_gpu:
            return Waiting("managed", 0, 0, nbytes, 0, part.nbytes, "unified memory lies there")
        why = "the operating system pages it from the spill file"
        return Waiting("managed", 0, 0, 0, nbytes, part.nbytes, why)
    why = "as you say"
    if host == "auto":
        host, allowed = choose_tier(nbytes, budget, taken)
        relation = "within" if host == "pinned" else "more than"
        limit = "host_budget" if budget is not None else "what the host has to spare"
        why = f"{format_bytes(nbytes)} are {relation} {limit}, {format_bytes(allowed)}"
    if host == "pinned":
        require_budget(nbytes, budget, 'host="pinned"', 'use host="auto", or "stream"')
        return Waiting("pinned", nbytes, 0, nbytes, 0, part.nbytes, why)
    in_files = sum(extent[3] for extent in direct_extents(list(part.placements))[1])
    in_memory = part.nbytes - in_files
    if host == "mapped":
        what = 'what host="mapped" cannot leave in files (converted, or given as tensors)'
        require_budget(in_memory, budget, what, "save the weights as they are to be")
        return Waiting("mapped", 0, nbytes, in_memory, 0, part.nbytes, why)
    ring = ring_bytes(nbytes, page_size, budget, in_memory)
    return Waiting("stream", ring, 0, ring + in_memory, 0, in_memory, why)
