"""One HTML page about a dataset: what is in it by split, class and reason, how its clips' lengths, loudness and scores are spread, some clips to
watch and hear with what is stored of them, and where it comes from.

The page needs nothing but itself: videos and pictures are inside it as data URIs. Its script finds classes, and moves a line through the pictures of
a clip that plays. Knows no files and no networks; what it shows is handed to it as `DatasetPage`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float, Integer

from pipeline.inspect_charts import STYLE as CHART_STYLE
from pipeline.inspect_charts import Similarity, codes_svg, histogram_svg, number_text, shards_svg, similarity_svg, text, waveform_svg
from pipeline.page import Figure, Sound, data_uri, document, figures_html, spectrogram_svg
from shards.facts import ClassFacts, FailureFacts, MemberFacts, ShardFacts, SplitFacts
from shards.inspect import array_text, size_text

TOP_CLASSES = 16
"""Classes that are drawn; the others are in the list."""
LISTED_CLASSES = 2000
"""Most classes in the list: a dataset of captions has one for every clip."""
LISTED_SHARDS = 400
NAMES = ("array", "sha256 begins")
"""Heads of columns of words; others are of numbers."""
LISTED_EXTREMES = 3
"""Clips with the least and with the greatest value of a score that are named."""


@dataclass(frozen=True)
class Spread:
    """A number that clips have, and how it is spread."""

    name: str
    values: Float[np.ndarray, "values"]
    """Finite ones only."""
    unit: str = ""
    note: str = ""
    """Of how many clips, where not of all; or what one should know."""
    extremes: tuple[tuple[str, float], ...] = ()
    """Keys with the least and the greatest values, in order."""
    is_flag: bool = False


@dataclass(frozen=True)
class Codes:
    """A codec's codes of a clip."""

    codes: Integer[np.ndarray, "codebooks steps"]
    card: int
    """Codes of a codebook."""
    codec: str
    seconds: float
    """That they cover."""


@dataclass(frozen=True)
class ShownClip:
    """A clip of the gallery. What there is not of it is None, and `notes` says why."""

    key: str
    label: str | None
    split: str
    seconds: float
    scores: tuple[tuple[str, str], ...] = ()
    mp4: bytes | None = None
    sound: Sound | None = None
    codes: Codes | None = None
    similarity: Similarity | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetPage:
    """All that the page shows."""

    name: str
    place: str
    """Where it is."""
    kind: str
    parent: str | None
    """Of a view, whose shards it shows."""
    selection: tuple[str, ...]
    """Of a view, how its clips were chosen."""
    fingerprint: str
    splits: tuple[SplitFacts, ...]
    """The last one is their sum."""
    classes: tuple[ClassFacts, ...]
    failures: tuple[FailureFacts, ...]
    spreads: tuple[Spread, ...]
    score_errors: tuple[tuple[str, int, str], ...]
    clips: tuple[ShownClip, ...]
    gallery_notes: tuple[str, ...]
    members: tuple[MemberFacts, ...]
    shards: tuple[ShardFacts, ...]
    unfinished: tuple[str, ...]
    """Tars without a ledger."""
    spec: Mapping[str, str]
    """By dotted name."""
    provenance: Mapping[str, str]
    command: str


