"""Turns of threads at running models: one thread at a time for each, first come, first served.

A thread that runs one model may come to need another's turn. Where threads would wait for each
other in a circle, the one that would close it gets an error instead.
"""

from __future__ import annotations

import threading
from collections import deque
from types import FrameType

from penstock.errors import ScheduleError

__all__ = ["Turn", "Turns", "is_over"]

_LOOK_AGAIN = 0.05  # seconds until a waiter looks whether the holder was interrupted


def is_over(frame: FrameType) -> bool:
    """Whether a function has returned or raised, by its frame; from any thread.

    Not for generators: one that is suspended would be closed.
    """
    try:
        frame.clear()
    except RuntimeError:  # it is being executed
        return False
    return True


class Turns:
    """What the turns of one manager's models have in common: who waits for whom."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.waiting: dict[int, Turn] = {}  # by thread

    def closes_circle(self, thread: int, turn: Turn) -> bool:
        """Whether a turn's holder waits, through others, for a thread. With the lock held."""
        seen: set[int] = set()
        holder = turn.holder
        while holder is not None and holder not in seen:
            if holder == thread:
                return True
            seen.add(holder)
            wanted = self.waiting.get(holder)
            holder = wanted.holder if wanted else None
        return False


class Turn:
    """The turn at one model.

    Parameters
    ----------
    turns
        Those of the models beside which it runs.
    name
        The model's, for messages.
    """

    def __init__(self, turns: Turns, name: str) -> None:
        self._turns = turns
        self._name = name
        self._queue: deque[object] = deque()
        self.holder: int | None = None
        self._frame: FrameType | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn, and nobody can take it over."""
        return self.holder == threading.get_ident() and not self.left()

    def left(self) -> bool:
        """Whether the holder has left without giving the turn back, as an interrupt makes it."""
        frame = self._frame
        return frame is not None and is_over(frame)

    def seize(self, frame: FrameType) -> bool:
        """Take the turn from a holder that has left, without waiting; return whether."""
        before = self._frame
        if not self.left():  # without the lock, as that frees what the frame held
            return False
        with self._turns.changed:
            if self._frame is not before:
                return False
            self.holder, self._frame = threading.get_ident(), frame
            return True

    def take(self, frame: FrameType) -> bool:
        """Wait for the turn, and take it. It does not nest.

        Parameters
        ----------
        frame
            Of the function that gives it back before it ends, unless it is interrupted.

        Returns
        -------
        bool
            Whether it was taken over from a holder that has left without giving it back.

        Raises
        ------
        ScheduleError
            If its holder waits for this thread.
        """
        me = threading.get_ident()
        ticket = object()
        changed = self._turns.changed
        with changed:
            self._queue.append(ticket)
        try:
            while True:
                before = self._frame
                over = self.left()
                with changed:
                    free = self._frame is None or (over and self._frame is before)
                    if free and self._queue[0] is ticket:
                        self.holder, over = me, self._frame is not None
                        self._frame = frame
                        return over
                    if not free and self._turns.closes_circle(me, self):
                        raise ScheduleError(
                            f"model {self._name!r} is being run by a thread that waits for this "
                            "one to end what it runs: have threads that nest models call them in "
                            "one order, or share a lock"
                        )
                    self._turns.waiting[me] = self
                    changed.wait(_LOOK_AGAIN)
        finally:
            with changed:
                self._turns.waiting.pop(me, None)
                self._queue.remove(ticket)
                changed.notify_all()

    def give_back(self) -> None:
        """Let the next have the turn."""
        with self._turns.changed:
            self.holder = self._frame = None
            self._turns.changed.notify_all()
