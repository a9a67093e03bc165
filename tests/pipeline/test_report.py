import itertools
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.progress import NodeWork, Snapshot, Tally, Tick
from pipeline.report import StageReport, chart_columns, installed_versions, next_steps, report_html, throughput_html, write_report
from tests.pipeline.test_page import Checker

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "ملف \u202etxt.exe",
    "🎬👨\u200d👩\u200d👧 clip",
    "bell\x07 null\x00 escape\x1b[31m",
    "not utf-8: \udcff",
    "&amp; 'quoted' \\u0041",
    "x" * 199,
)


def ran(clips: int, *, seconds: float, failures: dict[str, int] | None = None, chunk: int = 3, seed: int = 0) -> Snapshot:
    """The tally of a run with failures here and there."""
    rng = random.Random(seed)
    reasons = [reason for reason, count in (failures or {}).items() for _ in range(count)] + [None] * (clips - sum((failures or {}).values()))
    rng.shuffle(reasons)
    tally = Tally(0.0)
    for start, now in zip(range(0, clips, chunk), sorted(rng.uniform(0, seconds) for _ in range(0, clips, chunk)), strict=True):
        part = reasons[start : start + chunk]
        failed = tuple((f"key{start}-{k}", reason, f"message {start}") for k, reason in enumerate(part) if reason)
        tally.add(Tick(len(part), failed, {"decode": 0.2 * len(part), "tower": 0.1 * len(part)}, 1000 * len(part)), now)
    return tally.snapshot(seconds)


def stage(snapshot: Snapshot, **fields: Any) -> StageReport:
    """A stage in which nothing is unusual."""
    done = {"total": snapshot.done, "done_before": 0, "wall_seconds": snapshot.elapsed_seconds}
    return StageReport(
        **{
            **{"name": "featurise", "snapshot": snapshot, "workers": 2, "actors": 2, "device": "cpu"},
            **{"out": "data/features", "fingerprint": "0123456789abcdef", "options": {}, **done, **fields},
        }
    )


class Attributes(HTMLParser):
    """Every element's name and attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def check(html: str) -> Attributes:
    """The page nests properly, asks for nothing from elsewhere and runs nothing."""
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == [] and checker.addresses == []
    found = Attributes(html)
    assert not {"script", "img", "iframe", "link", "object", "embed", "form", "base"} & {tag for tag, _ in found.elements}
    assert not [
        name for _, attributes in found.elements for name in attributes if name.startswith("on") or name in ("src", "href", "srcset", "action")
    ]
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"https?:|@import|url\(", style)
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_what_comes_from_outside_stays_text(tmp_path: Path, text: str) -> None:
    snapshot = Snapshot(
        60.0, 7, 1, 10, Counter({text: 1}), {text: ((text, text),)}, {text: 1.0}, {text: NodeWork(7, 1, 2.0)}, buckets=ran(7, seconds=60.0).buckets
    )
    report = stage(snapshot, name=text, out=text, fingerprint=text, device=text, options={text: {"inner": text}})
    write_report(tmp_path / "report.html", [report], "soundshard prepare", command=text, versions={text: text})
    html = (tmp_path / "report.html").read_bytes().decode("utf-8")
    check(html)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)
    shown = re.sub("[\x00-\x1f\u202e]", "\ufffd", text).replace("\udcff", "\\udcff")
    example = re.search(r"<li><code><bdi>(.*?)</bdi></code> <bdi>(.*?)</bdi></li>", html)
    assert example is not None
    assert [Attributes(part).text for part in example.groups()] == [shown, shown]


def test_the_page_says_what_was_done(tmp_path: Path) -> None:
    first = stage(ran(101, seconds=50.0, failures={"no_audio": 4, "timeout": 2}), name="reencode", out="data/media", actors=0, workers=3)
    second = stage(
        ran(67, seconds=40.0, failures={"crashed": 1}),
        total=101, done_before=30, actors=4, workers=4, device="cuda", ok=95, failed=6, restarted=5,
        options={"tower": {"device": "cuda", "threads": 2}, "listing": None, "fused": False},
    )  # fmt: skip
    write_report(str(tmp_path / "deep" / "report.html"), [first, second], "soundshard prepare", command="soundshard prepare source=a out=data")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    found = check((tmp_path / "deep" / "report.html").read_text())
    text = " ".join(found.text.split())
    for expected in (
        "stopped before its end",
        "101 clips, 30 of them before this run; this run took 1 min 30 s.",
        "95clips made in this run",
        "6failed (5.9 %)",
        "2.0 clips/sover 50 s on 3 workers",
        "66clips made in this run",
        "1failed (1.5 %)",
        "67.0 kBwritten, 1.0 kB a clip",
        "5pieces of work started again",
        # 67 clips of 0.1 s in the tower, 4 processes for 40 s
        "4.2 %GPU busy: tower and codec in the time of 4 GPU processes",
        "not done 4",
        "In the whole dataset 95 clips are good and 6 failed.",
        "no_audio4 of 6",
        "soundshard inspect data/media",
        "soundshard prepare source=a out=data retry_failed=true reasons=crashed,timeout clip_seconds=900",
        "tower.devicecuda",
        "listingnull",
        "fusedfalse",
        f"ray{installed_versions()['ray']}",
    ):
        assert expected in text, expected
    assert "soundshard train" not in text, "not before all is done"


def bar_widths(found: Attributes) -> dict[str, float]:
    """Percents of the bars' parts by class."""
    parts = [(attributes.get("class") or "", attributes.get("style") or "") for tag, attributes in found.elements if tag == "i"]
    return {kind: float(re.findall(r"width:([\d.]+)%", style)[0]) for kind, style in parts if style}


