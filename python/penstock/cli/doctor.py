"""`penstock doctor`: what this machine offers."""

from __future__ import annotations

import argparse
import platform
import shutil
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from penstock import _core
from penstock.errors import DeviceError
from penstock.sizes import format_bytes

__all__ = ["run"]

_LINK_BYTES = 1 << 30


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
        "no_cuda_reason": _core.no_cuda_reason(),
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
            "driver_version": info.driver_version,
            "runtime_version": info.runtime_version,
            "link_bytes_per_second": _core.measure_link_rate(device, size),
        }
    except DeviceError as error:
        return {"device": name, "name": "?", "no_managed_reason": str(error)}


def _choice(found: dict[str, Any]) -> dict[str, Any]:
    """Say what device="auto" and pager="auto" take."""
    device = found["devices"][1] if len(found["devices"]) > 1 else found["devices"][0]
    reason = device["no_managed_reason"]
    if reason:
        return {"device": device["device"], "pager": None, "reason": reason}
    why = "a GPU is there" if device["device"] != "cpu" else f"no GPU: {found['no_cuda_reason']}"
    return {
        "device": device["device"],
        "pager": "managed",
        "reason": f"{why}; managed is the only pager so far",
    }


def _size(device: dict[str, Any], key: str) -> str:
    return format_bytes(device[key]) if key in device else "?"


def _print(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"penstock {found['penstock']}, torch {found['torch']}, Python {found['python']}",
        highlight=False,
    )
    if not found["built_with_cuda"]:
        console.print(f"host device only: {found['no_cuda_reason']}")
    table = Table("device", "name", "memory", "free", "managed pager", "link from pinned memory")
    for device in found["devices"]:
        rate = device.get("link_bytes_per_second")
        table.add_row(
            device["device"],
            device["name"],
            _size(device, "total_bytes"),
            _size(device, "free_bytes"),
            device["no_managed_reason"] or "yes",
            f"{rate / 1e9:.1f} GB/s" if rate else "-",
        )
    console.print(table)
    host = found["devices"][0]
    if "spill_directory" in host:
        free = format_bytes(host["spill_free_bytes"])
        console.print(
            f"evicted bytes of the cpu device go to {host['spill_directory']} ({free} free)",
            highlight=False,
        )
    auto = found["auto"]
    console.print(f"auto takes {auto['device']}, pager {auto['pager']}: {auto['reason']}")
