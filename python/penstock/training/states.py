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
from penstock.training.survey import StateNames, is_paged_state

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
        self._state_names = StateNames(optimizer)
        self._step = InstanceStep(optimizer, self._run_step)
        self._hooks = (
            optimizer.register_load_state_dict_pre_hook(self._load),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        )
        self._ended = False

    # ---- steps ---------------------------------------------------------------------------------

    def _run_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:  # noqa: ANN401
        if self._ended or torch.compiler.is_compiling():
            return self._theirs(optimizer, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = optimizer.param_groups
        self._require_known(groups)
        optimizer.param_groups = _Runs(groups, self._runs_of, self.settle)
        try:
            self._theirs(optimizer)
        finally:
            optimizer.param_groups = groups
        return loss

    def _require_known(self, groups: Sequence[Group]) -> None:
        """Refuse a step for which there is no room, before anything changes."""
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
                for name in self._state_names.of(group, parameter):
                    self._place(parameter, name)

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
                    self._place(parameter, name).move_in(value)

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
                f"the optimizer has a state {name!r} for {self._names.get(parameter)!r}, for which "
                "no room was made: its options, or its parameters, were others when it was "
                "prepared. penstock.restore(model), then prepare again"
            )
        return place

    # ---- state dicts ---------------------------------------------------------------------------

    def _load(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
        """Put saved states in place one by one where torch would copy them to the device.

        Others become the optimizer's own, and are moved when they are.
        """
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
                    like = torch.empty_like(value, dtype=_dtype(parameter, value), device="meta")
                    self._place(parameter, name).require_fits(like)
        for parameter, number in pairs:
            optimizer.state.pop(parameter, None)
            for name, value in found[number].items():
                dtype = _dtype(parameter, value) if is_paged_state(value) else None
                if dtype and (value.device, value.dtype) != (parameter.device, dtype):
                    found[number][name] = self._place(parameter, name).put(value.to(dtype))
        return {**given, "state": {**given["state"], **found}}

    def _loaded(self, optimizer: Optimizer) -> None:
        self.settle_all()

    # ---- leaving -------------------------------------------------------------------------------

    def end(self) -> None:
        """Have states go to ordinary memory, where their parameters are, and be left alone."""
        self._ended = True
        self._step.remove()
        for hook in self._hooks:
            hook.remove()
        for parameter, places in self._places.items():
            states = self._optimizer.state.get(parameter, {})
            for name, place in places.items():
                if isinstance(value := states.get(name), torch.Tensor):
                    place.move_out(value, parameter.device)
                place.empty()
        self.move_scalars()


def _dtype(parameter: nn.Parameter, value: torch.Tensor) -> torch.dtype:
    """Return what torch converts a state to when it is loaded."""
    return parameter.dtype if parameter.is_floating_point() else value.dtype


class _Runs(list[Group]):
    """Parameter groups, as a step of torch's goes through them: each in several of its options."""

    def __init__(
        self,
        groups: Sequence[Group],
        runs_of: Callable[[Sequence[nn.Parameter]], Iterator[list[nn.Parameter]]],
        done: Callable[[Sequence[nn.Parameter]], None],
    ) -> None:
        super().__init__(groups)
        self._runs_of = runs_of
        self._done = done

    def __iter__(self) -> Iterator[Group]:
        for group in super().__iter__():
            for run in self._runs_of(group["params"]):
                yield group | {"params": run}
                self._done(run)
