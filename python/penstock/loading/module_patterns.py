"""Patterns of module names, and the pages that such modules lie on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from penstock import _core
from penstock.errors import CapExceededError, ModelError
from penstock.loading.layout import Placement
from penstock.memory.page_rules import PageRules
from penstock.sizes import format_bytes

__all__ = ["NamePattern", "find_page_rules", "matches", "select_modules"]

NamePattern = str | re.Pattern[str]
"""What names are chosen by: a text as `fnmatch` has it, or a regular expression for all of it."""


def matches(name: str, pattern: NamePattern) -> bool:
    """Whether a pattern matches a name, as a whole; `*` of a text matches dots too."""
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    return pattern.fullmatch(name) is not None


def select_modules(
    module: nn.Module, which: NamePattern | type[nn.Module]
) -> list[tuple[str, nn.Module]]:
    """List the modules of a model, each once, by a pattern of their names or by class."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, which) if isinstance(which, type) else matches(name, which):
            found.setdefault(id(part), (name, part))
    return list(found.values())


def _find_modules(model: str, module: nn.Module, pattern: NamePattern) -> list[nn.Module]:
    found = select_modules(module, pattern)
    if not found:
        named = list(module.named_modules())
        some = ", ".join(repr(name) for name, _ in named[1:6]) or "none"
        raise ModelError(
            f"the pattern {pattern!r} matches no module of model {model!r}; its modules are {some}"
            + (", ..." if len(named) > 6 else "")
        )
    return [part for _, part in found]


def find_page_rules(
    model: str,
    module: nn.Module,
    placements: Sequence[Placement],
    *,
    pin: Sequence[NamePattern],
    stream: Sequence[NamePattern],
    page_size: int,
    cap: int,
) -> PageRules:
    """Say which pages modules lie on that are to stay, or to stream.

    What is in a module goes with it. Pages that it shares with others stay with it, but do not
    stream with it.

    Parameters
    ----------
    pin, stream
        Patterns of module names.
    page_size, cap
        In bytes.

    Raises
    ------
    ModelError
        If a pattern matches nothing, or a module is to stay and to stream.
    CapExceededError
        If what is to stay does not fit under the cap, beside the largest module.
    """
    kept = _modules_in(model, module, pin)
    streamed = _modules_in(model, module, stream)
    if both := [name for name, part in module.named_modules() if id(part) in kept & streamed]:
        raise ModelError(f"module {both[0]!r} of model {model!r} cannot be pinned and streamed")
    kept_pages: set[int] = set()
    streamed_pages: set[int] = set()
    others: set[int] = set()
    by_module: dict[int, set[int]] = {}
    for placement in placements:
        if placement.nbytes == 0:
            continue
        last = (placement.offset + placement.nbytes - 1) // page_size
        pages = range(placement.offset // page_size, last + 1)
        owners = {id(owner) for owner, _ in placement.slot.owners}
        for owner in owners:
            by_module.setdefault(owner, set()).update(pages)
        if owners & kept:
            kept_pages.update(pages)
        (streamed_pages if owners <= streamed else others).update(pages)
    rules = PageRules(tuple(sorted(kept_pages)), tuple(sorted(streamed_pages - others)))
    if rules.keep:
        _require_room(model, rules, list(by_module.values()), page_size, cap)
    return rules


def _modules_in(model: str, module: nn.Module, patterns: Sequence[NamePattern]) -> set[int]:
    found = (each for pattern in patterns for each in _find_modules(model, module, pattern))
    return {id(part) for each in found for part in each.modules()}


def _require_room(
    model: str, rules: PageRules, modules: Sequence[set[int]], page_size: int, cap: int
) -> None:
    steps = [sorted(pages) for pages in modules]
    page_count = 1 + max(page for pages in steps for page in pages)
    needed = _core.least_frames(page_count, steps, rules.keep) * page_size
    if needed <= cap // page_size * page_size:
        return
    kept = len(rules.keep) * page_size
    raise CapExceededError(
        f"model {model!r} cannot have {format_bytes(kept)} pinned: with the largest of its other "
        f"modules that takes {format_bytes(needed)}, and the cap is {format_bytes(cap)}; pin less, "
        "or raise the cap",
        requested=needed,
        cap=cap,
    )
