"""Models that are in use while they are called, as the parts of a pipeline are.

Nobody acquires them. A call does, and releases those whose calls have ended; what these have in
place stays until another one needs the room.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from penstock.runner import Runner

__all__ = ["OnCall"]


class OnCall:
    """Acquires whichever model is called.

    Parameters
    ----------
    acquire, release
        Called with the name of a model. Acquiring may wait for calls of other models.
    """

    def __init__(
        self,
        acquire: Callable[[str], object],
        release: Callable[[str], object],
    ) -> None:
        self._acquire = acquire
        self._release = release
        self._in_use: dict[str, Runner] = {}
        self._lock = threading.Lock()  # not held while acquiring

    def begin(self, name: str, runner: Runner) -> None:
        """Note that a model is about to be called.

        Raises
        ------
        CapExceededError
            If it cannot run under the cap.
        """
        with self._lock:
            over = [
                other
                for other, its_runner in self._in_use.items()
                if other != name and not _is_called(its_runner)
            ]
            new = name not in self._in_use
            self._in_use[name] = runner
        for other in over:
            self.end(other)
        if not new:
            return
        try:
            self._acquire(name)
        except BaseException:
            with self._lock:
                self._in_use.pop(name, None)
            raise

    def end(self, name: str | None = None) -> None:
        """Release one model, or all, if this acquired it."""
        with self._lock:
            names = [*self._in_use] if name is None else [name]
            ended = [each for each in names if self._in_use.pop(each, None) is not None]
        for each in ended:
            self._release(each)


def _is_called(runner: Runner) -> bool:
    with runner.resting() as resting:
        return not resting
