"""Ways to run the pipeline's modules: all resident, with Penstock, and as diffusers does it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import penstock
from bench.harness.case_process import figures_of
from bench.pipeline.models import STAGES, Shape, builder
from penstock.bench.memory import torch_pinned_bytes
from penstock.bench.subject import UnavailableError
from penstock.loading.skeleton import build_skeleton

Module = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Options:
    """Options of a case; they travel to its process as JSON.

    Parameters
    ----------
    directory
        Where the weights are, and the outputs by which results are judged.
    cap, page_size
        Of Penstock, in bytes; page size None for its default.
    clips
        How often the pipeline runs; the last time is what is reported.
    """

    directory: str
    device: str
    shape: Shape
    cap: int
    host: str
    steps: int
    clips: int
    link_bytes: int
    block_bytes: int
    page_size: int | None = None

    def weights(self, stage: str) -> Path:
        """Return the file of a stage's weights."""
        return Path(self.directory, f"{stage}.safetensors")


@dataclass(frozen=True)
class Subject:
    """The pipeline, ready to run.

    Parameters
    ----------
    stage
        For the time of a stage, gives its module to be called.
    moved
        Bytes of weights that a stage's module moved to the device so far.
    figures
        What it says of a stage at its end, such as what its plan predicts.
    pinned
        Bytes of pinned host memory.
    link
        Bytes per second, where it may not be measured by who does not know the cap.
    """

    stage: Callable[[str], AbstractContextManager[Module]]
    moved: Callable[[str], int]
    note: str
    figures: Callable[[str], Mapping[str, Any]] = field(default=lambda stage: {})
    pinned: Callable[[], int | None] = torch_pinned_bytes
    link: float | None = None


def load_module(stage: str, options: Options, device: str) -> nn.Module:
    """Load a stage's module the ordinary way; on the CPU its weights are the mapped file."""
    module = build_skeleton(builder(stage, options.shape))
    module.load_state_dict(load_file(options.weights(stage), device=device), assign=True)
    return module.requires_grad_(False)


def load_resident(options: Options, stack: ExitStack) -> Subject:
    """Plain PyTorch with all modules on the device."""
    modules = {stage: load_module(stage, options, options.device) for stage in STAGES}
    note = "all modules on the device, plain PyTorch"
    return Subject(lambda stage: nullcontext(modules[stage]), lambda stage: 0, note)


# ---- Penstock ----------------------------------------------------------------------------------


def load_penstock(options: Options, stack: ExitStack) -> Subject:
    """Penstock, with a cap of the manager's own: it counts weights."""
    manager = penstock.MemoryManager(
        cap=options.cap,
        device=options.device,
        pager="frames",
        host=options.host,
        page_size=options.page_size,
        progress=False,
    )
    return _with_manager(manager, options, stack, f"penstock, weights capped, {options.host}")


def load_penstock_hard(options: Options, stack: ExitStack) -> Subject:
    """Penstock under a hard cap: it counts all that the process holds. `main` has set it."""
    manager = penstock.MemoryManager(device=options.device, host=options.host, progress=False)
    note = f"penstock, process capped, {options.host}"
    return _with_manager(manager, options, stack, note, link=manager.stats().link_rate)


def _with_manager(
    manager: penstock.MemoryManager,
    options: Options,
    stack: ExitStack,
    note: str,
    link: float | None = None,
) -> Subject:
    for stage in STAGES:
        manager.register(stage, builder(stage, options.shape), options.weights(stage))
        stack.callback(manager.unregister, stage)
    # Small, and in use in each clip: it stays, and guests have to do with the rest.
    manager.reserve("temporal")
    stack.callback(manager.release_reservation, "temporal")

    def call_encoder(ids: torch.Tensor) -> torch.Tensor:
        with manager.use("encoder") as module:
            return module(ids)

    @contextmanager
    def stage(name: str) -> Iterator[Module]:
        if name == "encoder":
            with manager.keep_resident(name):  # from one prompt to the next
                yield call_encoder
        elif name == "denoiser":
            module = manager.acquire(name)
            try:
                yield module
            finally:  # what nobody else needs stays for the next clip
                manager.release(name)
        elif name == "spatial":
            with manager.guest(name) as module:
                yield module
        else:
            with manager.use(name) as module:
                yield module

    def figures(name: str) -> Mapping[str, Any]:
        return figures_of(manager, name)

    def pinned() -> int:
        return sum(model.memory.pinned_bytes for model in manager.stats().models.values())

    def moved(name: str) -> int:
        return manager.stats().models[name].memory.loaded_bytes

    return Subject(stage, moved, note, figures, pinned, link)


