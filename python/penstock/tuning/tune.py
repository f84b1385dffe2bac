"""Trying settings one after the other, each in a process of its own."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import Unpack

from penstock.arguments import checked
from penstock.errors import PenstockError
from penstock.json_process import run_for_json
from penstock.manager.settings import OptionsBesideCap, Settings
from penstock.report.progress import step_bar
from penstock.sizes import parse_bytes, parse_cap
from penstock.tuning.candidates import default_candidates
from penstock.tuning.task import FIRST, Task
from penstock.tuning.tuned import Trial, Tuned

__all__ = ["tune"]

_PROCESS = "penstock.tuning.trial"
_LEAST_PASSES = 3  # of which there is a median


@checked
def tune(
    setup: Callable[..., Callable[[], object]] | str,
    cap: int | str | None = None,
    *,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
    passes: int = 5,
    slower: float = 1.3,
    pause: float = 1.0,
    time_limit: float = 600.0,
    tell: Callable[[Tuned], object] | None = None,
    **settings: Unpack[OptionsBesideCap],
) -> Tuned:
    """Find out which settings of a manager are fastest here, by running passes with each.

    Each trial has a process of its own: one that crashes, hangs, raises or runs out of memory is a
    row with the reason, and nothing else. It calls `setup`, runs one pass to warm up, and times
    passes, the device synchronized around each. Nothing else should run on the machine meanwhile.

    Parameters
    ----------
    setup
        A function of a module or a script, or a text: `"module:function"`,
        `"path/to/script.py:function"`. It is called with the settings of a trial by keyword, `cap`
        and `arguments` among them, and returns a function without arguments that runs one pass. It
        should take `**settings` and give them to `MemoryManager`, `offload` or a front end.
    cap
        As `MemoryManager` has it. None leaves it to `setup`, which may set a hard cap.
    candidates
        Settings to try, each as keywords of `MemoryManager`. If omitted: none, then all
        combinations of `pager`, `host` and `page_size`, but for what `settings` has.
    arguments
        What `setup` is given besides, by keyword: texts, numbers, lists and the like.
    passes
        To time in a trial, three at least; the median counts.
    slower
        A trial ends where the least of its first two timed passes takes more than so many times as
        long as that of the best trial so far.
    pause
        Seconds between two trials.
    time_limit
        Seconds for a trial, setup included, after which its process is ended.
    tell
        Called after each trial, with everything so far.
    settings
        `device` and all others of `MemoryManager`, the same for all trials; a `policy` or a device
        of the core cannot travel to their processes. `progress` is about a bar that is shown here.

    Returns
    -------
    Tuned
        `MemoryManager(**tuned.settings)` has the best; `save` keeps it.

    Raises
    ------
    ValueError
        If a setting is not known, a number makes no sense, or `setup` cannot be found, does not
        take the settings, or returns no function.
    TypeError
        If something is of a wrong type, or cannot travel to another process.
    PenstockError
        If it is called by what a trial runs: a script has to call it under
        `if __name__ == "__main__":`.
    """
    _require_numbers(passes, slower, pause, time_limit)
    if cap is not None:
        parse_cap(cap, sys.maxsize)  # which memory it is a part of, each trial knows
    where = _where(setup)
    progress = settings.pop("progress", None)
    given = dict(arguments or {})
    common = _plain("settings", {**({} if cap is None else {"cap": cap}), **settings})
    tried = default_candidates(common) if candidates is None else list(candidates)
    if not tried:
        raise ValueError("tune: candidates is empty: give settings to try, or leave it out")
    tried = [_candidate(common, candidate) for candidate in tried]
    for name in given:
        if name == "cap" or name in OptionsBesideCap.__annotations__:
            raise ValueError(f"tune: {name!r} is a setting: give it as such, not in arguments")
    given = _plain("arguments", given)
    if _in_trial():
        raise PenstockError(
            "penstock.tune was called by what a trial of it runs: in a script, put the call under "
            'if __name__ == "__main__":'
        )
    result = Tuned(where, common, "", ())
    with step_bar("tuning", len(tried), show=progress) as told:
        for number, candidate in enumerate(tried):
            if number:
                time.sleep(pause)
            if told is not None:
                told(number, _title(candidate, result.best))
            limit = None if result.best is None else slower * min(result.best.times[:FIRST])
            keywords = {**given, **common, **candidate}
            task = Task(where, keywords, passes, limit, list(sys.path))
            found = run_for_json([sys.executable, "-m", _PROCESS, task.to_json()], time_limit)
            if "unusable" in found:
                raise ValueError(f"tune: setup {where}: {found['unusable']}")
            trial = _trial(candidate, found, passes, slower)
            device = result.device or found.get("device", "")
            result = Tuned(where, common, device, (*result.trials, trial))
            if tell is not None:
                tell(result)
    return result


def _trial(
    candidate: Mapping[str, Any], found: Mapping[str, Any], passes: int, slower: float
) -> Trial:
    """Make a row of what a trial's process has answered."""
    if "failed" in found:
        reason = found["failed"]
        if "SIGKILL" in reason:
            reason += " (the system ends processes so where host memory is short)"
        return Trial(candidate, reason=reason)
    times = tuple(found["times"])
    reason = ""
    if len(times) < passes:
        reason = f"ended after {len(times)} passes: over {slower:g} times the best"
    return Trial(candidate, times, found["moved_bytes"], found["peak_bytes"], reason)


