"""The memory manager: models by name, under one cap."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from penstock import _core
from penstock.arguments import checked
from penstock.errors import CapExceededError, ModelError
from penstock.loading.layout import Reserved
from penstock.loading.module_patterns import NamePattern, select_modules
from penstock.manager.registered_model import RegisteredModel
from penstock.manager.registration import Registration
from penstock.manager.settings import Settings
from penstock.policy import Policy
from penstock.report.stats import ManagerStats, MemoryStats, ModelStats, format_schedule
from penstock.report.trace import write_trace
from penstock.run.capture import CapturedPass
from penstock.run.kernels import Kernel, KernelFunction
from penstock.run.runner import Runner
from penstock.sizes import format_bytes, parse_cap

__all__ = ["MemoryManager"]


@checked
class MemoryManager(Registration):
    """Runs registered models with at most `cap` bytes of weights resident on the device.

    Parameters
    ----------
    cap
        Bytes of device memory for the weights of all models together, or a text such as `"8GiB"`,
        or `"60%"` of the device's memory: pages that are resident, and with frames the tables by
        which the driver addresses pinned host memory (a 512th of it). Activations and other buffers
        are not counted. None under a hard cap (`set_cap`): then weights have what everything else
        leaves.
    device
        `"cuda"`, `"cuda:N"`, `"cpu"`, or `"auto"`: CUDA where there is any.
    pager
        `"frames"`: weights stream from host memory through frames of device memory, at the rate of
        the link. `"managed"`: they lie in unified memory. `"auto"`: frames on a GPU, and where
        `host` or `host_budget` is given, else managed. See `Pager`.
    host
        Where weights wait, with frames: `"pinned"` in host memory of their own; `"mapped"` in the
        page cache, from where they are copied directly; `"stream"` on disk, behind a ring of
        buffers; `"auto"`: pinned if `host_budget` allows it, else stream.
    host_budget
        Bytes of host memory that one model may take, or a text; None for what is free. A tier that
        needs more is refused.
    page_size
        Bytes of a page; see `Pager`.
    keep_cached
        Whether checkpoints stay in the page cache once they were copied from there: a second copy
        in memory, where the next start finds them. Otherwise what was not cached before is read
        past the page cache. `"mapped"` lives in the page cache in either case, and `"stream"` stays
        past it.
    trace
        Whether times are taken of every step and load, for `timeline`.
    verify
        Whether every load into frames is compared with its source, and pages that were used are
        overwritten. With `"mapped"` and `"stream"`, each load is also compared, by checksum, with
        what the file gave when it was loaded first: so a change is found that left the file's size
        and time alone. Slow; for tests, and for files that are not trusted to stay.
    progress
        Whether to show progress bars; None for: if standard error is a terminal.
    policy
        Which models give way first where others need room; None for `penstock.FarthestUse`.

    Raises
    ------
    DeviceError
        If the device is not there or cannot page.

    Notes
    -----
    Thread-safe, and so are the models: each operation holds what it reads. Operations of a thread
    other than that which began a pass are not foreseen. A failed call changes nothing: the ledger
    stays balanced and the manager usable.
    """

    def __init__(
        self,
        *,
        cap: int | str | None = None,
        device: str | torch.device | _core.Device = "auto",
        pager: str = "auto",
        host: str = "auto",
        host_budget: int | str | None = None,
        page_size: int | str | None = None,
        keep_cached: bool = False,
        trace: bool = False,
        verify: bool = False,
        progress: bool | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__(
            Settings(
                cap=cap,
                device=device,
                pager=pager,
                host=host,
                host_budget=host_budget,
                page_size=page_size,
                keep_cached=keep_cached,
                trace=trace,
                verify=verify,
                progress=progress,
                policy=policy,
            )
        )
        if self._pager.hard_cap is not None:
            self._pager.hard_cap.add_models(self._figures_of_models)

    def capture(self, name: str, *args: Any, **kwargs: Any) -> CapturedPass:  # noqa: ANN401
        """Capture one call of an acquired model in a CUDA graph, its copies included.

        The model is called a few times first, until its plan is settled. From then on its passes
        may load half a percent more, so that the graph has fewer and larger copies.

        Parameters
        ----------
        args, kwargs
            What it is called with. Tensors are copied; `CapturedPass.replay` takes new values.

        Raises
        ------
        ModelError
            If there is no such model, it is not acquired, or its memory cannot be captured.
        ScheduleError
            If the model takes other steps with each call.
        """
        with self._lock:
            model = self._find(name)
            if model.acquired == 0:
                raise ModelError(f"model {name!r} is not acquired; capture it inside `use`")
            if model.runner is None:
                raise ModelError(f"model {name!r} has no weights to stream")
            runner = model.runner
        return CapturedPass(runner, args, kwargs)  # without the lock: calls may wait

    def register_kernel(
        self,
        modules: NamePattern | type[nn.Module],
        function: KernelFunction,
        *,
        model: str | None = None,
    ) -> Kernel:
        """Have a function of your own called in place of the forward of some modules.

        The function is called as `function(module, *args, **kwargs)`. The parameters and buffers of
        the module, and of all modules in it, are in place then: it may give their addresses to a
        kernel, to read. They are one step, so they have to fit together. The function may call the
        module's parts.

        Parameters
        ----------
        modules
            A pattern of module names, as `register` takes it, or a class.
        function
            What is called.
        model
            Of which model; None for all that are registered now.

        Returns
        -------
        Kernel
            Its `remove` undoes it; so does the end of a `with` block. Unregistering a model does
            not.

        Raises
        ------
        ModelError
            If there is no such model, no module matches, or one has a kernel already.
        """
        with self._lock:
            models = {model: self._find(model)} if model is not None else dict(self._models)
            found: list[tuple[str, nn.Module]] = []
            owners: dict[int, Runner | None] = {}
            for name, each in models.items():
                for part in select_modules(each.binding.module, modules):
                    found.append((f"{name}: {part[0]}", part[1]))
                    owners[id(part[1])] = each.runner
            if not found:
                known = ", ".join(repr(name) for name in models) or "no model"
                raise ModelError(f"{modules!r} matches no module of {known}")

            def holding(module: nn.Module) -> AbstractContextManager[None]:
                runner = owners[id(module)]
                return nullcontext() if runner is None else runner.holding(module)

            return Kernel(function, found, holding)

    def timeline(self, path: str | os.PathLike[str]) -> None:
        """Write what was traced as a Chrome trace, for chrome://tracing or Perfetto.

        Parameters
        ----------
        path
            The JSON file to write.

        Raises
        ------
        ValueError
            If the manager was not made with `trace=True`.
        """
        if not self._settings.trace:
            raise ValueError("nothing was traced: make the manager with trace=True")
        with self._lock:
            spans = {
                name: [(span, runner.step_name) for span in runner.memory.streamer.timeline()]
                for name, model in self._models.items()
                if (runner := model.runner) is not None
            }
        write_trace(Path(path), spans)

    def schedule(self, name: str) -> str:
        """Return the table of upcoming operations: each step, the pages it needs, what it reads.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            model = self._find(name)
            steps = model.runner.schedule() if model.runner else []
            return format_schedule(steps, self._pager.page_size)

    def set_cap(self, cap: int | str) -> None:
        """Change the cap. Where more is held than that, models give way first, idle ones first.

        Under a hard cap, that is `penstock.set_cap`, for the whole process.

        Raises
        ------
        CapExceededError
            If a model in use cannot run under the new cap, or primaries and what is kept resident
            do not fit; the old one stays.
        """
        if self._pager.hard_cap is not None:
            self._pager.hard_cap.set_cap(cap)
            return
        nbytes = parse_cap(cap, self._pager.core_device.info().total_bytes)

        def change() -> None:
            ledger = self._pager.budget.stats()
            if nbytes < ledger.cap:
                self._residency.give_way(nbytes)
            for name, model in self._models.items():
                if model.acquired:
                    self._require_room(name, nbytes)
            changed = self._pager.budget.try_set_cap(nbytes)
            self._residency.share_again()
            if not changed:
                used = self._pager.budget.stats().used
                raise CapExceededError(
                    f"{format_bytes(used)} are in use, so the cap cannot be {format_bytes(nbytes)}",
                    requested=nbytes,
                    cap=ledger.cap,
                    used=used,
                )

        self._when_there_is_room(change)

    def stats(self) -> ManagerStats:
        """Return the figures of this manager and its models."""
        with self._lock:
            ledger = self._pager.budget.stats()
            device = self._pager.core_device
            return ManagerStats(
                device=f"{self.device} ({device.info().name})",
                pager=self._pager.kind,
                cap=ledger.cap,
                used=ledger.used,
                peak=ledger.peak,
                used_by_tag=ledger.used_by_tag,
                peak_by_tag=ledger.peak_by_tag,
                link_rate=self._pager.link_rate,
                suppressed_errors=device.suppressed_count,
                models=self._figures_of_models(),
            )

    def report(self) -> str:
        """Return the figures as text for people."""
        return str(self.stats())

    def _figures_of_models(self) -> dict[str, ModelStats]:
        with self._lock:
            return {name: self._model_stats(model) for name, model in self._models.items()}

    def _model_stats(self, model: RegisteredModel) -> ModelStats:
        figures = MemoryStats()
        if model.runner is not None:
            figures = model.runner.memory.stats(model.runner.step_name)
        return ModelStats(
            nbytes=sum(placement.nbytes for placement in model.binding.placements),
            beside=_bytes_by_kind(model.beside),
            acquired=model.acquired,
            steps=model.runner.step_count if model.runner else 0,
            moved=tuple(model.binding.moved()),
            memory=figures,
            kept=model.tenant is not None and model.tenant.kept > 0,
            reserved=model.tenant.reserved if model.tenant else None,
            pushed_out_bytes=model.tenant.pushed_out if model.tenant else 0,
        )


def _bytes_by_kind(beside: Sequence[Reserved]) -> dict[str, int]:
    found: dict[str, int] = {}
    for reserved in beside:
        found[reserved.kind] = found.get(reserved.kind, 0) + reserved.nbytes
    return found
