"""Sizes as text: what people write becomes the bytes that they mean, or an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sizes import format_bytes, parse_bytes, parse_cap, parse_rate

UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("1.5 GB", 1_500_000_000),
        ("4096", 4096),
        ("4096 b", 4096),
        ("  2 mib ", 2 << 20),
        ("0.5KiB", 512),
        ("1.0009765625KiB", 1025),
        ("1.9", 1),
        (7, 7),
    ],
)
def test_size_is_read(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "\t"]))
def test_whole_numbers_are_exact_in_every_unit(count: int, unit: str, space: str) -> None:
    for written in (unit, unit.lower(), unit.upper()):
        assert parse_bytes(f"{count}{space}{written}") == count * UNITS[unit]


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GiB", "8 G", "8GiBs", "8 GiB 2", "8 gigabytes", "8GiB\x00", "٤GiB", "0x10"),
        *("-1", "-1GiB", "+1", "1,5GiB", "1e9", ".5GiB", "1.GiB", "1.5.5 GB", "1_000", "nan"),
    ],
)
def test_text_that_is_no_size_is_refused_with_itself_and_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is no size") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "8GiB" in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, "0", "0GiB", "0.5", "0.0004 KiB"])
def test_size_that_is_not_positive_is_refused(size: int | str) -> None:
    with pytest.raises(ValueError, match="positive"):
        parse_bytes(size)


@pytest.mark.parametrize("size", [True, 8.0, None, b"8GiB"])
def test_other_types_are_refused(size: object) -> None:
    with pytest.raises(TypeError, match=type(size).__name__):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (1 << 20, "1.00 MiB"),
        (3 << 29, "1.50 GiB"),
        (1 << 40, "1.00 TiB"),
        (1 << 52, "4096.00 TiB"),
    ],
)
def test_size_is_written(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(1024, 10**16))
def test_what_is_written_can_be_read_and_is_near(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.006)


@pytest.mark.parametrize(
    ("cap", "nbytes"),
    [("60%", 600), (" 12.5 % ", 125), ("100%", 1000), ("0.01%", 1), ("2KiB", 2048), (7, 7)],
)
def test_caps_may_be_parts_of_the_memory(cap: int | str, nbytes: int) -> None:
    assert parse_cap(cap, 1000) == nbytes


@pytest.mark.parametrize("cap", ["0%", "0.0%", "100.1%", "-5%", "%", "5%%", "5 percent", True])
def test_what_is_no_part_is_refused(cap: int | str) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_cap(cap, 1000)


@pytest.mark.parametrize(
    ("text", "unit", "wanted"),
    [
        ("25GB/s", "B/s", 25e9),
        (" 1.5 GiB/s ", "B/s", 1.5 * 2**30),
        ("400TFLOPS", "FLOPS", 400e12),
        ("1 pflops/s", "FLOPS", 1e15),
        ("25g", "B/s", 25e9),
        ("4096", "B/s", 4096),
        (3e9, "B/s", 3e9),
    ],
)
def test_rates(text: float | str, unit: str, wanted: float) -> None:
    assert parse_rate(text, unit) == wanted


@pytest.mark.parametrize("unit", ["B/s", "FLOPS"])
@pytest.mark.parametrize(
    "text",
    ["", "fast", "0", "-1GB/s", "1e9", "GB/s", "25GB", "25XB/s", float("nan"), float("inf"), 0],
)
def test_what_is_no_rate(text: float | str, unit: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        parse_rate(text, unit)
    with pytest.raises(ValueError, match="rate"):
        parse_rate("25GB/s" if unit == "FLOPS" else "25TFLOPS", unit)
    with pytest.raises(TypeError, match="a number or a str"):
        parse_rate(True, unit)