def page_html(data: DatasetPage) -> str:
    """The page as one string."""
    sections = [
        _header(data),
        _section("Splits", _splits_html(data)),
        _section("Classes", _classes_html(data.classes)),
        _section("Failures", _failures_html(data)),
        _section("Distributions", _spreads_html(data)),
        _section("Clips", _gallery_html(data)),
        _section("Shards", _shards_html(data)),
        _section("Where it comes from", _origin_html(data)),
    ]
    return document(f"{data.name} - soundshard", sections, style=CHART_STYLE + STYLE, script=SCRIPT)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _header(data: DatasetPage) -> str:
    whole = data.splits[-1] if data.splits else SplitFacts("all", 0, 0, 0.0, 0)
    labels = sum(fact.label is not None and fact.ok > 0 for fact in data.classes)
    figures = [
        Figure(f"{whole.ok:,}", "good clip" if whole.ok == 1 else "good clips"),
        Figure(hours_text(whole.seconds), "of video"),
        Figure(f"{whole.failed:,}", f"failed ({share_text(whole.failed, whole.ok + whole.failed)})" if whole.failed else "failed"),
        Figure(size_text(whole.bytes), "in shards" if data.parent is None else "of the parent's shards"),
    ]
    figures += [Figure(f"{labels:,}", "class" if labels == 1 else "classes")] if labels else []
    what = f"The {data.kind} dataset" if data.parent is None else f"A view of the {data.kind} dataset <code>{text(data.parent)}</code>"
    chosen = "".join(f"<li>{text(line)}</li>" for line in data.selection)
    return (
        f"<header><h1>{text(data.name)}</h1><p class=lead>{what} in <code>{text(data.place)}</code>, "
        f"fingerprint <code>{data.fingerprint[:12]}</code>.</p>{figures_html(figures)}"
        f"{f'<div class=chosen><h3>How its clips were chosen</h3><ul>{chosen}</ul></div>' if chosen else ''}</header>"
    )


# --- counts ---------------------------------------------------------------------------------------------------------------------------


