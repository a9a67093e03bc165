import fcntl
import io
import itertools
import os
import pickle
import pty
import random
import re
import struct
import termios
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest
import ray

from pipeline.progress import (
    EXAMPLES,
    NAMES,
    Bucket,
    Metrics,
    Progress,
    RecentRate,
    Snapshot,
    Tally,
    Tick,
    bar,
    duration_text,
    rate_text,
    shortened,
    size_text,
)


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def random_ticks(rng: random.Random, count: int, mean_gap_seconds: float) -> list[tuple[float, Tick]]:
    ticks, now = [], 0.0
    for number in range(count):
        now += rng.expovariate(1 / mean_gap_seconds)
        clips = rng.randrange(0, 6)
        failures = tuple(
            (f"clip{number}-{k}", rng.choice(["timeout", "truncated", "no_audio"]), f"why {number}") for k in range(rng.randint(0, clips))
        )
        seconds = {work: rng.random() for work in rng.sample(["read", "decode", "tower"], 2)}
        ticks.append((now, Tick(clips, failures, seconds, rng.randrange(10**6), rng.choice(["", "node-a", "node-b"]))))
    return ticks


@pytest.mark.parametrize(("gap", "buckets"), [(0.003, 240), (0.7, 7), (97.0, 13), (3001.0, 2)])
def test_tally_agrees_with_a_slow_oracle(gap: float, buckets: int) -> None:
    ticks = random_ticks(random.Random(buckets), 503, gap)
    started = 12345.678
    tally = Tally(started, buckets=buckets)
    for now, tick in ticks:
        tally.add(tick, started + now)
    snapshot = tally.snapshot(started + ticks[-1][0] + 1.5)

    failures = [failure for _, tick in ticks for failure in tick.failures]
    assert snapshot.done == sum(t.clips for _, t in ticks) and snapshot.failed == len(failures) and snapshot.bytes == sum(t.bytes for _, t in ticks)
    assert snapshot.reasons == Counter(reason for _, reason, _ in failures)
    assert snapshot.examples == {
        reason: tuple((key, message) for key, r, message in failures if r == reason)[:EXAMPLES] for reason in set(snapshot.reasons)
    }
    for work in ("read", "decode", "tower"):
        assert snapshot.busy_seconds[work] == pytest.approx(sum(t.seconds.get(work, 0.0) for _, t in ticks))
    for name, node in snapshot.nodes.items():
        mine = [t for _, t in ticks if t.node == name]
        assert (node.clips, node.failed) == (sum(t.clips for t in mine), sum(len(t.failures) for t in mine))
        assert node.busy_seconds == pytest.approx(sum(sum(t.seconds.values()) for t in mine))
    assert set(snapshot.nodes) == {"node-a", "node-b"}
    assert snapshot.elapsed_seconds == pytest.approx(ticks[-1][0] + 1.5)

    assert len(snapshot.buckets) <= buckets
    width, last = snapshot.bucket_seconds, ticks[-1][0]
    assert width == 1.0 or last >= width / 2 * buckets, "no wider than it must be"
    for place, bucket in enumerate(snapshot.buckets):
        inside = [t for now, t in ticks if place * width <= (started + now) - started < (place + 1) * width]
        assert bucket == Bucket(place * width, sum(t.clips for t in inside), sum(len(t.failures) for t in inside), sum(t.bytes for t in inside))
    assert len(pickle.dumps(snapshot)) < 40_000


def test_memory_is_flat_whatever_the_workers_send() -> None:
    tally = Tally(0.0)
    for number in range(2000):
        tally.add(Tick(1, ((f"key{number}", f"reason {number}", "x" * 5000),), {f"work {number}": 1.0}, node=f"node{number}"), number * 100.0)
    snapshot = tally.snapshot(2e5)
    assert len(snapshot.reasons) == len(snapshot.busy_seconds) == len(snapshot.nodes) == NAMES + 1
    assert (
        snapshot.reasons["other"] == 2000 - NAMES and snapshot.nodes["other"].clips == 2000 - NAMES and snapshot.busy_seconds["other"] == 2000 - NAMES
    )
    assert max(len(message) for examples in snapshot.examples.values() for _, message in examples) == 200
    assert len(pickle.dumps(snapshot)) < 60_000


