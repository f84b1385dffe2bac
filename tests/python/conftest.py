"""What holds for all Python tests."""

from __future__ import annotations

import pytest

import penstock.pager


@pytest.fixture(scope="session", autouse=True)
def small_link_sample() -> None:
    """Measure the link with little: each manager does it once, and there are thousands here."""
    penstock.pager._LINK_SAMPLE = 1 << 20
