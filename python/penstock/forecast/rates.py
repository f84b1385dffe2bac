"""How fast the link, the disk and the device are: as measured here, or as given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock import _core
from penstock.forecast.read_rate import measure_read_rate
from penstock.forecast.target import Target
from penstock.memory.devices import uses_cuda
from penstock.memory.link_rate import LinkRate
from penstock.sizes import parse_rate

__all__ = ["Rates", "find_rates"]

_GPU_SIDE = 4096  # of matrices that are multiplied to measure
_CPU_SIDE = 512
_GPU_BYTES = 256 << 20  # that are read to measure
_CPU_BYTES = 64 << 20
_REPEATS = 3


@dataclass(frozen=True)
class Rates:
    """How fast things are.

    Parameters
    ----------
    link, disk, memory
        Bytes per second from pinned host memory to the device, from the disk, and from the
        device's own memory; None where it is not known.
    compute
        Floating-point operations per second of large matrix products; None if not known.
    """

    link: float
    disk: float | None
    compute: float | None
    memory: float | None

    @property
    def knows_compute(self) -> bool:
        """Whether anything is known of the device's own speed."""
        return bool(self.compute or self.memory)


def find_rates(
    target: Target,
    files: Iterable[Path],
    dtype: torch.dtype,
    *,
    link: float | str | None,
    disk: float | str | None,
    compute: float | str | None,
    memory: float | str | None,
) -> Rates:
    """Measure what is not given. On a GPU, its speed only where the process uses CUDA already.

    A hard cap of the process has to come before CUDA is used, and asking must not forbid it.

    Parameters
    ----------
    files
        Of the checkpoint, to read some of them past the page cache.
    dtype
        Of the matrices.
    link, disk, memory
        Bytes per second, or a text such as `"25GB/s"`.
    compute
        Floating-point operations per second, or a text such as `"400TFLOPS"`.

    Raises
    ------
    ValueError
        If a rate is none.
    DeviceError
        If the device refuses to be measured.
    """
    link_rate = parse_rate(link, "B/s") if link is not None else None
    disk_rate = parse_rate(disk, "B/s") if disk is not None else None
    flops = parse_rate(compute, "FLOPS") if compute is not None else None
    if link_rate is None:
        assert target.core is not None  # or the target would have been refused
        link_rate = LinkRate(target.core, _core.Budget(1)).begin().result()
    if disk_rate is None:
        disk_rate = measure_read_rate(files)
    reads = parse_rate(memory, "B/s") if memory is not None else None
    here = target.core is not None and (not target.is_gpu or uses_cuda())
    if here:
        device = torch.device(target.device)
        reads = reads or _memory_rate(device)
        flops = flops or _compute_rate(device, dtype)
    return Rates(link_rate, disk_rate, flops, reads)


def _compute_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = _GPU_SIDE if device.type == "cuda" else _CPU_SIDE
    fit = dtype in (torch.float16, torch.bfloat16, torch.float32)
    matrix = torch.ones(side, side, dtype=dtype if fit else torch.bfloat16, device=device)
    return 2 * side**3 / _shortest(lambda: matrix @ matrix, device)


def _memory_rate(device: torch.device) -> float:
    nbytes = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    values = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    return nbytes / _shortest(values.sum, device)


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the shortest of some runs, after one that does not count."""
    times = []
    with torch.inference_mode():
        for _ in range(_REPEATS + 1):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times[1:])
