"""A hand-written streaming loop: the practical limit of streaming without keeping anything.

Each group of weights (the embedding, a decoder layer, the head) lies packed in one pinned slab.
Group n of all that ever run goes into device buffer n modulo 3, by one copy on a stream of its own.
The copy waits for the event that ended the buffer's last reader; the group's modules wait for the
event that ended its copy. At the end of a pass the copies for the next one begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from safetensors.torch import load_file
from torch import nn

from penstock.bench.models import build
from penstock.bench.options import CaseOptions
from penstock.bench.peers import bench_config
from penstock.bench.subject import Subject, UnavailableError, logits_of
from penstock.loading.skeleton import build_skeleton

__all__ = ["load_triple_buffer"]

_BUFFERS = 3
_ALIGNMENT = 256  # of tensors in a group: what torch's own allocator gives


def load_triple_buffer(options: CaseOptions, ids: torch.Tensor, stack: ExitStack) -> Subject:
    """Load the loop. `variant` is `everything`, or `layers`: embedding and head stay resident."""
    device = torch.device(options.device)
    if device.type != "cuda":
        raise UnavailableError("the loop needs CUDA streams")
    model = build_skeleton(lambda: build(bench_config(options)))
    inner = model.get_submodule("model")
    modules: list[nn.Module] = list(inner.get_submodule("layers").children())
    if options.variant == "everything":
        modules = [inner.get_submodule("embed_tokens"), *modules, model.get_submodule("lm_head")]

    state: dict[str, torch.Tensor] = {}
    for file in options.files():
        state.update(load_file(file))
    loop = _TripleBuffer(model, modules, state, device, stack)
    model.load_state_dict(state, assign=True)
    del state
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)
    loop.start()
    held = "all streamed" if options.variant == "everything" else "embedding and head resident"
    return Subject(
        lambda ids: logits_of(model(ids)),
        loop.nbytes,
        pinned=lambda: loop.slab.nbytes,
        note=f"hand-written, {_BUFFERS} buffers, {held}",
    )


class _TripleBuffer:
    """Buffers, slab and hooks of the loop. Replaces what it streams in `state` by views."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        state: dict[str, torch.Tensor],
        device: torch.device,
        stack: ExitStack,
    ) -> None:
        self._modules = modules
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [[names[parameter] for parameter in module.parameters()] for module in modules]
        packed = [_pack([state[name] for name in group]) for group in groups]
        sizes = [nbytes for _, nbytes in packed]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._sizes = sizes
        self.nbytes = sum(state[name].nbytes for group in groups for name in group)
        self.slab = _pinned(sum(sizes), stack)
        self._buffers = torch.empty(_BUFFERS, max(sizes), dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied = [torch.cuda.Event() for _ in range(_BUFFERS)]  # type: ignore[no-untyped-call]
        self._read = [torch.cuda.Event() for _ in range(_BUFFERS)]  # type: ignore[no-untyped-call]
        self._position = 0

        # views[group][buffer]: its parameters' tensors, in that buffer
        self._views: list[list[list[torch.Tensor]]] = []
        for group, (offsets, _), start in zip(groups, packed, self._starts, strict=True):
            tensors = [state[name] for name in group]
            for offset, tensor in zip(offsets, tensors, strict=True):
                _view(self.slab[start:], offset, tensor).copy_(tensor)
            self._views.append(
                [
                    [_view(buffer, o, t) for o, t in zip(offsets, tensors, strict=True)]
                    for buffer in self._buffers
                ]
            )
            state.update(zip(group, self._views[-1][0], strict=True))
        streamed = {name for group in groups for name in group}
        for name in state.keys() - streamed:
            state[name] = state[name].to(device)

    def start(self) -> None:
        """Set the hooks and begin the first copies; parameters are views by now."""
        self._parameters = [list(module.parameters()) for module in self._modules]
        for index, module in enumerate(self._modules):
            module.register_forward_pre_hook(lambda *_, index=index: self._begin(index))
            module.register_forward_hook(lambda *_: self._end())
        for position in range(_BUFFERS):
            self._copy(position)

    def _copy(self, position: int) -> None:
        group, buffer = position % len(self._modules), position % _BUFFERS
        start, size = self._starts[group], self._sizes[group]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._read[buffer])
            source = self.slab[start : start + size]
            self._buffers[buffer, :size].copy_(source, non_blocking=True)
            self._copied[buffer].record(self._stream)

    def _begin(self, group: int) -> None:
        if group != self._position % len(self._modules):
            raise RuntimeError(f"group {group} ran out of order, at position {self._position}")
        buffer = self._position % _BUFFERS
        torch.cuda.current_stream().wait_event(self._copied[buffer])
        for parameter, view in zip(
            self._parameters[group], self._views[group][buffer], strict=True
        ):
            parameter.data = view

    def _end(self) -> None:
        self._read[self._position % _BUFFERS].record(torch.cuda.current_stream())
        self._copy(self._position + _BUFFERS)
        self._position += 1


def _pack(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Return the offset of each tensor in a group, and the group's bytes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += (tensor.nbytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
    return offsets, end


def _view(memory: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def _pinned(nbytes: int, stack: ExitStack) -> torch.Tensor:
    """Make pinned host memory of exactly this size; torch's own would be a power of two."""
    slab = torch.empty(nbytes, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(slab.data_ptr(), nbytes, 0))
    if code != 0:
        raise RuntimeError(f"cudaHostRegister of {nbytes} bytes returned {code}")
    stack.callback(runtime.cudaHostUnregister, slab.data_ptr())
    stack.callback(torch.cuda.synchronize)
    return slab
