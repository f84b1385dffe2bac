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
from penstock.hard_cap import set_cap
from penstock.kernels import Kernel
from penstock.lazy import LazyModule
from penstock.manager import MemoryManager
from penstock.offload import manager_of, offload, restore
from penstock.pager import Pager, Region
from penstock.policy import Candidate, FarthestUse, Policy, Priority
from penstock.residency import NothingToKeepWarning
from penstock.stats import ManagerStats, ModelStats

__all__ = [
    "Candidate",
    "CapExceededError",
    "CheckpointError",
    "DeviceError",
    "FarthestUse",
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
    "Priority",
    "Region",
    "ScheduleError",
    "__version__",
    "manager_of",
    "offload",
    "restore",
    "set_cap",
]
