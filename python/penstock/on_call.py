"""Models that are in use while they are called, as the parts of a pipeline are.

Nobody acquires them. A call does, and releases those whose calls have ended; what these have in
place stays until another one needs the room.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from penstock.runner import Runner

__all__ = ["OnCall"]


class OnCall:
    """Acquires whichever model is called.

    Parameters
    ----------
    acquire, release
        Called with the name of a model.
    lock
        That of whoever acquires and releases.
    """

    def __init__(
        self,
        acquire: Callable[[str], object],
        release: Callable[[str], object],
        lock: AbstractContextManager[object],
    ) -> None:
        self._acquire = acquire
        self._release = release
        self._in_use: dict[str, Runner] = {}
        self._lock = lock

    def begin(self, name: str, runner: Runner) -> None:
        """Note that a model is about to be called.

        Raises
        ------
        CapExceededError
            If it cannot run under the cap.
        """
        with self._lock:
            if name in self._in_use and len(self._in_use) == 1:
                return
            for other, its_runner in [*self._in_use.items()]:
                with its_runner.resting() as resting:  # else it is a call inside of its own
                    if resting and other != name:
                        self.end(other)
            if name not in self._in_use:
                self._acquire(name)
                self._in_use[name] = runner

    def end(self, name: str | None = None) -> None:
        """Release one model, or all, if this acquired it."""
        with self._lock:
            for each in [*self._in_use] if name is None else [name]:
                if self._in_use.pop(each, None) is not None:
                    self._release(each)
