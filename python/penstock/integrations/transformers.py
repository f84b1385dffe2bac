"""Models of transformers: from a directory, as `save_pretrained` writes it, to a streaming model.

The configuration says which class it is, and transformers' own loading decides everything else, as
`from_pretrained` would: dtypes, names that have changed, experts that are stored one by one and
computed together, ties, buffers, the generation configuration. It is given deferred tensors for
that, so no weight is read; then their bytes go from the files straight to their place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import Unpack

from penstock.arguments import checked
from penstock.checkpoint.kinds import QUANTIZED, find_quantized
from penstock.errors import CheckpointError, PenstockError
from penstock.integrations.transformers_class import find_class, find_config, refuse_quantized
from penstock.loading.deferred import Deferred, defer, source_of
from penstock.loading.module_patterns import NamePattern
from penstock.loading.slots import find_slots
from penstock.loading.weights import Weights, open_weights, require_floating
from penstock.manager.manager import MemoryManager
from penstock.manager.offload import keep_acquired
from penstock.manager.settings import OptionsBesideCap
from penstock.optional_packages import require
from penstock.torch_private import without_torch_function

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["load", "register"]

_CONVERTED = "pytorch_model.bin"
_OLDEST = [5, 17]


@checked
def load(
    directory: str | os.PathLike[str],
    cap: int | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    config: PreTrainedConfig | None = None,
    model_class: type | str | None = None,
    trust_remote_code: bool = False,
    strict: bool = True,
    pin: Sequence[NamePattern] = (),
    stream: Sequence[NamePattern] = (),
    **settings: Unpack[OptionsBesideCap],
) -> PreTrainedModel:
    """Load a model from its directory, ready to be called, under a cap of its own.

    `penstock.manager_of(model)` is its manager, for the report, the schedule and the cap.

    Parameters
    ----------
    directory, dtype, config, model_class, trust_remote_code, strict, pin, stream
        See `register`.
    cap, settings
        `device` and all others of `MemoryManager`.

    Returns
    -------
    PreTrainedModel
        In evaluation mode; inputs go to `model.device`.

    Raises
    ------
    CheckpointError, CapExceededError, DeviceError, PenstockError
        As `register` and `MemoryManager.acquire` do.

    See Also
    --------
    register : Several models under one cap.
    """
    manager = MemoryManager(cap=cap, **settings)
    register(
        manager,
        "model",
        directory,
        dtype=dtype,
        config=config,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        strict=strict,
        pin=pin,
        stream=stream,
    )
    return keep_acquired(manager, "model")  # type: ignore[return-value]


@checked
def register(
    manager: MemoryManager,
    name: str,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    config: PreTrainedConfig | None = None,
    model_class: type | str | None = None,
    trust_remote_code: bool = False,
    strict: bool = True,
    pin: Sequence[NamePattern] = (),
    stream: Sequence[NamePattern] = (),
) -> None:
    """Register a model of transformers by its directory; nothing is ever downloaded.

    Parameters
    ----------
    manager, name
        Who runs it, and how it is called there.
    directory
        Has `config.json`, the weights (safetensors, in one file or in shards with their index, or
        a `pytorch_model.bin`), and for models that generate, `generation_config.json`.
    dtype
        What weights become, but for those that the model keeps in float32. None: what the
        configuration says, else what the weights have.
    config
        Instead of the one in the directory, for example with another `attn_implementation`.
    model_class
        A class of transformers or its name, also one of the `AutoModel...` kind; None for the
        first of the configuration's `architectures`.
    trust_remote_code
        Whether code that lies in the directory may run.
    strict
        Whether parameters without a value in the weights are an error; else they have what the
        model's class starts with. Values that the model has no place for are left out in any case,
        and buffers without one keep what the model computed.
    pin, stream
        Patterns of names of modules that are to stay, or to stream; see `MemoryManager.register`.

    Raises
    ------
    CheckpointError
        If the directory lacks a file, the configuration cannot be used (unknown, quantized, with
        code of its own that is not trusted), or the weights do not fit the model.
    CapExceededError, DeviceError, ModelError
        As `MemoryManager.register` does.
    PenstockError
        If transformers is not installed, or too old.
    """
    (transformers,) = require("a model of transformers", "transformers", "transformers")
    _require_version(transformers.__version__)
    require_floating(dtype)
    if config is not None and not isinstance(config, transformers.PreTrainedConfig):
        raise TypeError(
            f"config is a configuration of transformers or None, not {type(config).__name__}"
        )
    path = Path(directory)
    if config is None:
        config = find_config(transformers, path, trust_remote_code=trust_remote_code)
    refuse_quantized(getattr(config, "quantization_config", None), path / "config.json")
    cls = find_class(transformers, config, path, model_class, trust_remote_code=trust_remote_code)
    weights = _open(path)
    if name_of_quantized := find_quantized(weights.sources):
        raise CheckpointError(
            f"{weights.origin}: tensor {name_of_quantized!r} is of quantized weights; {QUANTIZED}",
            path=path,
            tensor=name_of_quantized,
        )
    model, missing = _run_loading(transformers, cls, config, path, weights, dtype)
    slots = find_slots(model)
    sources = {slot.names[0]: source_of(slot.names[0], slot.current) for slot in slots}
    absent = [
        slot.names[0] for slot in slots if slot.is_parameter and missing.issuperset(slot.names)
    ]
    if strict and absent:
        raise CheckpointError(
            f"{weights.origin} lacks {len(absent)} parameters of {cls.__name__} (first: "
            f"{absent[0]!r}): pass the checkpoint of this model, another model_class, or "
            "strict=False to start from the values that the class gives them",
            path=path,
            tensor=absent[0],
        )
    _empty(model)
    manager.register(name, model, Weights(weights.origin, sources), pin=pin, stream=stream)


def _require_version(found: str) -> None:
    """Refuse versions whose loading was not tried with tensors that are not read yet."""
    if [int(part) for part in found.split(".")[:2]] < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise PenstockError(
            f"transformers {found} is too old to load models this way: pip install "
            f"'transformers>={oldest}', or register the module with MemoryManager.register"
        )


def _open(path: Path) -> Weights:
    """Find the weights of a directory; a torch file only where there is nothing else."""
    try:
        return open_weights(path)
    except CheckpointError:
        if not (path / _CONVERTED).is_file():
            raise
        return open_weights(path / _CONVERTED)


def _run_loading(
    transformers: Any,  # noqa: ANN401
    cls: Any,  # noqa: ANN401
    config: PreTrainedConfig,
    path: Path,
    weights: Weights,
    dtype: torch.dtype | None,
) -> tuple[PreTrainedModel, set[str]]:
    """Have transformers load deferred tensors; return the model, and what found no value."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, told = cls.from_pretrained(
            None,
            config=config,
            state_dict={name: defer(source) for name, source in weights.sources.items()},
            dtype=dtype or "auto",
            generation_config=_generation_config(transformers, cls, path),
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are told, and refused below
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot load {weights.origin} as {cls.__name__}: {error}", path=path
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    if told["mismatched_keys"]:
        name, found, wanted = sorted(told["mismatched_keys"])[0]
        raise CheckpointError(
            f"{weights.origin} does not fit {cls.__name__}: {name!r} has {list(found)} and should "
            f"have {list(wanted)} ({len(told['mismatched_keys'])} such tensors): pass the "
            "checkpoint and the configuration of the same model",
            path=path,
            tensor=name,
        )
    model.name_or_path = model.config._name_or_path = str(path)
    return model, set(told["missing_keys"])


def _generation_config(transformers: Any, cls: Any, path: Path) -> Any:  # noqa: ANN401
    if not cls.can_generate():
        return None
    if (path / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    return transformers.GenerationConfig.from_pretrained(
        path, "config.json", local_files_only=True, _from_model_config=True
    )


def _empty(model: nn.Module) -> None:
    """Put plain tensors on meta where deferred ones are, or values that found no other."""
    for slot in find_slots(model):
        held = slot.current
        with without_torch_function():
            empty = torch.empty_like(held.detach(), device="meta")
            if slot.is_parameter:
                empty = nn.Parameter(empty, requires_grad=held.requires_grad)
            elif not isinstance(held, Deferred):
                continue
        for owner, name in slot.owners:
            held_by: dict[str, Any] = owner._parameters if slot.is_parameter else owner._buffers
            held_by[name] = empty
