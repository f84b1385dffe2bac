"""A thread that waits until memory under a hard cap gets short, and tells of it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from penstock import _core

__all__ = ["Callback", "Listener", "PressureEvent", "PressureHandle"]

_log = logging.getLogger(__name__)
_WAIT = timedelta(seconds=1)  # for events, at a time
_PATIENCE = 10.0  # seconds for a callback that runs when the interpreter ends


@dataclass(frozen=True)
class PressureEvent:
    """Memory under a hard cap was short. Sizes in bytes, as of then.

    Parameters
    ----------
    kind
        `"near"`: more than 95 % of the cap are in use, and were not at the request for frames
        before. `"made_room"`: models or others gave frames back for a request. `"refused"`: a
        request raised `torch.OutOfMemoryError`.
    asked
        By the request.
    cap, used, available
        The ledger.
    given
        By others, for the request.
    """

    kind: str
    asked: int
    cap: int
    used: int
    available: int
    given: int


Callback = Callable[[PressureEvent], object]


class PressureHandle:
    """What `on_pressure` returns."""

    def __init__(self, listener: Listener, callback: Callback) -> None:
        self._listener = listener
        self._callback = callback

    def remove(self) -> None:
        """Call the function no more; an event that is under way may still reach it."""
        self._listener.remove(self)

    def __call__(self, event: PressureEvent) -> None:
        """Tell the function of an event."""
        try:
            self._callback(event)
        except Exception:
            _log.exception("a callback of on_pressure failed")


class Listener:
    """The thread that waits for one allocator's events, for as long as anybody wants them."""

    def __init__(self, allocator: _core.CachingAllocator) -> None:
        self._allocator = allocator
        self._lock = threading.Lock()
        self._handles: list[PressureHandle] = []
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def add(self, callback: Callback) -> PressureHandle:
        """Have a function called, on a thread that is started for the first."""
        handle = PressureHandle(self, callback)
        if self._process != os.getpid():  # a forked child has no thread, and maybe a lock in use
            self.__init__(self._allocator)  # type: ignore[misc]
        with self._lock:
            self._handles.append(handle)
            if self._thread is None:
                self._allocator.listen_for_pressure(True)
                self._thread = threading.Thread(
                    target=self._run, name="penstock-pressure", daemon=True
                )
                self._thread.start()
                atexit.register(self.stop)
        return handle

    def remove(self, handle: PressureHandle) -> None:
        """Tell it no more; the thread ends with the last one."""
        if self._process != os.getpid():
            return
        with self._lock:
            if handle in self._handles:
                self._handles.remove(handle)
            last = not self._handles
        if last:
            self.stop()

    def stop(self) -> None:
        """End the thread; it must not wait for the interpreter's lock when that goes."""
        if self._process != os.getpid():
            return
        with self._lock:
            self._handles.clear()
            thread = self._thread
        self._allocator.wake_listener()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_PATIENCE)

    def _run(self) -> None:
        while True:
            events = self._allocator.take_pressure(_WAIT)
            with self._lock:
                handles = list(self._handles)
                if not handles:
                    self._thread = None
                    self._allocator.listen_for_pressure(False)
                    atexit.unregister(self.stop)
                    return
            for event in events:
                told = PressureEvent(
                    kind=event.kind.name,
                    asked=event.asked,
                    cap=event.cap,
                    used=event.used,
                    available=event.available,
                    given=event.given,
                )
                for handle in handles:
                    handle(told)
