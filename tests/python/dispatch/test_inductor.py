"""Models compiled by inductor for a CPU: its kernels find paged weights, or are refused them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import penstock
from penstock import CapExceededError, ModelError
from python.support import PAGERS, same_bits

WIDTH = 128
IDS = torch.arange(64).remainder(50)

pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    """Its matrix product goes through the dispatcher; all else becomes kernels of inductor's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.batch = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.batch(self.linear(self.norm(x)))) * self.gate.sum(0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)  # two pages
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embedding(ids))


@pytest.fixture(params=PAGERS)
def pager(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def offload(model: nn.Module, pager: str, cap: str = "384KiB") -> nn.Module:
    verify = pager == "frames"
    return penstock.offload(
        model, cap=cap, device="cpu", pager=pager, page_size="64KiB", verify=verify
    )


def check(plain: nn.Module, paged: nn.Module, run: object, run_paged: object) -> None:
    """Three training steps, an evaluation after each."""
    for _ in range(3):
        for model, call in ((plain, run), (paged, run_paged)):
            model.train().zero_grad()
            call(IDS).square().sum().backward()  # type: ignore[operator]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
            model.eval()
        with torch.no_grad():
            assert same_bits(run(IDS), run_paged(IDS))  # type: ignore[operator]
    for mine, other in zip(paged.state_dict().values(), plain.state_dict().values(), strict=True):
        assert same_bits(mine, other)


def test_kernels_of_inductor_read_and_write_paged_tensors(pager: str) -> None:
    plain = Model()
    paged = offload(copy.deepcopy(plain), pager)
    check(plain, paged, torch.compile(plain), torch.compile(paged))


def test_what_a_kernel_of_inductor_reads_has_to_fit() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum((x * weight for weight in self.weights), x)

    plain, x = Wide(), torch.randn(WIDTH, WIDTH)
    paged = offload(copy.deepcopy(plain), "frames", cap="320KiB")
    compiled = torch.compile(paged)
    with torch.no_grad():
        with pytest.raises(CapExceededError, match="a kernel that takes addresses"):
            compiled(x)
        penstock.manager_of(paged).set_cap("1MiB")
        assert same_bits(compiled(x), torch.compile(plain)(x))


def test_a_program_in_cpp_is_refused() -> None:
    paged = offload(Model().eval(), "frames")
    compiled = torch.compile(paged, options={"cpp_wrapper": True})
    with torch.no_grad(), pytest.raises(ModelError, match="without cpp_wrapper"):
        compiled(IDS)
    penstock.restore(paged)
    with torch.no_grad():
        assert compiled(IDS).shape == (64, WIDTH)


def compiled_first() -> None:
    """Kernels that are loaded before anything is paged are made anew."""
    torch.set_num_threads(1)  # as the tests in this process: sums have one order then
    torch.manual_seed(0)
    plain = Model()
    paged = copy.deepcopy(plain)
    run, run_paged = torch.compile(plain), torch.compile(paged)
    for model, call in ((plain, run), (paged, run_paged)):
        model.eval()
        with torch.no_grad():
            call(IDS)
    offload(paged, "frames")
    check(plain, paged, run, run_paged)


def test_a_model_may_be_compiled_before_it_is_paged() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from python.dispatch import test_inductor as t; t.compiled_first()",
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
