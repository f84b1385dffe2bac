"""Capturing a whole pass in a CUDA graph, the copies of its weights included."""

from __future__ import annotations

from typing import Any

import torch

from penstock.errors import ModelError, ScheduleError
from penstock.run.runner import Runner
from penstock.torch_private import tree_map

__all__ = ["CapturedPass"]

_MOST_PASSES = 12  # before a plan has to be settled


class CapturedPass:
    """One call of a model as a CUDA graph; made by `MemoryManager.capture`.

    A replay does what the call did, on the same addresses, with next to no work for the host. It is
    valid for as long as the model's plan is: until it is evicted, another model takes frames from
    it, or the cap changes.

    Parameters
    ----------
    output
        What the call returned; each replay overwrites its tensors.
    loaded_bytes
        Bytes that each replay loads.
    """

    def __init__(
        self,
        runner: Runner,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        memory = runner.memory
        if memory.pager.device.type != "cuda":
            raise ModelError("a pass is captured on a CUDA device; this model runs on the host")
        self._core = memory.capturable()
        self._memory = memory
        self._pager = memory.pager
        self._inputs = tree_map(_static, (args, kwargs))
        args, kwargs = self._inputs
        self._run_until_settled(runner, args, kwargs)
        if memory.widen_ring():
            runner.plan()
            self._run_until_settled(runner, args, kwargs)
        self._graph = torch.cuda.CUDAGraph()
        # What stays was loaded by the last pass, everything else by the graph itself.
        self._core.prepare_capture()
        torch.cuda.synchronize(self._pager.device)
        before = memory.streamer.stats().loaded_bytes
        with runner.captured(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            stream = self._pager.stream()
            self._core.begin_capture(stream)
            try:
                self.output: Any = runner.module(*args, **kwargs)
            finally:
                self._core.end_capture(stream)
        self.loaded_bytes = memory.streamer.stats().loaded_bytes - before
        self._mappings = self._core.mappings

    def _run_until_settled(
        self, runner: Runner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        for _ in range(_MOST_PASSES):
            settled, mappings = runner.settled, self._core.mappings
            runner.module(*args, **kwargs)
            torch.cuda.synchronize()  # so that the times of the pass can be read
            if settled and runner.settled and self._core.mappings == mappings:
                return
        raise ScheduleError(
            f"the plan is not settled after {_MOST_PASSES} passes: the model takes other steps "
            "with each call, and a graph could not follow it"
        )

    def replay(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the captured pass on the current stream.

        Parameters
        ----------
        args, kwargs
            New inputs, of the same shapes and dtypes as those captured; the last ones if omitted.

        Returns
        -------
        object
            `output`, whose tensors hold the new result.

        Raises
        ------
        ScheduleError
            If the model's plan has changed since.
        """
        stream = self._pager.stream()
        self._core.before_replay(stream, self._mappings)
        try:
            if args or kwargs:
                tree_map(_copy, self._inputs, (args, kwargs))
            self._graph.replay()
        finally:
            self._core.after_replay(stream)
        return self.output


def _static(value: Any) -> Any:  # noqa: ANN401
    return value.clone() if isinstance(value, torch.Tensor) else value


def _copy(held: Any, given: Any) -> None:  # noqa: ANN401
    if isinstance(held, torch.Tensor):
        held.copy_(given)
