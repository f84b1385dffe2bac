"""Charts, and rows of tensors that are alike."""

from __future__ import annotations

import importlib.util
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest

from penstock.errors import PenstockError
from penstock.report.alike import group_alike
from penstock.report.charts import ChartPoint, bars, write_chart
from python.support import MIB

POINTS = [
    ChartPoint(64 * MIB, 0, 0.5),
    ChartPoint(128 * MIB, 64 * MIB, 0.25),
    ChartPoint(256 * MIB, 256 * MIB, None),
]


def test_bars_are_as_long_as_passes_take() -> None:
    first, second, third = bars(POINTS)
    assert first.count("█") == 2 * second.count("█") > 0
    assert "0.5 s" in first
    assert third.endswith("?")
    assert bars(POINTS, plain=True)[0].count("#") == first.count("█")
    assert bars([]) == []
    assert bars([ChartPoint(1, 1, 0.0)])[0].endswith("0 s")


def test_a_chart_is_an_svg_with_every_point(tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    write_chart(path, POINTS, "a < b & c")
    root = ElementTree.parse(path).getroot()
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names.count("circle") == 2  # those whose seconds are known
    assert names.count("rect") == 1 + len(POINTS)
    texts = [element.text for element in root.iter() if element.text]
    assert "a < b & c" in texts
    assert "128.00 MiB" in texts
    write_chart(path, [], "empty")
    ElementTree.parse(path)


def test_a_png_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PenstockError, match=r"matplotlib.*\[plot\]"):
        write_chart(tmp_path / "chart.png", POINTS, "a")


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_a_chart_is_a_png(tmp_path: Path) -> None:
    write_chart(tmp_path / "chart.png", POINTS, "a")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


class Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def entry(name: str, *shape: int, dtype: str = "F32") -> Tensor:
    return Tensor(name, dtype, shape, 4 * math.prod(shape))


def test_tensors_that_differ_in_a_number_are_one_row() -> None:
    tensors = [entry(f"layers.{i}.mlp.{j}.weight", 4, 4) for i in range(12) for j in (0, 2)]
    tensors += [entry("layers.3.mlp.1.weight", 4), entry("head", 64, 64), entry("l2norm.bias", 4)]
    tensors += [entry("l3norm.bias", 4)]
    rows = group_alike(tensors)
    assert [(row.name, row.count) for row in rows] == [
        ("head", 1),
        ("layers.[0-11].mlp.[0,2].weight", 24),
        ("l2norm.bias", 1),
        ("l3norm.bias", 1),
        ("layers.3.mlp.1.weight", 1),
    ]
    assert sum(row.count for row in rows) == len(tensors)


def test_other_shapes_and_dtypes_are_other_rows() -> None:
    tensors = [entry("a.0.w", 2), entry("a.1.w", 3), entry("a.2.w", 2, dtype="I32")]
    assert [row.count for row in group_alike(tensors)] == [1, 1, 1]
    assert group_alike([]) == []
