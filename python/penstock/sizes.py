"""Byte counts as people write and read them."""

from __future__ import annotations

import math
import re
from numbers import Integral

__all__ = ["format_bytes", "parse_bytes", "parse_cap", "parse_rate"]

_UNITS = {
    "B": 1,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*", re.ASCII)
_RATE = re.compile(
    r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]i?|P)?)(B/s|FLOPS?(?:/s)?)?\s*", re.ASCII | re.IGNORECASE
)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(size: int | str) -> int:
    """Turn a size into bytes.

    Parameters
    ----------
    size
        Bytes, or a text such as `"8GiB"`, `"1.5 GB"` or `"4096"`. KiB, MiB, GiB and TiB are powers
        of 1024; KB, MB, GB and TB are powers of 1000.

    Returns
    -------
    int
        Bytes, rounded down.

    Raises
    ------
    ValueError
        If the text is no size, or the size is not positive or beyond what 64 bits hold.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = _UNITS.get(match[2].upper() or "B") if match else None
        if match is None or unit is None:
            raise ValueError(f'{size!r} is no size: write bytes, or a text such as "8GiB"')
        size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    elif isinstance(size, bool) or not isinstance(size, Integral):
        raise TypeError(f"a size is an int or a str, not {type(size).__name__}")
    size = int(size)
    if not 0 < size < 1 << 63:
        raise ValueError(f"a size is positive and below 8 EiB, not {size}")
    return size


def parse_cap(cap: int | str, total: int) -> int:
    """Turn a cap into bytes.

    Parameters
    ----------
    cap
        As `parse_bytes` has it, or a part of the memory, such as `"60%"`.
    total
        Bytes of the memory.

    Returns
    -------
    int
        Bytes, rounded down.

    Raises
    ------
    ValueError
        As `parse_bytes`; and if the part is nothing, or more than all.
    """
    share = _SHARE.fullmatch(cap) if isinstance(cap, str) else None
    if share is None:
        return parse_bytes(cap)
    if not 0 < float(share[1]) <= 100:
        raise ValueError(f"a cap is more than 0% of the memory and at most 100%, not {cap!r}")
    return parse_bytes(max(1, int(total * float(share[1]) / 100)))


def parse_rate(rate: float | str, unit: str) -> float:
    """Turn a rate into a number per second.

    Parameters
    ----------
    rate
        A number, or a text such as `"25GB/s"` or `"400 TFLOPS"`. K, M, G, T and P are powers of
        1000; Ki, Mi, Gi and Ti powers of 1024.
    unit
        `"B/s"` or `"FLOPS"`; the text may leave it out.

    Raises
    ------
    ValueError
        If the text is no rate, or the rate is not positive and finite.
    """
    example = "25GB/s" if unit == "B/s" else "400TFLOPS"
    value = rate
    if isinstance(rate, str):
        match = _RATE.fullmatch(rate)
        if match is None or (match[3] or unit).upper() not in (unit.upper(), f"{unit.upper()}/S"):
            raise ValueError(f'{rate!r} is no rate: write a text such as "{example}"')
        prefix, binary = match[2].upper().removesuffix("I"), match[2].upper().endswith("I")
        value = float(match[1]) * (1024 if binary else 1000) ** " KMGTP".index(prefix or " ")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a rate is a number or a str, not {type(rate).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f'a rate is above 0, such as "{example}", and not {rate!r}')
    return float(value)


def format_bytes(nbytes: int) -> str:
    """Write bytes with the binary unit that fits, such as `1.50 GiB`."""
    value = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{nbytes} bytes" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
