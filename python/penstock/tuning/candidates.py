"""Which settings are tried, where the user does not say it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from penstock.sizes import parse_bytes

__all__ = ["default_candidates"]

# What a plan leaves open. Whether a choice goes with the device and the model, its own trial says.
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "pager": ("frames", "managed"),
    "host": ("pinned", "mapped", "stream"),
    "page_size": ("2MiB", "8MiB", "32MiB"),
}
_LEAST_PAGES = 4  # of a size that is tried, under a cap


def default_candidates(fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List settings to try: what is chosen without them, and all combinations of those not fixed.

    Parameters
    ----------
    fixed
        Settings that all trials have in common.
    """
    choices = {name: known for name, known in _CHOICES.items() if name not in fixed}
    cap = fixed.get("cap")
    if "page_size" in choices and cap is not None and not str(cap).strip().endswith("%"):
        most = parse_bytes(cap) // _LEAST_PAGES
        choices["page_size"] = tuple(
            size for size in choices["page_size"] if parse_bytes(size) <= most
        )
        if not choices["page_size"]:
            del choices["page_size"]  # all of them are large for this cap
    found: list[dict[str, Any]] = [{}]
    for values in product(*choices.values()):
        candidate = dict(zip(choices, values, strict=True))
        if {**fixed, **candidate}.get("pager") == "managed":  # tiers of the host are for frames
            candidate.pop("host", None)
            if fixed.get("host", "auto") != "auto" or fixed.get("host_budget") is not None:
                continue
        if candidate not in found:
            found.append(candidate)
    return found
