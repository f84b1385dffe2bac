"""One case of the pipeline in this process: `python -m bench.pipeline.case NAME --options JSON`.

The last line of the output is one JSON value. The case `weights` writes the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.harness.case_process import measure_case
from bench.harness.random_weights import random_block, write_weights
from bench.pipeline.models import STAGES, Shape, builder
from bench.pipeline.subjects import LOADERS, Module, Options, Subject, load_resident
from penstock.bench.case_report import report
from penstock.bench.compare import compare, save_reference
from penstock.bench.machine import describe_machine
from penstock.bench.measure import synchronize
from penstock.loading.skeleton import build_skeleton

_GUIDANCE = 3.0


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
    torch.backends.cudnn.deterministic = True
    clips: list[Clip] = []

    def run_clip(subject: Subject) -> None:
        clip = Clip(subject, options)
        clip.run()
        clips.append(clip)

    def run(subject: Subject) -> dict[str, Any]:
        for _ in range(options.clips):
            run_clip(subject)
        return {"stages": list(clips[-1].stages.values())}

    def run_watched(subject: Subject) -> dict[str, Any]:
        run_clip(subject)
        return {}

    figures = measure_case(
        name, options, lambda stack: LOADERS[name](options, stack), run, run_watched
    )
    for stage in figures["stages"]:
        stage["first_seconds"] = clips[0].stages[stage["stage"]]["seconds"]
        judge(stage, [clip.outputs[stage["stage"]] for clip in clips], name, options)
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

    def __init__(self, subject: Subject, options: Options) -> None:
        self._subject = subject
        self._options = options
        self._inputs = Inputs(options)
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
