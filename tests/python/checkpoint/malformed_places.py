"""Malformed checkpoints of more than one file: broken indexes, missing shards, wrong places."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from python.checkpoint.checkpoint_files import Case, Content, entry, index, pack

SHARD = pack({"a": entry()}, bytes(4))
OTHER = pack({"b": entry()}, bytes(4))
INDEX = "model.safetensors.index.json"


def sharded(
    name: str,
    weight_map: object,
    *fragments: str,
    tensor: str | None = None,
    offset: int | None = None,
    culprit: str = INDEX,
    shards: Mapping[str, Content] | None = None,
) -> Case:
    content = (
        weight_map if isinstance(weight_map, bytes) or callable(weight_map) else (index(weight_map))
    )
    files = {INDEX: content, **({"1.safetensors": SHARD} if shards is None else shards)}
    return Case(name, files, fragments, INDEX, culprit, tensor, offset)


def _oversized(path: Path) -> None:
    path.touch()
    os.truncate(path, 100_000_001)


def escape(name: str, shard: str) -> Case:
    return sharded(f"shard {name}", {"a": shard}, "is not a plain name", tensor="a")


INDEXES = [
    sharded("index empty", b"", "bad JSON at byte 0", offset=0),
    sharded("index is a list", b"[]", "the JSON is not an object but []"),
    sharded("index number", b"1", "the JSON is not an object but 1"),
    sharded("index not UTF-8", b'{"\xff":1}', "not UTF-8 at byte 2", offset=2),
    sharded("index key twice", b'{"weight_map":{},"weight_map":{}}', "'weight_map' appears twice"),
    sharded("index over cap", _oversized, "has 100000001 bytes, more than 100000000"),
    sharded("no weight_map", b"{}", "weight_map is None"),
    sharded("weight_map empty list", [], "weight_map is []"),
    sharded("weight_map list", ["a"], "weight_map is ['a'], not an object"),
    sharded("weight_map string", "a", "weight_map is 'a', not an object"),
    sharded("weight_map empty", {}, "weight_map is an object of 0 keys"),
    sharded("index name twice", b'{"weight_map":{"a":"1","a":"1"}}', "appears twice", tensor="a"),
    sharded(
        "index half surrogate",
        b'{"weight_map":{"\\ud800":"1"}}',
        "is not Unicode text",
        tensor="\ud800",
    ),
    sharded("shard number", {"a": 1}, "its file is 1", tensor="a"),
    sharded("shard null", {"a": None}, "its file is None", tensor="a"),
    sharded("shard half surrogate", {"a": "\ud800"}, "not Unicode text", tensor="a"),
    escape("without name", ""),
    escape("dot", "."),
    escape("dot dot", ".."),
    escape("above", "../1.safetensors"),
    escape("below", "sub/1.safetensors"),
    escape("absolute", "/1.safetensors"),
    escape("backslash", "..\\1.safetensors"),
    escape("zero byte", "1.safetensors\0"),
    sharded(
        "shards missing",
        {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"},
        "2 of 3 shards are missing: '2.safetensors', '3.safetensors'",
    ),
    sharded(
        "shard link dangles",
        {"a": "1.safetensors"},
        "1 of 1 shards are missing",
        shards={"1.safetensors": lambda path: path.symlink_to("nowhere")},
    ),
    sharded("shard name too long", {"a": "x" * 300}, "File name too long (errno 36)"),
    sharded(
        "shard is a directory",
        {"a": "1.safetensors"},
        "is a directory",
        culprit="1.safetensors",
        shards={"1.safetensors": Path.mkdir},
    ),
    sharded(
        "shard malformed",
        {"a": "1.safetensors"},
        "has 0 bytes",
        culprit="1.safetensors",
        shards={"1.safetensors": b""},
    ),
    sharded(
        "tensor nowhere",
        {"a": "1.safetensors", "b": "1.safetensors"},
        "puts it in '1.safetensors', but no shard has it",
        tensor="b",
    ),
    sharded(
        "tensor elsewhere",
        {"a": "2.safetensors", "b": "1.safetensors"},
        "but '1.safetensors' has it",
        tensor="a",
        shards={"1.safetensors": SHARD, "2.safetensors": OTHER},
    ),
    sharded(
        "tensor in two shards",
        {"a": "1.safetensors", "b": "2.safetensors"},
        "in two shards, '1.safetensors' and '2.safetensors'",
        tensor="a",
        shards={
            "1.safetensors": SHARD,
            "2.safetensors": pack({"a": entry(), "b": entry("U8", [0], [4, 4])}, bytes(4)),
        },
    ),
]


def place(name: str, *fragments: str, target: str = "", **files: Content) -> Case:
    """Return a case about what lies where; `__` in a keyword stands for a dot."""
    named = {key.replace("__", "."): content for key, content in files.items()}
    return Case(name, named, fragments, target, target)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


PLACES = [
    place("nothing there", "No such file or directory (errno 2)", target="none.safetensors"),
    place("below a file", "Not a directory (errno 20)", target="a/b", a=b""),
    place(
        "link loop",
        "Too many levels of symbolic links (errno 40)",
        target="a",
        a=lambda path: path.symlink_to("a"),
    ),
    place("FIFO", "is a FIFO, not a regular file", target="a", a=os.mkfifo),
    place("device", "is a character device", target="a", a=lambda p: p.symlink_to("/dev/zero")),
    place("socket", "(errno 6)", target="a", a=_socket),
    place("name with a zero byte", "no file can have this name", target="a\0"),
    place("torch file", "register reads it as it is", target="a.bin", a__bin=b"\x80\x02"),
    place(
        "index of torch files",
        "not an index of safetensors files",
        target="pytorch_model.bin.index.json",
        pytorch_model__bin__index__json=index({"a": "b"}),
    ),
    place("empty directory", "holds no safetensors file; found: nothing"),
    place(
        "directory without weights",
        "found: config.json, tokenizer.json",
        config__json=b"{}",
        tokenizer__json=b"{}",
    ),
    place(
        "directory of torch files",
        "holds torch files only: a.bin, b.pt",
        "convert",
        a__bin=b"",
        b__pt=b"",
        config__json=b"{}",
    ),
    place(
        "two files",
        "several checkpoints: a.safetensors, b.safetensors",
        "path of one",
        a__safetensors=SHARD,
        b__safetensors=SHARD,
    ),
    place(
        "two indexes",
        "several checkpoints: a.safetensors.index.json, b.safetensors.index.json",
        a__safetensors__index__json=b"{}",
        b__safetensors__index__json=b"{}",
    ),
    Case(
        "one shard of two",
        {"m-00001-of-00002.safetensors": SHARD},
        ("shards without their index: m-00001-of-00002.safetensors",),
        "",
        "",
    ),
    Case(
        "two shards of two",
        {f"m-0000{i}-of-00002.safetensors": SHARD for i in (1, 2)},
        ("shards without their index", "download the index"),
        "",
        "",
    ),
]
