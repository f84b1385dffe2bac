"""Weights that are not read here: what such files are, by their first bytes, names, or tensors.

It is asked once a file has turned out to be no safetensors, so nothing that could be read is
refused for how it begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from penstock.checkpoint._file import open_regular
from penstock.checkpoint._refusal import Refusal, naming

__all__ = [
    "HEAD_BYTES",
    "QUANTIZED",
    "TORCH_SUFFIXES",
    "find_quantized",
    "refuse_names",
    "refuse_other_kind",
    "refuse_other_weights",
]

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
"""Of files that are read as torch's."""

HEAD_BYTES = 64
"""Bytes of a file that tell what it is."""

QUANTIZED = (
    "only plain weights can be streamed: take the model's checkpoint without quantization; "
    "dtype=torch.bfloat16 halves one in float32"
)
"""What to do about quantized weights."""

# GPTQ and AWQ, bitsandbytes in 8 and 4 bits, compressed-tensors.
_QUANTIZED_NAMES = re.compile(
    r"(^|\.)(qweight|qzeros|SCB|weight_packed|weight\.(absmax|quant_map|quant_state\.[\w.]+))$"
)
_SAFETENSORS = "take the model's safetensors files"
_TRUSTED = (
    "where you trust it, load it with what wrote it, and save the tensors with "
    "safetensors.torch.save_file"
)


@dataclass(frozen=True)
class _Kind:
    """One kind of file: what it is, the way from there, and how it is known."""

    what: str
    remedy: str
    starts: tuple[bytes, ...] = ()
    suffixes: tuple[str, ...] = ()
    at: int = 0  # byte of the file where `starts` lie

    def fits(self, name: str, head: bytes) -> bool:
        return head[self.at :].startswith(self.starts) or name.lower().endswith(self.suffixes)


_KINDS = (  # the first that fits
    _Kind(
        "a pointer of Git LFS, not the file that it stands for",
        "fetch that with: git lfs pull",
        (b"version https://git-lfs",),
    ),
    _Kind(
        "a web page, not a model",
        "whoever downloaded it got an answer in words: open it, and download the file again",
        (b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml"),
    ),
    _Kind(
        "compressed",
        "decompress it first",
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"),
        (".gz", ".bz2", ".xz", ".zst"),
    ),
    _Kind(
        "a GGUF file (of llama.cpp), whose quantized blocks are not read here",
        f"{_SAFETENSORS}, or make some with transformers: AutoModelForCausalLM."
        "from_pretrained(directory, gguf_file=name).save_pretrained(another directory)",
        (b"GGUF",),
        (".gguf",),
    ),
    _Kind(
        "an ONNX model: a graph, and not weights by the names of a module",
        f"{_SAFETENSORS}, or the checkpoint that it was exported from",
        suffixes=(".onnx", ".onnx_data", ".onnx.data"),
    ),
    _Kind(
        "a TensorFlow or Keras file (HDF5)",
        _SAFETENSORS,
        (b"\x89HDF\r\n\x1a\n",),
        (".h5", ".keras"),
    ),
    _Kind("a TensorFlow Lite model", _SAFETENSORS, (b"TFL3",), (".tflite",), at=4),
    _Kind("a Flax file", _SAFETENSORS, suffixes=(".msgpack",)),
    _Kind(
        "an array of numpy",
        "load it with numpy, and give register a dict of torch tensors by name",
        (b"\x93NUMPY",),
        (".npy", ".npz"),
    ),
    _Kind(
        "a zip archive, as torch.save writes them",
        "give it a name that ends in .pt to have it read as a torch file",
        (b"PK\x03\x04",),
    ),
    _Kind(
        "a Python pickle, which could run code while it is read, so nothing was read",
        _TRUSTED,
        tuple(b"\x80" + bytes([version]) for version in range(2, 6)),
        (".pkl", ".pickle", ".joblib"),
    ),
)


def refuse_other_kind(name: str, head: bytes) -> None:
    """Refuse what is known to be something else; `head` are the file's first `HEAD_BYTES`.

    Raises
    ------
    Refusal
        With what it is, and the way from there.
    """
    kind = next((kind for kind in _KINDS if kind.fits(name, head)), None)
    if kind is not None:
        raise Refusal(f"is {kind.what}", kind.remedy, offset=0 if head else None)


def refuse_other_weights(path: Path) -> None:
    """Refuse a file of another kind, or a directory that has such weights and no others.

    Raises
    ------
    CheckpointError
        With what it is, and the way from there.
    """
    with naming(path):
        if path.is_dir():
            names = sorted(each.name for each in path.iterdir())
            if not any(name.endswith((".safetensors", *TORCH_SUFFIXES)) for name in names):
                refuse_names(names)
        elif path.is_file() and not path.name.endswith(TORCH_SUFFIXES):
            with open_regular(path) as file:
                refuse_other_kind(path.name, file.read(0, min(file.size, HEAD_BYTES)))


def refuse_names(names: Iterable[str]) -> None:
    """Refuse a directory for the first name in it that says that it is of another kind."""
    for name in names:
        try:
            refuse_other_kind(name, b"")
        except Refusal as found:
            raise Refusal(f"holds {name}, which {found.problem}", found.remedy) from None


def find_quantized(names: Iterable[str]) -> str | None:
    """Return the first name that only quantized weights have (GPTQ, AWQ, bitsandbytes, ...)."""
    return next((name for name in names if _QUANTIZED_NAMES.search(name)), None)
