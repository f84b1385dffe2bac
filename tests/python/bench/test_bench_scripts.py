"""The benchmarks in bench/ that need a GPU to say something run with tiny models anywhere."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(file.parent.name for file in ROOT.glob("bench/*/__main__.py"))


def run(script: str, directory: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    file = directory / "found.json"
    quick = ["--quick", "--device", "cpu", "--directory", str(directory), "--json", str(file)]
    out = run_script(script, *quick, *arguments)
    assert list(directory.iterdir()) == [file]
    return json.loads(file.read_text()), out


def run_script(script: str, *arguments: str) -> str:
    """Run a benchmark from the repository's root; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{script}", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=ROOT,
        # threads that wait for each other on a busy machine
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_says_how_it_is_run_and_runs_like_that(script: str) -> None:
    form = f"python -m bench.{script} "
    assert form in (ROOT / "bench" / script / "__main__.py").read_text()
    assert run_script(script, "--help").startswith(f"usage: {form}")


def test_pipeline(tmp_path: Path) -> None:
    found, out = run("pipeline", tmp_path)
    rows = {row["case"]: row for row in found["rows"]}
    weights = sum(found["weight_bytes"].values())
    assert found["broken"] == []
    assert "a hard cap needs a GPU" in out
    peers = ["group-block", "group-leaf"] if importlib.util.find_spec("diffusers") else []
    peers += ["model-offload"] if importlib.util.find_spec("accelerate") else []
    for name in ("resident", "penstock", *peers):
        stages = rows[name]["stages"]
        assert [each["stage"] for each in stages] == ["encoder", "denoiser", "spatial", "temporal"]
        assert all(each["bit_identical"] for each in stages), name
        assert all(each["finite"] for each in stages), name
        assert all(f"{each['seconds']:.4f}" in out for each in stages), name

    encoder, denoiser, _, temporal = rows["penstock"]["stages"]
    assert weights > found["cap"] >= denoiser["after"]["ledger_peak"]
    assert encoder["moved_bytes"] == encoder["moved_first_bytes"]  # kept for the second prompt
    assert temporal["moved_bytes"] == 0  # reserved
    assert 0 < denoiser["step_bound_bytes"] <= denoiser["step_moved_bytes"]
    for each in (encoder, denoiser):
        assert each["bound_seconds"] > 0
        assert each["predicted_seconds"] > 0


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_generate(tmp_path: Path) -> None:
    found, out = run("generate", tmp_path, "--tokens", "6")
    rows = {(row["case"], row["cap"]): row for row in found["rows"]}
    assert found["broken"] == []
    assert "accelerate places on a GPU" in out
    ours = [rows["penstock", cap] for cap in found["caps"]]
    assert len(ours) == 2
    for row in ours:
        assert row["same_tokens"] is True
        assert len(row["tokens"]) == 6
        assert found["weight_bytes"] > row["cap"] >= row["figures"]["ledger_peak"]
        assert 0 < row["bound_bytes"] <= row["moved_bytes"]
        assert f"{1 / row['seconds']:.2f}" in out
    assert ours[0]["moved_bytes"] > ours[1]["moved_bytes"]  # the larger cap keeps more
