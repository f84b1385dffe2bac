"""Having torch allocate through the core's functions.

Torch's pluggable allocator leaves out what some programs ask for: how large a block may be (cuDNN's
benchmark mode), pools of the user's (`torch.cuda.MemPool`), checkpoints of a pool's blocks
(`torch.compile(mode="reduce-overhead")`). A subclass of our own, built against the installed torch,
has them. Where that cannot be built (no compiler, no headers of a CUDA toolkit, another torch), the
plain one serves, and these have to stay off.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from pathlib import Path
from typing import Any

import torch

from penstock.built_libraries import build, toolkit_headers

__all__ = ["change_to_own", "change_to_plain"]

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("torch_allocator.cpp")
_ALLOCATE, _FREE = "penstock_malloc", "penstock_free"
_BEYOND = (  # what the subclass calls beside the hooks; in the order of the source
    "penstock_delete",
    "penstock_largest_block",
    "penstock_hold_pool",
    "penstock_pool_uses",
    "penstock_pool_blocks",
    "penstock_restore_pool",
)
_HOOKS = {  # setters of torch's class, and functions of the core; in the order of the source
    "set_reset_fn": "penstock_empty_cache",
    "set_base_alloc_fn": "penstock_base_alloc",
    "set_record_stream_fn": "penstock_record_stream",
    "set_begin_allocate_to_pool": "penstock_begin_pool",
    "set_end_allocate_to_pool_fn": "penstock_end_pool",
    "set_release_pool": "penstock_release_pool",
}


def change_to_plain(core: str) -> Any:  # noqa: ANN401
    """Have torch allocate by its own class; return its object, which has to live as long.

    Parameters
    ----------
    core
        The path of the extension.

    Raises
    ------
    RuntimeError
        If torch has allocated already.
    AttributeError
        If this torch has other hooks.
    """
    hook = torch.cuda.memory.CUDAPluggableAllocator(core, _ALLOCATE, _FREE)
    inner: Any = hook.allocator()  # type: ignore[no-untyped-call]
    library = ctypes.CDLL(core)
    for setter, name in _HOOKS.items():
        getattr(inner, setter)(_address(library, name).value)
    torch.cuda.memory.change_current_allocator(hook)
    return hook


def change_to_own(core: str) -> str:
    """Have torch allocate by our subclass, which has what torch's own class leaves out.

    Returns
    -------
    str
        Why that was not possible, in which case nothing has changed; empty if it was.

    Raises
    ------
    RuntimeError
        If torch has allocated already.
    """
    try:
        change = ctypes.CDLL(str(_built())).penstock_change_torch_allocator
    except subprocess.CalledProcessError as error:
        reason = f"the compiler failed: {error.stderr.strip()[-500:]}"
    except (AttributeError, OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        library = ctypes.CDLL(core)
        names = (_ALLOCATE, _FREE, *_BEYOND, *_HOOKS.values())
        functions = (ctypes.c_void_p * len(names))(*(_address(library, name) for name in names))
        message = ctypes.create_string_buffer(2000)
        if change(functions, message, ctypes.c_size_t(len(message))) != 0:
            raise RuntimeError(message.value.decode(errors="replace"))
        return ""
    _log.warning(
        "cuDNN's benchmark mode, torch.cuda.MemPool and torch.compile's reduce-overhead mode stay "
        "off under the hard cap: %s",
        reason,
    )
    return reason


def _address(library: ctypes.CDLL, name: str) -> ctypes.c_void_p:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p)


def _built() -> Path:
    if not (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
        raise FileNotFoundError("this torch was built without CUDA")
    return build(_SOURCE, ["torch_cuda", "c10_cuda", "c10"], [toolkit_headers()])
