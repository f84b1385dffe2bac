"""One case of the pipeline in this process: `python -m bench.pipeline.case NAME --options JSON`.

The last line of the output is one JSON value. The case `weights` writes the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import penstock
from bench.harness.case_process import warm_device
from bench.harness.random_weights import random_block, write_weights
from bench.pipeline.models import STAGES, Shape, builder
from bench.pipeline.subjects import LOADERS, Module, Options, Subject, load_resident
from penstock.bench import memory
from penstock.bench.case_report import report
from penstock.bench.compare import compare, save_reference
from penstock.bench.machine import describe_machine
from penstock.bench.measure import link_rate, synchronize
from penstock.bench.subject import UnavailableError
from penstock.loading.skeleton import build_skeleton

_GUIDANCE = 3.0
_WATCH_SECONDS = 0.02


def write_all(options: Options) -> dict[str, Any]:
    """Write the weights of all stages, and say what machine this is."""
    start = time.perf_counter()
    block = random_block(options.block_bytes, seed=20, device=options.device)
    nbytes = {
        stage: write_weights(
            build_skeleton(builder(stage, options.shape)), options.weights(stage), block
        )
        for stage in STAGES
    }
    seconds = time.perf_counter() - start
    machine = describe_machine(torch.device(options.device), options.link_bytes)
    return {"weight_bytes": nbytes, "seconds": seconds, "machine": machine}


def measure(name: str, options: Options) -> dict[str, Any]:
    """Load a case's subject, run clips, compare what each stage gives, and watch memory."""
    device = torch.device(options.device)
    figures: dict[str, Any] = {"note": ""}
    hard = name == "penstock-hard-cap"
    if hard and device.type != "cuda":
        raise UnavailableError("a hard cap needs a GPU")
    if hard:
        penstock.set_cap(options.cap, device=options.device)
    torch.backends.cudnn.deterministic = True
    with torch.no_grad(), ExitStack() as stack:
        warm_device(device)
        baseline = memory.Baseline.take(device)
        figures["driver_before_bytes"] = baseline.device_bytes
        with memory.Watch(device, _WATCH_SECONDS) as loading:
            start = time.perf_counter()
            subject = LOADERS[name](options, stack)
            synchronize(device)
            figures["load_seconds"] = time.perf_counter() - start
        figures["note"] = subject.note
        link = subject.link or link_rate(device, options.link_bytes)
        inputs = Inputs(options)
        outputs: list[dict[str, torch.Tensor]] = []
        clips: list[dict[str, dict[str, Any]]] = []
        for _ in range(options.clips):
            clip = Clip(subject, options, inputs)
            clip.run()
            clips.append(clip.stages)
            outputs.append(clip.outputs)
        # Looking costs time, so the clip that is looked at is one more.
        with memory.Watch(device, _WATCH_SECONDS) as running:
            clip = Clip(subject, options, inputs)
            clip.run()
            outputs.append(clip.outputs)
        after = link if subject.link else link_rate(device, options.link_bytes)
        figures["link"] = (link + after) / 2 if link and after else None
        figures |= baseline.figures(loading, running)
        figures["driver_peak_bytes"] = max(loading.device_bytes, running.device_bytes)
        figures["pinned_bytes"] = subject.pinned()
        figures["stages"] = list(clips[-1].values())
        for stage in figures["stages"]:
            stage["first_seconds"] = clips[0][stage["stage"]]["seconds"]
            judge(stage, [clip[stage["stage"]] for clip in outputs], name, options)
    return figures


class Inputs:
    """Prompts and noise, the same in every process."""

    def __init__(self, options: Options) -> None:
        shape, device = options.shape, options.device
        generator = torch.Generator().manual_seed(7)
        size = (1, shape.channels, shape.frames, shape.side, shape.side)
        self.noise = torch.randn(size, generator=generator).to(device, torch.bfloat16)
        ids = (2, 1, shape.text_tokens)
        self.prompts = torch.randint(0, shape.vocabulary, ids, generator=generator).to(device)
        self.times = torch.linspace(1, 0, options.steps + 1)[:-1].to(device)


class Clip:
    """One run of the pipeline: its times, stage by stage, and what each stage gave."""

    def __init__(self, subject: Subject, options: Options, inputs: Inputs) -> None:
        self._subject = subject
        self._options = options
        self._inputs = inputs
        self._device = torch.device(options.device)
        self.stages: dict[str, dict[str, Any]] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        """Encode two prompts, denoise with guidance, upscale."""
        inputs = self._inputs
        with self._stage("encoder") as encode:
            texts = torch.cat([encode(ids) for ids in inputs.prompts])
        self._keep("encoder", texts)
        x = inputs.noise
        with self._stage("denoiser") as denoise:
            for time_of_step in inputs.times:
                both = denoise(torch.cat([x, x]), time_of_step.expand(2), texts)
                wanted, unwanted = both.chunk(2)
                x = x - (unwanted + _GUIDANCE * (wanted - unwanted)) / self._options.steps
        self._keep("denoiser", x)
        with self._stage("spatial") as upscale:
            x = upscale(x)
        self._keep("spatial", x)
        with self._stage("temporal") as upscale:
            x = upscale(x)
        self._keep("temporal", x)

    def _keep(self, name: str, output: torch.Tensor) -> None:
        self.outputs[name] = output.cpu()

    @contextmanager
    def _stage(self, name: str) -> Iterator[Module]:
        """Time a stage from before its module is there until it has gone, and each pass of it.

        Passes end when their result is there; copies for the next one go on meanwhile, as they do
        where nobody takes times.
        """
        subject, device = self._subject, self._device
        before = dict(subject.figures(name))
        moved = subject.moved(name)
        moved_first = 0
        synchronize(device)
        ends = [time.perf_counter()]
        with subject.stage(name) as module:

            def call(*inputs: torch.Tensor) -> torch.Tensor:
                nonlocal moved_first
                output = module(*inputs)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
                ends.append(time.perf_counter())
                if len(ends) == 2:
                    moved_first = subject.moved(name) - moved
                return output

            yield call
            moved_all = subject.moved(name) - moved
            after = dict(subject.figures(name))
        synchronize(device)
        passes = [end - begin for begin, end in pairwise(ends)]
        self.stages[name] = {
            "stage": name,
            "seconds": time.perf_counter() - ends[0],
            "pass_seconds": passes,
            "moved_bytes": moved_all,
            "moved_first_bytes": moved_first,
            "before": before,
            "after": after,
        }


def judge(stage: dict[str, Any], outputs: list[torch.Tensor], case: str, options: Options) -> None:
    """Compare a stage's outputs of all clips with what plain PyTorch gave."""
    file = Path(options.directory, "references", f"{stage['stage']}.safetensors")
    if LOADERS[case] is load_resident:
        save_reference(outputs[-1], file)
    found = [compare(output, file) for output in outputs]
    stage["finite"] = all(bool(output.isfinite().all()) for output in outputs)
    same = [each["bit_identical"] for each in found]
    stage["bit_identical"] = None if None in same else all(same)
    stage["relative_error"] = None if None in same else max(x["relative_error"] for x in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["weights", *LOADERS])
    parser.add_argument("--options", required=True, type=json.loads, metavar="JSON")
    arguments = parser.parse_args()
    told = arguments.options
    options = Options(**{**told, "shape": Shape(**told["shape"])})
    if arguments.case == "weights":
        return report(lambda: write_all(options))
    return report(lambda: measure(arguments.case, options))


if __name__ == "__main__":
    sys.exit(main())
