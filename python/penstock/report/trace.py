"""Writing what was traced for people to look at.

The format is that of the Trace Event documents which chrome://tracing and Perfetto read:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from penstock import _core

__all__ = ["write_trace"]

Spans = Sequence[tuple[_core.Span, Callable[[int], str]]]
"""Spans, and what names the steps of their model."""

_ROWS = {
    _core.SpanKind.pass_: "passes",
    _core.SpanKind.step: "steps",
    _core.SpanKind.stall: "stalls",
    _core.SpanKind.load: "loads",
    _core.SpanKind.evict: "evictions",
}


def write_trace(path: Path, spans: Mapping[str, Spans]) -> None:
    """Write the spans of each model as a process of its own, with a row for each kind."""
    events: list[dict[str, object]] = []
    for process, (model, own) in enumerate(spans.items()):
        events.append(_named("process_name", model, process, 0))
        for row, kind in enumerate(_ROWS):
            events.append(_named("thread_name", _ROWS[kind], process, row))
        rows = list(_ROWS)
        for span, step_name in own:
            events.append(
                {
                    "name": _name(span, step_name),
                    "cat": _ROWS[span.kind],
                    "ts": span.start * 1e6,
                    "pid": process,
                    "tid": rows.index(span.kind),
                    **_duration(span),
                }
            )
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    try:
        path.write_text(text)
    except ValueError as error:
        raise ValueError(f"no file can have the name {str(path)!r}: {error}") from error


def _duration(span: _core.Span) -> dict[str, object]:
    if span.kind is _core.SpanKind.evict and span.seconds == 0:  # the load copied over the pages
        return {"ph": "i", "s": "t"}
    return {"ph": "X", "dur": span.seconds * 1e6}


def _named(what: str, name: str, process: int, row: int) -> dict[str, object]:
    return {"name": what, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}


def _name(span: _core.Span, step_name: Callable[[int], str]) -> str:
    if span.kind in (_core.SpanKind.step, _core.SpanKind.stall):
        return step_name(span.id)
    if span.kind is _core.SpanKind.pass_:
        return "pass"
    last = span.id + span.count - 1
    return f"page {span.id}" if span.count == 1 else f"pages {span.id}-{last}"
