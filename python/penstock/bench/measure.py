"""Times of passes, and rates of the link that carries their weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock import _core
from penstock.errors import DeviceError
from penstock.memory.devices import open_device

__all__ = [
    "Times",
    "balanced_prompt",
    "link_rate",
    "synchronize",
    "time_in_turn",
    "time_launches",
    "time_passes",
    "timed",
]

_MOST_PASSES = 400


@dataclass(frozen=True)
class Times:
    """Seconds of the timed passes."""

    median: float
    least: float
    count: int

    @staticmethod
    def of(seconds: list[float]) -> Times:
        """Sum up."""
        return Times(statistics.median(seconds), min(seconds), len(seconds))


def synchronize(device: torch.device) -> None:
    """Wait for all work on the device, on every stream."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the device synchronized around it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def time_passes(
    work: Callable[[], object],
    device: torch.device,
    *,
    passes: int,
    least_seconds: float = 0.0,
    before: Callable[[], object] | None = None,
) -> Times:
    """Time a call over and over.

    Parameters
    ----------
    passes, least_seconds
        Stop when both are reached: so many calls, and so many seconds in all.
    before
        Called before each, untimed.
    """
    taken: list[float] = []
    while len(taken) < passes or (sum(taken) < least_seconds and len(taken) < _MOST_PASSES):
        if before is not None:
            before()
        taken.append(timed(work, device))
    return Times.of(taken)


def time_in_turn(
    first: Callable[[], object],
    second: Callable[[], object],
    device: torch.device,
    *,
    passes: int,
    least_seconds: float,
) -> tuple[Times, Times]:
    """Time two calls in turn, so that whatever drifts in the machine drifts for both."""
    ours: list[float] = []
    theirs: list[float] = []
    while len(ours) < passes or (sum(ours) < least_seconds and len(ours) < _MOST_PASSES):
        ours.append(timed(first, device))
        theirs.append(timed(second, device))
    return Times.of(ours), Times.of(theirs)


def time_launches(
    work: Callable[[], object], device: torch.device, *, passes: int, in_a_row: int = 1
) -> Times:
    """Time only how long the host takes to issue a call.

    Parameters
    ----------
    in_a_row
        Calls to issue while the first of them has not ended, from an idle device on; the seconds
        are of one.
    """
    taken = []
    for _ in range(passes):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            work()
        taken.append((time.perf_counter() - start) / in_a_row)
    synchronize(device)
    return Times.of(taken)


def link_rate(device: torch.device, nbytes: int) -> float | None:
    """Return bytes per second from pinned host memory; None where the core cannot reach it."""
    try:
        core, _ = open_device(device)
        return _core.measure_link_rate(core, nbytes)
    except DeviceError:
        return None


def balanced_prompt(
    seconds_of: Callable[[int], float], target: float, *, start: int = 512, most: int = 32768
) -> int:
    """Find a number of tokens whose pass takes about `target` seconds, in steps of 64.

    Parameters
    ----------
    seconds_of
        Seconds of a pass with so many tokens.
    """
    prompt = start
    for _ in range(5):
        taken = seconds_of(prompt)
        if abs(taken / target - 1) < 0.03:
            break
        scaled = int(prompt * min(8.0, max(0.125, target / taken)))
        following = min(most, max(64, (scaled + 32) // 64 * 64))
        if following == prompt:
            break
        prompt = following
    return prompt
