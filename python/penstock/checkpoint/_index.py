"""A sharded checkpoint: the index that maps each tensor name to the file that holds it.

The index is what transformers and diffusers write beside the shards: a JSON object whose
`weight_map` maps names to file names in the same directory. Its other keys are not trusted and
not read.
"""

from __future__ import annotations

import re
from pathlib import Path

from penstock.checkpoint._entry import TensorEntry
from penstock.checkpoint._file import open_regular
from penstock.checkpoint._header import MAX_JSON_BYTES, Header, read_header
from penstock.checkpoint._json import AMBIGUOUS, JsonObject, is_unicode, parse_object
from penstock.checkpoint._refusal import Refusal, naming, shorten

__all__ = ["is_index", "read_shards"]

# The optional part is a variant, such as `model.safetensors.index.fp16.json`.
_INDEX_NAME = re.compile(r"\.safetensors\.index(\.[^.]+)?\.json$")
_INCOMPLETE = "the checkpoint is incomplete: download or save it again"


def is_index(name: str) -> bool:
    """Return whether a file of this name is an index of safetensors shards."""
    return _INDEX_NAME.search(name) is not None


def read_shards(path: Path) -> list[Header]:
    """Read an index and the headers of all its shards, in the order of the shards' names.

    A tensor that lies in a shard but that the index does not name is left out.

    Parameters
    ----------
    path
        The index file.

    Raises
    ------
    CheckpointError
        If the index or a shard breaks a rule, or the two contradict each other.
    """
    with naming(path):
        weight_map = _read_weight_map(path)
        shards = [path.parent / name for name in sorted(set(weight_map.values()))]
        _check_present(shards)
    headers = [read_header(shard) for shard in shards]
    with naming(path):
        _check_promises(weight_map, _by_name(headers))
    return [
        Header(
            header.path,
            tuple(tensor for tensor in header.tensors if tensor.name in weight_map),
            header.metadata,
        )
        for header in headers
    ]


def _read_weight_map(path: Path) -> dict[str, str]:
    with open_regular(path) as file:
        if file.size > MAX_JSON_BYTES:
            raise Refusal(f"the index has {file.size} bytes, more than {MAX_JSON_BYTES}")
        index = parse_object(file.read(0, file.size))
    index.check_keys("key")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, JsonObject) or not weight_map:
        raise Refusal(
            f"weight_map is {shorten(weight_map)}, not an object that maps names to files",
            "save the index again, or pass the .safetensors file itself",
        )
    weight_map.check_keys("name", names_tensors=True)
    return {name: _shard_name(name, shard) for name, shard in weight_map.items()}


def _shard_name(tensor: str, shard: object) -> str:
    """Return a shard's name if it names a file directly beside the index.

    Only the name is judged. The file may be a link to anywhere: download caches are trees of
    links.
    """
    if not isinstance(shard, str) or not is_unicode(shard):
        raise Refusal(f"its file is {shorten(shard)}, not Unicode text", tensor=tensor)
    if shard in ("", ".", "..") or any(character in shard for character in "/\\\0"):
        raise Refusal(
            f"its file {shorten(shard)} is not a plain name in the directory of the index",
            "put all shards beside the index and name them without a directory",
            tensor=tensor,
        )
    return shard


def _check_present(shards: list[Path]) -> None:
    missing = [shard.name for shard in shards if not _exists(shard)]
    if missing:
        names = ", ".join(map(shorten, missing))
        raise Refusal(f"{len(missing)} of {len(shards)} shards are missing: {names}", _INCOMPLETE)


def _exists(path: Path) -> bool:
    # Not Path.exists: what it makes of the other system errors differs between Python versions.
    try:
        path.stat()
    except (FileNotFoundError, ValueError):
        # ValueError: the file system's encoding has no such name.
        return False
    return True


def _by_name(headers: list[Header]) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for header in headers:
        for tensor in header.tensors:
            other = found.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise Refusal(
                    f"lies in two shards, {shorten(other.path.name)} and "
                    f"{shorten(tensor.path.name)}",
                    AMBIGUOUS,
                    tensor=tensor.name,
                )
    return found


def _check_promises(weight_map: dict[str, str], found: dict[str, TensorEntry]) -> None:
    for name, shard in weight_map.items():
        tensor = found.get(name)
        if tensor is None or tensor.path.name != shard:
            where = "no shard" if tensor is None else shorten(tensor.path.name)
            raise Refusal(
                f"the index puts it in {shorten(shard)}, but {where} has it",
                _INCOMPLETE,
                tensor=name,
            )
