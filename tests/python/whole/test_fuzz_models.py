"""Drawn models run drawn programs under small caps; and the fuzzer that does so sees faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import penstock
from fuzz import fuzz_models
from fuzz.fuzz_models import KINDS, Setting, World

FUZZER = Path(fuzz_models.__file__)
TRIALS = 25


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the fuzzer in a process of its own: what kills a trial must not kill the tests."""
    return subprocess.run(
        [sys.executable, str(FUZZER), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_drawn_programs_give_the_bits_of_ordinary_memory() -> None:
    done = fuzz("--seed", "1", "--trials", str(TRIALS), "--jobs", "2")
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-3000:]}"
    assert f"{TRIALS} trials" in done.stdout


def test_the_fuzzer_finds_nothing_where_nothing_is_paged() -> None:
    done = fuzz("--seed", "1", "--trials", str(TRIALS), "--plain")
    assert done.returncode == 0, done.stdout
    assert " 0 refused, 0 wrong" in done.stdout


def seeds_of(tier: str, count: int) -> list[int]:
    return [seed for seed in range(200) if fuzz_models.draw(seed).tier == tier][:count]


def flip_a_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int32)[0] ^= 1


@pytest.mark.filterwarnings("ignore")
def test_the_fuzzer_sees_one_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of a weight, changed where the twin would be paged."""

    def offload(world: World) -> None:
        flip_a_bit(world.model.head.bias.data)

    monkeypatch.setattr(World, "offload", offload)
    for seed in seeds_of("offload", 3):
        assert fuzz_models.judged(seed).state == "wrong"


@pytest.mark.filterwarnings("ignore")
def test_the_fuzzer_sees_what_restore_spoils(monkeypatch: pytest.MonkeyPatch) -> None:
    def offload(world: World) -> None:
        world.manager = None

    def restore(world: World) -> None:
        if world is twins[-1]:
            flip_a_bit(world.model.shift)

    twins: list[World] = []
    created = World.__init__

    def create(world: World, *arguments: object, **options: object) -> None:
        created(world, *arguments, **options)
        twins.append(world)

    monkeypatch.setattr(World, "__init__", create)
    monkeypatch.setattr(World, "offload", offload)
    monkeypatch.setattr(World, "restore", restore)
    verdicts = [fuzz_models.judged(seed) for seed in seeds_of("offload", 3)]
    assert {verdict.state for verdict in verdicts} == {"wrong"}
    assert any("once restored" in verdict.note for verdict in verdicts)


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_the_package_is_wrong_and_a_refusal_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(world: World) -> None:
        raise penstock.CapExceededError("too small")

    def fail(world: World) -> None:
        raise penstock.ModelError("cannot")

    (seed,) = seeds_of("offload", 1)
    monkeypatch.setattr(World, "offload", refuse)
    assert fuzz_models.judged(seed).state == "refused"
    monkeypatch.setattr(World, "offload", fail)
    assert fuzz_models.judged(seed).state == "wrong"


def test_a_worker_that_dies_fails_its_trial_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(FUZZER.parents[1])!r})\n"
        "from fuzz import fuzz_models\n"
        "judged = fuzz_models.judged\n"
        "fuzz_models.judged = lambda seed, **kw: os.abort() if seed == 2 else judged(seed, **kw)\n"
        "sys.exit(fuzz_models.main())\n"
    )
    monkeypatch.setattr(fuzz_models, "__file__", str(dying))
    verdicts = {verdict.seed: verdict for verdict in fuzz_models.batch([1, 2, 3], True)}
    assert {seed for seed, verdict in verdicts.items() if verdict.state == "wrong"} == {2}
    assert "process ends with -6" in verdicts[2].note
    assert sorted(verdicts) == [1, 2, 3]


def test_trials_are_drawn_the_same_again_and_reach_every_kind_and_action() -> None:
    settings: list[Setting] = [fuzz_models.draw(seed) for seed in range(400)]
    assert settings == [fuzz_models.draw(seed) for seed in range(400)]
    assert len(KINDS) >= 60
    assert {name for each in settings for name in each.kinds} == set(KINDS)
    assert {name for each in settings for name in each.actions} == set(fuzz_models.ACTIONS)
    assert {each.tier for each in settings} == {"offload", "pinned", "managed", "mapped", "stream"}
