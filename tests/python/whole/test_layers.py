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

# A room may include itself and the rooms named here.
MAY_INCLUDE = {
    "error": set(),
    "threading": {"error"},
    "device": {"error", "threading"},
    "budget": {"error", "threading"},
    "page_table": {"error"},
    "planner": {"page_table", "error"},
    "frame_pool": {"budget", "device", "error"},
    "outside": {"frame_pool", "budget", "device", "threading", "error"},
    "allocator": {"frame_pool", "budget", "device", "threading", "error"},
    "torch_allocator": {"allocator", "frame_pool", "budget", "device", "threading", "error"},
    "loader": {"device", "error", "threading"},
    "host_tier": {"loader", "page_table", "device", "error", "threading"},
    "pager": {
        "host_tier",
        "loader",
        "frame_pool",
        "page_table",
        "budget",
        "device",
        "threading",
        "error",
    },
    "streamer": {"pager", "planner", "page_table", "device", "threading", "error"},
    "dlpack": {"pager", "device", "error"},
    "paging": {
        "streamer",
        "pager",
        "planner",
        "page_table",
        "device",
        "threading",
        "error",
    },
}
MAY_INCLUDE["bindings"] = {*MAY_INCLUDE}
# Built by itself, against the installed torch: it knows one header, and nobody knows it.
TORCH_ROOM = "torch_dispatch"
MAY_INCLUDE[TORCH_ROOM] = {"paging"}
ONLY_HEADER = {TORCH_ROOM: "paging/paging_api.hpp"}
PYTHON_ROOMS = {"bindings", "dlpack", TORCH_ROOM}

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


def test_every_room_is_in_the_graph() -> None:
    assert {path.relative_to(CSRC).parts[0] for path in FILES} == set(MAY_INCLUDE)


def test_the_graph_has_no_cycle() -> None:
    ranks: dict[str, int] = {}
    while len(ranks) < len(MAY_INCLUDE):
        free = [room for room in MAY_INCLUDE if room not in ranks and MAY_INCLUDE[room] <= {*ranks}]
        assert free, f"rooms in a cycle: {set(MAY_INCLUDE) - set(ranks)}"
        ranks.update(dict.fromkeys(free, len(ranks)))


def test_rooms_include_only_what_they_may_know() -> None:
    for path in FILES:
        room = path.relative_to(CSRC).parts[0]
        for ours, target in includes(path):
            if ours:
                assert (CSRC / target).is_file(), f'"{target}" is not "room/file" of csrc'
                other = target.split("/")[0]
                assert other in MAY_INCLUDE[room] | {room}, f"{name(path)} includes {target}"
                if other != room:
                    only = ONLY_HEADER.get(room, target)
                    assert target == only, f"{name(path)} includes {target}"
            else:
                assert not (CSRC / target).exists(), f"<{target}> is ours: it takes quotes"


def test_foreign_headers_stay_in_their_rooms() -> None:
    for path in FILES:
        room = path.relative_to(CSRC).parts[0]
        targets = [target for _, target in includes(path)]
        if room != TORCH_ROOM:
            assert not [target for target in targets if TORCH.match(target)], name(path)
        if room not in PYTHON_ROOMS:
            assert not [target for target in targets if PYTHON.match(target)], name(path)
        if not (room == "device" and path.name.startswith("cuda_")):
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
