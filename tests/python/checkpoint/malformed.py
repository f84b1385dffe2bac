"""The corpus of malformed checkpoints: each breaks one rule, and says what the refusal must name.

`BLOBS` are single files; the fuzzer starts from them. `CASES` adds the broken indexes and
directories.
"""

from __future__ import annotations

import json

from python.checkpoint.checkpoint_files import ONE, Case, entry, pack
from python.checkpoint.malformed_places import INDEXES, PLACES


def blob(
    name: str,
    content: bytes,
    *fragments: str,
    tensor: str | None = None,
    offset: int | None = None,
) -> Case:
    return Case(name, {"model.safetensors": content}, fragments, tensor=tensor, offset=offset)


def about_a(name: str, a: object, *fragments: str, data: int = 4, at: int | None = None) -> Case:
    """Return a case whose one tensor is called `a`; a str is its JSON text."""
    text = a if isinstance(a, str) else json.dumps(a)
    content = pack(f'{{"a":{text}}}', bytes(data))
    offset = None if at is None else len(content) - data + at
    return blob(name, content, *fragments, tensor="a", offset=offset)


def two(name: str, b: object, *fragments: str, data: int, at: int) -> Case:
    """Return a case in which `a` has the first four bytes and `b` is at fault."""
    content = pack({"b": b, "a": entry()}, bytes(data))
    return blob(name, content, *fragments, tensor="b", offset=len(content) - data + at)


