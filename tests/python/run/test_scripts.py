"""TorchScript and exported programs of paged models: they run; what saves them raw is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import penstock
from penstock import ModelError
from python.support import PAGERS, same_bits

X = torch.linspace(-1, 1, 256).view(2, 128)

pytestmark = pytest.mark.filterwarnings("ignore")


def two(pager: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(128, 128) for _ in range(12))).eval()
    paged = penstock.offload(
        copy.deepcopy(plain),
        cap="320KiB",
        device="cpu",
        pager=pager,
        page_size="64KiB",
        verify=pager == "frames",
    )
    return plain, paged


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def script_of(model: nn.Module) -> nn.Module:
    return torch.jit.script(model)


def trace_of(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, X)


@pytest.mark.parametrize("make", [script_of, trace_of])
def test_a_script_of_a_paged_model_runs(pager: str, make: Callable[..., nn.Module]) -> None:
    plain, paged = two(pager)
    hooks = [*paged._forward_hooks.values(), *paged._forward_pre_hooks.values()]
    script = make(paged)
    for _ in range(3):
        for model in (plain, script):
            model.zero_grad()
            model(X).sum().backward()
        assert all(map(same_bits, [p.grad for p in plain.parameters()],
                       [p.grad for p in paged.parameters()]))  # fmt: skip
    with torch.no_grad():
        assert same_bits(plain(X), script(X))
        assert same_bits(plain(X), paged(X))
    assert [*paged._forward_hooks.values(), *paged._forward_pre_hooks.values()] == hooks


def test_hooks_of_the_users_are_compiled_as_ever(pager: str) -> None:
    def double(self, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output * 2

    plain, paged = two(pager)
    for model in (plain, paged):
        model.register_forward_hook(double)
    with torch.no_grad():
        assert same_bits(torch.jit.script(plain)(X), torch.jit.script(paged)(X))
        assert same_bits(plain(X), paged(X))


@pytest.mark.parametrize("make", [script_of, trace_of])
def test_a_script_is_not_saved_or_frozen_raw(
    pager: str, make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    plain, paged = two(pager)
    script = make(paged)
    for save in (
        lambda: torch.jit.save(script, str(tmp_path / "script.pt")),
        lambda: torch.jit.save(script, io.BytesIO()),
        lambda: script.save(tmp_path / "script.pt"),
        script.save_to_buffer,
        lambda: torch.jit.freeze(script.eval()),
        lambda: torch.jit.optimize_for_inference(script.eval()),
        lambda: torch.jit.save_jit_module_to_flatbuffer(script, tmp_path / "script.ff"),
    ):
        with pytest.raises(ModelError, match=r"as they lie in memory, and 24 .* restore"):
            save()
    penstock.restore(paged)
    torch.jit.save(script, str(tmp_path / "script.pt"))
    with torch.no_grad():
        assert same_bits(torch.jit.load(str(tmp_path / "script.pt"))(X), plain(X))
        assert same_bits(torch.jit.freeze(script.eval())(X), plain(X))


def test_an_exported_program_runs_and_is_not_saved_raw(pager: str, tmp_path: Path) -> None:
    plain, paged = two(pager)
    with torch.no_grad():
        program = torch.export.export(paged, (X,))
        assert same_bits(program.module()(X), plain(X))
    with pytest.raises(ModelError, match="save saves weights as they lie"):
        torch.export.save(program, tmp_path / "program.pt2")
    with pytest.raises(ModelError, match="ahead of time"):
        torch._inductor.aoti_compile_and_package(program)
    penstock.restore(paged)
    torch.export.save(program, tmp_path / "program.pt2")
    with torch.no_grad():
        assert same_bits(torch.export.load(tmp_path / "program.pt2").module()(X), plain(X))


def test_script_makes_lists_of_paged_tensors(pager: str) -> None:
    two(pager)  # from the first one on

    def numbers(w: torch.Tensor) -> list[float]:
        made: list[float] = w.tolist()
        return made

    class Numbers(nn.Module):
        def forward(self, w: torch.Tensor) -> list[float]:
            return numbers(w)

    script = torch.jit.script(numbers)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Numbers()), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    plain, paged = two(pager)
    for parameter in paged.parameters():
        parameter.sum()
    for mine, other in zip(paged.parameters(), plain.parameters(), strict=True):
        row, want = mine.detach().reshape(-1)[:128], other.detach().reshape(-1)[:128].tolist()
        for function in (script, torch.jit.script(Numbers()), loaded):
            assert function(row) == want


@pytest.mark.parametrize(
    "make",
    [
        lambda values: torch.tensor(values),
        lambda values: torch.as_tensor(values),
        lambda values: torch.asarray(values),
        lambda values: torch.zeros(2).new_tensor(values),
        lambda values: torch.FloatTensor(values),
        lambda values: torch.tensor([bool(value) for value in values]),
        lambda values: torch.tensor([values, values[::-1]]),
        lambda values: torch.tensor((*values, 1.5), dtype=torch.float64),
        lambda values: torch.tensor(values[0]),
    ],
)
def test_lists_of_paged_numbers_become_tensors(
    pager: str, make: Callable[..., torch.Tensor]
) -> None:
    plain, paged = two(pager)
    made = []
    for model in (plain, paged):
        values = [layer.weight.detach()[3, at] for at, layer in enumerate(model)]
        for parameter in model.parameters():
            parameter.sum()
        made.append(make(values))
    assert same_bits(*made)