def _splits_html(data: DatasetPage) -> str:
    if not data.splits or not (data.splits[-1].ok + data.splits[-1].failed):
        return "<p class=lead>No shard of it is finished: there is nothing to count yet.</p>"
    most = max(split.ok + split.failed for split in data.splits[:-1] or data.splits)
    rows = []
    for split in data.splits:
        is_sum = len(data.splits) > 1 and split is data.splits[-1]
        bar = "" if is_sum else _bar((("ok", split.ok), ("failed", split.failed)), most)
        each = size_text(split.bytes / split.ok) if split.ok else ""
        cells = (f"{split.ok:,}", f"{split.failed:,}", hours_text(split.seconds), size_text(split.bytes), each)
        rows.append(
            f"<tr{' class=sum' if is_sum else ''}><th scope=row>{text(split.name)}</th><td class=wide>{bar}</td>"
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    return _table(("split", "", "good", "failed", "length", "size", "a clip"), "".join(rows))


def _bar(parts: Sequence[tuple[str, int]], whole: int) -> str:
    pieces = "".join(f'<i class={kind} style="width:{100 * count / max(1, whole):.3f}%" title="{count:,}"></i>' for kind, count in parts if count)
    return f"<div class=level>{pieces}</div>"


def _classes_html(classes: Sequence[ClassFacts]) -> str:
    labelled = [fact for fact in classes if fact.label is not None]
    if not labelled:
        return ""
    most = max(1, labelled[0].ok)
    top = "".join(_class_row(fact, most) for fact in labelled[:TOP_CLASSES])
    others = labelled[TOP_CLASSES:]
    unlabelled = sum(fact.ok for fact in classes if fact.label is None)
    said = [f"and {len(others):,} more with {sum(fact.ok for fact in others):,} good clips" if others else ""]
    said.append(f"{unlabelled:,} good clips without a label" if unlabelled else "")
    remark = "; ".join(part for part in said if part)
    return f"<ul class=classes>{top}</ul>{f'<p class=remark>{remark}</p>' if remark else ''}{_search_html(labelled, most) if others else ''}"


def _class_row(fact: ClassFacts, most: int) -> str:
    name, failed = text(fact.label or ""), f"<small>{fact.failed:,} failed</small>" if fact.failed else ""
    return f'<li><span title="{name}"><bdi>{name}</bdi>{failed}</span>{_bar((("ok", fact.ok),), most)}<b>{fact.ok:,}</b></li>'


def _search_html(classes: Sequence[ClassFacts], most: int) -> str:
    listed = classes[:LISTED_CLASSES]
    rest = f"<p class=remark>The {LISTED_CLASSES:,} largest of {len(classes):,} are listed.</p>" if len(classes) > len(listed) else ""
    rows = "".join(_class_row(fact, most) for fact in listed)
    return (
        f"<details class=finder><summary>All {len(classes):,} classes</summary>"
        f'<input type="search" placeholder="find a class" aria-label="find a class"><output></output>{rest}<ul class=classes>{rows}</ul></details>'
    )


def _failures_html(data: DatasetPage) -> str:
    total = sum(failure.clips for failure in data.failures)
    return "".join(_failure_html(failure, total, data.failures[0].clips) for failure in data.failures)


def _failure_html(failure: FailureFacts, total: int, most: int) -> str:
    examples = "".join(f"<li><code><bdi>{text(source)}</bdi></code> <bdi>{text(message)}</bdi></li>" for source, message in failure.examples)
    more = failure.clips - len(failure.examples)
    rest = f"<li class=more>and {more:,} more</li>" if more > 0 else ""
    return (
        f"<article class=reason><h3><bdi>{text(failure.reason)}</bdi><span class=remark>{failure.clips:,} of {total:,}</span></h3>"
        f"{_bar((('failed', failure.clips),), most)}<ul>{examples}{rest}</ul></article>"
    )


# --- distributions --------------------------------------------------------------------------------------------------------------------


def _spreads_html(data: DatasetPage) -> str:
    cards = "".join(_spread_html(spread) for spread in sorted(data.spreads, key=lambda spread: spread.is_flag))
    errors = "".join(
        f"<li><b>{text(name)}</b> failed on {clips:,} clip{'' if clips == 1 else 's'}, for example: <bdi>{text(message)}</bdi></li>"
        for name, clips, message in data.score_errors
    )
    return f"{f'<div class=spreads>{cards}</div>' if cards else ''}{f'<ul class=errors>{errors}</ul>' if errors else ''}"


def _spread_html(spread: Spread) -> str:
    values = spread.values
    if not len(values):
        return f"<figure class=card><figcaption><b>{text(spread.name)}</b><span>{text(spread.note or 'no values')}</span></figcaption></figure>"
    note = f"<p class=remark>{text(spread.note)}</p>" if spread.note else ""
    if spread.is_flag:
        yes = int(values.sum())
        said = f"true for {yes:,} of {len(values):,} clips ({share_text(yes, len(values))})"
        bar = _bar((("ok", yes), ("no", len(values) - yes)), len(values))
        return f"<figure class=card><figcaption><b>{text(spread.name)}</b><span>{said}</span></figcaption>{bar}{note}</figure>"
    least, middle, most = np.quantile(values, (0, 0.5, 1)).tolist()
    shown = [number_text(value, most - least) for value in (least, most, middle)]
    said = f"{shown[0]} to {shown[1]}{spread.unit}, median {shown[2]}" if most > least else f"all {shown[0]}{spread.unit}"
    chart = histogram_svg(values, title=f"{spread.name}: how many clips", unit=spread.unit)
    ends = "".join(f"<li><code>{text(key)}</code><b>{number_text(value, most - least)}</b></li>" for key, value in spread.extremes)
    listed = f"<details><summary>clips at both ends</summary><ol>{ends}</ol></details>" if ends else ""
    return f"<figure class=card><figcaption><b>{text(spread.name)}</b><span>{said}</span></figcaption>{chart}{note}{listed}</figure>"


# --- clips ----------------------------------------------------------------------------------------------------------------------------


def _gallery_html(data: DatasetPage) -> str:
    notes = "".join(f"<p class=remark>{text(note)}</p>" for note in data.gallery_notes)
    return f"{notes}{''.join(_clip_html(clip) for clip in data.clips)}" if data.clips or notes else ""


def _clip_html(clip: ShownClip) -> str:
    notes = "".join(f"<p class=remark>{text(note)}</p>" for note in clip.notes)
    left, right = _left_html(clip), _strips_html(clip)
    return (
        f'<article class="clip{"" if left and right else " single"}"><h3><bdi>{text(clip.label or "no label")}</bdi>'
        f"<span class=remark>{text(clip.split)} · {clip.seconds:.2f} s</span></h3><p class=key>{text(clip.key)}</p>"
        f"<div class=pair>{f'<div>{left}</div>' if left else ''}{f'<div>{right}</div>' if right else ''}</div>"
        f"{notes}</article>"
    )


def _left_html(clip: ShownClip) -> str:
    parts = []
    if clip.mp4 is not None:
        parts.append(f'<video controls playsinline preload="auto" src="{data_uri("video/mp4", clip.mp4)}"></video>')
    if clip.similarity is not None:
        same, every = float(clip.similarity.at_offset().mean()), float(clip.similarity.cosines.mean())
        picture = similarity_svg(clip.similarity, clip.seconds, title=f"similarity of pictures and sound of {clip.key}")
        said = f"pictures (down) and sound (across): cosine {same:.2f} at the same time, {every:.2f} over all"
        parts.append(f"<figure class=matrix><figcaption>{said}</figcaption>{picture}</figure>")
    return "".join(parts)


def _strips_html(clip: ShownClip) -> str:
    parts = []
    if clip.sound is not None and len(clip.sound.wave):
        wave, rate = clip.sound.wave, clip.sound.sample_rate_hz
        parts.append(f"<figure><figcaption>waveform</figcaption>{waveform_svg(wave, rate, title=f'waveform of {clip.key}')}</figure>")
        picture = spectrogram_svg(clip.sound, (), title=f"spectrogram of {clip.key}").replace('class="spectrogram"', 'class="strip spectrogram"', 1)
        parts.append(f"<figure><figcaption>spectrogram, 60 Hz to {rate / 2000:g} kHz</figcaption>{picture}</figure>")
    if clip.codes is not None:
        codes, card = clip.codes.codes, clip.codes.card
        used = np.mean([len(np.unique(book)) for book in codes]) if codes.size else 0
        said = f"{text(clip.codes.codec)} codes: {codes.shape[0]} codebooks down; of their {card:,} codes {used:.0f} occur on average"
        picture = codes_svg(codes, clip.codes.seconds, clip.seconds, card, title=f"codes of {clip.key}")
        parts.append(f"<figure><figcaption>{said}</figcaption>{picture}</figure>")
    scores = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in clip.scores)
    return "".join(parts) + (f"<dl class=scores>{scores}</dl>" if scores else "")


