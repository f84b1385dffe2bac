"""Running a scene: what has to happen in a process of its own."""

import subprocess
import sys
from pathlib import Path


def run_scene(script: str, scene: str, time_limit: float) -> None:
    """Run one scene of a script beside this file; it may take so many seconds."""
    path = Path(__file__).with_name(script)
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(path), scene],
        capture_output=True,
        text=True,
        timeout=time_limit,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
