"""Pipelines of diffusers: from a directory, as `save_pretrained` writes it, under one cap.

Every part with weights (text encoders, transformer or UNet, VAE) is registered with one manager,
and in use while it is called. The other parts (tokenizers, schedulers) and the pipeline itself are
made by diffusers as always.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from penstock.arguments import checked
from penstock.checkpoint.json_file import read_json_object
from penstock.errors import CheckpointError, ModelError
from penstock.integrations import transformers as transformers_front_end
from penstock.integrations.transformers_class import refuse_quantized
from penstock.loading.deferred import defer, source_of
from penstock.loading.skeleton import build_skeleton
from penstock.loading.weights import Weights, open_weights, require_floating
from penstock.manager.manager import MemoryManager
from penstock.manager.settings import split_options
from penstock.optional_packages import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline

__all__ = ["load", "manager_of", "register"]

_INDEX = "model_index.json"
_OFFLOADING = (
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
)


@checked
def load(
    directory: str | os.PathLike[str],
    cap: int | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,  # noqa: ANN401
) -> DiffusionPipeline:
    """Load a pipeline from its directory, ready to be called, all of its parts under one cap.

    `manager_of(pipeline)` is its manager, for the report, schedules and the cap.

    Parameters
    ----------
    directory, dtype
        See `register`.
    cap, options
        `device` and all others of `MemoryManager`; what is none of these is one of the components,
        see `register`.

    Raises
    ------
    CheckpointError, CapExceededError, DeviceError, PenstockError
        As `register` does.
    """
    settings, components = split_options(options)
    manager = MemoryManager(cap=cap, **settings)
    return register(manager, directory, dtype=dtype, **components)


@checked
def register(
    manager: MemoryManager,
    directory: str | os.PathLike[str],
    *,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    **components: Any,  # noqa: ANN401
) -> DiffusionPipeline:
    """Register the parts of a pipeline by its directory; nothing is ever downloaded.

    Parameters
    ----------
    manager
        Who runs the parts. Each is registered under its name in the pipeline.
    directory
        Has `model_index.json`, and a folder for each part.
    prefix
        In front of the parts' names, where one manager has several pipelines.
    dtype
        What weights become, but for those that a model keeps in float32. None: what diffusers
        makes of them, which is float32 for its own models.
    components
        Parts to be used instead of the directory's, as in `DiffusionPipeline.from_pretrained`;
        None leaves one out. They are not managed.

    Returns
    -------
    DiffusionPipeline
        Of the class that the directory names. A part is acquired when it is called, and released
        when another one is.

    Raises
    ------
    CheckpointError
        If the directory lacks a file, a part's weights do not fit it or are quantized.
    CapExceededError, DeviceError, ModelError
        As `MemoryManager.register` does.
    PenstockError
        If diffusers is not installed.
    """
    diffusers, transformers = require(
        "a pipeline of diffusers", "diffusers", "diffusers", "transformers"
    )
    require_floating(dtype)
    path = Path(directory)
    index = read_json_object(path / _INDEX, what="index of a pipeline", who="a pipeline's")
    pipeline_class = _pipeline_class(diffusers, index, path)
    parts: dict[str, nn.Module] = {}
    try:
        for part, library, class_name in _parts(index):
            cls = _part_class(diffusers, transformers, library, class_name)
            if part in components or cls is None:
                continue
            name = prefix + part
            if issubclass(cls, diffusers.ModelMixin):
                _register_model(manager, name, cls, path / part, dtype)
            else:
                transformers_front_end.register(
                    manager, name, path / part, dtype=dtype, model_class=cls
                )
            parts[part] = manager.module(name)
        with _quiet(diffusers):
            pipeline: DiffusionPipeline = pipeline_class.from_pretrained(
                path, local_files_only=True, torch_dtype=dtype, **parts, **components
            )
    except BaseException:
        for part in parts:
            manager.unregister(prefix + part)
        raise
    manager.acquire_on_call(*(prefix + part for part in parts))
    pipeline._penstock_manager = manager
    for method in _OFFLOADING:
        setattr(pipeline, method, _refusing(method))
    pipeline.to = _staying(pipeline, manager.device)
    return pipeline


@checked
def manager_of(pipeline: DiffusionPipeline) -> MemoryManager | None:
    """Return the manager of a pipeline's parts; None where it was loaded without one."""
    manager = getattr(pipeline, "_penstock_manager", None)
    return manager if isinstance(manager, MemoryManager) else None


