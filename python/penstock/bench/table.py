"""The rows as one aligned table of plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.bench.runner import Row
from penstock.sizes import format_bytes

__all__ = ["LEGEND", "align", "reason_of", "table"]

Column = tuple[str, Callable[[Row], str]]


def table(rows: Sequence[Row]) -> list[str]:
    """Write the rows as lines; a row without figures says why instead."""
    header = [title for title, _ in _COLUMNS]
    cells: list[list[str]] = [header]
    for row in rows:
        reason = reason_of(row)
        if reason:
            cells.append([row["case"], reason])
        else:
            cells.append([cell(row) for _, cell in _COLUMNS])
    return align(cells)


def reason_of(row: Row) -> str:
    """Say why a row has no figures; nothing if it has."""
    if "unavailable" in row:
        return f"not available: {_one_line(row['unavailable'])}"
    if "failed" in row:
        return f"failed: {_one_line(row['failed'])}"
    return ""


def align(cells: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells to columns: the first and the last to the left, those between to the right.

    A row with fewer cells than the first takes no part in the widths from its last cell on.
    """
    count = len(cells[0])
    full = [row for row in cells if len(row) == count]
    widths = [max(len(row[i]) for row in full) for i in range(count)]
    widths[0] = max(len(row[0]) for row in cells)
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [
            cell if i == len(row) - 1 else cell.rjust(widths[i])
            for i, cell in enumerate(row)
            if i > 0
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."


def _rate(nbytes: float, seconds: float) -> str:
    return f"{nbytes / seconds / 1e9:.2f}" if nbytes and seconds else "-"


def _size(row: Row, key: str) -> str:
    value = row.get(key)
    return "?" if value is None else format_bytes(value).replace(" bytes", " B")


def _of_link(row: Row) -> str:
    if not row["moved_bytes"] or not row.get("link"):
        return "-"
    return f"{100 * row['moved_bytes'] / row['seconds'] / row['link']:.1f}"


def _vram(row: Row) -> str:
    return _size(row, "vram_bytes") if row["options"]["device"] != "cpu" else "-"


def _same(row: Row) -> str:
    if row["options"]["writes"] == row["options"]["reference"]:
        return "reference"
    if row["bit_identical"] is None:
        return "?"
    return "yes" if row["bit_identical"] else f"NO, {row['relative_error']:.1e}"


_COLUMNS: Sequence[Column] = (
    ("case", lambda row: row["case"]),
    ("tokens", lambda row: str(row["prompt"])),
    ("s/pass", lambda row: f"{row['seconds']:.5f}"),
    ("GB moved", lambda row: f"{row['moved_bytes'] / 1e9:.3f}"),
    ("GB/s", lambda row: _rate(row["moved_bytes"], row["seconds"])),
    ("% of link", _of_link),
    ("link", lambda row: f"{row['link'] / 1e9:.1f}" if row.get("link") else "?"),
    ("VRAM", _vram),
    ("pinned", lambda row: _size(row, "pinned_bytes")),
    ("RSS peak", lambda row: _size(row, "host_peak_bytes")),
    ("own host", lambda row: _size(row, "host_own_bytes")),
    ("load s", lambda row: f"{row['load_seconds']:.2f}"),
    ("load GB/s", lambda row: _rate(row["weight_bytes"], row["load_seconds"])),
    ("same bits", _same),
    ("what it is", lambda row: row["note"]),
)

LEGEND = (
    "s/pass: median, the device synchronized around each pass. GB moved: weights that a pass moves "
    "to the device. link: one pinned copy,",
    "GB/s, measured in the same process before and after. VRAM: the most that the driver counted "
    "(cudaMemGetInfo) beyond context, kernels and",
    "workspace. pinned: as the library itself counts it. RSS peak: with page cache that is mapped. "
    "own host: private and shared memory without",
    "page cache, beyond what the process had before loading.",
)
