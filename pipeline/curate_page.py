"""A page about thresholds on a score: how much each keeps, how the score is distributed, what becomes of other scores, and the commands.

A page needs nothing but itself: its charts are inline SVG, and no script runs. Knows no datasets and no files; it is handed a `Curation`.
"""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from jaxtyping import Bool, Float64

from pipeline.page import Figure, document, figures_html, round_range, ticks
from pipeline.thresholds import CORRELATED_CLIPS, Curation, Kept, Sorted, hours_text, round_numbers, span

WIDTH, LEFT, RIGHT = 1000, 62, 978
TOP, CURVES, GAP, BARS = 30, 280, 34, 110
"""Heights from above: room for the marks' names, the curves, what is between, the histogram."""
SMALL_WIDTH, SMALL_HEIGHT = 480, 190
POINTS = 241
"""Thresholds at which a curve is drawn."""
BINS = 60
COLOURS = 6
"""Splits that have a colour of their own."""
Place = Callable[[float], float]


def curation_html(found: Curation) -> str:
    """The page."""
    sections = [
        f"<header><h1>{escape(found.name)}</h1><p class=lead>{_lead(found)}</p>{figures_html(_figures(found))}</header>",
        f"<section><h2>What a threshold keeps</h2>{_legend(found)}{kept_svg(found)}{_beyond(found)}</section>",
        f"<section><h2>Thresholds</h2>{_table(found)}{_notes(found)}</section>",
        f"<section><h2>Other scores among what is kept</h2>{_others(found)}</section>" if found.others else "",
        f"<section><h2>How scores go together</h2>{_matrix(found)}</section>" if len(found.names) > 1 else "",
        f"<section><h2>Take one</h2><pre>{escape(chr(10).join(found.commands))}</pre></section>",
    ]
    return document(f"{found.name} of {found.data}", sections, style=STYLE)


def _lead(found: Curation) -> str:
    side = "at least" if found.keep == "above" else "at most"
    return (
        f"What would be left of <bdi>{escape(found.data)}</bdi> of the clips whose <bdi>{escape(found.name)}</bdi> is {side} a threshold. "
        "A clip without the score is never kept."
    )


def _figures(found: Curation) -> list[Figure]:
    everything = found.kept[0]
    figures = [
        Figure(f"{everything.total:,}", "good clips"),
        Figure(f"{hours_text(everything.seconds / 3600)} h", "of video"),
        Figure(_size(everything.bytes), "stored"),
        Figure(_share(found.scored / everything.total), "of the clips have the score"),
    ]
    marked = next((row for row in found.kept[1:] if found.marked and row.threshold == found.marked[0]), None)
    if marked is not None:
        side = "at least" if found.keep == "above" else "at most"
        figures.append(Figure(_share(marked.total / everything.total), f"have {side} {marked.threshold:g}"))
    return figures


# --- the two charts -------------------------------------------------------------------------------------------------------------------


