"""The page cache, emptied or filled; and the best rate at which files can be read without it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from penstock.forecast.read_rate import blocks_of, read_blocks

__all__ = ["cached_share", "drop_cache", "raw_read_rates", "warm_cache"]

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
    read_blocks(blocks_of(files, 1 << 62), readers, 0)


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
    blocks = blocks_of(files, _MOST_BYTES)
    rates = {}
    for name, flags in (("direct", os.O_DIRECT), ("buffered", 0)):
        for readers in _READERS:
            drop_cache(files)
            start = time.perf_counter()
            try:
                nbytes = read_blocks(blocks, readers, flags)
            except OSError:
                break
            rates[f"{name}, {readers} readers"] = nbytes / (time.perf_counter() - start)
    return rates
