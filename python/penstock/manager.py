"""The memory manager: models by name, under one cap."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from penstock import _core
from penstock.adopt import Origin, Write, give_back, move_in, survey
from penstock.binding import Binding
from penstock.capture import CapturedPass
from penstock.errors import CapExceededError, ModelError
from penstock.fill import fill
from penstock.host import HOST_TIERS, open_tier, require_budget
from penstock.layout import Placement, lay_out
from penstock.memory import FramesMemory, ManagedMemory, ModelMemory
from penstock.on_call import OnCall
from penstock.pager import Pager
from penstock.progress import progress_bar
from penstock.runner import Runner
from penstock.sharing import Sharing
from penstock.sizes import format_bytes, parse_bytes
from penstock.skeleton import build_skeleton
from penstock.stats import ManagerStats, MemoryStats, ModelStats, format_schedule
from penstock.trace import write_trace
from penstock.weights import Weights, find_slots, match, open_weights

__all__ = ["MemoryManager"]

_log = logging.getLogger("penstock")


@dataclass
class _Model:
    """One registered model."""

    binding: Binding
    runner: Runner | None  # and with it, the memory; None where it has no weights
    acquired: int = 0
    last_use: int = 0
    origin: Origin | None = None  # where the tensors of an adopted model were


class MemoryManager:
    """Runs registered models with at most `cap` bytes of weights resident on the device.

    Parameters
    ----------
    cap
        Bytes of device memory for the weights of all models together, or a text such as `"8GiB"`:
        pages that are resident, and with frames the tables by which the driver addresses pinned
        host memory (a 512th of it). Activations and other buffers are not counted yet.
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

    Raises
    ------
    DeviceError
        If the device is not there or cannot page.

    Notes
    -----
    Managing is thread-safe; each model runs in one thread at a time. A failed call changes nothing:
    the ledger stays balanced and the manager usable.
    """

    def __init__(
        self,
        *,
        cap: int | str,
        device: str | torch.device | _core.Device = "auto",
        pager: str = "auto",
        host: str = "auto",
        host_budget: int | str | None = None,
        page_size: int | str | None = None,
        trace: bool = False,
        verify: bool = False,
        progress: bool | None = None,
    ) -> None:
        if host not in HOST_TIERS:
            raise ValueError(f"host tier {host!r} is not known; use one of {', '.join(HOST_TIERS)}")
        self._pager = Pager(cap=cap, device=device, kind=pager, page_size=page_size)
        self._host = host
        self._host_budget = None if host_budget is None else parse_bytes(host_budget)
        self._trace = trace
        self._verify = verify
        self._progress = progress
        self._sharing = Sharing(self._pager)
        self._uses = 0
        self._models: dict[str, _Model] = {}
        self._lock = threading.RLock()
        self._on_call = OnCall(self.acquire, self.release, self._lock)

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

        Raises
        ------
        ModelError
            If the name is taken, or the module is no skeleton.
        CheckpointError
            If the weights cannot be read, or do not fit the module.
        CapExceededError
            If the host tier needs more than `host_budget`.
        DeviceError
            If there is no room for the region.
        """
        with self._lock:
            self._require_new(name)
            module = build_skeleton(module_or_builder)
            slots = find_slots(module)
            pairs = match(module, slots, open_weights(weights), strict=strict)
            placements, nbytes = lay_out(slots, pairs, dtype, page_size=self.pager.page_size)
            _announce_conversion(name, placements)
            memory = self._filled_memory(name, placements, nbytes, writable) if nbytes else None
            self._models[name] = self._bind(name, module, placements, memory)

    def _require_new(self, name: str) -> None:
        if name in self._models:
            raise ModelError(f"model {name!r} is registered already; unregister it first")

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
    ) -> _Model:
        """Put a module's tensors onto memory, which is closed where that fails."""
        region = memory.region if memory else None
        try:
            with torch.inference_mode(False):  # its tensors keep no count of their changes
                binding = Binding(module, placements, region, self.device, before=before)
                if memory is None:
                    return _Model(binding, None)
                memory.finish_filling()
                return _Model(binding, Runner(name, binding, memory, trace=self._trace))
        except BaseException:
            if memory is not None:
                memory.close()
            raise

    def adopt(self, name: str, module: nn.Module) -> None:
        """Take over a module that is loaded: its weights move onto pager memory, one by one.

        There are never two copies of the model. `give_back` undoes it.

        Parameters
        ----------
        name
            How the model is called from now on.
        module
            With its weights in ordinary memory, on any device.

        Raises
        ------
        ModelError
            If the name is taken, or weights cannot move (on meta, sparse, quantized).
        CapExceededError
            If the weights are more than `host_budget`.
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
            placements, nbytes, origin = survey(module, self.pager.page_size)
            write, memory = self._empty_memory(nbytes)
            moved: list[Placement] = []

            def move(placement: Placement) -> None:
                move_in(write, placement)
                moved.append(placement)

            with torch.inference_mode(False), torch.no_grad():
                try:
                    model = self._bind(name, module, placements, memory, before=move)
                except BaseException:
                    give_back(moved, memory, origin)
                    raise
            model.origin = origin
            self._models[name] = model

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
            memory = model.runner.memory if model.runner else None
            self._forget(name, readable=True)
            with torch.inference_mode(False), torch.no_grad():
                give_back(model.binding.placements, memory, model.origin)

    def unregister(self, name: str) -> None:
        """Forget a model. Its memory goes when the last tensor on it does.

        Managed weights can be read on; weights on frames cannot, and say so.

        Raises
        ------
        ModelError
            If there is no such model, or it is acquired.
        """
        with self._lock:
            self._forget(name, readable=self._pager.kind == "managed")

    def _forget(self, name: str, *, readable: bool) -> None:
        self._on_call.end(name)
        model = self._find(name)
        if model.acquired:
            raise ModelError(f"model {name!r} is acquired {model.acquired}x; release it first")
        if model.runner is not None:
            model.runner.evict()
            model.runner.detach(readable=readable)
            model.runner.memory.close()
        del self._models[name]

    def acquire(self, name: str) -> nn.Module:
        """Mark a model as in use, begin to bring it in, and return it.

        Returns at once; each module waits for its own pages. Idle models make room, the least
        recently used first.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            model = self._find(name)
            model.binding.warn_if_moved()
            if model.runner is not None:
                self._make_room(model.runner)
                model.runner.memory.set_active(True)
                model.runner.prefetch()
            model.acquired += 1
            self._note_use(model)
            return model.binding.module

    def _note_use(self, model: _Model) -> None:
        self._uses += 1
        model.last_use = self._uses

    def _runners(self) -> list[tuple[Runner, bool]]:
        """List all models with weights, the least recently used first, and whether in use."""
        models = sorted(self._models.values(), key=lambda each: each.last_use)
        return [(each.runner, each.acquired > 0) for each in models if each.runner is not None]

    def _make_room(self, runner: Runner) -> None:
        others = [(other, in_use) for other, in_use in self._runners() if other is not runner]
        self._sharing.make_room(runner, others)

    def _share_again(self) -> None:
        """Give each model in use its share of what there is now."""
        for runner, in_use in self._runners():
            if in_use:
                self._make_room(runner)
                return

    def release(self, name: str, *, evict: bool = False) -> None:
        """Take one `acquire` back.

        Parameters
        ----------
        evict
            Whether to drop the model's pages when nobody has it acquired; else they stay until
            others need the room.

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
            self._note_use(model)
            if model.acquired == 0 and model.runner is not None:
                model.runner.memory.set_active(False)
                model.runner.unwind()
                if evict:
                    model.runner.evict()
                    with suppress(CapExceededError):  # others have what they had
                        self._share_again()

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
                    runner.before_call = partial(self._on_call.begin, name, runner)
            return self._on_call

    def prefetch(self, name: str) -> None:
        """Begin to bring a model in without acquiring it, as far as there is room; return at once.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            model = self._find(name)
            if model.runner is None:
                return
            if model.acquired or self._sharing.use_free_room(model.runner):
                model.runner.prefetch()

    def capture(self, name: str, *args: Any, **kwargs: Any) -> CapturedPass:  # noqa: ANN401
        """Capture one call of an acquired model in a CUDA graph, its copies included.

        The model is called a few times first, until its plan is settled.

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
            return CapturedPass(model.runner, args, kwargs)

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
        """Return the table of upcoming operations: each step, what it reads, on which pages.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            model = self._find(name)
            return format_schedule(model.runner.schedule() if model.runner else [])

    def set_cap(self, cap: int | str) -> None:
        """Change the cap. Where more is held than that, models give way first, idle ones first.

        Raises
        ------
        CapExceededError
            If a model in use cannot run under the new cap; the old one stays.
        ScheduleError
            If a model that has to give way is running.
        """
        nbytes = parse_bytes(cap)
        with self._lock:
            before = self._pager.cap
            if nbytes < before:
                idle = [runner for runner, in_use in self._runners() if not in_use]
                active = [runner for runner, in_use in self._runners() if in_use]
                try:
                    self._sharing.give_way(nbytes, idle, active)
                except CapExceededError:
                    self._share_again()
                    raise
            if not self._pager.budget.try_set_cap(nbytes):
                used = self._pager.budget.stats().used
                self._share_again()
                raise CapExceededError(
                    f"{format_bytes(used)} are in use, so the cap cannot be {format_bytes(nbytes)}",
                    requested=nbytes,
                    cap=before,
                    used=used,
                )
            self._share_again()

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
            steps=len(model.runner.steps) if model.runner else 0,
            moved=tuple(model.binding.moved()),
            memory=figures,
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
