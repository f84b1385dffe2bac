"""A hard cap under torch on a real GPU. Each scene is a process of its own."""

import pytest

from gpu.scenes import run_scene

pytestmark = pytest.mark.gpu


SCENES = [
    "figures",
    "streams",
    "graph",
    "pools",
    "reduce_overhead",
    "processes",
    "room",
    "in_place",
    "neighbours",
    "benchmark",
    "overflow",
    "backend",
    "late",
    "faults",
]


@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene):
    run_scene("hard_cap_scenes.py", scene, 480)
