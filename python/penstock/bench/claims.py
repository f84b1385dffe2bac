"""What Penstock promises, judged by the rows of one run.

A promise whose case did not run is not kept and not broken: it says why it was not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from penstock.bench.cases import PEERS
from penstock.bench.runner import Row
from penstock.bench.table import align, reason_of
from penstock.sizes import format_bytes

__all__ = ["Claim", "claim_lines", "judge"]

MIB = 1 << 20


@dataclass(frozen=True)
class Claim:
    """One promise, and what came of it.

    Parameters
    ----------
    case, text
        The case that it is about, and what is promised.
    reached, bound
        As text, with units.
    holds
        None where it was not judged; `reached` is the reason then.
    """

    case: str
    text: str
    reached: str
    bound: str
    holds: bool | None


class _NotRunError(Exception):
    """A row is missing."""


class _Rows:
    """Rows by case; asking for one that did not run raises."""

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self._rows = rows

    def __getitem__(self, case: str) -> Row:
        row = self._rows.get(case)
        if row is None:
            raise _NotRunError(f"case {case} was not selected")
        reason = reason_of(row)
        if reason:
            raise _NotRunError(reason if case.startswith("penstock") else f"{case}: {reason}")
        return row

    def peers(self) -> list[Row]:
        """Return the rows of the peers that ran.

        Raises
        ------
        _NotRunError
            If there is none.
        """
        rows = [self._rows[name] for name in PEERS if name in self._rows]
        rows = [row for row in rows if not reason_of(row)]
        if not rows:
            raise _NotRunError("no other library ran")
        return rows


_Verdict = tuple[str, str, bool]  # reached, bound, holds
_Promise = tuple[str, str, Callable[[_Rows], _Verdict]]  # case, text, judge


def judge(rows: Mapping[str, Row], no_speed: str = "") -> list[Claim]:
    """Judge every promise.

    Parameters
    ----------
    no_speed
        Why this run says nothing about speed and memory; promises of those are not judged then.
    """
    found = _Rows(rows)
    claims = []
    for case, text, verdict in _PROMISES:
        try:
            if no_speed:
                raise _NotRunError(no_speed)
            claims.append(Claim(case, text, *verdict(found)))
        except _NotRunError as error:
            claims.append(Claim(case, text, str(error), "", None))
    for case, row in rows.items():
        if not case.startswith("penstock"):
            continue
        text = "bit-identical to the resident model"
        reason = reason_of(row) or row.get("no_reference", "")
        if reason:
            claims.append(Claim(case, text, reason, "", None))
        else:
            reached = f"relative error {row['relative_error']:.1e}"
            claims.append(Claim(case, text, reached, "0", bool(row["bit_identical"])))
    return claims


def claim_lines(claims: Sequence[Claim]) -> list[str]:
    """Write claims as aligned lines."""
    cells = [["case", "claim", "reached", "must reach", "holds"]]
    for claim in claims:
        if claim.holds is None:
            cells.append([claim.case, f"{claim.text}: not run: {claim.reached}"])
        else:
            holds = "yes" if claim.holds else "NO"
            cells.append([claim.case, claim.text, claim.reached, claim.bound, holds])
    return align(cells)


def _link(row: Row) -> float:
    if not row.get("link"):
        raise _NotRunError("the link could not be measured")
    return float(row["link"])


def _rate(row: Row) -> float:
    return float(row["moved_bytes"]) / float(row["seconds"])


def _streams(row: Row) -> Row:
    """Return a row of a case that had to stream."""
    if row["options"]["cap"] >= row["weight_bytes"]:
        raise _NotRunError("the weights fit under the cap; make the model larger")
    return row


def _share_of_link(case: str, least: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        row = _streams(rows[case])
        share = _rate(row) / _link(row)
        # More than the link can carry means that bytes are counted that never moved.
        return f"{share:.4f}", f">= {least}", least <= share <= 1.02

    return case, "bytes moved per second, of the link", verdict


def _little_more_than_has_no_room(case: str, most: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        row = _streams(rows[case])
        lacking = row["weight_bytes"] - row["options"]["cap"]
        factor = row["moved_bytes"] / lacking
        # Less than has no room cannot have been moved.
        return f"{factor:.3f} x {format_bytes(lacking)}", f"1 to {most}", 0.99 <= factor <= most

    return case, "bytes moved, of those that have no room under the cap", verdict


def _in_ring(case: str, most: int) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        peak = rows[case]["own_figures"]["peak"]
        return format_bytes(peak), f"<= {format_bytes(most)}", peak <= most

    return case, "held on the device, by the ledger", verdict


def _faster_in_no_more_memory(case: str) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        own = rows[case]
        best = min(rows.peers(), key=lambda row: row["seconds"])
        vram = best["vram_bytes"]
        bound = f"< {best['seconds']:.5f} s in {format_bytes(vram)} ({best['case']})"
        reached = f"{own['seconds']:.5f} s in {format_bytes(own['vram_bytes'])}"
        holds = own["seconds"] < best["seconds"] and own["vram_bytes"] <= vram
        return reached, bound, holds

    return case, "seconds per pass, below every other library's, in no more memory", verdict


def _faster_than_the_limit(case: str) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        own, limit = rows[case], rows["triple-buffer"]
        bound = f"< {limit['seconds']:.5f} s"
        return f"{own['seconds']:.5f} s", bound, own["seconds"] < limit["seconds"]

    return case, "seconds per pass, below the hand-written triple buffer's", verdict


def _faster_per_byte(case: str) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        own = _rate(rows[case])
        best = max(rows.peers(), key=_rate)
        bound = f"> {_rate(best) / 1e9:.2f} GB/s ({best['case']})"
        return f"{own / 1e9:.2f} GB/s", bound, own > _rate(best)

    return case, "bytes moved per second, above every other library's", verdict


def _near_bound(case: str, most: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        row = _streams(rows[case])
        bound = row["moved_bytes"] / _link(row)
        if not bound:
            return "nothing counted as moved", f"<= {most}", False
        factor = row["seconds"] / bound
        return f"{factor:.3f} x {bound:.5f} s", f"<= {most}", factor <= most

    return case, "seconds, of streamed bytes / link", verdict


def _cap_in_use(case: str, least: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        row = _streams(rows[case])
        cap = row["options"]["cap"]
        # Activations are torch's own, and beside the cap until the ledger counts them too.
        held = row["vram_bytes"] - row["vram_torch_bytes"]
        bound = f"{least} to 1 of {format_bytes(cap)}"
        within = max(held, row["own_figures"]["peak"]) <= cap
        return f"{held / cap:.4f}", bound, within and held >= least * cap

    return case, "VRAM by the driver without torch's own, of the cap", verdict


def _as_resident(case: str, most: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        row = rows[case]
        wanted = row["resident_seconds_in_turn"]
        factor = row["seconds_in_turn"] / wanted
        return f"{factor:.4f} x {wanted:.5f} s", f"<= {most}", factor <= most

    return case, "seconds, of plain PyTorch's in the same process, in turn", verdict


def _overlaps(case: str, most: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        row, resident = rows[case], rows["resident-long"]
        copies = row["moved_bytes"] / _link(row)
        bound = max(resident["seconds"], copies)
        factor = row["seconds"] / bound
        text = f"{factor:.3f} x max({resident['seconds']:.5f}, {copies:.5f}) s"
        return text, f"<= {most}", factor <= most

    return case, "seconds, of max(compute alone, copies alone)", verdict


def _as_fast_as(case: str, eager: str, most: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        factor = rows[case]["seconds"] / rows[eager]["seconds"]
        return f"{factor:.4f}", f"<= {most}", factor <= most

    return case, f"seconds, of {eager}", verdict


def _launches(case: str, figure: str, when: str, most: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        taken = rows[case][figure]
        return f"{1e6 * taken:.0f} us", f"< {1e6 * most:.0f} us", taken < most

    return case, f"host time per replay, {when}", verdict


def _own_host(case: str, most: int) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        own = rows[case]["host_own_peak_bytes"]
        return format_bytes(own), f"<= {format_bytes(most)}", own <= most

    return case, "host memory of its own beyond the page cache, peak", verdict


def _of_raw_reads(case: str, least: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        row = rows[case]
        raw = row["raw_reads"]
        if not raw:
            raise _NotRunError("raw reads could not be measured")
        if (row["cached_share"] or 0.0) > 0.02:
            raise _NotRunError(f"{row['cached_share']:.0%} stayed in the page cache")
        after = row["raw_reads_after"]
        best = {way: max(rate, after.get(way, 0.0)) for way, rate in raw.items()}
        way = max(best, key=best.__getitem__)
        raw = best
        share = row["read_bytes"] / row["seconds"] / raw[way]
        return f"{share:.3f}", f">= {least} of {raw[way] / 1e9:.2f} GB/s ({way})", share >= least

    return case, "bytes read per second, of the best raw read", verdict


def _pinned(case: str, most: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        row = _streams(rows[case])
        if row["pinned_bytes"] is None:
            raise _NotRunError("pinned host memory is not reported")
        if not row["moved_bytes"]:
            return "nothing counted as moved", f"<= {most}", False
        # What is resident under this cap streams under a lower one: it has its place there too.
        factor = row["pinned_bytes"] / row["weight_bytes"]
        return f"{factor:.4f}", f"<= {most}", factor <= most

    return case, "pinned host memory, of the bytes that can stream", verdict


def _loads(case: str, least: float) -> _Promise:
    def verdict(rows: _Rows) -> _Verdict:
        rate = rows[case]["weight_bytes"] / rows[case]["load_seconds"]
        return f"{rate / 1e9:.1f} GB/s", f">= {least / 1e9:.0f} GB/s", rate >= least

    return case, "checkpoint to ready, warm page cache", verdict


_PROMISES: Sequence[_Promise] = (
    _share_of_link("penstock-frames-ring", 0.985),
    _in_ring("penstock-frames-ring", 400 * MIB),
    _faster_in_no_more_memory("penstock-frames-peer"),
    _faster_than_the_limit("penstock-frames-ring"),
    _faster_per_byte("penstock-frames-ring"),
    _share_of_link("penstock-managed-ring", 0.85),
    _share_of_link("penstock-managed-cap", 0.85),
    _little_more_than_has_no_room("penstock-managed-cap", 1.09),
    _near_bound("penstock-frames-cap", 1.03),
    _cap_in_use("penstock-frames-cap", 0.95),
    _as_resident("penstock-frames-above", 1.01),
    _overlaps("penstock-frames-long", 1.08),
    _as_fast_as("penstock-frames-graph", "penstock-frames-ring", 1.01),
    _launches("penstock-frames-graph", "launch_seconds", "on an idle device", 300e-6),
    _launches("penstock-frames-graph", "launch_seconds_in_a_row", "several in a row", 300e-6),
    _share_of_link("penstock-frames-mapped", 0.95),
    _own_host("penstock-frames-mapped", 64 * MIB),
    _of_raw_reads("penstock-frames-stream", 0.9),
    _pinned("penstock-frames-ring", 1.02),
    _pinned("penstock-frames-cap", 1.02),
    _loads("penstock-frames-ring", 15e9),
)
