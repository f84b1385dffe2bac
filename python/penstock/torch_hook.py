"""Penstock's allocator under torch, and torch's own memory functions on top of its figures.

`torch.cuda.memory.CUDAPluggableAllocator` has torch call the core's C functions; what it leaves
out (streams of other users, private pools of graphs, `empty_cache`) is set through its hooks. With
such an allocator torch's statistics raise an error, and accelerate, diffusers and training loops
ask for them: the functions behind them are replaced, for devices that the allocator serves.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch

from penstock import _core
from penstock.errors import DeviceError
from penstock.out_of_memory import find_thrower

__all__ = ["hook_torch", "nested_stats"]

_HOOKS = {
    "set_reset_fn": "penstock_empty_cache",
    "set_memory_fraction_fn": "penstock_memory_fraction",
    "set_base_alloc_fn": "penstock_base_alloc",
    "set_record_stream_fn": "penstock_record_stream",
    "set_begin_allocate_to_pool": "penstock_begin_pool",
    "set_end_allocate_to_pool_fn": "penstock_end_pool",
    "set_release_pool": "penstock_release_pool",
}


def hook_torch(ordinal: int, allocator: _core.CachingAllocator) -> None:
    """Have torch allocate from an allocator on a device.

    Raises
    ------
    DeviceError
        If this torch cannot be hooked, or has allocated already.
    """
    _core.install_torch_allocator(ordinal, allocator)
    try:
        if _is_hooked():
            return
        _core.set_torch_thrower(find_thrower())
        path = _core.__file__
        hook = torch.cuda.memory.CUDAPluggableAllocator(path, "penstock_malloc", "penstock_free")
        library = ctypes.CDLL(path)
        inner: Any = hook.allocator()  # type: ignore[no-untyped-call]
        for setter, symbol in _HOOKS.items():
            address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
            getattr(inner, setter)(address)
        torch.cuda.memory.change_current_allocator(hook)
    except (AttributeError, RuntimeError) as error:
        _core.uninstall_torch_allocator(ordinal)
        raise DeviceError(
            f"torch {torch.__version__} does not take an allocator: {error}",
            call="change_current_allocator",
            code=0,
        ) from error
    _replace_functions()
    _hooked.append(hook)


_hooked: list[Any] = []  # torch's object, for as long as the process lives


def _is_hooked() -> bool:
    return bool(_hooked)


def nested_stats(allocator: _core.CachingAllocator) -> dict[str, Any]:
    """Return an allocator's figures as `torch.cuda.memory_stats_as_nested_dict` has them."""
    nested: dict[str, Any] = {
        "max_split_size": -1,
        "num_sync_all_streams": 0,
        "oversize_allocations": dict.fromkeys(("current", "peak", "allocated", "freed"), 0),
        "oversize_segments": dict.fromkeys(("current", "peak", "allocated", "freed"), 0),
    }
    for name, value in allocator.stats().items():
        at = nested
        *path, last = name.split(".")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return nested


def _replace_functions() -> None:
    _replace("_cuda_memoryStats", nested_stats)
    _replace("_cuda_resetPeakMemoryStats", _core.CachingAllocator.reset_peak_stats)
    _replace("_cuda_resetAccumulatedMemoryStats", _core.CachingAllocator.reset_accumulated_stats)
    setattr(torch._C, "_cuda_memorySnapshot", _refuse_snapshot)  # noqa: B010
    benchmark = torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_benchmark(False)
    setattr(torch._C, "_set_cudnn_benchmark", _refuse_benchmark)  # noqa: B010
    if benchmark:
        _refuse_benchmark(True)


def _replace(name: str, ours: Callable[[_core.CachingAllocator], Any]) -> None:
    theirs = getattr(torch._C, name)

    def function(device: int) -> Any:  # noqa: ANN401
        allocator = _core.installed_torch_allocator(device)
        return theirs(device) if allocator is None else ours(allocator)

    setattr(torch._C, name, function)


def _refuse_snapshot(*arguments: object) -> Any:  # noqa: ANN401
    raise RuntimeError(
        "memory snapshots are of torch's own allocator, which a hard cap replaces; "
        "penstock.memory_stats() and penstock.memory_summary() have the figures"
    )


def _refuse_benchmark(wanted: bool) -> None:
    """Leave cuDNN's benchmark mode off: it asks for the largest free block, and torch refuses."""
    if wanted:
        warnings.warn(
            "cuDNN's benchmark mode stays off under a hard cap: torch cannot tell it how much "
            "memory it may try",
            RuntimeWarning,
            stacklevel=3,
        )
