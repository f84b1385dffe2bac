"""Models in use: acquiring and releasing them, and what stays on the device beyond that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from penstock.arguments import checked
from penstock.errors import CapExceededError, ModelError
from penstock.manager.registered_model import RegisteredModel
from penstock.manager.settings import Settings
from penstock.memory.pager import Pager
from penstock.policy import FarthestUse, Priority
from penstock.sharing.acquire_on_call import OnCall
from penstock.sharing.division import Overtaken
from penstock.sharing.residency import Residency
from penstock.sizes import format_bytes

__all__ = ["ModelsInUse"]

T = TypeVar("T")

_PATIENCE = 60.0  # seconds to go on dividing frames that others take meanwhile


@checked
class ModelsInUse:
    """The part of a `MemoryManager` that is about the use of models that are registered.

    Parameters
    ----------
    settings
        Of the manager.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pager = settings.open_pager()
        self._residency = Residency(self._pager, settings.policy or FarthestUse())
        self._models: dict[str, RegisteredModel] = {}
        self._lock = threading.RLock()
        self._on_call = OnCall(self.acquire, self.release)

    @property
    def settings(self) -> Settings:
        """What it was made with."""
        return self._settings

    @property
    def pager(self) -> Pager:
        """The pager that all models share."""
        return self._pager

    @property
    def device(self) -> torch.device:
        """Where models run; inputs belong there."""
        return self._pager.device

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
            self._require_room(name, self._pager.cap)

    def _require_room(self, name: str, cap: int) -> None:
        runner = self._find(name).runner
        needed = runner.least_frames() * self._pager.page_size if runner else 0
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

    def reserve(self, name: str, *, priority: Priority | str = Priority.PRIMARY) -> None:
        """Bring a model in to stay, and take its size from what guests may use.

        Parameters
        ----------
        name
            Of the model. Each has one reservation: the same once more does nothing.
        priority
            `Priority.PRIMARY` is never evicted. `Priority.SECONDARY` is where another model could
            not run otherwise, unless that is a guest; the report says so. Their texts do, too.

        Raises
        ------
        CapExceededError
            If the model does not fit, as a whole, beside what others reserve, keep, or need in
            order to run. Nothing has changed then.
        ModelError
            If there is no such model, or it is reserved with another priority.
        ValueError
            If the priority is none.
        """
        priority = Priority(priority)

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

    @contextmanager
    def one_pass(self, name: str) -> Iterator[None]:
        """Have a block be one pass of a model, for loops that call its parts and not the model.

        What a call of the model is told by itself is said here: where passes begin and end. Calls
        inside the block, and blocks in it, are part of the pass; those of other threads are not.

        Raises
        ------
        ModelError
            If there is no such model.
        """
        with self._lock:
            runner = self._find(name).runner
        with nullcontext() if runner is None else runner.one_pass():
            yield

    @contextmanager
    def hold(self, name: str, part: nn.Module) -> Iterator[None]:
        """Have all tensors of a module in a model in place inside the block, as one step.

        For a kernel that is given their addresses, to read; torch's operations do not need it.

        Raises
        ------
        ModelError
            If there is no such model, or it has no such module.
        CapExceededError
            If they do not fit together.
        """
        with self._lock:
            model = self._find(name)
            if all(part is not each for each in model.binding.module.modules()):
                raise ModelError(f"part: model {name!r} has no such module ({type(part).__name__})")
            runner = model.runner
        with nullcontext() if runner is None else runner.holding(part):
            yield

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

    def _find(self, name: str) -> RegisteredModel:
        try:
            return self._models[name]
        except KeyError:
            known = ", ".join(sorted(self._models)) or "none"
            raise ModelError(f"there is no model {name!r}; registered: {known}") from None
