"""Pages about synchronisation: the offsets along one video as a picture, and those of many clips.

A page needs nothing but itself: its pictures are inline SVG, and no script runs. Knows no networks and no media; it is handed what was found.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from model.segments import OFFSET_CLASSES, OFFSET_STEP_SECONDS, SYNC_CLASS, class_seconds
from pipeline.page import Figure, colours, data_uri, document, figures_html, png
from pipeline.timeline import CERTAIN, NEAR_CLASSES, Estimate, Timeline, words

LEFT, RIGHT, GAP = 62, 846, 18
"""Where the timeline lies, and what is between it and the distribution beside it."""
WIDTH, ROW = 1000, 17
TOP = 10
SOUND_HEIGHT, STRIP_HEIGHT = 64, 34
COLUMNS = 784
"""Columns of the picture, and points of a line: what is more is averaged."""
DOTS = 240
"""Most windows whose best offsets are dotted."""
LISTED = 400
"""Most windows, or clips, that a table lists."""
QUIETEST_DB = -60.0
TICK_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)
REPEATED = "The video is shorter than the 5 s that the network was trained on, and was repeated to fill them: this ranks sounds, it is no offset."
Place = Callable[[float], float]
"""Where something lies in the picture."""
NOT_COUNTED = (64, 66, 78)
"""Colour of windows whose answers do not count."""


def timeline_html(name: str, timeline: Timeline, estimate: Estimate) -> str:
    """The page about one video."""
    counted = len(timeline.counted)
    figures = [
        Figure("in sync" if estimate.in_sync else f"{estimate.seconds:+.2f} s", "offset of the sound; above 0 it comes too early"),
        Figure(f"{estimate.probabilities[estimate.best]:.2f}", f"probability of {class_seconds(estimate.best):+.1f} s, the most probable offset"),
        Figure(f"{estimate.agreement:.0%}" if counted > 1 else "one", f"of {counted} windows agree to within 0.2 s" if counted > 1 else "window"),
    ]
    if estimate.synchronisable is not None:
        figures.append(Figure(f"{estimate.synchronisable:.2f}", "probability that there is something to synchronise"))
    sections = [
        f"<header><h1>{escape(name)}</h1><p class=lead>{_lead(timeline, estimate)}</p>{figures_html(figures)}</header>",
        f"<section><h2>Along the video</h2>{_legend(timeline)}{timeline_svg(timeline, estimate)}</section>",
        f"<section><h2>Windows</h2>{_windows_html(timeline)}</section>",
    ]
    return document(f"Sync of {name}", sections, style=STYLE)


def _lead(timeline: Timeline, estimate: Estimate) -> str:
    text = f"The sound is {words(estimate.seconds)}. {clock(timeline.duration_seconds)} of video"
    text += (
        f", in windows of {timeline.window_seconds:g} s." if len(timeline.faults) > 1 else f", of which {timeline.window_seconds:g} s were compared."
    )
    if timeline.offset_seconds:
        text += f" The sound was taken {timeline.offset_seconds:+.2f} s later in the file before it was compared."
    if len(timeline.counted) > 1 and estimate.agreement < CERTAIN:
        text += " The windows do not agree on one offset."
    if timeline.repeated:
        text += f" {REPEATED}"
    return escape(text)


def _legend(timeline: Timeline) -> str:
    faults = sorted({fault for fault in timeline.faults if fault})
    parts = [
        '<span><svg viewBox="0 0 60 14"><defs><linearGradient id="scale">'
        + "".join(
            f'<stop offset="{level:.2f}" stop-color="rgb{tuple(colours(np.array([[level**0.5]]))[0, 0].tolist())}"/>'
            for level in np.linspace(0, 1, 7)
        )
        + '</linearGradient></defs><rect width="60" height="14" fill="url(#scale)"/></svg>'
        "probability of an offset, 0 to 1; a column is a window, at its middle</span>",
        '<span><svg viewBox="0 0 10 14"><circle class="dot" cx="5" cy="7" r="3"/></svg>most probable of a window</span>',
        '<span><svg viewBox="0 0 20 14"><path class="answer" d="M0 7H20"/></svg>the whole video\'s</span>',
    ]
    if faults:
        parts.append(
            f'<span><svg viewBox="0 0 14 14"><rect class="fault" width="14" height="14"/></svg>not counted: {escape(", ".join(faults))}</span>'
        )
    return f"<p class=legend>{''.join(parts)}</p>"


def timeline_svg(timeline: Timeline, estimate: Estimate) -> str:
    """Probabilities of the offsets over time, the whole video's beside them, the sound's loudness below."""
    first, last = float(timeline.starts_seconds[0]), float(timeline.starts_seconds[-1]) + timeline.window_seconds
    height = OFFSET_CLASSES * ROW

    def x(seconds: float) -> float:
        return LEFT + (seconds - first) / (last - first) * (RIGHT - LEFT)

    def y(offset_seconds: float) -> float:
        return TOP + height / 2 - offset_seconds / OFFSET_STEP_SECONDS * ROW

    edges = _edges(timeline)
    picture = data_uri("image/png", png(heat_picture(timeline)))
    parts = [f'<rect class="ground" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{height}"/>']
    parts.append(
        f'<image class="heat" x="{x(edges[0]):.1f}" y="{TOP}" width="{x(edges[-1]) - x(edges[0]):.1f}" height="{height}" preserveAspectRatio="none" '
        f'href="{picture}"/>'
    )
    parts.append(f'<path class="zero" d="M{LEFT} {y(0.0):.1f}H{RIGHT}"/>')
    parts.append(f'<path class="answer" d="M{LEFT} {y(estimate.seconds):.1f}H{RIGHT + GAP}"/>')
    if len(timeline.counted) <= DOTS:
        centres, best = (timeline.starts_seconds + timeline.window_seconds / 2).tolist(), timeline.best_seconds.tolist()
        parts += [f'<circle class="dot" cx="{x(centres[i]):.1f}" cy="{y(best[i]):.1f}" r="2.6"/>' for i in timeline.counted.tolist()]
    parts += [f'<text class="end" x="{LEFT - 8}" y="{y(float(offset)) + 5:.1f}">{_offset(offset)}</text>' for offset in range(-2, 3)]
    parts.append(f'<text class="side" transform="translate(13 {y(1.25):.1f}) rotate(-90)">sound ahead</text>')
    parts.append(f'<text class="side" transform="translate(13 {y(-1.25):.1f}) rotate(-90)">behind</text>')
    parts.append(_distribution(estimate, y))
    bottom = TOP + height
    if timeline.synchronisable is not None:
        parts.append(_strip(timeline.synchronisable, timeline, x, bottom + 10))
        bottom += STRIP_HEIGHT + 10
    parts.append(_sound(timeline, first, x, bottom + 10))
    bottom += SOUND_HEIGHT + 10
    for tick in time_ticks(first, last):
        parts.append(
            f'<path class="tick" d="M{x(tick):.1f} {bottom}v6"/><text class="middle" x="{x(tick):.1f}" y="{bottom + 22}">{clock(tick)}</text>'
        )
    title = f"<title>Offsets between {clock(first)} and {clock(last)}</title>"
    return f'<svg class="curves timeline" viewBox="0 0 {WIDTH} {bottom + 30}" role="img">{title}{"".join(parts)}</svg>'


def _edges(timeline: Timeline) -> Float[np.ndarray, "_"]:
    """Where the windows' columns begin and end: each is as wide as a step, around the window's middle; a single one is as wide as its window."""
    middles = timeline.starts_seconds + timeline.window_seconds / 2
    if len(middles) == 1:
        return np.array([timeline.starts_seconds[0], timeline.starts_seconds[0] + timeline.window_seconds])
    half = timeline.step_seconds / 2
    return np.concatenate([[middles[0] - half], (middles[1:] + middles[:-1]) / 2, [middles[-1] + half]])


def heat_picture(timeline: Timeline) -> UInt8[np.ndarray, "21 columns 3"]:
    """Columns of equal stretches of time, the sound furthest ahead at the top. Probabilities are drawn by their roots, so that small ones show."""
    edges = _edges(timeline)
    borders = np.linspace(edges[0], edges[-1], COLUMNS + 1)
    # A column is of the window that its middle lies in, and where windows are narrower than columns of all that begin in it.
    owners = np.clip(np.searchsorted(edges, (borders[1:] + borders[:-1]) / 2, side="right") - 1, 0, len(timeline.faults) - 1)
    until = np.append(owners[1:], len(timeline.faults))
    counts = np.array([not fault for fault in timeline.faults])
    picture = np.empty((OFFSET_CLASSES, COLUMNS, 3), np.uint8)
    for column in range(COLUMNS):
        good = [number for number in range(owners[column], max(owners[column] + 1, until[column])) if counts[number]]
        level = timeline.probabilities[good].mean(axis=0) if good else None
        picture[:, column] = NOT_COUNTED if level is None else colours(np.sqrt(level)[::-1, None])[:, 0]
    return picture


def _distribution(estimate: Estimate, y: Place) -> str:
    """The whole video's probabilities as bars beside the rows."""
    left, most = RIGHT + GAP, WIDTH - RIGHT - GAP - 44
    top = float(estimate.probabilities.max())
    parts = [f'<path class="tick" d="M{left} {TOP}v{OFFSET_CLASSES * ROW}"/>']
    for index, probability in enumerate(estimate.probabilities.tolist()):
        at, width = y(class_seconds(index)), probability / top * most
        chosen = " chosen" if index == estimate.best else ""
        parts.append(
            f'<rect class="bar{chosen}" x="{left}" y="{at - ROW / 2 + 2.5:.1f}" width="{max(width, 0.5):.1f}" height="{ROW - 5}">'
            f"<title>{class_seconds(index):+.1f} s: {probability:.4f}</title></rect>"
        )
    parts.append(f'<text x="{left + most + 6}" y="{y(class_seconds(estimate.best)) + 5:.1f}">{top:.2f}</text>')
    return "".join(parts)