# ---- others ------------------------------------------------------------------------------------


def load_model_offload(options: Options, stack: ExitStack) -> Subject:
    """Whole modules take turns on the device, as diffusers' `enable_model_cpu_offload` has them."""
    try:
        from accelerate import cpu_offload_with_hook
    except ImportError as error:
        raise UnavailableError(f"not installed: {error.name}") from None
    modules, hooks, moves = {}, {}, dict.fromkeys(STAGES, 0)
    previous = None
    for stage in STAGES:
        module = load_module(stage, options, "cpu")
        modules[stage], previous = cpu_offload_with_hook(
            module, torch.device(options.device), prev_module_hook=previous
        )
        hooks[stage] = previous

    @contextmanager
    def stage(name: str) -> Iterator[Module]:
        moves[name] += 1
        yield modules[name]
        if name == STAGES[-1]:
            hooks[name].offload()

    version = importlib.metadata.version("accelerate")
    note = f"whole modules in turn, accelerate {version}, cpu_offload_with_hook"
    return Subject(stage, lambda name: moves[name] * nbytes_of(modules[name]), note)


def load_group_block(options: Options, stack: ExitStack) -> Subject:
    """Group offloading of diffusers, block by block."""
    return _load_groups(options, "block_level")


def load_group_leaf(options: Options, stack: ExitStack) -> Subject:
    """Group offloading of diffusers, leaf by leaf."""
    return _load_groups(options, "leaf_level")


def _load_groups(options: Options, level: str) -> Subject:
    try:
        from diffusers.hooks import apply_group_offloading
    except (ImportError, RuntimeError) as error:
        raise UnavailableError(f"diffusers cannot be imported: {error}") from None
    device = torch.device(options.device)
    streams = device.type == "cuda"
    modules = {stage: load_module(stage, options, "cpu") for stage in STAGES}
    streamed, calls = {}, dict.fromkeys(STAGES, 0)
    for stage, module in modules.items():
        kept = {} if level == "leaf_level" else _take_out(module)
        streamed[stage] = nbytes_of(module)
        apply_group_offloading(
            module,
            onload_device=device,
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
            non_blocking=True,
            use_stream=streams,
            record_stream=streams,
        )
        for name, part in kept.items():
            setattr(module, name, part.to(device))

    @contextmanager
    def stage(name: str) -> Iterator[Module]:
        def call(*inputs: torch.Tensor) -> torch.Tensor:
            calls[name] += 1
            return modules[name](*inputs)

        yield call

    version = importlib.metadata.version("diffusers")
    held = ", what is in no block stays" if level == "block_level" else ""
    note = f"diffusers {version}, group offload, {level}{held}" + (", streams" if streams else "")
    return Subject(stage, lambda name: calls[name] * streamed[name], note)


def _take_out(module: nn.Module) -> dict[str, nn.Module]:
    """Take out what is in no list of blocks: it would go to the device and back in each pass.

    One small module stays, since without any there is no prefetching.
    """
    kept = {}
    for name, part in list(module.named_children()):
        if not isinstance(part, nn.ModuleList) and name != "norm":
            kept[name] = part
            delattr(module, name)
    return kept


def nbytes_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


LOADERS: Mapping[str, Callable[[Options, ExitStack], Subject]] = {
    "resident": load_resident,
    "penstock": load_penstock,
    "penstock-hard-cap": load_penstock_hard,
    "group-block": load_group_block,
    "group-leaf": load_group_leaf,
    "model-offload": load_model_offload,
}
