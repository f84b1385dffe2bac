"""What a case brings to be measured: a model that is ready to run, however it holds its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from penstock.bench.memory import torch_pinned_bytes
from penstock.bench.options import CaseOptions

__all__ = ["Loader", "Subject", "UnavailableError", "logits_of"]


class UnavailableError(Exception):
    """A case cannot be run here; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A model that is ready to run.

    Parameters
    ----------
    run
        One pass: token ids in, logits out.
    bytes_per_pass
        Weights that one pass moves to the device; None where `figures` counts them.
    pinned
        Returns the bytes of pinned host memory that it holds; None where it does not know.
    note
        What a reader of the table has to know.
    launch
        Issues one pass without waiting for it, where the host's time for that is of interest.
    figures
        Counts of its own, so far. `loaded_bytes` is what has been moved to the device.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    bytes_per_pass: int | None
    pinned: Callable[[], int | None] = torch_pinned_bytes
    note: str = ""
    launch: Callable[[], object] | None = None
    figures: Callable[[], Mapping[str, Any]] = field(default=dict)


Loader = Callable[[CaseOptions, torch.Tensor, ExitStack], Subject]
"""Loads a subject. What has to be undone at the end goes onto the stack."""


def logits_of(output: Any) -> torch.Tensor:  # noqa: ANN401
    """Return the logits of a model's output, whatever form it has."""
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits
