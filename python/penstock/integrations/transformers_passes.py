"""Forward passes of a model of transformers, for who times them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from penstock.errors import PenstockError
from penstock.integrations.transformers import load

__all__ = ["forward_passes"]


def forward_passes(
    directory: str | os.PathLike[str],
    tokens: int,
    **settings: Any,  # noqa: ANN401
) -> Callable[[], object]:
    """Load a model from its directory, and return a function that runs one pass of it.

    Parameters
    ----------
    directory, settings
        As `load` takes them.
    tokens
        Of the pass, one sequence of them; where there is a decoder, it gets as many.

    Raises
    ------
    PenstockError
        If the model takes something other than tokens.
    """
    model = load(directory, **settings)
    if model.main_input_name != "input_ids":
        raise PenstockError(
            f"{type(model).__name__} takes {model.main_input_name}, not tokens: write a function "
            'that sets up its pass, and tune "path/to/script.py:function"'
        )
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=generator).to(model.device)
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids

    def run_pass() -> object:
        with torch.no_grad():
            return model(**given)

    return run_pass
