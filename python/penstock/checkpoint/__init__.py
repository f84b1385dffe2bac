"""Checkpoints as extents: which bytes of which safetensors file each tensor is.

Only headers are read here, never a tensor's bytes. Whatever a file may hold, the answer is either
a `Checkpoint` whose extents lie inside their files and do not overlap, or a `CheckpointError`.

May import the ground alone. Values are frozen; any thread may read checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.checkpoint._directory import find_source
from penstock.checkpoint._entry import TensorEntry
from penstock.checkpoint._header import Header, read_header
from penstock.checkpoint._index import is_index, read_shards
from penstock.checkpoint._refusal import Refusal, naming
from penstock.checkpoint.kinds import TORCH_SUFFIXES
from penstock.checkpoint.torch_files import require_torch_file

__all__ = ["Checkpoint", "Header", "TensorEntry", "open_checkpoint", "read_header"]


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of one checkpoint.

    Parameters
    ----------
    path
        What was opened: a file, an index, or a directory.
    files
        The safetensors files, sorted by name.
    tensors
        By name, in the order of files and then of offsets.
    metadata
        The free text of the files' headers; where files disagree on a key, the first one's.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint.

    Parameters
    ----------
    path
        A safetensors file, a `*.safetensors.index.json`, or a directory that holds either under
        one of the usual names, or as its only one.

    Returns
    -------
    Checkpoint
        Every tensor with its extent. Extents lie inside their files and do not overlap.

    Raises
    ------
    CheckpointError
        If nothing can be read there, or a file breaks a rule of the format.
    """
    path = Path(path)
    with naming(path):
        source = find_source(path) if path.is_dir() else path
        _check_name(source)
    headers = read_shards(source) if is_index(source.name) else [read_header(source)]
    return Checkpoint(
        path=path,
        files=tuple(header.path for header in headers),
        tensors={tensor.name: tensor for header in headers for tensor in header.tensors},
        metadata={k: v for header in reversed(headers) for k, v in header.metadata.items()},
    )


def _check_name(source: Path) -> None:
    name = source.name
    if name.endswith(TORCH_SUFFIXES):
        require_torch_file(source)
        raise Refusal(
            "is a torch file",
            "MemoryManager.register reads it as it is, and says how to convert it to safetensors, "
            "which is what can be looked into",
        )
    if name.endswith(".json") and not is_index(name):
        raise Refusal(
            "is not an index of safetensors files by its name",
            "pass a *.safetensors.index.json, a .safetensors file, or their directory",
        )
