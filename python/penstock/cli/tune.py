"""`penstock tune`: which settings run a model, or a script's function, fastest here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from penstock.cli.output import print_table
from penstock.cli.settings_options import add_settings, settings_of
from penstock.errors import PenstockError
from penstock.manager.settings import OptionsBesideCap
from penstock.optional_packages import require_transformers
from penstock.sizes import format_bytes
from penstock.tuning.tune import tune
from penstock.tuning.tuned import Trial, Tuned

__all__ = ["add_options", "run"]

_FORWARD_PASSES = "penstock.integrations.transformers_passes:forward_passes"
_UNCHOSEN = (None, "auto", False)


def add_options(parser: argparse.ArgumentParser, size: Callable[[str], int]) -> None:
    """Add the command's options; `size` reads sizes."""
    add = parser.add_argument
    add(
        "target",
        metavar="DIRECTORY_OR_FUNCTION",
        help='a directory of transformers, or "script.py:function" or "module:function": a '
        "function that takes the settings by keyword and returns one that runs a pass",
    )
    add_settings(parser, size, no_cap="as the function sets it; a directory needs one")
    add("--tokens", type=_number(int, 1), help="of a directory's pass; default: 16")
    add("--passes", type=_number(int, 3), default=5, help="to time in each trial; default: 5")
    add(
        "--slower",
        type=_number(float, 1),
        default=1.3,
        help="end a trial that takes so many times as long as the best; default: 1.3",
    )
    add(
        "--pause",
        type=_number(float, 0),
        default=1.0,
        help="seconds between two trials; default: 1",
    )
    add(
        "--time-limit",
        type=_number(float, 1),
        default=600.0,
        help="seconds for a trial; default: 600",
    )
    add(
        "--json",
        dest="json_file",
        type=Path,
        metavar="FILE",
        help="write the result there, after each trial; penstock.Tuned.load reads it",
    )


def _number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """Make what reads a number of at least so much."""

    def read(text: str) -> float:
        number = kind(text)
        if not least <= number < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {least:g} or more")
        return number

    read.__name__ = kind.__name__  # for what argparse says of a text that is none
    return read


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Try the settings that are not chosen, print a table and the best, and return all of it.

    `ok` is false if no trial ran to its end: then the exit code is 1.
    """
    setup, arguments = _target(options)
    chosen = {name: value for name, value in settings_of(options).items() if value not in _UNCHOSEN}
    if options.json_file is not None:
        options.json_file.touch()  # rather now than after the first trial
    result = tune(
        setup,
        cast("str | None", chosen.pop("cap", None)),
        arguments=arguments,
        passes=options.passes,
        slower=options.slower,
        pause=options.pause,
        time_limit=options.time_limit,
        tell=None if options.json_file is None else lambda so_far: so_far.save(options.json_file),
        **cast(OptionsBesideCap, chosen),
    )
    _print(result, options.json_file, console)
    return {**result.to_json(), "ok": result.best is not None}


def _target(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the function to time, and what it is given besides."""
    directory = Path(options.target)
    if not directory.is_dir() and ":" in options.target:
        if options.tokens is not None:
            options.parser.error("--tokens is for a directory: a function knows its own pass")
        return options.target, {}
    if options.cap is None:
        options.parser.error("--cap is needed for a directory")
    if not (directory / "config.json").is_file():
        raise PenstockError(
            f"{directory} is no directory of transformers (it has no config.json), and no "
            'function: for anything else, write one, and pass "script.py:function"'
        )
    require_transformers("the model", "transformers")
    return _FORWARD_PASSES, {"directory": str(directory), "tokens": options.tokens or 16}


def _print(result: Tuned, file: Path | None, console: Console) -> None:
    columns = tuple(dict.fromkeys(name for trial in result.trials for name in trial.settings))
    heads = (*columns, "s/pass", "GB/pass", "peak", "note")
    print_table(console, heads, [_row(trial, columns, result.best) for trial in result.trials])

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if result.best is None:
        say(f"none of {len(result.trials)} trials ran to its end")
        return
    say(f"on {result.device or 'a device that no manager told'}, the fastest:")
    say(result.as_code())
    if file is not None:
        say(f'saved: penstock.MemoryManager(**penstock.Tuned.load("{file}").settings)')


def _row(trial: Trial, columns: tuple[str, ...], best: Trial | None) -> list[str]:
    seconds, moved, peak = trial.seconds, trial.moved_bytes, trial.peak_bytes
    return [
        *(str(trial.settings.get(name, "-")) for name in columns),
        "-" if seconds is None else f"{seconds:.4g}",
        "-" if moved is None else f"{moved / 1e9:.3g}",
        "-" if peak is None else format_bytes(peak),
        "the best" if trial is best else trial.reason,
    ]
