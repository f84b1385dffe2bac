"""The states of an optimizer on a model's memory, and steps that stream through them.

A step goes through its parameters in runs whose weights, gradients and states fit well under the
cap together, so each is brought in once. To torch's optimizers, parameters of one group in several
groups of the same options are the same; so that is what a step is shown as its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from penstock.errors import ModelError
from penstock.torch_private import InstanceStep, own_step
from penstock.training.place import Place
from penstock.training.survey import is_paged_state

__all__ = ["PagedStates"]

Group = dict[str, Any]


class PagedStates:
    """The states of one optimizer.

    Parameters
    ----------
    names
        The model's parameters.
    places
        Of each parameter's states, by the names that the optimizer has for them.
    gradients
        Of the gradients.
    run_bytes
        How much of weights, gradients and states a step should need at once.

    Raises
    ------
    ModelError
        If the optimizer's step was replaced before.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[nn.Parameter, str],
        places: Mapping[nn.Parameter, Mapping[str, Place]],
        gradients: Mapping[nn.Parameter, Place],
        run_bytes: int,
    ) -> None:
        self._optimizer = optimizer
        self._names = names
        self._places = places
        self._gradients = gradients
        self._run_bytes = run_bytes
        step = own_step(optimizer)
        assert step is not None
        self._theirs = step
        try:
            self._step = InstanceStep(optimizer, self._run_step)
        except ValueError as error:
            raise ModelError(f"{error}: prepare it before that") from error
        self._hooks = (
            optimizer.register_load_state_dict_pre_hook(self._load),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        )
        self._ended = False

    # ---- steps ---------------------------------------------------------------------------------

    def _run_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:  # noqa: ANN401
        if self._ended:
            return self._theirs(optimizer, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = optimizer.param_groups
        self._require_known(groups)
        optimizer.param_groups = _Runs(groups, self._runs_of, self.settle)  # type: ignore[assignment]
        try:
            self._theirs(optimizer)
        finally:
            optimizer.param_groups = groups
        return loss

    def _require_known(self, groups: Sequence[Group]) -> None:
        for number, group in enumerate(groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None or not parameter.numel():
                    continue
                if parameter not in self._gradients:
                    name = self._names.get(parameter, f"parameter {index} of group {number}")
                    raise ModelError(
                        f"{name!r} was not trained when the model was prepared, so there is no "
                        "room for its gradient and states: penstock.restore(model), then prepare "
                        "again"
                    )
                if parameter.grad.layout != torch.strided:
                    self._gradients[parameter].require_fits(parameter.grad)

    def _runs_of(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        run: list[nn.Parameter] = []
        nbytes = 0
        for parameter in parameters:
            more = self._bytes_of(parameter)
            if run and nbytes + more > self._run_bytes:
                yield run
                run, nbytes = [], 0
            run.append(parameter)
            nbytes += more
        yield run

    def _bytes_of(self, parameter: nn.Parameter) -> int:
        if parameter.grad is None:
            return 0
        states = self._places.get(parameter, {}).values()
        return 2 * parameter.nbytes + sum(place.nbytes for place in states)

    # ---- where states are ----------------------------------------------------------------------

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have the states of parameters lie in their places.

        Raises
        ------
        ModelError
            If there is none for a state.
        """
        for parameter in parameters:
            states = self._optimizer.state.get(parameter, {})
            for name, value in states.items():
                if is_paged_state(value):
                    states[name] = self._place(parameter, name).put(value)

    def settle_all(self) -> None:
        """Have all states lie in their places."""
        for group in self._optimizer.param_groups:
            self.settle(group["params"])

    def move_scalars(self) -> None:
        """Have scalars be on the device where kernels want them there, which are the fused ones."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"] if group.get("fused") else ():
                states = self._optimizer.state.get(parameter, {})
                for name, value in states.items():
                    if isinstance(value, torch.Tensor) and value.dim() == 0:
                        states[name] = value.to(parameter.device)

    def _place(self, parameter: nn.Parameter, name: str) -> Place:
        place = self._places.get(parameter, {}).get(name)
        if place is None:
            raise ModelError(
                f"the optimizer has a state {name!r} for {self._names.get(parameter)!r} that it "
                "had not with the options it was prepared with: penstock.restore(model), then "
                "prepare again"
            )
        return place

    # ---- state dicts ---------------------------------------------------------------------------

    def _load(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
        """Put saved states in place one by one; on their way through torch they are so already."""
        saved = [group["params"] for group in given["param_groups"]]
        mine = [group["params"] for group in optimizer.param_groups]
        if list(map(len, saved)) != list(map(len, mine)):
            return None  # torch's own refusal
        pairs = [
            (parameter, number)
            for number, parameter in zip(chain(*saved), chain(*mine), strict=True)
            if number in given["state"]
        ]
        found = {number: dict(given["state"][number]) for _, number in pairs}
        for parameter, number in pairs:
            for name, value in found[number].items():
                if is_paged_state(value):
                    if parameter.is_floating_point():  # as torch does
                        value = value.to("meta", dtype=parameter.dtype)
                    self._place(parameter, name).require_fits(value)
        for parameter, number in pairs:
            before = optimizer.state.get(parameter, {})
            for name, value in found[number].items():
                if is_paged_state(value):
                    before.pop(name, None)
                    if parameter.is_floating_point():
                        value = value.to(parameter.dtype)
                    found[number][name] = self._place(parameter, name).put(value)
        return {**given, "state": {**given["state"], **found}}

    def _loaded(self, optimizer: Optimizer) -> None:
        self.settle_all()

    # ---- leaving -------------------------------------------------------------------------------

    def take(self) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
        """Return the states that lie on the memory."""
        taken: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        for parameter, places in self._places.items():
            states = self._optimizer.state.get(parameter, {})
            taken[parameter] = {
                name: states[name]
                for name, place in places.items()
                if name in states and place.has(states[name])
            }
        return taken

    def end(self) -> None:
        """Leave the optimizer alone from now on; states that somebody has keep their values."""
        self._ended = True
        self._step.remove()
        for hook in self._hooks:
            hook.remove()
        for places in self._places.values():
            for place in places.values():
                place.empty()


class _Runs:
    """Parameter groups, as a step of torch's sees them: each in several of the same options."""

    def __init__(
        self,
        groups: Sequence[Group],
        runs_of: Callable[[Sequence[nn.Parameter]], Iterator[list[nn.Parameter]]],
        done: Callable[[Sequence[nn.Parameter]], None],
    ) -> None:
        self._groups = groups
        self._runs_of = runs_of
        self._done = done

    def __iter__(self) -> Iterator[Group]:
        for group in self._groups:
            for run in self._runs_of(group["params"]):
                yield group | {"params": run}
                self._done(run)