def _strip(values: Float[np.ndarray, "windows"], timeline: Timeline, x: Place, top: int) -> str:
    """How probable it is that a window can be synchronised."""
    middles = (timeline.starts_seconds + timeline.window_seconds / 2).tolist()
    places = np.linspace(0, len(values) - 1, min(len(values), COLUMNS)).round().astype(int)
    points = " ".join(f"{x(middles[i]):.1f},{top + STRIP_HEIGHT * (1 - values[i]):.1f}" for i in places.tolist())
    if len(values) == 1:
        points = f"{LEFT},{top + STRIP_HEIGHT * (1 - values[0]):.1f} {RIGHT},{top + STRIP_HEIGHT * (1 - values[0]):.1f}"
    return (
        f'<path class="grid" d="M{LEFT} {top}H{RIGHT}M{LEFT} {top + STRIP_HEIGHT}H{RIGHT}"/><polyline class="can" points="{points}"/>'
        f'<text class="end" x="{LEFT - 8}" y="{top + 9}">1</text><text class="end" x="{LEFT - 8}" y="{top + STRIP_HEIGHT + 3}">0</text>'
        f'<text x="{RIGHT + GAP}" y="{top + STRIP_HEIGHT / 2 + 5}">synchronisable</text>'
    )


def _sound(timeline: Timeline, first: float, x: Place, top: int) -> str:
    """The loudness under the pictures, from -60 dB to full scale."""
    peaks = timeline.peaks
    columns = min(len(peaks), COLUMNS)
    borders = np.linspace(0, len(peaks), columns + 1).astype(int)
    loudest = np.maximum.reduceat(peaks, borders[:-1])
    level = np.clip(1 - 20 * np.log10(np.maximum(loudest, 1e-6)) / QUIETEST_DB, 0, 1)
    bottom = top + SOUND_HEIGHT
    points = "".join(
        f"L{x(first + (low + high) / 50):.1f} {bottom - SOUND_HEIGHT * v:.1f}"
        for low, high, v in zip(borders.tolist(), borders[1:].tolist(), level.tolist(), strict=False)
    )
    inside = f'<clipPath id="inside"><rect x="{LEFT}" y="{top}" width="{RIGHT - LEFT}" height="{SOUND_HEIGHT}"/></clipPath>'
    return (
        f'{inside}<path class="sound" clip-path="url(#inside)" d="M{LEFT} {bottom}{points}L{RIGHT} {bottom}Z"/>'
        f'<path class="grid" d="M{LEFT} {bottom}H{RIGHT}"/>'
        f'<text x="{RIGHT + GAP}" y="{top + SOUND_HEIGHT / 2 + 5}">loudness</text>'
    )