def _pipeline_class(diffusers: Any, index: dict[str, Any], path: Path) -> Any:  # noqa: ANN401
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None or not hasattr(found, "from_pretrained"):
        raise CheckpointError(
            f"{path / _INDEX} names the class {name!r}, which diffusers {diffusers.__version__} "
            "does not have (code in the directory is not run): install another version, or "
            "register the parts with MemoryManager.register, and build the pipeline of them",
            path=path / _INDEX,
        )
    return found


def _parts(index: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """List the parts that a pipeline has: name, library, class."""
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value):
            yield name, value[0], value[1]


def _part_class(
    diffusers: Any,  # noqa: ANN401
    transformers: Any,  # noqa: ANN401
    library: str,
    name: str,
) -> Any:  # noqa: ANN401
    """Return the class of a part that is a model; None for any other part."""
    known = {"diffusers": diffusers, "transformers": transformers}
    module = known.get(library) or getattr(diffusers.pipelines, library, None)
    found = getattr(module, name, None)
    models = (diffusers.ModelMixin, transformers.PreTrainedModel)
    return found if isinstance(found, type) and issubclass(found, models) else None


def _register_model(
    manager: MemoryManager,
    name: str,
    cls: Any,  # noqa: ANN401
    path: Path,
    dtype: torch.dtype | None,
) -> None:
    """Register a model of diffusers' own, with the values that its from_pretrained gives."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: download it", path=path / "config.json")
    config = cls.load_config(path, local_files_only=True)
    refuse_quantized(config.get("quantization_config"), path / "config.json")

    def build() -> nn.Module:
        model: nn.Module = cls.from_config(config)
        return model.eval()

    with _default_dtype(dtype or torch.float32):
        model: Any = build_skeleton(build)
    weights = open_weights(path)
    tensors: OrderedDict[str, torch.Tensor] = OrderedDict(
        (key, defer(source)) for key, source in weights.sources.items()
    )
    model._fix_state_dict_keys_on_load(tensors)
    kept = tuple(cls._keep_in_fp32_modules or ()) if dtype is not None else ()
    wanted = dtype or torch.float32
    sources = {}
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            in_float32 = any(module in key.split(".") for module in kept)
            tensor = tensor.to(torch.float32 if in_float32 else wanted)
        sources[key] = source_of(key, tensor)
    # Names that the model lacks are left out there, too; parameters without a value are an error.
    manager.register(name, model, Weights(weights.origin, sources), strict=False)
    model.register_to_config(_name_or_path=str(path))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet(diffusers: Any) -> Iterator[None]:  # noqa: ANN401
    logging = diffusers.utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _refusing(method: str) -> Callable[..., None]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ModelError(
            f"{method} moves weights that Penstock streams already: leave the call out, and set "
            "the cap instead (manager_of(pipeline).set_cap)"
        )

    return refuse


def _staying(pipeline: Any, device: torch.device) -> Callable[..., Any]:  # noqa: ANN401
    """Return a `to` that refuses to move the weights elsewhere, or to copy them."""
    move = pipeline.to

    def to(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype) and value != pipeline.dtype:
                raise ModelError(
                    f"the weights are streamed as {pipeline.dtype}, and would be copied out of the "
                    f"cap: load the pipeline with dtype={value}"
                )
            if isinstance(value, (str, torch.device)):
                wanted = torch.device(value)
                if wanted.type != device.type or wanted.index not in (None, device.index):
                    raise ModelError(
                        f"the weights are streamed to {device}, and would be copied out of the "
                        f"cap: load the pipeline with device={str(wanted)!r}"
                    )
        return move(*args, **kwargs)

    return to
