"""The element types of safetensors files, and their torch counterparts.

The codes and widths are those of the `Dtype` enumeration of safetensors 0.8
(https://docs.rs/safetensors/latest/safetensors/tensor/enum.Dtype.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "DType", "torch_dtype", "torch_shape"]


@dataclass(frozen=True)
class DType:
    """One element type.

    Parameters
    ----------
    code
        Its name in a safetensors header.
    bits
        Width of one element; widths below 8 are packed without gaps.
    torch_name
        Its attribute in the torch module, or None where torch has no such type.
    """

    code: str
    bits: int
    torch_name: str | None


DTYPES = {
    dtype.code: dtype
    for dtype in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4, "float4_e2m1fn_x2"),
        DType("F6_E2M3", 6, None),
        DType("F6_E3M2", 6, None),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8, "float8_e5m2"),
        DType("F8_E4M3", 8, "float8_e4m3fn"),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16"),
        DType("BF16", 16, "bfloat16"),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32"),
        DType("C64", 64, "complex64"),
        DType("F64", 64, "float64"),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
    )
}


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype for a safetensors code.

    Parameters
    ----------
    code
        A dtype as a safetensors header spells it, such as `BF16`.

    Returns
    -------
    torch.dtype
        The dtype under which torch reads the same bytes.

    Raises
    ------
    CheckpointError
        If the code is unknown, or this torch has no such dtype.
    """
    import torch

    dtype = DTYPES.get(code)
    if dtype is None:
        raise CheckpointError(f"dtype {code!r} is unknown; known are {', '.join(DTYPES)}")
    if dtype.torch_name is None:
        raise CheckpointError(
            f"dtype {code} ({dtype.bits} bits) has no torch counterpart; "
            "convert the tensor to F8_E4M3, or store its packed bytes as U8"
        )
    found = getattr(torch, dtype.torch_name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            f"dtype {code} needs torch.{dtype.torch_name}, which torch {torch.__version__} "
            "lacks; install a newer torch, or convert the tensor"
        )
    return found


def torch_shape(code: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape under which torch holds a tensor.

    Torch counts F4 in pairs, two elements to the byte, so the last dimension is half of that in
    the header. All other dtypes keep their shape.

    Parameters
    ----------
    code
        A dtype as a safetensors header spells it.
    shape
        The shape in the header, in elements.

    Returns
    -------
    tuple of int
        The shape for torch.

    Raises
    ------
    CheckpointError
        If the last dimension of an F4 tensor is odd or absent.
    """
    if code != "F4":
        return tuple(shape)
    if not shape or shape[-1] % 2:
        raise CheckpointError(
            f"an F4 tensor of shape {list(shape)} cannot be a torch tensor: torch packs F4 in "
            "pairs along the last dimension; pad that dimension to an even size"
        )
    return (*shape[:-1], shape[-1] // 2)
