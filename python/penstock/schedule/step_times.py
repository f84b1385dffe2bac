"""How long the steps of a pass take, as far as that is known.

Of each step the shortest time counts: one that was held up, as where the host had other work to
do, would have the plan load ahead in a pause that later passes do not have. In a traced pass every
step is timed, so where the host is what a pass waits for, its times are longer than those of later
passes, which correct them.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Order", "StepTimes"]

Order = tuple[int, ...]
"""The steps of a pass, by their ids."""

_TRACED_PASSES = 3  # until times are known
_CORRECTIONS = 3  # of times, at most
_MUCH_LESS = 0.9  # of the time that steps were thought to take


class StepTimes:
    """Seconds that steps take, by the order of the pass."""

    def __init__(self) -> None:
        self._traced: dict[Order, list[list[float]]] = {}
        self._known: dict[Order, list[float]] = {}
        self._corrections: dict[Order, int] = {}

    def of(self, order: Order) -> list[float]:
        """Return the seconds of each step; nothing where they are not known."""
        return self._known.get(order, [])

    def add(self, order: Order, seconds: Sequence[float]) -> bool:
        """Take the times of a traced pass; return whether enough is known now.

        Parameters
        ----------
        seconds
            By place of the order; steps at its end may be missing.
        """
        # Where threads run beside each other, their steps overlap.
        times = [max(0.0, each) for each in seconds][: len(order)]
        times += [0.0] * (len(order) - len(times))
        traced = self._traced.setdefault(order, [])
        traced.append(times)
        if len(traced) < _TRACED_PASSES:
            return False
        self._known[order] = [min(each) for each in zip(*traced, strict=True)]
        del self._traced[order]
        return True

    def correct(self, order: Order, taken: float) -> bool:
        """Correct times that are much too long, a few times at most; return whether they were.

        Parameters
        ----------
        taken
            Seconds that the steps of a pass took together.
        """
        known, corrections = self.of(order), self._corrections.get(order, 0)
        if corrections == _CORRECTIONS or not 0.0 < taken < _MUCH_LESS * sum(known):
            return False
        self._corrections[order] = corrections + 1
        self._known[order] = [seconds * taken / sum(known) for seconds in known]
        return True
