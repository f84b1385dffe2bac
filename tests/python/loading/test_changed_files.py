"""Checkpoints that change while weights are read from them, and how often they are in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from penstock import CheckpointError, MemoryManager
from penstock.loading.weights import open_weights
from python.support import KIB, MIB, build, mlp, same_bits, state_of

PAGE = 64 * KIB
WIDTH = 256  # a weight is four pages
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


def stack() -> nn.Module:
    return mlp(*[WIDTH] * 9)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(state_of(build(stack)), path)
    return path


def empty_manager(kind: str, **settings: object) -> MemoryManager:
    """Make a manager under whose cap not all of the model stays, of managed memory or a tier."""
    options = {"pager": "managed"} if kind == "managed" else {"pager": "frames", "host": kind}
    return MemoryManager(cap=12 * PAGE, device="cpu", page_size=PAGE, **options, **settings)


def manager_of(kind: str, path: Path, **settings: object) -> MemoryManager:
    manager = empty_manager(kind, **settings)
    manager.register("m", lambda: stack().eval(), path)
    return manager


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def overwrite(path: Path) -> None:
    """Change one byte of the last tensor, and the time of the last write."""
    before = path.stat()
    overwrite_unseen(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))


def overwrite_unseen(path: Path) -> None:
    """Change one byte in the middle, and leave size and time as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---- files that change -------------------------------------------------------------------------


@pytest.mark.parametrize("change", [shorten, lengthen, overwrite])
@pytest.mark.parametrize("host", ["mapped", "stream"])
def test_a_file_that_was_changed_is_named_and_nothing_is_broken(
    host: str, change: Callable[[Path], None], checkpoint: Path, tmp_path: Path
) -> None:
    plain = build(stack)
    whole = checkpoint.read_bytes()
    manager = manager_of(host, checkpoint)
    manager.register("other", lambda: stack().eval(), state_of(plain))
    with torch.no_grad(), manager.use("m") as module:
        assert same_bits(module(X), plain(X))
        change(checkpoint)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="register it again") as caught:
                module(X)
            error = caught.value
            assert error.path == checkpoint
            assert error.tensor in dict(plain.named_parameters())
            assert str(error).startswith("model 'm': aten::addmm")
            assert f"it had {len(whole)} bytes" in str(error)
            assert f"now it has {checkpoint.stat().st_size} bytes" in str(error)
    with torch.no_grad(), manager.use("other") as module:
        assert same_bits(module(X), plain(X))
    manager.unregister("m")
    manager.unregister("other")
    assert manager.stats().used == 0
    checkpoint.write_bytes(whole)
    manager.register("m", lambda: stack().eval(), checkpoint)
    with torch.no_grad(), manager.use("m") as module:
        assert same_bits(module(X), plain(X))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", ["pinned", "mapped", "stream", "managed"])
def test_a_file_that_was_written_to_after_its_tensors_were_listed_is_refused(
    host: str, dtype: torch.dtype | None, checkpoint: Path
) -> None:
    listed = open_weights(checkpoint)
    overwrite(checkpoint)
    manager = empty_manager(host)
    with pytest.raises(CheckpointError, match="after its tensors were listed") as caught:
        manager.register("m", lambda: stack().eval(), listed, dtype=dtype)
    assert caught.value.path == checkpoint
    assert caught.value.tensor in listed.sources
    assert manager.stats().used == 0
    manager.register("m", lambda: stack().eval(), checkpoint, dtype=dtype)
    plain = stack()
    plain.load_state_dict(load_file(checkpoint))
    x = X.to(dtype or X.dtype)
    plain.to(x.dtype)
    with torch.no_grad(), manager.use("m") as module:
        assert same_bits(module(x), plain(x))


@pytest.mark.parametrize("host", ["mapped", "stream"])
def test_weights_that_are_read_outside_of_a_step_are_refused_too(
    host: str, checkpoint: Path
) -> None:
    manager = manager_of(host, checkpoint)
    overwrite(checkpoint)
    with pytest.raises(CheckpointError, match="was changed"):
        manager.module("m").state_dict()["0.weight"].clone()


