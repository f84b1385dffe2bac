"""Which pages of managed memory stay, and how much room the others have to pass through."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from penstock import _core
from penstock.memory.page_rules import NO_RULES, PageRules

__all__ = ["ManagedPlan", "choose_kept", "plan_managed"]

BATCHES = _core.ManagedPager.batches_in_ring
"""What passes through does so in so many batches, each of which the pager loads at once."""

LARGEST_BATCH = _core.ManagedPager.largest_batch
"""In bytes."""

CALL_BYTES = 5 << 20
"""What the link could carry in the time that it loses between two loads."""


@dataclass(frozen=True)
class ManagedPlan:
    """What the pager is told of a region, and what a pass will cost by it."""

    kept: tuple[int, ...]
    """Pages that stay, ascending; none where there is no room to pass through beside them."""
    ring: int
    """Pages that the others pass through; 0 if all are kept."""
    bytes_per_pass: int
    seconds: float
    """Of a pass: that of its copies, or of its compute if that takes longer."""


def plan_managed(
    page_count: int,
    steps: Sequence[Sequence[int]],
    frames: int,
    *,
    page_size: int,
    link_rate: float,
    seconds: Sequence[float] = (),
    rules: PageRules = NO_RULES,
) -> ManagedPlan | _core.Plan:
    """Plan a pass: which pages stay, or none where there is no room to pass through beside them.

    In that case the page with the farthest next use goes, as in any plan of frames. See
    `choose_kept`.
    """
    plan = choose_kept(
        steps, frames, page_size=page_size, link_rate=link_rate, seconds=seconds, rules=rules
    )
    if plan.kept:
        return plan
    return _core.plan(
        page_count=page_count,
        page_size=page_size,
        steps=steps,
        frames=frames,
        link_rate=link_rate,
        step_seconds=seconds,
        keep=rules.keep,
        stream=rules.stream,
    )


def choose_kept(
    steps: Sequence[Sequence[int]],
    frames: int,
    *,
    page_size: int,
    link_rate: float,
    seconds: Sequence[float] = (),
    rules: PageRules = NO_RULES,
) -> ManagedPlan:
    """Choose the pages that stay: all that there is room for beside the ring.

    Large ranges move faster, so the pages that stay are runs of pages, with runs of about a batch
    that pass between them, at even distances over the pass. Of a step that would fill the ring by
    itself, more stay.

    Parameters
    ----------
    steps
        Pages in use at each step of a pass.
    frames
        How many pages may be held at once; no fewer than any step has.
    page_size
        Bytes of a page.
    link_rate
        Bytes per second of large copies.
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
    lacking = len(keep.union(read)) - frames
    frames -= len(keep)
    ring = max(1, min(_best_ring(lacking, page_size), frames * 3 // 4))
    while True:
        batch = max(1, ring // BATCHES)
        loads = _loads(steps, ring, 1 - (frames - ring) / len(set(read) - keep))
        room = _Room(keep, stream, frames - ring, batch)
        room.choose_of_large_steps(steps, loads, ring - batch)
        room.choose(read, loads)
        needed = max(len(set(step) - room.kept) for step in steps) + batch
        if needed <= ring or ring == frames:
            break
        ring = min(needed, frames)
    nbytes = sum(loads[page] for page in set(read) - room.kept) * page_size
    copies = nbytes / link_rate * (1 + CALL_BYTES / (batch * page_size))
    return ManagedPlan(tuple(sorted(room.kept)), ring, nbytes, max(copies, compute))


def _best_ring(lacking: int, page_size: int) -> int:
    """Return the pages of the ring by which a pass is shortest, where `lacking` have no room.

    A pass moves these, and as many as the ring takes from those that could stay. The larger the
    batches are, the less the link loses between them. So what is to be least is
    (lacking + ring) * (1 + CALL_BYTES / batch).
    """
    best = math.isqrt(BATCHES * CALL_BYTES * lacking // page_size)
    return min(best, BATCHES * LARGEST_BATCH // page_size)


class _Room:
    """Pages that stay: those that have to, and `left` more that may be chosen.

    Parameters
    ----------
    keep, stream
        Pages that have to stay, and those that must not.
    batch
        Of pages that pass between those that stay.
    """

    def __init__(self, keep: set[int], stream: set[int], left: int, batch: int) -> None:
        self.kept = set(keep)
        self._stream = stream
        self._left = left
        self._batch = batch

    def choose(
        self, pages: Iterable[int], loads: Mapping[int, int], most: int | None = None
    ) -> None:
        """Choose some of the pages, those first that a pass would load most often."""
        most = self._left if most is None else min(most, self._left)
        free = [page for page in pages if page not in self.kept and page not in self._stream]
        for level in sorted({loads[page] for page in free}, reverse=True):
            same = [page for page in free if loads[page] == level]
            chosen = _runs(same, min(most, len(same)), self._batch)
            self.kept.update(chosen)
            self._left -= len(chosen)
            most -= len(chosen)

    def choose_of_large_steps(
        self, steps: Sequence[Sequence[int]], loads: Mapping[int, int], limit: int
    ) -> None:
        """Leave no step with more than `limit` pages that pass, or with as few more as can be."""
        large = {frozenset(step) - self.kept: step for step in steps}
        large = {pages: step for pages, step in large.items() if len(pages) > limit}
        while sum(max(0, len(pages) - limit) for pages in large) > self._left:
            limit += 1
        for pages, step in large.items():
            self.choose(dict.fromkeys(step), loads, max(0, len(pages - self.kept) - limit))


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