# --- files ----------------------------------------------------------------------------------------------------------------------------


def _shards_html(data: DatasetPage) -> str:
    if not data.shards:
        return ""
    arrays = any(member.dtype for member in data.members)
    members = "".join(
        f"<tr><th scope=row>{text(member.extension)}</th><td>{member.clips:,}</td><td>{size_text(member.bytes)}</td>"
        f"<td>{size_text(member.bytes / member.clips)}</td>{f'<td class=name>{text(array_text(member))}</td>' if arrays else ''}</tr>"
        for member in data.members
    )
    sizes = [(shard.name, shard.bytes if data.parent else shard.tar_bytes or 0, shard.tar_bytes or 0) for shard in data.shards]
    gone = [shard.name for shard in data.shards if shard.tar_bytes is None]
    said = [f"{len(data.shards):,} shard{'' if len(data.shards) == 1 else 's'}"]
    there = [whole for _, _, whole in sizes if whole]
    if there:
        said.append(f"of {size_text(min(there))} to {size_text(max(there))}" if min(there) < max(there) else f"of {size_text(there[0])}")
    faults = [f"The tars of {len(gone):,} shards are not there: {', '.join(gone[:5])}{' ...' if len(gone) > 5 else ''}."] if gone else []
    if data.unfinished:
        faults.append(f"{len(data.unfinished):,} tars have no ledger, so they are not finished: {', '.join(data.unfinished[:5])}.")
    listed = data.shards[:LISTED_SHARDS]
    rows = "".join(
        f"<tr><th scope=row>{text(shard.name)}</th><td>{shard.ok:,}</td><td>{shard.failed:,}</td><td>{size_text(shard.bytes)}</td>"
        f"<td>{'no tar' if shard.tar_bytes is None else size_text(shard.tar_bytes)}</td><td class=name>{text(shard.sha256[:16])}</td></tr>"
        for shard in listed
    )
    heads = ("shard", "good", "failed", "members", "tar", "sha256 begins")
    title = f"The first {len(listed):,} shards" if len(listed) < len(data.shards) else "All shards"
    return (
        f"<p class=remark>{' '.join(said)}{', of which this view shows the darker part' if data.parent else ''}.</p>{shards_svg(sizes, size_text)}"
        f"{''.join(f'<p class=fault>{text(fault)}</p>' for fault in faults)}"
        f"{_table(('member', 'clips', 'size', 'a clip', *(('array',) if arrays else ())), members) if members else ''}"
        f"<details><summary>{title}</summary>{_table(heads, rows)}</details>"
    )


