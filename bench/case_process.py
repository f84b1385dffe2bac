"""What the processes of cases share: how they begin, and how they say what they found."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from penstock.bench.measure import synchronize
from penstock.bench.subject import UnavailableError
from penstock.manager.manager import MemoryManager


def report(work: Callable[[], dict[str, Any]]) -> int:
    """Print what a function returns as one line of JSON, or why it does not; return the exit code.

    `penstock.bench.runner.run_for_json` reads that line.
    """
    code = 0
    try:
        found = work()
    except UnavailableError as error:
        found = {"unavailable": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
        code = 1
    print(json.dumps(found, default=str), flush=True)
    return code


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
