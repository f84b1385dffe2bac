"""How much host memory a benchmark may take, and where its weights may lie."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_SHARED = Path("/dev/shm")
_SPARE = 2 << 30


def host_room() -> int:
    """Return bytes that programs may still take here, by the system and by the control group."""
    room = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            room = int(line.split()[1]) << 10
    try:
        most = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cache = int(stat["file"]) - int(stat["shmem"])  # which goes when it is asked for
    except (OSError, ValueError, KeyError):  # no limit, or another version of control groups
        return room
    return min(room, most - used + cache)


def weights_parent(nbytes: int) -> Path:
    """Return where files of so many bytes are fast: in memory, if they fit there.

    Raises
    ------
    OSError
        If they fit nowhere.
    """
    temporary = Path(tempfile.gettempdir())
    for place in (_SHARED, temporary):
        if place.is_dir() and shutil.disk_usage(place).free > nbytes + _SPARE:
            return place
    raise OSError(f"{nbytes} bytes of weights fit neither {_SHARED} nor {temporary}")
