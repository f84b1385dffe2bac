"""The layers of a checkpoint for loops of one's own: no module, a function for each layer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import Self, Unpack

from penstock.arguments import checked
from penstock.errors import ModelError
from penstock.loading.layers import LayerFunction, Layers
from penstock.loading.module_patterns import NamePattern
from penstock.loading.weights import Weights, open_weights
from penstock.manager.manager import MemoryManager
from penstock.manager.settings import Options
from penstock.report.progress import Progress, progress_bar
from penstock.report.stats import ManagerStats

__all__ = ["LayerStreamer"]


@checked
class LayerStreamer:
    """Streams the layers of a checkpoint through a function, under a cap.

    There is no model: what a layer computes is the function's business, and what is in it is told
    by the names in the checkpoint. Its weights are tensors on paged memory, of a model of a
    `MemoryManager`; so all that is said there holds here.

    Parameters
    ----------
    weights
        A checkpoint, or tensors by name; see `MemoryManager.register`.
    pattern
        The name of a layer, with `{}` for its index, from 0 on: `"model.layers.{}"`.
    manager
        Who is to have the layers, as a model, beside others: streamers and models then are in use
        while they are called, one after the other. None for one of their own.
    name
        Of that model.
    static
        Patterns of names of tensors beside the layers that `load_static` is to give. None: all
        others in the checkpoint.
    dtype, pin, stream
        See `MemoryManager.register`. What is pinned or streams is said by names of modules, as in
        `"model.layers.0"`, `"*.self_attn"` or `"lm_head"`.
    settings
        `cap`, `device` and all others of `MemoryManager`, where it is not given. With
        `progress=True`, each `run_pass` has a bar.

    Raises
    ------
    CheckpointError
        If the weights cannot be read, have no such layers, or lack some between others.
    ModelError
        If the name is taken, or a pattern matches nothing.
    CapExceededError
        If the largest tensor, or what is pinned, does not fit under the cap.
    ValueError
        If the pattern has not one `{}`, or both a manager and settings are given.
    DeviceError
        If the device is not there or cannot page.

    Notes
    -----
    Thread-safe, as the manager is. After an error in a function all is as after any other pass.

    Examples
    --------
    >>> with penstock.LayerStreamer("path/to/model", "model.layers.{}", cap="8GiB") as layers:
    ...     x = torch.nn.functional.embedding(ids, layers.load_static("model.embed_tokens.weight"))
    ...     x = layers.run_pass(x, lambda x, weights, index: block(x, weights))
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | Weights,
        pattern: str,
        *,
        manager: MemoryManager | None = None,
        name: str = "layers",
        static: Sequence[NamePattern] | None = None,
        dtype: torch.dtype | None = None,
        pin: Sequence[NamePattern] = (),
        stream: Sequence[NamePattern] = (),
        **settings: Unpack[Options],
    ) -> None:
        if manager is not None and settings:
            given = ", ".join(settings)
            raise ValueError(f"the manager has settings of its own: leave {given} out")
        layers = Layers(open_weights(weights), pattern, static)
        self._own = manager is None
        self._manager = MemoryManager(**settings) if manager is None else manager
        self._name = name
        self._count = len(layers)
        self._layers: Layers | None = layers  # None once it is closed
        self._lock = threading.Lock()  # of closing
        self._manager.register(name, layers, layers.weights, dtype=dtype, pin=pin, stream=stream)
        try:
            self._manager.require_room(name)
            if self._own:
                self._manager.acquire(name)
            else:
                self._manager.acquire_on_call(name)
        except BaseException:
            self._manager.unregister(name)
            raise

    @property
    def manager(self) -> MemoryManager:
        """Who has the layers: for the cap, schedules, timelines and captures."""
        return self._manager

    @property
    def device(self) -> torch.device:
        """Where the weights are read; x belongs there."""
        return self._manager.device

    def __len__(self) -> int:
        """Return how many layers there are."""
        return self._count

    def run_pass(self, x: Any, layer_fn: LayerFunction) -> Any:  # noqa: ANN401
        """Pass something through all layers in turn.

        Parameters
        ----------
        x
            What the first layer is given: a tensor, or whatever the function takes.
        layer_fn
            Called as `layer_fn(x, weights, index)`, with the weights of a layer by their names
            within it (`"self_attn.q_proj.weight"`); what it returns is the next layer's x. Weights
            may be kept; who reads them later has them brought in again.

        Returns
        -------
        Any
            What the last layer returned.

        Raises
        ------
        CapExceededError
            If an operation reads more than fits under the cap.
        ModelError
            If the streamer is closed.
        """
        layers = self._open()
        show = self._manager.settings.progress is True  # else none: passes may be short, and many
        with self.one_pass(), progress_bar(self._name, show=show) as progress:
            if progress is not None:
                layer_fn = _telling(progress, layers, layer_fn)
            return layers(x, layer_fn)

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Have a block be one pass: for loops of one's own, and for what is beside the layers.

        The order of a pass is learned, and the next one is loaded ahead by it. What is read outside
        of passes is not foreseen. `run_pass` inside the block is part of it.

        Raises
        ------
        ModelError
            If the streamer is closed.
        """
        self._open()
        with self._manager.one_pass(self._name):
            yield

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the weights of a layer, by their names within it; nothing is brought in yet.

        Each operation has in place what it reads, and nothing else needs to be said.

        Raises
        ------
        IndexError
            If there is no such layer.
        ModelError
            If the streamer is closed.
        """
        return self._open().layer(index)

    @contextmanager
    def block(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        """Have all weights of a layer in place inside the block, as one step.

        For kernels that are given addresses, to read. It takes room for the whole layer at once;
        where torch's operations read the weights, `layer` takes less.

        Yields
        ------
        dict
            What `layer` returns.

        Raises
        ------
        CapExceededError
            If the layer does not fit under the cap.
        IndexError, ModelError
            As `layer` does.
        """
        layers = self._open()
        weights = layers.layer(index)
        with self._manager.hold(self._name, layers.part(index)):
            yield weights

    def load_static(self, name: str) -> torch.Tensor:
        """Return a tensor beside the layers (an embedding, a norm): on paged memory, as they are.

        Parameters
        ----------
        name
            Its full name in the checkpoint.

        Raises
        ------
        ModelError
            If there is none of that name, or the streamer is closed.
        """
        return self._open().static(name)

    def stats(self) -> ManagerStats:
        """Return the figures of the manager; those of the layers are under their name."""
        return self._manager.stats()

    def report(self) -> str:
        """Return the figures as text for people."""
        return self._manager.report()

    def close(self) -> None:
        """Have the manager forget the layers; once more does nothing.

        Their memory goes when nobody has a tensor of them any more.

        Raises
        ------
        ModelError
            If somebody else has acquired them from the manager. They stay open then.
        """
        with self._lock:
            if self._layers is None:
                return
            if self._own:
                self._manager.release(self._name)
            try:
                self._manager.unregister(self._name)
            except BaseException:
                if self._own:
                    self._manager.acquire(self._name)
                raise
            self._layers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> Layers:
        if self._layers is None:
            raise ModelError(f"the layers {self._name!r} are closed; make another LayerStreamer")
        return self._layers


def _telling(progress: Progress, layers: Layers, layer_fn: LayerFunction) -> LayerFunction:
    """Return a function that says after each layer how many bytes of weights are behind it."""
    sizes = [
        sum(tensor.nbytes for tensor in layers.layer(at).values()) for at in range(len(layers))
    ]

    def call(x: Any, weights: dict[str, torch.Tensor], index: int) -> Any:  # noqa: ANN401
        x = layer_fn(x, weights, index)
        progress(sum(sizes[: index + 1]), sum(sizes))
        return x

    return call
