"""Penstock's allocator under torch, and torch's own memory functions on top of its figures.

`torch.cuda.memory.CUDAPluggableAllocator` has torch call the core's C functions; what it leaves
out (streams of other users, private pools of graphs, `empty_cache`) is set through its hooks. With
such an allocator torch's statistics raise an error, and accelerate, diffusers and training loops
ask for them: the functions behind them are replaced, for devices that the allocator serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.backends import ContextProp

from penstock import _core
from penstock.cap.out_of_memory import find_thrower
from penstock.cap.torch_allocator import change_to_own, change_to_plain
from penstock.errors import DeviceError

__all__ = ["Served", "hook_torch", "is_hooked", "nested_stats"]

_hook: list[Any] = []  # torch's object, if there is one, for as long as the process lives
_served: dict[int, Served] = {}  # by ordinal


class Served(Protocol):
    """What serves a device: a hard cap."""

    allocator: _core.CachingAllocator

    @property
    def fraction(self) -> float:
        """The cap as a part of the device's memory."""

    def limit_to(self, fraction: float) -> None:
        """Lower the cap to a part of the device's memory, or raise it again as far as it was."""


def is_hooked() -> bool:
    """Whether torch allocates from allocators of Penstock's, on all devices."""
    return bool(_hook)


def hook_torch(ordinal: int, served: Served) -> None:
    """Have torch allocate from an allocator on a device.

    Raises
    ------
    DeviceError
        If this torch cannot be hooked, or has allocated already.
    """
    _core.install_torch_allocator(ordinal, served.allocator)
    try:
        if not is_hooked():
            _change_allocator()
    except (AttributeError, RuntimeError) as error:
        _core.uninstall_torch_allocator(ordinal)
        raise DeviceError(
            f"torch {torch.__version__} does not take an allocator: {error}",
            call="change_current_allocator",
            code=0,
        ) from error
    _served[ordinal] = served


def _change_allocator() -> None:
    thrower = find_thrower()
    _core.set_torch_thrower(thrower)
    # While cuDNN tries what is fast, torch looks for its own out-of-memory error.
    says_largest = bool(thrower) and change_to_own(_core.__file__)
    _hook.append(None if says_largest else change_to_plain(_core.__file__))
    _replace_functions()
    if not says_largest:
        _keep_benchmark_off()


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
    """Have torch's functions tell of what serves a device; of others, what they always did."""

    def serve(name: str, ours: Callable[..., Any]) -> None:
        """Replace a function whose last argument is the device."""
        theirs = getattr(torch._C, name, None)

        def function(*arguments: Any) -> Any:  # noqa: ANN401
            *given, device = arguments
            served = _served.get(device)
            if served is not None:
                return ours(served, *given)
            return theirs(*arguments) if theirs is not None else None

        setattr(torch._C, name, function)

    serve("_cuda_memoryStats", lambda served: nested_stats(served.allocator))
    serve("_cuda_resetPeakMemoryStats", lambda served: served.allocator.reset_peak_stats())
    serve(
        "_cuda_resetAccumulatedMemoryStats",
        lambda served: served.allocator.reset_accumulated_stats(),
    )
    serve("_cuda_setMemoryFraction", lambda served, fraction: served.limit_to(fraction))
    serve("_cuda_getMemoryFraction", lambda served: served.fraction)
    setattr(torch._C, "_cuda_memorySnapshot", _refuse_snapshot)  # noqa: B010


def _refuse_snapshot(*arguments: object) -> Any:  # noqa: ANN401
    raise RuntimeError(
        "memory snapshots are of torch's own allocator, which a hard cap replaces; "
        "penstock.memory_stats() and penstock.memory_summary() have the figures"
    )


def _keep_benchmark_off() -> None:
    """Keep cuDNN's benchmark mode off: it asks for the largest free block, and torch refuses."""
    setter, getter = torch._C._set_cudnn_benchmark, torch._C._get_cudnn_benchmark

    def refuse(wanted: bool) -> None:
        if wanted:
            warnings.warn(
                "cuDNN's benchmark mode stays off under this hard cap: torch cannot tell it how "
                "much memory it may try; penstock.cap.torch_allocator has logged why",
                RuntimeWarning,
                stacklevel=3,
            )

    refuse(getter())
    setter(False)
    # For `torch.backends.cudnn.flags`, and for the property, which has the function itself.
    setattr(torch._C, "_set_cudnn_benchmark", refuse)  # noqa: B010
    kept_off = ContextProp(getter, refuse)  # type: ignore[no-untyped-call]
    type(torch.backends.cudnn).benchmark = kept_off  # type: ignore[attr-defined]
