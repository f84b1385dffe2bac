"""`penstock.estimate`: puts together what the other modules find out."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from penstock import _core
from penstock.arguments import checked
from penstock.checkpoint import TensorEntry
from penstock.forecast.assumptions import notes_on, settings_of
from penstock.forecast.host import Waiting, find_tiers
from penstock.forecast.parts import Part, open_parts
from penstock.forecast.passes import TRAINING, Pass, Workload, forecast_pass
from penstock.forecast.rates import Rates, find_rates
from penstock.forecast.result import AtCap, Estimate, PartEstimate
from penstock.forecast.sizing import LeastCap, Tiers, charged_tables, find_least_cap, need_under
from penstock.forecast.target import Target, find_target
from penstock.loading.host_tiers import HOST_TIERS, available_host_bytes, pager_with
from penstock.loading.weights import Weights
from penstock.sizes import format_bytes, parse_bytes

__all__ = ["estimate", "least_cap"]

_BESIDE = 3  # times the weights: gradients, and the two states of AdamW
_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of all weights, for the table


@checked
def estimate(
    weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | Weights,
    module: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    cap: int | str | None = None,
    caps: Sequence[int | str] = (),
    tokens: int = 1,
    batch: int = 1,
    training: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | _core.Device = "auto",
    pager: str = "auto",
    host: str = "auto",
    host_budget: int | str | None = None,
    page_size: int | str | None = None,
    link: float | str | None = None,
    disk: float | str | None = None,
    compute: float | str | None = None,
    memory: float | str | None = None,
) -> Estimate:
    """Say what a model will need and how fast it will be, without reading its weights.

    The layout of the pages, the planner and the choice of the host tier are those that run. What is
    not known is taken to be worse: without the module, the least cap is for tensors in any order.

    Parameters
    ----------
    weights
        What `MemoryManager.register` takes, or the directory of a pipeline of diffusers.
    module
        The module, or what builds it, as for `register`: then places are exact. None where only
        names and sizes are known; never for a pipeline.
    cap
        What the figures are for; None for the least one that works.
    caps
        Those of the table; some between the least and all weights if there are none.
    tokens, batch
        Of one pass: so many in each of so many sequences.
    training
        None for forward passes; `"frozen"` where a backward pass follows each that updates no paged
        weights, as with adapters; `"all"` where AdamW updates all of them.
    dtype, device, pager, host, host_budget, page_size
        As `register` and `MemoryManager` have them. With a `link`, a GPU need not be here.
    link, disk, compute, memory
        Rates of the link, the disk, and of the device's products and its own memory, such as
        `"25GB/s"` or `"400TFLOPS"`; measured here if omitted. The speed of a GPU is measured only
        where the process uses CUDA already.

    Returns
    -------
    Estimate
        Sizes in bytes, times in seconds. `fits` is false where it would be refused.

    Raises
    ------
    CheckpointError, ModelError
        If the weights cannot be read, or do not fit the module.
    CapExceededError
        If the host tier needs more than `host_budget`.
    DeviceError
        If the device is not here, and no link is given.
    ValueError
        If a setting, a size or a rate is none.
    """
    for name, count in (("tokens", tokens), ("batch", batch)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} is a whole number above 0, not {count!r}")
    if training not in TRAINING:
        raise ValueError(f'training is "all", "frozen" or None, not {training!r}')
    if host not in HOST_TIERS:
        raise ValueError(f"host tier {host!r} is not known; use one of {', '.join(HOST_TIERS)}")
    budget = None if host_budget is None else parse_bytes(host_budget)
    kind = pager_with(pager, host, host_budget)
    target = find_target(device, kind, page_size, link_is_given=link is not None)
    asked = None if cap is None else target.cap_in_bytes(cap)
    wanted = [target.cap_in_bytes(each) for each in caps]
    parts = open_parts(weights, module, dtype)
    tiers = _tiers_of(parts, target, host, budget)
    rates = find_rates(
        target,
        _files(parts),
        _main_dtype(parts),
        link=link,
        disk=disk,
        compute=compute,
        memory=memory,
    )
    least = find_least_cap(parts, target, tiers)
    forecast = _Forecast(parts, target, tiers, rates, Workload(tokens * batch, training))
    at = forecast.at(asked if asked is not None else least.nbytes)
    waiting = tiers(at.page_size)
    rows = wanted or _some_caps(parts, least.nbytes, forecast.whole_cap())
    read = sum(each.read for each in waiting)
    return Estimate(
        nbytes=forecast.nbytes,
        least_cap=least.nbytes,
        least_cap_by=least.needed_by,
        at=at,
        least_cap_indexed=_least_cap_indexed(parts, target, tiers),
        problem=_problem(
            forecast, at, least, waiting, writes=training == "all", here=target.core is not None
        ),
        host=sum(each.host for each in waiting),
        pinned=sum(each.pinned for each in waiting),
        spill=sum(each.spill for each in waiting),
        load_seconds=0.0 if read == 0 else read / rates.disk if rates.disk else None,
        caps=tuple(forecast.at(each) for each in sorted({*rows, *([asked] if asked else [])})),
        tokens=tokens * batch,
        training=training,
        beside=_BESIDE * forecast.nbytes if training == "all" else 0,
        device=target.device,
        pager=target.pager,
        link=rates.link,
        disk=rates.disk,
        compute=rates.compute,
        memory=rates.memory,
        settings=settings_of(parts, target, waiting, at, device, pager, page_size),
        notes=notes_on(parts, target, rates, at, training),
    )


def least_cap(weights: str | os.PathLike[str], cap: int | None = None) -> tuple[LeastCap, bool]:
    """Find the least cap for a checkpoint on the device that is here, measuring nothing.

    Parameters
    ----------
    cap
        Another cap, in bytes, to judge as well.

    Returns
    -------
    tuple
        The least cap from which on every one works, and whether the other one does.
    """
    target = find_target("auto", "auto", None, link_is_given=False)
    parts = open_parts(weights, None, None)
    tiers = _tiers_of(parts, target, "auto", None)
    least = find_least_cap(parts, target, tiers)
    works = cap is not None and need_under(cap, parts, target, tiers).nbytes <= cap
    return least, works


class _Forecast:
    """Passes of all parts, by the cap."""

    def __init__(
        self,
        parts: Sequence[Part],
        target: Target,
        tiers: Tiers,
        rates: Rates,
        workload: Workload,
    ) -> None:
        self._parts = parts
        self._target = target
        self._tiers = tiers
        self._rates = rates
        self._workload = workload
        self.nbytes = sum(part.nbytes for part in parts)

    def need(self, cap: int) -> LeastCap:
        """Return what is needed with the pages of a cap."""
        return need_under(cap, self._parts, self._target, self._tiers)

    def at(self, cap: int) -> AtCap:
        """Forecast a pass of each part."""
        page_size = self._target.page_size(cap)
        waiting = self._tiers(page_size)
        tables = charged_tables(self._target, waiting)
        if self.need(cap).nbytes > cap:
            none = tuple(PartEstimate(p.name, p.nbytes, 0, 0, None, "link") for p in self._parts)
            return AtCap(cap, False, 0, 0, None, "link", page_size, 0, none)
        passes = [
            forecast_pass(
                part,
                wait,
                self._target,
                self._rates,
                cap=cap,
                tables=tables,
                workload=self._workload,
            )
            for part, wait in zip(self._parts, waiting, strict=True)
        ]
        together = sum(part.laid(page_size).page_count for part in self._parts) * page_size
        residents = [each.resident for each in passes]
        longest: Pass | None = max(passes, key=lambda each: each.seconds or 0.0, default=None)
        known = [each.seconds for each in passes if each.seconds is not None]
        return AtCap(
            cap,
            True,
            sum(residents) if together + tables <= cap else max(residents, default=0),
            sum(each.streamed for each in passes),
            sum(known) if len(known) == len(passes) else None,
            longest.bound if longest is not None else "compute",
            page_size,
            max((each.ring for each in passes), default=0),
            tuple(
                PartEstimate(
                    part.name, part.nbytes, each.resident, each.streamed, each.seconds, each.bound
                )
                for part, each in zip(self._parts, passes, strict=True)
            ),
        )

    def whole_cap(self) -> int:
        """Return a cap under which all of each part stays, and hardly a larger one than needed."""
        cap = 1
        for _, page_size in self._target.page_sizes:
            laid = [part.laid(page_size) for part in self._parts]
            tables = charged_tables(self._target, self._tiers(page_size))
            cap = max((each.page_count for each in laid), default=0) * page_size + tables
            if self._target.page_size(max(cap, 1)) == page_size:
                break
        return max(cap, 1)


def _tiers_of(parts: Sequence[Part], target: Target, host: str, budget: int | None) -> Tiers:
    @cache
    def tiers(page_size: int) -> Sequence[Waiting]:
        return find_tiers(parts, target, page_size, host=host, budget=budget)

    return tiers


def _some_caps(parts: Sequence[Part], least: int, whole: int) -> list[int]:
    """Choose the caps of the table: the least one, parts of all weights, and all of them."""
    largest = max((part.nbytes for part in parts), default=0)
    between = [int(largest * share) for share in _SHARES]
    return [least, *(cap for cap in between if least < cap < whole), max(least, whole)]


def _files(parts: Sequence[Part]) -> list[Path]:
    files: dict[Path, int] = {}
    for part in parts:
        for placement in part.placements:
            where = placement.source.where
            for extent in where if isinstance(where, tuple) else ():
                assert isinstance(extent, TensorEntry)
                files[extent.path] = files.get(extent.path, 0) + extent.nbytes
    return sorted(files, key=lambda path: -files[path])


def _main_dtype(parts: Sequence[Part]) -> torch.dtype:
    """Return the dtype that most bytes have."""
    sizes: Counter[torch.dtype] = Counter()
    for part in parts:
        for placement in part.placements:
            sizes[placement.dtype] += placement.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _least_cap_indexed(parts: Sequence[Part], target: Target, tiers: Tiers) -> int | None:
    if not any(part.has_experts for part in parts):
        return None
    return find_least_cap([p.with_experts_indexed() for p in parts], target, tiers).nbytes


def _problem(
    forecast: _Forecast,
    at: AtCap,
    least: LeastCap,
    waiting: Sequence[Waiting],
    *,
    writes: bool,
    here: bool,
) -> str:
    """Say why it does not run; empty where it does.

    Parameters
    ----------
    writes
        Whether weights are written to.
    here
        Whether it is this machine that it is to run on.
    """
    if not at.fits:
        need = forecast.need(at.cap)
        if need.needed + need.tables <= at.cap:
            return (
                f"no page of {format_bytes(at.page_size)} fits under it: make pages smaller, or "
                f"raise the cap to {format_bytes(least.nbytes)}"
            )
        return (
            f"{need.needed_by} needs {format_bytes(need.needed)} at once, in whole pages"
            + (f", beside {format_bytes(need.tables)} of page tables" if need.tables else "")
            + f": raise the cap to {format_bytes(least.nbytes)} ({least.nbytes} bytes)"
        )
    pinned, free = sum(each.host for each in waiting), available_host_bytes()
    is_tight = pinned > free and here
    if is_tight and any(each.tier == "pinned" for each in waiting):
        return (
            f'host="pinned" takes {format_bytes(pinned)} of host memory, and {format_bytes(free)} '
            'are free: use host="auto", or "stream"'
        )
    if writes and any(each.tier in ("stream", "mapped") for each in waiting):
        return (
            'weights that are trained are written to, which needs host="pinned" '
            f"({format_bytes(forecast.nbytes)} of host memory)"
        )
    spill = sum(each.spill for each in waiting)
    if spill and spill > (room := shutil.disk_usage(_core.spill_directory()).free):
        return (
            f"the spill file takes {format_bytes(spill)}, and {_core.spill_directory()} has "
            f"{format_bytes(room)}: set PENSTOCK_SPILL_DIR to a larger disk"
        )
    return ""
