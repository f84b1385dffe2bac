"""What holds for all Python tests."""

from __future__ import annotations

import pytest
import torch

import penstock.memory.link_rate


@pytest.fixture(scope="session", autouse=True)
def small_link_sample() -> None:
    """Measure the link with little: each manager does it once, and there are thousands here."""
    penstock.memory.link_rate._SAMPLE = 1 << 20


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Let torch compute in one thread: small operations gain nothing from more."""
    torch.set_num_threads(1)