def _origin_html(data: DatasetPage) -> str:
    spec = _facts(data.spec)
    provenance = _facts(data.provenance) if data.provenance else "<p class=remark>Nothing is recorded beyond the spec.</p>"
    return (
        f"<p class=lead>Fingerprint <code>{data.fingerprint}</code></p><h3>Spec: what decides the bytes</h3>{spec}"
        f"<h3>Provenance: what is worth knowing</h3>{provenance}<h3>This page</h3><pre>{text(data.command)}</pre>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{text(name)}</dt><dd><bdi>{text(value or '(empty)')}</bdi></dd>" for name, value in facts.items())
    return f"<dl class=facts>{rows}</dl>"


def _table(heads: Sequence[str], rows: str) -> str:
    head = "".join(f"<th{' class=name' if head in NAMES else ''}>{escape(head)}</th>" for head in heads)
    return f"<div class=scroll><table class=numbers><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


# --- words ----------------------------------------------------------------------------------------------------------------------------


def hours_text(seconds: float) -> str:
    """`12.5 s`, `3.2 min`, `4.1 h`, `555 h`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:,.3g} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def share_text(part: int, whole: int) -> str:
    """Percents; a small part is not called nothing, nor nearly all all."""
    percent = 100 * part / max(1, whole)
    if percent in (0, 100) or 10 <= percent < 99.5:
        return f"{percent:.0f} %"
    return "< 0.01 %" if percent < 0.01 else f"{min(percent, 99.9):.2g} %" if percent < 10 else f"{min(percent, 99.9):.1f} %"


STYLE = """
:root{--bad:#c62f3b;--good:#3b7f5c;--rest:#e8e4dd}
@media(prefers-color-scheme:dark){:root{--bad:#ff6b74;--good:#5fb38a;--rest:#2c2b32}}
h1,h3,code,.key{overflow-wrap:anywhere}
code{font:.84em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.remark{white-space:normal;margin:8px 0}
section>h3{margin:32px 0 8px}
.chosen{margin-top:24px}.chosen ul{margin:8px 0}
.level{display:flex;height:10px;border-radius:3px;overflow:hidden;min-width:40px}
.level i{min-width:2px}
i.ok{background:var(--good)}i.failed{background:var(--bad)}i.no{background:var(--rest)}
.numbers td,.numbers th:not(:first-child){text-align:right;white-space:nowrap}
.numbers td.name,.numbers th.name{text-align:left}
.numbers .wide{width:34%;vertical-align:middle}
.numbers .sum td,.numbers .sum th{font-weight:600}
.numbers th:first-child{white-space:nowrap}
.classes{list-style:none;margin:0;padding:0;max-width:none;columns:2;column-gap:40px}
.classes li{display:grid;grid-template-columns:minmax(0,1fr) 34% 3.4em;gap:12px;align-items:center;
margin:0;padding:4px 0;break-inside:avoid;font-size:.9rem}
.classes li[hidden]{display:none}
.classes span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.classes b{text-align:right;font-weight:600;font-variant-numeric:tabular-nums}
.classes small{color:var(--bad);margin-left:8px}
.finder input{display:block;width:100%;max-width:26em;margin:14px 0 8px;padding:8px 12px;font:inherit;color:var(--ink);background:var(--card);
border:1px solid var(--line);border-radius:8px}
.finder output{font-size:.86rem}
.finder .classes{max-height:420px;overflow-y:auto;columns:1;margin-top:8px}
.finder li{color:var(--ink)}
.reason{padding:14px 18px;margin:10px 0}
.reason ul{margin:10px 0 0;padding:0;list-style:none;font-size:.88rem;max-width:none}
.reason li{margin:5px 0;overflow-wrap:anywhere}
.reason li>bdi{color:var(--soft);margin-left:8px}
.reason .more{color:var(--soft)}
.reason .level{margin-top:8px;height:6px}
.spreads{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:18px;align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;justify-content:space-between;align-items:baseline;margin-bottom:10px}
.card b{color:var(--ink);font-weight:600}
.card .curves{border:0;padding:0;border-radius:0}
.card details{margin-top:6px;font-size:.86rem}
.card ol{list-style:none;padding:0;margin:6px 0 0}
.card ol li{display:flex;justify-content:space-between;gap:12px;margin:2px 0}
.errors{font-size:.9rem;overflow-wrap:anywhere}
.clip h3 .remark,.reason h3 .remark{font-size:.86rem;white-space:nowrap;margin:0}
.pair{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,7fr);gap:18px;align-items:start}
.single .pair{grid-template-columns:minmax(0,1fr)}
.single .matrix{max-width:560px}
.clip figure+figure,.clip video+figure{margin-top:12px}
.clip .spectrogram{margin-top:0}
.clip figcaption{font-size:.8rem;margin-bottom:4px}
.clip video{max-height:340px}
.scores{display:flex;flex-wrap:wrap;gap:4px 22px;margin:14px 0 0;font-size:.86rem}
.scores div{display:flex;gap:8px}.scores dt{color:var(--soft)}.scores dd{margin:0;font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:repeat(2,max-content minmax(0,1fr));gap:3px 18px;font-size:.84rem;margin:0}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.95em}
.fault{color:var(--bad)}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
.shards{margin-bottom:18px}
@media(max-width:700px){main{padding:28px 14px 60px}.classes{columns:1}.pair{grid-template-columns:minmax(0,1fr)}
.curves.shards text,.curves.histogram text,.strip text{font-size:30px}
.numbers .wide,.numbers thead th:nth-child(2):empty{display:none}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:8px}}
""".strip()

# Classes that do not have what was typed are hidden. The line in a clip's pictures follows its video; a click on one of them goes there.
SCRIPT = """
for (const finder of document.querySelectorAll(".finder")) {
  const field = finder.querySelector("input"), rows = [...finder.querySelectorAll("li")], said = finder.querySelector("output");
  const names = rows.map((row) => row.querySelector("bdi").textContent.toLowerCase());
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, i) => { row.hidden = !names[i].includes(wanted); shown += !row.hidden; });
    said.textContent = wanted ? `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}` : "";
  });
}
for (const clip of document.querySelectorAll(".clip")) {
  const video = clip.querySelector("video");
  if (!video) continue;
  const strips = [...clip.querySelectorAll(".strip")].map((chart) => {
    const box = chart.viewBox.baseVal, left = Number(chart.dataset.left || 0), first = chart.classList.contains("spectrogram") ? 9 : 0;
    return {chart, left, first, width: box.width - left, whole: box.width, height: Number(chart.dataset.height || 0),
            seconds: Number(chart.dataset.seconds), across: chart.querySelector(".head:not(.down)"), down: chart.querySelector(".head.down")};
  });
  const follow = () => {
    for (const {width, height, first, seconds, across, down} of strips) {
      const place = Math.min(1, video.currentTime / seconds);
      across.setAttribute("transform", `translate(${first + place * width} 0)`);
      if (down) down.setAttribute("transform", `translate(0 ${place * height})`);
    }
    clip.classList.add("playing");
    if (!video.paused) requestAnimationFrame(follow);
  };
  video.addEventListener("play", () => {
    for (const other of document.querySelectorAll("video")) if (other !== video) other.pause();
    follow();
  });
  video.addEventListener("seeked", follow);
  for (const {chart, left, width, whole, seconds} of strips) chart.addEventListener("click", (event) => {
    const box = chart.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * whole - left;
    video.currentTime = Math.max(0, Math.min(1, place / width)) * seconds;
  });
}
""".strip()