@pytest.mark.parametrize("host", ["mapped", "stream"])
def test_a_file_that_another_takes_the_name_of_is_read_on(host: str, checkpoint: Path) -> None:
    plain = build(stack)
    manager = manager_of(host, checkpoint)
    other = checkpoint.with_suffix(".new")
    other.write_bytes(b"nothing")
    other.replace(checkpoint)
    with torch.no_grad(), manager.use("m") as module:
        for _ in range(2):
            assert same_bits(module(X), plain(X))


@pytest.mark.parametrize("change", [shorten, overwrite])
@pytest.mark.parametrize("kind", ["pinned", "managed"])
def test_what_was_copied_is_the_models_own(
    kind: str, change: Callable[[Path], None], checkpoint: Path
) -> None:
    plain = build(stack)
    manager = manager_of(kind, checkpoint)
    change(checkpoint)
    with torch.no_grad(), manager.use("m") as module:
        for _ in range(2):
            assert same_bits(module(X), plain(X))


@pytest.mark.parametrize("host", ["mapped", "stream"])
def test_a_change_that_size_and_time_do_not_tell_is_found_by_verifying(
    host: str, checkpoint: Path
) -> None:
    plain = build(stack)
    manager = manager_of(host, checkpoint, verify=True)
    with torch.no_grad(), manager.use("m") as module:
        for _ in range(2):
            assert same_bits(module(X), plain(X))
        overwrite_unseen(checkpoint)
        with pytest.raises(CheckpointError, match="not those that were loaded before") as caught:
            for _ in range(3):  # a ring may have read ahead before
                module(X)
        assert caught.value.path == checkpoint
        overwrite_unseen(checkpoint)  # which undoes it
        for _ in range(2):
            assert same_bits(module(X), plain(X))


# ---- copies in memory --------------------------------------------------------------------------


def cached_bytes(path: Path) -> int:
    """Return how much of a file is in the page cache, in whole pages of the system."""
    with path.open("rb") as file:
        mapping = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        view = ctypes.c_char.from_buffer(mapping)
        pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapping)), pages
        )
        del view
        mapping.close()
    assert not failed
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def drop_cached(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path) > 0:
        pytest.skip("the files of this system are never out of memory")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["pinned", "managed"])
def test_a_load_leaves_nothing_in_the_page_cache_unless_told(
    kind: str, dtype: torch.dtype | None, checkpoint: Path
) -> None:
    weights = sum(tensor.nbytes for tensor in build(stack).parameters())
    for keep in (False, True):
        drop_cached(checkpoint)
        manager = empty_manager(kind, keep_cached=keep)
        manager.register("m", lambda: stack().eval(), checkpoint, dtype=dtype)
        found = cached_bytes(checkpoint)
        # Reading the header brings in what the system reads ahead.
        assert found >= weights if keep else found <= weights // 4


def test_what_was_cached_before_stays_so(checkpoint: Path) -> None:
    drop_cached(checkpoint)
    checkpoint.read_bytes()
    before = cached_bytes(checkpoint)
    manager_of("pinned", checkpoint)
    assert cached_bytes(checkpoint) == before


@pytest.mark.parametrize("pin", [[], ["0"], ["7"]], ids=str)
def test_a_stream_stays_past_the_page_cache_whatever_is_pinned(
    pin: list[str], checkpoint: Path
) -> None:
    plain = build(stack)
    manager = empty_manager("stream", host_budget="512KiB")
    drop_cached(checkpoint)
    manager.register("m", lambda: stack().eval(), checkpoint, pin=pin)
    with torch.no_grad(), manager.use("m") as module:
        for _ in range(3):
            assert same_bits(module(X), plain(X))
    assert cached_bytes(checkpoint) <= MIB // 2
