"""Deferred tensors: what is done to them before they are read is done to what is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from penstock import CheckpointError, MemoryManager, ModelError
from penstock.loading.deferred import defer, source_of
from penstock.loading.weights import Weights, open_weights
from python.support import same_bits

Tensors = Mapping[str, torch.Tensor]

# What is done, and the pieces of files that it is read from; None where it has to be computed.
CHANGES: dict[str, tuple[Callable[[Tensors], Any], list[int] | None]] = {
    "nothing": (lambda t: t["a"], [1]),
    "a slice of everything": (lambda t: t["a"][...], [1]),
    "a parameter": (lambda t: nn.Parameter(t["a"]), [1]),
    "data": (lambda t: t["a"].data, [1]),
    "to where it is": (lambda t: t["a"].to(device="cpu", dtype=torch.float32), [1]),
    "to the dtype of another": (lambda t: t["a"].to(t["b"]), [1]),
    "a clone": (lambda t: t["a"].clone(), [1]),
    "a clone in another order": (
        lambda t: t["d"].clone(memory_format=torch.channels_last).contiguous(),
        None,
    ),
    "another order": (lambda t: t["d"].to(memory_format=torch.channels_last).contiguous(), None),
    "another form": (lambda t: t["a"].reshape(2, 3, 64, 32), [1]),
    "rows": (lambda t: t["a"][2:5], [1]),
    "one of several": (lambda t: t["a"].unbind(0)[3], [1]),
    "chunks": (lambda t: [c.contiguous() for c in torch.chunk(t["a"], 3)], [1, 1, 1]),
    "stacked": (lambda t: torch.stack([t["a"], t["b"]]), [2]),
    "joined": (lambda t: torch.cat([t["a"], t["b"], t["c"]], dim=0), [3]),
    "experts": (lambda t: torch.cat([torch.stack([t["a"], t["b"]])] * 2, dim=1), [4]),
    "rows of what was joined": (lambda t: torch.cat([t["a"], t["b"]])[4:8], [2]),
    "interleaved": (lambda t: torch.cat([t["a"], t["b"]], dim=1), [12]),
    "interleaved from the end": (lambda t: torch.cat([t["a"], t["b"]], -2), [12]),
    "interleaved finely": (lambda t: torch.cat([t["a"], t["b"]], dim=2), None),
    "transposed": (lambda t: t["a"].transpose(1, 2), None),
    "transposed in memory": (lambda t: t["a"].mT.contiguous(), None),
    "columns": (lambda t: t["a"][..., :7], None),
    "another dtype": (lambda t: t["a"].to(torch.bfloat16), None),
    "joined in another dtype": (lambda t: torch.cat([t["a"], t["b"]]).to(torch.float64), None),
    "a sum": (lambda t: t["a"] + t["b"] * 2, None),
    "a choice by values": (lambda t: t["a"] if torch.equal(t["a"], t["b"]) else t["c"], [1]),
}


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(6, 64, 32, generator=generator) for name in "abc"}
    tensors["d"] = torch.randn(2, 3, 4, 5, generator=generator)
    save_file(tensors, tmp_path / "model.safetensors")
    sources = open_weights(tmp_path).sources
    return tensors, {name: defer(source) for name, source in sources.items()}


class Holder(nn.Module):
    def __init__(self, form: torch.Tensor) -> None:
        super().__init__()
        self.held = nn.Parameter(torch.empty_like(form))


@pytest.mark.parametrize("name", CHANGES)
def test_values_are_those_of_the_change(name: str, weights: tuple[Tensors, Tensors]) -> None:
    change, pieces = CHANGES[name]
    real, deferred = weights
    wanted, found = change(real), change(deferred)
    many = isinstance(wanted, (list, tuple))
    for index, (value, made) in enumerate(
        zip(wanted, found, strict=True) if many else [(wanted, found)]
    ):
        source = source_of("held", made)
        where = len(source.where) if isinstance(source.where, tuple) else None
        assert where == (pieces[index] if pieces else None)
        manager = MemoryManager(cap="1MiB", device="cpu")
        value = value.detach().contiguous()
        manager.register("m", lambda value=value: Holder(value), Weights("test", {"held": source}))
        with manager.use("m") as model:
            assert same_bits(model.held.detach().clone(), value)


def test_what_is_asked_of_values_is_answered(weights: tuple[Tensors, Tensors]) -> None:
    real, deferred = weights
    assert deferred["a"].shape == (6, 64, 32)
    assert deferred["a"].is_contiguous()
    assert torch.allclose(deferred["a"], deferred["a"])
    assert deferred["a"].sum().item() == real["a"].sum().item()


def test_what_is_not_read_cannot_be_changed(weights: tuple[Tensors, Tensors]) -> None:
    with pytest.raises(ModelError, match="mul_ changes a weight that is not read yet"):
        weights[1]["a"].mul_(2)


def test_file_that_shrank_after_it_was_listed(
    weights: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 8)
    total = sum(tensor.sum().item() for tensor in weights[0].values())
    with pytest.raises(CheckpointError, match="after its tensors were listed"):
        assert sum(tensor.sum().item() for tensor in weights[1].values()) == total
