"""Packages that only some commands need: importing them, or saying how to get them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from penstock.errors import PenstockError

__all__ = ["require_transformers"]


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
    try:
        transformers, *rest = (import_module(name) for name in ("transformers", *others))
    except ImportError as error:
        raise PenstockError(
            f"{what} needs the package {error.name}: pip install 'penstock[{extra}]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers, *rest
