"""The memory manager: models by name, under one cap."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from penstock import _core
from penstock.adopt import Origin, Write, give_back, move_in, survey
from penstock.binding import Binding, View
from penstock.capture import CapturedPass
from penstock.errors import CapExceededError, ModelError
from penstock.fill import fill
from penstock.hard_cap import current_cap
from penstock.host import HOST_TIERS, open_tier, require_budget
from penstock.kernels import Kernel, KernelFunction
from penstock.layout import Placement, lay_out
from penstock.memory import FramesMemory, ManagedMemory, ModelMemory
from penstock.on_call import OnCall
from penstock.pager import Pager
from penstock.parts import Parts, find_parts, select_modules
from penstock.policy import FarthestUse, Policy, Priority
from penstock.progress import progress_bar
from penstock.residency import Residency
from penstock.runner import Runner
from penstock.sharing import Overtaken, Tenant
from penstock.sizes import format_bytes, parse_bytes
from penstock.skeleton import build_skeleton
from penstock.stats import ManagerStats, MemoryStats, ModelStats, format_schedule
from penstock.trace import write_trace
from penstock.weights import Weights, find_slots, match, open_weights

__all__ = ["MemoryManager"]

T = TypeVar("T")

_PATIENCE = 60.0  # seconds to go on dividing frames that others take meanwhile

_log = logging.getLogger("penstock")


@dataclass
class _Model:
    """One registered model."""

    binding: Binding
    tenant: Tenant | None  # what runs it, and its memory; None where it has no weights
    acquired: int = 0
    origin: Origin | None = None  # where the tensors of an adopted model were

    @property
    def runner(self) -> Runner | None:
        return self.tenant.runner if self.tenant else None


class MemoryManager:
    """Runs registered models with at most `cap` bytes of weights resident on the device.

    Parameters
    ----------
    cap
        Bytes of device memory for the weights of all models together, or a text such as `"8GiB"`:
        pages that are resident, and with frames the tables by which the driver addresses pinned
        host memory (a 512th of it). Activations and other buffers are not counted. None under a
        hard cap (`set_cap`): then weights have what everything else leaves.
    device
        `"cuda"`, `"cuda:N"`, `"cpu"`, or `"auto"`: CUDA where there is any.
    pager
        `"frames"`: weights stream from host memory through frames of device memory, at the rate of
        the link. `"managed"`: they lie in unified memory. `"auto"`: frames on a GPU, else managed.
        See `Pager`.
    host
        Where weights wait, with frames: `"pinned"` in host memory of their own; `"mapped"` in the
        page cache, from where they are copied directly; `"stream"` on disk, behind a ring of
        buffers; `"auto"`: pinned if `host_budget` allows it, else stream.
    host_budget
        Bytes of host memory that one model may take, or a text; None for what is free. A tier that
        needs more is refused.
    page_size
        Bytes of a page; see `Pager`.
    trace
        Whether times are taken of every step and load, for `timeline`.
    verify
        Whether every load is compared with its source, and pages that were used are overwritten.
        Slow; for tests.
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
        trace: bool = False,
        verify: bool = False,
        progress: bool | None = None,
        policy: Policy | None = None,
    ) -> None:
        if host not in HOST_TIERS:
            raise ValueError(f"host tier {host!r} is not known; use one of {', '.join(HOST_TIERS)}")
        self._pager = _open_pager(cap, device, pager, page_size)
        self._host = host
        self._host_budget = None if host_budget is None else parse_bytes(host_budget)
        self._trace = trace
        self._verify = verify
        self._progress = progress
        self._residency = Residency(self._pager, policy or FarthestUse())
        self._models: dict[str, _Model] = {}
        self._lock = threading.RLock()
        if self._pager.hard_cap is not None:
            self._pager.hard_cap.managers.add(self)
        self._on_call = OnCall(self.acquire, self.release)

    @property
    def pager(self) -> Pager:
        """The pager that all models share."""
        return self._pager

    @property
    def device(self) -> torch.device:
        """Where models run; inputs belong there."""
        return self._pager.device

    def register(
        self,
        name: str,
        module_or_builder: nn.Module | Callable[[], nn.Module],
        weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | Weights,
        *,
        dtype: torch.dtype | None = None,
        strict: bool = True,
        writable: bool = False,
        pin: Sequence[str] = (),
        stream: Sequence[str] = (),
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
            Convert 16, 32 and 64 bit floating-point weights to this; None keeps what the weights
            have, whatever the module's constructor says.
        strict
            Whether names that the module lacks, and buffers that the weights lack, are an error.
        writable
            Whether the weights will be written to, with managed memory: evicting then moves them.
            Without a meaning for frames, where each write is found and copied back, if the host
            tier is pinned; others refuse it.
        pin
            Patterns of module names, as `fnmatch` has them: these modules and what is in them stay
            in place for as long as the model is in use, or holds memory at all with frames.
        stream
            The same for modules that stream even where there is room for them to stay. They do so
            by whole pages: those that they share with other modules do not count.
        exist_ok
            Whether a model that has the name already is left as it is, instead of an error.

        Raises
        ------
        ModelError
            If the name is taken, the module is no skeleton, a pattern matches no module, or one is
            pinned and streamed.
        CheckpointError
            If the weights cannot be read, or do not fit the module.
        CapExceededError
            If the host tier needs more than `host_budget`, or what is pinned more than the cap.
        DeviceError
            If there is no room for the region.
        """
        with self._lock:
            if exist_ok and name in self._models:
                return
            self._require_new(name)
            with self._pager.measuring_link():
                module = build_skeleton(module_or_builder)
            slots = find_slots(module)
            pairs = match(module, slots, open_weights(weights), strict=strict)
            placements, nbytes = lay_out(slots, pairs, dtype, page_size=self.pager.page_size)
            parts = self._find_parts(name, module, placements, pin, stream)
            _announce_conversion(name, placements)
            memory = self._filled_memory(name, placements, nbytes, writable) if nbytes else None
            if memory is not None:
                memory.parts = parts
            self._add(name, self._bind(name, module, placements, memory))

    def _add(self, name: str, model: _Model) -> None:
        self._models[name] = model
        if model.tenant is not None:
            self._residency.add(model.tenant)

    def _require_new(self, name: str) -> None:
        if name in self._models:
            raise ModelError(f"model {name!r} is registered already; unregister it first")

    def _find_parts(
        self,
        name: str,
        module: nn.Module,
        placements: Sequence[Placement],
        pin: Sequence[str],
        stream: Sequence[str],
    ) -> Parts:
        page_size, cap = self._pager.page_size, self._pager.cap
        return find_parts(
            name, module, placements, pin=pin, stream=stream, page_size=page_size, cap=cap
        )

    def _filled_memory(
        self, name: str, placements: list[Placement], nbytes: int, writable: bool
    ) -> ModelMemory:
        with progress_bar(f"loading {name}", show=self._progress) as progress:
            if self._pager.kind == "managed":
                region = self._pager.reserve(nbytes, writable=writable)
                fill(region, placements, progress)
                return ManagedMemory(self._pager, region)
            tier = open_tier(
                self._host,
                self._pager,
                nbytes,
                placements,
                budget=self._host_budget,
                progress=progress,
            )
            return self._frames_memory(tier)

    def _frames_memory(self, tier: _core.HostTier) -> FramesMemory:
        memory = FramesMemory(self._pager, tier)
        memory.region_core.set_verify(self._verify)
        return memory

    def _bind(
        self,
        name: str,
        module: nn.Module,
        placements: list[Placement],
        memory: ModelMemory | None,
        *,
        before: Callable[[Placement], None] | None = None,
        views: Sequence[View] = (),
    ) -> _Model:
        """Put a module's tensors onto memory, which is closed where that fails."""
        try:
            with torch.inference_mode(False):  # its tensors keep no count of their changes
                if memory is not None:
                    memory.place(name, placements)
                binding = Binding(
                    module, placements, memory, self.device, before=before, views=views
                )
                if memory is None:
                    return _Model(binding, None)
                memory.finish_filling()
                runner = Runner(name, binding, memory, trace=self._trace)
                return _Model(binding, Tenant(name, runner))
        except BaseException:
            if memory is not None:
                memory.close()
            raise

    def adopt(
        self,
        name: str,
        module: nn.Module,
        *,
        pin: Sequence[str] = (),
        stream: Sequence[str] = (),
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

        Raises
        ------
        ModelError
            If the name is taken, weights cannot move (on meta, sparse, quantized), a pattern
            matches no module, or one is pinned and streamed.
        CapExceededError
            If the weights are more than `host_budget`, or what is pinned more than the cap.
        DeviceError
            If there is no room for the region.
        """
        with self._lock:
            self._require_new(name)
            if self._host not in ("auto", "pinned"):
                raise ModelError(
                    f"host tier {self._host!r} reads from files, which a loaded module has not: "
                    'use host="pinned", or register the module with its checkpoint'
                )
            placements, nbytes, origin, views = survey(module, self.pager.page_size)
            parts = self._find_parts(name, module, placements, pin, stream)
            write, memory = self._empty_memory(nbytes)
            if memory is not None:
                memory.parts = parts
            with torch.inference_mode(False), torch.no_grad():
                try:
                    move = partial(move_in, write)
                    model = self._bind(name, module, placements, memory, before=move, views=views)
                except BaseException:
                    give_back(module, memory, origin)
                    raise
            model.origin = origin
            self._add(name, model)

    def _empty_memory(self, nbytes: int) -> tuple[Write, ModelMemory | None]:
        if nbytes == 0:
            return (lambda offset, values: None), None
        if self._pager.kind == "managed":
            region = self._pager.reserve(nbytes, writable=False)
            managed = ManagedMemory(self._pager, region)
            return managed.region_core.write, managed
        remedy = "register the model with its checkpoint, which can be streamed"
        require_budget(nbytes, self._host_budget, "a loaded module, pinned,", remedy)
        tier = self._pager.empty_tier(nbytes)
        return tier.write, self._frames_memory(tier)

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
                give_back(model.binding.module, memory, model.origin)
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

    def _require_released(self, name: str, model: _Model) -> None:
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

    def require_room(self, name: str) -> None:
        """See that the largest tensor of a model, or what an operation is known to read, fits.

        Raises
        ------
        CapExceededError
            If it is larger than the cap.
        ModelError
            If there is no such model.
        """
        with self._lock:
            runner = self._find(name).runner
            needed = runner.least_frames() * self._pager.page_size if runner else 0
            cap = self._pager.cap
            if needed > cap:
                raise CapExceededError(
                    f"model {name!r} has a tensor of {format_bytes(needed)}, in whole pages, that "
                    f"an operation reads at once, and the cap is {format_bytes(cap)}: raise it to "
                    "that at least",
                    requested=needed,
                    cap=cap,
                    used=self._pager.budget.stats().used,
                )

    def acquire(self, name: str) -> nn.Module:
        """Mark a model as in use, begin to bring it in, and return it.

        Each operation waits for its own pages. Other models make room, in the order of the policy;
        one that is being called gives up at once what no operation uses just then.

        Raises
        ------
        ModelError
            If there is no such model.
        CapExceededError
            If it cannot run beside the models in use, and those that are protected from it.
        """
        return self._begin_use(name)

    def _begin_use(self, name: str, *, guest: bool = False) -> nn.Module:
        def begin() -> nn.Module:
            model = self._find(name)
            model.binding.warn_if_moved()
            if model.tenant is not None:
                self._residency.begin_use(model.tenant, guest=guest)
            model.acquired += 1
            return model.binding.module

        return self._when_there_is_room(begin)

    def _when_there_is_room(self, work: Callable[[], T]) -> T:
        """Do something with the lock, again where frames were taken while they were divided."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                with self._lock:
                    return work()
            except Overtaken as found:
                if time.monotonic() > end:
                    raise found.refusal from None
                time.sleep(0.001)

    def release(self, name: str, *, evict: bool = False) -> None:
        """Take one `acquire` back.

        Parameters
        ----------
        evict
            Whether to drop the model's pages when nobody has it acquired; else they stay until
            others need the room. Pages that are kept resident or reserved stay in any case.

        Raises
        ------
        ModelError
            If there is no such model, or it is not acquired.
        """
        with self._lock:
            model = self._find(name)
            if model.acquired == 0:
                raise ModelError(f"model {name!r} is not acquired")
            model.acquired -= 1
            if model.tenant is not None:
                self._residency.end_use(model.tenant, evict=evict)

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        """Acquire a model for a block; release and evict it at the end.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        module = self.acquire(name)
        try:
            yield module
        finally:
            self.release(name, evict=True)

    @contextmanager
    def guest(self, name: str) -> Iterator[nn.Module]:
        """Use a model for a block within what is not reserved; it is evicted at the end.

        It streams through as much as there is.

        Raises
        ------
        ModelError
            If there is no such model, or it is reserved.
        CapExceededError
            If what reserved models leave is too little for one of its steps.
        """
        module = self._begin_use(name, guest=True)
        try:
            yield module
        finally:
            self.release(name, evict=True)

    @contextmanager
    def keep_resident(self, *names: str) -> Iterator[None]:
        """Protect the pages of models from all others inside the block. It nests.

        Also pages that are brought in inside the block, and also from the end of a `use`. When the
        block ends, in whichever way, they stay until others need the room.

        Parameters
        ----------
        names
            Of models; none for all that are acquired now.

        Raises
        ------
        ModelError
            If there is no such model.

        Warns
        -----
        NothingToKeepWarning
            If there is nothing to protect.
        """
        with self._lock:
            tenants = [tenant for name in names if (tenant := self._find(name).tenant)]
            kept = self._residency.keep(tenants if names else None)
        try:
            yield
        finally:
            with self._lock:
                self._residency.keep_no_more(kept)

    def reserve(self, name: str, *, priority: Priority = Priority.PRIMARY) -> None:
        """Bring a model in to stay, and take its size from what guests may use.

        Parameters
        ----------
        name
            Of the model. Each has one reservation: the same once more does nothing.
        priority
            `Priority.PRIMARY` is never evicted. `Priority.SECONDARY` is where another model could
            not run otherwise, unless that is a guest; the report says so.

        Raises
        ------
        CapExceededError
            If the model does not fit, as a whole, beside what others reserve, keep, or need in
            order to run. Nothing has changed then.
        ModelError
            If there is no such model, or it is reserved with another priority.
        """

        def begin() -> None:
            tenant = self._find(name).tenant
            if tenant is not None:
                self._residency.reserve(tenant, priority)

        self._when_there_is_room(begin)

    def release_reservation(self, name: str) -> None:
        """Take `reserve` back; without a reservation, do nothing.

        What the model holds stays until others need the room.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            tenant = self._find(name).tenant
            if tenant is not None:
                self._residency.release_reservation(tenant)

    def module(self, name: str) -> nn.Module:
        """Return a model without acquiring it.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            return self._find(name).binding.module

    def acquire_on_call(self, *names: str) -> OnCall:
        """Have models be in use while they are called, one after the other, as in a pipeline.

        Nobody has to acquire them: a call of one does, and releases those whose calls have ended.
        They stay in place while there is room.

        Returns
        -------
        OnCall
            Its `end` releases whichever is in use for that, between calls.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            for name, runner in [(name, self._find(name).runner) for name in names]:
                if runner is not None:
                    self._on_call.watch(name, runner)
            return self._on_call

    def prefetch(self, name: str) -> None:
        """Begin to bring a model in without acquiring it, as far as there is room; return at once.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            tenant = self._find(name).tenant
            if tenant is not None:
                self._residency.prefetch(tenant)

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
        return CapturedPass(runner, args, kwargs)  # calls wait for their turn: not with the lock

    def register_kernel(
        self,
        modules: str | type[nn.Module],
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
            A pattern of module names, as `fnmatch` has them, or a class.
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
        if not self._trace:
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
        nbytes = parse_bytes(cap)

        def change() -> None:
            ledger = self._pager.budget.stats()
            if nbytes < ledger.cap:
                self._residency.give_way(nbytes)
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
            models = {name: self._model_stats(model) for name, model in self._models.items()}
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
                models=models,
            )

    def report(self) -> str:
        """Return the figures as text for people."""
        return str(self.stats())

    def _find(self, name: str) -> _Model:
        try:
            return self._models[name]
        except KeyError:
            known = ", ".join(sorted(self._models)) or "none"
            raise ModelError(f"there is no model {name!r}; registered: {known}") from None

    def _model_stats(self, model: _Model) -> ModelStats:
        figures = MemoryStats()
        if model.runner is not None:
            figures = model.runner.memory.stats(model.runner.step_name)
        return ModelStats(
            nbytes=sum(placement.nbytes for placement in model.binding.placements),
            acquired=model.acquired,
            steps=model.runner.step_count if model.runner else 0,
            moved=tuple(model.binding.moved()),
            memory=figures,
            kept=model.tenant is not None and model.tenant.kept > 0,
            reserved=model.tenant.reserved if model.tenant else None,
            pushed_out_bytes=model.tenant.pushed_out if model.tenant else 0,
        )


def _open_pager(
    cap: int | str | None,
    device: str | torch.device | _core.Device,
    kind: str,
    page_size: int | str | None,
) -> Pager:
    hard_cap = current_cap(device)
    if hard_cap is None:
        if cap is None:
            raise ValueError("give a cap, or set one for the process first: penstock.set_cap")
        return Pager(cap=cap, device=device, kind=kind, page_size=page_size)
    if cap is not None:
        raise ValueError(
            f"the process has a hard cap of {format_bytes(hard_cap.pager.cap)} already, which all "
            "managers share: leave the cap out"
        )
    if kind == "managed":
        raise ValueError(
            "managed memory is not held by a hard cap: the driver keeps evicted pages on the "
            'device until somebody needs them. Use pager="frames"'
        )
    return Pager(cap=hard_cap.pager, kind="frames", page_size=page_size)


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
