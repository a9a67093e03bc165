"""Pictures for a page about a dataset, as inline SVG: histograms, the sizes of shards, and of a clip its waveform, codes and similarity matrix.

A clip's strips have one time axis, so that one line can go through all of them while it plays. Knows numbers; no datasets and no page.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

import numpy as np
from jaxtyping import Float, Integer

from pipeline.page import colours, data_uri, png, ticks

WIDTH = 1000
BINS = 40
"""Most columns of a histogram."""
FEW = 24
"""Distinct whole numbers that get a column each."""
WAVE_COLUMNS = 500
WAVE_HEIGHT, CODES_HEIGHT, AXIS_HEIGHT = 140, 270, 34
MATRIX_HEIGHT = 560
LEAST_PEAK = 0.05
"""A waveform is drawn to the height of its peak, a quieter one as if it had this."""
SHARD_COLUMNS = 250
"""Most columns of the picture of the shards' sizes; what is more is averaged."""


# --- numbers --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bins:
    """A histogram."""

    edges: Float[np.ndarray, "edges"]
    """One more than counts, at round numbers."""
    counts: Integer[np.ndarray, "bins"]
    is_whole: bool = False
    """Whether each column is one whole number, in its middle."""


def bins(values: Float[np.ndarray, "values"]) -> Bins:
    """Columns of equal width between round numbers, so many that their shape shows; few whole numbers get one each. Without values there is one."""
    if not len(values):
        return Bins(np.array([0.0, 1.0]), np.zeros(1, np.int64))
    low, high = float(values.min()), float(values.max())
    is_whole = high - low < FEW and np.array_equal(values, np.round(values)) and (high > low or low <= 1)
    if is_whole:
        edges = np.arange(low, max(high, low + 5) + 2) - 0.5
    else:
        if high - low <= 1e-6 * max(abs(low), abs(high)):  # one value, in the middle
            low, high = low - 0.1 * max(abs(low), 1e-3), high + 0.1 * max(abs(high), 1e-3)
        wanted = max(12, min(BINS, ceil(3 * len(values) ** (1 / 3))))
        step = _round_up((high - low) / wanted)
        first = floor(low / step + 1e-9)
        last = max(floor(high / step - 1e-9) + 1, first + 1)
        edges = np.arange(first, last + 1) * step
    # A value on the last edge belongs to the last column; rounding must not lose one beyond it.
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return Bins(edges, counts, is_whole)


def _round_up(value: float) -> float:
    power = 10.0 ** floor(log10(value))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= value * 0.999)


def histogram_svg(values: Float[np.ndarray, "values"], *, title: str, unit: str = "") -> str:
    """How often which values occur, with a line at the median."""
    found = bins(values)
    left, right, top, bottom, height = 54, WIDTH - 16, 26, 236, 270
    low, high, most = float(found.edges[0]), float(found.edges[-1]), max(1, int(found.counts.max()))

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    grid = [tick for tick in ticks(0.0, float(most)) if 0 < tick == round(tick)]
    parts = [f'<path class="grid" d="M{left} {_y(tick, most, top, bottom):.1f}H{right}"/>' for tick in grid]
    parts += [f'<text class="end" x="{left - 8}" y="{_y(tick, most, top, bottom) + 6:.1f}">{short(tick)}</text>' for tick in grid]
    for count, start, stop in zip(found.counts.tolist(), found.edges.tolist(), found.edges[1:].tolist(), strict=False):
        if count:
            tall = max(2.0, count / most * (bottom - top))  # one clip among a million shows
            gap = min(2.0, 0.12 * (x(stop) - x(start)))
            where = f"{start + 0.5:g}" if found.is_whole else f"{start:.6g} to {stop:.6g}"
            parts.append(
                f'<rect class="bar" x="{x(start) + gap:.2f}" y="{bottom - tall:.2f}" width="{x(stop) - x(start) - 2 * gap:.2f}" height="{tall:.2f}">'
                f"<title>{where}{unit}: {count:,}</title></rect>"
            )
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    for tick in ticks(low, high):
        if not found.is_whole or tick == round(tick):
            parts.append(f'<text class="middle" x="{x(tick):.1f}" y="{bottom + 26}">{tick:.6g}</text>')
    if len(values) and values.min() < values.max():
        parts.append(_pointer(x(float(np.median(values))), top, bottom, "median"))
    return f'<svg class="curves histogram" viewBox="0 0 {WIDTH} {height}" role="img"><title>{text(title)}</title>{"".join(parts)}</svg>'


def _y(value: float, most: int, top: int, bottom: int) -> float:
    return bottom - value / most * (bottom - top)


def _pointer(x: float, top: int, bottom: int, name: str) -> str:
    side, anchor = (8, "start") if x < WIDTH * 0.85 else (-8, "end")
    return (
        f'<path class="pointer" d="M{x:.1f} {top - 14}V{bottom}"/>'
        f'<text class="pointed" style="text-anchor:{anchor}" x="{x + side:.1f}" y="{top - 2}">{name}</text>'
    )