def test_time_is_shared_out() -> None:
    report = stage(ran(50, seconds=20.0))  # 10 s decoding and 5 s in the tower, of 2 x 20 s
    assert report.network_busy == pytest.approx(0.125)
    found = check(report_html([report], "t"))
    widths = bar_widths(found)
    assert widths == {"ok": 100.0, "decode": 25.0, "tower": 12.5, "left": 62.5}
    assert "waiting 25 s" in found.text and "networks busy" in found.text
    # With decoding beside the networks the work may add up to more than the workers' time; then nothing waits.
    busy = check(report_html([stage(ran(50, seconds=20.0), workers=1, actors=1, wall_seconds=10.0)], "t"))
    widths = bar_widths(busy)
    assert set(widths) == {"ok", "decode", "tower"} and widths["decode"] + widths["tower"] == pytest.approx(100, abs=0.01)
    assert "waiting" not in busy.text and "100 %" in busy.text


def test_the_audio_tower_is_a_network_too() -> None:
    tally = Tally(0.0)
    tally.add(Tick(7, (), {"tower": 1.0, "audio": 2.5}, 700), 1.0)
    report = stage(tally.snapshot(10.0), total=7, workers=1, actors=1, wall_seconds=10.0)
    assert report.network_busy == pytest.approx(0.35)
    found = check(report_html([report], "t"))
    assert bar_widths(found) == {"ok": 100.0, "tower": 10.0, "audio": 25.0, "left": 65.0}
    assert "busy: tower, audio tower and codec in the time" in " ".join(found.text.split())


