"""What tuning has found: one row for each trial, the best of them, and a file to keep it in."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.arguments import checked
from penstock.errors import PenstockError

__all__ = ["Trial", "Tuned"]

_FORM = 1  # of the file


@dataclass(frozen=True)
class Trial:
    """One trial: settings, and how passes went with them. Times in seconds, sizes in bytes.

    Parameters
    ----------
    settings
        What was tried, beside what all trials have in common; empty for none of it.
    times
        Of each timed pass; empty if there was none.
    moved_bytes
        Loaded onto the device in a timed pass, on average, by all managers of the trial; None if
        nothing was timed, or no manager was there.
    peak_bytes
        The most that they held under their caps.
    reason
        Why the trial is not among those that the best is chosen from; empty if it is.
    """

    settings: Mapping[str, Any]
    times: tuple[float, ...] = ()
    moved_bytes: int | None = None
    peak_bytes: int | None = None
    reason: str = ""

    @property
    def seconds(self) -> float | None:
        """The median of the timed passes; None if there was none."""
        return statistics.median(self.times) if self.times else None


@checked
@dataclass(frozen=True)
class Tuned:
    """What `penstock.tune` has found.

    It holds for the machine, the model and the cap that it was found with. Elsewhere the settings
    work as well, or are refused; that they are the fastest is then not known.

    Parameters
    ----------
    setup
        What was timed.
    common
        The settings that all trials had, the cap among them.
    device
        The device that they ran on, by its name; empty if no trial had a manager.
    trials
        In the order in which they ran.
    """

    setup: str
    common: Mapping[str, Any]
    device: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The trial with the least median; None if none ran to its end."""
        done = [trial for trial in self.trials if not trial.reason]
        return min(done, key=lambda trial: trial.seconds or 0.0, default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the best trial, for `MemoryManager`, `offload` and the front ends.

        Raises
        ------
        PenstockError
            If no trial ran to its end; with the first one's reason.
        """
        if self.best is None:
            first = f"; the first: {self.trials[0].reason}" if self.trials else ""
            raise PenstockError(
                f"none of {len(self.trials)} trials of {self.setup} ran to its end{first}"
            )
        return {**self.common, **self.best.settings}

    def as_code(self) -> str:
        """Write the manager of the best settings as a line of Python.

        Raises
        ------
        PenstockError
            As `settings`.
        """
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"penstock.MemoryManager({given})"

    def to_json(self) -> dict[str, Any]:
        """Return all of it, and the medians and the best, as JSON has it."""
        found = {"form": _FORM, **asdict(self)}
        for row, trial in zip(found["trials"], self.trials, strict=True):
            row["seconds"] = trial.seconds
        found["best"] = None if self.best is None else self.settings
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load` reads.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        text = json.dumps(self.to_json(), indent=2) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    @staticmethod
    @checked
    def load(path: str | os.PathLike[str]) -> Tuned:
        """Read what `save`, or `penstock tune --json`, has written.

        Raises
        ------
        OSError
            If the file cannot be read.
        PenstockError
            If it is something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["form"] != _FORM:
                raise ValueError(f"its form is {found['form']!r}, not {_FORM}")
            trials = tuple(_trial(**row) for row in found["trials"])
            return Tuned(str(found["setup"]), dict(found["common"]), str(found["device"]), trials)
        except (ValueError, TypeError, KeyError) as error:
            raise PenstockError(
                f"{os.fspath(path)} has nothing that Tuned.save wrote: {type(error).__name__}: "
                f"{error}. Run penstock.tune, and save what it returns"
            ) from error


def _trial(
    *,
    settings: Mapping[str, Any],
    times: list[float],
    moved_bytes: int | None,
    peak_bytes: int | None,
    reason: str,
    seconds: float | None,
) -> Trial:
    """Make a trial of its row in a file."""
    return Trial(dict(settings), tuple(map(float, times)), moved_bytes, peak_bytes, str(reason))
