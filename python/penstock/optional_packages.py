"""Packages that only some commands need: importing them, or saying how to get them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from penstock.errors import PenstockError

__all__ = ["require", "require_transformers"]


def require(what: str, extra: str, *names: str) -> tuple[Any, ...]:
    """Import modules that an extra of this package brings.

    Parameters
    ----------
    what
        What needs them, for the message.
    extra
        The extra.
    names
        Of the modules.

    Raises
    ------
    PenstockError
        If one of them is not installed.
    """
    try:
        return tuple(import_module(name) for name in names)
    except ImportError as error:
        raise PenstockError(
            f"{what} needs the package {error.name}: pip install {error.name}, or in a checkout of "
            f"Penstock: pip install '.[{extra}]'"
        ) from None


def require_transformers(what: str, extra: str, *others: str) -> tuple[Any, ...]:
    """Import transformers, and keep quiet what it logs.

    Parameters
    ----------
    what
        What needs it, for the message.
    extra
        The extra of this package that brings it.
    others
        Modules that are needed beside it.

    Returns
    -------
    tuple
        transformers, and the others.

    Raises
    ------
    PenstockError
        If one of them is not installed.
    """
    transformers, *rest = require(what, extra, "transformers", *others)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers, *rest
