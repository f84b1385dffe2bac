"""What gets at paged memory beside torch's dispatcher is given copies, or refused."""

import copy
import threading
import time

import pytest
import torch
from torch import nn

import penstock
from penstock.dispatch import torch_dispatch
from penstock.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")


def two(pager: str) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(128, 128) for _ in range(12)))
    paged = offload(copy.deepcopy(plain), pager)
    return plain, paged


def offload(model: nn.Module, pager: str) -> nn.Module:
    return penstock.offload(
        model, cap="320KiB", device="cpu", pager=pager, page_size="64KiB", verify=True
    )


def use_others(model: nn.Module) -> None:
    """Have other pages take the places of those that were read."""
    for parameter in model.parameters():
        parameter.sum()


@pytest.fixture(params=["managed", "frames"])
def pager(request: pytest.FixtureRequest) -> str:
    return request.param


def test_sparse_tensors_of_weights_keep_their_values(pager: str) -> None:
    plain, paged = two(pager)
    places, rows = torch.arange(128).repeat(2, 1), torch.arange(129)
    x = torch.randn(128, 1)
    results = []
    for model in (plain, paged):
        w = model[5].weight
        by_places = torch.sparse_coo_tensor(places, w[0], (128, 128))
        by_rows = torch.sparse_csr_tensor(rows, places[0], w.detach()[1], (128, 128))
        use_others(model)
        results.append((by_places.to_dense(), by_rows @ x))
        (by_places.to_dense() * x).sum().backward()
    assert all(map(torch.equal, *results))
    assert torch.equal(plain[5].weight.grad, paged[5].weight.grad)


def test_an_ordinary_tensor_does_not_take_over_paged_memory(pager: str) -> None:
    _, paged = two(pager)
    ordinary = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"cannot take over .* use the paged tensor"):
        ordinary.set_(paged[5].weight.detach())
    assert ordinary.numel() == 0


def test_a_dlpack_capsule_has_a_copy(pager: str) -> None:
    plain, paged = two(pager)
    capsule = torch.utils.dlpack.to_dlpack(paged[5].weight.detach())
    use_others(paged)
    assert torch.equal(torch.utils.dlpack.from_dlpack(capsule), plain[5].weight)


def test_ties_live_on_in_copies_of_a_state_dict(pager: str) -> None:
    _, paged = two(pager)
    paged[1].weight = paged[0].weight
    copied = copy.deepcopy(paged.state_dict())
    assert not any(torch_dispatch.is_keyed(value) for value in copied.values())
    copied["0.weight"].zero_()
    assert torch.equal(copied["1.weight"], torch.zeros(128, 128))
    assert paged[0].weight.abs().sum() > 0


@pytest.mark.parametrize("kind", ["expanded", "with gaps"])
def test_weights_keep_their_strides(pager: str, kind: str) -> None:
    model = nn.Module()
    made = (
        torch.randn(1, 128).expand(40, 128) if kind == "expanded" else torch.randn(80, 80)[::2, ::3]
    )
    model.w = nn.Parameter(made)
    strides, values = made.stride(), made.clone()
    offload(model, pager)
    assert model.w.stride() == strides
    assert torch.equal(model.w, values)
    penstock.restore(model)
    assert model.w.stride() == strides
    assert torch.equal(model.w, values)


def test_conjugate_weights_are_refused(pager: str) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(9, dtype=torch.cfloat).conj())
    values = model.w.detach().clone()
    with pytest.raises(ModelError, match="'w' is a conjugate or negative view"):
        offload(model, pager)
    assert torch.equal(model.w, values)


def call_until(
    model: nn.Module, x: torch.Tensor, stop: threading.Event, failed: list[Exception]
) -> None:
    try:
        with torch.no_grad():
            while not stop.is_set():
                model(x)
    except Exception as error:
        failed.append(error)


def test_a_model_is_restored_while_threads_run_it(pager: str) -> None:
    """Who tells of a pass waits for no thread that waits for Python's lock."""
    x = torch.randn(2, 128)
    for _ in range(4):
        _, paged = two(pager)
        stop = threading.Event()
        failed: list[Exception] = []

        arguments = (paged, x, stop, failed)
        threads = [
            threading.Thread(target=call_until, args=arguments, daemon=True) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        penstock.restore(paged)
        stop.set()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert failed == []
