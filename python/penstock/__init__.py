"""Run PyTorch models that do not fit in the memory you allow, under a cap that is never crossed.

This module has the public names. The folders beside it are rooms; each opens with prose. From the
top: `cli`, `bench`, `integrations` use what is public; `tuning` tries settings; `training` has
gradients and optimizers under the cap too; `manager` has models by name; `sharing` divides a cap
among them; `run` runs one; `forecast` says beforehand how that will be; `loading` gets weights to
it; `schedule` plans; `cap` caps the process; `memory` has the pages; `checkpoint` reads files,
`dispatch` sees operations, `report` has figures. May import everything but the first three.
Importing is thread-safe, as ever.
"""

from penstock import training
from penstock._core import __version__
from penstock.cap.cap_stats import CapStats, Holder, memory_stats, memory_summary, record_stacks
from penstock.cap.capped import CappedScope, capped
from penstock.cap.pressure import on_pressure
from penstock.cap.pressure_listener import PressureEvent, PressureHandle
from penstock.cap.set_cap import set_cap
from penstock.errors import (
    CapExceededError,
    CheckpointError,
    DeviceError,
    ModelError,
    PenstockError,
    ScheduleError,
)
from penstock.forecast.estimate import estimate
from penstock.forecast.result import Estimate
from penstock.loading.binding import ParameterMovedWarning
from penstock.manager.layer_streamer import LayerStreamer
from penstock.manager.lazy_module import LazyModule
from penstock.manager.manager import MemoryManager
from penstock.manager.offload import manager_of, offload, restore
from penstock.memory.pager import Pager
from penstock.memory.region import Region
from penstock.policy import Candidate, FarthestUse, Policy, Priority
from penstock.report.stats import ManagerStats, ModelStats
from penstock.run.kernels import Kernel
from penstock.sharing.residency import NothingToKeepWarning
from penstock.tuning.tune import tune
from penstock.tuning.tuned import Trial, Tuned

__all__ = [
    "Candidate",
    "CapExceededError",
    "CapStats",
    "CappedScope",
    "CheckpointError",
    "DeviceError",
    "Estimate",
    "FarthestUse",
    "Holder",
    "Kernel",
    "LayerStreamer",
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
    "Trial",
    "Tuned",
    "__version__",
    "capped",
    "estimate",
    "manager_of",
    "memory_stats",
    "memory_summary",
    "offload",
    "on_pressure",
    "record_stacks",
    "restore",
    "set_cap",
    "training",
    "tune",
]
