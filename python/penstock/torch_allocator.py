"""An allocator of torch's class that also says how large a block may be, built against torch.

Torch's pluggable allocator refuses to say that, so cuDNN's benchmark mode fails with it. Where a
subclass cannot be built (no compiler, no headers of a CUDA toolkit, another torch), the plain one
serves, and the mode stays off.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

from penstock.built import build

__all__ = ["change_allocator"]

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("torch_allocator.cpp")
_FUNCTIONS = (  # as in the source
    "penstock_malloc",
    "penstock_free",
    "penstock_largest_block",
    "penstock_empty_cache",
    "penstock_base_alloc",
    "penstock_record_stream",
    "penstock_begin_pool",
    "penstock_end_pool",
    "penstock_release_pool",
)
_HEADER = "cuda_runtime_api.h"


def change_allocator(core: ctypes.CDLL) -> bool:
    """Have torch allocate through the core's functions.

    Returns
    -------
    bool
        Whether that was possible; if not, nothing has changed.

    Raises
    ------
    RuntimeError
        If torch has allocated already.
    """
    try:
        library = ctypes.CDLL(str(_built()))
        change = library.penstock_change_torch_allocator
    except subprocess.CalledProcessError as error:
        reason = f"the compiler failed: {error.stderr.strip()[-500:]}"
    except (AttributeError, OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        addresses = [ctypes.cast(getattr(core, name), ctypes.c_void_p) for name in _FUNCTIONS]
        message = ctypes.create_string_buffer(2000)
        functions = (ctypes.c_void_p * len(addresses))(*addresses)
        if change(functions, message, ctypes.c_size_t(len(message))) != 0:
            raise RuntimeError(message.value.decode(errors="replace"))
        return True
    _log.warning("cuDNN's benchmark mode stays off under the hard cap: %s", reason)
    return False


def _built() -> Path:
    if not (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
        raise FileNotFoundError("this torch was built without CUDA")
    return build(_SOURCE, ["torch_cuda", "c10_cuda", "c10"], [_toolkit_headers()])


def _toolkit_headers() -> Path:
    """Return where a CUDA toolkit's headers are: an installed one's, or of torch's packages."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [packages / name / "include" for name in ("cu13", "cuda_runtime")]
    if cpp_extension.CUDA_HOME:
        places.insert(0, Path(cpp_extension.CUDA_HOME) / "include")
    for place in places:
        if (place / _HEADER).exists():
            return place
    raise FileNotFoundError(f"there is no {_HEADER}; install a CUDA toolkit, or set CUDA_HOME")
