"""Text on terminals of any width, and in pipes: nothing is cut, and pipes have no frames around."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

__all__ = ["open_console", "print_table"]

_PIPE_WIDTH = 10_000  # columns: who reads a pipe breaks lines where they like


def open_console(*, stderr: bool) -> Console:
    """Make a console. Names of tensors and texts of users are printed as they are, no markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, markup=False, emoji=False, width=width)


def print_table(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], *, head: bool = True
) -> None:
    """Print rows under headings; one below the other where they are wider than the terminal.

    Parameters
    ----------
    head
        Whether to print the headings over the rows.
    """
    style = box.HEAVY_HEAD if console.is_terminal else None
    table = Table(*headings, show_header=head, box=style, pad_edge=console.is_terminal)
    for row in rows:
        table.add_row(*row)
    unlimited = console.options.update(width=_PIPE_WIDTH)
    if Measurement.get(console, unlimited, table).maximum <= console.width:
        console.print(table)
        return
    for row in rows:
        if head:
            lines = [f"{name}: {value}" for name, value in zip(headings, row, strict=True) if value]
            console.print("\n".join(lines) + "\n", highlight=False)
        else:
            console.print(": ".join(row), highlight=False)
