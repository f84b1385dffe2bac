"""A progress bar with bytes and rate, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "progress_bar"]

Progress = Callable[[int, int], None]
"""Called now and then with the bytes in place and the bytes in all."""


@contextmanager
def progress_bar(title: str, *, show: bool | None) -> Iterator[Progress | None]:
    """Show a bar while the block runs.

    Parameters
    ----------
    title
        Text before the bar.
    show
        Whether to; None for: if standard error is a terminal.

    Yields
    ------
    Progress or None
        To be told how far the work is; None if nothing is shown.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Bar(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
