"""Being told when memory gets short."""

from __future__ import annotations

import torch

from penstock.arguments import checked
from penstock.cap import process
from penstock.cap.pressure_listener import Callback, Listener, PressureHandle
from penstock.cap.process import STATE

__all__ = ["on_pressure"]


@checked
def on_pressure(callback: Callback, *, device: str | torch.device = "cuda") -> PressureHandle:
    """Have a function called when memory under a device's hard cap gets short.

    Parameters
    ----------
    callback
        Called with a `PressureEvent`, on a thread of Penstock's, a moment after the request, which
        does not wait for it. What it raises is logged. Events come in order; where it is slow, some
        are dropped.

    Returns
    -------
    PressureHandle
        Its `remove()` ends the calls.

    Raises
    ------
    ValueError
        If the device has no hard cap.
    """
    cap = process.require_cap(device)
    listener = STATE.listeners.get(cap)
    if listener is None:
        listener = STATE.listeners.setdefault(cap, Listener(cap.allocator))
    return listener.add(callback)
