"""Progress bars on standard error: one of bytes with their rate, one of steps with time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

__all__ = ["Progress", "StepProgress", "progress_bar", "step_bar"]

Progress = Callable[[int, int], None]
"""Called now and then with the bytes in place and the bytes in all."""

StepProgress = Callable[[int, str], None]
"""Called before each step with the number of steps that are done, and what this one is."""


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
    if not _shown(show):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Bar(*columns, TransferSpeedColumn(), console=_stderr()) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def step_bar(title: str, total: int, *, show: bool | None) -> Iterator[StepProgress | None]:
    """Show a bar with steps, time gone and time left, while the block runs.

    Parameters
    ----------
    title
        Text before the bar.
    total
        How many steps there are.
    show
        As `progress_bar` has it.

    Yields
    ------
    StepProgress or None
        To be told how far the work is; None if nothing is shown.
    """
    if not _shown(show):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Bar(
        *columns, *times, TextColumn("{task.fields[step]}", markup=False), console=_stderr()
    ) as bar:
        task = bar.add_task(title, total=total, step="")
        yield lambda done, step: bar.update(task, completed=done, step=step)
        bar.update(task, completed=total, step="")


def _shown(show: bool | None) -> bool:
    return sys.stderr.isatty() if show is None else show


def _stderr() -> Console:
    return Console(stderr=True, markup=False)
