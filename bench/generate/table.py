"""What follows from the figures of text generation: bounds, complaints, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.harness.report import number, percent, rate, size
from penstock.bench.runner import Row
from penstock.bench.table import align, reason_of
from penstock.sizes import format_bytes


def derive(row: Row, rows: list[Row]) -> None:
    """Add what follows: the same tokens or not, and the bound by what cannot stay."""
    if reason_of(row):
        return
    resident = next((each for each in rows if each["case"] == "resident"), None)
    if resident is not None and not reason_of(resident):
        row["same_tokens"] = row["tokens"] == resident["tokens"][: len(row["tokens"])]
        row["compute_seconds"] = resident["seconds"]
    held: Mapping[str, Any] = row["figures"]
    if held and row["link"]:
        row["bound_bytes"] = max(0, held["nbytes"] - held["room"])
        row["bound_seconds"] = row["bound_bytes"] / row["link"]
        row["predicted_seconds"] = held["predicted_seconds"]


def complaints(rows: list[Row]) -> list[str]:
    """Say what Penstock did not keep to."""
    found = []
    for row in rows:
        if not row["case"].startswith("penstock") or "unavailable" in row:
            continue
        if "failed" in row:
            found.append(f"{label(row)} failed: {row['failed']}")
            continue
        if row.get("same_tokens") is False:
            found.append(f"{label(row)}: other tokens")
        if row["figures"]["ledger_peak"] > row["cap"]:
            found.append(f"{label(row)}: the ledger crossed the cap")
        if row["case"] == "penstock-hard-cap" and row["driver_peak_bytes"] > row["cap"]:
            found.append(f"{label(row)}: the driver saw more than the cap")
    return found


def table(rows: list[Row]) -> list[str]:
    cells = [
        [
            *("case", "tokens/s", "s/token", "predicted", "bound", "compute", "GB/token"),
            *("% of link", "% of bound", "ledger peak", "on the device", "pinned", "load s"),
            *("link", "same tokens", "what it is"),
        ]
    ]
    for row in rows:
        if reason_of(row):
            cells.append([label(row), reason_of(row)])
            continue
        seconds, moved, link = row["seconds"], row["moved_bytes"], row["link"]
        bound = row.get("bound_seconds")
        cells.append(
            [
                label(row),
                f"{1 / seconds:.2f}",
                number(seconds),
                number(row.get("predicted_seconds")),
                number(bound),
                number(row.get("compute_seconds")),
                f"{moved / 1e9:.3f}",
                percent(moved / seconds / link if moved and link else None),
                percent(bound / seconds if bound else None),
                size(row["figures"].get("ledger_peak")),
                size(max(row["vram_bytes"], row["vram_loading_bytes"])),
                size(row["pinned_bytes"]),
                f"{row['load_seconds']:.1f}",
                rate(link),
                _same(row),
                row["note"],
            ]
        )
    return align(cells)


LEGEND = (
    "s/token: median of all but the first token. bound: bytes that cannot stay under the cap, at "
    "the rate of the link. compute: all resident. on the",
    "device: the most that the driver counted (cudaMemGetInfo) after the context, keys and values "
    "and activations included. A cap is for weights,",
    "but where the process is capped.",
)


def label(row: Row) -> str:
    """Name a row's case and cap."""
    return f"{row['case']} {format_bytes(row['cap'])}" if row["cap"] else row["case"]


def _same(row: Row) -> str:
    if row["case"] == "resident":
        return "reference"
    same = row.get("same_tokens")
    return "?" if same is None else f"{'yes' if same else 'NO'}, {len(row['tokens'])}"


def outcome(row: Row) -> str:
    if reason_of(row):
        return reason_of(row)
    return f"{1 / row['seconds']:.2f} tokens/s; loaded in {row['load_seconds']:.1f} s"
