"""Frames under one model: the plan says what stays in them, and where the rest goes through."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from penstock import _core
from penstock.errors import ScheduleError
from penstock.memory.model_memory import ModelMemory, PagesOfSteps
from penstock.memory.pager import Pager, wait_until_pinned
from penstock.memory.region import Region

__all__ = ["FramesMemory", "page_table_bytes"]

# The driver maps pinned host memory by entries of 8 bytes for 4 KiB, in tables of 2 MiB: 16 MiB of
# device memory for 7 GiB, as cudaMemGetInfo shows.
_HOST_PAGE = 4 << 10
_ENTRY = 8
_TABLE = 2 << 20
_LEAST_GROWTH = 50  # of a model's pages, one in so many is worth a new plan
_LEAST_GAIN = 50  # of the bytes of a pass, too
_CAPTURE_COST = 200  # of them, one in so many may be loaded more for fewer copies in a graph

_DISK_RATE = 2e9  # bytes per second of a common solid state disk; only how it compares matters


def page_table_bytes(host_bytes: int) -> int:
    """Return what the driver takes on a GPU to address so many bytes of pinned host memory."""
    return -(-host_bytes // _HOST_PAGE * _ENTRY // _TABLE) * _TABLE


@dataclass(frozen=True)
class _Arranged:
    """How pages were placed last, and how many mappings the region had made by then."""

    slots: tuple[int | None, ...]
    ring: int
    mappings: int

    @property
    def frames(self) -> int:
        """How many it takes."""
        return self.slots.count(None) + self.ring


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
        self._allowed = self.page_count  # frames that it may hold
        self._least_ring = 0
        self._outside = 0  # bytes charged for what the driver takes
        self._arranged: _Arranged | None = None
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
        nbytes = page_table_bytes(held.pinned_bytes + held.mapped_bytes)
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
            if self._arranged != _Arranged(tuple(plan.slot), plan.ring, self.region_core.mappings):
                try:
                    self.region_core.arrange(plan.slot, plan.ring)
                except ScheduleError:  # pages stay in use: places are found on demand then
                    self.plan = None
                    return
                mappings = self.region_core.mappings
                self._arranged = _Arranged(tuple(plan.slot), plan.ring, mappings)
            self.plan = plan
            self.paged.set_room(self._allowed * self.pager.page_size)
            self.tier.expect([page for page, _ in plan.loads])

    def _plan(self, steps: PagesOfSteps, seconds: Sequence[float]) -> _core.Plan:
        return self.pager.plan(
            self.page_count,
            steps,
            min(self._allowed, self.page_count),
            seconds,
            keep=self.rules.keep,
            stream=self.rules.stream,
            least_ring=self._least_ring,
        )

    @override
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
        return self._allowed

    @property
    @override
    def seconds_per_byte(self) -> float:
        return 1 / (_DISK_RATE if self.tier.kind == "stream" else self.pager.link_rate)

    @property
    @override
    def held(self) -> int:
        return self.region_core.frame_count

    @override
    def allow(self, pages: int | None) -> None:
        self._allowed = self.page_count if pages is None else pages

    @override
    def write(self, offset: int, values: np.ndarray[Any, Any]) -> None:
        self.tier.write(offset, values)

    @override
    def capturable(self) -> _core.FramesRegion:
        return self.region_core

    @override
    def follow_others(self) -> bool:
        if self._arranged is None:
            return False
        held = self.held
        if held < self._arranged.frames:
            self._allowed = held
            return True
        hard_cap = self.pager.hard_cap
        if hard_cap is None or self.fits():
            return False
        hard_cap.free_idle()
        free = self.pager.budget.available // self.pager.page_size
        if free <= self.page_count // _LEAST_GROWTH:
            return False
        self._allowed = held + free
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
            left = max(0, self.held - pages)
            self._arranged = None
            # Frames of the ring are free only when all their pages have gone; what is in them is
            # of the least use.
            slots = self.plan.slot if isinstance(self.plan, _core.Plan) else []
            sharing = [page for page, slot in enumerate(slots) if slot is not None]
            if sharing and self.held > left:
                self.region_core.evict(sharing)
            for page in order:
                if self.held <= left:
                    break
                self.region_core.evict([page])

    @override
    def set_eviction_rank(self, rank: int | None) -> None:
        """Say whether others may take frames without asking; their order is that of next uses."""
        self.region_core.set_protected(rank is None)

    @override
    def load_all(self, stream: int) -> None:
        self.streamer.prefetch()

    @override
    def set_active(self, active: bool) -> None:
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
