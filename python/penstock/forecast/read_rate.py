"""How fast blocks of files can be read, past the page cache or through it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["Block", "blocks_of", "measure_read_rate", "read_blocks"]

Block = tuple[Path, int, int]
"""Path, offset, bytes."""

_BLOCK = 8 << 20
_ALIGNMENT = 4096  # of offsets and sizes of direct reads, on all disks that we know of
_SAMPLE = 64 << 20  # bytes that are read to measure
_READERS = 4


def measure_read_rate(files: Iterable[Path]) -> float | None:
    """Read some of the files past the page cache; return bytes per second.

    None where there is nothing to read, or the file system has no direct reads.
    """
    try:
        blocks = blocks_of(list(files), _SAMPLE)
        start = time.perf_counter()
        nbytes = read_blocks(blocks, _READERS, os.O_DIRECT)
    except OSError:
        return None
    return nbytes / (time.perf_counter() - start) if nbytes else None


def blocks_of(files: Sequence[Path], most: int) -> list[Block]:
    """Cut files into blocks, in order, up to so many bytes. A last odd piece is left out."""
    blocks: list[Block] = []
    for path in files:
        end = path.stat().st_size // _ALIGNMENT * _ALIGNMENT
        for offset in range(0, end, _BLOCK):
            if most <= 0:
                return blocks
            nbytes = min(_BLOCK, end - offset)
            blocks.append((path, offset, nbytes))
            most -= nbytes
    return blocks


def read_blocks(blocks: Sequence[Block], readers: int, flags: int) -> int:
    """Read blocks by so many threads, with the flags that files are opened with; count the bytes.

    Raises
    ------
    OSError
        If a file cannot be read so.
    """
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
