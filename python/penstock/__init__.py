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
from penstock.kernels import Kernel
from penstock.lazy import LazyModule
from penstock.manager import MemoryManager
from penstock.offload import manager_of, offload, restore
from penstock.pager import Pager, Region
from penstock.policy import Candidate, FarthestUse, Policy, Priority
from penstock.pressure import PressureEvent, PressureHandle, on_pressure
from penstock.residency import NothingToKeepWarning
from penstock.scoped import CappedScope, capped
from penstock.stats import ManagerStats, ModelStats

__all__ = [
    "Candidate",
    "CapExceededError",
    "CapStats",
    "CappedScope",
    "CheckpointError",
    "DeviceError",
    "FarthestUse",
    "Holder",
    "Kernel",
    "LazyModule",
    "ManagerStats",
    "MemoryManager",
    "ModelError",
    "ModelStats",
    "NothingToKeepWarning",
    "Pager",
    "ParameterMovedWarning",
    "PenstockError",
    "Policy",
    "PressureEvent",
    "PressureHandle",
    "Priority",
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