def test_a_snapshot_stays_as_it_is() -> None:
    tally = Tally(0.0)
    tally.add(Tick(3, (("a", "timeout", "m"),), {"read": 1.0}, 7, "n"), 0.5)
    first = tally.snapshot(1.0)
    copy = pickle.loads(pickle.dumps(first))
    tally.add(Tick(2, (("b", "timeout", "m"),), {"read": 1.0}, 7, "n"), 0.7)
    assert first == copy and tally.snapshot(1.0).done == 5
    assert first.buckets == (Bucket(0.0, 3, 1, 7),)


def test_nothing_to_count() -> None:
    snapshot = Tally(5.0).snapshot(5.0)
    assert snapshot == Snapshot() and not snapshot.buckets
    with pytest.raises(AssertionError):
        Tick(1, (("a", "r", ""), ("b", "r", "")))


def test_shortened_is_one_line_of_bounded_length() -> None:
    assert shortened("two\r\nlines\t and  \x0bmore") == "two lines and more"
    assert len(shortened("word " * 99999)) == 200 and shortened("word " * 99).endswith("…") and shortened("x" * 200) == "x" * 200


def snapshot_of(done: int, reasons: dict[str, int] | None = None) -> Snapshot:
    return Snapshot(done=done, failed=sum((reasons or {}).values()), reasons=Counter(reasons or {}))


def test_a_log_gets_plain_lines_now_and_then() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("reencode", 1000, out, clock=clock) as progress:
        for second in range(1, 101):
            clock.now += 1
            progress.update(snapshot_of(5 * second, {"timeout": 2, "truncated": 7} if second > 40 else {}))
            if second == 50:
                progress.note("node 10.0.0.7 does not answer;\x1b[31m its 3 shards are started again")
    lines = out.getvalue().split("\n")
    assert lines == [
        "reencode: after 30 s, 150 of 1,000 clips (15 %), 5.0 clips/s, ETA 2 min 50 s",
        "node 10.0.0.7 does not answer; [31m its 3 shards are started again",
        "reencode: after 1 min 00 s, 300 of 1,000 clips (30 %), 5.0 clips/s, ETA 2 min 20 s, 9 failed: truncated 7, timeout 2",
        "reencode: after 1 min 30 s, 450 of 1,000 clips (45 %), 5.0 clips/s, ETA 1 min 50 s, 9 failed: truncated 7, timeout 2",
        "reencode: 500 of 1,000 clips in 1 min 40 s, 5.0 clips/s, 9 failed: truncated 7, timeout 2",
        "",
    ]


def test_the_interval_can_be_given_and_close_twice_is_one_line() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress("featurise", 3, out, interval_seconds=0.0, clock=clock)
    clock.now += 2.0
    progress.update(snapshot_of(0))
    progress.update(snapshot_of(2))
    clock.now += 2.0
    progress.update(snapshot_of(7))  # a shard that was started again counts its clips again
    progress.close()
    progress.close()
    progress.update(snapshot_of(7))
    assert out.getvalue().splitlines() == [
        "featurise: after 2.0 s, 0 of 3 clips (0 %), starting",
        "featurise: after 2.0 s, 2 of 3 clips (66 %), 1.0 clips/s, ETA 1.0 s",
        "featurise: after 4.0 s, 3 clips (100 %), writing the last shards",
        "featurise: 3 clips in 4.0 s, 0.8 clips/s",
    ]


def test_silent_where_there_is_nothing_to_do() -> None:
    out = io.StringIO()
    progress = Progress("reencode", 0, out, interval_seconds=0.0)
    progress.update(snapshot_of(0))
    progress.close()
    assert out.getvalue() == ""


def test_the_rate_is_that_of_the_recent_minute() -> None:
    rate = RecentRate(0.0)
    for second in range(1, 1001):
        rate.update(float(second), 10 * second)
    assert rate.per_second(1000.0) == pytest.approx(10, rel=0.01)
    for second in range(1001, 1062):  # half of the cluster goes
        rate.update(float(second), 10_000 + 5 * (second - 1000))
    assert rate.per_second(1061.0) == pytest.approx(5, rel=0.02)
    for step in range(100_000):  # however often it is asked
        rate.update(1061.0 + step / 100, 10_305 + step)
    assert len(rate._points) < 200


