"""One HTML page about a preparation job: what was done, how fast over time, where the time went, what failed and why, what to do next.

The page needs nothing but itself, and runs no script. Knows no datasets and no jobs; what it shows is handed to it as `StageReport`s.
"""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import metadata
from math import ceil
from os import PathLike
from typing import Any

from configs import storage
from pipeline.page import Figure, document, figures_html, round_range, ticks
from pipeline.progress import Bucket, NodeWork, Snapshot, duration_text, rate_text, size_text
from shards.dataset import leaves

WORKS = ("read", "decode", "encode", "tower", "audio", "codec", "write")
"""Kinds of work, in the order of a clip's way."""
NETWORK_WORKS = {"tower": "tower", "audio": "audio tower", "codec": "codec"}
"""Those of networks, and what does them."""
PASSING = ("crashed", "io", "missing", "out_of_memory", "timeout", "unreadable")
"""Reasons that may be gone when a clip is tried again."""
COLUMNS = 120
"""Most columns of a chart."""
PACKAGES = ("ray", "torch", "av", "encodec", "numpy", "pyarrow", "obstore")


@dataclass(frozen=True)
class StageReport:
    """What the page shows of a stage."""

    name: str
    """reencode, featurise or prepare (both in one)."""
    snapshot: Snapshot
    """What this run did."""
    total: int
    """Clips of the whole plan."""
    done_before: int
    """Clips of shards that an earlier run had finished."""
    workers: int
    """Processes that worked."""
    actors: int
    """Those among them that hold the networks; 0 where none does."""
    device: str
    """The networks': `cuda`, `cpu`."""
    wall_seconds: float
    out: str
    fingerprint: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ok: int | None = None
    """Good clips of the whole dataset, from its ledgers; null if that was not counted."""
    failed: int | None = None
    """Failed ones, likewise."""
    restarted: int = 0
    """Pieces of work that were started again because a process or node was lost."""

    @property
    def now(self) -> int:
        """Clips that this run brought to their end."""
        return min(self.snapshot.done, self.total - self.done_before)

    @property
    def failed_now(self) -> int:
        """Of them failed."""
        return min(self.snapshot.failed, self.now)

    @property
    def left(self) -> int:
        """Clips that are still to do."""
        return self.total - self.done_before - self.now

    @property
    def clips_per_second(self) -> float:
        """Over the whole run, its start included."""
        return self.now / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def network_busy(self) -> float | None:
        """The part of the network processes' time that they spent in the networks; null where there are none or it took no time."""
        available = self.actors * self.wall_seconds
        return min(1.0, sum(self.snapshot.busy_seconds.get(work, 0.0) for work in NETWORK_WORKS) / available) if available > 0 else None


def write_report(
    path: str | PathLike[str], stages: Sequence[StageReport], title: str, *, command: str = "", versions: Mapping[str, str] | None = None
) -> None:
    """Write the page, to a folder or an object store, whole or not at all. `command` is what was typed, for what to do next."""
    # A file name may hold bytes that are no text; the page shows them escaped.
    storage.write_bytes(path, report_html(stages, title, command=command, versions=versions).encode("utf-8", "backslashreplace"))


def report_html(stages: Sequence[StageReport], title: str, *, command: str = "", versions: Mapping[str, str] | None = None) -> str:
    """The page as one string."""
    sections = [
        f"<header><h1>{_text(title)}</h1><p class=lead>{_lead(stages)}</p>{_overview(stages) if len(stages) > 1 else ''}</header>",
        *(_stage_html(stage) for stage in stages),
        _next_html(next_steps(stages, command)),
        _facts_html("Versions", installed_versions() if versions is None else versions),
    ]
    return document(title, sections, style=STYLE)


