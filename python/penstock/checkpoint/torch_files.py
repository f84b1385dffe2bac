"""Checkpoints that torch pickled: `.pt`, `.pth` and `.bin` files.

They are read by `torch.load` alone, with the unpickler that builds tensors and nothing else, so
a file cannot run code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.checkpoint._file import open_regular
from penstock.checkpoint._refusal import Refusal, naming, shorten

if TYPE_CHECKING:
    import torch

__all__ = ["TORCH_SUFFIXES", "load_torch_checkpoint"]

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model")
_ZIP_MAGIC = b"PK\x03\x04"
_logger = logging.getLogger("penstock")


def load_torch_checkpoint(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Load the tensors of a file that `torch.save` wrote.

    The tensors are on the CPU. Where the file's format allows it they are views of the mapped
    file, so their bytes are read when they are used.

    Parameters
    ----------
    path
        A file that holds a state dict, or one under the key `state_dict` or `model`.

    Returns
    -------
    dict of str to torch.Tensor
        The state dict.

    Raises
    ------
    CheckpointError
        If the file cannot be read, holds more than tensors, or holds no state dict.
    """
    path = Path(path)
    with naming(path):
        wrapper, tensors = _unwrap(_load(path, mmap=_is_zip(path)))
    _logger.warning(
        "%s: safetensors files load faster and cannot be misread as code; to convert:\n%s",
        path,
        _recipe(path, wrapper),
    )
    return tensors


def _is_zip(path: Path) -> bool:
    """Return whether torch wrote the file in its present format, the one that can be mapped."""
    with open_regular(path) as file:
        return file.read(0, min(file.size, len(_ZIP_MAGIC))) == _ZIP_MAGIC


def _load(path: Path, *, mmap: bool) -> object:
    import torch

    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise Refusal(
            f"torch cannot load it as weights: {type(error).__name__}: {_first_line(error)}",
            "download it again, or save it again as a plain state dict of tensors",
        ) from error
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def _unwrap(content: object) -> tuple[str | None, dict[str, torch.Tensor]]:
    """Return the state dict and the key under which it was found, None for the top level."""
    tensors = _as_state_dict(content)
    if tensors is not None:
        return None, tensors
    found = {
        key: inner
        for key in _WRAPPERS
        if isinstance(content, Mapping) and (inner := _as_state_dict(content.get(key))) is not None
    }
    if len(found) != 1:
        what = shorten(list(content)) if isinstance(content, Mapping) else type(content).__name__
        raise Refusal(
            f"holds {len(found)} state dicts, not one, at the top level or under "
            f"{' or '.join(_WRAPPERS)}; it holds {what}",
            "save the state dict alone with torch.save(model.state_dict(), path)",
        )
    return next(iter(found.items()))


def _as_state_dict(value: object) -> dict[str, torch.Tensor] | None:
    import torch

    if not isinstance(value, Mapping) or not value:
        return None
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items()):
        return None
    return {name: tensor.detach() for name, tensor in value.items()}


def _recipe(path: Path, wrapper: str | None) -> str:
    inner = "" if wrapper is None else f"[{wrapper!r}]"
    # Cloned, because safetensors refuses tensors that share storage.
    return (
        "import torch, safetensors.torch\n"
        "safetensors.torch.save_file({k: v.contiguous().clone() for k, v in "
        f"torch.load({str(path)!r}, weights_only=True){inner}.items()}}, "
        f"{str(path.with_suffix('.safetensors'))!r})"
    )
