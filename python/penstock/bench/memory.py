"""Memory in use: the device's as its driver reports it, and the process's as the kernel does."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Baseline", "Watch", "torch_pinned_bytes"]

_FIELDS = ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmPin", "VmLck")


def process_memory() -> dict[str, int]:
    """Return bytes of this process by the names of proc(5), status."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in _FIELDS:
            found[name] = int(rest.split()[0]) << 10
    return found


def own_bytes(memory: Mapping[str, int]) -> int:
    """Return what of the resident memory is the process's own, and not the page cache's."""
    return memory.get("RssAnon", 0) + memory.get("RssShmem", 0)


def available_bytes() -> int:
    """Return what the system could give to programs; page cache counts as available."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def device_used_bytes(device: torch.device) -> int:
    """Return what the driver counts as in use on the whole device; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def torch_reserved_bytes() -> int:
    """Return what torch's own allocator holds: activations, and what it keeps for later."""
    if not torch.cuda.is_available():
        return 0
    try:
        return torch.cuda.memory_reserved()
    except RuntimeError:  # an allocator that was plugged in keeps no such count
        return 0


def torch_pinned_bytes() -> int | None:
    """Return pinned host memory that torch holds, in whole blocks; None where it does not say."""
    if not torch.cuda.is_available() or not hasattr(torch.cuda, "host_memory_stats"):
        return None
    found = torch.cuda.host_memory_stats().get("allocated_bytes.current")
    return None if found is None else int(found)


class Watch(threading.Thread):
    """Looks at memory over and over while a block runs, and keeps the most that it saw.

    Its looks cost time, so passes are not timed under it.

    Parameters
    ----------
    interval
        Seconds between two looks.
    """

    def __init__(self, device: torch.device, interval: float) -> None:
        super().__init__(daemon=True)
        self._device = device
        self._interval = interval
        self._ended = threading.Event()
        self.device_bytes = 0
        self.resident_bytes = 0
        self.own_bytes = 0
        self.least_available = 1 << 62

    def look(self) -> None:
        """Look once."""
        memory = process_memory()
        self.device_bytes = max(self.device_bytes, device_used_bytes(self._device))
        self.resident_bytes = max(self.resident_bytes, memory.get("VmRSS", 0))
        self.own_bytes = max(self.own_bytes, own_bytes(memory))
        self.least_available = min(self.least_available, available_bytes())

    def run(self) -> None:
        """Look until the block ends."""
        while not self._ended.wait(self._interval):
            self.look()

    def __enter__(self) -> Watch:
        self.look()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()
        self.look()


@dataclass(frozen=True)
class Baseline:
    """What was in use before a case loaded its weights; its figures are what came on top."""

    device_bytes: int
    torch_bytes: int
    own_bytes: int
    available: int

    @staticmethod
    def take(device: torch.device) -> Baseline:
        """Look at memory now."""
        return Baseline(
            device_used_bytes(device),
            torch_reserved_bytes(),
            own_bytes(process_memory()),
            available_bytes(),
        )

    def figures(self, loading: Watch, running: Watch) -> dict[str, int]:
        """Return the most that was in use on top while loading and while running.

        `vram_bytes` is the driver's count (cudaMemGetInfo), 0 for the CPU; `vram_torch_bytes` is
        what of it torch's own allocator held, that is activations and weights that torch allocated.
        `host_system_bytes` is what the system as a whole had less to give, which counts pinned
        memory that no process's figures show.
        """
        return {
            "vram_bytes": running.device_bytes - self.device_bytes,
            "vram_loading_bytes": max(0, loading.device_bytes - self.device_bytes),
            "vram_torch_bytes": torch_reserved_bytes() - self.torch_bytes,
            "host_resident_bytes": running.resident_bytes,
            "host_peak_bytes": max(loading.resident_bytes, running.resident_bytes),
            "host_own_bytes": running.own_bytes - self.own_bytes,
            "host_own_peak_bytes": max(loading.own_bytes, running.own_bytes) - self.own_bytes,
            "host_system_bytes": self.available - running.least_available,
        }
