"""What is under one model's tensors: a region, how its bytes get there, and the plan it runs by."""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from typing_extensions import override

from penstock import _core, torch_dispatch
from penstock.errors import ScheduleError
from penstock.layout import Placement
from penstock.managed_plan import ManagedPlan, plan_managed
from penstock.outward import give_out_copies
from penstock.pager import Pager, Region, wait_until_pinned
from penstock.parts import Parts
from penstock.stats import MemoryStats, PassFigures

__all__ = ["FramesMemory", "ManagedMemory", "ModelMemory", "PagesOfSteps", "is_in_service"]

# The driver maps pinned host memory by entries of 8 bytes for 4 KiB, in tables of 2 MiB: 16 MiB of
# device memory for 7 GiB, as cudaMemGetInfo shows.
_HOST_PAGE = 4 << 10
_ENTRY = 8
_TABLE = 2 << 20
_LEAST_GROWTH = 50  # of a model's pages, one in so many is worth a new plan
_LEAST_GAIN = 50  # of the bytes of a pass, too
_CAPTURE_COST = 200  # of them, one in so many may be loaded more for fewer copies in a graph

_DISK_RATE = 2e9  # bytes per second of a common solid state disk; only how it compares matters

PagesOfSteps = Sequence[Sequence[int]]
"""For each step of a pass, the pages that are in use there."""


_NO_PARTS = Parts()


class ModelMemory(ABC):
    """The memory of one model.

    Parameters
    ----------
    parts
        Pages that have to stay, and those that must not; it may be set until the model runs.
    """

    def __init__(self, pager: Pager, region: Region, parts: Parts = _NO_PARTS) -> None:
        self.pager = pager
        self.region = region
        self.parts = parts
        self._paged: _core.PagedModel | None = None
        self.streamer = _core.Streamer(region.core)
        self.plan: _core.Plan | ManagedPlan | None = None

    @property
    def paged(self) -> _core.PagedModel:
        """The region as operations see it, once it has tensors."""
        assert self._paged is not None
        return self._paged

    def place(self, name: str, placements: Sequence[Placement]) -> None:
        """Say which tensors lie where.

        Parameters
        ----------
        name
            The model's, for messages.
        placements
            Ascending by offset.
        """
        torch_dispatch.install(_core.paging_api())
        give_out_copies()
        tensors = [
            (each.offset, each.nbytes, _slice_nbytes(each), each.slot.names[0])
            for each in placements
            if each.nbytes
        ]
        self._paged = _core.PagedModel(name, self.streamer, self.region.core, tensors)
        _in_service.add(self)
        self._paged.set_room(self.most_pages * self.pager.page_size)

    def tensor(self, placement: Placement) -> torch.Tensor:
        """Make a tensor on the region, whose operations page by themselves."""
        flat = torch.utils.dlpack.from_dlpack(self.paged.dlpack(placement.offset, placement.nbytes))
        typed = flat.view(placement.dtype)
        return torch_dispatch.key(typed.as_strided(placement.source.shape, placement.strides))

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

    @abstractmethod
    def set_active(self, active: bool) -> None:
        """Say whether the model is in use; others take its pages only when they must."""

    @abstractmethod
    def set_turn(self, turn: int | None) -> None:
        """Say when others take its pages: lower turns first; None for never."""

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


def _slice_nbytes(placement: Placement) -> int:
    """Return the least of a tensor that may be read at once: a stack's parts can be read alone."""
    shape = placement.source.shape
    is_stack = len(shape) == 3 and placement.stride is None
    return placement.nbytes // shape[0] if is_stack else placement.nbytes


def _figures(last: _core.PassStats, step_name: Callable[[int], str]) -> PassFigures:
    return PassFigures(
        seconds=last.seconds,
        loaded_bytes=last.loaded_bytes,
        stall_seconds=last.stall_seconds,
        longest_stall=(step_name(last.longest_stall_step), last.longest_stall_seconds),
        misses=last.misses,
    )


