"""Figures as text, and as a file that is complete at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.sizes import format_bytes


def say(*lines: str) -> None:
    """Print lines at once: what ends a run leaves what was said."""
    for line in lines:
        print(line, flush=True)


def write_json(found: Mapping[str, Any], file: Path | None) -> None:
    """Write what was found so far, where it is wanted."""
    if file is not None:
        file.write_text(json.dumps(found, indent=2, default=str) + "\n")


def number(value: float | None) -> str:
    """Write seconds."""
    return "-" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """Write a share."""
    return "-" if value is None else f"{100 * value:.1f}"


def size(value: int | None) -> str:
    """Write bytes; nothing is a dash."""
    return "-" if not value else format_bytes(value)


def rate(value: float | None) -> str:
    """Write bytes per second."""
    return "?" if value is None else f"{value / 1e9:.1f}"
