"""The benchmark: cases run apart, the comparison sees one bit, claims are judged by rows."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.bench import reads
from penstock.bench.cases import PEERS, Sizes, catalogue, select
from penstock.bench.claims import _PROMISES, Claim, claim_lines, judge
from penstock.bench.compare import compare, save_reference
from penstock.bench.measure import balanced_prompt, time_passes
from penstock.bench.options import CaseOptions
from penstock.bench.runner import Row, run_case, run_cases
from penstock.bench.table import align, table
from penstock.cli import main
from python.support import MIB

GIB = 1 << 30
LINK = 50e9
WEIGHTS = 8 * GIB
LACKING = WEIGHTS - 4 * GIB  # of the cap
SIZES = Sizes(
    ring=400 * MIB,
    peer=1280 * MIB,
    managed_ring=2 * GIB,
    cap=4 * GIB,
    above=9 * GIB,
    host_budget=2 * GIB,
)
CPU = torch.device("cpu")

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def options(tmp_path: Path, **changed: Any) -> CaseOptions:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    told: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "references": str(tmp_path / "references"),
        "device": "cpu",
        "layers": 1,
        "hidden": 128,
        "vocabulary": 64,
        "prompt": 4,
    }
    return CaseOptions(**(told | changed))


# ---- the command -------------------------------------------------------------------------------


@needs_transformers
def test_quick_run_prints_a_table_and_writes_the_same_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine
    file = tmp_path / "bench.json"
    arguments = ["bench", "--quick", "--device", "cpu", "--layers", "4", "--json", str(file)]
    assert main([*arguments, "--directory", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    rows = {row["case"]: row for row in found["rows"]}
    assert list(rows) == ["resident", "penstock-frames-ring", "penstock-managed-ring"]
    header = next(line for line in out.splitlines() if line.startswith("case  "))
    assert all(title in header for title in ("s/pass", "GB/s", "% of link", "VRAM", "same bits"))

    ours = rows["penstock-managed-ring"]
    assert ours["bit_identical"] is True
    assert ours["relative_error"] == 0
    assert 0 < ours["least_seconds"] <= ours["seconds"]
    assert 0 < ours["moved_bytes"] <= found["model"]["nbytes"] + 2 * MIB
    assert ours["own_figures"]["peak"] <= ours["options"]["cap"] < found["model"]["nbytes"]
    assert ours["link"] > 0
    line = next(line for line in out.splitlines() if line.startswith("penstock-managed-ring  "))
    assert " yes " in line
    for row in rows.values():
        if "unavailable" in row:
            assert f"not available: {row['unavailable'][:60]}" in out
        assert "failed" not in row

    judged = {(claim["case"], claim["holds"]) for claim in found["claims"]}
    assert ("penstock-managed-ring", True) in judged
    assert len(found["claims"]) >= len(_PROMISES) + 2
    assert found["ok"] is True
    assert list(tmp_path.iterdir()) == [file]


def test_without_transformers_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["bench", "--quick", "--device", "cpu"]) == 1
    assert "pip install '.[bench]'" in capsys.readouterr().err


@needs_transformers
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "resident,dance"], "there is no case 'dance'"),
        (["--long-prompt", "long"], '--long-prompt is "auto"'),
        (["--device", "tpu"], '"tpu"'),
    ],
)
def test_wrong_options_are_errors_before_anything_runs(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--device", "cpu", "--quick", *arguments]) == 1
    assert said in capsys.readouterr().err


# ---- processes ---------------------------------------------------------------------------------


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let cases run a shell script instead of Python."""

    def use(script: str) -> None:
        file = tmp_path / "interpreter"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return use


def test_a_case_that_takes_too_long_is_ended_with_what_it_started(
    tmp_path: Path, interpreter: Callable[[str], None]
) -> None:
    interpreter("sleep 60 & sleep 60; wait")
    start = time.monotonic()
    slow = run_case("resident", options(tmp_path), time_limit=0.2)
    assert slow == {"failed": "not done after 0.2 s"}
    assert time.monotonic() - start < 30  # the pipes are closed only when all of it has ended


