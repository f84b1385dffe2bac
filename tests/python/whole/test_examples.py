"""The examples run as they stand, on models that are small."""

from __future__ import annotations

import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.report.stats import ManagerStats, MemoryStats, ModelStats, PassFigures

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
TRIED = ("custom_kernel", "embeddings", "layers", "own_module", "text_generation", "video_pipeline")


def run(name: str, *arguments: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](arguments)


def small_model(directory: Path, kind: str) -> Path:
    """Write a small model with random weights, and a tokenizer that knows a few words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    size: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    torch.manual_seed(0)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    else:
        model = transformers.BertModel(transformers.BertConfig(**size))
    model.save_pretrained(directory)
    words = {"[UNK]": 0, **{f"w{number}": number for number in range(1, 100)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    options = {"unk_token": "[UNK]", "pad_token": "[UNK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **options)
    tokenizer.save_pretrained(directory)
    return directory


def test_all_are_tried() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == list(TRIED)


def test_own_module(capsys: pytest.CaptureFixture[str]) -> None:
    run("own_module", "--cap", "6MiB", "--width", "512", "--depth", "8")
    assert "the same bits: True" in capsys.readouterr().out


def test_layers(capsys: pytest.CaptureFixture[str]) -> None:
    run("layers", "--cap", "6MiB", "--width", "512", "--depth", "6")
    out = capsys.readouterr().out
    assert "the same bits: True" in out
    assert "peak 6.00 MiB (100% of the cap)" in out


def test_text_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = small_model(tmp_path, "llama")
    run("text_generation", str(directory), "--cap", "6MiB", "--prompt", "w3 w14", "--tokens", "4")
    out = capsys.readouterr().out
    assert out.startswith("w3 w14")
    assert "cap 6.00 MiB" in out


def test_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("embeddings", str(small_model(tmp_path, "bert")), "--cap", "6MiB")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_video_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    run("video_pipeline", "--cap", "6MiB", "--width", "256", "--steps", "2")
    out = capsys.readouterr().out
    assert "temporal: 0.0 MiB, moved 0.0 MiB" in out
    assert "32 frames of 512, the same bits: True" in out
    assert "peak 6.00 MiB (100% of the cap)" in out


def test_custom_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    run("custom_kernel", "--cap", "6MiB", "--width", "256")
    out = capsys.readouterr().out
    assert ": near: True" in out
    assert "afterwards the same bits: True" in out


# ---- docs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_what_tutorials_say_runs_as_it_stands(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if not blocks:
        pytest.skip("all of it needs a GPU or large models")
    code = "\n".join(blocks)
    monkeypatch.chdir(tmp_path)
    if "path/to/model" in code:
        small_model(tmp_path / "path" / "to" / "model", "llama")
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})


def test_every_figure_of_the_report_is_explained() -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    for kind in (ManagerStats, ModelStats, MemoryStats, PassFigures):
        for field in fields(kind):
            assert re.search(rf"`[^`]*\b{field.name}\b[^`]*`", text), (
                f"{kind.__name__}.{field.name}"
            )
