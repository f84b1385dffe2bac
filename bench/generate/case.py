"""One case of text generation in this process: `python -m bench.generate.case NAME --options JSON`.

The last line of the output is one JSON value. The case `weights` writes the weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import penstock
from bench.harness.case_process import figures_of, measure_case
from bench.harness.random_weights import random_block, write_weights
from penstock.bench import memory
from penstock.bench.case_report import report
from penstock.bench.machine import describe_machine
from penstock.bench.measure import synchronize
from penstock.bench.models import build, llama_config, resident_model
from penstock.bench.subject import UnavailableError
from penstock.loading.skeleton import build_skeleton

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Options:
    """Options of a case; they travel to its process as JSON.

    Parameters
    ----------
    cap
        Bytes of device memory for weights.
    prompt, tokens
        Tokens given, and generated: once before it is timed, since what the first use of a length
        takes (choosing kernels), and of a plan (arranging pages), is not what a token takes.
    """

    directory: str
    device: str
    layers: int
    hidden: int
    vocabulary: int
    cap: int
    prompt: int
    tokens: int
    link_bytes: int
    block_bytes: int

    def config(self) -> LlamaConfig:
        """Return the model's configuration."""
        return llama_config(self.layers, self.hidden, self.vocabulary)


@dataclass(frozen=True)
class Subject:
    """A model that is ready to generate.

    Parameters
    ----------
    moved
        Bytes of weights that it moved to the device so far; or None, and `per_token` has them.
    """

    model: LlamaForCausalLM
    note: str
    per_token: int | None = 0
    moved: Callable[[], int] = field(default=lambda: 0)
    figures: Callable[[], Mapping[str, Any]] = field(default=dict)
    pinned: Callable[[], int | None] = memory.torch_pinned_bytes
    link: float | None = None


def load_resident(options: Options, stack: ExitStack) -> Subject:
    """Plain PyTorch with all weights on the device."""
    model = resident_model(options.config(), Path(options.directory), options.device)
    return Subject(model, "all weights on the device, plain PyTorch")


def load_penstock(options: Options, stack: ExitStack) -> Subject:
    """Penstock, with a cap of the manager's own: it counts weights."""
    manager = penstock.MemoryManager(
        cap=options.cap, device=options.device, pager="frames", host="pinned", progress=False
    )
    return _with_manager(manager, options, stack, "penstock, weights capped")


def load_penstock_hard(options: Options, stack: ExitStack) -> Subject:
    """Penstock under a hard cap: it counts all that the process holds. `measure` has set it."""
    manager = penstock.MemoryManager(device=options.device, host="pinned", progress=False)
    link = manager.stats().link_rate
    return _with_manager(manager, options, stack, "penstock, process capped", link)


def _with_manager(
    manager: penstock.MemoryManager,
    options: Options,
    stack: ExitStack,
    note: str,
    link: float | None = None,
) -> Subject:
    config = options.config()
    manager.register("llama", lambda: build(config), options.directory)
    stack.callback(manager.unregister, "llama")
    model = stack.enter_context(manager.use("llama"))

    def figures() -> Mapping[str, Any]:
        return figures_of(manager, "llama")

    def moved() -> int:
        return manager.stats().models["llama"].memory.loaded_bytes

    def pinned() -> int:
        return manager.stats().models["llama"].memory.pinned_bytes

    return Subject(model, note, None, moved, figures, pinned, link)  # type: ignore[arg-type]


def load_accelerate(options: Options, stack: ExitStack) -> Subject:
    """Accelerate's own placement under the same limit: what does not fit waits on the host."""
    if torch.device(options.device).type != "cuda":
        raise UnavailableError("accelerate places on a GPU")
    try:
        from accelerate import dispatch_model, infer_auto_device_map
    except ImportError as error:
        raise UnavailableError(f"not installed: {error.name}") from None
    model = resident_model(options.config(), Path(options.directory), "cpu", private=True)
    places = infer_auto_device_map(
        model,
        max_memory={0: options.cap, "cpu": 1 << 40},
        no_split_module_classes=["LlamaDecoderLayer"],
    )
    waiting = [name for name, place in places.items() if place == "cpu"]
    per_token = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if any(name == part or name.startswith(f"{part}.") for part in waiting)
    )
    dispatch_model(model, device_map=places, skip_keys="past_key_values")
    version = importlib.metadata.version("accelerate")
    note = f"accelerate {version}, {len(waiting)} parts on the host"
    return Subject(model, note, per_token)


LOADERS: Mapping[str, Callable[[Options, ExitStack], Subject]] = {
    "resident": load_resident,
    "penstock": load_penstock,
    "penstock-hard-cap": load_penstock_hard,
    "accelerate": load_accelerate,
}


class TokenTimes:
    """Takes the time of each token, from logits to logits, and what was moved meanwhile."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self._subject = subject
        self._device = device
        self.ends: list[float] = []
        self.moved_first = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Leave logits as they are."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1:
            self.moved_first = self._subject.moved()
        return scores


def write_all(options: Options) -> dict[str, Any]:
    """Write the weights, and say what machine this is."""
    start = time.perf_counter()
    block = random_block(options.block_bytes, seed=20, device=options.device)
    skeleton = build_skeleton(lambda: build(options.config()))
    nbytes = write_weights(skeleton, Path(options.directory, "model.safetensors"), block)
    seconds = time.perf_counter() - start
    machine = describe_machine(torch.device(options.device), options.link_bytes)
    machine["transformers"] = importlib.metadata.version("transformers")
    return {"weight_bytes": nbytes, "seconds": seconds, "machine": machine}


def measure(name: str, options: Options) -> dict[str, Any]:
    """Load a case's model, generate, and watch memory."""

    def run(subject: Subject) -> dict[str, Any]:
        generate(subject, options)
        return generate(subject, options)

    def run_watched(subject: Subject) -> dict[str, Any]:
        generate(subject, options)
        return {"figures": dict(subject.figures())}

    return measure_case(
        name, options, lambda stack: LOADERS[name](options, stack), run, run_watched
    )


def generate(subject: Subject, options: Options) -> dict[str, Any]:
    """Generate greedily; return the tokens, and figures of each but the first, the prompt's."""
    from transformers import LogitsProcessorList

    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, options.vocabulary, (1, options.prompt), generator=generator).to(device)
    times = TokenTimes(subject, device)
    synchronize(device)
    start = time.perf_counter()
    found = subject.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=options.tokens,
        max_new_tokens=options.tokens,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([times]),
    )
    moved = subject.moved() - times.moved_first
    taken = [end - begin for begin, end in pairwise(times.ends)]
    per_token = subject.per_token
    return {
        "tokens": found[0, ids.shape[1] :].tolist(),
        "prompt_seconds": times.ends[0] - start,
        "token_seconds": taken,
        "seconds": statistics.median(taken),
        "mean_seconds": statistics.mean(taken),
        "moved_bytes": moved / len(taken) if per_token is None else per_token,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["weights", *LOADERS])
    parser.add_argument("--options", required=True, type=json.loads, metavar="JSON")
    arguments = parser.parse_args()
    options = Options(**arguments.options)
    if arguments.case == "weights":
        return report(lambda: write_all(options))
    return report(lambda: measure(arguments.case, options))


if __name__ == "__main__":
    sys.exit(main())