def test_a_stall_slows_the_rate_is_told_and_is_forgotten_afterwards() -> None:
    rate = RecentRate(0.0)
    for second in range(1, 121):
        rate.update(float(second), second)
    assert rate.silent_seconds(121.0) == 0
    rates = []
    for second in range(121, 421):
        rate.update(float(second), 120)
        rates.append(rate.per_second(float(second)))
    assert all(b < a for a, b in itertools.pairwise(rates)) and 0 < rates[-1] < 0.2
    assert rate.silent_seconds(420.0) == 300 and rate.silent_seconds(170.0) == 0
    for second in range(421, 482):
        rate.update(float(second), 120 + 3 * (second - 420))
    assert rate.per_second(481.0) == pytest.approx(3, rel=0.02) and rate.silent_seconds(481.0) == 0


def test_rare_clips_have_a_rate_too_and_silence_between_them_is_usual() -> None:
    rate = RecentRate(0.0)
    for number in range(1, 20):  # one clip in 100 s
        for second in range(100):
            rate.update(100.0 * number + second, number)
            assert rate.silent_seconds(100.0 * number + second) == 0
    assert rate.per_second(1900.0) == pytest.approx(0.01, rel=0.15)
    assert rate.silent_seconds(2400.0) == 500


def test_counts_that_begin_again_do_not_give_a_negative_rate() -> None:
    rate = RecentRate(0.0)
    rate.update(30.0, 300)
    rate.update(31.0, 5)
    rate.update(41.0, 105)
    assert rate.per_second(41.0) == pytest.approx(10)


