"""Reading exact byte ranges of one regular file.

The file is opened once and every question about it is put to that descriptor, so a file that is
replaced meanwhile cannot mix two versions. Opening never blocks, whatever the path names.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from penstock.checkpoint._refusal import Refusal

__all__ = ["RegularFile", "open_regular"]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(frozen=True)
class RegularFile:
    """An open file, with its size and the time of its last write when it was opened.

    Parameters
    ----------
    size
        In bytes.
    written
        In nanoseconds.
    """

    descriptor: int
    size: int
    written: int

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from `offset`, or refuse the file."""
        chunks = []
        while nbytes > 0:
            chunk = os.pread(self.descriptor, nbytes, offset)
            if not chunk:
                raise Refusal(
                    f"ends at byte {offset}, but had {self.size} bytes when it was opened",
                    "something is writing the file: wait for it, then open it again",
                    offset=offset,
                )
            chunks.append(chunk)
            offset += len(chunk)
            nbytes -= len(chunk)
        return b"".join(chunks)


@contextmanager
def open_regular(path: Path) -> Iterator[RegularFile]:
    """Open a regular file for reading, and refuse everything else without waiting for it."""
    try:
        # O_NONBLOCK: a FIFO without a writer must not hang the caller before it can be refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:
        raise Refusal(f"no file can have this name: {error}", "pass the path of a file") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a file")
            raise Refusal(f"is {kind}, not a regular file", "pass the path of a file")
        yield RegularFile(descriptor, status.st_size, status.st_mtime_ns)
    finally:
        os.close(descriptor)
