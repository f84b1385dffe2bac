"""Managed memory under one model: the pager moves pages, and the plan says which of them stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from penstock import _core
from penstock.memory.managed_plan import ManagedPlan, plan_managed
from penstock.memory.model_memory import ModelMemory, PagesOfSteps
from penstock.memory.pager import Pager
from penstock.memory.region import Region

__all__ = ["ManagedMemory"]


class ManagedMemory(ModelMemory):
    """Managed memory: the plan says what stays, and the pager has the rest pass through."""

    region_core: _core.ManagedRegion

    def __init__(self, pager: Pager, region: Region) -> None:
        super().__init__(pager, region)
        assert isinstance(region.core, _core.ManagedRegion)
        self.region_core = region.core
        self._kept: tuple[int, ...] = ()
        self._keeping = False
        self._allowed: int | None = None  # pages beside what other models claim; None: all

    @override
    def arrange(self, steps: PagesOfSteps, seconds: Sequence[float]) -> None:
        frames = self.pager.cap // self.pager.page_size
        self.paged.set_room(self.pager.cap)
        if _core.least_frames(self.page_count, steps, self.rules.keep) > frames:
            steps = ()  # the pager says it better, when the step is run
        self.plan = None
        if steps and frames > 0:
            self.plan = plan_managed(
                self.page_count,
                steps,
                frames,
                page_size=self.pager.page_size,
                link_rate=self.pager.link_rate,
                seconds=seconds,
                rules=self.rules,
            )
        # Where nothing has to pass through, all is loaded in batches as large as can be.
        plan = self.plan
        kept = plan.kept if isinstance(plan, ManagedPlan) and plan.ring else ()
        if kept != self._kept:
            self.pager.core.keep(self.region_core, kept)
            self._kept = kept

    @override
    def give_up(self, pages: int, order: Sequence[int]) -> None:
        before = self.held
        for at in range(0, len(order), max(pages, 1)):
            given_up = before - self.held
            if given_up >= pages:
                return
            self.region_core.evict(order[at : at + pages - given_up])

    @override
    def fits(self) -> bool:
        beside = self._allowed is None or self.page_count <= self._allowed
        return beside and self.region.nbytes <= self.pager.cap and not self.rules.stream

    @property
    @override
    def most_pages(self) -> int:
        return self.pager.cap // self.pager.page_size

    @property
    @override
    def held(self) -> int:
        return self.region_core.stats().resident_pages

    @override
    def allow(self, pages: int | None) -> None:
        self._allowed = pages

    @override
    def write(self, offset: int, values: np.ndarray[Any, Any]) -> None:
        self.region_core.write(offset, values)

    @override
    def set_eviction_rank(self, rank: int | None) -> None:
        self.pager.core.set_turn(self.region_core, rank)

    @override
    def load_all(self, stream: int) -> None:
        pages = [page for page in self.all_pages if page not in self.rules.stream]
        self.pager.core.prefetch(self.region_core, pages, stream)

    @override
    def set_active(self, active: bool) -> None:
        if active != self._keeping and self.rules.keep:
            change = self.region_core.begin if active else self.region_core.end
            change(self.rules.keep, self.pager.stream())
            self._keeping = active
        self.pager.core.set_active(self.region_core, active)

    @override
    def end_pass(self) -> None:
        if self.rules.stream:
            self.region_core.evict(self.rules.stream)

    @override
    def _own_stats(self) -> dict[str, Any]:
        return {"system_resident_bytes": self.region_core.resident_bytes()}

    @override
    def host_copy(self, offset: int, nbytes: int) -> torch.Tensor:
        return self.region.tensor(offset, (nbytes,), torch.uint8)
