"""One set of settings for every front door, and caps as a part of the device's memory."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import penstock
from penstock import CapExceededError, MemoryManager, _core
from penstock.cap.hard_cap import HardCap
from penstock.manager.settings import Options, Settings, split_options
from python.support import MIB, build, mlp, same_bits

NAMES = {field.name for field in fields(Settings)}
X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


def total() -> int:
    return _core.open_device("cpu").info().total_bytes


def test_every_front_door_has_the_same_settings() -> None:
    parameters = inspect.signature(MemoryManager).parameters
    assert set(parameters) == NAMES
    for field in fields(Settings):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert Options.__required_keys__ == frozenset()
    assert Options.__optional_keys__ == NAMES


def test_settings_and_others_are_told_apart() -> None:
    given = {"device": "cpu", "vae": None, "policy": None, "unet": 3}
    settings, others = split_options(given)
    assert settings == {"device": "cpu", "policy": None}
    assert others == {"vae": None, "unet": 3}


def test_offload_takes_what_a_manager_takes(tmp_path: Path) -> None:
    plain = build(lambda: mlp(64, 64, 64))
    wanted = plain(X)
    model = penstock.offload(
        plain,
        cap="128KiB",
        device="cpu",
        pager="frames",
        page_size="64KiB",
        host_budget="1MiB",
        trace=True,
        progress=False,
        policy=penstock.FarthestUse(),
    )
    assert same_bits(model(X), wanted)
    manager = penstock.manager_of(model)
    assert manager is not None
    manager.timeline(tmp_path / "trace.json")  # which was asked for
    penstock.restore(model)
    with pytest.raises(CapExceededError, match="host_budget"):
        penstock.offload(model, cap="128KiB", device="cpu", pager="frames", host_budget="4KiB")
    with pytest.raises(TypeError, match="capp"):
        penstock.offload(model, capp="64KiB")  # type: ignore[call-arg]


def test_unknown_host_tiers_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="disk"):
        Settings(cap=1, host="disk")
    with pytest.raises(ValueError, match="disk"):
        penstock.offload(nn.Linear(1, 1), cap=1, device="cpu", host="disk")


@pytest.mark.parametrize("pager", ["managed", "frames"])
def test_a_cap_may_be_a_part_of_the_memory(pager: str, tmp_path: Path) -> None:
    manager = MemoryManager(cap="12.5%", device="cpu", pager=pager, page_size="64KiB")
    assert manager.stats().cap == total() // 8
    plain = build(lambda: mlp(64, 64))
    save_file(plain.state_dict(), tmp_path / "m.safetensors")
    manager.register("m", lambda: mlp(64, 64).eval(), tmp_path / "m.safetensors")
    with manager.use("m") as model:
        assert same_bits(model(X), plain(X))
    manager.set_cap("25 %")
    assert manager.stats().cap == total() // 4
    for wrong in ("0%", "101%", "-1%", "%"):
        with pytest.raises(ValueError, match="%"):
            manager.set_cap(wrong)
    assert manager.stats().cap == total() // 4
    with pytest.raises(ValueError, match="101%"):
        MemoryManager(cap="101%", device="cpu", pager=pager)


def test_so_may_a_hard_cap() -> None:
    device = _core.HostDevice()
    cap = HardCap("1%", device=device, page_size="64KiB", reserve=0)
    assert cap.pager.cap == device.info().total_bytes // 100
    cap.set_cap("2%")
    assert cap.pager.cap == device.info().total_bytes * 2 // 100
    cap.set_cap(64 * MIB)
    assert cap.fraction == pytest.approx(64 * MIB / device.info().total_bytes)


@pytest.mark.parametrize("said", [{"host": "pinned"}, {"host": "stream"}, {"host_budget": "1GiB"}])
def test_what_is_said_of_the_host_asks_for_frames(said: dict[str, str]) -> None:
    assert MemoryManager(cap="16MiB", device="cpu").pager.kind == "managed"
    assert MemoryManager(cap="16MiB", device="cpu", **said).pager.kind == "frames"
    estimate = penstock.estimate(build(lambda: mlp(64, 64)).state_dict(), device="cpu", **said)
    assert {each.name: each.value for each in estimate.settings}["pager"] == "frames"
    with pytest.raises(ValueError, match=rf"{next(iter(said))}.* is for frames"):
        MemoryManager(cap="16MiB", device="cpu", pager="managed", **said)
