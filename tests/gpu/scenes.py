"""Running a scene: what has to happen in a process of its own."""

import subprocess
import sys
from pathlib import Path

import torch


def run_scene(script: str, scene: str, time_limit: float) -> None:
    """Run one scene of a script beside this file; it may take so many seconds."""
    path = Path(__file__).with_name(script)
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(path), scene],
        capture_output=True,
        text=True,
        timeout=time_limit,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]


def outside(hard_cap) -> int:
    """Return the bytes the ledger charges for what the process holds beside its allocators."""
    return hard_cap.pager.budget.stats().used_by_tag["outside"]


def driver_used() -> int:
    """Return the bytes in use of the device, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def held_by_others(hard_cap) -> int:
    """Return what other processes hold of the device, if none of them allocates meanwhile."""
    ledger = hard_cap.pager.budget.stats()
    return driver_used() - hard_cap.watch.stats().held - ledger.used + outside(hard_cap)
