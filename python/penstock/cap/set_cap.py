"""Setting a hard cap for the process, and changing it."""

from __future__ import annotations

import torch

from penstock.arguments import checked
from penstock.cap import process
from penstock.cap.hard_cap import HardCap, Overflow
from penstock.cap.process import STATE
from penstock.cap.torch_hook import hook_torch, require_native
from penstock.errors import DeviceError
from penstock.memory.devices import device_of, uses_cuda
from penstock.sizes import parse_bytes

__all__ = ["require_cuda", "set_cap"]


@checked
def set_cap(
    cap: int | str,
    *,
    device: str | torch.device = "cuda",
    page_size: int | str | None = None,
    reserve: int | str | None = None,
    overflow: Overflow | None = None,
    overflow_limit: int | str | None = None,
) -> None:
    """Cap what this process holds of a GPU, all that torch allocates included.

    So is what nobody asks Penstock for: the CUDA context, loaded kernels, libraries with memory of
    their own. It is measured every ten milliseconds, and charged under the tag `outside`.

    The first call puts Penstock's allocator under torch, and has to come before torch's first use
    of CUDA; from then on each GPU that is used needs a cap. Later calls change the cap. A request
    that does not fit makes room by evicting weights, and is refused with `torch.OutOfMemoryError`
    where that is not enough.

    Parameters
    ----------
    cap
        Bytes, or a text such as `"8GiB"`, or `"60%"` of the device's memory.
    device
        `"cuda"` or `"cuda:N"`.
    page_size
        Bytes of a frame; see `Pager`. Only with the first call.
    reserve
        Bytes to charge beyond what is measured: so much may such memory grow between two looks
        without crossing the cap. If omitted, 128 MiB, or a 48th of the cap where that is less.
    overflow
        What a request of a mebibyte or more gets when no room can be made for it: `"refuse"`, an
        error, which is how it is at first; `"managed"`, memory of the host that the GPU reaches
        over the link, many times slower than its own. If omitted, it stays as it is.
    overflow_limit
        The most bytes of the host's memory that tensors may have so. If omitted, a quarter of it,
        or half of what was free on the GPU at the first call where that is less.

    Raises
    ------
    DeviceError
        If there is no such GPU, or torch has allocated on a GPU already, or the environment chose
        another allocator for torch (`PYTORCH_CUDA_ALLOC_CONF=backend:...`), or tensors cannot
        overflow there.
    CapExceededError
        If the cap is lowered below what is in use, or has no room for what the process holds
        already and the reserve.
    """
    known = process.current_cap(device)
    if known is not None:
        if page_size is not None and parse_bytes(page_size) != known.pager.page_size:
            raise ValueError(
                f"page_size cannot change: frames have {known.pager.page_size} bytes since the "
                "first call"
            )
        known.set_cap(cap)
        if reserve is not None:
            known.set_reserve(reserve)
        _apply_overflow(known, overflow, overflow_limit)
        return
    require_cuda(device, "set_cap", "Give MemoryManager a cap of its own instead.")
    if uses_cuda() and not STATE.hooked:
        raise DeviceError(
            "torch has begun to use CUDA already, so its allocator cannot be changed any more: "
            "call penstock.set_cap before anything else touches the GPU",
            call="set_cap",
            code=0,
        )
    if not STATE.hooked:
        require_native()
    hard_cap = HardCap(cap, device=device, page_size=page_size, reserve=reserve)
    _apply_overflow(hard_cap, overflow, overflow_limit)
    ordinal = hard_cap.pager.core_device.info().ordinal
    hook_torch(ordinal, hard_cap)


def _apply_overflow(cap: HardCap, overflow: Overflow | None, limit: int | str | None) -> None:
    if overflow is not None:
        cap.set_overflow(overflow, limit)
    elif limit is not None:
        raise ValueError('overflow_limit goes with overflow="managed"')


def require_cuda(device: str | torch.device, call: str, remedy: str) -> None:
    """Refuse what is no CUDA device of torch's.

    Raises
    ------
    DeviceError
        Saying what needs one, and what to do instead.
    """
    if device_of(device).type != "cuda" or not torch.cuda.is_available():
        raise DeviceError(
            f"{call} needs a CUDA device, and {str(device)!r} is none that torch can use here. "
            f"{remedy}",
            call=call,
            code=0,
        )
