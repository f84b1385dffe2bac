"""What is to be placed: the tensors of one model, or of each part of a pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from penstock.checkpoint.json_file import read_json_object
from penstock.checkpoint.kinds import TORCH_SUFFIXES
from penstock.errors import CheckpointError
from penstock.forecast.reads import Read, find_reads, has_experts
from penstock.loading.layout import (
    ALIGNMENT,
    Placement,
    converted,
    is_small,
    lay_out,
    pack,
    small_are_first,
)
from penstock.loading.skeleton import build_skeleton
from penstock.loading.slots import Slot, find_slots, match
from penstock.loading.weights import Weights, open_weights

__all__ = ["Laid", "Part", "is_pipeline", "open_parts", "part_of", "part_of_module"]

_INDEX = "model_index.json"


@dataclass(frozen=True)
class Laid:
    """A part on a region with pages of one size.

    Parameters
    ----------
    nbytes
        Of the region.
    steps
        For each operation of a pass, the pages that it reads.
    least_bytes, least_pages
        What one operation reads at most, wherever its tensors come to lie: charged bytes, where a
        last page is no whole one, and pages.
    largest
        The operation that reads so much, by its index.
    """

    page_size: int
    nbytes: int
    steps: list[list[int]]
    least_bytes: int
    least_pages: int
    largest: int | None

    @property
    def page_count(self) -> int:
        """Pages of the region."""
        return -(-self.nbytes // self.page_size)


@dataclass(frozen=True, eq=False)
class Part:
    """One model, as it will be registered.

    Parameters
    ----------
    placements
        Its tensors, in the order of the module; their offsets mean nothing.
    ordered
        Whether that order is known. A checkpoint alone has another one, and then the least cap is
        for any order.
    reads
        What each operation of a pass reads of the placements.
    notes
        What has been assumed.
    """

    name: str
    placements: tuple[Placement, ...]
    ordered: bool
    reads: tuple[Read, ...]
    notes: tuple[str, ...] = ()
    _laid: dict[int, Laid] = field(default_factory=dict, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(placement.nbytes for placement in self.placements)

    def describe(self, operation: int) -> str:
        """Name what an operation reads."""
        tensors = self.reads[operation].tensors
        read = sorted(tensors, key=lambda index: -self.placements[index].nbytes)
        names = [self.placements[index].name for index in read]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return (f"{self.name}: " if self.name else "") + names[0] + more

    @property
    def has_experts(self) -> bool:
        """Whether some of its tensors are experts."""
        return any(has_experts(name) for each in self.placements for name in each.slot.names)

    def with_experts_indexed(self) -> Part:
        """Return the same where the program reads experts one by one."""
        return replace(self, reads=tuple(_reads_of(self.placements, indexed=True)))

    def laid(self, page_size: int) -> Laid:
        """Place it on pages of a size."""
        if page_size not in self._laid:
            self._laid[page_size] = self._lay(page_size)
        return self._laid[page_size]

    def _lay(self, page_size: int) -> Laid:
        sizes = [placement.nbytes for placement in self.placements]
        offsets, nbytes = pack(sizes, page_size)
        page_count = -(-nbytes // page_size)

        def pages_of(read: Read) -> list[int]:
            pages = set[int]()
            for index in read.tensors:
                start, size = read.extent(offsets[index], sizes[index])
                if size:
                    pages.update(range(start // page_size, (start + size - 1) // page_size + 1))
            return sorted(pages)

        small_first = small_are_first(sizes, page_size)

        def most_pages(read: Read) -> int:
            """Count them for the worst places; small tensors have the first page where it holds."""
            first_page, pages = False, 0
            for index in read.tensors:
                _, size = read.extent(0, sizes[index])
                if small_first and is_small(sizes[index], page_size):
                    first_page |= size > 0
                elif size:  # a part begins at any byte, a whole tensor at aligned ones
                    grain = ALIGNMENT if read.parts == 1 else 1
                    pages += 1 + -(-max(0, size - grain) // page_size)
            return min(page_count, pages + first_page)

        steps = [pages_of(read) for read in self.reads]
        last_page = nbytes - (page_count - 1) * page_size

        def charge(index: int) -> tuple[int, int]:
            pages = steps[index]
            if self.ordered:
                short = bool(pages) and pages[-1] == page_count - 1
                return len(pages) * page_size - short * (page_size - last_page), len(pages)
            most = most_pages(self.reads[index])
            return most * page_size if most < page_count else nbytes, most

        charges = [
            (*charge(index), sum(sizes[each] for each in read.tensors) // read.parts)
            for index, read in enumerate(self.reads)
        ]
        largest = max(range(len(steps)), key=charges.__getitem__, default=None)
        least_bytes, least_pages, _ = (0, 0, 0) if largest is None else charges[largest]
        return Laid(page_size, nbytes, steps, least_bytes, least_pages, largest)


def part_of(weights: Weights, dtype: torch.dtype | None, *, name: str = "") -> Part:
    """Take all tensors of some weights, in their order."""
    placements = tuple(
        Placement(
            Slot((source.name,), (), True, source.shape),
            source,
            converted(source.dtype, dtype),
            0,
        )
        for source in weights.sources.values()
    )
    return Part(name, placements, False, tuple(_reads_of(placements)))


def part_of_module(
    module: nn.Module | Callable[[], nn.Module], weights: Weights, dtype: torch.dtype | None
) -> Part:
    """Take the tensors that a module has a place for, in the module's order.

    Raises
    ------
    CheckpointError, ModelError
        As `MemoryManager.register` does.
    """
    skeleton = build_skeleton(module)
    slots = find_slots(skeleton)
    pairs = match(skeleton, slots, weights, strict=True)
    placed, _ = lay_out(slots, pairs, dtype, page_size=1)  # small ones are not first then
    placements = tuple(replace(placement, offset=0) for placement in placed)
    return Part("", placements, True, tuple(_reads_of(placements)))


def _reads_of(placements: Sequence[Placement], *, indexed: bool = False) -> list[Read]:
    names = [placement.slot.names for placement in placements]
    return find_reads(names, [placement.shape for placement in placements], indexed=indexed)


def is_pipeline(weights: object) -> bool:
    """Whether something is the directory of a pipeline of diffusers."""
    return isinstance(weights, (str, os.PathLike)) and (Path(weights) / _INDEX).is_file()


def open_parts(
    weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | Weights,
    module: nn.Module | Callable[[], nn.Module] | None,
    dtype: torch.dtype | None,
) -> list[Part]:
    """Find the models that will be registered.

    Parameters
    ----------
    weights
        What `MemoryManager.register` takes, or the directory of a pipeline.
    module
        The model, or what builds it; None where only the weights are known.

    Raises
    ------
    CheckpointError
        If there is nothing that can be read, or it does not fit the module.
    ValueError
        If a module is given for a pipeline.
    """
    if is_pipeline(weights):
        assert isinstance(weights, (str, os.PathLike))
        if module is not None:
            raise ValueError(f"{weights} is a pipeline, which has several modules: leave it out")
        return list(_parts_of_pipeline(Path(weights), dtype))
    opened = open_weights(weights)
    if module is not None:
        return [part_of_module(module, opened, dtype)]
    return [replace(part_of(opened, dtype), notes=_note_on_dtype(weights, opened, dtype))]


def _note_on_dtype(weights: object, opened: Weights, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Say where the front end of transformers would make something else of the weights."""
    says = None
    if dtype is None and isinstance(weights, (str, os.PathLike)):
        says = _configured_dtype(Path(weights))
    if says is None or all(converted(s.dtype, says) == s.dtype for s in opened.sources.values()):
        return ()
    return (
        f"the weights are taken as they are stored; config.json says {says}, which "
        "integrations.transformers makes of them: dtype says so here",
    )


