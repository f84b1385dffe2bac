"""What a manager is made with: one set of settings for every front door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch

from penstock import _core
from penstock.cap import process
from penstock.loading.host_tiers import HOST_TIERS, pager_with
from penstock.memory.pager import Pager
from penstock.policy import Policy
from penstock.sizes import format_bytes, parse_bytes

__all__ = ["Options", "OptionsBesideCap", "Settings", "split_options"]


class OptionsBesideCap(TypedDict, total=False):
    """The settings, as keywords of who has `cap` as an argument of its own."""

    device: str | torch.device | _core.Device
    pager: str
    host: str
    host_budget: int | str | None
    page_size: int | str | None
    keep_cached: bool
    trace: bool
    verify: bool
    progress: bool | None
    policy: Policy | None


class Options(OptionsBesideCap, total=False):
    """The settings, as keywords."""

    cap: int | str | None


@dataclass(frozen=True)
class Settings:
    """The settings of a `MemoryManager`, which explains them.

    Raises
    ------
    ValueError
        If one is not known, or a size is none.
    """

    cap: int | str | None = None
    device: str | torch.device | _core.Device = "auto"
    pager: str = "auto"
    host: str = "auto"
    host_budget: int | str | None = None
    page_size: int | str | None = None
    keep_cached: bool = False
    trace: bool = False
    verify: bool = False
    progress: bool | None = None
    policy: Policy | None = None

    def __post_init__(self) -> None:
        if self.host not in HOST_TIERS:
            known = ", ".join(HOST_TIERS)
            raise ValueError(f"host tier {self.host!r} is not known; use one of {known}")
        _ = self.host_budget_bytes, self.pager_kind

    @property
    def host_budget_bytes(self) -> int | None:
        """Bytes of host memory that one model may take; None for what is free."""
        return None if self.host_budget is None else parse_bytes(self.host_budget)

    @property
    def pager_kind(self) -> str:
        """The pager that is asked for; frames where something is said of the host."""
        return pager_with(self.pager, self.host, self.host_budget)

    def open_pager(self) -> Pager:
        """Make a pager, or share that of the hard cap.

        Raises
        ------
        ValueError
            If there is no cap, or two, or the pager does not go with a hard cap.
        DeviceError
            If the device is not there or cannot page.
        """
        hard_cap = process.current_cap(self.device)
        if hard_cap is None:
            if self.cap is None:
                raise ValueError("give a cap, or set one for the process first: penstock.set_cap")
            return Pager(
                cap=self.cap, device=self.device, kind=self.pager_kind, page_size=self.page_size
            )
        if self.cap is not None:
            raise ValueError(
                f"the process has a hard cap of {format_bytes(hard_cap.pager.cap)} already, which "
                "all managers share: leave the cap out"
            )
        if self.pager == "managed":
            raise ValueError(
                "managed memory is not held by a hard cap: the driver keeps evicted pages on the "
                'device until somebody needs them. Use pager="frames"'
            )
        return Pager(cap=hard_cap.pager, kind="frames", page_size=self.page_size)


def split_options(given: Mapping[str, Any]) -> tuple[OptionsBesideCap, dict[str, Any]]:
    """Part keywords into settings and others, for who takes both."""
    known = OptionsBesideCap.__annotations__
    settings = {name: value for name, value in given.items() if name in known}
    others = {name: value for name, value in given.items() if name not in known}
    return cast(OptionsBesideCap, settings), others