def _title(candidate: Mapping[str, Any], best: Trial | None) -> str:
    tried = ", ".join(map(str, candidate.values())) or "as chosen without settings"
    return tried if best is None else f"{tried}; best {best.seconds:.4g} s"


def _where(setup: Callable[..., object] | str) -> str:
    """Return the text by which another process finds a function.

    Raises
    ------
    ValueError
        If none does.
    """
    if isinstance(setup, str):
        where, _, name = setup.rpartition(":")
        if not where or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(
                f'tune: setup {setup!r} names no function: write "module:function" or '
                '"path/to/script.py:function"'
            )
        return setup
    module, name = getattr(setup, "__module__", None), getattr(setup, "__qualname__", "")
    if module is None or not name or "<" in name:
        raise ValueError(
            f"tune: setup {name or repr(setup)} cannot be found by another process: define it "
            "with def, at the top level of a module or a script"
        )
    if module != "__main__":
        return f"{module}:{name}"
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return f"{spec.name}:{name}"
    file = getattr(main, "__file__", None)
    if file is None or not file.endswith(".py"):
        raise ValueError(
            f"tune: setup {name} was typed in, so another process cannot find it: put it into a "
            'file, and pass "path/to/script.py:function"'
        )
    return f"{file}:{name}"


def _candidate(common: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Return a candidate that can travel, checked as a manager would."""
    if not isinstance(candidate, Mapping):
        raise TypeError(
            f"tune: candidates is a list of settings by name, and {candidate!r:.40} is none"
        )
    _check_candidate(**candidate)
    plain = _plain("candidates", candidate)
    merged = Settings(**{**common, **plain})
    if merged.page_size is not None:
        parse_bytes(merged.page_size)
    return plain


@checked
def _check_candidate(**settings: Unpack[OptionsBesideCap]) -> None:
    """Refuse what is no setting; the decorator does it."""


def _plain(what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that arrive as they are in another process."""
    found = {}
    for name, value in given.items():
        plain = str(value) if isinstance(value, torch.device) else value
        try:
            arrived = json.loads(json.dumps(plain))
        except (TypeError, ValueError):
            arrived = None
        if arrived is None and plain is not None:
            raise TypeError(
                f"tune: {name} in {what} cannot travel to the process of a trial: "
                f"{type(value).__name__} is no text, number, truth or list of these; make it in "
                "setup"
            )
        found[name] = arrived
    return found


def _require_numbers(passes: int, slower: float, pause: float, time_limit: float) -> None:
    if passes < _LEAST_PASSES:
        raise ValueError(f"tune: passes is {_LEAST_PASSES} or more, not {passes}")
    if not slower >= 1:
        raise ValueError(f"tune: slower is 1 or more, not {slower}")
    if not 0 <= pause < math.inf:
        raise ValueError(f"tune: pause is a number of seconds, not {pause}")
    if not 0 < time_limit < math.inf:
        raise ValueError(f"tune: time_limit is a number of seconds, not {time_limit}")


def _in_trial() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name == _PROCESS
