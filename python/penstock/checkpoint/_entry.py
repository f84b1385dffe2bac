"""One tensor's entry in a safetensors header, rule by rule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from penstock.checkpoint._file import RegularFile
from penstock.checkpoint._json import JsonObject
from penstock.checkpoint._refusal import Refusal, shorten
from penstock.checkpoint.dtypes import DTYPES, DType

__all__ = ["TensorEntry", "read_entry"]

_MAX_SIZE = 2**63 - 1
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie.

    Parameters
    ----------
    name
        Its name in the checkpoint.
    dtype
        Its element type, a key of `penstock.checkpoint.dtypes.DTYPES`.
    shape
        Its dimensions, in elements.
    path
        The file that holds it.
    offset
        Its first byte, from the start of that file.
    nbytes
        Its size in bytes.
    written
        When the file was last written to before this was read, in nanoseconds: what lies there may
        be something else once that changes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    written: int


def read_entry(path: Path, name: str, value: object, start: int, file: RegularFile) -> TensorEntry:
    """Check one entry by itself and return its extent.

    Parameters
    ----------
    path, name
        The file and the tensor, for the result.
    value
        What the header holds under that name.
    start
        The byte of the file at which all data begins.
    file
        In which it has to end.

    Raises
    ------
    Refusal
        If the entry breaks a rule; it names the tensor.
    """
    try:
        fields = _fields(value)
        dtype = _dtype(fields["dtype"])
        shape = _shape(fields["shape"])
        begin, end = _extent(fields["data_offsets"])
        _check_size(dtype, shape, end - begin)
        if start + end > file.size:
            raise Refusal(
                f"its bytes end at {start + end} of a {file.size}-byte file",
                "the file is truncated: download or save it again",
                offset=start + begin,
            )
    except Refusal as refusal:
        refusal.tensor = name
        raise
    return TensorEntry(name, dtype.code, shape, path, start + begin, end - begin, file.written)


def _fields(value: object) -> JsonObject:
    if not isinstance(value, JsonObject):
        raise Refusal(f"its entry is not an object but {shorten(value)}")
    value.check_keys("key")
    if value.keys() != _KEYS:
        raise Refusal(f"its keys are {shorten(sorted(value))}, not {sorted(_KEYS)}")
    return value


def _dtype(code: object) -> DType:
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise Refusal(
            f"unknown dtype {shorten(code)}",
            f"convert the tensor to one of {', '.join(DTYPES)}",
        )
    return dtype


def _is_size(value: object) -> TypeGuard[int]:
    # bool is an int to Python, but not to JSON.
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _shape(dims: object) -> tuple[int, ...]:
    if not isinstance(dims, list) or not all(_is_size(dim) for dim in dims):
        raise Refusal(f"shape {shorten(dims)} is not a list of integers in [0, 2**63-1]")
    return tuple(dims)


def _extent(offsets: object) -> tuple[int, int]:
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise Refusal(f"data_offsets {shorten(offsets)} are not two integers in [0, 2**63-1]")
    begin, end = offsets
    if begin > end:
        raise Refusal(f"data_offsets {shorten(offsets)} end before they begin")
    return begin, end


def _check_size(dtype: DType, shape: tuple[int, ...], nbytes: int) -> None:
    count = 1
    for dim in shape:
        count *= dim
        # Checked at each step, as fixed-width readers do: a later 0 does not heal an overflow.
        if count > _MAX_SIZE:
            raise Refusal(f"shape {shorten(shape)} has more than 2**63-1 elements")
    bits = count * dtype.bits
    if bits % 8:
        raise Refusal(
            f"{count} elements of {dtype.code} are {bits} bits, not whole bytes",
            "pad the tensor to a whole number of bytes",
        )
    if bits != 8 * nbytes:
        raise Refusal(
            f"{dtype.code} of shape {shorten(shape)} takes {bits // 8} bytes, "
            f"but data_offsets span {nbytes}"
        )
