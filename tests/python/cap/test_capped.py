"""A cap for a part of a program: what can be said without a GPU."""

from __future__ import annotations

import pytest
import torch

import penstock
from penstock import DeviceError, _core
from penstock.cap.hard_cap import HardCap


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_scoped_cap_needs_a_gpu() -> None:
    for device in ("cuda", "cpu"):
        with pytest.raises(DeviceError, match="capped"), penstock.capped("1GiB", device=device):
            pass


def test_scoped_cap_is_not_for_under_a_hard_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    cap = HardCap("1MiB", device=_core.HostDevice(), page_size=1 << 16)
    monkeypatch.setattr("penstock.cap.process.current_cap", lambda _: cap)
    with pytest.raises(ValueError, match="whole process"), penstock.capped("1GiB"):
        pass
