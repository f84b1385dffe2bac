"""What one case is told: the model, the passes, and how Penstock is to run it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["CaseOptions"]


@dataclass(frozen=True)
class CaseOptions:
    """Options of a case; they travel to its process as JSON. Sizes in bytes, times in seconds.

    Parameters
    ----------
    checkpoint, references
        Directories of the weights, and of the logits by which results are judged.
    prompt
        Tokens of a pass; 0 for: find the number at which compute takes as long as copying.
    passes, least_seconds
        Time at least so many passes, and passes for at least so long.
    link_bytes
        Size of the copies that measure the pinned link.
    reference, writes
        Name of the logits to compare with; name under which to write one's own.
    captured
        Whether to capture the pass in a CUDA graph and replay it.
    variant
        What tells apart cases of one kind, such as `"record"` or `"everything"`.
    pager, host, cap, host_budget
        As `MemoryManager` takes them; host None for its default.
    cold
        Whether the page cache is to hold nothing of the checkpoint before each pass.
    beside_resident
        Whether to time the resident model in the same process too, pass by pass in turn.
    """

    checkpoint: str
    references: str
    device: str
    layers: int
    hidden: int
    vocabulary: int
    prompt: int
    passes: int = 10
    least_seconds: float = 2.0
    link_bytes: int = 1 << 30
    reference: str = "short"
    writes: str = ""
    captured: bool = False
    variant: str = ""
    pager: str = ""
    host: str | None = None
    cap: int = 0
    host_budget: int | None = None
    cold: bool = False
    beside_resident: bool = False

    def files(self) -> list[Path]:
        """Return the checkpoint's files of weights."""
        return sorted(Path(self.checkpoint).glob("*.safetensors"))

    def reference_file(self, name: str) -> Path:
        """Return the file of the logits of that name."""
        return Path(self.references) / f"{name}.safetensors"

    def to_json(self) -> str:
        """Write the options as text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> CaseOptions:
        """Read options from text.

        Raises
        ------
        TypeError
            If a key is unknown, or one is missing.
        """
        return CaseOptions(**json.loads(text))
