"""TorchScript and exported programs of paged models.

They run as other models do, since their operations go through torch's dispatcher. But they are
saved, and frozen, by functions that read memory as it lies: these refuse paged tensors. Script has
one operation that reads past the dispatcher, `tolist`, which is given a copy. And what is made a
script has its hooks compiled, which those of a paged model cannot be: the script has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn

from penstock.dispatch import torch_dispatch
from penstock.errors import ModelError
from penstock.run.hooks import without_hooks
from penstock.torch_private import compiled_scripts, library

__all__ = ["prepare"]

_SAVES = ("save", "save_to_buffer", "_save_for_mobile", "_save_to_buffer_for_mobile")
_done: list[bool] = []


def prepare() -> None:
    """Have torch's functions for scripts and exported programs do so, from now on."""
    if _done:
        return
    _done.append(True)
    for name in _SAVES:
        _refuse(library.ScriptModule, name, "saves", _tensors_of_script)
    for name, does in (
        ("_save_jit_module", "saves"),
        ("_save_jit_module_to_bytes", "saves"),
        ("_freeze_module", "freezes"),
    ):
        _refuse(library, name, does, _tensors_of_script)
    _refuse(torch.export, "save", "saves", _tensors_of_program)
    for name in ("script", "load"):
        _wrap(torch.jit, name, _with_copies)


def _wrap(owner: Any, name: str, ours: Callable[..., Any]) -> None:  # noqa: ANN401
    theirs = getattr(owner, name, None)
    if theirs is None:  # not in this torch
        return

    @wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return ours(theirs, *args, **kwargs)

    setattr(owner, name, function)


def _refuse(
    owner: Any,  # noqa: ANN401
    name: str,
    does: str,
    tensors: Callable[[Any], Iterable[object]],
) -> None:
    def checked(theirs: Callable[..., Any], subject: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        paged = sum(map(torch_dispatch.is_keyed, tensors(subject)))
        if paged:
            raise ModelError(
                f"{name} {does} weights as they lie in memory, and {paged} of this program's are "
                "paged: restore the model first (penstock.restore, give_back)"
            )
        return theirs(subject, *args, **kwargs)

    _wrap(owner, name, checked)


def _tensors_of_script(module: Any) -> Iterable[object]:  # noqa: ANN401
    for kind in (library.ParameterDict, library.BufferDict):  # what is no parameter is a buffer
        yield from (tensor for _, tensor in kind(module).items())
    for _, part in library.ModuleDict(module).items():
        yield from _tensors_of_script(part)


def _tensors_of_program(program: Any) -> Iterable[object]:  # noqa: ANN401
    yield from program.state_dict.values()
    yield from program.constants.values()


def _with_copies(theirs: Callable[..., Any], subject: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    if isinstance(subject, nn.Module):
        with without_hooks(subject):
            made = theirs(subject, *args, **kwargs)
    else:
        made = theirs(subject, *args, **kwargs)
    graphs = [function.graph for function in compiled_scripts()]
    if isinstance(made, torch.jit.ScriptModule):
        for part in made.modules():
            script: Any = part._c
            graphs += [script._get_method(name).graph for name in script._method_names()]
    for graph in graphs:
        _copy_before_tolist(graph)
    return made


def _copy_before_tolist(graph: Any) -> None:  # noqa: ANN401
    for node in graph.findAllNodes("prim::tolist"):
        tensor = next(iter(node.inputs()))
        if tensor.node().kind() == "aten::clone":
            continue
        none = graph.create("prim::Constant", [], 1)
        none.output().setType(library.NoneType.get())
        copied = graph.create("aten::clone", [tensor, none.output()], 1)
        copied.output().setType(tensor.type())
        for made in (none, copied):
            made.insertBefore(node)
        node.replaceInput(0, copied.output())