class ManagedMemory(ModelMemory):
    """Managed memory: the plan says what stays, and the pager has the rest pass through."""

    region_core: _core.ManagedRegion

    def __init__(self, pager: Pager, region: Region) -> None:
        super().__init__(pager, region)
        assert isinstance(region.core, _core.ManagedRegion)
        self.region_core = region.core
        self._kept: tuple[int, ...] = ()
        self._pinned = False
        self.allowed: int | None = None  # pages beside what other models claim; None: all

    @override
    def arrange(self, steps: PagesOfSteps, seconds: Sequence[float]) -> None:
        frames = self.pager.cap // self.pager.page_size
        self.paged.set_room(self.pager.cap)
        if _core.least_frames(self.page_count, steps, self.parts.pinned) > frames:
            steps = ()  # the pager says it better, when the step is run
        self.plan = None
        if steps and frames > 0:
            self.plan = plan_managed(
                steps,
                frames,
                page_size=self.pager.page_size,
                link_rate=self.pager.link_rate,
                seconds=seconds,
                parts=self.parts,
            )
            if not self.plan.kept:  # then the farthest next use goes, as in any plan without them
                self.plan = self.pager.plan(
                    self.page_count,
                    steps,
                    frames,
                    seconds,
                    keep=self.parts.pinned,
                    stream=self.parts.streamed,
                )
        # Where nothing has to pass through, all is loaded in batches as large as can be.
        plan = self.plan
        kept = plan.kept if isinstance(plan, ManagedPlan) and plan.ring else ()
        if kept != self._kept:
            self.pager.core.keep(self.region_core, kept)
            self._kept = kept

    @override
    def give_up(self, pages: int, order: Sequence[int]) -> None:
        before = self.region_core.stats().resident_pages
        for at in range(0, len(order), max(pages, 1)):
            given_up = before - self.region_core.stats().resident_pages
            if given_up >= pages:
                return
            self.region_core.evict(order[at : at + pages - given_up])

    @override
    def fits(self) -> bool:
        beside = self.allowed is None or self.page_count <= self.allowed
        return beside and self.region.nbytes <= self.pager.cap and not self.parts.streamed

    @property
    @override
    def most_pages(self) -> int:
        return self.pager.cap // self.pager.page_size

    @override
    def set_turn(self, turn: int | None) -> None:
        self.pager.core.set_turn(self.region_core, turn)

    @override
    def load_all(self, stream: int) -> None:
        pages = [page for page in self.all_pages if page not in self.parts.streamed]
        self.pager.core.prefetch(self.region_core, pages, stream)

    @override
    def set_active(self, active: bool) -> None:
        if active != self._pinned and self.parts.pinned:
            change = self.region_core.begin if active else self.region_core.end
            change(self.parts.pinned, self.pager.stream())
            self._pinned = active
        self.pager.core.set_active(self.region_core, active)

    @override
    def end_pass(self) -> None:
        if self.parts.streamed:
            self.region_core.evict(self.parts.streamed)

    @override
    def _own_stats(self) -> dict[str, Any]:
        return {"system_resident_bytes": self.region_core.resident_bytes()}

    @override
    def host_copy(self, offset: int, nbytes: int) -> torch.Tensor:
        return self.region.tensor(offset, (nbytes,), torch.uint8)


