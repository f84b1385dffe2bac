"""The rate of the link between host and device, measured once and beside other work."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from penstock import _core

__all__ = ["LinkRate"]

_SAMPLE = 40 << 20  # bytes that are copied


class LinkRate:
    """Measures how fast copies from pinned memory are. Thread-safe.

    Parameters
    ----------
    budget
        Of the device's memory.

    Attributes
    ----------
    charged
        Whether what is copied to is charged to the budget: under a hard cap it is, or it would be
        taken for memory outside of the ledger.
    """

    def __init__(self, device: _core.Device, budget: _core.Budget) -> None:
        self._device = device
        self._budget = budget
        self.charged = False
        self._rate: Future[float] | None = None
        self._lock = threading.Lock()

    def begin(self) -> Future[float]:
        """Begin to measure on a thread of its own, if nobody has; wait for nothing.

        Returns
        -------
        Future
            Of bytes per second.
        """
        with self._lock:
            rate = self._rate
            if rate is None or (rate.done() and rate.exception() is not None):
                thread = ThreadPoolExecutor(1)
                rate = self._rate = thread.submit(self._measure)
                thread.shutdown(wait=False)
            return rate

    def _measure(self) -> float:
        if not self.charged:
            return _core.measure_link_rate(self._device, _SAMPLE)
        unit = self._device.info().frame_granularity
        size = min(_SAMPLE, max(unit, self._budget.available // 2 // unit * unit))
        self._budget.charge(_core.Tag.workspace, size)
        try:
            return _core.measure_link_rate(self._device, size)
        finally:
            self._budget.release(_core.Tag.workspace, size)
