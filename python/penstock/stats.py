"""What the manager has done and holds, as figures and as a report for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.sizes import format_bytes

__all__ = ["ManagerStats", "ModelStats"]


@dataclass(frozen=True)
class ModelStats:
    """Figures of one model. Sizes in bytes.

    Parameters
    ----------
    nbytes
        Weights, as they lie in the region.
    resident_bytes
        What the ledger counts as resident, in whole pages.
    system_resident_bytes
        The same as the operating system counts it; None where it cannot tell (CUDA).
    acquired
        How many users have acquired the model and not released it.
    steps
        Steps of the current order.
    passes
        Calls of the outermost module so far.
    unscheduled_reads
        Reads of tensors outside the steps that were known at that time.
    moved
        Names of parameters that are no longer on pager memory.
    """

    nbytes: int
    resident_bytes: int
    system_resident_bytes: int | None
    acquired: int
    steps: int
    passes: int
    unscheduled_reads: int
    moved: tuple[str, ...]


@dataclass(frozen=True)
class ManagerStats:
    """Figures of a manager. Sizes in bytes, by whole pages.

    Parameters
    ----------
    used, peak
        Charged now, and the most at any time; never above `cap`.
    loaded_bytes, evicted_bytes
        Made resident and dropped so far.
    hits
        Steps whose pages were there, or under way, when they began.
    demand_loads
        Steps that had to ask for pages when they began.
    ahead_loads, ahead_declined
        Look-ahead requests that loaded pages; that found no room worth taking.
    suppressed_errors
        Failures of the device where nothing could be raised (giving handles back).
    """

    device: str
    pager: str
    cap: int
    used: int
    peak: int
    used_by_tag: Mapping[str, int]
    peak_by_tag: Mapping[str, int]
    loaded_bytes: int
    evicted_bytes: int
    hits: int
    demand_loads: int
    ahead_loads: int
    ahead_declined: int
    suppressed_errors: int
    models: Mapping[str, ModelStats]

    def __str__(self) -> str:
        lines = [
            f"Penstock on {self.device}, {self.pager} pager",
            f"  cap {format_bytes(self.cap)}, in use {format_bytes(self.used)}, "
            f"peak {format_bytes(self.peak)} ({self.peak / self.cap:.0%} of the cap)",
            *(
                f"    {tag}: {format_bytes(nbytes)}, peak {format_bytes(self.peak_by_tag[tag])}"
                for tag, nbytes in self.used_by_tag.items()
                if self.peak_by_tag[tag]
            ),
            f"  loaded {format_bytes(self.loaded_bytes)}, "
            f"evicted {format_bytes(self.evicted_bytes)}",
            f"  steps: {self.hits} found their pages, {self.demand_loads} had to load; "
            f"look-ahead: {self.ahead_loads} requests loaded, {self.ahead_declined} found no room",
        ]
        if self.suppressed_errors:
            lines.append(f"  {self.suppressed_errors} device errors while giving handles back")
        for name, model in self.models.items():
            state = f"acquired {model.acquired}x" if model.acquired else "idle"
            lines.append(
                f"  {name}: {format_bytes(model.nbytes)} of weights, "
                f"{format_bytes(model.resident_bytes)} resident, {state}, {model.steps} steps, "
                f"{model.passes} passes, {model.unscheduled_reads} unscheduled reads"
            )
            if model.moved:
                lines.append(
                    f"    {len(model.moved)} parameters left pager memory: {model.moved[0]}, ..."
                )
        return "\n".join(lines)
