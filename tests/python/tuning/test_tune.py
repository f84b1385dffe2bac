"""Tuning: trials cannot hurt each other, the best is found, kept and taken."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock import PenstockError, Trial, Tuned, tune
from penstock.report.progress import step_bar
from penstock.tuning.candidates import default_candidates
from penstock.tuning.task import Task
from python.support import KIB
from python.tuning import setups
from python.tuning.setups import EXITS, FAST, KILLED, NO_MEMORY, QUITS, REFUSED, SLOW

GOOD = {"times": [1.0, 1.0, 1.0], "moved_bytes": 5, "peak_bytes": 3, "device": "a device"}
TUNED = Tuned(
    "m:f",
    {"cap": "1MiB", "device": "cpu"},
    "host memory",
    (
        Trial({}, (3.0, 1.0, 2.0), 10, 20),
        Trial({"page_size": "64KiB"}, (1.0, 1.5, 9.0), 10, 20),
        Trial({"pager": "managed"}, (0.1, 0.1), 10, 20, "ended after 2 passes"),
        Trial({"host": "stream"}, reason="exit code 1"),
    ),
)


class Processes:
    """Answers in place of the processes of trials, and keeps what they would have been told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[Task] = []
        self.answers: list[dict[str, Any]] = []
        monkeypatch.setattr("penstock.tuning.tune.run_for_json", self.answer)

    def answer(self, command: Sequence[str], time_limit: float) -> dict[str, Any]:
        self.tasks.append(Task.from_json(command[-1]))
        return self.answers.pop(0) if self.answers else GOOD


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def sizes(*page_sizes: int | str) -> list[dict[str, int | str]]:
    return [{"page_size": each} for each in page_sizes]


# ---- processes of their own --------------------------------------------------------------------


def test_what_goes_wrong_in_a_trial_is_a_row_and_the_others_go_on() -> None:
    told: list[int] = []
    tried = (SLOW, QUITS, KILLED, REFUSED, NO_MEMORY, EXITS, FAST, SLOW)
    found = tune(
        setups.behave,
        candidates=sizes(*tried),
        passes=3,
        pause=0,
        tell=lambda so_far: told.append(len(so_far.trials)),
    )
    assert told == list(range(1, len(tried) + 1))
    assert [trial.settings["page_size"] for trial in found.trials] == list(tried)
    first, quits, killed, refused, no_memory, exits, best, ended = found.trials
    assert first.reason == "" and len(first.times) == 3
    assert quits.reason.startswith("exit code 3")
    assert "SIGKILL" in killed.reason and "host memory is short" in killed.reason
    assert refused.reason == "CapExceededError: 3 bytes do not fit"
    assert no_memory.reason == "OutOfMemoryError: CUDA out of memory"
    assert exits.reason == "exit code 1: enough"
    for trial in (quits, killed, refused, no_memory, exits):
        assert trial.times == () and trial.seconds is None
        assert trial.moved_bytes is trial.peak_bytes is None
    assert found.best is best and len(best.times) == 3
    assert len(ended.times) == 2, "it need not run all passes"
    assert "1.3 times the best" in ended.reason
    assert best.moved_bytes is None, "there was no manager"
    assert found.device == ""
    assert found.settings == {"page_size": FAST}


def test_a_trial_that_hangs_is_ended_with_its_process() -> None:
    start = time.monotonic()
    found = tune("python.tuning.setups:hang", candidates=[{}], time_limit=2)
    assert time.monotonic() - start < 60
    assert found.trials[0].reason == "not done after 2 s"
    assert found.best is None
    with pytest.raises(PenstockError, match=r"none of 1 trials of python.*: not done after 2 s"):
        _ = found.settings
    with pytest.raises(ChildProcessError):  # nobody is left, not even a zombie
        os.waitpid(-1, os.WNOHANG)


def test_figures_are_of_the_managers_that_the_setup_made() -> None:
    found = tune(
        setups.stream,
        "512KiB",
        candidates=[{"pager": "frames"}, {"pager": "frames", "host": "stream"}],
        arguments={"width": 256, "wanted_cap": "512KiB"},
        passes=3,
        pause=0,
        device=torch.device("cpu"),
        page_size="64KiB",
    )
    ran, refused = found.trials
    weights = 8 * 257 * 256 * 4
    assert ran.reason == ""
    assert ran.moved_bytes is not None and ran.peak_bytes is not None
    assert weights - 512 * KIB <= ran.moved_bytes <= weights + 64 * KIB * 8
    assert weights > ran.peak_bytes > 256 * KIB and ran.peak_bytes <= 512 * KIB
    assert (
        found.device
        == penstock.MemoryManager(cap="1MiB", device="cpu").pager.core_device.info().name
    )
    assert refused.reason.startswith("ModelError: ")
    assert found.settings == {
        "cap": "512KiB",
        "device": "cpu",
        "page_size": "64KiB",
        "pager": "frames",
    }
    manager = penstock.MemoryManager(**found.settings)
    assert (manager.pager.cap, manager.pager.page_size) == (512 * KIB, 64 * KIB)