def kept_svg(found: Curation) -> str:
    """The part of the clips that is kept over the threshold, and below it how many clips have which score."""
    low, high = span(found.score)
    bottom = TOP + CURVES
    floor = bottom + GAP + BARS

    def x(score: float) -> float:
        return LEFT + (min(max(score, low), high) - low) / (high - low) * (RIGHT - LEFT)

    def y(share: float) -> float:
        return bottom - share * CURVES

    parts = [_grid(y(share), f"{100 * share:.0f} %") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    cuts = [row.threshold for row in found.kept if row.threshold is not None and low <= row.threshold <= high]
    parts += [f'<path class="cut" d="M{x(cut):.1f} {TOP}V{floor}"/>' for cut in cuts]
    parts += _marked(found, x, low, high, floor)
    parts += _curves(found, x, y, low, high)
    parts += _bars(found, x, floor, low, high)
    parts += [f'<text class="middle" x="{x(tick):.1f}" y="{floor + 22}">{tick:g}</text>' for tick in round_numbers(low, high)]
    parts.append(f'<text class="end" x="{RIGHT}" y="{floor + 44}">{escape(found.name)}</text>')
    parts.append(f'<text x="{LEFT}" y="{bottom + GAP - 8}">clips by score</text><text x="{LEFT}" y="{TOP - 12}">clips kept</text>')
    title = f"<title>Clips kept by thresholds on {escape(found.name)}</title>"
    return f'<svg class="curves" viewBox="0 0 {WIDTH} {floor + 54}" role="img">{title}{"".join(parts)}</svg>'


def _grid(y: float, name: str) -> str:
    return f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/><text class="end" x="{LEFT - 8}" y="{y + 5:.1f}">{name}</text>'


def _marked(found: Curation, x: Place, low: float, high: float, floor: float | int) -> list[str]:
    if not found.marked or not low <= found.marked[0] <= high:
        return []
    value, whose = found.marked
    at = x(value)
    side, inner = ("end", -8) if at > WIDTH / 2 else ("", 8)
    name = f'<text class="{side} published" x="{at + inner:.1f}" y="{TOP - 12}">{value:g}: {escape(whose)}</text>'
    return [f'<path class="chosen" d="M{at:.1f} {TOP - 24}V{floor}"/>{name}']


def _curves(found: Curation, x: Place, y: Place, low: float, high: float) -> list[str]:
    order, at = Sorted.of(found.score, found.keep), np.linspace(low, high, POINTS)
    return [
        f'<polyline class="curve {kind}" points="{_points(at, order.share(clips, at), x, y)}"><title>{escape(name)}</title></polyline>'
        for kind, name, clips in reversed(_lines(found))
    ]


def _lines(found: Curation) -> list[tuple[str, str, Bool[np.ndarray, "clips"]]]:
    """(colour, name, clips) of all clips and of each split, if there are several."""
    clips, count = found.clips, len(found.clips.splits)
    everything = ("all", "all clips", np.ones(len(clips), bool))
    return [everything, *((f"s{n % COLOURS}", clips.splits[n], clips.split == n) for n in range(count))] if count > 1 else [everything]


def _legend(found: Curation) -> str:
    names = [f'<span><svg viewBox="0 0 20 14"><path class="curve {kind}" d="M0 7H20"/></svg>{escape(name)}</span>' for kind, name, _ in _lines(found)]
    names.append('<span><svg viewBox="0 0 10 14"><path class="cut" d="M5 0V14"/></svg>thresholds of the table</span>')
    return f"<p class=legend>{''.join(names)}</p>"


def _points(at: Float64[np.ndarray, "t"], values: Float64[np.ndarray, "t"], x: Place, y: Place) -> str:
    return " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in zip(at.tolist(), values.tolist(), strict=True) if v == v)


def _bars(found: Curation, x: Place, floor: float | int, low: float, high: float) -> list[str]:
    counts, edges = np.histogram(found.score[np.isfinite(found.score)], bins=BINS, range=(low, high))
    most, parts = max(1, int(counts.max())), [f'<path class="grid" d="M{LEFT} {floor}H{RIGHT}"/>']
    for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            tall = max(1.0, count / most * BARS)
            lost = _lost(found, (left + right) / 2)
            parts.append(
                f'<rect class="bar{lost}" x="{x(left) + 0.75:.1f}" y="{floor - tall:.1f}" width="{x(right) - x(left) - 1.5:.1f}" height="{tall:.1f}">'
                f"<title>{left:.4g} to {right:.4g}: {count:,} clips</title></rect>"
            )
    return parts


def _lost(found: Curation, score: float) -> str:
    """Whether a bar is of clips that the published threshold drops."""
    if not found.marked:
        return ""
    return " lost" if (score < found.marked[0]) == (found.keep == "above") else ""


def _beyond(found: Curation) -> str:
    """How many clips lie outside the charts."""
    low, high = span(found.score)
    known = found.score[np.isfinite(found.score)]
    below, above = int((known < low).sum()), int((known > high).sum())
    told = [f"{below:,} below {low:.4g} (least {known.min():.4g})"] if below else []
    told += [f"{above:,} above {high:.4g} (most {known.max():.4g})"] if above else []
    return f"<p class=remark>Not drawn: {', '.join(told)}.</p>" if told else ""


# --- the table ------------------------------------------------------------------------------------------------------------------------


def _table(found: Curation) -> str:
    splits = found.clips.splits if len(found.clips.splits) > 1 else ()
    heads = ["at least" if found.keep == "above" else "at most", "clips kept", "", *splits, "hours", "size", *(hours.name for hours in found.hours)]
    rows = "".join(_row(found, row, splits) for row in found.kept)
    head = "".join(f"<th>{escape(name).replace('-', '&#8209;')}" for name in heads)
    return f"<div class=scroll><table class=numbers><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _row(found: Curation, row: Kept, splits: Sequence[str]) -> str:
    share = row.total / found.kept[0].total
    marked = found.marked is not None and row.threshold == found.marked[0]
    cells = [*(f"{row.clips[split]:,}" for split in splits), hours_text(row.seconds / 3600), _size(row.bytes)]
    cells += [hours_text(hours.of(row)) for hours in found.hours]
    name = "all clips" if row.threshold is None else f"{row.threshold:g}"
    bar = f'<td class=share><i><b style="width:{100 * share:.2f}%"></b></i><span>{_share(share)}</span></td>'
    return f"<tr{' class=published' if marked else ''}><th scope=row>{name}</th><td>{row.total:,}</td>{bar}{''.join(map(_cell, cells))}</tr>"


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _notes(found: Curation) -> str:
    notes = [f"{hours.name}: {hours.note}" for hours in found.hours]
    notes += [f"{found.marked[0]:g} is {found.marked[1]}"] if found.marked else []
    return f"<ul class=notes>{''.join(f'<li>{escape(note)}.</li>' for note in notes)}</ul>" if notes else ""


# --- other scores ---------------------------------------------------------------------------------------------------------------------


def _others(found: Curation) -> str:
    order = Sorted.of(found.score, found.keep)
    charts = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{mean_svg(found, order, name)}</figure>" for name in found.others)
    return (
        '<p class=legend><span><svg viewBox="0 0 20 14"><path class="curve s1" d="M0 7H20"/></svg>mean of the clips that are kept</span>'
        '<span><svg viewBox="0 0 20 14"><path class="whole" d="M0 7H20"/></svg>mean of all clips</span>'
        f"<span>over the threshold on {escape(found.name)}</span></p><div class=small>{charts}</div>"
    )


def mean_svg(found: Curation, order: Sorted, name: str) -> str:
    """The mean of another score among what is kept, over the threshold."""
    other = found.others[name]
    low, high = span(found.score)
    at = np.linspace(low, high, POINTS)
    all_known = other[np.isfinite(other)]
    means, whole, around = order.mean(other, at), float(all_known.mean()), float(all_known.std()) / 2
    known = means[np.isfinite(means)]
    # At least a standard deviation high, so that what hardly changes looks so.
    least, most = round_range(float(known.min(initial=whole - around)), float(known.max(initial=whole + around)))
    left, right, top, bottom = 66, SMALL_WIDTH - 10, 10, SMALL_HEIGHT - 28

    def x(score: float) -> float:
        return left + (score - low) / (high - low) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - least) / (most - least) * (bottom - top)

    parts = [
        f'<path class="grid" d="M{left} {y(tick):.1f}H{right}"/><text class="end" x="{left - 8}" y="{y(tick) + 5:.1f}">{tick:g}</text>'
        for tick in ticks(least, most)
    ]
    parts.append(f'<path class="whole" d="M{left} {y(whole):.1f}H{right}"/>')
    if found.marked and low <= found.marked[0] <= high:
        parts.append(f'<path class="chosen" d="M{x(found.marked[0]):.1f} {top}V{bottom}"/>')
    parts.append(f'<polyline class="curve s1" points="{_points(at, means, x, y)}"/>')
    parts += [f'<text class="middle" x="{x(tick):.1f}" y="{bottom + 20}">{tick:g}</text>' for tick in ticks(low, high)]
    title = f"<title>Mean of {escape(name)}</title>"
    return f'<svg class="curves" viewBox="0 0 {SMALL_WIDTH} {SMALL_HEIGHT}" role="img">{title}{"".join(parts)}</svg>'


