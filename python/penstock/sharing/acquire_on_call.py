"""Models that are in use while they are called, as the parts of a pipeline are.

Nobody acquires them. The first operation of one does, and releases those of which no call is under
way; what these have in place stays until another one needs the room.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from penstock.run.runner import Runner

__all__ = ["OnCall"]


class OnCall:
    """Acquires whichever model is used.

    Parameters
    ----------
    acquire, release
        Called with the name of a model.
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

    def watch(self, name: str, runner: Runner) -> None:
        """Have the next operation of a model acquire it."""
        runner.on_next_use(lambda: self._begin(name, runner))

    def _begin(self, name: str, runner: Runner) -> None:
        with self._lock:
            over = [other for other, used in self._in_use.items() if not used.is_called]
            self._in_use[name] = runner
        for other in over:
            if other != name:
                self.end(other)
        try:
            self._acquire(name)
        except BaseException:
            with self._lock:
                self._in_use.pop(name, None)
            self.watch(name, runner)
            raise

    def end(self, name: str | None = None) -> None:
        """Release one model, or all, if this acquired it."""
        with self._lock:
            names = [*self._in_use] if name is None else [name]
            ended = [(each, self._in_use.pop(each)) for each in names if each in self._in_use]
        for each, runner in ended:
            self.watch(each, runner)
            self._release(each)
