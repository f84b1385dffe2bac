#!/usr/bin/env python3
"""Print the rooms of the sources, what they import, and how long their files are.

    python tools/rooms.py [--check]

The order of the rooms is drawn in CONTRIBUTING.md; a room may import those to its right. Arrows are
all imports and includes, those for types alone too. With --check, ends with 1 where an arrow points
to the left, rooms or modules go in a circle, a file is too long, or a class keeps too much.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "penstock"
CSRC = ROOT / "csrc"
FACE = "penstock"  # the package's own __init__: the public names
GROUND = "ground"  # modules that lie beside the rooms
LONGEST = {"python": 400, "csrc": 450}  # lines of a file
WIDEST = 12  # attributes of a class that changes

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


@dataclass
class House:
    """Rooms, from the highest to the lowest, and the arrows between what is in them."""

    name: str
    groups: list[list[str]]  # rooms of a group do not know each other
    files: dict[str, Path]  # modules or files
    room_of: dict[str, str]
    arrows: dict[str, set[str]] = field(default_factory=dict)  # between these

    def rooms(self) -> list[str]:
        """List them."""
        return [room for group in self.groups for room in group]

    def rank(self, room: str) -> int:
        """Return how high a room lies; -1 where it is not drawn."""
        ranks = {room: -at for at, group in enumerate(self.groups) for room in group}
        return ranks[room] + len(self.groups) if room in ranks else -1

    def room_arrows(self) -> dict[str, set[str]]:
        """Return which rooms each room imports."""
        found: dict[str, set[str]] = {
            room: set() for room in {*self.rooms(), *self.room_of.values()}
        }
        for each, others in self.arrows.items():
            found[self.room_of[each]] |= {self.room_of[other] for other in others}
        return {room: others - {room} for room, others in found.items()}

    def upward(self) -> list[str]:
        """List the arrows that point to a room beside or above."""
        return [
            f"{each} -> {other}"
            for each, others in sorted(self.arrows.items())
            for other in sorted(others)
            if self.room_of[each] != self.room_of[other]
            and self.rank(self.room_of[other]) >= self.rank(self.room_of[each])
        ]

    def too_long(self) -> list[str]:
        """List the files that are too long, with their lines."""
        return [
            f"{path.relative_to(ROOT)}: {lines}"
            for path in self.files.values()
            if (lines := length(path)) > LONGEST[self.name]
        ]


def length(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text().splitlines())


def circles(arrows: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Return what goes in circles: sets of which each member reaches every other (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(at: str) -> None:
        index[at] = low[at] = len(index)
        stack.append(at)
        for other in arrows.get(at, ()):
            if other not in index:
                visit(other)
                low[at] = min(low[at], low[other])
            elif other in stack:
                low[at] = min(low[at], index[other])
        if low[at] == index[at]:
            group = set(stack[stack.index(at) :])
            del stack[stack.index(at) :]
            if len(group) > 1 or at in arrows.get(at, ()):
                found.append(group)

    for at in arrows:
        if at not in index:
            visit(at)
    return found


def drawn(title: str) -> list[list[str]]:
    """Read the groups of rooms that CONTRIBUTING.md draws under a title, from left to right."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"^{title} +(\S.*?)^(?:\S|```)", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise SystemExit(f"CONTRIBUTING.md draws no rooms of {title}")
    return [re.findall(r"[\w/]+", group) for group in found[1].split("->")]


def python_house() -> House:
    """Read the package."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(("penstock", *parts)).removesuffix(".__init__")] = path
    files.pop("penstock.__main__")  # a line that calls the command
    room_of = {}
    for module, path in files.items():
        folders = path.relative_to(PACKAGE).parts[:-1]
        room_of[module] = folders[0] if folders else FACE if module == FACE else GROUND
    house = House("python", drawn("python"), files, room_of)
    house.arrows = {module: set(imported(module, files)) for module in files}
    return house


def imported(module: str, files: Mapping[str, Path]) -> Iterable[str]:
    """Yield the modules of ours that a module imports, when it runs or for types."""
    for node in ast.walk(ast.parse(files[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                up = node.level - (files[module].name == "__init__.py")
                base = ".".join((*module.split(".")[: -up or None], base)).rstrip(".")
            names = [f"{base}.{each.name}" for each in node.names]
        for name in names:
            if name.split(".")[0] != "penstock" or name.startswith("penstock._core"):
                continue
            while name not in files:  # what is imported of a module
                name = name.rpartition(".")[0]
            if name != module:
                yield name


def widths(files: Mapping[str, Path]) -> dict[str, int]:
    """Count the attributes that each class sets on itself; frozen records set none."""
    found = {}
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                stored = {
                    each.attr
                    for each in ast.walk(node)
                    if isinstance(each, ast.Attribute)
                    and isinstance(each.ctx, ast.Store)
                    and isinstance(each.value, ast.Name)
                    and each.value.id == "self"
                }
                found[f"{module}.{node.name}"] = len(stored)
    return found


def csrc_house() -> House:
    """Read the core."""
    paths = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".hpp", ".cpp", ".cu")]
    files = {path.relative_to(CSRC).as_posix(): path for path in paths}
    room_of = {name: name.rpartition("/")[0] for name in files}
    house = House("csrc", drawn("csrc"), files, room_of)
    for name, path in files.items():
        house.arrows[name] = {each for each in _INCLUDE.findall(path.read_text()) if each in files}
    return house


def report(house: House) -> list[str]:
    """Print a house; return what is wrong with it."""
    arrows = house.room_arrows()
    loops = [*circles(arrows), *circles(house.arrows)]
    upward, too_long = house.upward(), house.too_long()
    wide = {}
    if house.name == "python":
        counts = widths(house.files)
        wide = {name: count for name, count in counts.items() if count > WIDEST}
        widest = max(counts, key=lambda name: counts[name])
        print(f"the class with most attributes: {widest}, {counts[widest]}")
    unknown = sorted(set(house.room_of.values()) - set(house.rooms()))
    count = sum(map(len, arrows.values()))
    longest = max(house.files.values(), key=length)
    lengths = sorted(map(length, house.files.values()))
    print(
        f"{house.name}: {len(house.rooms())} rooms, {len(house.files)} files, {count} arrows "
        f"between rooms, {len(loops)} circles, {len(upward)} upward arrows\n"
        f"longest file {longest.relative_to(ROOT)} with {length(longest)} lines, median "
        f"{lengths[len(lengths) // 2]}"
    )
    for room in house.rooms():
        own = [house.files[name] for name, its in house.room_of.items() if its == room]
        lines = max(map(length, own), default=0)
        others = ", ".join(other for other in house.rooms() if other in arrows[room]) or "-"
        print(f"  {room:<16} {len(own):3} files, up to {lines:3} lines  -> {others}")
    return [
        *(f"in a circle: {', '.join(sorted(loop))}" for loop in loops),
        *(f"points upward: {arrow}" for arrow in upward),
        *(f"too long: {name}" for name in too_long),
        *(f"too many attributes: {name} ({count})" for name, count in wide.items()),
        *(f"not drawn in CONTRIBUTING.md: {room}" for room in unknown),
    ]


def main(arguments: list[str]) -> int:
    """Print both houses, then what is wrong with them."""
    wrong = [*report(python_house()), *report(csrc_house())]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong and "--check" in arguments else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
