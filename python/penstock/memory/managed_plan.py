"""Which pages of managed memory stay, and how much room the others have to pass through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from penstock import _core
from penstock.memory.page_rules import NO_RULES, PageRules

__all__ = ["ManagedPlan", "plan_managed"]

BATCH_BYTES = _core.ManagedPager.largest_batch
"""What the pager loads at once; large ranges of unified memory move faster."""

BATCHES = 6
"""In the ring: two are copied, two read, one evicted, and one is there for what does not fit."""


@dataclass(frozen=True)
class ManagedPlan:
    """What the pager is told of a region, and what a pass will cost by it."""

    kept: tuple[int, ...]
    """Pages that stay, ascending; none where there is no room to pass through beside them."""
    ring: int
    """Pages that the others pass through; 0 if all are kept."""
    bytes_per_pass: int
    seconds: float
    """Of a pass; that of the copies at the link's rate, or of the compute if that takes longer."""


def plan_managed(
    steps: Sequence[Sequence[int]],
    frames: int,
    *,
    page_size: int,
    link_rate: float,
    seconds: Sequence[float] = (),
    rules: PageRules = NO_RULES,
) -> ManagedPlan:
    """Choose the pages that stay.

    Large ranges move faster, so the pages that stay are runs of pages, with runs of about a batch
    that pass between them, at even distances over the pass.

    Parameters
    ----------
    steps
        Pages in use at each step of a pass.
    frames
        How many pages may be held at once; no fewer than any step has.
    page_size
        Bytes of a page.
    link_rate
        Bytes per second of copies.
    seconds
        Compute time of each step; empty if unknown.
    rules
        Pages that have to stay, and those that must not.
    """
    keep, stream = set(rules.keep), set(rules.stream).difference(rules.keep)
    read = list(dict.fromkeys(page for step in steps for page in step))
    compute = sum(seconds)
    stay = keep.union(read) - stream
    if len(keep.union(read)) <= frames:
        nbytes = len(stream.intersection(read)) * page_size
        ring = frames - len(stay) if nbytes else 0
        seconds_of_pass = max(nbytes / link_rate, compute)
        return ManagedPlan(tuple(sorted(stay)), ring, nbytes, seconds_of_pass)
    order = [page for page in read if page not in keep]
    frames -= len(keep)
    batch = max(1, BATCH_BYTES // page_size)
    ring = min(BATCHES * batch, frames // 2)
    largest = max(len(set(step) - keep) for step in steps)
    ring = min(max(ring, largest + max(1, min(batch, ring // BATCHES))), frames)
    count = frames - ring
    loads = _loads(steps, ring, 1 - count / len(order))
    kept: list[int] = []
    for level in sorted({*loads.values()}, reverse=True):
        pages = [page for page in order if loads[page] == level and page not in stream]
        kept += _runs(pages, min(count - len(kept), len(pages)), batch)
    passing = set(order).difference(kept)
    nbytes = sum(loads[page] for page in passing) * page_size
    return ManagedPlan(
        tuple(sorted((*kept, *keep))), ring, nbytes, max(nbytes / link_rate, compute)
    )


def _loads(steps: Sequence[Sequence[int]], ring: int, share: float) -> dict[int, int]:
    """Count how often a pass would load each page, if it passed through.

    It is loaded anew after a gap in which the ring is filled with others; of the pages read in the
    gap, a share passes.
    """
    uses: dict[int, list[int]] = {}
    before = [0]  # pages read before each step
    for index, step in enumerate(steps):
        for page in set(step):
            uses.setdefault(page, []).append(index)
        before.append(before[-1] + len(set(step)))
    loads = {}
    for page, indices in uses.items():
        count = 1  # where the pass begins anew
        for first, then in pairwise(indices):
            count += share * (before[then] - before[first + 1]) >= ring
        loads[page] = count
    return loads


def _runs(pages: list[int], count: int, batch: int) -> list[int]:
    """Choose `count` of the pages in runs, with at most about a batch of others between them."""
    others = len(pages) - count
    runs = max(1, min(-(-others // batch), count))
    chosen: list[int] = []
    for run in range(runs):
        start = len(pages) * run // runs
        size = count * (run + 1) // runs - count * run // runs
        chosen += pages[start : start + size]
    return chosen
