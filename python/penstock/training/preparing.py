"""Training a loaded model with a loaded optimizer under one cap, by one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from penstock.arguments import checked
from penstock.errors import ModelError
from penstock.loading.layout import Reserved
from penstock.loading.module_patterns import NamePattern
from penstock.loading.slots import find_slots
from penstock.manager.manager import MemoryManager
from penstock.manager.offload import MODEL, manager_of, on_restore, restore, take_over
from penstock.manager.settings import Options
from penstock.training.gradients import PagedGradients
from penstock.training.place import Place
from penstock.training.room import require_room
from penstock.training.states import PagedStates
from penstock.training.survey import GRADIENT, gradients_of, require_supported, states_of

__all__ = ["prepare"]

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=Optimizer)  # noqa: E741

_RUNS = 8  # of a step are under the cap at once: what it needs, what comes and what leaves


@checked
def prepare(
    model: M,
    optimizer: O,
    *,
    pin: Sequence[NamePattern] = (),
    stream: Sequence[NamePattern] = (),
    **settings: Unpack[Options],
) -> tuple[M, O]:
    """Have a model train with weights, gradients and states of its optimizer under one cap.

    All of them lie in host memory, and stream through `cap` bytes of the device as they are needed.
    A gradient leaves for its place when backward has made it; `step()` goes through the parameters
    in runs. Both objects stay what they are, and are used as ever: accumulation, clipping,
    schedulers, `GradScaler`, `foreach` and `fused`, state dicts. Losses, weights and states have
    the bits that they have without Penstock.

    Parameters
    ----------
    model
        A module with its weights in ordinary memory, on any device, and without gradients.
    optimizer
        One of `torch.optim`, for parameters of the model. It may have stepped, or loaded a state
        dict.
    pin, stream
        Patterns of names of modules whose weights stay in place, or stream even where there is
        room; see `MemoryManager.register`.
    settings
        `cap`, `device` and all others of `MemoryManager`. The cap counts weights, gradients and
        states; host memory has to hold all of them.

    Returns
    -------
    tuple
        `model` and `optimizer`. `penstock.restore(model)` takes both back.

    Raises
    ------
    ModelError
        If the model is offloaded already, or has gradients or weights that cannot move; if the
        optimizer is not torch's, is LBFGS or SparseAdam, is capturable or differentiable, or has
        parameters that are not the model's.
    CapExceededError
        If a weight, or what an operation of `step()` has in place at once, does not fit under the
        cap. Model and optimizer are as they were then.

    Notes
    -----
    In `backward()`, a sparse gradient and one with a history (`create_graph=True`) are a
    `ModelError`; so is, in `step()`, a parameter that was not trained when this was called. A step
    that ends by an error is half done, as one of plain torch is: go on from a saved state.
    """
    if manager_of(model) is not None:
        raise ModelError("the model is offloaded already: penstock.restore(model) first")
    find_slots(model)  # refuses what has no shape yet
    names = {parameter: name for name, parameter in model.named_parameters()}
    require_supported(optimizer, names)
    wanted = [*gradients_of(names), *states_of(optimizer, names)]
    beside = [reserved for _, reserved in wanted]
    manager = take_over(model, pin=pin, stream=stream, beside=beside, **settings)
    try:
        _page(manager, model, optimizer, names, [parameter for parameter, _ in wanted])
    except BaseException:
        restore(model)
        raise
    return model, optimizer


def _page(
    manager: MemoryManager,
    model: nn.Module,
    optimizer: Optimizer,
    names: dict[nn.Parameter, str],
    owners: Sequence[nn.Parameter],
) -> None:
    """Have gradients and states lie where room was made for them.

    Parameters
    ----------
    owners
        Whose gradient or state is each of what is reserved.
    """
    memory, beside = manager.room_beside(MODEL)
    of: dict[nn.Parameter, list[Reserved]] = {}
    for parameter, reserved in zip(owners, beside, strict=True):
        of.setdefault(parameter, []).append(reserved)
    require_room(memory, optimizer, names, of)
    gradients: dict[nn.Parameter, Place] = {}
    states: dict[nn.Parameter, dict[str, Place]] = {}
    for parameter, reserved in zip(owners, beside, strict=True):
        if reserved.kind == GRADIENT:
            gradients[parameter] = Place(memory, reserved)
        else:
            states.setdefault(parameter, {})[reserved.kind] = Place(memory, reserved)
    run_bytes = memory.most_pages * memory.pager.page_size // _RUNS
    paged_states = PagedStates(optimizer, names, states, gradients, run_bytes)
    paged_gradients = PagedGradients(gradients)
    on_restore(model, lambda: _leaving(paged_gradients, paged_states))
    paged_states.settle_all()
    paged_states.move_scalars()


@contextmanager
def _leaving(gradients: PagedGradients, states: PagedStates) -> Iterator[None]:
    """Have gradients and states follow the weights, which leave inside the block."""
    yield
    gradients.end()
    states.end()
