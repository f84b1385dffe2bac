"""What the processes of cases share: how they measure, and what they ask a manager."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch

import penstock
from penstock.bench import memory
from penstock.bench.measure import link_rate, synchronize
from penstock.bench.subject import UnavailableError
from penstock.manager.manager import MemoryManager

_WATCH_SECONDS = 0.02


class CaseOptions(Protocol):
    """What the options of a case have in common."""

    @property
    def device(self) -> str:
        """Where the case runs."""

    @property
    def cap(self) -> int:
        """Bytes that Penstock may hold."""

    @property
    def link_bytes(self) -> int:
        """Bytes of the copies by which the link is measured."""


class CaseSubject(Protocol):
    """What a case has loaded."""

    @property
    def note(self) -> str:
        """What it is."""

    @property
    def link(self) -> float | None:
        """Bytes per second, where it may not be measured by who does not know the cap."""

    @property
    def pinned(self) -> Callable[[], int | None]:
        """Returns the bytes of pinned host memory."""


S = TypeVar("S", bound=CaseSubject)


def measure_case(
    name: str,
    options: CaseOptions,
    load: Callable[[ExitStack], S],
    run: Callable[[S], dict[str, Any]],
    run_watched: Callable[[S], dict[str, Any]],
) -> dict[str, Any]:
    """Load a case's subject and run it; then once more, while memory is watched.

    Looking costs time, so what is timed is not watched.

    Parameters
    ----------
    load
        Its subject goes with the stack.
    run, run_watched
        Return figures to be kept.
    """
    device = torch.device(options.device)
    if name == "penstock-hard-cap":
        if device.type != "cuda":
            raise UnavailableError("a hard cap needs a GPU")
        penstock.set_cap(options.cap, device=options.device)
    figures: dict[str, Any] = {}
    with torch.no_grad(), ExitStack() as stack:
        warm_device(device)
        baseline = memory.Baseline.take(device)
        figures["driver_before_bytes"] = baseline.device_bytes
        with memory.Watch(device, _WATCH_SECONDS) as loading:
            start = time.perf_counter()
            subject = load(stack)
            synchronize(device)
            figures["load_seconds"] = time.perf_counter() - start
        figures["note"] = subject.note
        link = subject.link or link_rate(device, options.link_bytes)
        figures |= run(subject)
        with memory.Watch(device, _WATCH_SECONDS) as running:
            figures |= run_watched(subject)
        after = link if subject.link else link_rate(device, options.link_bytes)
        figures["link"] = (link + after) / 2 if link and after else None
        figures |= baseline.figures(loading, running)
        figures["driver_peak_bytes"] = max(loading.device_bytes, running.device_bytes)
        figures["pinned_bytes"] = subject.pinned()
    return figures


def figures_of(manager: MemoryManager, name: str) -> dict[str, Any]:
    """Return what a manager says of one of its models, and of the room that it has."""
    stats = manager.stats()
    memory = stats.models[name].memory
    return {
        **asdict(memory),
        "nbytes": stats.models[name].nbytes,
        "room": max(0, stats.cap - (stats.used - memory.resident_bytes)),
        "ledger_peak": stats.peak,
        "used_by_tag": dict(stats.used_by_tag),
        "suppressed_errors": stats.suppressed_errors,
    }


def warm_device(device: torch.device) -> None:
    """Make the context and cuBLAS's workspace, which are nobody's."""
    x = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    torch.nn.functional.linear(x, x)
    del x
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
