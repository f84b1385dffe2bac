"""Element types: torch holds the same bytes under the dtype and shape that we name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.checkpoint import open_checkpoint
from penstock.checkpoint.dtypes import DTYPES, torch_dtype, torch_shape
from penstock.errors import CheckpointError


@pytest.mark.parametrize("code", [code for code, dtype in DTYPES.items() if dtype.torch_name])
def test_every_torch_dtype_holds_the_same_bytes(code: str, tmp_path: Path) -> None:
    saved = torch.arange(64, dtype=torch.uint8).view(torch_dtype(code)).reshape(2, -1)
    path = tmp_path / "a.safetensors"
    save_file({"a": saved}, path)
    tensor = open_checkpoint(path).tensors["a"]
    assert tensor.dtype == code
    assert torch_shape(code, tensor.shape) == tuple(saved.shape)
    assert torch_dtype(code).itemsize * saved.numel() == tensor.nbytes == 64
    assert path.read_bytes()[tensor.offset :] == bytes(range(64))


@pytest.mark.parametrize(
    ("code", "problem"), [("F6_E2M3", "no torch counterpart"), ("F12", "unknown; known are BOOL")]
)
def test_dtype_that_torch_lacks_is_refused(code: str, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        torch_dtype(code)


def test_dtype_that_this_torch_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float4_e2m1fn_x2")
    with pytest.raises(CheckpointError, match=r"F4 needs torch\.float4_e2m1fn_x2.*newer torch"):
        torch_dtype("F4")


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_f4_that_torch_cannot_pair_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="pad that dimension"):
        torch_shape("F4", shape)
