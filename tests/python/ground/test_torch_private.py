"""The private parts of torch lie behind one module, and this torch has them all."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from penstock import torch_private

PACKAGE = Path(torch_private.__file__).parent
_ONE = r"\._(?!_)"  # names such as __init__ are Python's
PRIVATE = re.compile(rf"\btorch(\.\w+)*{_ONE}\w|from torch(\.\w+)* import _|from torch(\.\w+)*\._")


def test_nobody_else_uses_private_parts_of_torch() -> None:
    users = {
        path.name
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if PRIVATE.search(line)
    }
    assert users == {"torch_private.py"}


def test_each_says_with_which_versions_it_was_tried() -> None:
    assert set(torch_private.TRIED) == set(torch_private.__all__) - {"TRIED"}
    for name, versions in torch_private.TRIED.items():
        assert hasattr(torch_private, name)
        assert re.fullmatch(r"2\.\d+( to 2\.\d+)?", versions)


def test_what_they_say_is_true() -> None:
    tensor = torch.ones(4)
    before = torch_private.change_count(tensor)
    tensor.add_(1)
    assert torch_private.change_count(tensor) == before + 1
    assert torch_private.share_storage(tensor, tensor[1:])
    assert not torch_private.share_storage(tensor, tensor.clone())
    assert torch_private.parse_to("meta", torch.float16)[:2] == (
        torch.device("meta"),
        torch.float16,
    )
    assert not torch_private.holds_values_elsewhere(tensor)
    seen: list[bool] = []
    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda grad: seen.append(torch_private.in_backward()))
    leaf.mul(2).backward()
    assert (seen, torch_private.in_backward()) == ([True], False)
    assert torch_private.function_of("_get_cudnn_benchmark") is not None
    assert torch_private.function_of("_no_such_function") is None


def test_storages_tell_who_has_them() -> None:
    tensor = torch.ones(4)
    assert torch_private.is_alone(tensor)
    reference, view = torch_private.StorageRef(tensor), tensor[1:]
    assert not torch_private.is_alone(tensor)
    del view
    assert torch_private.is_alone(tensor)
    found = reference.storage()
    assert found is not None and found.data_ptr() == tensor.data_ptr()
    del found, tensor
    assert reference.storage() is None
