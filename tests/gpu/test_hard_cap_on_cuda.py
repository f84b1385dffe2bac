"""A hard cap under torch on a real GPU. Each scene is a process of its own."""

import pytest

from gpu.scenes import run_scene

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "scene", ["figures", "streams", "graph", "room", "neighbours", "benchmark", "overflow", "late"]
)
def test_scene(scene):
    run_scene("hard_cap_scenes.py", scene, 240)
