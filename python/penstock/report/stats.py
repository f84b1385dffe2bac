"""What the manager has done and holds, as figures and as a report for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.policy import Priority
from penstock.sizes import format_bytes

__all__ = ["ManagerStats", "MemoryStats", "ModelStats", "PassFigures", "format_schedule"]


@dataclass(frozen=True)
class PassFigures:
    """Figures of one pass. Times in seconds, as the device took them.

    Parameters
    ----------
    seconds
        From its beginning to its end.
    loaded_bytes
        By whole pages; loads for the pass after it included.
    stall_seconds
        In which steps waited for their pages.
    longest_stall
        The step that waited longest, and how long.
    misses
        Pages that a step had to ask for, because they were not on their way.
    """

    seconds: float
    loaded_bytes: int
    stall_seconds: float
    longest_stall: tuple[str, float]
    misses: int


@dataclass(frozen=True)
class MemoryStats:
    """What one model holds and has moved. Sizes in bytes, by whole pages.

    Parameters
    ----------
    resident_bytes
        Device memory that it holds, as the ledger has it.
    system_resident_bytes
        The same as the operating system counts it; None where it cannot tell.
    pinned_bytes, mapped_bytes
        Host memory that holds its weights: of its own, and of the page cache.
    read_bytes
        Read from files so far, to fill host memory or to stream.
    host_tier
        Where its weights wait on the host; empty with managed memory.
    loaded_bytes, evicted_bytes
        Loaded so far; and of that, dropped or overwritten.
    passes
        Calls so far, with what came after them; and what came over and over without calls.
    steps_run, misses, unscheduled
        Operations so far whose pages were not in place to stay, pages that they had to ask for, and
        operations that were not expected.
    last_pass
        The last pass that the device has finished; None before the first.
    predicted_seconds
        What the plan says that a pass takes; None without a plan.
    planned_bytes
        What the plan says that a pass loads.
    ring_bytes
        Device memory through which pages stream.
    """

    resident_bytes: int = 0
    system_resident_bytes: int | None = 0
    pinned_bytes: int = 0
    mapped_bytes: int = 0
    read_bytes: int = 0
    host_tier: str = ""
    loaded_bytes: int = 0
    evicted_bytes: int = 0
    passes: int = 0
    steps_run: int = 0
    misses: int = 0
    unscheduled: int = 0
    last_pass: PassFigures | None = None
    predicted_seconds: float | None = None
    planned_bytes: int = 0
    ring_bytes: int = 0


@dataclass(frozen=True)
class ModelStats:
    """Figures of one model.

    Parameters
    ----------
    nbytes
        Weights, as they lie in the region.
    acquired
        How many users have acquired the model and not released it.
    steps
        Steps of the order that is expected.
    moved
        Names of parameters that are no longer on pager memory.
    memory
        What it holds and has moved.
    kept
        Whether somebody keeps it resident.
    reserved
        With which priority it is reserved, if it is.
    pushed_out_bytes
        What it had to give up although it is reserved, as a secondary.
    beside
        What else has room on the region, by what it is: of a model in training, the gradients and
        each state of the optimizer.
    """

    nbytes: int
    acquired: int
    steps: int
    moved: tuple[str, ...]
    memory: MemoryStats = field(default_factory=MemoryStats)
    kept: bool = False
    reserved: Priority | None = None
    pushed_out_bytes: int = 0
    beside: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ManagerStats:
    """Figures of a manager. Sizes in bytes, by whole pages.

    Parameters
    ----------
    used, peak
        Charged now, and the most at any time; never above `cap`.
    link_rate
        Bytes per second of copies from pinned memory, as measured here.
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
    link_rate: float
    suppressed_errors: int
    models: Mapping[str, ModelStats]

    @property
    def loaded_bytes(self) -> int:
        """Bytes loaded so far by the models that are registered."""
        return sum(model.memory.loaded_bytes for model in self.models.values())

    @property
    def evicted_bytes(self) -> int:
        """Bytes of them that were dropped or overwritten."""
        return sum(model.memory.evicted_bytes for model in self.models.values())

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
            f"  link {self.link_rate / 1e9:.1f} GB/s",
        ]
        if self.suppressed_errors:
            lines.append(f"  {self.suppressed_errors} device errors while giving handles back")
        for name, model in self.models.items():
            lines += _model_lines(name, model, self.link_rate)
        return "\n".join(lines)


def _model_lines(name: str, model: ModelStats, link_rate: float) -> list[str]:
    memory = model.memory
    state = f"acquired {model.acquired}x" if model.acquired else "idle"
    lines = [
        f"  {name}: {format_bytes(model.nbytes)} of weights, "
        f"{format_bytes(memory.resident_bytes)} on the device"
        + (f" ({format_bytes(memory.ring_bytes)} of it a ring)" if memory.ring_bytes else "")
        + f", {state}, {model.steps} steps",
        f"    {memory.passes} passes, {format_bytes(memory.loaded_bytes)} loaded, "
        f"{memory.misses} misses, {memory.unscheduled} unscheduled reads",
    ]
    lines[1:1] = [f"    {kind}: {format_bytes(nbytes)}" for kind, nbytes in model.beside.items()]
    if model.kept or model.reserved or model.pushed_out_bytes:
        stays = ["kept resident"] if model.kept else []
        stays += [f"reserved as {model.reserved.value}"] if model.reserved else []
        if model.pushed_out_bytes:
            stays.append(f"{format_bytes(model.pushed_out_bytes)} pushed out for want of room")
        lines.append(f"    {', '.join(stays)}")
    if memory.host_tier:
        lines.append(
            f"    host tier {memory.host_tier}: {format_bytes(memory.pinned_bytes)} pinned, "
            f"{format_bytes(memory.mapped_bytes)} of page cache mapped"
        )
    if memory.predicted_seconds is not None:
        lines.append(
            f"    plan: {format_bytes(memory.planned_bytes)} and {memory.predicted_seconds:.4f} s "
            "a pass"
        )
    if last := memory.last_pass:
        rate = last.loaded_bytes / last.seconds if last.seconds else 0.0
        lines.append(
            f"    last pass: {format_bytes(last.loaded_bytes)} in {last.seconds:.4f} s, "
            f"{rate / 1e9:.1f} GB/s, {rate / link_rate:.1%} of the link; "
            f"stalls {last.stall_seconds:.4f} s, the longest {last.longest_stall[1]:.4f} s in "
            f"{last.longest_stall[0]!r}; {last.misses} misses"
        )
    if model.moved:
        lines.append(f"    {len(model.moved)} parameters left pager memory: {model.moved[0]}, ...")
    return lines


def format_schedule(steps: Sequence[tuple[str, list[str], list[int]]], page_size: int) -> str:
    """Return a table of steps: number, name, pages in use, their bytes, tensors read."""
    if not steps:
        return "no steps"
    width = max(len(name) for name, _, _ in steps)
    return "\n".join(
        f"{number:5}  {name:{width}}  {_ranges(pages):>12}  "
        f"{format_bytes(len(pages) * page_size):>10}  {', '.join(tensors)}"
        for number, (name, tensors, pages) in enumerate(steps)
    )


def _ranges(pages: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][1] + 1 == page:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
