"""Models that are used in turns, as the parts of a pipeline are: each is in use while it is called.

Nobody acquires them. A call takes the turn: the models whose calls have ended are released, and the
one that is called is acquired. What a released model has in place stays until another one needs the
room; then those go first that were called only once in their last turn, since there is nothing to
gain from keeping them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from penstock.runner import Runner

__all__ = ["Turns"]


class Turns:
    """Gives the turn to whichever model is called.

    Parameters
    ----------
    acquire
        Called with the name of a model that takes the turn.
    release
        Called with the name of one whose turn has ended, and whether it was called repeatedly.
    lock
        That of whoever acquires and releases.
    """

    def __init__(
        self,
        acquire: Callable[[str], object],
        release: Callable[[str, bool], object],
        lock: AbstractContextManager[object],
    ) -> None:
        self._acquire = acquire
        self._release = release
        self._holders: dict[str, Runner] = {}
        self._calls: dict[int, int] = {}  # of this turn, by entry point
        self._current = ""
        self._lock = lock

    def begin(self, name: str, runner: Runner, module: int) -> None:
        """Note that a module of a model is about to be called from outside.

        Raises
        ------
        CapExceededError
            If the model cannot run under the cap; nobody has the turn then.
        """
        with self._lock:
            if name != self._current or name not in self._holders:
                self._change(name, runner)
            self._calls[module] = self._calls.get(module, 0) + 1

    def end(self, name: str | None = None) -> None:
        """Take the turn away: from one model, or from all."""
        with self._lock:
            for holder in [*self._holders] if name is None else [name]:
                if holder in self._holders:
                    repeated = holder == self._current and max(self._calls.values(), default=0) > 1
                    del self._holders[holder]
                    self._release(holder, repeated)

    def _change(self, name: str, runner: Runner) -> None:
        for holder, other in [*self._holders.items()]:
            with other.resting() as resting:  # else it is a call inside of its own
                if resting and holder != name:
                    self.end(holder)
        self._calls.clear()
        self._current = name
        if name not in self._holders:
            self._acquire(name)
            self._holders[name] = runner
