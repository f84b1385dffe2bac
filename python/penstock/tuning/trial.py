"""One trial in this process: `python -m penstock.tuning.trial JSON`.

The last line of the output is one JSON value: the trial's figures, or why there are none. What
the setup itself prints goes to standard error.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from penstock.json_process import answer
from penstock.manager.manager import MemoryManager
from penstock.memory.devices import uses_cuda
from penstock.tuning.task import FIRST, Task

__all__ = ["main"]

_SCRIPT = "penstock_tuning_script"  # name of a script's module


class _UnusableError(Exception):
    """The setup cannot be called, whatever the settings are."""


def run(task: Task) -> dict[str, Any]:
    """Set up, warm up, and time passes.

    Returns
    -------
    dict
        `times`, `moved_bytes`, `peak_bytes`, `device`; or `unusable`, with the reason why no trial
        can run.
    """
    sys.path[:] = task.search_path
    try:
        setup = find_setup(task.setup)
        _require_arguments(setup, task)
        run_pass = setup(**task.given)
        if not callable(run_pass):
            raise _UnusableError(
                f"it has to return a function that runs one pass, not {type(run_pass).__name__}"
            )
    except _UnusableError as error:
        return {"unusable": str(error)}
    run_pass()  # the warm-up
    managers = find_managers()
    devices = {manager.device for manager in managers}
    loaded = _loaded_bytes(managers)
    times: list[float] = []
    while len(times) < task.passes:
        times.append(_timed(run_pass, devices))
        if task.limit is not None and len(times) == FIRST and min(times) > task.limit:
            break
    found: dict[str, Any] = {"times": times, "moved_bytes": None, "peak_bytes": None, "device": ""}
    if managers:
        found["moved_bytes"] = round((_loaded_bytes(managers) - loaded) / len(times))
        # Managers under a hard cap share one ledger.
        ledgers = {id(each.pager.budget): each.pager.budget for each in managers}
        found["peak_bytes"] = sum(ledger.stats().peak for ledger in ledgers.values())
        names = {each.pager.core_device.info().name for each in managers}
        found["device"] = ", ".join(sorted(names))
    return found


def find_setup(text: str) -> Callable[..., Any]:
    """Import what a text names.

    Raises
    ------
    _UnusableError
        If that fails, or it is no function.
    """
    where, _, name = text.rpartition(":")
    try:
        found: Any = _run_script(Path(where)) if where.endswith(".py") else _import(where)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise _UnusableError(f"{type(error).__name__}: {error}") from error
    if not callable(found):
        raise _UnusableError(f"it is no function, but {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _import(name: str) -> ModuleType:
    return importlib.import_module(name)


def _run_script(path: Path) -> ModuleType:
    """Run a file as a module that is not the main one, its neighbours importable."""
    spec = importlib.util.spec_from_file_location(_SCRIPT, path)
    assert spec is not None and spec.loader is not None  # by the ending of its name
    module = importlib.util.module_from_spec(spec)
    sys.modules[_SCRIPT] = module  # where dataclasses look for it
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _require_arguments(setup: Callable[..., Any], task: Task) -> None:
    with suppress(ValueError):  # not every callable tells
        signature = inspect.signature(setup)
        try:
            signature.bind(**task.given)
        except TypeError as error:
            raise _UnusableError(
                f"it is called with {', '.join(task.given)}, and has {signature}: {error}. "
                "Take **settings, and give them to the manager"
            ) from error


def find_managers() -> list[MemoryManager]:
    """Return the managers of this process, whoever made them: the setup need not tell."""
    # By type alone: asking objects of others for their class may run code of theirs.
    return [each for each in gc.get_objects() if issubclass(type(each), MemoryManager)]


def _loaded_bytes(managers: Iterable[MemoryManager]) -> int:
    return sum(manager.stats().loaded_bytes for manager in managers)


def _timed(run_pass: Callable[[], object], devices: Iterable[torch.device]) -> float:
    """Return the seconds of a pass, the devices synchronized around it."""
    _synchronize(devices)
    start = time.perf_counter()
    run_pass()
    _synchronize(devices)
    return time.perf_counter() - start


def _synchronize(devices: Iterable[torch.device]) -> None:
    if uses_cuda():
        torch.cuda.synchronize()
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> int:
    """Run the trial that the argument describes; return the exit code."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    # Where host memory runs out, the system ends this process, and not the one that tries settings.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # What anything here prints, in C too, must not stand where the answer does.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task = Task.from_json(text)
    return answer(lambda: run(task), to=answers)


if __name__ == "__main__":
    sys.exit(main())
