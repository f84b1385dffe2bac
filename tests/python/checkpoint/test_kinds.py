"""Weights that are not read here: each door says what they are and the way from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import penstock
from penstock.checkpoint import open_checkpoint
from penstock.cli import main
from penstock.errors import CheckpointError
from penstock.integrations import transformers

KINDS = {
    "a.gguf": (b"GGUF\3\0\0\0" + bytes(64), "GGUF.*gguf_file=name"),
    "b.safetensors": (b"GGUF\3\0\0\0" + bytes(64), "GGUF.*gguf_file=name"),
    "a.onnx": (b"\x08\x07\x12\x07pytorch", "ONNX.*exported from"),
    "a.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5.*safetensors"),
    "a.tflite": (b"\x1c\0\0\0TFL3" + bytes(64), "TensorFlow Lite.*safetensors"),
    "a.msgpack": (b"\x82\xa5", "Flax.*safetensors"),
    "a.npz": (b"PK\3\4" + bytes(64), "numpy.*dict of torch tensors"),
    "a.ckpt": (b"PK\3\4" + bytes(64), "torch.save.*ends in .pt"),
    "a.pkl": (b"\x80\4\x95" + bytes(64), "pickle.*run code.*nothing was read.*save_file"),
    "a.safetensors": (b"version https://git-lfs.github.com/spec/v1", "Git LFS.*git lfs pull"),
    "c.safetensors": (b"<!DOCTYPE html><html></html>", "web page.*download the file again"),
    "a.safetensors.gz": (b"\x1f\x8b\x08" + bytes(64), "compressed.*decompress"),
}


def manager() -> penstock.MemoryManager:
    return penstock.MemoryManager(cap="1MiB", device="cpu", page_size="64KiB")


@pytest.mark.parametrize("name", KINDS)
def test_every_door_says_what_a_file_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, told = KINDS[name]
    path = tmp_path / name
    path.write_bytes(content)
    held = manager()
    for read in (
        lambda: open_checkpoint(path),
        lambda: held.register("m", lambda: nn.Linear(2, 2), path),
        lambda: transformers.load(path, cap="1MiB", device="cpu"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: .*{told}"):
            read()
    assert main(["inspect", str(path)]) == 1
    assert name in capsys.readouterr().err
    assert held.stats().models == {}


@pytest.mark.parametrize("name", ["a.gguf", "a.onnx", "a.h5", "a.msgpack"])
def test_a_directory_is_known_by_what_is_in_it(name: str, tmp_path: Path) -> None:
    content, told = KINDS[name]
    (tmp_path / name).write_bytes(content)
    for read in (open_checkpoint, lambda path: transformers.load(path, cap="1MiB", device="cpu")):
        with pytest.raises(CheckpointError, match=f"holds {name}, which is .*{told}") as caught:
            read(tmp_path)
        assert caught.value.path == tmp_path


def test_other_files_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    manager().register("m", lambda: nn.Linear(2, 2), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        transformers.load(tmp_path, cap="1MiB", device="cpu")


def test_a_header_that_begins_as_something_else_is_read(tmp_path: Path) -> None:
    """A header of 640 bytes has a length that looks as a pickle of protocol 2 does."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).ljust(640)
    path = tmp_path / "a.safetensors"
    path.write_bytes((640).to_bytes(8, "little") + header.encode() + b"x")
    assert path.read_bytes().startswith(b"\x80\x02")
    assert list(open_checkpoint(path).tensors) == ["w"]


@pytest.mark.parametrize(
    "name",
    ["0.qweight", "0.qzeros", "0.SCB", "0.weight_packed", "0.weight.absmax"],
)
def test_quantized_weights_are_known_by_their_names(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({name: torch.ones(2, 2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    told = f"{name}' is of quantized weights; only plain weights can be streamed"
    with pytest.raises(CheckpointError, match=told):
        manager().register("m", lambda: nn.Sequential(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(CheckpointError, match=told) as caught:
        transformers.load(tmp_path, cap="1MiB", device="cpu")
    assert caught.value.tensor == name
    assert main(["inspect", str(tmp_path)]) == 0
    assert "quantized weights" in capsys.readouterr().out
