"""A hard cap under torch on a real GPU. Each scene is a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SCENES = Path(__file__).with_name("hard_cap_scenes.py")


@pytest.mark.parametrize(
    "scene", ["figures", "streams", "graph", "room", "neighbours", "benchmark", "overflow", "late"]
)
def test_scene(scene):
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(SCENES), scene],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
