"""The settings of a manager as options of a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from penstock.loading.host_tiers import HOST_TIERS
from penstock.manager.settings import Options
from penstock.sizes import parse_cap

__all__ = ["add_settings", "cap_text", "settings_of"]


def add_settings(
    parser: argparse.ArgumentParser,
    size: Callable[[str], int],
    *,
    cap: str | None = None,
    no_cap: str = "",
) -> None:
    """Add options for what people choose on a command line.

    Parameters
    ----------
    size
        Reads sizes.
    cap, no_cap
        The default; where there is none, what holds instead.
    """
    add = parser.add_argument
    default = cap or no_cap
    add("--cap", type=cap_text, default=cap, help=f'such as "8GiB" or "60%%"; default: {default}')
    add("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    add("--pager", choices=("auto", "frames", "managed"), default="auto")
    add("--host", choices=HOST_TIERS, default="auto", help="where weights wait, with frames")
    add("--host-budget", type=size, help="host memory that the model may take")
    add("--page-size", type=size, help="of a page")
    add("--keep-cached", action="store_true", help="leave checkpoints in the page cache")
    add("--verify", action="store_true", help="compare every load with its source; slow")


def settings_of(options: argparse.Namespace) -> Options:
    """Return what was chosen, for `MemoryManager`."""
    return {
        "cap": options.cap,
        "device": options.device,
        "pager": options.pager,
        "host": options.host,
        "host_budget": options.host_budget,
        "page_size": options.page_size,
        "keep_cached": options.keep_cached,
        "verify": options.verify,
    }


def cap_text(text: str) -> str:
    """Refuse what is no cap on any device."""
    try:
        parse_cap(text, 1 << 40)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
