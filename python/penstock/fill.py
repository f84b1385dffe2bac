"""Putting weights in place: each byte is read once, to where it stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch

from penstock import _core
from penstock.checkpoint import TensorEntry
from penstock.errors import CheckpointError
from penstock.layout import Placement
from penstock.pager import Region

__all__ = ["Progress", "fill"]

Progress = Callable[[int, int], None]
"""Called now and then with the bytes in place and the bytes in all."""

_CHUNK = 16 << 20  # bytes converted at a time
_POLL = timedelta(milliseconds=50)

Extent = tuple[int, int, int, int]


def fill(region: Region, placements: list[Placement], progress: Progress | None = None) -> None:
    """Read all tensors into a region, making none of it resident.

    Extents of files are read in parallel, straight into the region. Tensors that are converted, or
    come from memory, go through a buffer of 16 MiB; those in another order of elements, through
    memory of their own.

    Parameters
    ----------
    progress
        Told how far it is; see `Progress`.

    Raises
    ------
    CheckpointError
        If a file cannot be read; nothing of the region can be relied on then.
    """
    direct = [p for p in placements if _is_direct(p)]
    rest = [p for p in placements if not _is_direct(p)]
    before = sum(p.nbytes for p in direct)
    total = before + sum(p.nbytes for p in rest)
    told = progress or (lambda done, total: None)
    told(0, total)
    for done in _read_files(region, direct):
        told(done, total)
    for done in _write_chunks(region, rest):
        told(before + done, total)


def _is_direct(placement: Placement) -> bool:
    return isinstance(placement.source.where, TensorEntry) and placement.is_verbatim


def _read_files(region: Region, placements: list[Placement]) -> Iterator[int]:
    paths, extents = _extents(placements)
    if not extents:
        return
    threads = min(8, os.cpu_count() or 1)
    job = _core.FillJob(region.core, paths, extents, threads)
    while not job.wait_for(_POLL):
        yield job.done_bytes
    yield job.total_bytes


def _extents(placements: list[Placement]) -> tuple[list[str], list[Extent]]:
    """List (file, offset in it, offset in the region, bytes), neighbours joined."""
    files: dict[str, int] = {}
    extents: list[Extent] = []
    for placement in placements:
        entry = placement.source.where
        assert isinstance(entry, TensorEntry)
        if entry.nbytes == 0:
            continue
        file = files.setdefault(str(entry.path), len(files))
        extent = (file, entry.offset, placement.offset, entry.nbytes)
        if extents and _adjoins(extents[-1], extent):
            last = extents.pop()
            extent = (*last[:3], last[3] + entry.nbytes)
        extents.append(extent)
    return list(files), extents


def _adjoins(a: Extent, b: Extent) -> bool:
    return a[0] == b[0] and a[1] + a[3] == b[1] and a[2] + a[3] == b[2]


def _write_chunks(region: Region, placements: list[Placement]) -> Iterator[int]:
    done = 0
    for placement in placements:
        at = placement.offset
        for chunk in _reordered(placement) if placement.stride else _chunks(placement):
            values = chunk.to(placement.dtype).contiguous().view(torch.uint8)
            region.core.write(at, values.numpy())
            at += values.numel()
            done += values.numel()
            yield done


def _reordered(placement: Placement) -> Iterator[torch.Tensor]:
    """Yield the source's elements in the order in which the placement's stride has them."""
    assert placement.stride is not None
    shape, dtype = placement.source.shape, placement.source.dtype
    ordered = torch.empty_strided(shape, placement.stride, dtype=dtype)
    ordered.copy_(torch.cat(list(_chunks(placement))).view(shape))
    yield ordered.as_strided((ordered.numel(),), (1,))


def _chunks(placement: Placement) -> Iterator[torch.Tensor]:
    """Yield the source's elements in order, flat, on the CPU, in its own dtype."""
    where = placement.source.where
    if isinstance(where, TensorEntry):
        yield from _file_chunks(where, placement.source.dtype)
        return
    flat = where.contiguous().reshape(-1)
    elements = max(1, _CHUNK // flat.element_size())
    for first in range(0, flat.numel(), elements):
        yield flat[first : first + elements].cpu()


def _file_chunks(entry: TensorEntry, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        left = entry.nbytes
        while left > 0:
            chunk = bytearray(min(_CHUNK, left))
            if file.readinto(chunk) != len(chunk):
                raise CheckpointError(
                    f"{entry.path} ended inside {entry.name!r}: {left} more bytes are needed",
                    path=entry.path,
                    tensor=entry.name,
                    offset=entry.offset + entry.nbytes - left,
                )
            yield torch.frombuffer(chunk, dtype=dtype)
            left -= len(chunk)