class FramesMemory(ModelMemory):
    """Frames: the plan decides what stays, and where the rest goes through.

    Parameters
    ----------
    tier
        Where the bytes come from.
    """

    region_core: _core.FramesRegion

    def __init__(self, pager: Pager, tier: _core.HostTier) -> None:
        core = _core.FramesRegion(pager.frames, tier)
        super().__init__(pager, Region(core, pager.device))
        self.region_core = core
        self.tier = tier
        self.frames = self.page_count  # that it may hold
        self._least_ring = 0
        self.gives = True  # to others who need room
        self.active = True
        self._outside = 0  # bytes charged for what the driver takes
        self._arranged: tuple[tuple[int | None, ...], int] | None = None
        self._arranged_frames = 0
        self._mappings = 0  # as of then
        self._lock = threading.RLock()  # others have a model give frames up while it runs

    @override
    def finish_filling(self) -> None:
        """Wait until the tier is pinned."""
        wait_until_pinned(self.tier)
        self._outside = self._charge_page_tables()

    def _charge_page_tables(self) -> int:
        """Charge what the driver takes on the device to address pinned host memory."""
        if self.pager.hard_cap is not None and self.pager.hard_cap.count_page_tables():
            return 0
        if self.pager.device.type != "cuda":
            return 0
        held = self.tier.stats()
        entries = (held.pinned_bytes + held.mapped_bytes) // _HOST_PAGE * _ENTRY
        nbytes = -(-entries // _TABLE) * _TABLE
        self.pager.budget.charge(_core.Tag.outside, nbytes)
        return nbytes

    @override
    def close(self) -> None:
        """Give back what is charged beside the frames, too."""
        super().close()
        self.region_core.retire()
        self.pager.budget.release(_core.Tag.outside, self._outside)
        self._outside = 0

    @override
    def arrange(self, steps: PagesOfSteps, seconds: Sequence[float]) -> None:
        with self._lock:
            plan = self._plan(steps, seconds)
            arranged = (tuple(plan.slot), plan.ring)
            mappings = self.region_core.mappings
            if arranged != self._arranged or mappings != self._mappings:
                try:
                    self.region_core.arrange(plan.slot, plan.ring)
                except ScheduleError:  # pages stay in use: places are found on demand then
                    self.plan = None
                    return
                self._arranged = arranged
                self._arranged_frames = arranged[0].count(None) + plan.ring
                self._mappings = self.region_core.mappings
            self.plan = plan
            self.paged.set_room(self.frames * self.pager.page_size)
            self.tier.expect([page for page, _ in plan.loads])

    def _plan(self, steps: PagesOfSteps, seconds: Sequence[float]) -> _core.Plan:
        return self.pager.plan(
            self.page_count,
            steps,
            min(self.frames, self.page_count),
            seconds,
            keep=self.parts.pinned,
            stream=self.parts.streamed,
            least_ring=self._least_ring,
        )

    def widen_ring(self) -> bool:
        """Have plans from now on share more frames, for fewer and larger copies in a graph.

        Passes load half a percent more for that.

        Returns
        -------
        bool
            Whether that is to be planned for now.
        """
        if self._least_ring or not isinstance(self.plan, _core.Plan) or self.plan.ring == 0:
            return False
        pages = self.plan.bytes_per_pass // self.pager.page_size
        self._least_ring = self.plan.ring + pages // _CAPTURE_COST
        return self._least_ring > self.plan.ring

    @override
    def loads_less(self, steps: PagesOfSteps, seconds: Sequence[float]) -> bool:
        if self.plan is None or self.plan.bytes_per_pass == 0:
            return False
        fewer = self.plan.bytes_per_pass - self._plan(steps, seconds).bytes_per_pass
        return fewer * _LEAST_GAIN >= self.plan.bytes_per_pass

    @override
    def fits(self) -> bool:
        return self.plan is not None and self.plan.ring == 0

    @property
    @override
    def most_pages(self) -> int:
        return self.frames

    @property
    @override
    def seconds_per_byte(self) -> float:
        return 1 / (_DISK_RATE if self.tier.kind == "stream" else self.pager.link_rate)

    @property
    def frames_held(self) -> int:
        """Frames that it holds now."""
        return self.region_core.frame_count

    @override
    def follow_others(self) -> bool:
        if self._arranged is None:
            return False
        held = self.frames_held
        if held < self._arranged_frames:
            self.frames = held
            return True
        hard_cap = self.pager.hard_cap
        if hard_cap is None or self.fits():
            return False
        hard_cap.free_idle()
        free = self.pager.budget.available // self.pager.page_size
        if free <= self.page_count // _LEAST_GROWTH:
            return False
        self.frames = held + free
        return True

    @override
    def _own_stats(self) -> dict[str, Any]:
        tier = self.tier.stats()
        return {
            "system_resident_bytes": None,
            "pinned_bytes": tier.pinned_bytes,
            "mapped_bytes": tier.mapped_bytes,
            "read_bytes": tier.read_bytes,
            "host_tier": self.tier.kind,
            "ring_bytes": self.plan.ring * self.pager.page_size if self.plan else 0,
        }

    @override
    def evict(self) -> None:
        with self._lock:
            super().evict()
            self._arranged = None

    @override
    def give_up(self, pages: int, order: Sequence[int]) -> None:
        with self._lock:
            left = max(0, self.frames_held - pages)
            self._arranged = None
            # Frames of the ring are free only when all their pages have gone; what is in them is
            # of the least use.
            slots = self.plan.slot if isinstance(self.plan, _core.Plan) else []
            sharing = [page for page, slot in enumerate(slots) if slot is not None]
            if sharing and self.frames_held > left:
                self.region_core.evict(sharing)
            for page in order:
                if self.frames_held <= left:
                    break
                self.region_core.evict([page])

    @override
    def set_turn(self, turn: int | None) -> None:
        """Say whether others may take frames without asking; their order is that of next uses."""
        self.gives = turn is not None
        self.region_core.set_protected(not self.gives)

    @override
    def load_all(self, stream: int) -> None:
        self.streamer.prefetch()

    @override
    def set_active(self, active: bool) -> None:
        self.active = active
        self.region_core.set_active(active)

    @override
    def host_copy(self, offset: int, nbytes: int) -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        self.region_core.flush()
        address = self.tier.address
        if address is None:
            return torch.frombuffer(bytearray(self.tier.read(offset, nbytes)), dtype=torch.uint8)
        held = (ctypes.c_char * nbytes).from_address(address + offset)
        held._tier = self.tier  # type: ignore[attr-defined]
        return torch.frombuffer(held, dtype=torch.uint8)