def shards_svg(sizes: Sequence[tuple[str, int, int]], size_text: Callable[[int | float], str]) -> str:
    """The shards' sizes side by side: (name, bytes that are used, bytes of the file). What a view leaves unused is pale."""
    left, right, top, bottom = 76, WIDTH - 16, 14, 170
    most = max([whole for _, _, whole in sizes] + [used for _, used, _ in sizes] + [1])
    together = ceil(len(sizes) / SHARD_COLUMNS)
    columns = [sizes[place : place + together] for place in range(0, len(sizes), together)]
    step = min(60.0, (right - left) / max(1, len(columns)))
    parts = []
    for share in (0.5, 1.0):
        y = bottom - share * (bottom - top)
        parts.append(
            f'<path class="grid" d="M{left} {y:.1f}H{right}"/><text class="end" x="{left - 8}" y="{y + 6:.1f}">{size_text(share * most)}</text>'
        )
    for number, column in enumerate(columns):
        used, whole = sum(entry[1] for entry in column) / len(column), sum(entry[2] for entry in column) / len(column)
        names = column[0][0] if len(column) == 1 else f"{column[0][0]} to {column[-1][0]}, on average"
        x, gap = left + number * step, min(3.0, 0.15 * step)
        tall, inner = (amount / most * (bottom - top) for amount in (max(whole, used), used))
        pale = (
            f'<rect class="pale" x="{x + gap:.2f}" y="{bottom - tall:.2f}" width="{step - 2 * gap:.2f}" height="{tall:.2f}"/>' if whole > used else ""
        )
        parts.append(
            f"<g><title>{text(names)}: {size_text(used)}{f' of {size_text(whole)}' if whole > used else ''}</title>{pale}"
            f'<rect class="bar" x="{x + gap:.2f}" y="{bottom - inner:.2f}" width="{step - 2 * gap:.2f}" height="{max(inner, 1):.2f}"/></g>'
        )
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    return f'<svg class="curves shards" viewBox="0 0 {WIDTH} {bottom + 12}" role="img"><title>Sizes of the shards</title>{"".join(parts)}</svg>'


# --- a clip ---------------------------------------------------------------------------------------------------------------------------


def waveform_svg(wave: Float[np.ndarray, "samples"], sample_rate_hz: int, *, title: str) -> str:
    """A sound's least and greatest sample along time, to the height of its peak, which the picture names."""
    seconds, columns = len(wave) / sample_rate_hz, min(WAVE_COLUMNS, len(wave))
    starts = np.linspace(0, len(wave), columns, endpoint=False).astype(int)
    high, low = np.maximum.reduceat(wave, starts), np.minimum.reduceat(wave, starts)
    peak = float(np.abs(wave).max())
    scale, middle = (WAVE_HEIGHT / 2 - 2) / max(peak, LEAST_PEAK), WAVE_HEIGHT / 2
    places = (starts / len(wave) * WIDTH).tolist()
    upper = "".join(f"L{x:.0f} {middle - scale * v:.1f}" for x, v in zip(places, high.tolist(), strict=True))
    lower = "".join(f"L{x:.0f} {middle - scale * v:.1f}" for x, v in zip(reversed(places), reversed(low.tolist()), strict=True))
    level = f"peak {20 * log10(peak):.1f} dB" if peak > 0 else "silence"
    inside = (
        f'<path class="grid" d="M0 {middle}H{WIDTH}"/><path class="wave" d="M0 {middle}{upper}L{WIDTH} {middle}{lower}Z"/>'
        f'<text class="end note" x="{WIDTH - 8}" y="22">{level}</text>'
    )
    return _strip(inside, WAVE_HEIGHT, seconds, title=title, kind="waveform", axis=False)


def codes_svg(codes: Integer[np.ndarray, "codebooks steps"], covered_seconds: float, seconds: float, card: int, *, title: str) -> str:
    """A codec's codes: codebooks from the top, time across, the code's number as colour. Neighbouring numbers mean nothing to each other."""
    picture = data_uri("image/png", png(colours(codes.astype(np.float64) / max(1, card - 1))))
    inside = f'<image width="{covered_seconds / seconds * WIDTH:.1f}" height="{CODES_HEIGHT}" preserveAspectRatio="none" href="{picture}"/>'
    return _strip(inside, CODES_HEIGHT, seconds, title=title, kind="codes", axis=True)


def _strip(inside: str, height: int, seconds: float, *, title: str, kind: str, axis: bool) -> str:
    numbers = "".join(f'<text x="{t / seconds * WIDTH:.1f}" y="{height + 26}">{t:g} s</text>' for t in second_ticks(seconds)) if axis else ""
    return (
        f'<svg class="strip {kind}" viewBox="0 0 {WIDTH} {height + (AXIS_HEIGHT if axis else 0)}" role="img" data-seconds="{seconds:.4f}">'
        f'<title>{text(title)}</title>{inside}{numbers}<path class="head" d="M0 0V{height}"/></svg>'
    )