def test_a_case_that_fails_is_a_row_and_the_run_goes_on(
    tmp_path: Path, interpreter: Callable[[str], None]
) -> None:
    interpreter("""echo noise; echo '{"failed": "no checkpoint"}'; exit 1""")
    told: list[Row] = []
    cases = select(catalogue("cpu", SIZES), ["penstock-managed-ring"])
    rows = run_cases(cases, options(tmp_path), long_prompt=0, time_limit=60, tell=told.append)
    assert [row["case"] for row in told] == ["resident", "penstock-managed-ring"]
    assert rows["resident"]["failed"] == "no checkpoint"
    assert rows["penstock-managed-ring"]["unavailable"].startswith("it needs the case resident: ")


def test_a_case_that_dies_says_how(tmp_path: Path, interpreter: Callable[[str], None]) -> None:
    interpreter("echo not json; echo last words >&2; kill -SEGV $$")
    found = run_case("resident", options(tmp_path), time_limit=60)
    assert found["failed"] == "ended by signal SIGSEGV: last words"


def test_options_survive_the_journey(tmp_path: Path) -> None:
    told = options(tmp_path, cap=7, host="stream", cold=True)
    assert CaseOptions.from_json(told.to_json()) == told


# ---- what is measured --------------------------------------------------------------------------


def test_comparison_sees_one_bit(tmp_path: Path) -> None:
    logits = torch.randn(1, 3, 8).to(torch.bfloat16)
    file = tmp_path / "references" / "short.safetensors"
    assert compare(logits, file)["bit_identical"] is None
    save_reference(logits, file)
    assert compare(logits, file) == {"bit_identical": True, "relative_error": 0.0}
    spoiled = logits.clone()
    spoiled.view(torch.int16)[0, 1, 2] ^= 1
    found = compare(spoiled, file)
    assert found["bit_identical"] is False
    assert 0 < found["relative_error"] < 0.01
    assert compare(logits * float("nan"), file)["relative_error"] == float("inf")
    assert compare(logits[:, :2], file)["bit_identical"] is False


def test_passes_go_on_until_there_are_enough_and_long_enough() -> None:
    assert time_passes(lambda: None, CPU, passes=3).count == 3
    times = time_passes(lambda: torch.randn(1 << 16), CPU, passes=1, least_seconds=0.02)
    assert times.count > 1
    assert 0 < times.least <= times.median


@pytest.mark.parametrize("target", [0.01, 0.135, 2.0])
def test_balanced_prompt_comes_near_its_target(target: float) -> None:
    def seconds_of(prompt: int) -> float:
        return 0.004 + 1.4e-5 * prompt + 1e-10 * prompt**2

    prompt = balanced_prompt(seconds_of, target, most=1 << 20)
    assert prompt % 64 == 0
    assert seconds_of(prompt) == pytest.approx(target, rel=0.1)


def test_raw_reads_read_everything_each_way(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(9 * MIB + 5))
    reads.warm_cache(files)
    assert reads.cached_share(files) in (1.0, None)
    rates = reads.raw_read_rates(files)
    assert all(rate > 0 for rate in rates.values())
    assert {f"buffered, {n} readers" for n in (1, 2, 4, 8, 16)} <= {*rates}


def test_a_row_without_figures_does_not_widen_the_table() -> None:
    lines = align([["case", "n", "what"], ["a", "10", "x"], ["longer", "a long reason " * 5]])
    assert lines[0] == "case     n  what"
    assert lines[1] == "a       10  x"
    assert lines[2].startswith("longer  a long reason")
    assert table([{"case": "a", "failed": "one\ntwo"}])[1].endswith("failed: one two")


# ---- claims ------------------------------------------------------------------------------------


