"""Who may know whom: the rooms of csrc and the modules in Python, and how long a file may be."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "penstock"

# Built by itself, against the installed torch: it knows one header, and nobody knows it.
TORCH_ROOM = "torch_dispatch"
ONLY_HEADER = {TORCH_ROOM: "paging/paging_api.hpp"}
PYTHON_ROOMS = {"bindings", "dlpack", TORCH_ROOM}
# What decides, without a device, a clock or a lock.
PURE_ROOMS = {"planner", "schedule"}

INCLUDE = re.compile(r"^\s*#\s*include\s*([<\"])([^>\"]+)[>\"]", re.MULTILINE)
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
PYTHON = re.compile(r"^(pybind11/|Python\.h$)")
CUDA = re.compile(r"^(cuda|nv|cu[A-Z]|driver_types)|\.cuh$")

FILES = sorted(path for pattern in ("*.hpp", "*.cpp", "*.cu") for path in CSRC.rglob(pattern))
HEADERS = [path for path in FILES if path.suffix == ".hpp"]


def name(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def includes(path: Path) -> list[tuple[bool, str]]:
    """Give each include of a file: whether it is one in quotes, and what it names."""
    return [(quote == '"', target) for quote, target in INCLUDE.findall(path.read_text())]


def room_of(path: Path) -> str:
    return path.relative_to(CSRC).parent.as_posix()


def test_includes_name_a_room_and_a_file() -> None:
    """Who may include whom is drawn in CONTRIBUTING.md; see the house below."""
    for path in FILES:
        for ours, target in includes(path):
            if ours:
                assert (CSRC / target).is_file(), f'"{target}" is not "room/file" of csrc'
                other, only = Path(target).parent.as_posix(), ONLY_HEADER.get(room_of(path), target)
                assert other == room_of(path) or target == only, f"{name(path)} includes {target}"
                assert other != TORCH_ROOM or room_of(path) == TORCH_ROOM, name(path)
            else:
                assert not (CSRC / target).exists(), f"<{target}> is ours: it takes quotes"


def test_what_decides_knows_no_device() -> None:
    for path in FILES:
        if room_of(path) in PURE_ROOMS:
            others = {Path(target).parent.as_posix() for ours, target in includes(path) if ours}
            assert others <= {*PURE_ROOMS, "error"}, name(path)


def test_foreign_headers_stay_in_their_rooms() -> None:
    for path in FILES:
        room = room_of(path)
        targets = [target for _, target in includes(path)]
        if room != TORCH_ROOM:
            assert not [target for target in targets if TORCH.match(target)], name(path)
        if room not in PYTHON_ROOMS:
            assert not [target for target in targets if PYTHON.match(target)], name(path)
        if room != "device/cuda":
            assert not [target for target in targets if CUDA.search(target)], name(path)


def test_what_torchs_room_includes_includes_nothing_of_ours() -> None:
    """It is compiled without the rest: what it shares with the core is a table in plain C++."""
    (header,) = ONLY_HEADER.values()
    found = includes(CSRC / header)
    assert found
    assert not [target for ours, target in found if ours or PYTHON.match(target)]


def test_headers_open_with_prose_and_are_included_once() -> None:
    for path in HEADERS:
        lines = path.read_text().splitlines()
        prose = lines[: lines.index("#pragma once")]
        assert prose, f"{name(path)}: a paragraph that says what this is comes first"
        assert all(line.startswith("//") for line in prose), name(path)
        assert re.search(r"[a-z]{3,}.*\.", " ".join(prose)), f"{name(path)}: a sentence"


# ---- Python ------------------------------------------------------------------------------------


def house(name: str) -> Any:
    """Read the sources as `make rooms` does."""
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tools" / "rooms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rooms"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module, getattr(module, f"{name}_house")()


@pytest.mark.parametrize("name", ["python", "csrc"])
def test_arrows_point_one_way_and_files_are_short(name: str) -> None:
    rooms, found = house(name)
    assert set(found.room_of.values()) == set(found.rooms())
    assert found.upward() == []
    assert rooms.circles(found.room_arrows()) == rooms.circles(found.arrows) == []
    assert found.too_long() == []
    assert rooms.report(found) == []


def test_arrows_are_found_wherever_an_import_stands(tmp_path: Path) -> None:
    rooms, found = house("python")
    text = """
        import penstock.memory.pager
        from penstock import errors, _core
        if TYPE_CHECKING:
            from penstock.cap.hard_cap import HardCap
        def f():
            from penstock.checkpoint import open_checkpoint
            from ..run.hooks import CallHooks
    """
    path = tmp_path / "new.py"
    path.write_text(textwrap.dedent(text))
    found.files["penstock.memory.new"] = path
    assert set(rooms.imported("penstock.memory.new", found.files)) == {
        "penstock.memory.pager",
        "penstock.errors",
        "penstock.cap.hard_cap",
        "penstock.checkpoint",
        "penstock.run.hooks",
    }
    found.arrows = {"penstock.memory.new": {"penstock.cap.hard_cap", "penstock.errors"}}
    found.room_of["penstock.memory.new"] = "memory"
    assert found.upward() == ["penstock.memory.new -> penstock.cap.hard_cap"]
    assert rooms.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_each_room_opens_with_prose_on_what_it_may_import() -> None:
    _, found = house("python")
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    for folder in sorted(folders):
        prose = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        for word in ("ay import", "hread"):
            assert word in " ".join(prose.split()), f"{folder.name}: imports, threads"
    assert {folder.name for folder in folders} == set(found.rooms()) - {"penstock", "ground"}


def test_what_newcomers_are_told_is_there() -> None:
    text = (ROOT / "docs" / "finding-your-way.md").read_text()
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)+)`", text)
    assert len(named) > 10
    for name in named:
        places = [ROOT / name, PACKAGE / name, PACKAGE / f"{name}.py"]
        assert any(place.exists() for place in places), name
