"""Who may know whom: the rooms of csrc and the modules in Python, and how long a file may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
LONGEST_FILE = 450  # lines

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


@pytest.mark.parametrize("path", FILES, ids=name)
def test_room_includes_only_what_it_may_know(path: Path) -> None:
    room = path.relative_to(CSRC).parts[0]
    for ours, target in includes(path):
        if ours:
            assert (CSRC / target).is_file(), f'"{target}" is not "room/file" of csrc'
            other = target.split("/")[0]
            assert other in MAY_INCLUDE[room] | {room}, f"{room} includes {target}"
            if other != room:
                assert target == ONLY_HEADER.get(room, target), f"{room} includes {target}"
        else:
            assert not (CSRC / target).exists(), f"<{target}> is ours: it takes quotes"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_foreign_headers_stay_in_their_rooms(path: Path) -> None:
    room = path.relative_to(CSRC).parts[0]
    targets = [target for _, target in includes(path)]
    if room != TORCH_ROOM:
        assert not [target for target in targets if TORCH.match(target)]
    if room not in PYTHON_ROOMS:
        assert not [target for target in targets if PYTHON.match(target)]
    if not (room == "device" and path.name.startswith("cuda_")):
        assert not [target for target in targets if CUDA.search(target)]


def test_what_torchs_room_includes_includes_nothing_of_ours() -> None:
    """It is compiled without the rest: what it shares with the core is a table in plain C++."""
    (header,) = ONLY_HEADER.values()
    found = includes(CSRC / header)
    assert found
    assert not [target for ours, target in found if ours or PYTHON.match(target)]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_is_not_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", HEADERS, ids=name)
def test_header_opens_with_prose_and_is_included_once(path: Path) -> None:
    lines = path.read_text().splitlines()
    prose = lines[: lines.index("#pragma once")]
    assert prose, "a paragraph that says what this is comes first"
    assert all(line.startswith("//") for line in prose)
    assert re.search(r"[a-z]{3,}.*\.", " ".join(prose)), "a sentence, not a label"


# ---- Python ------------------------------------------------------------------------------------


def python_ranks() -> dict[str, int]:
    """Read the graph of modules in CONTRIBUTING.md: the higher a rank, the farther to the left."""
    found = re.search(r"^python +(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert found
    groups = [re.findall(r"\w+", group) for group in found[1].split("->")]
    return {module: -i for i, group in enumerate(groups) for module in group}


RANKS = python_ranks()
SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0][0] != "_"
)


def imports(path: Path) -> set[str]:
    """Give the modules of ours that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named = [f"{node.module}.{each.name}" for node in froms for each in node.names]
    parts = [module.split(".") for module in named]
    return {part[1] for part in parts if part[0] == "penstock"} - {"_core"}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_is_in_the_graph() -> None:
    assert {module_of(path) for path in SOURCES} == set(RANKS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_imports_only_what_it_may_know(path: Path) -> None:
    own = module_of(path)
    back = {other for other in imports(path) - {own} if RANKS[other] >= RANKS[own]}
    assert not back, f"{own} imports {back}, which CONTRIBUTING.md has beside it or to its left"
