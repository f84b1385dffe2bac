"""What trials set up, in processes of their own: each misbehaves, or not, by its settings."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import penstock

FAST, SLOW, QUITS, KILLED, REFUSED, NO_MEMORY, EXITS = (1 << power for power in range(16, 23))


def behave(page_size: int, **settings: Any) -> Callable[[], object]:
    """Return a pass that takes a time by the page size, or does not end well."""
    print("what setups print is not an answer")
    os.write(1, b"from below Python neither\n")

    def run_pass() -> None:
        time.sleep(0.001 if page_size == FAST else 0.5)

    if page_size == QUITS:
        return lambda: os._exit(3)
    if page_size == KILLED:
        return lambda: os.kill(os.getpid(), signal.SIGKILL)
    if page_size == REFUSED:
        raise penstock.CapExceededError("3 bytes do not fit", requested=3, cap=2, used=0)
    if page_size == NO_MEMORY:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if page_size == EXITS:
        sys.exit("enough")
    return run_pass


def hang(**settings: Any) -> Callable[[], object]:
    time.sleep(1000)
    return lambda: None


def stream(width: int, wanted_cap: str, cap: str, **settings: Any) -> Callable[[], object]:
    """Run linear layers under the cap."""
    assert cap == wanted_cap
    layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))
    model = penstock.offload(layers, cap=cap, **settings)
    x = torch.ones(1, width)

    def run_pass() -> None:
        with torch.no_grad():
            model(x)

    return run_pass


def returns_nothing(**settings: Any) -> None:
    """Forget to return the pass."""


def takes_no_settings(cap: str) -> Callable[[], object]:
    return lambda: None


NO_FUNCTION = 3