def row(case: str, seconds: float, moved: int, **figures: Any) -> Row:
    told = {"cap": 4 * GIB, "reference": "short", "writes": "", "device": "cuda"}
    return {
        "case": case,
        "options": told,
        "seconds": seconds,
        "moved_bytes": moved,
        "weight_bytes": WEIGHTS,
        "load_seconds": 0.4,
        "link": LINK,
        "pinned_bytes": moved,
        "vram_bytes": 5 * GIB,
        "vram_torch_bytes": GIB + MIB,
        "own_figures": {"peak": 300 * MIB},
        "bit_identical": True,
        "relative_error": 0.0,
        **figures,
    }


@pytest.fixture
def rows() -> dict[str, Row]:
    """Give rows of a run in which everything that we promise holds."""
    at_link = WEIGHTS / LINK
    good = [
        row("resident-long", 0.17, 0),
        *(row(name, 1.2 * at_link, WEIGHTS) for name in ("triple-buffer", *PEERS)),
        row("penstock-frames-ring", 1.01 * at_link, WEIGHTS),
        row("penstock-managed-ring", 1.15 * at_link, WEIGHTS),
        row("penstock-frames-cap", 0.51 * at_link, WEIGHTS // 2),
        row("penstock-managed-cap", 0.6 * at_link, LACKING + LACKING // 16),
        row("penstock-frames-above", 0.01, 0),
        row("penstock-frames-long", 0.18, WEIGHTS),
        row("penstock-frames-peer", 0.8 * at_link, int(0.8 * WEIGHTS)),
        row(
            "penstock-frames-graph",
            1.01 * at_link,
            WEIGHTS,
            launch_seconds=80e-6,
            launch_seconds_in_a_row=60e-6,
        ),
        row("penstock-frames-mapped", 1.02 * at_link, WEIGHTS, host_own_peak_bytes=30 * MIB),
        row("penstock-frames-stream", WEIGHTS / 1.9e9, WEIGHTS),
    ]
    found = {entry["case"]: entry for entry in good}
    found["penstock-frames-above"] |= {"seconds_in_turn": 0.01, "resident_seconds_in_turn": 0.01}
    found["penstock-frames-stream"] |= {
        "raw_reads": {"direct": 1e9},
        "raw_reads_after": {"direct": 2e9},
        "read_bytes": WEIGHTS,
        "cached_share": 0.0,
    }
    return found


def broken(claims: list[Claim]) -> set[tuple[str, str]]:
    return {(claim.case, claim.text) for claim in claims if claim.holds is False}


def test_every_claim_is_about_a_case_that_exists() -> None:
    names = [case.name for case in catalogue("cuda", SIZES)]
    assert len(names) == len(set(names))
    assert {case for case, _, _ in _PROMISES} <= set(names)
    assert set(PEERS) <= set(names)
    for case in catalogue("cuda", SIZES):
        assert set(case.needs) <= set(names[: names.index(case.name)])


def test_a_good_run_keeps_every_claim(rows: dict[str, Row]) -> None:
    claims = judge(rows)
    assert [claim for claim in claims if claim.holds is not True] == []
    assert all(line.endswith("yes") for line in claim_lines(claims)[1:])


@pytest.mark.parametrize(
    ("case", "figures", "count"),
    [
        ("penstock-frames-ring", {"seconds": 1.02 * WEIGHTS / LINK}, 1),
        ("penstock-frames-ring", {"seconds": 1.3 * WEIGHTS / LINK}, 3),
        ("penstock-frames-peer", {"seconds": 1.3 * WEIGHTS / LINK}, 1),
        ("penstock-frames-peer", {"vram_bytes": 6 * GIB}, 1),
        ("penstock-frames-ring", {"moved_bytes": 2 * WEIGHTS}, 1),  # more than a link can carry
        ("penstock-frames-cap", {"moved_bytes": 0}, 2),
        ("triple-buffer", {"seconds": 1.0 * WEIGHTS / LINK}, 1),
        ("penstock-frames-ring", {"own_figures": {"peak": 401 * MIB}}, 1),
        ("penstock-frames-ring", {"pinned_bytes": 2 * WEIGHTS}, 1),
        ("penstock-frames-ring", {"load_seconds": 1.0}, 1),
        ("penstock-frames-ring", {"bit_identical": False, "relative_error": 1e-3}, 1),
        ("diffusers-leaf", {"seconds": 1.0 * WEIGHTS / LINK}, 1),
        ("diffusers-leaf", {"seconds": 0.79 * WEIGHTS / LINK}, 2),
        ("penstock-managed-ring", {"seconds": 1.2 * WEIGHTS / LINK}, 1),
        ("penstock-managed-cap", {"moved_bytes": LACKING * 11 // 10}, 1),
        ("penstock-managed-cap", {"moved_bytes": 0}, 2),
        ("penstock-managed-cap", {"seconds": 0.7 * WEIGHTS / LINK}, 1),
        ("penstock-frames-cap", {"seconds": 0.53 * WEIGHTS / LINK}, 1),
        ("penstock-frames-cap", {"vram_bytes": 4 * GIB}, 1),  # too little in use
        ("penstock-frames-cap", {"vram_bytes": 6 * GIB}, 1),  # above the cap
        ("penstock-frames-cap", {"own_figures": {"peak": 4 * GIB + 1}}, 1),
        ("penstock-frames-above", {"seconds_in_turn": 0.0102}, 1),
        ("penstock-frames-long", {"seconds": 0.19}, 1),
        ("penstock-frames-graph", {"seconds": 1.03 * WEIGHTS / LINK}, 1),
        ("penstock-frames-graph", {"launch_seconds": 301e-6}, 1),
        ("penstock-frames-graph", {"launch_seconds_in_a_row": 301e-6}, 1),
        ("penstock-frames-mapped", {"seconds": 1.06 * WEIGHTS / LINK}, 1),
        ("penstock-frames-mapped", {"host_own_peak_bytes": 65 * MIB}, 1),
        ("penstock-frames-stream", {"seconds": WEIGHTS / 1.7e9}, 1),
    ],
)
def test_a_claim_that_does_not_hold_is_said(
    case: str, figures: dict[str, Any], count: int, rows: dict[str, Row]
) -> None:
    rows[case] |= figures
    claims = judge(rows)
    assert len(broken(claims)) == count
    assert sum(line.endswith("  NO") for line in claim_lines(claims)) == count


def test_a_case_that_did_not_run_is_said_and_never_left_out(rows: dict[str, Row]) -> None:
    count = len(judge(rows))
    rows["penstock-frames-stream"] = {"case": "penstock-frames-stream", "unavailable": "no tier"}
    rows["penstock-frames-mapped"] = {"case": "penstock-frames-mapped", "failed": "boom"}
    rows["penstock-managed-ring"]["link"] = None
    del rows["resident-long"]
    claims = judge(rows)
    assert len(claims) == count
    assert not broken(claims)
    said = "\n".join(claim_lines(claims))
    for reason in (
        "not run: not available: no tier",
        "not run: failed: boom",
        "not run: the link could not be measured",
        "not run: case resident-long was not selected",
    ):
        assert reason in said
    unjudged = judge(rows, "no GPU")
    assert {claim.holds for claim in unjudged if "bit-identical" not in claim.text} == {None}


def test_a_model_that_fits_under_the_cap_says_nothing_about_streaming(rows: dict[str, Row]) -> None:
    rows["penstock-frames-ring"]["weight_bytes"] = GIB
    said = [line for line in claim_lines(judge(rows)) if "fit under the cap" in line]
    assert len(said) == 2


def test_reads_that_stayed_in_the_page_cache_judge_nothing(rows: dict[str, Row]) -> None:
    rows["penstock-frames-stream"]["cached_share"] = 0.5
    assert "50% stayed in the page cache" in "\n".join(claim_lines(judge(rows)))
