"""Operations on a tensor that ask for its shape, dtype and the like, not for its values.

A name that is missing here costs time, never a wrong result.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["METADATA"]


def _getters(names: str) -> list[Any]:
    return [getattr(torch.Tensor, name).__get__ for name in names.split() if _has(name)]


def _setters(names: str) -> list[Any]:
    return [getattr(torch.Tensor, name).__set__ for name in names.split()]


def _methods(names: str) -> list[Any]:
    return [getattr(torch.Tensor, name) for name in names.split() if _has(name)]


def _functions(names: str) -> list[Any]:
    return [getattr(torch, name) for name in names.split() if hasattr(torch, name)]


def _has(name: str) -> bool:
    return hasattr(torch.Tensor, name)


METADATA = frozenset(
    _getters(
        "shape dtype device layout ndim itemsize nbytes names name output_nr is_leaf requires_grad "
        "retains_grad grad grad_fn is_cuda is_cpu is_meta is_sparse is_sparse_csr is_quantized "
        "is_nested is_mkldnn is_mps is_xpu is_xla is_ipu is_maia is_vulkan is_mtia _version _base "
        "_cdata _backward_hooks _post_accumulate_grad_hooks"
    )
    + _setters("grad requires_grad")
    + _methods(
        "size stride dim ndimension numel nelement element_size storage_offset is_contiguous "
        "is_floating_point is_complex is_signed is_inference is_pinned is_conj is_neg is_shared "
        "get_device data_ptr type_as_meta requires_grad_ untyped_storage has_names __len__ "
        "is_same_size is_set_to register_hook register_post_accumulate_grad_hook retain_grad "
        "dim_order _is_view _is_zerotensor __hash__"
    )
    + _functions(
        "is_tensor is_floating_point is_complex is_signed numel is_conj is_neg is_same_size"
    )
)
"""Ask for shapes, types and the like."""
