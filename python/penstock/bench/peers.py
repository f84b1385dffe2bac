"""Plain PyTorch, and others' ways to run a model whose weights wait in host memory.

Others' libraries are called as their documentation says, with the options that are fastest here:
https://huggingface.co/docs/accelerate/package_reference/big_modeling and
https://huggingface.co/docs/diffusers/optimization/memory (group offloading).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from penstock.bench.models import llama_config, resident_model
from penstock.bench.options import CaseOptions
from penstock.bench.subject import Subject, UnavailableError, logits_of

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["bench_config", "capture", "load_accelerate", "load_diffusers", "load_resident"]

_WARM_UPS = 3


def bench_config(options: CaseOptions) -> LlamaConfig:
    """Return the configuration that all cases run: passes keep no cache of keys and values."""
    config = llama_config(options.layers, options.hidden, options.vocabulary)
    config.use_cache = False
    return config


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def load_resident(options: CaseOptions, ids: torch.Tensor, stack: ExitStack) -> Subject:
    """Plain PyTorch with all weights on the device; captured on request."""
    model = resident_model(bench_config(options), Path(options.checkpoint), options.device)
    note = "all weights on the device, plain PyTorch"
    if not options.captured:
        return Subject(lambda ids: logits_of(model(ids)), 0, note=note)
    graph, output = capture(lambda: logits_of(model(ids)))
    stack.callback(graph.reset)

    def replay(_: torch.Tensor) -> torch.Tensor:
        graph.replay()
        return output

    return Subject(replay, 0, note=f"{note}, replayed", launch=lambda: replay(ids))


def capture(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture a pass in a CUDA graph, after warming up on a side stream as torch asks for."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def load_accelerate(options: CaseOptions, ids: torch.Tensor, stack: ExitStack) -> Subject:
    """Accelerate's `cpu_offload`: each module's weights go to the device for its call."""
    try:
        from accelerate import cpu_offload
    except ImportError as error:
        raise UnavailableError(f"not installed: {error.name}") from None
    model = _on_cpu(options, private=True)
    nbytes = weight_bytes(model)
    cpu_offload(model, execution_device=torch.device(options.device))
    note = f"accelerate {importlib.metadata.version('accelerate')}, cpu_offload, all streamed"
    return Subject(lambda ids: logits_of(model(ids)), nbytes, note=note)


def load_diffusers(options: CaseOptions, ids: torch.Tensor, stack: ExitStack) -> Subject:
    """Diffusers' group offloading. `variant` is `block` or `leaf`, with `-record` behind or not."""
    try:
        from diffusers.hooks import apply_group_offloading
    except (ImportError, RuntimeError) as error:
        raise UnavailableError(f"diffusers cannot be imported: {error}") from None
    level, _, record = options.variant.partition("-")
    device = torch.device(options.device)
    streams = device.type == "cuda"
    model = _on_cpu(options)

    def offload(module: nn.Module, offload_type: str, blocks: int | None) -> None:
        apply_group_offloading(
            module,
            onload_device=device,
            offload_type=offload_type,
            num_blocks_per_group=blocks,
            non_blocking=True,
            use_stream=streams,
            record_stream=streams and record == "record",
        )

    if level == "leaf":
        nbytes = weight_bytes(model)
        offload(model, "leaf_level", None)
        held = "all streamed"
    else:
        # What is in no list of blocks would be copied from pageable memory, and back, in each pass:
        # that is no way to run it. The embedding and the head stay on the device instead.
        inner = model.model
        nbytes = weight_bytes(inner.layers)
        embedding = inner.embed_tokens
        del inner.embed_tokens
        offload(inner, "block_level", 1)
        inner.embed_tokens = embedding.to(device)
        model.lm_head.to(device)
        held = "embedding and head resident"
    version = importlib.metadata.version("diffusers")
    with_record = ", record_stream" if record else ""
    note = f"diffusers {version}, {level}_level, use_stream{with_record}, {held}"
    return Subject(lambda ids: logits_of(model(ids)), nbytes, note=note)


def _on_cpu(options: CaseOptions, *, private: bool = False) -> LlamaForCausalLM:
    directory = Path(options.checkpoint)
    return resident_model(bench_config(options), directory, "cpu", private=private)
