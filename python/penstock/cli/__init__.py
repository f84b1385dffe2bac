"""The `penstock` command.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage. Only this room prints. May
import all others. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from penstock import _core
from penstock.cli import bench, demo, doctor, inspect, plan, tune
from penstock.cli.output import open_console
from penstock.cli.settings_options import add_settings
from penstock.errors import PenstockError
from penstock.sizes import parse_bytes

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments
        Without the program's name; those of the process if omitted.

    Returns
    -------
    int
        The exit code.
    """
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:  # said by the command itself, with its usage
        options.parser.error(f"unknown arguments: {' '.join(unknown)}")
    console = open_console(stderr=options.json)
    try:
        found = options.run(options, console)
    except (PenstockError, OSError, ValueError) as error:
        if options.json:
            print(json.dumps({"error": str(error), "type": type(error).__name__}))
        else:
            open_console(stderr=True).print(f"penstock: {error}", style="red", highlight=False)
        return 1
    if options.json:
        try:
            print(json.dumps(found, indent=2), flush=True)
        except BrokenPipeError:  # who reads has enough; nor may the end of the process complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if found.get("ok", True) else 1


def _size(text: str) -> int:
    if text.strip().endswith("%"):
        raise argparse.ArgumentTypeError(
            f'{text!r} is a part of a memory, and which is not known here: write a size ("8GiB")'
        )
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstock", description="PyTorch models under a hard memory cap."
    )
    parser.add_argument("--version", action="version", version=f"penstock {_core.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print JSON instead of tables")
        added.set_defaults(parser=added)
        return added

    added = command("doctor", "Say what this machine offers and which pager would be taken.")
    added.set_defaults(run=doctor.run)

    added = command("inspect", "List a checkpoint's tensors and what would fit under a cap.")
    added.add_argument("checkpoint", type=Path, help="a .safetensors file, index or directory")
    added.add_argument("--cap", type=_size, help='bytes, or a size such as "8GiB"')
    added.add_argument("--all", action="store_true", help="list every tensor, not the largest 20")
    added.set_defaults(run=inspect.run)

    added = command("plan", "Say what a model needs and how fast it is under a cap, unloaded.")
    plan.add_options(added, _size)
    added.set_defaults(run=plan.run, refuse=added.error)

    added = command("demo", "Rank sentences with a real model that does not fit under its cap.")
    add_settings(added, _size, cap="64MiB")
    added.add_argument("--query", default=demo.QUERY, help="what to rank the sentences against")
    added.set_defaults(run=demo.run)

    text = "Try the settings that are open, each in a process of its own, and say the fastest."
    added = commands.add_parser("tune", help=text, description=text)
    tune.add_options(added, _size)
    added.set_defaults(run=tune.run, json=False, parser=added)

    text = "Time Penstock beside plain PyTorch and others' offloading, and judge what it promises."
    added = commands.add_parser("bench", help=text, description=text)
    bench.add_options(added, _size)
    added.set_defaults(run=bench.run, json=False, parser=added)
    return parser
