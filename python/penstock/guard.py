"""Guarding tensors on frames, whose addresses stay readable while their bytes are another page's.

A guarded tensor is of a class that sees every operation on it (`__torch_function__`): what reads
its values is given its pages for the time of the operation, what makes a view of it gives a guarded
view, and what only asks for shapes and the like goes through. A step opens the tensors that it
reads: it makes their pages ready and gives the tensors their plain class back, so that nothing
stands between them and the operations. When it ends, the tensors are closed again.

Two things are looked for when a tensor is closed. Whether it was written to (its version counter;
batch norm changes its buffers without counting, so floating-point buffers of modules in training
mode are taken as written to): then its bytes are copied back to where they come from. Whether a
view of it outlives the step (its storage's use count): then its pages stay in place for as long as
the view lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_iter, tree_map

from penstock.errors import ModelError
from penstock.observe import storage_address
from penstock.operations import CHANGES, EXPORTS, METADATA, VIEWS

__all__ = ["Access", "Entry", "Guard", "is_guarded", "on_host"]


class Access(Protocol):
    """How a guard has pages made ready."""

    def begin_read(self, entries: Sequence[Entry]) -> object:
        """Make the pages of tensors ready for the current stream; return what ends that."""

    def end_read(self, begun: object) -> None:
        """Let go of the pages once the stream's work so far has run."""

    def hold(self, pages: Sequence[int]) -> None:
        """Keep pages in place until they are let go of."""

    def let_go(self, pages: Sequence[int]) -> None:
        """Take one `hold` back."""

    def write_back(self, offset: int, nbytes: int) -> None:
        """Keep what was written to a range of the region."""

    def host_copy(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return the bytes of a range as they are kept on the host."""


class NoAccess:
    """The access to weights of a model that is registered no more.

    Parameters
    ----------
    name
        The model's, for messages.
    readable
        Whether the memory can be read as it is.
    """

    def __init__(self, name: str, *, readable: bool) -> None:
        self._name = name
        self._readable = readable

    def begin_read(self, entries: Sequence[Entry]) -> object:
        """Refuse, if the memory cannot be read."""
        if not self._readable:
            raise ModelError(
                f"model {self._name!r} was unregistered, and its weights went with it: read them "
                "before, or register it again"
            )
        return None

    def end_read(self, begun: object) -> None:
        """Do nothing."""

    def hold(self, pages: Sequence[int]) -> None:
        """Do nothing."""

    def let_go(self, pages: Sequence[int]) -> None:
        """Do nothing."""

    def write_back(self, offset: int, nbytes: int) -> None:
        """Do nothing."""

    def host_copy(self, offset: int, nbytes: int) -> torch.Tensor:
        """Refuse; nobody keeps the bytes."""
        raise ModelError(f"model {self._name!r} was unregistered: register it again")


class Entry:
    """One tensor on the region."""

    __slots__ = (
        "address",
        "count_before",
        "gone",
        "guard",
        "guarded",
        "kept",
        "nbytes",
        "offset",
        "opened",
        "pages",
        "plain",
        "silent",
        "storage",
        "tensor",
        "version",
    )

    def __init__(
        self, guard: Guard, tensor: torch.Tensor, offset: int, nbytes: int, pages: tuple[int, ...]
    ) -> None:
        self.guard = guard
        self.tensor = tensor
        self.offset = offset
        self.nbytes = nbytes
        self.pages = pages
        self.plain = type(tensor)
        self.guarded = _guarded_class(self.plain)
        self.opened = 0
        self.kept = False
        self.gone = False
        # Whether it may change without counting it.
        self.silent = not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        self.address = tensor.data_ptr()
        self.storage = tensor.untyped_storage()
        self.version = tensor._version
        self.count_before = self.use_count()  # when it was opened

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _no_entry, ()  # copies of the tensor are ordinary ones

    def escaped(self) -> bool:
        """Whether there are views that were not there when the tensor was opened."""
        return self.use_count() > self.count_before

    def is_saved(self) -> bool:
        """Whether autograd has saved it as it is, for a backward pass."""
        return self._holders() > self.tensor.requires_grad  # what accumulates its gradient is one

    def may_be_read(self) -> bool:
        """Whether an operation may be reading it just now.

        Who does holds it, as does what accumulates its gradient: this errs on one side.
        """
        return self._holders() > 0

    def _holders(self) -> int:
        """Count who holds the tensor beside its Python object."""
        users: int = self.tensor._use_count()  # type: ignore[attr-defined]
        return users - 1

    def use_count(self) -> int:
        """Count who holds the storage."""
        count: int = torch._C._storage_Use_Count(self.storage._cdata)
        return count


def _no_entry() -> None:
    return None


class Guard:
    """Guards the tensors of one model."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._by_address: dict[int, Entry] = {}
        self._kept: list[Entry] = []
        self.lost = False  # a tensor was given other memory
        self.removed = False
        self.entries: list[Entry] = []

    def add(self, tensor: torch.Tensor, offset: int, nbytes: int, pages: Iterable[int]) -> Entry:
        """Guard a tensor from now on."""
        entry = Entry(self, tensor, offset, nbytes, tuple(pages))
        self.entries.append(entry)
        self._by_address[entry.storage.data_ptr()] = entry
        tensor._penstock = entry  # type: ignore[attr-defined]
        _set_class(tensor, entry.guarded)
        return entry

    def remove(self, name: str, *, readable: bool) -> None:
        """End the guarding for good, and let go of everything.

        Parameters
        ----------
        name
            The model's, for messages.
        readable
            Whether the memory can be read as it is: then tensors get their plain class back. Else
            they stay guarded, and reading them is an error.
        """
        self.release_kept(force=True)
        for entry in self.entries:
            if readable:
                self._forget(entry)
            entry.gone = True
            del entry.tensor  # which may refer to the entry
        self.entries.clear()
        self._by_address.clear()
        self._access = NoAccess(name, readable=readable)
        self.removed = True
        self.lost = False

    # ---- steps ---------------------------------------------------------------------------------

    def open(self, entries: Iterable[Entry]) -> None:
        """Let the tensors be used as they are; their pages are ready."""
        for entry in entries:
            entry.opened += 1
            if entry.opened == 1 and not entry.gone:
                _set_class(entry.tensor, entry.plain)
                if not entry.kept:
                    entry.count_before = entry.use_count()

    def look_for_moved(self) -> None:
        """Find tensors that were given other memory while they were open."""
        for entry in self.entries:
            self._note_move(entry)

    def close(
        self,
        entries: Iterable[Entry],
        *,
        training: bool = False,
        unhooked: bool = False,
        while_read: bool = False,
    ) -> None:
        """Guard the tensors again; call it before their pages are let go of.

        Parameters
        ----------
        training
            Whether the module that read them is in training mode.
        unhooked
            Whether autograd saved them as they are: it reads them in the backward pass, so their
            pages are kept.
        while_read
            Whether operations may be under way that read them: the pages of these are kept, too.

        Raises
        ------
        Exception
            The last one from keeping what was written to one of them; all are guarded then too.
        """
        failure: Exception | None = None
        for entry in entries:
            entry.opened -= 1
            if entry.gone or entry.opened:
                continue
            if while_read and not entry.gone:  # first, so that no other operation begins
                _set_class(entry.tensor, entry.guarded)
            try:
                self._settle(entry, training)
                if (unhooked and entry.is_saved()) or (while_read and entry.may_be_read()):
                    self._keep(entry)
            except Exception as error:
                failure = error
            if not entry.gone:
                _set_class(entry.tensor, entry.guarded)
        if failure is not None:
            raise failure

    def settle(self, entries: Iterable[Entry], *, training: bool = False) -> None:
        """Look for writes and views as `close` does, but leave the tensors open."""
        for entry in entries:
            if not entry.gone:
                self._settle(entry, training)

    def _settle(self, entry: Entry, training: bool) -> None:
        self._note_change(entry, written=training and entry.silent)
        if entry.escaped():
            self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        """Keep a tensor's pages in place until nobody holds it any more."""
        if entry.gone or entry.kept:
            return
        self._access.hold(entry.pages)
        entry.kept = True
        self._kept.append(entry)

    def release_kept(self, *, force: bool = False) -> None:
        """Let go of pages that were kept for views which are gone."""
        if not self._kept:
            return
        gone = [entry for entry in self._kept if force or not (entry.escaped() or entry.is_saved())]
        self._kept = [entry for entry in self._kept if entry not in gone]
        for entry in gone:
            entry.kept = False
        with ExitStack() as ends:
            for entry in gone:
                ends.callback(self._access.let_go, entry.pages)
                ends.callback(self._note_change, entry)  # by who held it

    def _forget(self, entry: Entry) -> None:
        if entry.gone:
            return
        entry.gone = True
        self.lost = True
        _set_class(entry.tensor, entry.plain)
        if entry.tensor.__dict__.get("_penstock") is entry:
            del entry.tensor._penstock

    # ---- operations outside of steps -----------------------------------------------------------

    def call(
        self,
        entries: list[Entry],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Run an operation with the pages of the tensors that it reads."""
        with self.reading(entries, written=func in CHANGES), self.saving():
            views = [
                (value, value._penstock, value._version)
                for value in tree_iter((args, kwargs))
                if is_guarded(value) and not value.is_inference()
            ]
            try:
                return func(*args, **kwargs)
            finally:
                # Views such as `data` have a count of their own.
                for view, entry, version in views:
                    own = not entry.gone and view is entry.tensor
                    if view._version != version and not own and entry in entries:
                        self._access.write_back(entry.offset, entry.nbytes)

    @contextmanager
    def reading(self, entries: list[Entry], *, written: bool = False) -> Iterator[None]:
        """Have the pages of some tensors ready inside the block.

        Parameters
        ----------
        written
            Whether buffers among them may be changed without counting it.
        """
        begun = self._access.begin_read(entries)
        try:
            yield
        finally:
            try:
                for entry in entries:
                    self._note_move(entry)
                    self._note_change(entry, written=written and entry.silent)
            finally:
                self._access.end_read(begun)

    def _note_move(self, entry: Entry) -> None:
        if not entry.gone and entry.tensor.data_ptr() != entry.address:
            self._forget(entry)

    def _note_change(self, entry: Entry, *, written: bool = False) -> None:
        if entry.gone or (entry.tensor._version == entry.version and not written):
            return
        if entry.tensor.data_ptr() != entry.address:
            self._forget(entry)
            return
        entry.version = entry.tensor._version
        self._access.write_back(entry.offset, entry.nbytes)

    def wrap(self, result: Any) -> Any:  # noqa: ANN401
        """Guard the views of guarded tensors that an operation returned."""
        return tree_map(self._wrap_one, result)

    def _wrap_one(self, value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, torch.Tensor) or isinstance(value, _Guarded):
            return value
        entry = self._by_address.get(storage_address(value))
        if entry is None or (not entry.gone and value is entry.tensor):
            return value
        _set_class(value, _guarded_class(type(value)))
        value._penstock = entry  # type: ignore[attr-defined]
        return value

    # ---- autograd ------------------------------------------------------------------------------

    def saving(self) -> AbstractContextManager[Any]:
        """Have autograd remember weights by name, not by address, inside the block.

        In any case, since code inside may turn gradients on. Hooks around it, such as those of
        checkpointing, go on to see everything.
        """
        around = _hooks_around()
        if around is None:
            return saved_tensors_hooks(self._pack, _unpack)
        pack, unpack = around

        def pack_both(tensor: torch.Tensor) -> Any:  # noqa: ANN401
            packed = pack(tensor)
            return self._pack(packed) if isinstance(packed, torch.Tensor) else packed

        def unpack_both(packed: Any) -> Any:  # noqa: ANN401
            return unpack(_unpack(packed))

        return saved_tensors_hooks(pack_both, unpack_both)

    def _pack(self, tensor: torch.Tensor) -> Any:  # noqa: ANN401
        entry = self._by_address.get(storage_address(tensor))
        if entry is None:
            return tensor.detach()  # an operation's own result would keep its graph alive for ever
        return _Saved(entry, tensor)

    def clone(self, entry: Entry, like: torch.Tensor) -> torch.Tensor:
        """Copy a tensor or a view of it into ordinary memory on the device."""
        with torch._C.DisableTorchFunctionSubclass(), self.reading([entry]), torch.no_grad():
            return like.detach().clone(memory_format=torch.preserve_format)

    def host_copy(self, entry: Entry, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor or a view of it as it is kept on the host; do not write to it."""
        with torch._C.DisableTorchFunctionSubclass():
            flat = self._access.host_copy(entry.offset, entry.nbytes).view(like.dtype)
            return flat.as_strided(like.shape, like.stride(), like.storage_offset())


class _Saved:
    """A weight that autograd saved: read again, from wherever it is then."""

    def __init__(self, entry: Entry, tensor: torch.Tensor) -> None:
        self.entry = entry
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.device = tensor.device
        self.version = tensor._version


def _hooks_around() -> tuple[Callable[[Any], Any], Callable[[Any], Any]] | None:
    """Return what saves tensors now, if it is not autograd itself."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top(True) if top is not None else None


def _unpack(saved: Any) -> torch.Tensor:  # noqa: ANN401
    if not isinstance(saved, _Saved):
        tensor: torch.Tensor = saved
        return tensor
    entry = saved.entry
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if not entry.gone and entry.tensor._version != saved.version:
            raise RuntimeError(
                "one of the weights needed for gradient computation has been modified by an "
                "inplace operation after the forward pass that used it"
            )
        view = torch.empty(0, dtype=saved.dtype, device=saved.device)
        view.set_(entry.storage, saved.offset, saved.shape, saved.stride)
        return entry.guard.clone(entry, view)


class _Guarded:
    """What guarded classes have beside their plain class."""

    _penstock: Entry

    @classmethod
    def __torch_function__(
        cls,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in METADATA:
                return func(*args, **kwargs)
            entries = _entries(args, kwargs)
            if not entries:
                return func(*args, **kwargs)
            guard = entries[0].guard
            if func in VIEWS and not guard.removed:
                return guard.wrap(func(*args, **kwargs))
            if func in EXPORTS:
                copy = guard.clone(entries[0], args[0])
                return func(copy, *args[1:], **kwargs)
            return guard.wrap(_read_all(entries, func, args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            values = self._penstock.guard.clone(self._penstock, cast(torch.Tensor, self))
            memo[id(self)] = _ordinary(self, values)
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401
        host = self._penstock.guard.host_copy(self._penstock, cast(torch.Tensor, self))
        return _ordinary(self, host).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def is_guarded(value: object) -> bool:
    """Whether a value is a guarded tensor, or a view of one."""
    return isinstance(value, _Guarded)


def on_host(value: torch.Tensor) -> torch.Tensor:
    """Return a guarded tensor, or a view of one, as it is kept on the host."""
    assert isinstance(value, _Guarded)
    return value._penstock.guard.host_copy(value._penstock, value)


def _ordinary(guarded: Any, value: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Make a tensor of the plain class, with the attributes of a guarded one."""
    with torch._C.DisableTorchFunctionSubclass():
        entry: Entry = guarded._penstock
        if not isinstance(guarded, nn.Parameter):
            return value
        made = nn.Parameter(value, requires_grad=guarded.requires_grad)
        if entry.plain is not nn.Parameter:
            _set_class(made, entry.plain)
        attributes = {k: v for k, v in guarded.__dict__.items() if k != "_penstock"}
        made.__dict__.update(attributes)
        return made


def _entries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Entry]:
    found: dict[int, Entry] = {}
    for value in tree_iter((args, kwargs)):
        if isinstance(value, _Guarded):
            entry = value._penstock
            # A view may be on the memory that its tensor has left.
            if (
                not entry.gone
                or storage_address(cast(torch.Tensor, value)) == entry.storage.data_ptr()
            ):
                found[id(entry)] = entry
    return list(found.values())


def _read_all(
    entries: list[Entry], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:  # noqa: ANN401
    """Run an operation on tensors of one model, or of several."""
    guard = entries[0].guard
    mine = [entry for entry in entries if entry.guard is guard]
    others = [entry for entry in entries if entry.guard is not guard]
    if not others:
        return guard.call(mine, func, args, kwargs)
    return guard.call(mine, lambda *a, **k: _read_all(others, func, a, k), args, kwargs)


@cache
def _guarded_class(plain: type[torch.Tensor]) -> type[torch.Tensor]:
    if issubclass(plain, _Guarded):
        return plain
    make: Callable[..., type[torch.Tensor]] = type(plain)
    return make(f"Guarded{plain.__name__}", (_Guarded, plain), {"__module__": __name__})


def _set_class(tensor: torch.Tensor, to: type[torch.Tensor]) -> None:
    tensor.__class__ = to
