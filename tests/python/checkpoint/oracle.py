"""What must hold of every file, judged against the safetensors package.

Whatever Penstock accepts, safetensors accepts with the same names, dtypes, shapes and bytes. What
safetensors accepts, Penstock accepts too, but for the `STRICTER` list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from penstock.checkpoint import Checkpoint, open_checkpoint
from penstock.errors import CheckpointError
from python.checkpoint.checkpoint_files import ONE, entry, pack

try:
    import safetensors
except ImportError:  # The fuzzer can run without it.
    safetensors = None


@dataclass(frozen=True)
class Stricter:
    """A deliberate refusal of what safetensors accepts.

    A refusal counts as this one if its message holds `fragment` and the header holds `evidence`.
    """

    example: bytes
    fragment: str
    evidence: bytes = rb""


STRICTER = {
    "space before the JSON": Stricter(pack(" {}"), "the header begins with 0x", rb"^[ \t\r\n]"),
    "a key twice": Stricter(pack(f'{{"a":{ONE},"a":{ONE}}}', bytes(4)), "appears twice"),
    "unknown keys": Stricter(
        pack({"a": {**entry(), "b": 1}}, bytes(4)), "not ['data_offsets', 'dtype', 'shape']"
    ),
    "an integer beyond 64 bits under an unknown key": Stricter(
        pack({"a": {**entry(), "b": 10**20}}, bytes(4)), "an integer of", rb"\d{20}"
    ),
    "an entry as a list": Stricter(
        pack('{"a":["F32",[1],[0,4]]}', bytes(4)), "its entry is not an object", rb"\["
    ),
    "a dtype as an object": Stricter(
        pack({"a": entry({"F32": None})}, bytes(4)), "unknown dtype an object", rb"\{"
    ),
    "metadata null": Stricter(
        pack({"__metadata__": None}), "__metadata__ is not an object but None", rb"null"
    ),
    "a dimension beyond 2**63-1 of an empty tensor": Stricter(
        pack({"a": entry(shape=[0, 2**63], offsets=[0, 0])}), "integers in [0, 2**63-1]", rb"\d{19}"
    ),
    "a partial product beyond 2**63-1 of an empty tensor": Stricter(
        pack({"a": entry(shape=[2**62, 2, 0], offsets=[0, 0])}), "more than 2**63-1", rb"\d{4}"
    ),
}


def extent_fault(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with the extents of an accepted checkpoint, or None."""
    ends: dict[Path, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.offset < ends.get(tensor.path, 8):
            return f"{tensor} overlaps what is before it"
        ends[tensor.path] = tensor.offset + tensor.nbytes
    for path, end in ends.items():
        if end > path.stat().st_size:
            return f"an extent of {path} ends at {end}, outside the file"
    return None


def disagreement(path: Path) -> str | None:
    """Return how Penstock and safetensors differ on one file, or None."""
    content = path.read_bytes()
    try:
        theirs = {name: tensor for name, tensor in safetensors.deserialize(content)}
    except safetensors.SafetensorError as error:
        theirs, refusal = None, error
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        if theirs is None or _is_stricter(str(error), content[8:]):
            return None
        return f"safetensors accepts what is refused: {error}"
    if theirs is None:
        return f"accepted what safetensors refuses: {refusal}"
    ours = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data": content[tensor.offset : tensor.offset + tensor.nbytes],
        }
        for tensor in checkpoint.tensors.values()
    }
    return None if ours == theirs else f"read {ours}, safetensors reads {theirs}"


def _is_stricter(message: str, header: bytes) -> bool:
    return any(
        rule.fragment in message and re.search(rule.evidence, header) for rule in STRICTER.values()
    )
