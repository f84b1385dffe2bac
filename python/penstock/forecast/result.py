"""What an estimate says, as values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["AtCap", "Estimate", "PartEstimate", "Setting"]


@dataclass(frozen=True)
class Setting:
    """A setting that a manager would take, and why."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class PartEstimate:
    """One model; a pipeline has several.

    Parameters
    ----------
    name
        In the pipeline; empty for a model by itself.
    nbytes
        Of its weights, as they will be held.
    resident, streamed
        Bytes that stay from pass to pass, and bytes that each pass brings in.
    seconds
        Of a pass; None where it cannot run, or where nothing streams and the device's speed is not
        known.
    bound
        What takes the longest: `"link"`, `"disk"` or `"compute"`.
    """

    name: str
    nbytes: int
    resident: int
    streamed: int
    seconds: float | None
    bound: str


@dataclass(frozen=True)
class AtCap:
    """A pass under one cap: of each part of a pipeline once, one after the other.

    Parameters
    ----------
    cap
        In bytes.
    fits
        Whether it runs.
    resident
        Bytes that stay: of all parts where there is room for all of them, else of the largest.
    streamed
        Bytes that the pass brings in.
    seconds, bound
        See `PartEstimate`; the bound is that of the part that takes the longest.
    page_size, ring
        Bytes of a page, and of the frames that what streams comes through.
    parts
        Each part.
    """

    cap: int
    fits: bool
    resident: int
    streamed: int
    seconds: float | None
    bound: str
    page_size: int
    ring: int
    parts: tuple[PartEstimate, ...]


@dataclass(frozen=True)
class Estimate:
    """What a model needs and how fast it is.

    Parameters
    ----------
    nbytes
        Of the weights, as they will be held.
    least_cap
        Bytes: the least cap from which on every one works.
    least_cap_by
        The operation that needs it.
    least_cap_indexed
        The same where the program reads experts one by one; None where there are none.
    at
        What is so under the cap that was asked for, or else under the least one.
    problem
        Why it does not run there; empty where it does.
    host, pinned, spill
        Bytes of host memory in all, those of it that are pinned, and those of the spill file.
    load_seconds
        Until the first pass can begin, with nothing in the page cache; None where the disk's rate
        is not known.
    caps
        The same over some caps, ascending.
    tokens
        That one pass takes.
    training, beside
        What is trained; and the bytes of ordinary device memory that its gradients and the states
        of AdamW take, beside the cap.
    link, disk, compute, memory
        The rates that it was made by, per second: see `Rates`.
    settings
        What a manager would take.
    notes
        What was assumed, and what is not estimated.
    """

    nbytes: int
    least_cap: int
    least_cap_by: str
    least_cap_indexed: int | None
    at: AtCap
    problem: str
    host: int
    pinned: int
    spill: int
    load_seconds: float | None
    caps: tuple[AtCap, ...]
    tokens: int
    training: str | None
    beside: int
    device: str
    pager: str
    link: float
    disk: float | None
    compute: float | None
    memory: float | None
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]

    @property
    def cap(self) -> int:
        """The cap that the figures are for, in bytes."""
        return self.at.cap

    @property
    def fits(self) -> bool:
        """Whether it runs under that cap."""
        return not self.problem

    @property
    def resident(self) -> int:
        """Bytes that stay on the device from pass to pass."""
        return self.at.resident

    @property
    def streamed(self) -> int:
        """Bytes that each pass brings in."""
        return self.at.streamed

    @property
    def seconds(self) -> float | None:
        """Of a pass; None where it cannot be said."""
        return self.at.seconds

    @property
    def bound(self) -> str:
        """What takes the longest: `"link"`, `"disk"` or `"compute"`."""
        return self.at.bound

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        found = asdict(self)
        at = found.pop("at")
        return {**at, **found, "fits": self.fits}