def installed_versions() -> dict[str, str]:
    """Of what decides the result, as installed here."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def next_steps(stages: Sequence[StageReport], command: str) -> list[tuple[str, str]]:
    """(why, command) of what one may want to do now."""
    again, last = command or "the same command", stages[-1] if stages else None
    steps = []
    if any(stage.left for stage in stages):
        steps.append(("Not all is done. What is finished is kept; run it again to do what is missing.", command))
    for stage in stages:
        if stage.snapshot.failed or stage.failed:
            steps.append((f"See every clip that failed in {stage.name}, and why.", f"soundshard inspect {stage.out}"))
    if reasons := sorted({reason for stage in stages for reason in stage.snapshot.reasons} & set(PASSING)):
        raised = [(", with more time", " clip_seconds=900")] if "timeout" in reasons else []
        raised += [(", with more memory", " clip_memory_mb=8192")] if "out_of_memory" in reasons else []
        why = f"Try again what may have passed{''.join(text for text, _ in raised)}."
        steps.append((why, f"{again} retry_failed=true reasons={','.join(reasons)}{''.join(option for _, option in raised)}"))
    if last is not None and last.now + last.done_before > last.failed_now and not any(stage.left for stage in stages):
        if last.name == "reencode":
            steps.append(("Make features of the clips.", f"soundshard featurise data={last.out} out=features"))
        else:
            steps.append(("Train on the features.", f"soundshard train data={last.out} out=runs/first"))
    return steps


def _lead(stages: Sequence[StageReport]) -> str:
    if not stages:
        return "There was nothing to do."
    last, left = stages[-1], sum(stage.left for stage in stages)
    state = "stopped before its end" if left else "done, with failures" if any(stage.failed_now for stage in stages) else "done"
    before = f", {last.done_before:,} of them before this run" if last.done_before else ""
    wall = duration_text(sum(stage.wall_seconds for stage in stages))
    return f'<span class="state{" stopped" if left else ""}">{state}</span> {_count(last.total, "clip")}{before}; this run took {wall}.'


def _overview(stages: Sequence[StageReport]) -> str:
    heads = ("stage", "clips", "failed", "took", "throughput", "written", "networks busy")
    rows = [
        (s.name, f"{s.now:,}", f"{s.failed_now:,}", duration_text(s.wall_seconds), rate_text(s.clips_per_second), size_text(s.snapshot.bytes))
        for s in stages
    ]
    return _table_html(heads, [(*row, _share_text(s.network_busy)) for row, s in zip(rows, stages, strict=True)])


def _table_html(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A name and its numbers in every row."""
    body = "".join(
        f"<tr><th scope=row><bdi>{_text(name)}</bdi></th>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>" for name, *cells in rows
    )
    head = "".join(f"<th>{_text(head)}</th>" for head in heads)
    return f"<div class=scroll><table class=numbers><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _stage_html(stage: StageReport) -> str:
    snapshot = stage.snapshot
    parts = [
        f"<h2>{_text(stage.name)} <code class=out><bdi>{_text(stage.out)}</bdi></code></h2>",
        figures_html(_figures(stage)),
        _completion_html(stage),
        f"<h3>Throughput</h3>{throughput_html(snapshot)}" if snapshot.elapsed_seconds >= 3 and snapshot.done >= 5 else "",
        f"<h3>Where the time went</h3>{_work_html(stage)}" if sum(snapshot.busy_seconds.values()) > 0 else "",
        f"<h3>Failures</h3>{_failures_html(snapshot)}" if snapshot.reasons else "",
        f"<h3>Machines</h3>{_nodes_html(snapshot.nodes)}" if snapshot.nodes else "",
        _facts_html("Options", {"fingerprint": stage.fingerprint, "device": stage.device, "workers": stage.workers, **_typed(stage.options)}),
    ]
    return f"<section>{''.join(parts)}</section>"


def _figures(stage: StageReport) -> list[Figure]:
    good = stage.now - stage.failed_now
    found = [
        Figure(f"{good:,}", f"{'clip' if good == 1 else 'clips'} made in this run"),
        Figure(f"{stage.failed_now:,}", f"failed ({_share_text(stage.failed_now / stage.now)})" if stage.failed_now else "failed"),
        Figure(rate_text(stage.clips_per_second), f"over {duration_text(stage.wall_seconds)} on {_count(stage.workers, 'worker')}"),
        Figure(size_text(stage.snapshot.bytes), f"written, {size_text(stage.snapshot.bytes / good)} a clip" if good else "written"),
    ]
    if stage.network_busy is not None:
        gpu = stage.device.startswith("cuda")
        whose = _count(stage.actors, "GPU process" if gpu else "network process", "es")
        names = [name for work, name in NETWORK_WORKS.items() if work != "audio" or stage.snapshot.busy_seconds.get(work)]
        which = f"{', '.join(names[:-1])} and {names[-1]}"
        found.append(Figure(_share_text(stage.network_busy), f"{'GPU' if gpu else 'networks'} busy: {which} in the time of {whose}"))
    if stage.restarted:
        found.append(Figure(f"{stage.restarted:,}", "pieces of work started again after a process or machine was lost"))
    return found


