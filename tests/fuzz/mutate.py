"""Mutations of JSON text and of raw bytes, for the header fuzzer.

JSON is mutated as a tree in which an object is an `Object`, a list of pairs, so that equal keys
and any order of keys can be written.
"""

from __future__ import annotations

import json
from random import Random

ODD_VALUES = (
    None, True, False, 0, 1, 2, 3, 4, 8, -1, -0.0, 0.5, 1e400, float("nan"), 2**31, 2**32, 2**53,
    2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**25, "", "F32", "F4", "F6_E2M3", "U8",
    "BOOL", "C64", "F99", "\ud800", "\0", "..", "a/b", [], [0], [0, 0], [0, 4], [4, 8], [1, 2, 3],
)  # fmt: skip
ODD_KEYS = ("", "a", "b", "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "\udfff")
ODD_BYTES = (b"", b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"9", b" ",
             b"\\u", b"e5", b"NaN", b"null", b"\xc3\xbc", b"\xed\xa0\x80")  # fmt: skip
ACTIONS = ("replace", "replace", "nudge", "nudge", "nudge", "remove", "repeat", "add", "shuffle")


class Object(list):
    """The pairs of a JSON object."""


def dump(tree: object) -> str:
    """Write a tree as JSON, as it is: equal keys, NaN and lone surrogates included."""
    if isinstance(tree, Object):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dump, tree)) + "]"
    return json.dumps(tree)


def mutate_json(random: Random, text: bytes) -> bytes:
    """Return JSON text with one node changed; text that is no JSON is mutated as bytes."""
    try:
        tree = json.loads(text, object_pairs_hook=Object)
    except (ValueError, RecursionError):
        return mutate_bytes(random, text)
    nodes = _containers(tree)
    if not nodes:
        return dump(random.choice(ODD_VALUES)).encode()
    _mutate_node(random, random.choice(nodes))
    return dump(tree).encode()


def _containers(tree: object, limit: int = 1000) -> list[list]:
    found, waiting = [], [tree]
    while waiting and len(found) < limit:
        node = waiting.pop()
        if isinstance(node, list):
            found.append(node)
            waiting.extend([pair[1] for pair in node] if isinstance(node, Object) else node)
    return found


def _mutate_node(random: Random, node: list) -> None:
    """Replace, nudge, remove, repeat, add or shuffle items of one object or list."""
    action = random.choice(ACTIONS)
    at = random.randrange(len(node)) if node else None
    pairs = isinstance(node, Object)
    if at is None or action == "add":
        value = random.choice(ODD_VALUES)
        item = (random.choice(ODD_KEYS), value) if pairs else value
        node.insert(random.randint(0, len(node)), item)
    elif action == "remove":
        del node[at]
    elif action == "repeat":
        node.insert(random.randint(0, len(node)), node[at])
    elif action == "shuffle":
        random.shuffle(node)
    else:
        key, value = node[at] if pairs else (None, node[at])
        value = _nudged(random, value) if action == "nudge" else random.choice(ODD_VALUES)
        if pairs and random.random() < 0.2:
            key, value = random.choice(ODD_KEYS), node[at][1]
        node[at] = (key, value) if pairs else value


def _nudged(random: Random, value: object) -> object:
    if isinstance(value, int):
        return value + random.choice((-8, -4, -1, 1, 4, 8))
    if isinstance(value, list) and value and not isinstance(value, Object):
        return [_nudged(random, item) for item in value]
    return value


def mutate_bytes(random: Random, content: bytes) -> bytes:
    """Return bytes with a short range replaced, repeated, dropped or cut off."""
    begin = random.randint(0, len(content))
    end = min(len(content), begin + random.choice((0, 1, 1, 2, 4, 8, 40)))
    action = random.randrange(5)
    if action == 0:
        return content[:begin]
    if action == 1:
        return content[:end] + content[begin:]
    if action == 2 and begin < len(content):
        flipped = content[begin] ^ (1 << random.randrange(8))
        return content[:begin] + bytes([flipped]) + content[begin + 1 :]
    return content[:begin] + random.choice(ODD_BYTES) + content[end:]


def mutate_file(random: Random, content: bytes) -> bytes:
    """Return a safetensors file with its header, its length field or any of its bytes changed."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    action = random.randrange(8)
    if action == 0:
        return mutate_bytes(random, content)
    if action == 1:
        wrong = random.choice((0, length - 1, length + 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1))
        return (wrong % 2**64).to_bytes(8, "little") + header + data
    if action == 2:
        data = random.choice((data + b"\0", data[:-1], data * 2, data[:-4]))
    elif action == 3:
        header = mutate_bytes(random, header)
    else:
        header = mutate_json(random, header)
    return len(header).to_bytes(8, "little") + header + data
