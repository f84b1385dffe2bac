"""Checkpoints that torch pickled: loaded as tensors only, or refused."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from penstock.checkpoint.torch_files import load_torch_checkpoint
from penstock.errors import CheckpointError

STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int8)}


def save(path: Path, content: object, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


def assert_is_state(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_state_dict_is_loaded(suffix: str, tmp_path: Path) -> None:
    assert_is_state(load_torch_checkpoint(str(save(tmp_path / f"a{suffix}", STATE))))


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_state_dict_is_loaded(wrapper: str, tmp_path: Path) -> None:
    content = {wrapper: STATE, "epoch": 3, "optimizer": {"lr": 0.1}}
    assert_is_state(load_torch_checkpoint(save(tmp_path / "a.pt", content)))


def test_parameters_are_loaded_as_plain_tensors(tmp_path: Path) -> None:
    content = {**STATE, "w": torch.nn.Parameter(STATE["w"])}
    tensors = load_torch_checkpoint(save(tmp_path / "a.pt", content))
    assert_is_state(tensors)
    assert not tensors["w"].requires_grad


def test_legacy_format_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", STATE, _use_new_zipfile_serialization=False)
    assert_is_state(load_torch_checkpoint(path))


def test_present_format_is_mapped_and_never_unpickled_freely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k) or load(*a, **k))
    load_torch_checkpoint(save(tmp_path / "a.pt", STATE))
    load_torch_checkpoint(save(tmp_path / "b.pt", STATE, _use_new_zipfile_serialization=False))
    for options, mmap in zip(seen, (True, False), strict=True):
        assert options == {"map_location": "cpu", "weights_only": True, "mmap": mmap}


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.touched),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    content = {"w": Malicious(touched)}
    path = save(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped)
    what = r"a\.pt: holds objects that are no tensors \(posix\.mkdir\), and a pickle could run code"
    with pytest.raises(CheckpointError, match=f"{what}.*weights_only=False"):
        load_torch_checkpoint(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (STATE["w"], "holds 0 state dicts.*Tensor"),
        ([STATE], "holds 0 state dicts.*list"),
        ({}, "holds 0 state dicts"),
        ({"epoch": 3, "net": STATE}, r"holds 0 state dicts.*\['epoch', 'net'\]"),
        ({1: STATE["w"]}, "holds 0 state dicts"),
        ({"state_dict": STATE, "model": STATE}, "holds 2 state dicts"),
        ({"state_dict": {"state_dict": STATE}}, "holds 0 state dicts"),
    ],
)
def test_other_content_is_refused(content: object, problem: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", content)
    with pytest.raises(CheckpointError, match=f"(?s){problem}.*save the state dict") as caught:
        load_torch_checkpoint(path)
    assert caught.value.path == path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 3, 4, 20, -20])
def test_truncated_file_is_refused(cut: int, zipped: bool, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", STATE, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:cut])
    what = r"a\.pt: is (empty|truncated or damaged|not a torch file)"
    with pytest.raises(CheckpointError, match=f"{what}.*; download it again"):
        load_torch_checkpoint(path)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_archives_that_are_no_state_dict_are_named(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)).save(tmp_path / "script.pt")
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    (tmp_path / "a.npz").rename(tmp_path / "numpy.pt")
    (tmp_path / "text.pt").write_text("no torch file")
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"w": Malicious(tmp_path)}, 0x2))
    for name, told in {
        "script.pt": "is a TorchScript archive.*torch.jit.load.*state_dict",
        "numpy.pt": "is a zip archive that torch.save did not write: it has no data.pkl",
        "text.pt": "is not a torch file: it begins with b'no torch'",
        "pointer.bin": "is a pointer of Git LFS.*git lfs pull",
        "module.pt": r"no tensors \(torch.nn.modules.linear.Linear\).*save the tensors alone",
        "old.pt": r"holds objects that are no tensors \(posix.mkdir|more than tensors",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: .*{told}") as caught:
            load_torch_checkpoint(tmp_path / name)
        assert caught.value.path == tmp_path / name


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    for name, problem in (("none.pt", "errno 2"), ("", "a directory"), ("fifo.pt", "a FIFO")):
        with pytest.raises(CheckpointError, match=problem):
            load_torch_checkpoint(tmp_path / name)


@pytest.mark.parametrize("wrapper", [None, "model"])
def test_hint_gives_a_recipe_that_works(
    wrapper: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tied = {**STATE, "tied": STATE["w"], "turned": STATE["w"].T}
    path = save(tmp_path / "it's.pt", tied if wrapper is None else {wrapper: tied})
    with caplog.at_level(logging.WARNING, "penstock"):
        load_torch_checkpoint(path)
    (record,) = caplog.records
    hint, *recipe = record.getMessage().splitlines()
    assert "safetensors" in hint
    assert len(recipe) == 2
    exec("\n".join(recipe), {})
    converted = load_file(tmp_path / "it's.safetensors")
    assert all(torch.equal(converted[name], tied[name]) for name in tied)