def _completion_html(stage: StageReport) -> str:
    parts = [
        ("before", "done before this run", stage.done_before),
        ("ok", "good", stage.now - stage.failed_now),
        ("failed", "failed", stage.failed_now),
        ("left", "not done", stage.left),
    ]
    whole = (
        f"In the whole dataset {stage.ok:,} clips are good and {stage.failed:,} failed." if stage.ok is not None and stage.failed is not None else ""
    )
    return _stacked([(kind, f"{name} {count:,}", count) for kind, name, count in parts if count], stage.total) + (
        f"<p class=remark>{whole}</p>" if whole and stage.done_before else ""
    )


def _stacked(parts: Sequence[tuple[str, str, int | float]], whole: int | float) -> str:
    """A bar of (class, text, size) parts, and what its colours mean."""
    if whole <= 0:
        return ""
    pieces = "".join(f'<i class="{kind}" style="width:{100 * size / whole:.3f}%" title="{_text(text)}"></i>' for kind, text, size in parts)
    return f"<div class=bar>{pieces}</div>{_legend([(kind, text) for kind, text, _ in parts])}"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    return f"<p class=legend>{''.join(f'<span><i class={kind}></i>{_text(text)}</span>' for kind, text in entries)}</p>"


def _work_html(stage: StageReport) -> str:
    busy = stage.snapshot.busy_seconds
    works = sorted((w for w in busy if busy[w] > 0), key=lambda w: (WORKS.index(w) if w in WORKS else len(WORKS), w))
    total, available = sum(busy[w] for w in works), stage.workers * stage.wall_seconds
    parts = [(work if work in WORKS else "other", f"{work} {duration_text(busy[work])}", busy[work]) for work in works]
    if available > total:
        parts.append(("left", f"waiting {duration_text(available - total)}", available - total))
        remark = f"Of the {duration_text(available)} that {_count(stage.workers, 'worker')} had. Waiting: for input, for others, for the start."
    else:
        remark = "Summed over all workers, each of which does more than one thing at a time."
    heads = ("work", "busy", "a clip", "of all work", "of the workers' time")
    rows = [
        (work, duration_text(busy[work]), _each(busy[work], stage.now), _share_text(busy[work] / total), _share_text(_part(busy[work], available)))
        for work in works
    ]
    return f"{_stacked(parts, max(total, available))}<p class=remark>{remark}</p>{_table_html(heads, rows)}"


