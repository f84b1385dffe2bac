"""Estimates of directories beside what the front ends make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import penstock
from python.support import PAGERS, same_bits

transformers = pytest.importorskip("transformers")
front_end = pytest.importorskip("penstock.integrations.transformers")

from python.integrations.transformers_zoo import kinds, save  # noqa: E402  transformers is there

RATES = {"link": "10GB/s", "disk": "1GB/s", "compute": "1TFLOPS"}
KINDS = kinds()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(kind, tmp_path_factory.mktemp("model")) for name, kind in KINDS.items()}


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("name", KINDS)
def test_a_model_runs_under_the_least_cap_of_its_directory(
    name: str, pager: str, saved: dict[str, Path]
) -> None:
    """From names alone: merged experts, ties, fused attention and convolutions among them."""
    how = {"device": "cpu", "pager": pager, "page_size": "64KiB"}
    found = penstock.estimate(saved[name], **how, **RATES)
    assert found.fits
    model = front_end.load(saved[name], found.least_cap, **how)
    plain = getattr(transformers, KINDS[name].model).from_pretrained(saved[name])
    with torch.no_grad():
        assert same_bits(KINDS[name].run(model), KINDS[name].run(plain))
    stats = penstock.manager_of(model).stats()
    assert stats.peak <= found.least_cap < found.nbytes
    assert found.nbytes >= stats.models["model"].nbytes
