"""What throws torch.OutOfMemoryError from the allocator hook: a few lines built against torch.

The type of the exception is torch's own, and the core does not link to torch; so this is compiled
once for each version of torch, when a hard cap is first set, and kept in the user's cache. Where
that is not possible, a request that is refused raises a plain RuntimeError with the same message.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from pathlib import Path

from penstock.built_libraries import build

__all__ = ["find_thrower"]

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("out_of_memory.cpp")


def find_thrower() -> int:
    """Return the address of the function that throws, built if need be; 0 if it cannot be had."""
    try:
        path = build(_SOURCE, ["c10"])
        library = ctypes.CDLL(str(path))
        if library.penstock_can_throw_out_of_memory() == 1:
            function = library.penstock_throw_out_of_memory
            return ctypes.cast(function, ctypes.c_void_p).value or 0
        reason = f"{path} does not throw what this torch catches; delete it"
    except subprocess.CalledProcessError as error:
        reason = f"the compiler failed: {error.stderr.strip()[-500:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    _log.warning(
        "requests beyond the cap raise RuntimeError instead of torch.OutOfMemoryError: %s", reason
    )
    return 0
