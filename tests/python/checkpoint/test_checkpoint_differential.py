"""Any file at all: read as safetensors reads it, or refused with a `CheckpointError`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.checkpoint import open_checkpoint
from penstock.checkpoint.dtypes import DTYPES
from penstock.errors import CheckpointError
from python.checkpoint.checkpoint_files import VALID, Case, entry, pack
from python.checkpoint.malformed import BLOBS
from python.checkpoint.oracle import STRICTER, disagreement, extent_fault

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("case", BLOBS, ids=lambda case: case.name)
def test_malformed_is_refused_by_safetensors_too(case: Case, tmp_path: Path) -> None:
    assert disagreement(case.build(tmp_path)) is None


@pytest.mark.parametrize("name", STRICTER)
def test_stricter_rules_are_needed_and_hold(name: str, tmp_path: Path) -> None:
    rule = STRICTER[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(rule.example)
    safetensors.deserialize(rule.example)
    with pytest.raises(CheckpointError, match=re.escape(rule.fragment)):
        open_checkpoint(path)
    assert disagreement(path) is None


@pytest.mark.parametrize("name", VALID)
def test_valid_is_read_as_safetensors_reads_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(VALID[name])
    assert disagreement(path) is None
    checkpoint = open_checkpoint(path)
    assert extent_fault(checkpoint) is None
    assert checkpoint.files == (path,)
    assert checkpoint.nbytes == len(VALID[name]) - 8 - int.from_bytes(VALID[name][:8], "little")


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_read(code: str, tmp_path: Path) -> None:
    nbytes = DTYPES[code].bits
    content = pack({"a": entry(code, [2, 4], [0, nbytes])}, bytes(range(nbytes)))
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert disagreement(path) is None
    tensor = open_checkpoint(path).tensors["a"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (code, (2, 4), nbytes)


ODD = st.sampled_from(
    [None, True, -1, -0.0, 0, 1, 3, 4, 8, 2**31, 2**63 - 1, 2**63, 2**64, 1.0, "", "F32", "F4",
     "U8", [], [0], [0, 4], [4, 8], [0, 0], [2**62, 2, 0], {}, {"F32": None}, float("nan")]
)  # fmt: skip
DIMS = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a file made of good entries, then spoilt in its header's tree and in its bytes."""
    header: dict[str, object] = {}
    end = 0
    for i in range(draw(st.integers(0, 4))):
        code, shape = draw(st.sampled_from(list(DTYPES))), draw(DIMS)
        bits = DTYPES[code].bits
        for dim in shape:
            bits *= dim
        header[f"t{i}"] = entry(code, shape, [end, end + bits // 8])
        end += bits // 8
    for name in draw(st.lists(st.sampled_from(sorted(header)), max_size=2)) if header else ():
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        value = draw(ODD)
        old = header[name]
        keep = isinstance(old, dict) and draw(st.integers(0, 3))
        header[name] = {**old, key: value} if keep else value
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.just({"k": "v"}) | st.dictionaries(st.text(), ODD) | ODD)
    text = bytearray(json.dumps(header, ensure_ascii=draw(st.booleans())).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        text[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    data = bytes(i % 251 for i in range(end))
    return pack(bytes(text), data + bytes(draw(st.sampled_from([0, 0, 0, 1]))))


@settings(max_examples=600, deadline=None)
@given(content=mutated())
def test_any_file_is_read_as_safetensors_reads_it(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    assert disagreement(path) is None


def test_fuzzer_finds_nothing(tmp_path: Path) -> None:
    report = tmp_path / "fuzz.json"
    fuzzer = ROOT / "tests" / "fuzz" / "fuzz_header.py"
    command = [sys.executable, fuzzer, "--seconds", "5", "--seed", "0", "--json", report]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    numbers = json.loads(report.read_text())
    assert numbers["executions"] > 500
    assert 0 < numbers["accepted"] < numbers["executions"]
    assert numbers["failures"] == []