BLOBS = [
    blob("empty file", b"", "has 0 bytes", "at least 8"),
    blob("seven bytes", b"\x02" + bytes(6), "has 7 bytes", "download or save it again"),
    blob("header length 0", bytes(16), "header length is 0", offset=0),
    blob("header past end", pack("{}", length=3), "ends at byte 11 of a 10-byte", offset=0),
    blob("header over cap", pack("{}", length=100_000_001), "100000001 exceeds", offset=0),
    blob("header length 2**64-1", pack("{}", length=2**64 - 1), f"{2**64 - 1} exceeds", offset=0),
    blob("only a length", pack("", length=1), "ends at byte 9 of a 8-byte", offset=0),
    blob("not UTF-8", pack(b'{"\xff":1}'), "not UTF-8 at byte 10: 0xff", offset=10),
    blob("cut UTF-8", pack(b'{"\xc3'), "not UTF-8 at byte 10: 0xc3", offset=10),
    blob("encoded surrogate", pack(b'{"\xed\xa0\x80":1}'), "not UTF-8 at byte 10", offset=10),
    blob("leading space", pack(" {}"), "begins with 0x20, not '{'", offset=8),
    blob("byte order mark", pack("\ufeff{}"), "begins with 0xef", offset=8),
    blob("list on top", pack("[]"), "begins with 0x5b", offset=8),
    blob("zip archive", b"PK\x03\x04\x14" + bytes(60), "is a zip archive", offset=0),
    blob("no JSON", pack("{a}"), "bad JSON at byte 9", offset=9),
    blob("bad JSON after umlaut", pack('{"ü":}'), "bad JSON at byte 14", offset=14),
    blob("cut JSON", pack(f'{{"a":{ONE}'), "bad JSON at byte 61", offset=61),
    blob("text after JSON", pack("{} x"), "bad JSON at byte 11: Extra data", offset=11),
    blob("zero byte after JSON", pack("{}\0"), "bad JSON at byte 10: Extra data", offset=10),
    blob("no colon", pack('{"a"}'), "bad JSON at byte 12", offset=12),
    blob("control character", pack('{"a\n":1}'), "bad JSON at byte 11", offset=11),
    blob("deep lists", pack('{"a":' + "[" * 100_000), "nested too deeply"),
    blob("deep objects", pack('{"a":' * 100_000), "nested too deeply"),
    blob("deep behind text", pack('{"a":' + '["]\\"]",' * 1000), "nested too deeply, beyond 100"),
    blob("deep behind backslash", pack('{"a":' + '["]\\\\",' * 1000), "nested too deeply"),
    blob("huge integer", pack('{"a":' + "9" * 5000 + "}"), "an integer of 5000 digits"),
    blob("NaN", pack('{"a":NaN}'), "the constant NaN"),
    blob("Infinity", pack('{"a":-Infinity}'), "the constant -Infinity"),
    blob("name twice", pack(f'{{"a":{ONE},"a":{ONE}}}', bytes(4)), "'a' appears twice", tensor="a"),
    blob(
        "metadata twice",
        pack('{"__metadata__":{},"__metadata__":{}}'),
        "appears twice",
        tensor="__metadata__",
    ),
    blob("half surrogate", pack(f'{{"\\ud800":{ONE}}}', bytes(4)), "not Unicode", tensor="\ud800"),
    blob("metadata null", pack({"__metadata__": None}), "__metadata__ is not an object but None"),
    blob("metadata list", pack({"__metadata__": []}), "__metadata__ is not an object but []"),
    blob("metadata number", pack({"__metadata__": {"k": 1}}), "__metadata__ key 'k' holds 1"),
    blob("metadata null value", pack({"__metadata__": {"k": None}}), "key 'k' holds None"),
    blob("metadata nested", pack({"__metadata__": {"k": {"x": "y"}}}), "holds an object of 1 keys"),
    blob("metadata key twice", pack('{"__metadata__":{"k":"1","k":"2"}}'), "'k' appears twice"),
    blob("metadata half surrogate", pack('{"__metadata__":{"k":"\\ud800"}}'), "not Unicode text"),
    about_a("entry null", "null", "entry is not an object but None"),
    about_a("entry list", '["F32",[1],[0,4]]', "entry is not an object but"),
    about_a("entry string", '"F32"', "entry is not an object but 'F32'"),
    about_a(
        "no dtype", {"shape": [1], "data_offsets": [0, 4]}, "keys are ['data_offsets', 'shape']"
    ),
    about_a(
        "no shape",
        {"dtype": "F32", "data_offsets": [0, 4]},
        "keys are ['data_offsets', 'dtype']",
    ),
    about_a("no offsets", {"dtype": "F32", "shape": [1]}, "its keys are ['dtype', 'shape']"),
    about_a("empty entry", "{}", "its keys are [], not ['data_offsets', 'dtype', 'shape']"),
    about_a("extra key", {**entry(), "strides": [1]}, "'shape', 'strides'], not"),
    about_a("key twice", '{"dtype":"F32",' + ONE[1:], "key 'dtype' appears twice"),
    about_a("unknown dtype", entry("F128"), "unknown dtype 'F128'", "BF16"),
    about_a("lower-case dtype", entry("f32"), "unknown dtype 'f32'"),
    about_a("dtype number", entry(32), "unknown dtype 32"),
    about_a("dtype object", entry({"F32": None}), "unknown dtype an object"),
    about_a("dtype list", entry(["F32"]), "unknown dtype ['F32']"),
    about_a("shape null", entry(shape=None), "shape None is not a list of integers"),
    about_a("shape number", entry(shape=1), "shape 1 is not a list"),
    about_a("shape object", entry(shape={}), "shape an object of 0 keys is not a list"),
    about_a("shape nested", entry(shape=[[1]]), "shape a nested value of 1 items"),
    about_a("negative dim", entry(shape=[-1]), "shape [-1] is not a list"),
    about_a(
        "minus zero dim", '{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}', "[-0.0]", data=0
    ),
    about_a("whole float dim", entry(shape=[1.0]), "shape [1.0] is not a list"),
    about_a("bool dim", entry(shape=[True]), "shape [True] is not a list"),
    about_a("string dim", entry(shape=["1"]), "shape ['1'] is not a list"),
    about_a("dim 2**63", entry(shape=[0, 2**63], offsets=[0, 0]), f"{2**63}] is not", data=0),
    about_a("product overflow", entry(shape=[2**32, 2**31]), "more than 2**63-1 elements"),
    about_a("overflow before 0", entry(shape=[2**62, 2, 0], offsets=[0, 0]), "more than", data=0),
    about_a("wrapping product", entry(shape=[2**32, 2**32, 1]), "more than 2**63-1 elements"),
    about_a("wrapping bits", entry(shape=[2**61 + 1]), f"takes {2**63 + 4} bytes"),
    about_a("no offset", entry(offsets=[]), "data_offsets [] are not two integers"),
    about_a("one offset", entry(offsets=[4]), "data_offsets [4] are not two integers"),
    about_a("three offsets", entry(offsets=[0, 4, 4]), "are not two integers"),
    about_a("offsets null", entry(offsets=None), "data_offsets None are not"),
    about_a("offsets object", entry(offsets={"0": 0, "1": 4}), "are not two integers"),
    about_a("negative offset", entry(offsets=[-4, 0]), "data_offsets [-4, 0] are not"),
    about_a("float offset", entry(offsets=[0, 4.0]), "data_offsets [0, 4.0] are not"),
    about_a("bool offset", entry("U8", [1], [False, True]), "[False, True] are not", data=1),
    about_a("offset 2**63", entry(offsets=[2**63, 2**63 + 4]), "are not two integers"),
    about_a("end before begin", entry(offsets=[4, 0]), "[4, 0] end before they begin"),
    about_a("too few bytes", entry(shape=[2]), "F32 of shape [2] takes 8 bytes", "span 4"),
    about_a("too many bytes", entry(offsets=[0, 8]), "takes 4 bytes", "span 8", data=8),
    about_a("bytes of an empty shape", entry(shape=[0]), "takes 0 bytes", "span 4"),
    about_a("odd half bytes", entry("F4", [3], [0, 2]), "3 elements of F4 are 12 bits", data=2),
    about_a("odd six bits", entry("F6_E3M2", [3], [0, 3]), "18 bits, not whole bytes", data=3),
    about_a("truncated by one", entry(), "end at", "truncated", data=3, at=0),
    about_a("no data at all", entry(), "truncated", data=0, at=0),
    about_a("beyond the file", entry(offsets=[2**40, 2**40 + 4]), "truncated", at=2**40),
    about_a(
        "hole after the header", entry(offsets=[4, 8]), "a hole after the header", data=8, at=4
    ),
    two("hole", entry(offsets=[5, 9]), "leaves a hole after tensor 'a'", data=9, at=5),
    two("overlap by one", entry(offsets=[3, 7]), "overlaps tensor 'a'", data=7, at=3),
    two("inside another", entry("U8", [2], [1, 3]), "overlaps tensor 'a'", data=4, at=1),
    two("empty inside another", entry("U8", [0], [2, 2]), "overlaps tensor 'a'", data=4, at=2),
    two("empty past the end", entry("U8", [0], [6, 6]), "leaves a hole", data=8, at=6),
    blob("trailing bytes", pack({"a": entry()}, bytes(5)), "1 bytes after the last", offset=66),
    blob("data without tensors", pack("{}", bytes(3)), "3 bytes after the last tensor", offset=10),
]

CASES = [*BLOBS, *INDEXES, *PLACES]
