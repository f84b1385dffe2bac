"""Whether logits are those of the reference, bit by bit; and how far off they are if not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["compare", "save_reference"]


def save_reference(logits: torch.Tensor, file: Path) -> None:
    """Keep logits for other cases to be compared with."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"logits": logits.detach().cpu().contiguous()}, file)


def compare(logits: torch.Tensor, file: Path) -> dict[str, Any]:
    """Compare logits with those in a file.

    Returns
    -------
    dict
        `bit_identical`, and `relative_error`: the largest difference over the largest value. Both
        None, and `no_reference` says why, where there is nothing to compare with.
    """
    if not file.is_file():
        return {
            "bit_identical": None,
            "relative_error": None,
            "no_reference": f"no case wrote {file.stem} logits",
        }
    wanted = load_file(file)["logits"]
    found = logits.detach().cpu().contiguous()
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return {"bit_identical": False, "relative_error": float("inf")}
    same = torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    # In place and in the dtype at hand: the logits of a long prompt are large.
    largest = wanted.abs().max().float().item()
    error = found.sub_(wanted).abs_().max().float().item() if not same else 0.0
    if error != error:  # a difference to NaN is no number, and no small difference
        error = float("inf")
    return {"bit_identical": same, "relative_error": error / largest if largest else error}
