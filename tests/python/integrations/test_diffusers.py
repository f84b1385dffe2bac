"""Pipelines of diffusers from their directories: the images of the pipeline in ordinary memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import CheckpointError, MemoryManager, ModelError
from python.support import KIB, PAGERS, same_bits, state_of

diffusers = pytest.importorskip("diffusers", reason="pip install '.[diffusers]'")
transformers = pytest.importorskip("transformers")
front_end = pytest.importorskip("penstock.integrations.diffusers")

from python.integrations.diffusers_zoo import KINDS, draw, make, modules  # noqa: E402  diffusers is there

pytestmark = [  # diffusers' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PAGE = 64 * KIB


@dataclass
class Saved:
    """A pipeline in ordinary memory, where it was saved, and what it draws."""

    pipeline: Any
    directory: Path
    image: torch.Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            pipeline = make(name)
            directory = tmp_path_factory.mktemp(name)
            pipeline.save_pretrained(directory)
            made[name] = Saved(pipeline, directory, draw(pipeline, name))
        return made[name]

    return get


def load(directory: Path, pages: int, **options: Any) -> Any:
    options = {"device": "cpu", "page_size": PAGE, "verify": True, **options}
    return front_end.load(directory, pages * PAGE, **options)


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize("name", KINDS)
def test_images_are_those_of_the_pipeline_in_ordinary_memory(
    name: str, pager: str, saved: Callable[[str], Saved]
) -> None:
    plain = saved(name)
    pipeline = load(plain.directory, 9, pager=pager)
    assert type(pipeline) is type(plain.pipeline)
    for number in range(2):
        assert same_bits(draw(pipeline, name), plain.image), f"run {number} differs"
    manager = front_end.manager_of(pipeline)
    stats = manager.stats()
    assert set(stats.models) == set(modules(plain.pipeline))
    assert stats.peak <= stats.cap < sum(model.nbytes for model in stats.models.values())
    assert stats.evicted_bytes > 0
    for part, module in modules(pipeline).items():
        assert same_bits(state_of(module), state_of(modules(plain.pipeline)[part])), part


# ---- what a pipeline can do --------------------------------------------------------------------


def test_callbacks_see_the_steps_and_change_them(saved: Callable[[str], Saved]) -> None:
    def halve(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, given["latents"].clone()))
        return {"latents": given["latents"] / 2}

    found = []
    for pipeline in (saved("sdxl").pipeline, load(saved("sdxl").directory, 9)):
        seen: list[Any] = []
        found.append((draw(pipeline, "sdxl", callback_on_step_end=halve), seen))
    assert same_bits(found[1], found[0])
    assert len(seen) == 3


@pytest.mark.parametrize("pager", PAGERS)
def test_parts_that_are_used_once_leave_first(pager: str, saved: Callable[[str], Saved]) -> None:
    """Then the part that is used in each step stays, if it fits."""

    def look(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append({name: model.memory for name, model in manager.stats().models.items()})
        return {}

    plain = saved("sdxl")
    pipeline = load(plain.directory, 80, pager=pager)
    manager = front_end.manager_of(pipeline)
    for _ in range(2):
        seen: list[dict[str, Any]] = []
        assert same_bits(draw(pipeline, "sdxl", callback_on_step_end=look), plain.image)
        first, *others = seen
        for each in others:
            assert each["unet"].loaded_bytes == first["unet"].loaded_bytes
        held = {name: model.memory.resident_bytes for name, model in manager.stats().models.items()}
        assert held["text_encoder"] == held["text_encoder_2"] == 0 < held["unet"]
    stats = manager.stats()
    assert sum(model.nbytes for model in stats.models.values()) > stats.cap >= stats.peak


@pytest.mark.parametrize("pager", PAGERS)
def test_tiled_and_sliced_vae(pager: str, saved: Callable[[str], Saved]) -> None:
    found = []
    for pipeline in (saved("sdxl").pipeline, load(saved("sdxl").directory, 9, pager=pager)):
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()
        pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 8, 16
        found.append(draw(pipeline, "sdxl", num_images_per_prompt=2))
        pipeline.vae.disable_tiling()
        pipeline.vae.disable_slicing()
    assert same_bits(found[1], found[0])


@pytest.mark.parametrize("pager", PAGERS)
def test_moving_to_where_it_is(pager: str, saved: Callable[[str], Saved]) -> None:
    pipeline = load(saved("sdxl").directory, 9, pager=pager)
    assert pipeline.to("cpu") is pipeline
    assert pipeline.device == torch.device("cpu")
    assert pipeline.dtype == torch.float32
    assert same_bits(draw(pipeline, "sdxl"), saved("sdxl").image)
    stats = front_end.manager_of(pipeline).stats()
    assert all(model.moved == () for model in stats.models.values())


def test_moving_elsewhere_is_refused(saved: Callable[[str], Saved]) -> None:
    pipeline = load(saved("flux").directory, 9)
    with pytest.raises(ModelError, match=r"streamed to cpu.*device='cuda:1'"):
        pipeline.to("cuda:1")
    with pytest.raises(ModelError, match=r"load the pipeline with dtype=torch.float16"):
        pipeline.to(torch.float16)
    assert same_bits(draw(pipeline, "flux"), saved("flux").image)


@pytest.mark.parametrize("method", front_end._OFFLOADING)
def test_other_ways_to_offload_are_refused(method: str, saved: Callable[[str], Saved]) -> None:
    pipeline = load(saved("flux").directory, 9)
    with pytest.raises(ModelError, match=f"{method} moves weights.*set_cap"):
        getattr(pipeline, method)()


@pytest.mark.parametrize("pager", PAGERS)
def test_lora(pager: str, saved: Callable[[str], Saved]) -> None:
    peft = pytest.importorskip("peft", reason="diffusers loads adapters with it")
    directory = saved("sdxl").directory
    unet = diffusers.UNet2DConditionModel.from_pretrained(directory, subfolder="unet")
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    torch.manual_seed(2)
    unet.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    weights = {f"unet.{k}": v for k, v in peft.get_peft_model_state_dict(unet).items()}
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(directory)
    pipeline = load(directory, 9, pager=pager)
    draw(pipeline, "sdxl")
    changes: list[Callable[[Any], object]] = [
        lambda pipe: pipe.load_lora_weights(dict(weights)),
        lambda pipe: pipe.set_adapters(pipe.get_active_adapters(), [0.5]),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    before = saved("sdxl").image
    for change in changes:
        change(plain)
        change(pipeline)
        wanted = draw(plain, "sdxl")
        assert not same_bits(wanted, before)
        for _ in range(2):
            assert same_bits(draw(pipeline, "sdxl"), wanted)
        before = wanted


@pytest.mark.parametrize("pager", PAGERS)
def test_saved_pipeline_is_the_one_that_was_loaded(
    pager: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    load(saved("flux").directory, 9, pager=pager).save_pretrained(tmp_path)
    weights = sorted(tmp_path.rglob("*.safetensors"))
    assert len(weights) == 4
    for file in weights:
        same = saved("flux").directory / file.relative_to(tmp_path)
        assert file.read_bytes() == same.read_bytes(), file.name


def test_parts_of_ones_own(saved: Callable[[str], Saved]) -> None:
    plain = saved("flux").pipeline
    parts = {"vae": plain.vae, "text_encoder_2": None, "tokenizer_2": None}
    pipeline = load(saved("flux").directory, 9, **parts)
    assert pipeline.vae is plain.vae
    assert pipeline.text_encoder_2 is None
    assert set(front_end.manager_of(pipeline).stats().models) == {"text_encoder", "transformer"}


def test_two_pipelines_under_one_cap(saved: Callable[[str], Saved]) -> None:
    manager = MemoryManager(cap=9 * PAGE, device="cpu", page_size=PAGE)
    names = ("flux", "ltx")
    pipelines = {
        name: front_end.register(manager, saved(name).directory, prefix=f"{name}.")
        for name in names
    }
    for name in (*names, *names):
        assert same_bits(draw(pipelines[name], name), saved(name).image)
    stats = manager.stats()
    assert stats.peak <= stats.cap
    assert sum(model.acquired for model in stats.models.values()) <= 1


@pytest.mark.parametrize("name", ("sdxl", "wan"))
def test_dtype_is_what_from_pretrained_makes(name: str, saved: Callable[[str], Saved]) -> None:
    pytest.importorskip("accelerate", reason="without it, diffusers keeps nothing in float32")
    directory = saved(name).directory
    pipeline = load(directory, 9, dtype=torch.bfloat16)
    plain = type(pipeline).from_pretrained(directory, torch_dtype=torch.bfloat16)
    for part, module in modules(pipeline).items():
        assert same_bits(state_of(module), state_of(modules(plain)[part])), part
    assert same_bits(draw(pipeline, name), draw(plain, name))


# ---- what is refused ---------------------------------------------------------------------------


def copy_of(directory: Path, to: Path, **changes: Any) -> Path:
    """Make a directory of links to another one's, with other values in its index."""
    for entry in directory.iterdir():
        (to / entry.name).symlink_to(entry)
    index = json.loads((directory / "model_index.json").read_text())
    (to / "model_index.json").unlink()
    (to / "model_index.json").write_text(json.dumps({**index, **changes}))
    return to


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(directory, 9)
    assert caught.value.path is not None
    return str(caught.value)


@pytest.mark.parametrize("text", (None, "{", "[]", "{}", '{"_class_name": ["own", "Pipeline"]}'))
def test_directories_that_are_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "model_index.json").write_text(text)
    assert str(tmp_path / "model_index.json") in refusal(tmp_path) or text is None


def test_quantized_part(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    directory = copy_of(saved("flux").directory, tmp_path)
    (directory / "transformer").unlink()
    (directory / "transformer").mkdir()
    config = json.loads((saved("flux").directory / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (directory / "transformer" / "config.json").write_text(json.dumps(config))
    assert "'bitsandbytes'" in refusal(directory)


def test_part_without_weights_leaves_nothing(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    directory = copy_of(saved("flux").directory, tmp_path)
    (directory / "vae").unlink()
    manager = MemoryManager(cap=9 * PAGE, device="cpu", page_size=PAGE)
    with pytest.raises(CheckpointError, match="vae"):
        front_end.register(manager, directory)
    assert manager.stats().models == {}
