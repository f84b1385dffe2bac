"""One pass of a part under one cap: what stays, what streams, how long it takes.

The plan is the one that a manager would make when it knows the steps' times. These are estimated:
an operation takes as long as its multiplications, or as reading its weights from the device's own
memory, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from penstock import _core
from penstock.forecast.host import Waiting
from penstock.forecast.parts import Laid, Part
from penstock.forecast.rates import Rates
from penstock.forecast.reads import Read
from penstock.forecast.sizing import frames_under
from penstock.forecast.target import Target
from penstock.memory.managed_plan import ManagedPlan, plan_managed

__all__ = ["TRAINING", "Pass", "Workload", "forecast_pass", "plan_pass"]

TRAINING = (None, "frozen", "all")
"""What may be trained; see `Workload`."""

UPDATES = 2  # times that AdamW goes through all weights, as torch does it by lists


Each = TypeVar("Each")


@dataclass(frozen=True)
class Workload:
    """What a pass does.

    Parameters
    ----------
    tokens
        That go through it.
    training
        None for a forward pass alone; `"frozen"` for a backward pass behind it, without updates;
        `"all"` for updates of all weights, too.
    """

    tokens: int
    training: str | None = None

    def over(self, steps: Sequence[Each]) -> list[Each]:
        """List the steps of a pass, by those of its forward pass."""
        if self.training is None:
            return list(steps)
        updates = list(steps) * (UPDATES if self.training == "all" else 0)
        return [*steps, *reversed(steps), *updates]

    def seconds(self, times: Sequence[tuple[float, float]]) -> list[float]:
        """Return the seconds of each step, by the multiplications and the reads of the forward."""
        forward = [max(each) for each in times]
        if self.training is None:
            return forward
        # Gradients of inputs, and of weights where these are trained.
        products = 2 if self.training == "all" else 1
        backward = [max(products * flops, reads) for flops, reads in times]
        updates = [reads for _, reads in times] * (UPDATES if self.training == "all" else 0)
        return [*forward, *reversed(backward), *updates]


@dataclass(frozen=True)
class Pass:
    """A steady pass of one part.

    Parameters
    ----------
    resident
        Bytes that stay on the device from pass to pass.
    streamed
        Bytes that each pass brings in.
    ring
        Bytes of device memory through which they come.
    seconds
        Of a pass; None where nothing streams and the device's speed is not known.
    bound
        `"link"`, `"disk"` or `"compute"`: what takes the longest.
    """

    resident: int
    streamed: int
    ring: int
    seconds: float | None
    bound: str


def forecast_pass(
    part: Part,
    waiting: Waiting,
    target: Target,
    rates: Rates,
    *,
    cap: int,
    tables: int,
    workload: Workload,
) -> Pass:
    """Plan a pass under a cap that is enough for it.

    Parameters
    ----------
    tables
        Bytes of the cap that page tables take.
    """
    page_size = target.page_size(cap)
    laid, times = part.laid(page_size), [_times_of(part, r, rates, workload) for r in part.reads]
    seconds = workload.seconds(times)
    frames = frames_under(cap, page_size, tables)
    resident, streamed, ring, planned = plan_pass(
        laid, workload.over(laid.steps), target, rates.link, cap, frames, seconds
    )
    compute = sum(seconds)
    copies = streamed / rates.link
    disk = streamed / rates.disk if waiting.tier == "stream" and rates.disk else 0.0
    longest = max(copies, disk, compute)
    bound = "compute" if longest == compute else "disk" if longest == disk else "link"
    known = streamed > 0 or rates.knows_compute
    return Pass(
        min(resident, laid.nbytes), streamed, ring, max(planned, disk) if known else None, bound
    )


def plan_pass(
    laid: Laid,
    steps: Sequence[Sequence[int]],
    target: Target,
    link: float,
    cap: int,
    frames: int,
    seconds: Sequence[float],
) -> tuple[int, int, int, float]:
    """Have the planner plan a pass by the times of its steps.

    Returns
    -------
    tuple
        Bytes that stay, bytes that stream, those of the ring, and the seconds of the pass.
    """
    size = laid.page_size
    if laid.page_count == 0 or (target.pager == "managed" and laid.nbytes <= cap):
        return laid.nbytes, 0, 0, sum(seconds)
    plan: ManagedPlan | _core.Plan
    if target.pager == "frames":
        plan = _core.plan(
            page_count=laid.page_count,
            page_size=size,
            steps=steps,
            frames=min(frames, laid.page_count),
            link_rate=link,
            step_seconds=seconds,
        )
        return len(plan.resident) * size, plan.bytes_per_pass, plan.ring * size, plan.seconds
    if frames == 0 or _core.least_frames(laid.page_count, steps) > frames:
        # The pager runs what fits by its last page alone, which is no whole one: all of it moves.
        loads = sum(map(len, steps)) * size
        return 0, loads, cap, max(loads / link, sum(seconds))
    plan = plan_managed(
        laid.page_count,
        steps,
        frames,
        page_size=size,
        link_rate=link,
        seconds=seconds,
    )
    stays = len(plan.kept if isinstance(plan, ManagedPlan) else plan.resident)
    return stays * size, plan.bytes_per_pass, plan.ring * size, plan.seconds


def _times_of(part: Part, read: Read, rates: Rates, workload: Workload) -> tuple[float, float]:
    """Estimate the multiplications of an operation in a forward pass, and reading its weights.

    Each element of a matrix takes two floating-point operations a token.
    """
    placements = [part.placements[index] for index in read.tensors]
    elements = sum(p.nbytes // p.dtype.itemsize for p in placements if len(p.shape) > 1)
    flops = 2 * elements * workload.tokens / read.parts
    nbytes = sum(p.nbytes for p in placements) / read.parts
    return (
        flops / rates.compute if rates.compute else 0.0,
        nbytes / rates.memory if rates.memory else 0.0,
    )
