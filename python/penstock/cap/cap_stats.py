"""What a hard cap's bytes are used for, as figures and as a table; who made the largest blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from penstock.arguments import checked
from penstock.cap import process
from penstock.cap.hard_cap import HardCap
from penstock.cap.process import STATE
from penstock.cap.stacks import LARGE_BLOCK, StackRecorder
from penstock.report.stats import ModelStats
from penstock.sizes import format_bytes

__all__ = ["CapStats", "Holder", "memory_stats", "memory_summary", "record_stacks"]

_LARGEST = 10  # holders that are listed
_NAMED = 3  # and in the message of an error


@dataclass(frozen=True)
class Holder:
    """A live block of torch's.

    Parameters
    ----------
    nbytes, requested
        Bytes of the block, and of them, as asked for.
    address
        Its first byte.
    sequence
        Grows with the time at which it was handed out.
    stack
        Who made it, innermost first; empty unless `record_stacks` was on in that thread.
    """

    nbytes: int
    requested: int
    address: int
    sequence: int
    stack: tuple[str, ...] = ()


@dataclass(frozen=True)
class CapStats:
    """Figures of a hard cap, in bytes. `weights` to `reserve` add up to `used`.

    They are read one after the other: where other threads allocate meanwhile, those of
    `activations` and `cached` may be from somewhat later than the rest.

    Parameters
    ----------
    cap, used, peak
        What may be held, what is, and the most that was at any time.
    weights, ring
        Frames of models that hold pages of their own, and those through which pages stream.
    activations, cached
        Live blocks of torch's, and what the allocator has in frames beyond them.
    overflow
        Live blocks on the host, beside the cap and not in `used`.
    workspace
        Anything else that was charged by name.
    outside, reserve
        What the process holds beyond the ledger, and what is kept for that to grow.
    peak_by_tag
        The most that each tag of the ledger had: rings are in `weights`, what is cached in
        `activations`, the reserve in `outside`. They need not have been at the same time.
    refused
        Charges that did not fit at first; most of them did after room was made.
    out_of_memory
        Requests of torch that were refused.
    room_made
        Bytes that models and others gave back for requests of torch, so far.
    whole_device
        Whether `outside` may have memory of other processes in it.
    models
        Figures of each model of the managers that share the cap.
    largest
        The largest live blocks.
    """

    cap: int
    used: int
    peak: int
    weights: int
    ring: int
    activations: int
    cached: int
    workspace: int
    outside: int
    reserve: int
    overflow: int
    peak_by_tag: Mapping[str, int]
    refused: int
    out_of_memory: int
    room_made: int
    whole_device: bool
    models: Mapping[str, ModelStats]
    largest: tuple[Holder, ...]

    def __str__(self) -> str:
        lines = [
            f"Penstock: {format_bytes(self.used)} of {format_bytes(self.cap)} in use, "
            f"peak {format_bytes(self.peak)}"
        ]
        for name in ("weights", "ring", "activations", "cached", "workspace", "outside", "reserve"):
            nbytes: int = getattr(self, name)
            lines.append(f"  {name:<12} {format_bytes(nbytes):>12} {nbytes / self.cap:7.1%}")
        if self.overflow > 0:
            lines.append(f"  {'on the host':<12} {format_bytes(self.overflow):>12}")
        peaks = (f"{tag} {format_bytes(peak)}" for tag, peak in self.peak_by_tag.items() if peak)
        lines.append(f"  peaks: {', '.join(peaks) or 'none'}")
        lines.append(
            f"  {format_bytes(self.room_made)} of room made for tensors, "
            f"{self.out_of_memory} requests refused"
        )
        for name, model in self.models.items():
            lines.append(
                f"  model {name}: {format_bytes(model.memory.resident_bytes)} of "
                f"{format_bytes(model.nbytes)} on the device"
            )
        lines += [f"  {line}" for line in _describe(self.largest)]
        return "\n".join(lines)


@checked
def memory_stats(device: str | torch.device = "cuda") -> CapStats:
    """Return what the bytes under a device's hard cap are used for.

    Raises
    ------
    ValueError
        If the device has none.
    """
    cap = process.require_cap(device)
    ledger = cap.pager.budget.stats()
    by_tag = ledger.used_by_tag
    torch_stats = cap.allocator.stats()
    models = cap.models()
    ring = min(by_tag["weights"], sum(model.memory.ring_bytes for model in models.values()))
    overflow = cap.allocator.overflow_stats().live
    on_device = max(0, torch_stats["allocated_bytes.all.current"] - overflow)
    live = min(by_tag["activations"], on_device)
    outside = cap.watch.stats() if cap.watch is not None else None
    reserve = max(0, outside.charged - outside.held) if outside is not None else 0
    reserve = min(by_tag["outside"], reserve)
    return CapStats(
        cap=ledger.cap,
        used=ledger.used,
        peak=ledger.peak,
        weights=by_tag["weights"] - ring,
        ring=ring,
        activations=live,
        cached=by_tag["activations"] - live,
        workspace=by_tag["workspace"] + by_tag["cache"],
        outside=by_tag["outside"] - reserve,
        reserve=reserve,
        overflow=overflow,
        peak_by_tag=ledger.peak_by_tag,
        refused=ledger.refused,
        out_of_memory=torch_stats["num_ooms"],
        room_made=cap.allocator.given_bytes,
        whole_device=outside is not None and outside.whole_device,
        models=models,
        largest=_largest(cap, _LARGEST),
    )


@checked
def memory_summary(device: str | torch.device = "cuda") -> str:
    """Return `memory_stats` as a table for people.

    Raises
    ------
    ValueError
        If the device has no hard cap.
    """
    return str(memory_stats(device))


@checked
def record_stacks(enabled: bool = True) -> None:
    """Note from now on who makes each tensor of a mebibyte or more, or stop doing so.

    The stacks are shown beside the largest blocks, and in the message of `torch.OutOfMemoryError`.

    Raises
    ------
    ValueError
        If it is to end in another thread than it began in, which goes on.

    Notes
    -----
    For finding out, not for every day: each operation takes some microseconds longer. Seen are
    operations of the calling thread, by a dispatch mode: call this outside of other such modes and
    of compiled code. Memory that no result of an operation lies in (workspaces within kernels, what
    other threads and graphs take) has no stack. A stack is that of the last operation whose result
    lay at the address.
    """
    recorder = STATE.recorder
    if enabled and recorder is None:
        recorder = StackRecorder(_explain)
        recorder.__enter__()  # type: ignore[no-untyped-call]
        STATE.recorder = recorder
    elif not enabled and recorder is not None:
        recorder.require_own_thread()
        STATE.recorder = None
        recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _largest(cap: HardCap, count: int) -> tuple[Holder, ...]:
    blocks = sorted(cap.allocator.live_blocks(), key=lambda block: (-block.nbytes, block.sequence))
    return tuple(
        Holder(
            nbytes=block.nbytes,
            requested=block.requested,
            address=block.address,
            sequence=block.sequence,
            stack=_stack_of(block.address, block.nbytes),
        )
        for block in blocks[:count]
    )


def _stack_of(address: int, nbytes: int) -> tuple[str, ...]:
    if STATE.recorder is None or nbytes < LARGE_BLOCK:
        return ()
    return STATE.recorder.stack_of(address)


def _explain() -> str:
    """Say who made the largest blocks, for the message of an error."""
    cap = process.current_cap("cuda")
    return "" if cap is None else "".join(f"\n{line}" for line in _describe(_largest(cap, _NAMED)))


def _describe(holders: tuple[Holder, ...]) -> list[str]:
    lines = []
    for holder in holders:
        lines.append(
            f"block of {format_bytes(holder.nbytes)}" + (", made by" if holder.stack else "")
        )
        lines += [f"    {line}" for line in holder.stack]
    return lines
