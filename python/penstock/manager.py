"""The memory manager: models by name, under one cap."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from penstock import _core
from penstock.binding import Binding
from penstock.errors import ModelError
from penstock.fill import fill
from penstock.layout import Placement, lay_out
from penstock.lookahead import LookAhead
from penstock.pager import PAGE_SIZE, Pager, Region
from penstock.progress import progress_bar
from penstock.sizes import format_bytes
from penstock.skeleton import build_skeleton
from penstock.stats import ManagerStats, ModelStats
from penstock.weights import find_slots, match, open_weights

__all__ = ["MemoryManager"]

_log = logging.getLogger("penstock")


@dataclass
class _Model:
    """One registered model. Region and look-ahead are None where it has no weights."""

    binding: Binding
    region: Region | None
    lookahead: LookAhead | None
    acquired: int = 0


class MemoryManager:
    """Runs registered models with at most `cap` bytes of weights resident on the device.

    Parameters
    ----------
    cap
        Bytes of weights that may be resident at once, for all models together, or a text such as
        `"8GiB"`. Activations and buffers are not counted yet.
    device
        `"cuda"`, `"cuda:N"`, `"cpu"`, or `"auto"`: CUDA where there is any.
    pager
        `"managed"`, or `"auto"`, which takes the same.
    page_size
        Bytes of a page; see `Pager`.
    progress
        Whether to show progress bars; None for: if standard error is a terminal.

    Raises
    ------
    DeviceError
        If the device is not there or cannot page.

    Notes
    -----
    Managing is thread-safe; each model runs in one thread at a time. A failed call changes nothing:
    the ledger stays balanced and the manager usable.
    """

    def __init__(
        self,
        *,
        cap: int | str,
        device: str | torch.device | _core.Device = "auto",
        pager: str = "auto",
        page_size: int | str = PAGE_SIZE,
        progress: bool | None = None,
    ) -> None:
        self._pager = Pager(cap=cap, device=device, kind=pager, page_size=page_size)
        self._progress = progress
        self._models: dict[str, _Model] = {}
        self._lock = threading.RLock()

    @property
    def pager(self) -> Pager:
        """The pager that all models share."""
        return self._pager

    @property
    def device(self) -> torch.device:
        """Where models run; inputs belong there."""
        return self._pager.device

    def register(
        self,
        name: str,
        module_or_builder: nn.Module | Callable[[], nn.Module],
        weights: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype | None = None,
        strict: bool = True,
        writable: bool = False,
    ) -> None:
        """Build a model on pager memory and read its weights; none of it is resident afterwards.

        Parameters
        ----------
        name
            How the model is called from now on.
        module_or_builder
            A function that builds the module, which is best, or a module made under
            `torch.device("meta")`. No memory is spent on parameters in either case.
        weights
            A `.safetensors` file, a `*.safetensors.index.json`, a directory with either, a torch
            file (`.pt`, `.bin`), or tensors by name.
        dtype
            Convert 16, 32 and 64 bit floating-point weights to this; None keeps what the weights
            have, whatever the module's constructor says.
        strict
            Whether names that the module lacks, and buffers that the weights lack, are an error.
        writable
            Whether the weights will be written to. Evicting then moves them.

        Raises
        ------
        ModelError
            If the name is taken, or the module is no skeleton.
        CheckpointError
            If the weights cannot be read, or do not fit the module.
        DeviceError
            If there is no room for the region.
        """
        with self._lock:
            if name in self._models:
                raise ModelError(f"model {name!r} is registered already; unregister it first")
            module = build_skeleton(module_or_builder)
            slots = find_slots(module)
            pairs = match(module, slots, open_weights(weights), strict=strict)
            placements, nbytes = lay_out(slots, pairs, dtype)
            _announce_conversion(name, placements)
            region = self._pager.reserve(nbytes, writable=writable) if nbytes else None
            if region is not None:
                with progress_bar(f"loading {name}", show=self._progress) as progress:
                    fill(region, placements, progress)
            binding = Binding(module, placements, region, self.device)
            lookahead = LookAhead(name, binding, self._pager, region) if region else None
            self._models[name] = _Model(binding, region, lookahead)

    def unregister(self, name: str) -> None:
        """Forget a model. Its memory goes when the last tensor on it does.

        Raises
        ------
        ModelError
            If there is no such model, or it is acquired.
        """
        with self._lock:
            model = self._find(name)
            if model.acquired:
                raise ModelError(f"model {name!r} is acquired {model.acquired}x; release it first")
            self._evict(model)
            if model.lookahead is not None:
                model.lookahead.remove()
            del self._models[name]

    def acquire(self, name: str) -> nn.Module:
        """Mark a model as in use, begin to bring it in, and return it.

        Returns at once; each module waits for its own pages. Idle models make room, the least
        recently used first.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            model = self._find(name)
            model.binding.warn_if_moved()
            if model.region is not None:
                self._pager.core.set_active(model.region.core, True)
            model.acquired += 1
            self._prefetch(model)
            return model.binding.module

    def release(self, name: str, *, evict: bool = False) -> None:
        """Take one `acquire` back.

        Parameters
        ----------
        evict
            Whether to drop the model's pages when nobody has it acquired; else they stay until
            others need the room.

        Raises
        ------
        ModelError
            If there is no such model, or it is not acquired.
        """
        with self._lock:
            model = self._find(name)
            if model.acquired == 0:
                raise ModelError(f"model {name!r} is not acquired")
            model.acquired -= 1
            if model.acquired == 0 and model.region is not None and model.lookahead is not None:
                self._pager.core.set_active(model.region.core, False)
                model.lookahead.unwind()
                if evict:
                    self._evict(model)

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        """Acquire a model for a block; release and evict it at the end.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        module = self.acquire(name)
        try:
            yield module
        finally:
            self.release(name, evict=True)

    def prefetch(self, name: str) -> None:
        """Begin to bring a model in without acquiring it, as far as there is room; return at once.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            self._prefetch(self._find(name))

    def stats(self) -> ManagerStats:
        """Return the figures of this manager and its models."""
        with self._lock:
            pager = self._pager.core.stats()
            ledger = self._pager.budget.stats()
            device = self._pager.core_device
            return ManagerStats(
                device=f"{self.device} ({device.info().name})",
                pager=self._pager.kind,
                cap=ledger.cap,
                used=ledger.used,
                peak=ledger.peak,
                used_by_tag=ledger.used_by_tag,
                peak_by_tag=ledger.peak_by_tag,
                loaded_bytes=pager.loaded_bytes,
                evicted_bytes=pager.evicted_bytes,
                hits=pager.hits,
                demand_loads=pager.demand_loads,
                ahead_loads=pager.ahead_loads,
                ahead_declined=pager.ahead_declined,
                suppressed_errors=device.suppressed_count,
                models={name: self._model_stats(model) for name, model in self._models.items()},
            )

    def report(self) -> str:
        """Return the figures as text for people."""
        return str(self.stats())

    def _find(self, name: str) -> _Model:
        try:
            return self._models[name]
        except KeyError:
            known = ", ".join(sorted(self._models)) or "none"
            raise ModelError(f"there is no model {name!r}; registered: {known}") from None

    def _prefetch(self, model: _Model) -> None:
        if model.lookahead is not None:
            model.lookahead.prefetch()

    def _evict(self, model: _Model) -> None:
        if model.region is not None:
            self._pager.evict(model.region)

    def _model_stats(self, model: _Model) -> ModelStats:
        region, lookahead = model.region, model.lookahead
        resident = self._pager.core.region_stats(region.core).resident_bytes if region else 0
        return ModelStats(
            nbytes=sum(placement.nbytes for placement in model.binding.placements),
            resident_bytes=resident,
            system_resident_bytes=region.core.resident_bytes() if region else 0,
            acquired=model.acquired,
            steps=len(lookahead.steps) if lookahead else 0,
            passes=lookahead.passes if lookahead else 0,
            unscheduled_reads=lookahead.unscheduled_reads if lookahead else 0,
            moved=tuple(model.binding.moved()),
        )


def _announce_conversion(name: str, placements: list[Placement]) -> None:
    converted = [placement for placement in placements if placement.converts]
    if converted:
        before = sorted({str(placement.source.dtype) for placement in converted})
        nbytes = sum(placement.nbytes for placement in converted)
        _log.info(
            "%s: converting %d tensors from %s to %s (%s)",
            name,
            len(converted),
            ", ".join(before),
            converted[0].dtype,
            format_bytes(nbytes),
        )
