"""One case in this process: `python -m penstock.bench.case KIND --options JSON`.

The last line of the output is one JSON value: the case's figures, or `unavailable` or `failed` with
the reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from penstock.bench import memory, reads
from penstock.bench.case_report import report
from penstock.bench.compare import compare, save_reference
from penstock.bench.measure import (
    balanced_prompt,
    link_rate,
    synchronize,
    time_in_turn,
    time_launches,
    time_passes,
    timed,
)
from penstock.bench.models import build, llama_config
from penstock.bench.options import CaseOptions
from penstock.bench.ours import load_penstock
from penstock.bench.peers import load_accelerate, load_diffusers, load_resident
from penstock.bench.subject import Loader, Subject, UnavailableError
from penstock.bench.triple_buffer import load_triple_buffer
from penstock.optional_packages import require_transformers

__all__ = ["main", "measure"]

LOADERS: Mapping[str, Loader] = {
    "resident": load_resident,
    "triple-buffer": load_triple_buffer,
    "accelerate": load_accelerate,
    "diffusers": load_diffusers,
    "penstock": load_penstock,
}
_WARM_UPS = 3
_IN_A_ROW = 4  # launches of a graph


def measure(kind: str, options: CaseOptions) -> dict[str, Any]:
    """Load a case's subject, time its passes, compare its result, and watch its memory.

    Returns
    -------
    dict
        Figures: sizes in bytes, times in seconds, rates in bytes per second.
    """
    require_transformers("the benchmark's model", "bench")
    device = torch.device(options.device)
    ids = make_ids(options, options.prompt or 16)
    figures: dict[str, Any] = {}
    with torch.no_grad(), ExitStack() as stack:
        warm_device(options, ids)
        baseline = memory.Baseline.take(device)
        prepare_files(options, figures)
        # Nobody may ask the driver for anything while a pass is being captured.
        seen = torch.device("cpu") if options.captured else device
        with memory.Watch(seen, 0.02) as loading:
            start = time.perf_counter()
            subject = LOADERS[kind](options, ids, stack)
            synchronize(device)
            figures["load_seconds"] = time.perf_counter() - start
        figures["first_pass_seconds"] = timed(lambda: subject.run(ids), device)
        figures["weight_bytes"] = sum(file.stat().st_size for file in options.files())
        link = link_rate(device, options.link_bytes)
        figures["link_before"] = link
        if options.prompt == 0:
            ids = find_prompt(options, subject, figures, device)
        figures["prompt"] = ids.shape[1]

        time_subject(options, subject, ids, figures, device)
        figures["link_after"] = link_rate(device, options.link_bytes)
        if link is not None and figures["link_after"] is not None:
            figures["link"] = (link + figures["link_after"]) / 2
        with memory.Watch(device, 0.001) as running:
            logits = subject.run(ids)
            synchronize(device)
        figures |= baseline.figures(loading, running)
        figures["pinned_bytes"] = subject.pinned()
        figures["note"] = subject.note
        figures["own_figures"] = dict(subject.figures())
        if options.writes:
            save_reference(logits, options.reference_file(options.writes))
        figures |= compare(logits, options.reference_file(options.reference))
        if options.beside_resident:
            del logits
            time_beside_resident(options, subject, ids, figures, stack, device)
    return figures


def make_ids(options: CaseOptions, prompt: int) -> torch.Tensor:
    """Draw the tokens of a prompt, the same in every process."""
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(0, options.vocabulary, (1, prompt), generator=generator)
    return ids.to(options.device)


def warm_device(options: CaseOptions, ids: torch.Tensor) -> None:
    """Run one layer of the same width, so that no case pays for context, kernels and workspace."""
    device = torch.device(options.device)
    with device:
        model: nn.Module = build(llama_config(1, options.hidden, options.vocabulary))
    for _ in range(2):
        model(ids, use_cache=False)
    del model
    synchronize(device)
    torch.cuda.empty_cache()


def prepare_files(options: CaseOptions, figures: dict[str, Any]) -> None:
    """Bring the page cache into the state that the case asks for, and measure raw reads if cold."""
    files = options.files()
    if not options.cold:
        reads.warm_cache(files)
        return
    figures["raw_reads"] = reads.raw_read_rates(files)
    reads.drop_cache(files)
    figures["cached_share"] = reads.cached_share(files)
    reads.drop_cache(files)  # probing makes the system read ahead


def find_prompt(
    options: CaseOptions, subject: Subject, figures: dict[str, Any], device: torch.device
) -> torch.Tensor:
    """Make the prompt whose pass takes as long as copying all weights over the link."""
    if figures["link_before"] is None:
        raise UnavailableError("the link could not be measured, so no prompt balances it")
    target = figures["weight_bytes"] / figures["link_before"]

    def seconds_of(prompt: int) -> float:
        ids = make_ids(options, prompt)
        timed(lambda: subject.run(ids), device)
        return time_passes(lambda: subject.run(ids), device, passes=3).median

    return make_ids(options, balanced_prompt(seconds_of, target))


def time_subject(
    options: CaseOptions,
    subject: Subject,
    ids: torch.Tensor,
    figures: dict[str, Any],
    device: torch.device,
) -> None:
    """Warm up and time passes, and note what they moved."""
    for _ in range(_WARM_UPS):
        subject.run(ids)
    synchronize(device)
    loaded = subject.figures().get("loaded_bytes", 0)
    read = subject.figures().get("read_bytes", 0)
    start = time.perf_counter()
    times = time_passes(
        lambda: subject.run(ids),
        device,
        passes=options.passes,
        least_seconds=options.least_seconds,
        before=(lambda: reads.drop_cache(options.files())) if options.cold else None,
    )
    period = (time.perf_counter() - start) / times.count
    moved = subject.bytes_per_pass
    if moved is None:
        moved = round((subject.figures()["loaded_bytes"] - loaded) / times.count)
    # Readers of files go on between passes, so a pass that begins cold takes its whole period.
    figures["seconds"] = period if options.cold else times.median
    figures["least_seconds"] = times.least
    figures["passes"] = times.count
    figures["moved_bytes"] = moved
    figures["read_bytes"] = (subject.figures().get("read_bytes", 0) - read) / times.count
    if options.cold:  # again, as the disk may have a cache of its own
        figures["raw_reads_after"] = reads.raw_read_rates(options.files())
    if subject.launch is not None:
        for name, count in (("launch_seconds", 1), ("launch_seconds_in_a_row", _IN_A_ROW)):
            launches = time_launches(subject.launch, device, passes=options.passes, in_a_row=count)
            figures[name] = launches.median


def time_beside_resident(
    options: CaseOptions,
    subject: Subject,
    ids: torch.Tensor,
    figures: dict[str, Any],
    stack: ExitStack,
    device: torch.device,
) -> None:
    """Time the subject and the resident model in turn, in this process."""
    resident = load_resident(options, ids, stack)
    for _ in range(_WARM_UPS):
        resident.run(ids)
    ours, theirs = time_in_turn(
        lambda: subject.run(ids),
        lambda: resident.run(ids),
        device,
        passes=options.passes,
        least_seconds=options.least_seconds,
    )
    figures["seconds_in_turn"] = ours.median
    figures["resident_seconds_in_turn"] = theirs.median


def main(arguments: list[str] | None = None) -> int:
    """Run the case that the arguments name; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(LOADERS))
    parser.add_argument("--options", required=True, type=CaseOptions.from_json, metavar="JSON")
    options = parser.parse_args(arguments)
    return report(lambda: measure(options.kind, options.options))


if __name__ == "__main__":
    sys.exit(main())
