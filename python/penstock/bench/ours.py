"""Penstock itself as a case. Where it cannot run as asked (no such device), that is a reason."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from penstock.bench.models import build
from penstock.bench.options import CaseOptions
from penstock.bench.peers import bench_config
from penstock.bench.subject import Subject, UnavailableError, logits_of
from penstock.errors import PenstockError
from penstock.manager.manager import MemoryManager

__all__ = ["load_penstock"]


def load_penstock(options: CaseOptions, ids: torch.Tensor, stack: ExitStack) -> Subject:
    """Register the model, acquire it, and capture its pass on request."""
    manager = _open_manager(options)
    config = bench_config(options)
    manager.register("llama", lambda: build(config), options.checkpoint)
    stack.callback(manager.unregister, "llama")
    model = stack.enter_context(manager.use("llama"))

    replayed = 0  # bytes that replays have loaded, of which the host has no count

    def figures() -> Mapping[str, Any]:
        stats = manager.stats()
        return {
            "loaded_bytes": stats.loaded_bytes + replayed,
            "read_bytes": stats.models["llama"].memory.read_bytes,
            "peak": stats.peak,
            "cap": stats.cap,
            "memory": asdict(stats.models["llama"].memory),
        }

    def pinned() -> int | None:
        return manager.stats().models["llama"].memory.pinned_bytes

    note = f"penstock, {manager.pager.kind} pager" + (f", {options.host}" if options.host else "")
    if not options.captured:
        return Subject(lambda ids: logits_of(model(ids)), None, pinned, note, figures=figures)

    graph = manager.capture("llama", ids)

    def launch() -> None:
        nonlocal replayed
        graph.replay()
        replayed += graph.loaded_bytes

    def replay(_: torch.Tensor) -> torch.Tensor:
        launch()
        return logits_of(graph.output)

    return Subject(replay, None, pinned, f"{note}, replayed", launch=launch, figures=figures)


def _open_manager(options: CaseOptions) -> MemoryManager:
    try:
        return MemoryManager(
            cap=options.cap,
            device=options.device,
            pager=options.pager,
            host=options.host or "auto",
            host_budget=options.host_budget,
            progress=False,
        )
    except PenstockError as error:
        raise UnavailableError(str(error)) from None
