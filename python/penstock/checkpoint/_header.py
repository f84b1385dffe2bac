"""One safetensors file: its header, rule by rule, and the extents that it describes.

The format is 8 bytes of little-endian header length, a JSON header, then the data of all tensors
without holes or overlaps up to the end of the file
(https://github.com/huggingface/safetensors#format). Only the header is read here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from penstock.checkpoint._entry import TensorEntry, read_entry
from penstock.checkpoint._file import RegularFile, open_regular
from penstock.checkpoint._json import JsonObject, is_unicode, parse_object
from penstock.checkpoint._refusal import Refusal, naming, shorten
from penstock.checkpoint.kinds import HEAD_BYTES, refuse_other_kind

__all__ = ["MAX_JSON_BYTES", "Header", "read_header"]

MAX_JSON_BYTES = 100_000_000
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Header:
    """The content of one file's header; the tensors are in the order of their bytes."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of one safetensors file.

    Parameters
    ----------
    path
        A regular file.

    Returns
    -------
    Header
        Its tensors, which tile the file from the end of the header to the last byte.

    Raises
    ------
    CheckpointError
        If the file cannot be read or breaks any rule of the format.
    """
    path = Path(path)
    with naming(path), open_regular(path) as file:
        try:
            start, raw = _read_json(file)
        except Refusal:
            refuse_other_kind(path.name, file.read(0, min(file.size, HEAD_BYTES)))
            raise
        items = parse_object(raw, start=_LENGTH_BYTES)
        items.check_keys("name", names_tensors=True)
        metadata = _metadata(items.pop("__metadata__", JsonObject()))
        tensors = [read_entry(path, name, value, start, file) for name, value in items.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        _check_tiling(tensors, start, file.size)
    return Header(path, tuple(tensors), metadata)


def _read_json(file: RegularFile) -> tuple[int, bytes]:
    """Return where the data section starts, and the bytes of the header before it."""
    if file.size < _LENGTH_BYTES:
        raise Refusal(f"has {file.size} bytes; a safetensors file has at least {_LENGTH_BYTES}")
    length = int.from_bytes(file.read(0, _LENGTH_BYTES), "little")
    start = _LENGTH_BYTES + length
    if length == 0:
        raise Refusal("the header length is 0", offset=0)
    if length > MAX_JSON_BYTES:
        raise Refusal(f"the header length {length} exceeds {MAX_JSON_BYTES}", offset=0)
    if start > file.size:
        raise Refusal(f"the header ends at byte {start} of a {file.size}-byte file", offset=0)
    raw = file.read(_LENGTH_BYTES, length)
    if raw[0] != ord("{"):
        raise Refusal(f"the header begins with 0x{raw[0]:02x}, not '{{'", offset=_LENGTH_BYTES)
    return start, raw


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, JsonObject):
        raise Refusal(f"__metadata__ is not an object but {shorten(value)}")
    value.check_keys("__metadata__ key")
    metadata = {}
    for key, text in value.items():
        if not isinstance(text, str) or not is_unicode(text):
            raise Refusal(
                f"__metadata__ key {shorten(key)} holds {shorten(text)}, not Unicode text"
            )
        metadata[key] = text
    return metadata


def _check_tiling(tensors: list[TensorEntry], start: int, file_size: int) -> None:
    """Refuse holes and overlaps; `tensors` are in the order of their bytes."""
    end = start
    before: TensorEntry | None = None
    for tensor in tensors:
        if tensor.offset != end:
            fault = "overlaps" if tensor.offset < end else "leaves a hole after"
            what = "the header" if before is None else f"tensor {shorten(before.name)}"
            raise Refusal(
                f"begins at byte {tensor.offset} and {fault} {what}, which ends at {end}",
                tensor=tensor.name,
                offset=tensor.offset,
            )
        end, before = tensor.offset + tensor.nbytes, tensor
    if end != file_size:
        raise Refusal(f"{file_size - end} bytes after the last tensor belong to none", offset=end)
