"""Giving up what a model holds in place, whenever somebody under the same cap needs the room.

Who needs room asks in the midst of an operation of its own, in any thread. The model goes back to
its steps as if it had run by them all along, which takes that no thread is inside of the code that
runs it: that takes microseconds, and is waited for, while other threads wait at the next hook.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from types import CodeType, FrameType
from typing import Protocol

from penstock import _core
from penstock.memory import FramesMemory, ModelMemory
from penstock.turns import Turn
from penstock.under_way import is_inside_penstock

__all__ = ["Giving", "Holder"]

_PATIENCE = 0.05  # seconds that a tensor waits for a model's own work, before it asks others
_LOOK_AGAIN = 0.001  # seconds


class Holder(Protocol):
    """Who runs a model, and may hold what stays of it in place."""

    memory: ModelMemory
    turn: Turn
    gate: threading.RLock

    @property
    def holds(self) -> bool:
        """Whether anything is held in place."""

    @property
    def captures(self) -> bool:
        """Whether a graph is being captured, which reads what is held."""

    @property
    def is_called(self) -> bool:
        """Whether a call is under way."""

    def stop_holding(self, frame: FrameType | None) -> bool:
        """Go back to running step by step, where nobody is inside of this code; with the gate.

        Parameters
        ----------
        frame
            What the calling thread runs.

        Returns
        -------
        bool
            Whether it does.
        """


class Giving:
    """Has tensors ask for what a model holds in place, where they share a cap with it.

    Parameters
    ----------
    hooks
        The code at whose beginning threads wait while something is given up.
    """

    def __init__(self, holder: Holder, hooks: tuple[CodeType, ...]) -> None:
        self._holder = weakref.ref(holder)  # it has this, and its memory goes with it at once
        self._gate = holder.gate
        self._hooks = hooks
        self.under_way = False
        """With the holder's gate locked: hooks wait then."""
        self._offers = self._offer(holder.memory)

    def _offer(self, memory: ModelMemory) -> list[_core.RoomCallback]:
        if memory.pager.hard_cap is None or not isinstance(memory, FramesMemory):
            return []
        giving = weakref.ref(self)

        def offer(idle: bool) -> _core.RoomCallback:
            def give(nbytes: int) -> int:
                asked = giving()
                frame = sys._getframe().f_back
                return asked.give(nbytes, idle=idle, frame=frame) if asked is not None else 0

            return _core.RoomCallback(memory.pager.frames, idle, give)

        return [offer(idle) for idle in (True, False)]

    def wait(self) -> None:
        """Wait while what is held in place is given to another thread; called by a hook itself."""
        with self._gate:
            pass

    def give(self, nbytes: int, *, idle: bool, frame: FrameType | None) -> int:
        """Give up pages that are held in place, wherever the model is; called by who needs room.

        Steps come back. Modules that are being called have theirs from now on, and what an
        operation reads just then stays until the next pass.

        Parameters
        ----------
        idle
            Whether to do so only if the model is not in use; else, only if it is.
        frame
            What this thread runs.

        Returns
        -------
        int
            Bytes given up; none where the model does something that cannot be interrupted.
        """
        holder = self._holder()
        if holder is None:
            return 0
        memory = holder.memory
        assert isinstance(memory, FramesMemory)
        if not holder.holds or not memory.gives or memory.active == idle:
            return 0
        if not self._gate.acquire(timeout=_PATIENCE):
            return 0
        try:
            if holder.holds and not self._have_steps_back(holder, frame):
                return 0
        finally:
            self.under_way = False
            self._gate.release()
        return memory.region_core.give_first(nbytes)

    def _have_steps_back(self, holder: Holder, frame: FrameType | None) -> bool:
        if holder.captures or holder.memory.pager.capturing():
            return False
        until = time.monotonic() + _PATIENCE
        self.under_way = True  # from now on others wait where they come to this code
        while not self._is_left_alone(holder, frame, threading.get_ident()):
            if is_inside_penstock(frame) or time.monotonic() > until:
                return False
            time.sleep(_LOOK_AGAIN)
        return holder.stop_holding(frame)

    def _is_left_alone(self, holder: Holder, frame: FrameType | None, here: int) -> bool:
        """Whether no thread that could change the model's state is inside of the code that runs it.

        One that waits at a hook has not begun to.

        Parameters
        ----------
        frame, here
            What this thread runs, and its number.
        """
        frames = {**sys._current_frames(), here: frame}
        runs = holder.turn.holder if holder.is_called else None
        threads = frames if runs is None else {here, runs}
        return not any(is_inside_penstock(self._past_waiting(frames.get(each))) for each in threads)

    def _past_waiting(self, frame: FrameType | None) -> FrameType | None:
        """Return the frame that a hook interrupts, where it is one that waits; else the same."""
        hook = frame.f_back if frame is not None and frame.f_code is _WAIT else None
        if hook is None or hook.f_code not in self._hooks or hook.f_back is None:
            return frame
        return hook.f_back.f_back  # of whoever calls the hook


_WAIT = Giving.wait.__code__
