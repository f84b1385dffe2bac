"""Reading the JSON objects that libraries keep beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock.checkpoint.kinds import refuse_other_weights
from penstock.errors import CheckpointError

__all__ = ["read_json_object"]


def read_json_object(file: Path, *, what: str, who: str) -> dict[str, Any]:
    """Read a file that holds one object.

    Parameters
    ----------
    what
        What it holds, for messages: "configuration".
    who
        Whose `save_pretrained` writes it: "a pipeline's".

    Raises
    ------
    CheckpointError
        If there is no such file, with what there is instead; or it holds something else.
    """
    if not file.is_file():
        refuse_other_weights(file.parent)
        raise CheckpointError(
            f"{file.parent} has no {file.name}: pass the directory that {who} save_pretrained "
            "wrote, or that it was downloaded to, not a file or the name of a repository",
            path=file,
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not JSON ({error}): download it again", path=file
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no {what}: download it again", path=file)
    return content
