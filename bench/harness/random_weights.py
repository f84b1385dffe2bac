"""Random weights as a safetensors file, written as fast as the file system takes them.

Drawing tens of billions of numbers takes longer than what is measured with them. So one block is
drawn, and each tensor is a piece of it from a place of its own, around the end if need be: no two
layers of a model have the same weights, and the same seed gives the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

_PIECE_BYTES = 64 << 20
_WRITERS = 8
_SHIFT = 2 * 1_299_709  # bytes between two tensors' pieces: a prime number of values
_DEVIATION = 0.02  # what transformers initializes with


def random_block(nbytes: int, *, seed: int, device: str) -> torch.Tensor:
    """Draw bf16 values; return their bytes."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(nbytes // 2, generator=generator, device=device, dtype=torch.bfloat16)
    return values.mul_(_DEVIATION).cpu().view(torch.uint8)


def write_weights(module: nn.Module, file: Path, block: torch.Tensor) -> int:
    """Write weights for a module's parameters; return their bytes.

    Parameters
    ----------
    module
        A skeleton in bf16. One-dimensional weights are those of norms, and become ones.
    block
        As `random_block` draws it.
    """
    header: dict[str, object] = {}
    end = 0
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [end, end + parameter.nbytes],
        }
        end += parameter.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with file.open("wb") as target, ThreadPoolExecutor(_WRITERS) as pool:
        target.write(len(text).to_bytes(8, "little") + text)
        target.flush()
        os.ftruncate(target.fileno(), start + end)
        handle = target.fileno()
        pieces = _pieces(module, block, start)
        for _ in pool.map(lambda piece: _write(handle, *piece), pieces):
            pass
    return end


def _pieces(
    module: nn.Module, block: torch.Tensor, offset: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """List what to write where: bytes, and the offset in the file."""
    size = block.numel()
    begin = 0
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            yield torch.ones(parameter.shape, dtype=torch.bfloat16).view(torch.uint8), offset
            offset += parameter.nbytes
            continue
        left = parameter.nbytes
        while left:
            taken = min(left, size - begin, _PIECE_BYTES)
            yield block[begin : begin + taken], offset
            offset += taken
            left -= taken
            begin = (begin + taken) % size
        begin = (begin + _SHIFT) % size


def _write(handle: int, piece: torch.Tensor, offset: int) -> None:
    view = memoryview(piece.numpy())
    while view:
        written = os.pwrite(handle, view, offset)
        view = view[written:]
        offset += written
