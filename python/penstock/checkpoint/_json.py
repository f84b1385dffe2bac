"""JSON as the safetensors format allows it: strict where Python's own reader is lenient.

Python keeps the last of two equal keys, accepts NaN, reads `-0` as the integer 0, and lets half a
surrogate pair into a string. A safetensors reader does none of this.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from penstock.checkpoint._refusal import Refusal, shorten

__all__ = ["AMBIGUOUS", "JsonObject", "is_unicode", "parse_object"]

AMBIGUOUS = "readers disagree on which one counts: save the file again"
_LONGEST_INTEGER = 20
_DEEPEST = 100
_USUAL_DEPTH = 8
_NEITHER_BRACKET_NOR_QUOTE = bytes(set(range(256)) - set(b'[]{}"'))


class JsonObject(dict[str, object]):
    """One JSON object, which remembers whether the file gave a key more than once."""

    __slots__ = ("_twice",)

    def __init__(self, pairs: Sequence[tuple[str, object]] = ()) -> None:
        super().__init__(pairs)
        self._twice = None if len(self) == len(pairs) else _first_repeated(pairs)

    def __repr__(self) -> str:
        return f"an object of {len(self)} keys"

    def check_keys(self, what: str, *, names_tensors: bool = False) -> None:
        """Refuse equal keys, and keys that are not Unicode text.

        Parameters
        ----------
        what
            What a key is, for the message.
        names_tensors
            Whether each key is the name of a tensor, so that a refusal is about that tensor.
        """
        if self._twice is not None:
            raise Refusal(
                f"{what} {shorten(self._twice)} appears twice",
                AMBIGUOUS,
                tensor=self._twice if names_tensors else None,
            )
        for key in self:
            if not is_unicode(key):
                raise Refusal(
                    f"{what} {shorten(key)} is not Unicode text",
                    tensor=key if names_tensors else None,
                )


def _first_repeated(pairs: Sequence[tuple[str, object]]) -> str:
    counts = Counter(key for key, _ in pairs)
    return next(key for key, count in counts.items() if count > 1)


def is_unicode(text: str) -> bool:
    """Return whether a string is free of lone surrogates, which JSON escapes can smuggle in."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_object(raw: bytes, *, start: int = 0) -> JsonObject:
    """Parse bytes that must hold one JSON object.

    Parameters
    ----------
    raw
        The bytes.
    start
        Where in the file they begin, so that a refusal can name the byte at fault.

    Raises
    ------
    Refusal
        If they are not UTF-8, not JSON, or not an object.
    """
    text = _decode(raw, start)
    _check_depth(raw)
    try:
        tree = json.loads(
            text,
            object_pairs_hook=JsonObject,
            parse_int=_parse_integer,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        offset = start + len(text[: error.pos].encode())
        raise Refusal(f"bad JSON at byte {offset}: {error.msg}", offset=offset) from error
    if not isinstance(tree, JsonObject):
        raise Refusal(f"the JSON is not an object but {shorten(tree)}")
    return tree


def _decode(raw: bytes, start: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise Refusal(
            f"not UTF-8 at byte {offset}: 0x{raw[error.start]:02x}", offset=offset
        ) from error


def _check_depth(raw: bytes) -> None:
    """Refuse brackets that are nested so deeply that they could exhaust the parser's stack.

    The parser recurses in C, guarded by nothing but Python's recursion limit, which programs raise.
    """
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    # A pair of quotes with nothing between them changes nothing, whether it opens or closes.
    marks = unescaped.translate(None, _NEITHER_BRACKET_NOR_QUOTE).replace(b'""', b"")
    brackets = b"".join(marks.split(b'"')[::2])
    for _ in range(_USUAL_DEPTH):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    # What is left encloses the levels that were peeled off, or is not closed.
    if brackets.count(b"[") + brackets.count(b"{") > _DEEPEST:
        raise Refusal(f"bad JSON: nested too deeply, beyond {_DEEPEST} levels")


def _parse_integer(digits: str) -> int | float:
    # Bounded before int(), whose time grows with the square of the digits.
    if len(digits) > _LONGEST_INTEGER:
        raise Refusal(f"bad JSON: an integer of {len(digits)} digits; 2**63-1 is the largest legal")
    return -0.0 if digits == "-0" else int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise Refusal(f"bad JSON: the constant {name} is not JSON")
