"""Where the weights of a benchmark may lie."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_SHARED = Path("/dev/shm")
_SPARE = 2 << 30


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
