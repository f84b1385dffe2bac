"""`penstock doctor`: what this machine offers."""

from __future__ import annotations

import argparse
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from penstock import _core
from penstock.cli.output import print_table
from penstock.errors import DeviceError
from penstock.sizes import format_bytes

__all__ = ["run"]

_LINK_BYTES = 1 << 30
_DEVICE_NODES = ("nvidia[0-9]*", "nvidiactl", "nvhost*", "dxg")  # Linux, Tegra, WSL


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Look at the machine, print it, and return it.

    `ok` is false where nothing can page: then the exit code is 1.
    """
    found: dict[str, Any] = {
        "penstock": _core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "built_with_cuda": _core.built_with_cuda(),
        "no_cuda_reason": _no_gpu_reason(),
        "devices": [_host()],
    }
    found["devices"] += [_gpu(ordinal) for ordinal in range(_core.cuda_device_count())]
    found["auto"] = _choice(found)
    found["ok"] = found["auto"]["pager"] is not None
    _print(found, console)
    return found


def _host() -> dict[str, Any]:
    device = _core.open_device("cpu")
    memory = device.memory_info()
    host: dict[str, Any] = {
        "device": "cpu",
        "name": device.info().name,
        "total_bytes": memory.total_bytes,
        "free_bytes": memory.free_bytes,
        "no_managed_reason": "",
        "frames": True,
    }
    try:
        host["spill_directory"] = _core.spill_directory()
        host["spill_free_bytes"] = shutil.disk_usage(host["spill_directory"]).free
    except DeviceError as error:
        host["no_managed_reason"] = str(error)
    return host


def _gpu(ordinal: int) -> dict[str, Any]:
    name = f"cuda:{ordinal}"
    try:
        device = _core.open_device(name)
        info, memory = device.info(), device.memory_info()
        size = min(_LINK_BYTES, memory.free_bytes // 4)
        return {
            "device": name,
            "name": info.name,
            "total_bytes": memory.total_bytes,
            "free_bytes": memory.free_bytes,
            "no_managed_reason": info.no_managed_reason,
            "frames": True,  # or the device would not have opened
            "driver_version": info.driver_version,
            "runtime_version": info.runtime_version,
            "link_bytes_per_second": _core.measure_link_rate(device, size),
        }
    except DeviceError as error:
        return {"device": name, "name": "?", "no_managed_reason": str(error), "frames": False}


def _no_gpu_reason() -> str:
    """Say why there is no CUDA device; empty where there is one.

    Without a GPU, CUDA says that the driver is insufficient, which is none at all.
    """
    reason = _core.no_cuda_reason()
    if reason and _core.built_with_cuda() and not any(map(_exists, _DEVICE_NODES)):
        return "this system has no NVIDIA GPU, or does not show it to this process"
    return reason


def _exists(pattern: str) -> bool:
    return any(Path("/dev").glob(pattern))


def _choice(found: dict[str, Any]) -> dict[str, Any]:
    """Say what device="auto" and pager="auto" take."""
    gpus = found["devices"][1:]
    if not gpus:
        host = found["devices"][0]
        chosen = None if host["no_managed_reason"] else "managed"
        why = host["no_managed_reason"] or found["no_cuda_reason"]
        return {"device": host["device"], "pager": chosen, "reason": why}
    if not gpus[0]["frames"]:
        return {"device": gpus[0]["device"], "pager": None, "reason": gpus[0]["no_managed_reason"]}
    return {"device": gpus[0]["device"], "pager": "frames", "reason": "a GPU is there"}


def _size(device: dict[str, Any], key: str) -> str:
    return format_bytes(device[key]) if key in device else "?"


def _print(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"penstock {found['penstock']}, torch {found['torch']}, Python {found['python']}",
        highlight=False,
    )
    headings = ("device", "name", "memory", "free", "frames", "managed", "link from pinned memory")
    rows = []
    for device in found["devices"]:
        rate = device.get("link_bytes_per_second")
        rows.append(
            (
                device["device"],
                device["name"],
                _size(device, "total_bytes"),
                _size(device, "free_bytes"),
                "yes" if device["frames"] else "no",
                device["no_managed_reason"] or "yes",
                f"{rate / 1e9:.1f} GB/s" if rate else "-",
            )
        )
    print_table(console, headings, rows)
    host = found["devices"][0]
    if "spill_directory" in host:
        free = format_bytes(host["spill_free_bytes"])
        console.print(
            f"evicted bytes of the cpu device go to {host['spill_directory']} ({free} free)",
            highlight=False,
        )
    auto = found["auto"]
    console.print(
        f"auto takes {auto['device']}, pager {auto['pager']}: {auto['reason']}", highlight=False
    )
