"""Which file of a directory is the checkpoint, by the names that savers use."""

from __future__ import annotations

import re
from pathlib import Path

from penstock.checkpoint._index import is_index
from penstock.checkpoint._refusal import Refusal
from penstock.checkpoint.kinds import TORCH_SUFFIXES, refuse_names

__all__ = ["find_source"]

_USUAL_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
_SHARD_NAME = re.compile(r"-\d+-of-(\d+)\.safetensors$")


def find_source(directory: Path) -> Path:
    """Return the checkpoint file or index of a directory.

    Parameters
    ----------
    directory
        A directory that holds one checkpoint.

    Raises
    ------
    Refusal
        If the directory holds none, or several that no usual name tells apart.
    """
    names = sorted(path.name for path in directory.iterdir() if path.name[0] != ".")
    for name in _USUAL_NAMES:
        if name in names:
            return directory / name
    indexes = [name for name in names if is_index(name)]
    files = [name for name in names if name.endswith(".safetensors")]
    candidates = indexes or files
    if not candidates:
        raise _nothing(names)
    if len(candidates) > 1 or _is_shard(candidates[0]):
        raise _several(candidates)
    return directory / candidates[0]


def _is_shard(name: str) -> bool:
    match = _SHARD_NAME.search(name)
    return match is not None and int(match[1]) > 1


def _several(names: list[str]) -> Refusal:
    if any(map(_is_shard, names)):
        return Refusal(
            f"holds shards without their index: {_list(names)}",
            "download the index, or pass the path of one file",
        )
    return Refusal(f"holds several checkpoints: {_list(names)}", "pass the path of one of them")


def _nothing(names: list[str]) -> Refusal:
    pickled = [name for name in names if name.endswith(TORCH_SUFFIXES)]
    if pickled:
        return Refusal(
            f"holds torch files only: {_list(pickled)}",
            "pass the path of one of these files to MemoryManager.register, which also says how to "
            "convert it to safetensors",
        )
    refuse_names(names)
    return Refusal(
        f"holds no safetensors file; found: {_list(names) or 'nothing'}",
        "pass the directory or the file that holds the weights",
    )


def _list(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