def _parts_of_pipeline(path: Path, dtype: torch.dtype | None) -> Iterator[Part]:
    """List the parts with weights; others (tokenizers, schedulers) have none."""
    index = read_json_object(path / _INDEX, what="index of a pipeline", who="a pipeline's")
    found = False
    for name, value in index.items():
        is_part = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        folder = path / name
        if not is_part or not folder.is_dir() or not _has_weights(folder):
            continue
        found = True
        wanted = dtype
        note: tuple[str, ...] = ()
        if dtype is None and value[0] == "diffusers":
            wanted = torch.float32
            note = (f"{name} becomes float32, as diffusers makes it; --dtype says otherwise",)
        elif dtype is None:
            wanted = _configured_dtype(folder)
        part = part_of(open_weights(folder), wanted, name=name)
        yield replace(part, notes=note)
    if not found:
        raise CheckpointError(
            f"{path} names no part with weights in {_INDEX}: download the whole pipeline", path=path
        )


def _has_weights(folder: Path) -> bool:
    endings = (".safetensors", ".safetensors.index.json", *TORCH_SUFFIXES)
    return any(each.name.endswith(endings) for each in folder.iterdir())


def _configured_dtype(folder: Path) -> torch.dtype | None:
    """Return what the configuration of a model of transformers says that weights become."""
    if not (folder / "config.json").is_file():
        return None
    content = read_json_object(folder / "config.json", what="configuration", who="a model's")
    found = getattr(torch, str(content.get("dtype") or content.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None