@dataclass(frozen=True)
class Similarity:
    """How alike pictures and sound of a clip's segments are: cosines, segments of pictures down and of sound across, each kind at its own hop."""

    cosines: Float[np.ndarray, "visual audio"]
    visual_hop_seconds: float
    audio_hop_seconds: float
    segment_seconds: float

    def at_offset(self) -> Float[np.ndarray, "visual"]:
        """For each segment of pictures the cosine with the sound of the same time."""
        rows = np.arange(self.cosines.shape[0])
        columns = np.round(rows * self.visual_hop_seconds / self.audio_hop_seconds).astype(int)
        there = columns < self.cosines.shape[1]
        return self.cosines[rows[there], columns[there]]


def similarity_svg(found: Similarity, seconds: float, *, title: str) -> str:
    """The matrix with time down (pictures) and across (sound), its colours spread over what occurs; the dashed line is the same time in both."""
    left, width, height = 58, WIDTH - 58, MATRIX_HEIGHT
    low, high = np.quantile(found.cosines, (0.02, 0.98)).tolist()
    picture = data_uri("image/png", png(colours((found.cosines - low) / max(high - low, 1e-6))))

    def placed(count: int, hop: float, length: int) -> tuple[float, float]:
        """Where a picture of so many segments begins, and how long it is: each is drawn around its middle, as wide as the hop."""
        return (found.segment_seconds - hop) / 2 / seconds * length, count * hop / seconds * length

    (top, tall), (first, wide) = (
        placed(count, hop, length)
        for count, hop, length in zip(found.cosines.shape, (found.visual_hop_seconds, found.audio_hop_seconds), (height, width), strict=True)
    )
    marks = second_ticks(seconds)
    down = "".join(f'<text class="end" x="{left - 10}" y="{t / seconds * height + 7:.1f}">{t:g}</text>' for t in marks[:: 1 + (len(marks) > 6)] if t)
    across = "".join(f'<text class="middle" x="{left + t / seconds * width:.1f}" y="{height + 28}">{t:g} s</text>' for t in marks)
    return (
        f'<svg class="strip matrix" viewBox="0 0 {WIDTH} {height + AXIS_HEIGHT}" role="img" data-seconds="{seconds:.4f}" data-left="{left}" '
        f'data-height="{height}"><title>{text(title)}</title><rect class="ground" x="{left}" width="{width}" height="{height}"/>'
        f'<image x="{left + first:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{tall:.1f}" preserveAspectRatio="none" href="{picture}"/>'
        f'<path class="under" d="M{left} 0L{WIDTH} {height}"/><path class="diagonal" d="M{left} 0L{WIDTH} {height}"/>{down}{across}'
        f'<path class="head" d="M{left} 0V{height}"/><path class="head down" d="M{left} 0H{WIDTH}"/></svg>'
    )


def second_ticks(seconds: float) -> list[float]:
    """Round instants before the end, ten at most; not so near to it that their names would not fit."""
    step = next((step for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0) if seconds / step <= 10), 600.0)
    return [number * step for number in range(ceil(seconds / step)) if number * step < 0.96 * seconds]


# --- words ----------------------------------------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """`12`, `3.4k`, `1.2M`."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def number_text(value: float, spread: float) -> str:
    """A value with as many digits as matter where values differ by `spread`."""
    rounded = round(value, max(0, 2 - floor(log10(spread)))) if spread > 0 else value
    return f"{rounded + 0.0:.6g}"  # no minus before a zero


def text(words: str) -> str:
    """Escaped, and without controls: html has no place for some, and others turn the direction of what follows."""
    return escape(re.sub("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", words))


STYLE = """
.bar{fill:var(--valid);opacity:.75}
.pale{fill:var(--line)}
.axis{stroke:var(--soft);stroke-width:1;fill:none;opacity:.6}
.curves.histogram text{font-size:21px}
.curves.shards text{font-size:14px}
.pointer{stroke:var(--train);stroke-width:2;stroke-dasharray:5 4;fill:none}
.curves text.pointed{fill:var(--train)}
.strip{width:100%;overflow:hidden;cursor:pointer}
.strip text{fill:var(--soft);font-size:20px}
.strip image{image-rendering:pixelated}
.waveform{background:var(--ground);border-radius:6px}
.wave{fill:var(--valid)}
.waveform .head{stroke:var(--train)}
.strip.matrix text{font-size:24px}
.ground{fill:var(--line)}
.under{stroke:#0a0c1c;stroke-width:4;opacity:.35;fill:none}
.diagonal{stroke:#fff;stroke-width:2.5;stroke-dasharray:12 10;fill:none}
.head{fill:none;visibility:hidden}
.playing .head{visibility:visible}
""".strip()