SCRIPT = """
    import penstock
    from neighbour import wait

    def setup(**settings):
        assert __name__ != "__main__"
        return wait

    {guard}
        found = penstock.tune(setup, cap="1MiB", candidates=[{{}}], passes=3)
        print(found.best is found.trials[0], found.setup)
"""


@pytest.mark.parametrize("guard", ['if __name__ == "__main__":', "if True:"])
def test_a_script_tunes_its_own_function(guard: str, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("def wait(): pass\n")
    script = tmp_path / "script.py"
    script.write_text("\n".join(line[4:] for line in SCRIPT.format(guard=guard).splitlines()))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    if guard == "if True:":  # the trial runs the script, which would tune again
        assert done.returncode == 1
        assert 'put the call under if __name__ == "__main__":' in done.stderr
        assert done.stderr.splitlines()[-1].startswith("ValueError: tune: setup ")
    else:
        assert done.stdout == f"True {script}:setup\n", done.stderr


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ("python.tuning.setups:nothing", "AttributeError: .*nothing"),
        ("python.tuning.no_such_module:f", "ModuleNotFoundError: .*no_such_module"),
        ("no/such/script.py:f", "FileNotFoundError: .*script.py"),
        (f"{setups.__name__}:NO_FUNCTION", "it is no function, but int"),
        (setups.returns_nothing, "return a function that runs one pass, not NoneType"),
        (setups.takes_no_settings, r"called with cap, page_size.*Take \*\*settings"),
    ],
)
def test_a_setup_that_no_settings_help_is_an_error_at_once(
    setup: str | Callable[..., Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"tune: setup .*: .*{said}"):
        tune(setup, "1MiB", candidates=sizes(FAST, FAST, FAST), pause=0)


# ---- what is asked -----------------------------------------------------------------------------


def test_trials_get_cap_settings_and_arguments(processes: Processes) -> None:
    found = tune(
        "m:f",
        "60%",
        candidates=[{"pager": "frames", "host": "mapped"}, {"device": "cpu", "page_size": 4096}],
        arguments={"width": 3, "names": ["a"]},
        passes=4,
        pause=0,
        device=torch.device("cuda", 1),
        host_budget="1GiB",
        progress=False,
    )
    common = {"width": 3, "names": ["a"], "cap": "60%", "device": "cuda:1", "host_budget": "1GiB"}
    assert [task.given for task in processes.tasks] == [
        {**common, "pager": "frames", "host": "mapped"},
        {**common, "device": "cpu", "page_size": 4096},
    ]
    assert {(task.setup, task.passes) for task in processes.tasks} == {("m:f", 4)}
    assert found.common == {"cap": "60%", "device": "cuda:1", "host_budget": "1GiB"}
    assert found.device == "a device"


def test_a_trial_is_compared_with_the_first_passes_of_the_best(processes: Processes) -> None:
    processes.answers = [
        {"failed": "no"},
        {**GOOD, "times": [9.0, 4.0, 2.0]},
        {**GOOD, "times": [8.0, 8.0]},
        {**GOOD, "times": [1.0, 3.0, 1.0]},
        {"failed": "no"},
    ]
    found = tune("m:f", candidates=sizes("1", "2", "4", "8", "16"), passes=3, slower=2, pause=0)
    assert [task.limit for task in processes.tasks] == [None, None, 8.0, 8.0, 2.0]
    assert found.trials[2].reason == "ended after 2 passes: over 2 times the best"
    assert found.best is found.trials[3]


def test_what_is_tried_by_default(processes: Processes) -> None:
    found = default_candidates({})
    assert found[0] == {}
    assert {"pager": "frames", "host": "mapped", "page_size": "8MiB"} in found
    assert {"pager": "managed", "page_size": "2MiB"} in found
    assert len(found) == 1 + 3 * 3 + 3
    assert not [each for each in found if each.get("pager") == "managed" and "host" in each]
    assert len(default_candidates({"cap": "60%"})) == len(found)
    few = default_candidates({"cap": "32MiB"})
    assert {each["page_size"] for each in few[1:]} == {"2MiB", "8MiB"}
    assert not [each for each in default_candidates({"cap": 4096}) if "page_size" in each]
    assert default_candidates({"pager": "managed", "page_size": "2MiB"}) == [{}]
    tune("m:f", "32MiB", host="pinned", pause=0)
    assert [task.given for task in processes.tasks][1:] == [
        {"cap": "32MiB", "host": "pinned", "pager": "frames", "page_size": size}
        for size in ("2MiB", "8MiB")
    ]
    assert not [x for x in default_candidates({"host_budget": 1}) if x.get("pager") == "managed"]


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"passes": 2}, ValueError, "passes is 3 or more, not 2"),
        ({"slower": 0.9}, ValueError, "slower is 1 or more"),
        ({"slower": float("nan")}, ValueError, "slower is 1 or more"),
        ({"pause": -1}, ValueError, "pause"),
        ({"time_limit": 0}, ValueError, "time_limit"),
        ({"time_limit": float("inf")}, ValueError, "time_limit"),
        ({"candidates": []}, ValueError, "candidates is empty"),
        ({"candidates": [{"pagesize": 1}]}, TypeError, "page_size"),
        ({"candidates": [{"cap": "1MiB"}]}, TypeError, "cap"),
        ({"candidates": [{"host": "attic"}]}, ValueError, "attic"),
        ({"candidates": [{"page_size": "much"}]}, ValueError, "much"),
        ({"candidates": ["frames"]}, TypeError, "'frames' is none"),
        ({"cap": "much"}, ValueError, "much"),
        ({"pages": 3}, TypeError, "pages"),
        ({"policy": penstock.FarthestUse()}, TypeError, "policy in settings cannot travel"),
        ({"arguments": {"x": torch.ones(1)}}, TypeError, "x in arguments cannot travel"),
        ({"arguments": {"page_size": 1}}, ValueError, "'page_size' is a setting"),
        ({"setup": "no function"}, ValueError, "names no function"),
        ({"setup": ":f"}, ValueError, "names no function"),
        ({"setup": "m:f()"}, ValueError, "names no function"),
        ({"setup": lambda **settings: print}, ValueError, "lambda.*cannot be found"),
        ({"setup": 3}, TypeError, "setup is"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    wrong: dict[str, Any],
    error: type[Exception],
    said: str,
    processes: Processes,
) -> None:
    with pytest.raises(error, match=said):
        tune(**{"setup": "m:f", **wrong})
    assert processes.tasks == []


