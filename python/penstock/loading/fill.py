"""Putting weights in place: each byte is read once, to where it stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from penstock import _core
from penstock.checkpoint import TensorEntry
from penstock.errors import CheckpointError
from penstock.loading.layout import Placement
from penstock.memory.region import Region
from penstock.report.progress import Progress

__all__ = ["direct_extents", "fill", "open_listed", "require_as_listed", "wait", "write_rest"]

_CHUNK = 16 << 20  # bytes converted at a time
_POLL = timedelta(milliseconds=50)

Extent = tuple[int, int, int, int]


def fill(
    region: Region,
    placements: list[Placement],
    progress: Progress | None = None,
    *,
    keep_cached: bool = False,
) -> None:
    """Read all tensors into a region of managed memory, making none of it resident.

    Extents of files are read in parallel, straight into the region. Tensors that are converted, or
    come from memory, go through a buffer of 16 MiB; those in another order of elements, or that
    have to be made, through memory of their own, one by one.

    Parameters
    ----------
    progress
        Told how far it is; see `Progress`.
    keep_cached
        Whether what is read from files stays in the page cache.

    Raises
    ------
    CheckpointError
        If a file cannot be read, or changes meanwhile; nothing of the region can be relied on then.
    """
    core = region.core
    assert isinstance(core, _core.ManagedRegion)
    total = sum(placement.nbytes for placement in placements)
    told = progress or (lambda done, total: None)
    told(0, total)
    paths, extents = direct_extents(placements)
    before = 0
    if extents:
        threads = min(8, os.cpu_count() or 1)
        job = _core.FillJob(core, paths, extents, threads, keep_cached)
        require_as_listed(placements)
        before = job.total_bytes
        for done in wait(job):
            told(done, total)
    for done in write_rest(core.write, placements, keep_cached=keep_cached):
        told(before + done, total)


class _Job(Protocol):
    """Reads files in the background."""

    def wait_for(self, limit: timedelta) -> bool: ...
    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...


def wait(job: _Job) -> Iterator[int]:
    """Wait until all is read, yielding the bytes in place now and then."""
    while not job.wait_for(_POLL):
        yield job.done_bytes
    yield job.total_bytes


def direct_extents(placements: list[Placement]) -> tuple[list[str], list[Extent]]:
    """List what files have as it is: paths, and (file, offset in it, in the region, bytes).

    Neighbours are joined.
    """
    files: dict[str, int] = {}
    extents: list[Extent] = []
    for placement in placements:
        at = placement.offset
        for entry in _pieces(placement):
            if entry.nbytes == 0:
                continue
            file = files.setdefault(str(entry.path), len(files))
            extent = (file, entry.offset, at, entry.nbytes)
            at += entry.nbytes
            if extents and _adjoins(extents[-1], extent):
                last = extents.pop()
                extent = (*last[:3], last[3] + entry.nbytes)
            extents.append(extent)
    return list(files), extents


def _pieces(placement: Placement) -> tuple[TensorEntry, ...]:
    """List the extents that hold the very bytes of a tensor; none where no file does."""
    where = placement.source.where
    return where if isinstance(where, tuple) and placement.is_verbatim else ()


def _adjoins(a: Extent, b: Extent) -> bool:
    return a[0] == b[0] and a[1] + a[3] == b[1] and a[2] + a[3] == b[2]


def write_rest(
    write: Callable[[int, np.ndarray[Any, Any]], None],
    placements: list[Placement],
    *,
    keep_cached: bool = False,
) -> Iterator[int]:
    """Write what no file has as it is, yielding the bytes in place now and then.

    Parameters
    ----------
    write
        Puts bytes at an offset of the region.
    keep_cached
        Whether what is read from files stays in the page cache.
    """
    files = _Files(keep_cached)
    done = 0
    for placement in placements:
        if _pieces(placement):
            continue
        at = placement.offset
        chunks = _reordered if placement.stride else _chunks
        for chunk in chunks(placement, files):
            values = chunk.to(placement.dtype).contiguous().view(torch.uint8)
            write(at, values.numpy())
            at += values.numel()
            done += values.numel()
            yield done


def require_as_listed(placements: list[Placement]) -> None:
    """Refuse files that were written to, or exchanged, after their tensors were listed.

    What was opened by name before this call is then what was listed.

    Raises
    ------
    CheckpointError
        Naming the file, and a tensor that was to be read from it.
    """
    entries: dict[Path, TensorEntry] = {}
    for placement in placements:
        if isinstance(placement.source.where, tuple):
            entries.update((entry.path, entry) for entry in placement.source.where)
    for entry in entries.values():
        _require_as_listed(entry)


def _require_as_listed(entry: TensorEntry) -> None:
    try:
        written = entry.path.stat().st_mtime_ns
    except OSError as error:
        raise CheckpointError(f"cannot read {entry.path}: {error}", path=entry.path) from error
    if written != entry.written:
        raise CheckpointError(
            f"{entry.path} was written to after its tensors were listed, so {entry.name!r} may not "
            "be where it was: wait until nothing writes to it, and open it again",
            path=entry.path,
            tensor=entry.name,
            offset=entry.offset,
        )


def open_listed(entry: TensorEntry, *, keep_cached: bool = False) -> _core.File:
    """Open the file of an entry.

    Raises
    ------
    CheckpointError
        If it cannot be opened, or is not the one that was listed.
    """
    file = _core.File(str(entry.path), keep_cached)
    _require_as_listed(entry)
    return file


class _Files:
    """Files that are read here, each opened once."""

    def __init__(self, keep_cached: bool) -> None:
        self._keep_cached = keep_cached
        self._open: dict[Path, _core.File] = {}

    def of(self, entry: TensorEntry) -> _core.File:
        if entry.path not in self._open:
            self._open[entry.path] = open_listed(entry, keep_cached=self._keep_cached)
        return self._open[entry.path]


def _reordered(placement: Placement, files: _Files) -> Iterator[torch.Tensor]:
    """Yield the source's elements in the order in which the placement's stride has them."""
    assert placement.stride is not None
    shape, dtype = placement.source.shape, placement.source.dtype
    ordered = torch.empty_strided(shape, placement.stride, dtype=dtype)
    ordered.copy_(torch.cat(list(_chunks(placement, files))).view(shape))
    yield ordered.as_strided((ordered.numel(),), (1,))


def _chunks(placement: Placement, files: _Files) -> Iterator[torch.Tensor]:
    """Yield the source's elements in order, flat, on the CPU, in its own dtype."""
    where = placement.source.where
    if isinstance(where, tuple):
        for entry in where:
            yield from _file_chunks(entry, placement.source.dtype, files.of(entry))
        return
    tensor = where if isinstance(where, torch.Tensor) else where()
    flat = tensor.contiguous().reshape(-1)
    elements = max(1, _CHUNK // flat.element_size())
    for first in range(0, flat.numel(), elements):
        yield flat[first : first + elements].cpu()


def _file_chunks(
    entry: TensorEntry, dtype: torch.dtype, file: _core.File
) -> Iterator[torch.Tensor]:
    for done in range(0, entry.nbytes, _CHUNK):
        chunk = bytearray(min(_CHUNK, entry.nbytes - done))
        try:
            file.read(entry.offset + done, chunk)
        except CheckpointError as error:
            error.tensor = entry.name
            raise
        yield torch.frombuffer(chunk, dtype=dtype)
