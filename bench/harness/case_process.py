"""What the processes of cases share: how they begin, and what they ask a manager."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from penstock.bench.measure import synchronize
from penstock.manager.manager import MemoryManager


def figures_of(manager: MemoryManager, name: str) -> dict[str, Any]:
    """Return what a manager says of one of its models, and of the room that it has."""
    stats = manager.stats()
    memory = stats.models[name].memory
    return {
        **asdict(memory),
        "nbytes": stats.models[name].nbytes,
        "room": max(0, stats.cap - (stats.used - memory.resident_bytes)),
        "ledger_peak": stats.peak,
        "used_by_tag": dict(stats.used_by_tag),
        "suppressed_errors": stats.suppressed_errors,
    }


def warm_device(device: torch.device) -> None:
    """Make the context and cuBLAS's workspace, which are nobody's."""
    x = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    torch.nn.functional.linear(x, x)
    del x
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
