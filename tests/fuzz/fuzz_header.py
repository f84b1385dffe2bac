"""Fuzz the checkpoint reader: mutate files, open them, and judge what comes back.

Each execution must end within two seconds, in a `CheckpointError` or in a checkpoint whose extents
lie inside their files, and must agree with the safetensors package where that is installed. Every
other mutation starts from a good file, the others from a pool of bad ones, which each file with a
kind of message not seen before joins.

    python tests/fuzz/fuzz_header.py --seconds 600 --seed 1 --json fuzz.json
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.mutate import mutate_bytes, mutate_file, mutate_json
from penstock.checkpoint import open_checkpoint
from penstock.errors import CheckpointError
from python.checkpoint import oracle
from python.checkpoint.checkpoint_files import VALID, entry, index, pack
from python.checkpoint.malformed import BLOBS

Mutation = Callable[[Random, bytes], bytes]
# Values in messages: they may be cut short, which ends them with dots.
QUOTED = r"'(\\.|[^'\\])*?('|\.\.\.)|\"(\\.|[^\"\\])*?(\"|\.\.\.)"
LISTED = r"\[[^]]*?(\]|\.\.\.)"
SCALAR = r"\b(0x[0-9a-f]{2}|None|True|False|nan|inf)\b|-?\b[\d.]+(e[+-]?\d+)?\b"

SLOWEST_ALLOWED = 2.0
HUNG = 10
MOST_FAILURES = 10
LARGEST_SEED = 20_000
MOST_GOOD = 200
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = {"a.safetensors": pack({"a": entry()}, bytes(4)), "b.safetensors": VALID["many"]}
WEIGHT_MAP = {"a": "a.safetensors", "t0": "b.safetensors", "t7": "b.safetensors"}


@dataclass
class Pool:
    """What mutations start from."""

    good: list[bytes]
    bad: list[bytes]

    def draw(self, random: Random, mutations: tuple[Mutation, ...]) -> bytes:
        content = random.choice(random.choice((self.good, self.bad)))
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            content = random.choice(mutations)(random, content)
        return content

    def learn(self, random: Random, content: bytes, *, good: bool, new: bool) -> None:
        if len(content) > LARGEST_SEED:
            return
        if good and len(self.good) >= MOST_GOOD:
            self.good[random.randrange(MOST_GOOD)] = content
        elif good:
            self.good.append(content)
        elif new:
            self.bad.append(content)


class Fuzzer:
    """Runs executions in one directory and counts what they end in."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = Random(seed)
        self.files = Pool([*VALID.values()], [case.files[FILE] for case in BLOBS])
        self.indexes = Pool([index(WEIGHT_MAP)], [b"{}"])
        self.kinds: Counter[str] = Counter()
        self.executions = self.accepted = 0
        self.slowest = 0.0
        self.failures: list[dict[str, str]] = []

    def execute(self) -> None:
        """Mutate one file or index, open it, and learn from how that ends."""
        if self.random.random() < 0.2:
            pool, path = self.indexes, self.directory / INDEX
            content = pool.draw(self.random, (mutate_json, mutate_json, mutate_bytes))
            self._write_shards()
        else:
            pool, path = self.files, self.directory / FILE
            content = pool.draw(self.random, (mutate_file,))
        path.write_bytes(content)
        message, fault = self._open(path)
        self.executions += 1
        self.accepted += message is None
        kind = "accepted" if message is None else _kind(message)
        self.kinds[kind] += 1
        pool.learn(self.random, content, good=message is None, new=self.kinds[kind] == 1)
        if fault is not None:
            encoded = base64.b64encode(content).decode()
            self.failures.append({"fault": fault, "file": path.name, "base64": encoded})

    def _write_shards(self) -> None:
        for name, shard in SHARDS.items():
            spoilt = self.random.random() < 0.1
            content = mutate_file(self.random, shard) if spoilt else shard
            (self.directory / name).write_bytes(content)

    def _open(self, path: Path) -> tuple[str | None, str | None]:
        """Return the message of a refusal, and what is wrong with how the opening ended."""
        message = fault = None
        signal.alarm(HUNG)
        start = time.perf_counter()
        try:
            checkpoint = open_checkpoint(path)
            elapsed = time.perf_counter() - start
            fault = oracle.extent_fault(checkpoint)
        except CheckpointError as error:
            elapsed = time.perf_counter() - start
            message = str(error)
        except Exception as error:
            return f"raised {error!r}", f"raised {error!r}"
        finally:
            signal.alarm(0)
        self.slowest = max(self.slowest, elapsed)
        if elapsed > SLOWEST_ALLOWED:
            fault = f"took {elapsed:.1f} s"
        if fault is None and path.name == FILE and oracle.safetensors is not None:
            fault = oracle.disagreement(path)
        return message, fault


def _kind(message: str) -> str:
    """Return a message without the values that it quotes, to tell kinds of refusal apart."""
    rule = message.partition(": ")[2].rpartition("; ")[0]
    for value in (QUOTED, LISTED, SCALAR):
        rule = re.sub(value, "_", rule)
    return rule


def _too_late(signum: int, frame: object) -> None:
    raise TimeoutError(f"hung for {HUNG} s")


def main() -> int:
    """Fuzz for the given time and return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_late)
    with tempfile.TemporaryDirectory() as directory:
        fuzzer = Fuzzer(Path(directory), options.seed)
        end = time.monotonic() + options.seconds
        while time.monotonic() < end and len(fuzzer.failures) < MOST_FAILURES:
            fuzzer.execute()
    report = {
        "seconds": options.seconds,
        "seed": options.seed,
        "executions": fuzzer.executions,
        "accepted": fuzzer.accepted,
        "distinct_messages": len(fuzzer.kinds) - ("accepted" in fuzzer.kinds),
        "slowest_ms": round(1000 * fuzzer.slowest, 1),
        "against_safetensors": getattr(oracle.safetensors, "__version__", None),
        "failures": fuzzer.failures,
    }
    for key, value in report.items():
        print(f"{key:20} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps({**report, "kinds": fuzzer.kinds}, indent=1))
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
