"""Penstock's allocator under torch, and torch's own memory functions on top of its figures.

`torch.cuda.memory.CUDAPluggableAllocator` has torch call the core's C functions; what it leaves
out (streams of other users, private pools of graphs, `empty_cache`) is set through its hooks, or
added by a subclass (see `torch_allocator`). With such an allocator torch's statistics raise an
error, and accelerate, diffusers and training loops ask for them: the functions behind them are
replaced, for devices that the allocator serves. What cannot be had under a hard cap is refused
where it is asked for, with the reason.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from penstock import _core
from penstock.cap.hard_cap import HardCap
from penstock.cap.out_of_memory import find_thrower
from penstock.cap.process import STATE
from penstock.cap.processes import refuse_sharing
from penstock.cap.torch_allocator import change_to_own, change_to_plain
from penstock.errors import DeviceError
from penstock.torch_private import ContextProp, function_of, replace_function

__all__ = ["hook_torch", "nested_stats", "require_native"]

_CHOOSING = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def require_native() -> None:
    """Refuse a process whose memory comes from another allocator than torch's usual one.

    Raises
    ------
    DeviceError
        Naming the allocator, and the variable of the environment that chose it.
    """
    backend = torch.cuda.memory.get_allocator_backend()
    if backend == "native":
        return
    chosen = [f"{name}={os.environ[name]}" for name in _CHOOSING if os.environ.get(name)]
    source = f", chosen by {chosen[0]}: take it out of there" if chosen else ": do not change it"
    raise DeviceError(
        f"a hard cap puts an allocator of its own under torch, and torch has {backend!r}{source}, "
        "or do without set_cap",
        call="set_cap",
        code=0,
    )


def hook_torch(ordinal: int, served: HardCap) -> None:
    """Have torch allocate from an allocator on a device.

    Raises
    ------
    DeviceError
        If this torch cannot be hooked, or has allocated already.
    """
    _core.install_torch_allocator(ordinal, served.allocator)
    try:
        if not STATE.hooked:
            _change_allocator()
    except (AttributeError, RuntimeError) as error:
        _core.uninstall_torch_allocator(ordinal)
        raise DeviceError(
            f"torch {torch.__version__} does not take an allocator: {error}",
            call="change_current_allocator",
            code=0,
        ) from error
    STATE.caps[ordinal] = served


def _change_allocator() -> None:
    thrower = find_thrower()
    _core.set_torch_thrower(thrower)
    # While cuDNN tries what is fast, torch looks for its own out-of-memory error.
    missing = change_to_own(_core.__file__) if thrower else "torch's errors could not be built"
    if missing:
        STATE.torch_allocators.append(change_to_plain(_core.__file__))
    STATE.hooked = True
    _replace_functions()
    if missing:
        _keep_benchmark_off()
        _refuse_checkpoints(missing)
    _limit_pools(missing)
    refuse_sharing(lambda device: device.type == "cuda" and device.index in STATE.caps)


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
        theirs = function_of(name)

        def function(*arguments: Any) -> Any:  # noqa: ANN401
            *given, device = arguments
            served = STATE.caps.get(device)
            if served is not None:
                return ours(served, *given)
            return theirs(*arguments) if theirs is not None else None

        replace_function(name, function)

    serve("_cuda_memoryStats", lambda served: nested_stats(served.allocator))
    serve("_cuda_resetPeakMemoryStats", lambda served: served.allocator.reset_peak_stats())
    serve(
        "_cuda_resetAccumulatedMemoryStats",
        lambda served: served.allocator.reset_accumulated_stats(),
    )
    serve("_cuda_setMemoryFraction", lambda served, fraction: served.limit_to(fraction))
    serve("_cuda_getMemoryFraction", lambda served: served.fraction)
    replace_function("_cuda_memorySnapshot", _refuse_snapshot)


def _refuse_snapshot(*arguments: object) -> Any:  # noqa: ANN401
    raise RuntimeError(
        "memory snapshots are of torch's own allocator, which a hard cap replaces; "
        "penstock.memory_stats() and penstock.memory_summary() have the figures"
    )


def _refuse_checkpoints(reason: str) -> None:
    def refuse(*arguments: object) -> Any:  # noqa: ANN401
        raise DeviceError(
            'torch.compile(mode="reduce-overhead") asks the allocator for checkpoints of a pool\'s '
            f"blocks, which it has not under this hard cap: {reason}. Use another mode, or install "
            "a C++ compiler and the headers of a CUDA toolkit",
            call="set_cap",
            code=0,
        )

    for name in ("getCheckpointState", "setCheckpointPoolState", "checkPoolLiveAllocations"):
        replace_function(f"_cuda_{name}", refuse)


def _limit_pools(reason: str) -> None:
    """Let torch.cuda.MemPool be made where its memory is counted; else refuse it."""
    pools: Any = torch.cuda.MemPool
    theirs = pools.__init__

    def init(
        self: torch.cuda.MemPool,
        allocator: Any = None,  # noqa: ANN401
        *arguments: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> None:
        why = "a pool with an allocator of its own takes memory past the cap; leave that out"
        if reason:
            why = f"{reason}; install a C++ compiler and the headers of a CUDA toolkit"
        if reason or allocator is not None:
            raise DeviceError(
                f"this torch.cuda.MemPool cannot be had under a hard cap: {why}",
                call="MemPool",
                code=0,
            )
        theirs(self, None, *arguments, **options)

    pools.__init__ = init


def _keep_benchmark_off() -> None:
    """Keep cuDNN's benchmark mode off: it asks for the largest free block, and torch refuses."""
    setter, getter = function_of("_set_cudnn_benchmark"), function_of("_get_cudnn_benchmark")
    if setter is None or getter is None:
        return

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
    replace_function("_set_cudnn_benchmark", refuse)
    kept_off = ContextProp(getter, refuse)  # type: ignore[no-untyped-call]
    type(torch.backends.cudnn).benchmark = kept_off  # type: ignore[attr-defined]
