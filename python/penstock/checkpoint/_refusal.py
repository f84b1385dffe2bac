"""How a broken rule becomes a `CheckpointError`.

The rules look at values and do not know which file these came from. A broken rule raises
`Refusal`; the function that opened the file adds the file's name to it, in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.errors import CheckpointError

__all__ = ["DAMAGED", "Refusal", "naming", "shorten"]

DAMAGED = "the file is damaged or was not written as safetensors: download or save it again"
_LONGEST_QUOTE = 120


class Refusal(Exception):
    """A rule that a file breaks.

    Parameters
    ----------
    problem
        The rule and the numbers that break it.
    remedy
        What the user can do.
    tensor
        Name of the tensor at fault, if there is one.
    offset
        Byte in the file at which the fault lies, if known.
    """

    def __init__(
        self,
        problem: str,
        remedy: str = DAMAGED,
        *,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy
        self.tensor = tensor
        self.offset = offset


def shorten(value: object) -> str:
    """Describe a JSON value in few words: scalars and flat lists of them by value, cut short."""
    if isinstance(value, str):
        quoted = repr(value[:_LONGEST_QUOTE])
    elif not isinstance(value, (list, tuple)):
        quoted = repr(value)
    elif any(isinstance(item, (list, tuple)) for item in value):
        return f"a nested value of {len(value)} items"
    else:
        quoted = repr(list(value[:_LONGEST_QUOTE]))
    return quoted if len(quoted) <= _LONGEST_QUOTE else f"{quoted[:_LONGEST_QUOTE]}..."


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn each `Refusal` and each system error inside into a `CheckpointError` about `path`."""
    try:
        yield
    except Refusal as refusal:
        tensor = "" if refusal.tensor is None else f"tensor {shorten(refusal.tensor)}: "
        raise CheckpointError(
            f"{path}: {tensor}{refusal.problem}; {refusal.remedy}",
            path=path,
            tensor=refusal.tensor,
            offset=refusal.offset,
        ) from refusal.__cause__
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror} (errno {error.errno}); "
            "check the path and its permissions",
            path=path,
        ) from error