@contextmanager
def terminal(columns: int, encoding: str = "utf-8") -> Iterator[tuple[int, TextIO]]:
    """The far end of a pseudo terminal, and a text file that writes to it."""
    far, near = pty.openpty()
    fcntl.ioctl(near, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(near, "w", encoding=encoding) as out:
        yield far, out
    os.close(far)


def received(far: int, out: TextIO) -> str:
    """All that came since the last time. The kernel hands it over piece by piece when it has the time, so a mark behind it says where it ends."""
    os.write(out.fileno(), b"\0")
    text = b""
    while not text.endswith(b"\0"):
        text += os.read(far, 65536)
    return text[:-1].decode(out.encoding)


def displayed(text: str) -> list[str]:
    """What a terminal would show, for the three controls that are used."""
    lines, column = [""], 0
    for part in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
            column = 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    return lines


@pytest.mark.parametrize("columns", [200, 80, 47, 20, 5])
def test_a_terminal_gets_one_line_that_fits(columns: int) -> None:
    clock = Clock()
    with terminal(columns) as (far, out):
        progress = Progress("reencode", 200_000, out, clock=clock)
        text, shown = received(far, out), [""]
        for second in range(1, 101):
            clock.now += 1
            progress.update(snapshot_of(1234 * second, {"truncated": 30 * second, "timeout": second, "no_audio": 7} if second > 20 else {}))
            text += received(far, out)
            shown = displayed(text)
            assert len(shown) == 1 and 0 < len(shown[0]) < columns
            if second == 50:
                before = shown[0]
                progress.note("node 10.0.0.7 does not answer; its 3 shards are started again")
                shown = displayed(text + received(far, out))
                assert shown[0].startswith("node 10.0.0.7") and shown[1] == before and len(shown) == 2
        assert shown[0].startswith("reencode  61 %" if columns > 15 else "reen")
        if columns == 200:
            assert re.search(r" \|█{18}▌ {11}\|  .* 3,107 failed: truncated 3,000, timeout 100, no_audio 7$", shown[0])
        if columns >= 80:
            assert "  123,400/200,000  1,234 clips/s  ETA 1 min 02 s  3,107 failed" in shown[0]
        progress.close()
        shown = displayed(text + received(far, out))
        assert shown == [
            "reencode: 123,400 of 200,000 clips in 1 min 40 s, 1,234 clips/s, 3,107 failed: truncated 3,000, timeout 100, no_audio 7",
            "",
        ]


def test_a_terminal_is_not_redrawn_more_often_than_a_person_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with terminal(80) as (far, out):
        progress = Progress("reencode", 10_000, out, clock=clock)
        for tick in range(1, 1001):
            clock.now += 0.01
            progress.update(snapshot_of(tick))
        assert 40 <= received(far, out).count("\r") <= 51
        monkeypatch.setenv("TERM", "dumb")
        Progress("reencode", 10_000, out, clock=clock)
        assert received(far, out) == ""


def test_a_terminal_without_blocks() -> None:
    with terminal(80, encoding="ascii") as (far, out):
        clock = Clock()
        progress = Progress("reencode", 10, out, clock=clock)
        clock.now += 1
        progress.update(snapshot_of(5))
        progress.note("back → there")
        assert "|###############---------------|" in received(far, out)


def test_texts() -> None:
    assert [duration_text(s) for s in (0.0, 0.04, 9.94, 9.96, 59.4, 59.6, 725.0, 3599.6, 16140.0, 86399.0, 273600.0)] == [
        "0.0 s", "0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "12 min 05 s", "1 h 00 min", "4 h 29 min", "1 d 0 h", "3 d 4 h",
    ]  # fmt: skip
    assert [rate_text(r) for r in (1234.5, 99.96, 12.34, 0.2, 0.1, 0.001, 0.0)] == [
        "1,234 clips/s", "100 clips/s", "12.3 clips/s", "0.2 clips/s", "6.0 clips/min", "3.6 clips/h", "0 clips/s",
    ]  # fmt: skip
    assert [size_text(s) for s in (0, 999, 1000, 999_700, 312_400_000_000, 4.2e12)] == ["0 B", "999 B", "1.0 kB", "1.0 MB", "312.4 GB", "4.2 TB"]
    assert [bar(f, 4) for f in (0.0, 0.25, 0.3, 1.0)] == ["    ", "█   ", "█▏  ", "████"] and bar(0.6, 5, blocks=False) == "###--"


@pytest.mark.usefixtures("ray_cluster")
def test_rays_metrics_show_at_the_node() -> None:
    metrics, again = Metrics("watched"), Metrics("watched")  # a process may run a stage twice
    metrics.observe(Tick(7, (("a", "timeout", ""), ("b", "timeout", ""), ("c", "no_audio", "")), {"decode": 2.5, "read": 0.0}, 1000))
    again.observe(Tick(4, (), {"decode": 1.0}, 234))
    again.observe(Tick(0))
    again.shards(in_flight=3, to_do=11)
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    expected = {
        ("ray_soundshard_clips_total", "outcome", "ok"): 8,
        ("ray_soundshard_clips_total", "outcome", "failed"): 3,
        ("ray_soundshard_failures_total", "reason", "timeout"): 2,
        ("ray_soundshard_failures_total", "reason", "no_audio"): 1,
        ("ray_soundshard_bytes_total", "stage", "watched"): 1234,
        ("ray_soundshard_busy_seconds_total", "work", "decode"): 3.5,
        ("ray_soundshard_seconds_per_clip_count", "work", "decode"): 2,
        ("ray_soundshard_shards_in_flight", "stage", "watched"): 3,
        ("ray_soundshard_shards_to_do", "stage", "watched"): 11,
    }
    found: dict[tuple[str, str, str], float] = {}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and {name: found.get(name) for name in expected} != expected:
        time.sleep(0.5)
        for name, labels, value in exported(address):
            found |= {(name, label, content): value for label, content in labels.items() if labels.get("stage") == "watched"}
    assert {name: found.get(name) for name in expected} == expected
    assert not any(content == "read" for _, _, content in found), "no time, no series"


def exported(address: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of this project's series; none while the node has not opened its port."""
    try:
        text = urllib.request.urlopen(address, timeout=5).read().decode()
    except OSError:
        return
    for line in text.splitlines():
        if match := re.fullmatch(r"(ray_soundshard\w+)\{(.*)\} (\S+)", line):
            yield match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2])), float(match[3])
