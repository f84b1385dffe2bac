"""The state of the process: what there is once, however many managers there are.

All else that lives as long as the process is a cache (the library in torch's dispatcher) or undoes
itself (building skeletons). A test that needs a clean slate, or a cap on a device without CUDA,
changes this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from penstock import _core
from penstock.cap.hard_cap import HardCap
from penstock.cap.pressure_listener import Listener
from penstock.cap.stacks import StackRecorder
from penstock.memory.devices import current_ordinal, device_of

__all__ = ["STATE", "current_cap", "require_cap"]


@dataclass
class State:
    """What the process has."""

    caps: dict[int, HardCap] = field(default_factory=dict)
    """Hard caps, by the device's ordinal."""
    hooked: bool = False
    """Whether torch allocates from allocators of Penstock's, on all devices."""
    torch_allocators: list[Any] = field(default_factory=list)
    """Torch's objects for that, which have to live as long as the process."""
    pool_allocator: Any = None
    """Torch's object for the pools of `capped`, which has to do so too."""
    capped: set[int] = field(default_factory=set)
    """Ordinals of devices on which a `capped` block is active."""
    recorder: StackRecorder | None = None
    """What notes who makes large tensors."""
    listeners: WeakKeyDictionary[HardCap, Listener] = field(default_factory=WeakKeyDictionary)
    """What waits for each cap's events of pressure."""


STATE = State()


def current_cap(device: str | torch.device | _core.Device) -> HardCap | None:
    """Return the hard cap of a device, if one was set."""
    if not STATE.caps:
        return None
    if isinstance(device, _core.Device):
        caps = STATE.caps.values()
        return next((cap for cap in caps if cap.pager.core_device is device), None)
    if device == "auto":
        device = "cuda"
    where = device_of(device)
    if where.type != "cuda":
        return None
    return STATE.caps.get(current_ordinal() if where.index is None else where.index)


def require_cap(device: str | torch.device) -> HardCap:
    """Return the hard cap of a device.

    Raises
    ------
    ValueError
        If it has none.
    """
    cap = current_cap(device)
    if cap is None:
        raise ValueError(f"{str(device)!r} has no hard cap; see penstock.set_cap")
    return cap
