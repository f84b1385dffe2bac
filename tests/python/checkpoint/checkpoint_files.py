"""Small checkpoint files to test with: how to build one, good ones, and the form of a bad one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Content = bytes | Callable[[Path], object]
ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@dataclass(frozen=True)
class Case:
    """One malformed checkpoint.

    `files` are written (bytes) or made (callables), `target` is then opened, and the error must
    hold every fragment and be about the file `culprit`, the `tensor` and the `offset`.
    """

    name: str
    files: Mapping[str, Content]
    fragments: tuple[str, ...]
    target: str = "model.safetensors"
    culprit: str = "model.safetensors"
    tensor: str | None = None
    offset: int | None = None

    def build(self, directory: Path) -> Path:
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
        return directory / self.target


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pack(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a safetensors file; a header that is no str or bytes is written as JSON."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header, separators=(",", ":"))
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def index(weight_map: object, **more: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **more}).encode()


VALID: dict[str, bytes] = {
    "empty": pack("{}"),
    "one": pack({"a": entry()}, bytes(4)),
    "scalar": pack({"a": entry("I64", [], [0, 8])}, bytes(8)),
    "zero size": pack({"a": entry("F16", [3, 0, 2], [0, 0])}),
    "zero size between": pack(
        {
            "c": entry(offsets=(4, 8)),
            "z": entry("F64", [0], [4, 4]),
            "a": entry(),
            "y": entry("U8", [0], [8, 8]),
        },
        bytes(8),
    ),
    "metadata": pack({"__metadata__": {"format": "pt", "": "ü"}, "ü": entry()}, bytes(4)),
    "empty name": pack({"": entry()}, bytes(4)),
    "padded": pack(f'{{"a":{ONE}}}   \n\r\t ', bytes(4)),
    "spaced": pack('{ "a" : {"shape" : [ 1 ],\n"data_offsets":[0, 4],\t"dtype":"F32"} }', bytes(4)),
    "escaped": pack(f'{{"\\u0061\\n\\ud83d\\ude00":{ONE}}}', bytes(4)),
    "brackets in names": pack(
        {name: entry("U8", [0], [0, 0]) for name in ("[" * 300, '{"[' * 300, "\\" * 9, '\\"]"[')}
    ),
    "half bytes": pack({"a": entry("F4", [3, 2], [0, 3])}, bytes(3)),
    "six bits": pack({"a": entry("F6_E2M3", [4], [0, 3])}, bytes(3)),
    "high rank": pack({"a": entry(shape=[1] * 200)}, bytes(4)),
    "many": pack(
        {f"t{i}": entry("BF16", [2, i], [2 * i * (i - 1), 2 * i * (i + 1)]) for i in range(20)},
        bytes(760),
    ),
}
