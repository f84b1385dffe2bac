"""The settings that a manager would take and why; what an estimate assumes and leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock import _core
from penstock.forecast.host import Waiting
from penstock.forecast.parts import Part
from penstock.forecast.rates import Rates
from penstock.forecast.result import AtCap, Setting
from penstock.forecast.target import Target
from penstock.loading.host_tiers import HOST_TIERS
from penstock.sizes import format_bytes

__all__ = ["notes_on", "settings_of"]

_ALWAYS = (
    "the cap counts weights: activations, caches of keys and values, gradients and optimizer "
    "states come beside it",
)
_FORWARD = "a pass reads each weight once; training is another estimate"
_TRAINING = {
    "frozen": "a pass is a forward and a backward pass, which update no paged weights",
    "all": (
        "a pass is a forward pass, a backward pass, and AdamW by lists, which goes through the "
        "weights twice; written pages go back over the link beside what comes in. What "
        "penstock.training.prepare has under the cap as well is not estimated"
    ),
}
_BY_NAMES = (
    "by names and sizes alone: an operation is taken to read one matrix with the vectors of its "
    "module, wherever they lie; one that reads several matrices at once needs a larger cap"
)
_OF_MODULE = (
    "an operation is taken to read one matrix of a module with its vectors; one that reads several "
    "matrices at once needs a larger cap"
)
_EXPERTS = (
    "experts are taken to be given whole to one operation, as transformers does; a program that "
    "indexes them one by one needs less, and moves less, which is not estimated"
)
_QUANTIZED = (
    "weights of 8 bits and below are counted as they are stored; the time to unpack them is not "
    "estimated, and the front ends refuse checkpoints that say they are quantized"
)


def settings_of(
    parts: Sequence[Part],
    target: Target,
    waiting: Sequence[Waiting],
    at: AtCap,
    device: object,
    pager: str,
    page_size: int | str | None,
) -> tuple[Setting, ...]:
    """List the settings.

    Parameters
    ----------
    waiting
        Of each part.
    device, pager, page_size
        As they were asked for.
    """
    said = "as you say"
    found = [
        Setting("device", target.device, _why_device(target) if str(device) == "auto" else said),
        Setting("pager", target.pager, _why_pager(target) if pager == "auto" else said),
        Setting(
            "page_size",
            format_bytes(at.page_size),
            said if page_size is not None else _why_page_size(target),
        ),
    ]
    for part, wait in zip(parts, waiting, strict=True):
        name = f"host of {part.name}" if part.name else "host"
        if wait.tier in HOST_TIERS:  # managed memory has a place of its own
            found.append(Setting(name, wait.tier, wait.why))
    return tuple(found)


def _why_device(target: Target) -> str:
    return "a GPU is here" if target.is_gpu else f"no GPU is used: {_core.no_cuda_reason()}"


def _why_pager(target: Target) -> str:
    if target.pager == "frames":
        by_plan = "weights stream by a plan, at the rate of the link"
        return f"on a GPU, {by_plan}" if target.is_gpu else f"with tiers of the host, {by_plan}"
    return "on the CPU, the operating system's paging does it"


def _why_page_size(target: Target) -> str:
    if target.pager == "frames":
        return "a sixteenth of the cap at most, and no more than copies need for the link's rate"
    return "what drivers and kernels move at once"


def notes_on(
    parts: Sequence[Part], target: Target, rates: Rates, at: AtCap, training: str | None
) -> tuple[str, ...]:
    """Say what was assumed, and what is not estimated."""
    of_pass = _TRAINING[training] if training else _FORWARD
    notes = [*_ALWAYS, of_pass, *(note for part in parts for note in part.notes)]
    notes.append(_OF_MODULE if all(part.ordered for part in parts) else _BY_NAMES)
    placements = [placement for part in parts for placement in part.placements]
    if any(part.has_experts for part in parts):
        notes.append(_EXPERTS)
    if any(p.dtype.itemsize == 1 and p.dtype != torch.bool for p in placements):
        notes.append(_QUANTIZED)
    if target.core is None:
        notes.append("host memory and disk are those of this machine; host_budget says otherwise")
    if not rates.compute:
        notes.append(f"products on {target.device} take no time: compute (400TFLOPS) says how long")
    if not rates.memory:
        notes.append(
            f"{target.device} reads its own memory in no time: memory (3TB/s) says how fast"
        )
    elif not target.is_gpu:
        notes.append("on the CPU, times are rough: the operating system pages")
    turns = [part.resident for part in at.parts]
    if len(turns) > 1 and sum(turns) > at.resident:
        seconds = sum(turns) / rates.link
        notes.append(
            f"a pass of each part is counted; what stays of a part comes in again when it has its "
            f"turn after another one, {seconds:.3f} s for all"
        )
    return tuple(notes)
