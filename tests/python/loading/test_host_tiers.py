"""How much host memory there is to take, by what the system and the control group say."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.loading.host_tiers import available_host_bytes
from python.support import MIB

STAT = {"anon": 40, "inactive_file": 30, "active_file": 20, "file_mapped": 5, "file_dirty": 3}


def group(folder: Path, limit: str, current: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current * MIB}\n")
    lines = [f"{name} {value * MIB}" for name, value in STAT.items()]
    (folder / "memory.stat").write_text("\n".join(lines) + "\n")
    return folder


def test_page_cache_that_can_go_is_no_use_of_memory(tmp_path: Path) -> None:
    found = available_host_bytes(group(tmp_path, str(100 * MIB), 95))
    assert found == (100 - 95 + 30 + 20 - 5 - 3) * MIB


@pytest.mark.parametrize("limit", ["max", "broken"])
def test_without_a_limit_it_is_what_the_system_has(limit: str, tmp_path: Path) -> None:
    found = available_host_bytes(group(tmp_path, limit, 95))
    assert found > 100 * MIB
    assert available_host_bytes(tmp_path / "nowhere") > 100 * MIB


def test_more_used_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    assert available_host_bytes(group(tmp_path, str(10 * MIB), 200)) == 0
