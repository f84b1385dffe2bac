"""Dividing a cap among models: who goes, and with frames, how many each of those in use may hold.

Idle models make room, the least recently used first. With managed memory, the pager does the rest
page by page. Frames are divided: each model in use gets what its largest step needs, and of the
rest a part as large as its part of what all could use beyond that. Those that give frames away are
planned anew before those that get some; a model that is being called is when its call has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.errors import CapExceededError
from penstock.memory import FramesMemory
from penstock.pager import Pager
from penstock.runner import Runner

__all__ = ["Sharing", "divide"]

_PATIENCE = 60.0  # seconds to wait for a call in another thread to give frames back
_POLL = 0.0005


def divide(total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Divide frames among models.

    Parameters
    ----------
    total
        Frames to be had.
    least, most
        For each model, how many it needs and how many it could use.

    Returns
    -------
    list of int
        For each model, from its least to its most; together no more than `total`, unless the least
        are.
    """
    spare = max(0, total - sum(least))
    more = sum(most) - sum(least)
    if more <= spare:
        return list(most)
    return [few + spare * (many - few) // more for few, many in zip(least, most, strict=True)]


class Sharing:
    """Divides what a pager's cap allows. Its caller sees to it that one thread does at a time."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager

    def make_room(self, runner: Runner, others: Sequence[tuple[Runner, bool]]) -> None:
        """Make room for a model that is about to be used; give each model in use its share.

        Parameters
        ----------
        others
            The other models, the least recently used first, and whether each is in use.

        Raises
        ------
        CapExceededError
            If the models in use cannot run beside each other.
        """
        hard_cap = self._pager.hard_cap
        if hard_cap is not None:
            hard_cap.allocator.give_back(runner.memory.region.nbytes)  # of frames that it caches
        for other, in_use in others:
            with other.resting() as resting:
                if not resting:
                    continue
                if in_use:
                    other.attach()
                    continue
                if self._room(runner) >= runner.memory.page_count:
                    break
                other.evict()
        if self._pager.kind == "frames":
            active = [runner, *(other for other, in_use in others if in_use)]
            free = self._pager.budget.available // self._pager.page_size
            self._divide(active, free + _held(active))

    def use_free_room(self, runner: Runner) -> bool:
        """Have an idle model use what no other has; return whether it can run in that."""
        if self._pager.kind == "managed":
            return True  # the pager takes no more
        _frames(runner).frames = min(self._room(runner), runner.memory.page_count)
        with runner.resting() as resting:
            if not resting:
                return False
            try:
                runner.plan()
            except CapExceededError:
                return False
        return True

    def give_way(self, cap: int, idle: Sequence[Runner], active: Sequence[Runner]) -> None:
        """Have models hold no more than a cap, if they can.

        Parameters
        ----------
        idle
            Models that nobody uses, the least recently used first.

        Raises
        ------
        CapExceededError
            If the models in use cannot run in that; some may hold less than before.
        ScheduleError
            If a model that has to give way is running.
        """
        for runner in idle:
            if self._used > cap:
                runner.evict()
        if self._used <= cap:
            return
        if self._pager.kind == "managed":
            for runner in active:
                runner.evict()
            return
        held = _held(active)
        others = self._used - held * self._pager.page_size
        self._divide(active, max(0, cap - others) // self._pager.page_size)

    @property
    def _used(self) -> int:
        return self._pager.budget.stats().used

    def _room(self, runner: Runner) -> int:
        """Count the pages that a model could hold without taking any from others."""
        held = runner.memory.region.core.stats().resident_bytes
        return (self._pager.budget.available + held) // self._pager.page_size

    def _divide(self, runners: Sequence[Runner], total: int) -> None:
        least = [runner.least_frames() for runner in runners]
        most = [runner.memory.page_count for runner in runners]
        for runner, frames in zip(runners, divide(total, least, most), strict=True):
            _frames(runner).frames = frames
        # Those that give frames away first.
        for runner in sorted(runners, key=_gained):
            _plan(runner, [other for other in runners if other is not runner])


def _plan(runner: Runner, others: Sequence[Runner]) -> None:
    """Plan for a model; where frames are lacking, wait for calls that are to give some back."""
    end = time.monotonic() + _PATIENCE
    while True:
        busy = any(other.runs_elsewhere for other in others)
        with runner.resting() as resting:
            if not resting:
                runner.plan_later()
                return
            try:
                runner.plan()
                return
            except CapExceededError:
                if not busy or time.monotonic() > end:
                    raise
        time.sleep(_POLL)


def _frames(runner: Runner) -> FramesMemory:
    assert isinstance(runner.memory, FramesMemory)
    return runner.memory


def _held(runners: Sequence[Runner]) -> int:
    return sum(_frames(runner).frames_held for runner in runners)


def _gained(runner: Runner) -> int:
    return _frames(runner).frames - _frames(runner).frames_held