@pytest.mark.parametrize(
    ("clips", "seconds", "failed"), [(7, 3.0, 1), (11, 3.7, 11), (101, 61.3, 0), (1009, 240.0, 13), (997, 241.0, 997), (5003, 17_777.7, 101)]
)
def test_the_chart_loses_nothing(clips: int, seconds: float, failed: int) -> None:
    snapshot = ran(clips, seconds=seconds, failures={"timeout": failed})
    columns = chart_columns(snapshot)
    assert (sum(c.clips for c in columns), sum(c.failed for c in columns)) == (clips, failed)
    assert sum(c.bytes for c in columns) == snapshot.bytes and len(columns) <= 121
    assert columns[0].start_seconds == 0 and columns[-1].stop_seconds == pytest.approx(seconds)
    assert all(a.stop_seconds == b.start_seconds for a, b in itertools.pairwise(columns))

    # The drawn areas are the clips again.
    html = throughput_html(snapshot)
    top = max(float(tick) for tick in re.findall(r'<span style="bottom:[\d.]+%">([\d.e+]+)</span>', html))
    area = {"ok": 0.0, "failed": 0.0}
    for kind, y, width, height in re.findall(r'<rect class="(ok|failed)" x="[\d.]+" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', html):
        assert float(y) + float(height) <= 112.01
        if float(y) < 101:
            area[kind] += float(width) / 0.9 / 1000 * seconds * float(height) / 100 * top
    assert area["ok"] == pytest.approx(clips - failed, rel=0.02, abs=0.02 * clips)
    assert area["failed"] == pytest.approx(failed, rel=0.05, abs=0.02 * clips)
    assert html.count("<title>") == len(columns) + 1


def test_a_silence_after_the_last_clip_is_drawn() -> None:
    snapshot = replace(ran(300, seconds=60.0), elapsed_seconds=600.0)
    assert chart_columns(snapshot)[-1].stop_seconds == 600 and sum(c.clips for c in chart_columns(snapshot)) == 300


@pytest.mark.parametrize(
    "report",
    [
        stage(Snapshot(), workers=0, actors=0),
        stage(Snapshot(), total=5),
        stage(ran(1, seconds=0.0), wall_seconds=0.0),
        stage(ran(1, seconds=4.0)),
        stage(ran(5, seconds=1e-9)),
        stage(ran(9, seconds=3.0, failures={"missing": 9})),
        stage(ran(20_011, seconds=1e6, failures={"timeout": 1}, chunk=97), total=200_000, done_before=179_989),
        stage(ran(40, seconds=9.0), total=30),  # a shard that was started again counts its clips again
    ],
)
def test_unusual_runs_have_a_page_too(report: StageReport) -> None:
    found = check(report_html([report], "soundshard featurise"))
    assert not re.search(r"\b(nan|inf|None)\b|-\d+ clip|e[+-]\d\d", found.text.split("What next")[0].split("Options")[0].split("}")[-1])
    for _, attributes in found.elements:
        for width in re.findall(r"(?:width|left|bottom):(-?[\d.]+)%", attributes.get("style") or ""):
            assert 0 <= float(width) <= 100.001


def test_no_stage_at_all() -> None:
    assert "There was nothing to do." in check(report_html([], "t")).text


def test_what_to_do_next() -> None:
    done = stage(ran(9, seconds=3.0))
    assert [command for _, command in next_steps([done], "")] == ["soundshard train data=data/features out=runs/first"]
    media = replace(done, name="reencode", out="data/media")
    assert [command for _, command in next_steps([media], "")] == ["soundshard featurise data=data/media out=features"]
    broken = stage(ran(9, seconds=3.0, failures={"no_audio": 2}))
    assert [command.split()[1] for _, command in next_steps([broken], "soundshard featurise a=b")] == ["inspect", "train"]
    failed = stage(ran(9, seconds=3.0, failures={"out_of_memory": 9}))
    commands = [command for _, command in next_steps([failed], "soundshard featurise a=b")]
    assert commands == ["soundshard inspect data/features", "soundshard featurise a=b retry_failed=true reasons=out_of_memory clip_memory_mb=8192"]
    stopped = stage(ran(9, seconds=3.0), total=10)
    assert [command for _, command in next_steps([stopped], "soundshard featurise a=b")] == ["soundshard featurise a=b"]
    earlier = stage(ran(9, seconds=3.0), ok=5, failed=4)
    assert [command.split()[1] for _, command in next_steps([earlier], "")] == ["inspect", "train"]
