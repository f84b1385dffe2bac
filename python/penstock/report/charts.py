"""Charts of seconds and resident bytes over caps: as lines of text, and as SVG or PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from penstock.optional_packages import require
from penstock.sizes import format_bytes

__all__ = ["ChartPoint", "bars", "write_chart"]

_WIDTH, _HEIGHT, _MARGIN = 720, 400, 70  # of the drawing, in its units
_BAR = 48  # characters


@dataclass(frozen=True)
class ChartPoint:
    """What is so under one cap.

    Parameters
    ----------
    cap, resident
        In bytes.
    seconds
        Of a pass; None where it is not known.
    """

    cap: int
    resident: int
    seconds: float | None


def bars(points: Sequence[ChartPoint], *, plain: bool = False) -> list[str]:
    """Draw a bar for each point, as long as the pass takes.

    Parameters
    ----------
    plain
        Whether to draw with ASCII alone.
    """
    longest = max((point.seconds or 0.0 for point in points), default=0.0)
    width = max((len(format_bytes(point.cap)) for point in points), default=0)
    lines = []
    for point in points:
        cap = format_bytes(point.cap).rjust(width)
        if point.seconds is None:
            lines.append(f"{cap}  ?")
            continue
        length = round(_BAR * point.seconds / longest) if longest else 0
        lines.append(f"{cap}  {('#' if plain else '█') * max(1, length)} {point.seconds:.3g} s")
    return lines


def write_chart(path: Path, points: Sequence[ChartPoint], title: str) -> None:
    """Write a chart, of the kind that the file's ending says: `.svg` or `.png`.

    Raises
    ------
    PenstockError
        If it is to be a PNG, and matplotlib is not installed.
    OSError
        If the file cannot be written.
    """
    if path.suffix.lower() == ".png":
        _write_png(path, points, title)
    else:
        path.write_text(_svg(points, title), encoding="utf-8")


def _svg(points: Sequence[ChartPoint], title: str) -> str:
    known = [point for point in points if point.seconds is not None]
    most = max((point.cap for point in points), default=1)
    longest = max((point.seconds or 0.0 for point in known), default=0.0) or 1.0
    right, bottom = _WIDTH - _MARGIN, _HEIGHT - _MARGIN

    def x(cap: int) -> float:
        return _MARGIN + (right - _MARGIN) * cap / most

    def y(share: float) -> float:
        return bottom - (bottom - _MARGIN) * share

    def text(at: float, down: float, words: str, more: str = "") -> str:
        return f'<text x="{at:.1f}" y="{down:.1f}" {more}>{escape(words)}</text>'

    middle = 'text-anchor="middle"'
    shapes = [
        f'<line x1="{_MARGIN}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="black"/>',
        f'<line x1="{_MARGIN}" y1="{_MARGIN}" x2="{_MARGIN}" y2="{bottom}" stroke="black"/>',
        text(_WIDTH / 2, 28, title, f'{middle} font-size="16"'),
        text(_WIDTH / 2, _HEIGHT - 14, "cap; bars: bytes that stay", middle),
        text(_MARGIN, _MARGIN - 12, f"seconds a pass, up to {longest:.3g}"),
    ]
    for row, point in enumerate(points):
        top = y(min(1.0, point.resident / most))
        shapes.append(
            f'<rect x="{x(point.cap) - 9:.1f}" y="{top:.1f}" width="18" '
            f'height="{bottom - top:.1f}" fill="#c8d8e8"/>'
        )
        label = f'{middle} font-size="10"'
        down = bottom + 16 + 12 * (row % 2)  # neighbours may be close
        shapes.append(text(x(point.cap), down, format_bytes(point.cap), label))
    line = [(x(point.cap), y((point.seconds or 0.0) / longest)) for point in known]
    path = " ".join(f"{at:.1f},{down:.1f}" for at, down in line)
    shapes.append(f'<polyline points="{path}" fill="none" stroke="#a03020" stroke-width="2"/>')
    shapes += [f'<circle cx="{at:.1f}" cy="{down:.1f}" r="3" fill="#a03020"/>' for at, down in line]
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    )
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, ground, *shapes, "</svg>", ""])


def _write_png(path: Path, points: Sequence[ChartPoint], title: str) -> None:
    matplotlib, figures = require(
        "a chart as PNG (SVG needs nothing)", "plot", "matplotlib", "matplotlib.figure"
    )
    with matplotlib.rc_context({"backend": "agg"}):
        figure = figures.Figure(figsize=(7.2, 4), layout="constrained")
        left = figure.subplots()
        gib = [point.cap / (1 << 30) for point in points]
        left.bar(
            gib,
            [point.resident / (1 << 30) for point in points],
            width=max(gib, default=1) / 40,
            color="#c8d8e8",
        )
        left.set(xlabel="cap, GiB", ylabel="stays, GiB", title=title)
        right = left.twinx()
        known = [point for point in points if point.seconds is not None]
        seconds = [point.seconds for point in known]
        right.plot([p.cap / (1 << 30) for p in known], seconds, marker="o", color="#a03020")
        right.set(ylabel="seconds a pass", ylim=(0, None))
        figure.savefig(path, format="png")