def _windows_html(timeline: Timeline) -> str:
    """A table of the windows."""
    shown = range(0, len(timeline.faults), -(-len(timeline.faults) // LISTED))
    can = timeline.synchronisable
    rows = "".join(
        f"<tr><td>{clock(timeline.starts_seconds[i])}</td><td>{timeline.best_seconds[i]:+.1f} s</td><td>{timeline.probabilities[i].max():.3f}</td>"
        f"{'' if can is None else f'<td>{can[i]:.3f}</td>'}<td>{timeline.faults[i]}</td></tr>"
        for i in shown
    )
    head = f"<tr><th>from<th>offset<th>probability{'' if can is None else '<th>synchronisable'}<th>not counted</tr>"
    every = f" (one of {shown.step})" if shown.step > 1 else ""
    return f"<details><summary>{len(timeline.faults)} windows{every}</summary>{_table(head, rows)}</details>"


# Many clips


def clips_html(rows: Sequence[dict[str, Any]], *, title: str) -> str:
    """The page about many clips, from their rows."""
    good = [row for row in rows if row["status"] == "ok"]
    reasons = Counter(row["reason"] for row in rows if row["status"] == "failed")
    best = np.array([int(np.argmax(row["probabilities"])) for row in good], int)
    near = int((np.abs(best - SYNC_CLASS) <= NEAR_CLASSES).sum())
    figures = [
        Figure(f"{near / len(good):.0%}" if good else "-", f"of {len(good):,} clips are within 0.2 s of in sync"),
        Figure(f"{int((best > SYNC_CLASS + NEAR_CLASSES).sum()):,}", "clips whose sound is ahead by more"),
        Figure(f"{int((best < SYNC_CLASS - NEAR_CLASSES).sum()):,}", "clips whose sound is behind by more"),
        Figure(f"{reasons.total():,}", "clips without an answer"),
    ]
    sections = [
        f"<header><h1>{escape(title)}</h1>{figures_html(figures)}</header>",
        f"<section><h2>Offsets</h2>{_histogram(np.bincount(best, minlength=OFFSET_CLASSES))}</section>" if good else "",
        f"<section><h2>Furthest apart</h2>{_furthest(good)}</section>" if good else "",
        f"<section><h2>Without an answer</h2>{_reasons(reasons)}</section>" if reasons else "",
    ]
    return document(title, sections, style=STYLE)


def _histogram(counts: np.ndarray) -> str:
    """How many clips have which most probable offset."""
    height, bottom, step = 220, 240, (WIDTH - 2 * LEFT) / OFFSET_CLASSES
    parts = [f'<path class="grid" d="M{LEFT} {bottom}H{WIDTH - LEFT}"/>']
    for index, count in enumerate(counts.tolist()):
        left, tall = LEFT + index * step, count / max(1, counts.max()) * (height - 24)
        chosen = " chosen" if abs(index - SYNC_CLASS) <= NEAR_CLASSES else ""
        parts.append(f'<rect class="bar{chosen}" x="{left + 3:.1f}" y="{bottom - tall:.1f}" width="{step - 6:.1f}" height="{tall:.1f}"/>')
        parts.append(f'<text class="middle" x="{left + step / 2:.1f}" y="{bottom - tall - 6:.1f}">{count or ""}</text>')
        if index % 5 == 0:
            parts.append(f'<text class="middle" x="{left + step / 2:.1f}" y="{bottom + 20}">{_offset(class_seconds(index))}</text>')
    parts.append(f'<text x="{LEFT}" y="{bottom + 42}">sound behind</text><text class="end" x="{WIDTH - LEFT}" y="{bottom + 42}">sound ahead</text>')
    return f'<svg class="curves" viewBox="0 0 {WIDTH} {bottom + 50}" role="img"><title>Clips by offset</title>{"".join(parts)}</svg>'


def _furthest(good: Sequence[dict[str, Any]]) -> str:
    order = sorted(good, key=lambda row: (-abs(row["best_offset_seconds"]), -row["probability"], row["key"]))[:20]
    rows = "".join(
        f"<tr><th scope=row>{escape(row['key'])}</th><td>{row['offset_seconds']:+.2f} s</td><td>{row['probability']:.2f}</td>"
        f"<td>{row['agreement']:.0%}</td></tr>"
        for row in order
    )
    head = "<tr><th>clip<th>offset<th>probability<th>windows that agree</tr>"
    return _table(head, rows)


def _reasons(reasons: Counter[str]) -> str:
    rows = "".join(f"<tr><th scope=row>{escape(reason)}</th><td>{count:,}</td></tr>" for reason, count in reasons.most_common())
    return _table("<tr><th>reason<th>clips</tr>", rows)


def _table(head: str, rows: str) -> str:
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


# Small things


def clock(seconds: float | int) -> str:
    """`12.4 s` below a minute, then `1:05`, `1:02:05`."""
    if seconds < 60:
        return f"{seconds:g} s" if seconds == round(seconds, 1) else f"{seconds:.2f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _offset(seconds: float | int) -> str:
    return f"{seconds:+g} s" if seconds else "0 s"


def time_ticks(first: float, last: float) -> list[float]:
    """Round instants, ten at most."""
    step = next((step for step in TICK_SECONDS if (last - first) / step <= 10), TICK_SECONDS[-1])
    return [number * step for number in range(int(-(-first // step)), int(last // step) + 1)]


STYLE = """
.timeline .ground{fill:var(--line);opacity:.6}
.timeline .heat{image-rendering:pixelated}
.zero{stroke:#fff;stroke-width:1;stroke-dasharray:2 5;opacity:.55}
.dot{fill:#fff;stroke:#0a0c1c;stroke-width:1}
.answer{stroke:var(--mark);stroke-width:2;fill:none}
.tick{stroke:var(--line);stroke-width:1}
.bar{fill:var(--valid);opacity:.55}
.bar.chosen{fill:var(--train);opacity:1}
.sound{fill:var(--valid);opacity:.45}
.can{fill:none;stroke:var(--train);stroke-width:2}
.side{text-anchor:middle}
.fault{fill:#40424e}
.legend svg:has(.dot){background:#2e145a}
.legend svg:has(rect){background:none}
""".strip()