# ---- the result --------------------------------------------------------------------------------


def test_the_best_has_the_least_median_of_those_that_ran_to_their_end() -> None:
    assert [trial.seconds for trial in TUNED.trials] == [2.0, 1.5, 0.1, None]
    assert TUNED.best is TUNED.trials[1]
    assert TUNED.settings == {"cap": "1MiB", "device": "cpu", "page_size": "64KiB"}
    manager = eval(TUNED.as_code(), {"penstock": penstock})
    assert isinstance(manager, penstock.MemoryManager)
    assert (manager.pager.cap, manager.pager.page_size) == (1024 * KIB, 64 * KIB)


def test_what_is_saved_is_loaded_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    TUNED.save(path)
    assert Tuned.load(path) == TUNED
    assert json.loads(path.read_text())["best"] == TUNED.settings
    nothing = dataclasses.replace(TUNED, trials=TUNED.trials[2:])
    nothing.save(path)
    assert Tuned.load(path) == nothing
    assert Tuned.load(path).best is None
    for call in (nothing.as_code, lambda: nothing.settings):
        with pytest.raises(
            PenstockError, match="none of 2 trials of m:f ran to its end; the first: e"
        ):
            call()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"form": 2, "setup": "", "common": {}, "device": "", "trials": []}',
        '{"form": 1, "setup": "", "common": 3, "device": "", "trials": []}',
        '{"form": 1, "setup": "", "common": {}, "device": "", "trials": [{"settings": {}}]}',
        '{"form": 1, "setup": "", "common": {}, "device": "", "trials": [4]}',
        "\xff",
    ],
)
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(PenstockError, match=r"other\.json has nothing that Tuned\.save wrote"):
        Tuned.load(path)
    with pytest.raises(FileNotFoundError):
        Tuned.load(tmp_path / "none")
    with pytest.raises(TypeError, match="load: path is"):
        Tuned.load(3)  # type: ignore[arg-type]


# ---- progress ----------------------------------------------------------------------------------


def test_the_bar_says_what_is_tried_and_is_silent_in_pipes(
    capsys: pytest.CaptureFixture[str], processes: Processes
) -> None:
    tune("m:f", candidates=sizes("64KiB", "128KiB"), pause=0)
    assert capsys.readouterr() == ("", "")
    with step_bar("tuning", 3, show=True) as told:
        assert told is not None
        told(1, "frames [x]")
    out, err = capsys.readouterr()
    assert out == ""
    assert "tuning" in err and "3/3" in err
    with suppress(KeyboardInterrupt), step_bar("tuning", 3, show=True) as told:
        assert told is not None
        told(1, "frames [x]")
        raise KeyboardInterrupt
    err = capsys.readouterr().err
    assert "1/3" in err and "frames [x]" in err, "where it was when it was interrupted"
    with step_bar("tuning", 3, show=None) as told:
        assert told is None