def _matrix(found: Curation) -> str:
    """Correlations as a table whose cells are the darker the further they are from 0."""
    head = "".join(f"<th class=turned><span>{escape(name)}</span>" for name in found.names)
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(_correlation(value, i == j) for j, value in enumerate(values))}</tr>"
        for i, (name, values) in enumerate(zip(found.names, found.correlations.tolist(), strict=True))
    )
    some = f" of {CORRELATED_CLIPS:,} clips, evenly spread" if len(found.clips) > CORRELATED_CLIPS else ""
    return (
        f"<div class=scroll><table class=matrix><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p class=remark>Spearman's rank correlations{some}: 1 where two scores order the clips alike, -1 where one orders them the other way round."
        " A score that hardly goes with this one tells something else.</p>"
    )


def _correlation(value: float, own: bool) -> str:
    if own:
        return "<td class=own></td>"
    if value != value:
        return "<td>-</td>"
    colour = "--valid" if value >= 0 else "--train"
    return f'<td style="background:color-mix(in srgb,var({colour}) {round(70 * abs(value))}%,transparent)">{signed(value)}</td>'


# Small things


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def signed(value: float) -> str:
    """A correlation to two digits; what rounds to nothing has no sign."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"


STYLE = """
:root{--s2:#5f8a3a;--s3:#8a5fae;--s4:#a8822a;--s5:#3f8f86}
@media(prefers-color-scheme:dark){:root{--s2:#a4d07c;--s3:#c3a0e6;--s4:#e3c06a;--s5:#7ccfc4}}
h1{overflow-wrap:anywhere}
.curve.all{stroke:var(--ink)}
.curve.s0{stroke:var(--train)}.curve.s1{stroke:var(--valid)}.curve.s2{stroke:var(--s2)}
.curve.s3{stroke:var(--s3)}.curve.s4{stroke:var(--s4)}.curve.s5{stroke:var(--s5)}
.cut{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 4;opacity:.55;fill:none}
.chosen{stroke:var(--train);stroke-width:1.6;fill:none}
.curves text.published{fill:var(--train)}
.whole{stroke:var(--soft);stroke-width:1.6;stroke-dasharray:6 4;fill:none}
.bar{fill:var(--valid);opacity:.75}
.bar.lost{opacity:.3}
.legend svg:has(.cut),.legend svg:has(.whole){background:none}
table.numbers td,table.numbers th,table.matrix td{text-align:right;white-space:nowrap}
table.numbers td,table.numbers th{padding:9px 12px}
table.numbers thead th{white-space:normal;vertical-align:bottom}
table.numbers td{font-variant-numeric:tabular-nums}
tr.published>*{background:color-mix(in srgb,var(--train) 12%,transparent)}
td.share span{display:inline-block;min-width:4.2em}
td.share i{display:inline-block;width:72px;height:9px;margin-right:10px;background:var(--line);border-radius:5px;overflow:hidden}
td.share b{display:block;height:100%;background:var(--valid)}
.notes{color:var(--soft);font-size:.86rem}
p.remark{white-space:normal;margin:10px 0 0;max-width:56em}
.small{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:18px}
.small figcaption{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
table.matrix{width:auto}
table.matrix td{padding:8px 12px;min-width:62px;border-left:1px solid var(--line)}
table.matrix th{white-space:nowrap}
.turned{vertical-align:bottom}
.turned span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:180px;overflow:hidden;text-overflow:ellipsis}
.own{background:var(--line)}
pre{white-space:pre}
""".strip()
