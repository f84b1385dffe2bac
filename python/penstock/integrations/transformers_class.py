"""Which class a directory's model is, by its configuration; and what of that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.checkpoint.json_file import read_json_object
from penstock.checkpoint.kinds import QUANTIZED
from penstock.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["find_class", "find_config", "refuse_quantized"]


def find_config(
    transformers: Any,  # noqa: ANN401
    path: Path,
    *,
    trust_remote_code: bool,
) -> PreTrainedConfig:
    """Read the configuration of a directory.

    Raises
    ------
    CheckpointError
        If there is none, it is broken, its weights are quantized, or its kind is unknown.
    """
    file = path / "config.json"
    content = read_json_object(file, what="configuration", who="a model's")
    refuse_quantized(content.get("quantization_config"), file)
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever a configuration class says of its values
        code = content.get("auto_map")
        if code and not trust_remote_code:
            raise _untrusted(file) from error
        raise CheckpointError(f"{file} cannot be used: {error}", path=file) from error
    return config


def refuse_quantized(found: object, file: Path) -> None:
    """Refuse weights that are quantized.

    Parameters
    ----------
    found
        What the configuration says of that, if anything.

    Raises
    ------
    CheckpointError
        If it says anything.
    """
    if not found:
        return
    if not isinstance(found, dict):
        found = vars(found)
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method")))
    raise CheckpointError(
        f"{file} says that the weights are quantized (method {method!r}): {QUANTIZED}",
        path=file,
    )


def find_class(
    transformers: Any,  # noqa: ANN401
    config: PreTrainedConfig,
    path: Path,
    wanted: type | str | None,
    *,
    trust_remote_code: bool,
) -> Any:  # noqa: ANN401
    """Find the class of a model.

    Parameters
    ----------
    wanted
        A class or its name, also of the `AutoModel...` kind; None for what the configuration says.

    Raises
    ------
    CheckpointError
        If there is no such class, or it is code in the directory that is not trusted.
    TypeError
        If it is a class that loads no models.
    """
    file = path / "config.json"
    if isinstance(wanted, type) and not hasattr(wanted, "_model_mapping"):
        if not hasattr(wanted, "from_pretrained"):
            raise TypeError(
                f"model_class is a class of transformers or its name, not {wanted.__name__}"
            )
        return wanted
    name = wanted.__name__ if isinstance(wanted, type) else wanted
    if name is None:
        name = next(iter(config.architectures or ()), "AutoModel")
    own_code = _code_of(config, name)
    cls = getattr(transformers, name, None)
    if hasattr(cls, "_model_mapping"):
        cls = _mapped(cls, config)
    if own_code and (trust_remote_code or cls is None):
        if not trust_remote_code:
            raise _untrusted(file)
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(own_code, path, local_files_only=True)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise CheckpointError(
            f"transformers {transformers.__version__} has no class {name!r} for the "
            f"{config.model_type!r} model of {file}: install another version, or pass model_class",
            path=file,
        )
    return cls


def _mapped(auto: Any, config: PreTrainedConfig) -> Any:  # noqa: ANN401
    """Return the class that one of the `AutoModel...` kind stands for; None if it knows none."""
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:
        return None
    if not isinstance(found, (tuple, list)):
        return found
    by_name = {cls.__name__: cls for cls in found}
    named = [by_name[name] for name in config.architectures or () if name in by_name]
    return (named or found)[0]


def _code_of(config: PreTrainedConfig, name: str) -> str | None:
    """Return where the directory's own code has a class, by its name or that of its kind."""
    references = getattr(config, "auto_map", None) or {}
    for kind, reference in references.items():
        reference = reference[0] if isinstance(reference, list) else reference
        if reference and name in (kind, reference.rpartition(".")[2]):
            return str(reference)
    return None


def _untrusted(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} needs code that lies in the directory (auto_map): read it, and if you trust it, "
        "pass trust_remote_code=True",
        path=file,
    )
