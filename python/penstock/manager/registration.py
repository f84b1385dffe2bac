"""Registering models: building them on pager memory, or moving loaded ones there and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from penstock.arguments import checked
from penstock.errors import ModelError
from penstock.loading.binding import Binding, View
from penstock.loading.layout import Placement, Reserved, lay_out, lay_out_beside
from penstock.loading.module_patterns import NamePattern, find_page_rules
from penstock.loading.moving import move_in, move_out, survey
from penstock.loading.open_memory import empty_memory, filled_memory
from penstock.loading.skeleton import build_skeleton
from penstock.loading.slots import find_slots, match
from penstock.loading.weights import Weights, open_weights, require_floating
from penstock.manager.models_in_use import ModelsInUse
from penstock.manager.registered_model import RegisteredModel
from penstock.memory.model_memory import ModelMemory
from penstock.memory.page_rules import PageRules
from penstock.report.progress import progress_bar
from penstock.run.runner import Runner
from penstock.sharing.tenant import Tenant
from penstock.sizes import format_bytes

__all__ = ["Registration"]

_log = logging.getLogger("penstock")


@checked
class Registration(ModelsInUse):
    """The part of a `MemoryManager` that takes models in, and lets them go."""

    def register(
        self,
        name: str,
        module_or_builder: nn.Module | Callable[[], nn.Module],
        weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | Weights,
        *,
        dtype: torch.dtype | None = None,
        strict: bool = True,
        writable: bool = False,
        pin: Sequence[NamePattern] = (),
        stream: Sequence[NamePattern] = (),
        exist_ok: bool = False,
    ) -> None:
        """Build a model on pager memory and read its weights; none of it is resident afterwards.

        Parameters
        ----------
        name
            How the model is called from now on.
        module_or_builder
            A function that builds the module, which is best, or a module made under
            `torch.device("meta")`. No memory is spent on parameters in either case.
        weights
            A `.safetensors` file, a `*.safetensors.index.json`, a directory with either, a torch
            file (`.pt`, `.bin`), or tensors by name.
        dtype
            Convert 16, 32 and 64 bit floating-point weights to this, one of such types too; None
            keeps what the weights have, whatever the module's constructor says.
        strict
            Whether names that the module lacks, and buffers that the weights lack, are an error.
        writable
            Whether the weights will be written to, with managed memory: evicting then moves them.
            Without a meaning for frames, where each write is found and copied back, if the host
            tier is pinned; others refuse it.
        pin
            Patterns of module names: texts as `fnmatch` has them, or regular expressions
            (`re.compile`), which have to match the whole name. These modules and what is in them
            stay in place for as long as the model is in use, or holds memory at all with frames.
        stream
            The same for modules that stream even where there is room for them to stay. They do so
            by whole pages: those that they share with other modules do not count.
        exist_ok
            Whether a model that has the name already is left as it is, instead of an error.

        Raises
        ------
        ModelError
            If the name is taken, the module is no skeleton or is scripted, a pattern matches no
            module, or one is pinned and streamed.
        CheckpointError
            If the weights cannot be read, or do not fit the module.
        CapExceededError
            If the host tier needs more than `host_budget`, or what is pinned more than the cap.
        DeviceError
            If there is no room for the region.
        ValueError
            If `dtype` is not a floating-point type.
        """
        require_floating(dtype)
        with self._lock:
            if exist_ok and name in self._models:
                return
            self._require_new(name)
            with self._pager.measuring_link():
                module = build_skeleton(module_or_builder)
            _refuse_scripted(module)
            slots = find_slots(module)
            pairs = match(module, slots, open_weights(weights), strict=strict)
            placements, nbytes = lay_out(slots, pairs, dtype, page_size=self.pager.page_size)
            rules = self._find_page_rules(name, module, placements, pin, stream)
            _announce_conversion(name, placements)
            memory = self._filled_memory(name, placements, nbytes, writable) if nbytes else None
            if memory is not None:
                memory.rules = rules
            self._add(name, self._bind(name, module, placements, memory))

    def _add(self, name: str, model: RegisteredModel) -> None:
        if model.tenant is not None:
            self._residency.add(model.tenant)
        self._models[name] = model

    def _require_new(self, name: str) -> None:
        if name in self._models:
            raise ModelError(f"model {name!r} is registered already; unregister it first")

    def _find_page_rules(
        self,
        name: str,
        module: nn.Module,
        placements: Sequence[Placement],
        pin: Sequence[NamePattern],
        stream: Sequence[NamePattern],
    ) -> PageRules:
        page_size, cap = self._pager.page_size, self._pager.cap
        return find_page_rules(
            name, module, placements, pin=pin, stream=stream, page_size=page_size, cap=cap
        )

    def _filled_memory(
        self, name: str, placements: list[Placement], nbytes: int, writable: bool
    ) -> ModelMemory:
        with progress_bar(f"loading {name}", show=self._settings.progress) as progress:
            return filled_memory(
                self._pager,
                nbytes,
                placements,
                host=self._settings.host,
                host_budget=self._settings.host_budget_bytes,
                keep_cached=self._settings.keep_cached,
                writable=writable,
                verify=self._settings.verify,
                progress=progress,
            )

    def _bind(
        self,
        name: str,
        module: nn.Module,
        placements: list[Placement],
        memory: ModelMemory | None,
        *,
        before: Callable[[Placement], None] | None = None,
        views: Sequence[View] = (),
        beside: Sequence[Reserved] = (),
    ) -> RegisteredModel:
        """Put a module's tensors onto memory, which is closed where that fails."""
        try:
            with torch.inference_mode(False):  # its tensors keep no count of their changes
                if memory is not None:
                    memory.place(name, [*placements, *beside])
                binding = Binding(
                    module, placements, memory, self.device, before=before, views=views
                )
                if memory is None:
                    return RegisteredModel(binding, None)
                memory.finish_filling()
                runner = Runner(name, binding, memory, trace=self._settings.trace)
                return RegisteredModel(binding, Tenant(name, runner), beside=beside)
        except BaseException:
            if memory is not None:
                memory.close()
            raise

    def adopt(
        self,
        name: str,
        module: nn.Module,
        *,
        pin: Sequence[NamePattern] = (),
        stream: Sequence[NamePattern] = (),
        beside: Sequence[Reserved] = (),
    ) -> None:
        """Take over a module that is loaded: its weights move onto pager memory, one by one.

        There are never two copies of the model. `give_back` undoes it.

        Parameters
        ----------
        name
            How the model is called from now on.
        module
            With its weights in ordinary memory, on any device.
        pin, stream
            Patterns of names of modules that are to stay, or to stream; see `register`.
        beside
            What else is to have room on the model's memory, behind its weights; see `room_beside`.

        Raises
        ------
        ModelError
            If the name is taken, the module is scripted, weights cannot move (on meta, sparse,
            quantized), a pattern matches no module, or one is pinned and streamed.
        CapExceededError
            If the weights are more than `host_budget`, or what is pinned more than the cap.
        DeviceError
            If there is no room for the region.
        """
        with self._lock:
            self._require_new(name)
            _refuse_scripted(module)
            if self._settings.host not in ("auto", "pinned"):
                raise ModelError(
                    f"host tier {self._settings.host!r} reads from files, which a loaded module "
                    'has not: use host="pinned", or register the module with its checkpoint'
                )
            placements, nbytes, origin, views = survey(module, self.pager.page_size)
            reserved, nbytes = lay_out_beside(beside, nbytes)
            rules = self._find_page_rules(name, module, placements, pin, stream)
            memory = self._empty_memory(nbytes)
            if memory is not None:
                memory.rules = rules
            with torch.inference_mode(False), torch.no_grad():
                try:
                    move = partial(move_in, memory.write if memory is not None else None)
                    model = self._bind(
                        name, module, placements, memory, before=move, views=views, beside=reserved
                    )
                except BaseException:
                    move_out(module, memory, origin)
                    raise
            model.origin = origin
            self._add(name, model)

    def room_beside(self, name: str) -> tuple[ModelMemory, Sequence[Reserved]]:
        """Return the memory of a model with weights, and what is reserved on it beside these.

        Raises
        ------
        ModelError
            If there is no such model, or it has no weights.
        """
        with self._lock:
            model = self._find(name)
            if model.runner is None:
                raise ModelError(f"model {name!r} has no weights, so it has no memory")
            return model.runner.memory, model.beside

    def _empty_memory(self, nbytes: int) -> ModelMemory | None:
        if nbytes == 0:
            return None
        return empty_memory(
            self._pager,
            nbytes,
            host_budget=self._settings.host_budget_bytes,
            verify=self._settings.verify,
        )

    def give_back(self, name: str) -> None:
        """Undo `adopt`: the weights return to ordinary memory, where they were before.

        Raises
        ------
        ModelError
            If there is no such model, it is acquired, or it was not adopted.
        """
        with self._lock:
            model = self._find(name)
            if model.origin is None:
                raise ModelError(f"model {name!r} was registered, not adopted; unregister it")
            self._require_released(name, model)
            memory = model.runner.memory if model.runner else None
            leaving = model.binding.leaving()
            with torch.inference_mode(False), torch.no_grad(), leaving:
                move_out(model.binding.module, memory, model.origin)
            self._forget(name)

    def unregister(self, name: str) -> None:
        """Forget a model. Its memory goes when the last tensor on it does.

        Until then its weights can be read on: they page as before, unforeseen.

        Raises
        ------
        ModelError
            If there is no such model, or it is acquired.
        """
        with self._lock:
            self._require_released(name, self._find(name))
            self._forget(name)

    def _require_released(self, name: str, model: RegisteredModel) -> None:
        self._on_call.end(name)
        if model.acquired:
            raise ModelError(f"model {name!r} is acquired {model.acquired}x; release it first")

    def _forget(self, name: str) -> None:
        model = self._find(name)
        if model.tenant is not None:
            runner = model.tenant.runner
            runner.evict()
            runner.detach()
            runner.memory.set_active(False)
            runner.memory.close()
            self._residency.remove(model.tenant)
        del self._models[name]


def _refuse_scripted(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(module).__name__} is compiled by torch.jit, and takes no hooks: give Penstock "
            "the module that it was made of, and script that"
        )


def _announce_conversion(name: str, placements: list[Placement]) -> None:
    converted = [placement for placement in placements if placement.converts]
    if converted:
        before = sorted({str(placement.source.dtype) for placement in converted})
        nbytes = sum(placement.nbytes for placement in converted)
        _log.info(
            "%s: converting %d tensors from %s to %s (%s)",
            name,
            len(converted),
            ", ".join(before),
            converted[0].dtype,
            format_bytes(nbytes),
        )
