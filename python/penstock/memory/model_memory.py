"""What is under one model's tensors: a region, how its bytes get there, and the plan it runs by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import torch

from penstock import _core
from penstock.dispatch import torch_dispatch
from penstock.dispatch.outward import give_out_copies
from penstock.errors import ModelError
from penstock.memory.managed_plan import ManagedPlan
from penstock.memory.page_rules import NO_RULES, PageRules
from penstock.memory.pager import Pager
from penstock.memory.region import Region
from penstock.report.stats import MemoryStats, PassFigures

__all__ = ["ModelMemory", "PagesOfSteps", "PlacedTensor", "is_in_service"]

PagesOfSteps = Sequence[Sequence[int]]
"""For each step of a pass, the pages that are in use there."""


class PlacedTensor(Protocol):
    """One tensor of a model that has its place on the region."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def offset(self) -> int:
        """First byte on the region."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    @property
    def least_nbytes(self) -> int:
        """Bytes that are read at once at least."""

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""


class ModelMemory(ABC):
    """The memory of one model.

    Parameters
    ----------
    rules
        Pages that have to stay, and those that must not; it may be set until the model runs.
    """

    def __init__(self, pager: Pager, region: Region, rules: PageRules = NO_RULES) -> None:
        self.pager = pager
        self.region = region
        self.rules = rules
        self._paged: _core.PagedModel | None = None
        self.streamer = _core.Streamer(region.core)
        self.plan: _core.Plan | ManagedPlan | None = None

    @property
    def paged(self) -> _core.PagedModel:
        """The region as operations see it, once it has tensors."""
        assert self._paged is not None
        return self._paged

    def place(self, name: str, tensors: Sequence[PlacedTensor]) -> None:
        """Say which tensors lie where.

        Parameters
        ----------
        name
            The model's, for messages.
        tensors
            Ascending by offset.
        """
        torch_dispatch.install(_core.paging_api())
        give_out_copies()
        placed = [
            (each.offset, each.nbytes, each.least_nbytes, each.name)
            for each in tensors
            if each.nbytes
        ]
        self._paged = _core.PagedModel(name, self.streamer, self.region.core, placed)
        _in_service.add(self)
        self._paged.set_room(self.most_pages * self.pager.page_size)

    def tensor(self, placed: PlacedTensor) -> torch.Tensor:
        """Make a tensor on the region, whose operations page by themselves."""
        flat = torch.utils.dlpack.from_dlpack(self.paged.dlpack(placed.offset, placed.nbytes))
        typed = flat.view(placed.dtype)
        return torch_dispatch.key(typed.as_strided(placed.shape, placed.strides))

    @property
    def page_count(self) -> int:
        """Pages of the region."""
        return self.region.core.page_count

    @property
    def all_pages(self) -> list[int]:
        """Every page of the region."""
        return list(range(self.page_count))

    @abstractmethod
    def arrange(self, steps: PagesOfSteps, seconds: Sequence[float]) -> None:
        """Plan for a pass, and place pages accordingly.

        Parameters
        ----------
        seconds
            Compute time of each step; empty if it is not known.

        Raises
        ------
        CapExceededError
            If a step cannot run in what the model may use.
        """

    def loads_less(self, steps: PagesOfSteps, seconds: Sequence[float]) -> bool:
        """Whether passes would load clearly fewer bytes by a plan with these times."""
        return False

    @abstractmethod
    def fits(self) -> bool:
        """Whether all pages may be in place at once."""

    @property
    @abstractmethod
    def most_pages(self) -> int:
        """Pages that may be in place at once."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Pages that it holds now."""

    @abstractmethod
    def allow(self, pages: int | None) -> None:
        """Say how many pages it may count on; the next plan is for that.

        Parameters
        ----------
        pages
            None for as many as the cap has.
        """

    @abstractmethod
    def write(self, offset: int, values: np.ndarray[Any, Any]) -> None:
        """Put bytes in place, before the model is used."""

    @abstractmethod
    def host_copy(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as they are kept on the host; not to be written to."""

    def evict(self) -> None:
        """Drop all that is not in use."""
        self.region.core.evict(self.all_pages)

    @abstractmethod
    def give_up(self, pages: int, order: Sequence[int]) -> None:
        """Drop some pages that are not in use.

        Parameters
        ----------
        pages
            How many, at least, if there are so many.
        order
            All pages, those first that are missed least.
        """

    def finish_filling(self) -> None:  # noqa: B027
        """Say that all bytes are written; returns when they can be streamed."""

    def end_pass(self) -> None:  # noqa: B027
        """Have pages go that are not to stay; before any are loaded for the next pass."""

    def close(self) -> None:
        """End the use of the memory; tensors on it may live on."""
        _in_service.discard(self)

    def follow_others(self) -> bool:
        """Adopt the frames that others took or left since the last plan; return whether to plan."""
        return False

    def widen_ring(self) -> bool:
        """Have plans from now on move more at a time, for a graph; return whether to plan now."""
        return False

    def capturable(self) -> _core.FramesRegion:
        """Return the region, whose copies can be captured in a graph.

        Raises
        ------
        ModelError
            If they cannot.
        """
        raise ModelError('capturing needs pager="frames": managed pages move by host calls')

    @abstractmethod
    def set_active(self, active: bool) -> None:
        """Say whether the model is in use; others take its pages only when they must."""

    @abstractmethod
    def set_eviction_rank(self, rank: int | None) -> None:
        """Say when others take its pages: from lower ranks first; None for never."""

    @abstractmethod
    def load_all(self, stream: int) -> None:
        """Begin to bring in all that it may hold."""

    @property
    def seconds_per_byte(self) -> float:
        """What it costs to bring a byte back."""
        return 1 / self.pager.link_rate

    def stats(self, step_name: Callable[[int], str] = str) -> MemoryStats:
        """Return what it holds and has moved."""
        held = self.region.core.stats()
        run = self.streamer.stats()
        passes = self.streamer.passes()
        plan = self.plan
        return MemoryStats(
            resident_bytes=held.resident_bytes,
            loaded_bytes=run.loaded_bytes,
            evicted_bytes=run.loaded_bytes - held.in_place_bytes,
            passes=run.passes,
            steps_run=run.steps,
            misses=run.misses,
            unscheduled=run.unscheduled,
            last_pass=_figures(passes[-1], step_name) if passes else None,
            predicted_seconds=plan.seconds if plan else None,
            planned_bytes=plan.bytes_per_pass if plan else 0,
            **self._own_stats(),
        )

    @abstractmethod
    def _own_stats(self) -> dict[str, Any]:
        """Return the figures that depend on the kind of memory."""


_in_service: WeakSet[ModelMemory] = WeakSet()


def is_in_service(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the memory of a model that a manager has."""
    return torch_dispatch.is_keyed(tensor) and any(
        memory.region.holds(tensor) for memory in list(_in_service)
    )


def _figures(last: _core.PassStats, step_name: Callable[[int], str]) -> PassFigures:
    return PassFigures(
        seconds=last.seconds,
        loaded_bytes=last.loaded_bytes,
        stall_seconds=last.stall_seconds,
        longest_stall=(step_name(last.longest_stall_step), last.longest_stall_seconds),
        misses=last.misses,
    )
