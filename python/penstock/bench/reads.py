"""The page cache, emptied or filled; and the best rate at which files can be read without it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["cached_share", "drop_cache", "raw_read_rates", "warm_cache"]

_BLOCK = 8 << 20
_ALIGNMENT = 4096  # of offsets and sizes of direct reads, on all disks that we know of
_READERS = (1, 2, 4, 8, 16)
_MOST_BYTES = 4 << 30


def drop_cache(files: Iterable[Path]) -> None:
    """Ask the system to forget files' pages; pages that are mapped somewhere stay."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # dirty pages cannot be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def warm_cache(files: Sequence[Path], readers: int = 8) -> None:
    """Read files, so that their pages are in the page cache."""
    _read(_blocks(files, 1 << 62), readers, 0)


def cached_share(files: Iterable[Path], step: int = 64 << 20) -> float | None:
    """Return the share of probed blocks that the page cache holds; None where nothing can tell.

    Probing is a read that may not wait: preadv2(2), RWF_NOWAIT.
    """
    probed = held = 0
    buffer = bytearray(1)
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            for offset in range(0, path.stat().st_size, step):
                probed += 1
                try:
                    held += os.preadv(file, [buffer], offset, os.RWF_NOWAIT)
                except BlockingIOError:
                    continue
                except OSError:
                    return None
        finally:
            os.close(file)
    return held / probed if probed else None


def raw_read_rates(files: Sequence[Path]) -> dict[str, float]:
    """Measure reading the files cold, buffered and direct, with several numbers of readers.

    Returns
    -------
    dict
        Bytes per second by what was done, such as `"direct, 8 readers"`. Ways that the file system
        refuses are left out.
    """
    blocks = _blocks(files, _MOST_BYTES)
    rates = {}
    for name, flags in (("direct", os.O_DIRECT), ("buffered", 0)):
        for readers in _READERS:
            drop_cache(files)
            start = time.perf_counter()
            try:
                nbytes = _read(blocks, readers, flags)
            except OSError:
                break
            rates[f"{name}, {readers} readers"] = nbytes / (time.perf_counter() - start)
    return rates


def _blocks(files: Sequence[Path], most: int) -> list[tuple[Path, int, int]]:
    """Cut files into blocks, in order: path, offset, bytes. A last odd piece is left out."""
    blocks: list[tuple[Path, int, int]] = []
    for path in files:
        end = path.stat().st_size // _ALIGNMENT * _ALIGNMENT
        for offset in range(0, end, _BLOCK):
            if most <= 0:
                return blocks
            nbytes = min(_BLOCK, end - offset)
            blocks.append((path, offset, nbytes))
            most -= nbytes
    return blocks


def _read(blocks: Sequence[tuple[Path, int, int]], readers: int, flags: int) -> int:
    paths = list(dict.fromkeys(path for path, _, _ in blocks))
    opened: dict[Path, int] = {}

    def read(first: int) -> int:
        total = 0
        with mmap.mmap(-1, _BLOCK) as memory, memoryview(memory) as buffer:
            for path, offset, nbytes in blocks[first::readers]:
                with buffer[:nbytes] as target:
                    got = os.preadv(opened[path], [target], offset)
                if got != nbytes:
                    raise OSError(f"{path}: {got} of {nbytes} bytes at {offset}")
                total += got
        return total

    try:
        for path in paths:
            opened[path] = os.open(path, os.O_RDONLY | flags)
        with ThreadPoolExecutor(readers) as pool:
            return sum(pool.map(read, range(readers)))
    finally:
        for file in opened.values():
            os.close(file)