def _part(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _each(seconds: float, clips: int) -> str:
    """Seconds per clip, in the unit that suits."""
    each = seconds / clips if clips else 0.0
    return "" if not clips else f"{1000 * each:.1f} ms" if each < 0.1 else f"{each:.2f} s"


def _failures_html(snapshot: Snapshot) -> str:
    reasons = sorted(snapshot.reasons.items(), key=lambda item: (-item[1], item[0]))
    return "".join(_reason_html(reason, count, snapshot, count / reasons[0][1]) for reason, count in reasons)


def _reason_html(reason: str, count: int, snapshot: Snapshot, length: float) -> str:
    """One reason: how often, beside the most frequent one, and examples."""
    found = snapshot.examples.get(reason, ())
    examples = "".join(f"<li><code><bdi>{_text(key)}</bdi></code> <bdi>{_text(message)}</bdi></li>" for key, message in found)
    return (
        f"<article class=reason><h4><bdi>{_text(reason)}</bdi><span class=remark>{count:,} of {snapshot.failed:,}</span></h4>"
        f'<div class="bar thin"><i class=failed style="width:{100 * length:.3f}%"></i></div><ul>{examples}</ul></article>'
    )


def _nodes_html(nodes: Mapping[str, NodeWork]) -> str:
    ordered = sorted(nodes.items(), key=lambda item: (-item[1].clips, item[0]))
    rows = [(name, f"{n.clips:,}", f"{n.failed:,}", duration_text(n.busy_seconds), _each(n.busy_seconds, n.clips)) for name, n in ordered]
    return _table_html(("machine", "clips", "failed", "busy", "a clip"), rows)


def _next_html(steps: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li>{_text(why)}{f'<pre>{_text(command)}</pre>' if command else ''}</li>" for why, command in steps)
    return f"<section><h2>What next</h2><ul class=steps>{items}</ul></section>" if steps else ""


def _facts_html(title: str, facts: Mapping[str, object]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd><bdi>{_text(str(value))}</bdi></dd>" for name, value in facts.items())
    return f"<details><summary>{_text(title)}</summary><dl>{rows}</dl></details>" if rows else ""


def _typed(options: Mapping[str, Any]) -> dict[str, str]:
    """Options by dotted name, as one would type them."""
    shown = {True: "true", False: "false", None: "null"}
    return {name: shown[value] if value is None or isinstance(value, bool) else str(value) for name, value in leaves(dict(options)) if name}


def throughput_html(snapshot: Snapshot) -> str:
    """Clips per second over time as columns, what failed in red, and enlarged below the axis."""
    drawn = chart_columns(snapshot)
    unit_seconds, unit = next((s, u) for s, u in ((1, "seconds"), (60, "minutes"), (3600, "hours"), (86400, "days")) if span_fits(snapshot, s))
    span = snapshot.elapsed_seconds
    _, top = round_range(0.0, max(clips_per_second(column) for column in drawn) or 1.0)
    grid = [tick for tick in ticks(0.0, top) if tick > 0]
    lines = "".join(f'<path class="grid" d="M0 {100 - 100 * tick / top:.2f}H1000"/>' for tick in grid)
    most_failed = max(column.failed for column in drawn)
    columns = "".join(_column_svg(column, span, top, most_failed) for column in drawn)
    mean = snapshot.done / span
    left = "".join(f'<span style="bottom:{100 * tick / top:.2f}%">{tick:g}</span>' for tick in [0, *grid])
    below = "".join(f'<span style="left:{100 * tick * unit_seconds / span:.2f}%">{tick:g}</span>' for tick in ticks(0.0, span / unit_seconds))
    legend = [("ok", "clips per second"), ("mean", f"mean {rate_text(mean)}")]
    legend += [("failed", "failed; below the axis on a scale of their own")] if snapshot.failed else []
    return (
        f'<figure class=plot><div class=left>{left}</div><svg viewBox="0 0 1000 112" preserveAspectRatio="none" role="img">'
        f'<title>Throughput over time</title>{lines}{columns}<path class="mean" d="M0 {100 - 100 * mean / top:.2f}H1000"/></svg>'
        f"<div class=below>{below}</div><figcaption>{unit} since the start</figcaption></figure>{_legend(legend)}"
    )


def span_fits(snapshot: Snapshot, unit_seconds: int) -> bool:
    """Whether a time axis in this unit has small numbers."""
    return snapshot.elapsed_seconds <= 150 * unit_seconds or unit_seconds == 86400


@dataclass(frozen=True)
class Column:
    """What ended between two instants."""

    start_seconds: float
    stop_seconds: float
    clips: int
    failed: int
    bytes: int


def chart_columns(snapshot: Snapshot) -> list[Column]:
    """The buckets from 0 to now, side by side and merged until a column holds a few clips and there are not too many; all clips are in them."""
    width, elapsed = snapshot.bucket_seconds, snapshot.elapsed_seconds
    count = max(len(snapshot.buckets), ceil(elapsed / width), 1)
    wanted = max(12, min(COLUMNS, snapshot.done // 5))
    together = ceil(count / wanted)
    columns: list[Column] = []
    for place in range(0, count, together):
        inside: Sequence[Bucket] = snapshot.buckets[place : place + together]
        start, stop = place * width, min((place + together) * width, elapsed)
        sums = [sum(b.clips for b in inside), sum(b.failed for b in inside), sum(b.bytes for b in inside)]
        if columns and stop - start < 0.5 * together * width:  # the rate of a sliver says nothing
            before = columns.pop()
            start, sums = before.start_seconds, [before.clips + sums[0], before.failed + sums[1], before.bytes + sums[2]]
        columns.append(Column(start, max(stop, columns[-1].stop_seconds if columns else 0.0), *sums))
    return columns


def clips_per_second(column: Column) -> float:
    """The column's height."""
    return column.clips / (column.stop_seconds - column.start_seconds) if column.stop_seconds > column.start_seconds else 0.0


def _column_svg(column: Column, span: float, top: float, most_failed: int) -> str:
    left, width = 1000 * column.start_seconds / span, 1000 * (column.stop_seconds - column.start_seconds) / span
    height = 100 * clips_per_second(column) / top
    red = height * column.failed / column.clips if column.clips else 0.0
    below = 1 + 9 * column.failed / most_failed if column.failed else 0.0
    bars = [("ok", 100 - height, height - red), ("failed", 100 - red, red), ("failed", 102, below)]
    rects = "".join(
        f'<rect class="{kind}" x="{left:.2f}" y="{y:.2f}" width="{0.9 * width:.2f}" height="{size:.2f}"/>' for kind, y, size in bars if size > 0
    )
    what = (
        f"{duration_text(column.start_seconds)} to {duration_text(column.stop_seconds)}: {_count(column.clips, 'clip')}, "
        f"{rate_text(clips_per_second(column))}, {column.failed:,} failed, {size_text(column.bytes)}"
    )
    return f'<g><title>{what}</title><rect class="hit" x="{left:.2f}" y="0" width="{width:.2f}" height="112"/>{rects}</g>'


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else plural}"


def _share_text(share: float | None) -> str:
    """Percents; a small part is not called nothing, nor nearly all all."""
    if share is None:
        return "–"  # noqa: RUF001 - a dash for a cell without a number
    percent = round(100 * share, 6)
    digits = 0 if percent == 0 or percent >= 100 or 10 <= percent < 99.5 else 1 if percent >= 0.95 else 2
    return "< 0.01 %" if 0 < percent < 0.005 else f"{min(percent, 99.9) if percent < 100 else percent:.{digits}f} %"


def _text(text: str) -> str:
    """Escaped, and without controls: html has no place for some, and others turn the direction of what follows."""
    return escape(re.sub("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text))


STYLE = """
:root{--read:#c9a227;--decode:#2c6e8f;--encode:#b4552d;--tower:#6a4c93;--audio:#a8527f;--codec:#3f8f6b;--write:#7a8290;
--bad:#c62f3b;--good:#3b7f5c;--rest:#e8e4dd}
@media(prefers-color-scheme:dark){:root{--read:#e3c14f;--decode:#6fc0e6;--encode:#f0905f;--tower:#b197dd;--audio:#e39ac0;--codec:#71c7a0;--write:#a4acb9;
--bad:#ff6b74;--good:#5fb38a;--rest:#2c2b32}}
h2{margin-top:64px;display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline}
h3{margin:36px 0 12px}
h4{margin:0 0 8px;font-size:.95rem;font-weight:600;display:flex;gap:12px;justify-content:space-between;align-items:baseline}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{font-size:.84em;overflow-wrap:anywhere}
.out{font-weight:400;color:var(--soft)}
.state{display:inline-block;padding:1px 10px;margin-right:6px;border-radius:99px;font-size:.86rem;color:#fff;background:var(--good)}
.state.stopped{background:var(--bad)}
@media(prefers-color-scheme:dark){.state{color:#141416}}
.remark{white-space:normal;margin:0 0 12px}
.bar{display:flex;height:22px;border-radius:6px;overflow:hidden;background:var(--rest);margin:18px 0 10px}
.bar i{min-width:2px}
.bar.thin{height:6px;border-radius:3px;margin:0 0 10px;background:none}
.bar.thin i{border-radius:3px}
.legend i{width:11px;height:11px;border-radius:3px;flex:none}
i.ok{background:var(--good)}i.failed{background:var(--bad)}i.before{background:var(--write)}
i.left{background:var(--rest)}
i.read{background:var(--read)}i.decode{background:var(--decode)}i.encode{background:var(--encode)}i.tower{background:var(--tower)}
i.audio{background:var(--audio)}i.codec{background:var(--codec)}i.write,i.other{background:var(--write)}
.legend i.mean{height:0;border-radius:0;border-top:2px dashed var(--ink);background:none;width:16px}
.plot{position:relative;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 16px 34px 58px;margin-bottom:10px}
.plot svg{width:100%;height:224px;overflow:hidden}
.plot .ok{fill:var(--good)}.plot .failed{fill:var(--bad)}.plot .hit{fill:transparent}
.plot g:hover .hit{fill:var(--rest)}
.plot .grid,.plot .mean{vector-effect:non-scaling-stroke}
.plot .mean{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:5 5;fill:none;opacity:.7}
.plot span{position:absolute;color:var(--soft);font-size:.78rem;line-height:1;font-variant-numeric:tabular-nums}
.plot .left{position:absolute;left:0;top:20px;width:50px;height:200px;background:none}
.plot .left span{right:0;transform:translateY(50%)}
.plot .below{position:relative;height:14px;margin-top:6px}
.plot .below span{transform:translateX(-50%)}
.plot figcaption{position:absolute;right:16px;bottom:6px;margin:0;font-size:.78rem}
.numbers td,.numbers th:not(:first-child){text-align:right;white-space:nowrap}
.reason{padding:14px 18px;margin:10px 0}
.reason ul{margin:0;padding:0;list-style:none;font-size:.88rem;max-width:none}
.reason li{margin:6px 0;overflow-wrap:anywhere}
.reason li>bdi{color:var(--soft);margin-left:8px}
.steps{list-style:none;padding:0}
.steps pre{margin:6px 0 16px;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(min-content,max-content) 1fr;gap:4px 18px;font-size:.86rem}
dt{color:var(--soft)}
dd{margin:0;color:var(--ink);overflow-wrap:anywhere}
""".strip()
