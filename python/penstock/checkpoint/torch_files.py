"""Checkpoints that torch pickled: `.pt`, `.pth` and `.bin` files.

They are read by `torch.load` alone, with the unpickler that builds tensors and nothing else, so
a file cannot run code.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.checkpoint._file import open_regular
from penstock.checkpoint._refusal import Refusal, naming, shorten
from penstock.checkpoint.kinds import refuse_other_kind

if TYPE_CHECKING:
    import torch

__all__ = ["load_torch_checkpoint", "require_torch_file"]

_WRAPPERS = ("state_dict", "model")
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_TAR_AT, _TAR_MAGIC = 257, b"ustar"  # what torch wrote before 0.1.10
_AGAIN = "download it again, or save it again as a plain state dict: torch.save(model.state_dict())"
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
        wrapper, tensors = _unwrap(_load(path, mmap=require_torch_file(path)))
    _logger.warning(
        "%s: safetensors files load faster and cannot be misread as code; to convert:\n%s",
        path,
        _recipe(path, wrapper),
    )
    return tensors


def require_torch_file(path: Path) -> bool:
    """Return whether torch wrote the file in its present format, the one that can be mapped.

    Raises
    ------
    Refusal
        If it is no torch file, by how it begins and ends.
    """
    with open_regular(path) as file:
        size, head = file.size, file.read(0, min(file.size, _TAR_AT + len(_TAR_MAGIC)))
    if head.startswith(_ZIP_MAGIC):
        _require_complete(path, size)
        return True
    if not head.startswith(_PICKLE_MAGIC) and head[_TAR_AT:] != _TAR_MAGIC:
        if size == 0:
            raise Refusal("is empty", _AGAIN)
        refuse_other_kind(path.name, head)
        raise Refusal(f"is not a torch file: it begins with {head[:8]!r}", _AGAIN)
    return False


def _require_complete(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise Refusal(
            f"is truncated or damaged: it begins as a torch file, and the directory of its zip "
            f"archive is not at its end, after {size} bytes",
            _AGAIN,
        ) from error
    if "constants.pkl" in names:
        raise Refusal(
            "is a TorchScript archive, which has code beside the weights",
            "where you trust it, load it with torch.jit.load, and save its state_dict() alone",
        )
    if "data.pkl" not in names:
        raise Refusal("is a zip archive that torch.save did not write: it has no data.pkl", _AGAIN)


def _load(path: Path, *, mmap: bool) -> object:
    import torch

    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        told = str(error)
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in told:
            found = re.search(r"GLOBAL ([\w.]+)", told)
            what = f"objects that are no tensors ({found[1]})" if found else "more than tensors"
            raise Refusal(
                f"holds {what}, and a pickle could run code while it is read, so nothing was read",
                "where you trust it, load it with torch.load(path, weights_only=False), and save "
                "the tensors alone: torch.save(model.state_dict(), path)",
            ) from error
        raise Refusal(
            f"is truncated or damaged: {type(error).__name__}: {_first_line(error)}", _AGAIN
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
