"""Run PyTorch models that do not fit in the memory you allow, under a cap that is never crossed."""

from penstock._core import __version__
from penstock.binding import ParameterMovedWarning
from penstock.errors import (
    CapExceededError,
    CheckpointError,
    DeviceError,
    ModelError,
    PenstockError,
    ScheduleError,
)
from penstock.figures import CapStats, Holder, memory_stats, memory_summary, record_stacks
from penstock.hard_cap import set_cap
from penstock.manager import MemoryManager
from penstock.offload import manager_of, offload, restore
from penstock.pager import Pager, Region
from penstock.pressure import PressureEvent, PressureHandle, on_pressure
from penstock.scoped import CappedScope, capped
from penstock.stats import ManagerStats, ModelStats

__all__ = [
    "CapExceededError",
    "CapStats",
    "CappedScope",
    "CheckpointError",
    "DeviceError",
    "Holder",
    "ManagerStats",
    "MemoryManager",
    "ModelError",
    "ModelStats",
    "Pager",
    "ParameterMovedWarning",
    "PenstockError",
    "PressureEvent",
    "PressureHandle",
    "Region",
    "ScheduleError",
    "__version__",
    "capped",
    "manager_of",
    "memory_stats",
    "memory_summary",
    "offload",
    "on_pressure",
    "record_stacks",
    "restore",
    "set_cap",
]
