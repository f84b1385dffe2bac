"""The machine that figures are from."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

import torch

from penstock import _core
from penstock.bench.measure import link_rate

__all__ = ["describe_machine"]


def describe_machine(device: torch.device, link_bytes: int) -> dict[str, Any]:
    """Say what the figures are from."""
    rate = link_rate(device, link_bytes)
    name, driver = "CPU", "-"
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver_version()
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "penstock": _core.__version__,
        "python": platform.python_version(),
        "pinned link": f"{rate / 1e9:.1f} GB/s" if rate else "not measured",
    }


def _driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "?"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split("\n")[0].strip() or "?"
