"""Checkpoints: what is read from good files, and how bad ones are refused."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.checkpoint import Checkpoint, open_checkpoint, read_header
from penstock.errors import CheckpointError
from python.checkpoint.checkpoint_files import VALID, Case, entry, index, pack
from python.checkpoint.malformed import CASES


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Fail, rather than hang, a test that blocks on a FIFO or a device."""

    def too_late(signum: int, frame: object) -> None:
        raise TimeoutError("the test ran for 20 s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(checkpoint: Checkpoint, name: str) -> bytes:
    tensor = checkpoint.tensors[name]
    with tensor.path.open("rb") as file:
        return os.pread(file.fileno(), tensor.nbytes, tensor.offset)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Bad files.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_is_refused(case: Case, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    error = caught.value
    message = str(error)
    for fragment in case.fragments:
        assert fragment in message
    assert error.path == tmp_path / case.culprit
    assert message.startswith(f"{error.path}: ")
    assert "; " in message, "no remedy"
    assert len(message) < 1000
    assert error.tensor == case.tensor
    assert case.tensor is None or f"tensor {case.tensor!r}" in message
    assert error.offset == case.offset


def test_corpus_is_large_and_named_apart() -> None:
    names = [case.name for case in CASES]
    assert len(names) >= 60
    assert len(set(names)) == len(names)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Give up root's right to read every file."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("closed", [".", "a.safetensors"])
def test_permission_is_reported(closed: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", VALID["one"])
    mode = (tmp_path / closed).stat().st_mode
    (tmp_path / closed).chmod(0)
    with unprivileged(), pytest.raises(CheckpointError, match=r"Permission denied \(errno 13\)"):
        open_checkpoint(path)
    (tmp_path / closed).chmod(mode)


def test_deep_nesting_is_safe_under_a_raised_recursion_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pack('{"a":' + "[" * 1_000_000))
    code = (
        "import sys; sys.setrecursionlimit(10**6)\n"
        "from penstock.checkpoint import *; read_header(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, path]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 1, "the parser must not exhaust the stack"
    assert "nested too deeply" in result.stderr


def test_file_that_shrinks_while_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", VALID["one"])
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 20 - at), at))
    with pytest.raises(CheckpointError, match="ends at byte 20, but had 66 bytes") as caught:
        open_checkpoint(path)
    assert caught.value.offset == 20


def test_io_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, nbytes: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    path = write(tmp_path / "a.safetensors", VALID["one"])
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CheckpointError, match=r"Input/output error \(errno 5\)") as caught:
        open_checkpoint(path)
    assert isinstance(caught.value.__cause__, OSError)


# Good files.


def test_tensors_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", VALID["zero size between"])
    assert list(open_checkpoint(path).tensors) == ["a", "z", "c", "y"]


def test_metadata_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", VALID["metadata"])
    assert open_checkpoint(path).metadata == {"format": "pt", "": "ü"}


def test_only_the_header_is_read_and_the_file_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", VALID["one"])
    data_start = len(VALID["one"]) - 4
    opened, covered = [], set()
    pread, open_ = os.pread, os.open

    def watched_pread(fd: int, nbytes: int, offset: int) -> bytes:
        covered.update(range(offset, offset + nbytes))
        return pread(fd, min(nbytes, 7), offset)  # Short reads are legal and must be resumed.

    monkeypatch.setattr(os, "pread", watched_pread)
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args[0]) or open_(*args))
    read_header(path)
    assert opened == [path]
    assert covered == set(range(data_start))


def test_no_descriptor_leaks(tmp_path: Path) -> None:
    fds = Path("/proc/self/fd")
    good = write(tmp_path / "a.safetensors", VALID["one"])
    bad = write(tmp_path / "b.safetensors", b"")
    before = len(list(fds.iterdir()))
    for _ in range(20):
        open_checkpoint(good)
        with pytest.raises(CheckpointError):
            open_checkpoint(bad)
        with pytest.raises(CheckpointError):
            read_header(tmp_path)
    assert len(list(fds.iterdir())) == before


def test_a_hundred_thousand_tensors_take_seconds(tmp_path: Path) -> None:
    header = {f"layers.{i}.weight": entry("U8", [1], [i, i + 1]) for i in range(100_000)}
    path = write(tmp_path / "a.safetensors", pack(header, bytes(100_000)))
    start = time.process_time()
    checkpoint = open_checkpoint(path)
    assert time.process_time() - start < 5
    assert len(checkpoint.tensors) == checkpoint.nbytes == 100_000


# Directories and shards.

SHARDS = {
    "m-1.safetensors": pack(
        {"__metadata__": {"k": "1"}, "b": entry(), "x": entry("U8", [0], [4, 4])}, b"bbbb"
    ),
    "m-2.safetensors": pack({"__metadata__": {"k": "2", "l": "2"}, "a": entry()}, b"aaaa"),
}
INDEX = index({"a": "m-2.safetensors", "b": "m-1.safetensors"}, more=[1.5])


def test_shards_are_joined(tmp_path: Path) -> None:
    for name, content in SHARDS.items():
        write(tmp_path / name, content)
    path = write(tmp_path / "m.safetensors.index.json", INDEX)
    for opened in (path, tmp_path):
        checkpoint = open_checkpoint(opened)
        assert checkpoint.path == opened
        assert checkpoint.files == tuple(tmp_path / name for name in SHARDS)
        assert list(checkpoint.tensors) == ["b", "a"], "x is in no index, and files come in order"
        assert read(checkpoint, "a") == b"aaaa"
        assert read(checkpoint, "b") == b"bbbb"
        assert checkpoint.metadata == {"k": "1", "l": "2"}
        assert checkpoint.nbytes == 8


def test_hub_cache_of_links_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    files = {**SHARDS, "model.safetensors.index.json": INDEX}
    for i, (name, content) in enumerate(files.items()):
        write(tmp_path / "blobs" / f"{i:064x}", content)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"{i:064x}")
    checkpoint = open_checkpoint(snapshot)
    assert read(checkpoint, "a") == b"aaaa"
    assert checkpoint.files[0] == snapshot / "m-1.safetensors", "links are kept, names matter"


PREFERENCE = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "other.safetensors.index.fp16.json",
    "other.safetensors",
)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(PREFERENCE, 2)))
def test_usual_names_come_first(first: str, second: str, tmp_path: Path) -> None:
    for name, tensor in ((first, "first"), (second, "second")):
        if name.endswith(".json"):
            write(tmp_path / f".{tensor}", pack({tensor: entry()}, bytes(4)))
            write(tmp_path / name, index({tensor: f".{tensor}"}))
        else:
            write(tmp_path / name, pack({tensor: entry()}, bytes(4)))
    assert list(open_checkpoint(tmp_path).tensors) == ["first"]


@pytest.mark.parametrize("name", ["lora.safetensors", "m-00001-of-00001.safetensors"])
def test_only_file_of_a_directory_is_opened(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, VALID["one"])
    write(tmp_path / "._lora.safetensors", b"resource fork")
    write(tmp_path / "pytorch_model.bin", b"")
    assert open_checkpoint(str(tmp_path)).files == (tmp_path / name,)


@pytest.mark.parametrize("name", ["blob-without-suffix", "m-00001-of-00002.safetensors"])
def test_file_is_opened_whatever_its_name(name: str, tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path / name, VALID["one"])).nbytes == 4
