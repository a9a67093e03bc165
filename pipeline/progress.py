"""How far a stage is: ticks from its workers are tallied, shown on a terminal or in a log, and given to Ray's metrics.

Knows neither shards nor media nor who does the work. What it counts is for people to watch; the ledgers are the record.
"""

import os
import re
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from ray.util import metrics

EXAMPLES = 3
"""Failed clips that are kept for each reason."""
MESSAGE_LENGTH = 200
"""Characters of a failure's message that are kept."""
BUCKETS = 240
"""Most points of the throughput over time."""
NAMES = 64
"""Most reasons, kinds of work or nodes that are told apart; what comes after them is counted as `other`."""
OTHER = "other"
RECENT_SECONDS = 60.0
RECENT_CLIPS = 8
"""The recent rate looks back this many seconds, and further if so few clips came in them."""


@dataclass(frozen=True)
class Tick:
    """What a worker reports when clips came to their end."""

    clips: int
    """Good and failed ones."""
    failures: tuple[tuple[str, str, str], ...] = ()
    """(key, reason, message) of those among them that failed."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Busy seconds by kind of work: read, decode, encode, tower, audio, codec, write."""
    bytes: int = 0
    """Written."""
    node: str = ""
    """The machine that did it, if that is to be told apart."""

    def __post_init__(self) -> None:
        assert len(self.failures) <= self.clips or not self.clips, "more failures than clips"


class Bucket(NamedTuple):
    """What ended in one stretch of time."""

    start_seconds: float
    clips: int
    failed: int
    bytes: int


@dataclass(frozen=True)
class NodeWork:
    """A machine's share."""

    clips: int
    failed: int
    busy_seconds: float


@dataclass(frozen=True)
class Snapshot:
    """A tally at an instant; small, however long the run."""

    elapsed_seconds: float = 0.0
    done: int = 0
    """Clips, good and failed."""
    failed: int = 0
    bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """The first few (key, message) by reason."""
    busy_seconds: Mapping[str, float] = field(default_factory=dict)
    """By kind of work, summed over all workers."""
    nodes: Mapping[str, NodeWork] = field(default_factory=dict)
    bucket_seconds: float = 1.0
    buckets: tuple[Bucket, ...] = ()
    """Side by side from 0, each `bucket_seconds` long; the last one may still be filling."""


class Tally:
    """Sums ticks in memory that does not grow with their number."""

    def __init__(self, started: float | None = None, *, buckets: int = BUCKETS) -> None:
        assert buckets >= 2
        self._started = time.monotonic() if started is None else started
        self._limit, self._width = buckets, 1.0
        self._buckets: list[Bucket] = []
        self._done = self._failed = self._bytes = 0
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, list[tuple[str, str]]] = {}
        self._seconds: dict[str, float] = {}
        self._nodes: dict[str, NodeWork] = {}

    def add(self, tick: Tick, now: float | None = None) -> None:
        """Count a tick that came at `now` (by time.monotonic, as `started`)."""
        failed = len(tick.failures)
        self._done, self._failed, self._bytes = self._done + tick.clips, self._failed + failed, self._bytes + tick.bytes
        for key, reason, message in tick.failures:
            reason = _known(reason, self._reasons)
            self._reasons[reason] += 1
            examples = self._examples.setdefault(reason, [])
            if len(examples) < EXAMPLES:
                examples.append((shortened(key), shortened(message)))
        for work, seconds in tick.seconds.items():
            work = _known(work, self._seconds)
            self._seconds[work] = self._seconds.get(work, 0.0) + seconds
        if tick.node:
            name = _known(tick.node, self._nodes)
            node = self._nodes.get(name, NodeWork(0, 0, 0.0))
            self._nodes[name] = NodeWork(node.clips + tick.clips, node.failed + failed, node.busy_seconds + sum(tick.seconds.values()))
        self._count(tick.clips, failed, tick.bytes, self._elapsed(now))

    def _elapsed(self, now: float | None) -> float:
        return max(0.0, (time.monotonic() if now is None else now) - self._started)

    def _count(self, clips: int, failed: int, size: int, elapsed: float) -> None:
        buckets = self._buckets
        while elapsed >= self._width * self._limit:  # twice as wide, half as many: nothing is lost but sharpness
            self._width *= 2
            buckets[:] = [_merged(buckets[place : place + 2]) for place in range(0, len(buckets), 2)]
        place = int(elapsed / self._width)
        buckets += [Bucket(empty * self._width, 0, 0, 0) for empty in range(len(buckets), place + 1)]
        buckets[place] = _merged([buckets[place], Bucket(elapsed, clips, failed, size)])

    def snapshot(self, now: float | None = None) -> Snapshot:
        """The sums so far, as a value that later ticks leave alone."""
        return Snapshot(
            elapsed_seconds=self._elapsed(now),
            done=self._done,
            failed=self._failed,
            bytes=self._bytes,
            reasons=Counter(self._reasons),
            examples={reason: tuple(examples) for reason, examples in self._examples.items()},
            busy_seconds=dict(self._seconds),
            nodes=dict(self._nodes),
            bucket_seconds=self._width,
            buckets=tuple(self._buckets),
        )


def _merged(buckets: Sequence[Bucket]) -> Bucket:
    return Bucket(buckets[0].start_seconds, sum(b.clips for b in buckets), sum(b.failed for b in buckets), sum(b.bytes for b in buckets))


def _known(name: str, names: Mapping[str, object]) -> str:
    return name if name in names or len(names) < NAMES else OTHER


def shortened(text: str, length: int = MESSAGE_LENGTH) -> str:
    """The text in one line of at most `length` characters."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"


@runtime_checkable
class Screen(Protocol):
    """What progress is shown on: a text file, such as sys.stderr."""

    @property
    def encoding(self) -> str | None: ...
    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...
    def fileno(self) -> int: ...


class Progress:
    """Shows a stage's snapshots: on a terminal as one redrawn line, elsewhere as a plain line now and then and one at the end.

    Silent where there is nothing to do. Rate and time left are those of the recent minute, so that they follow nodes that come and go.
    """

    def __init__(
        self, stage: str, total: int, out: Screen | None = None, *, interval_seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stage, self._total, self._out, self._clock = stage, total, out or sys.stderr, clock
        self._terminal = self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._interval = interval_seconds if interval_seconds is not None else 0.2 if self._terminal else 30.0
        self._started = self._shown = clock()
        self._snapshot, self._rate, self._closed = Snapshot(), RecentRate(self._started), False
        if self._terminal and total:
            self._draw()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, snapshot: Snapshot) -> None:
        """Take a newer snapshot; shown when it is time again."""
        now = self._clock()
        self._snapshot = snapshot
        self._rate.update(now, self._done)
        if self._total and not self._closed and now - self._shown >= self._interval:
            self._shown = now
            if self._terminal:
                self._draw()
            else:
                self._print(f"{self._stage}: after {duration_text(now - self._started)}, {', '.join(self._parts(now))}")

    def note(self, text: str) -> None:
        """Print a line of its own without breaking the bar."""
        self._print(("\r\x1b[K" if self._drawn else "") + _printable(text))
        if self._drawn:
            self._draw()

    def close(self) -> None:
        """Show how it ended; whether all was done, the counts tell."""
        if self._closed:
            return
        seconds = self._clock() - self._started
        line = f"{self._stage}: {self._counts()} in {duration_text(seconds)}"
        line += f", {rate_text(self._done / seconds)}" if self._done and seconds > 0 else ""
        line += f", {self._failures(len(self._snapshot.reasons))}" if self._snapshot.failed else ""
        if self._total:
            self._print(("\r\x1b[K" if self._drawn else "") + line)
        self._closed = True

    @property
    def _done(self) -> int:
        return min(self._snapshot.done, self._total)  # a shard that is started again counts its clips again

    @property
    def _drawn(self) -> bool:
        return self._terminal and bool(self._total) and not self._closed

    def _counts(self) -> str:
        return f"{self._total:,} clips" if self._done == self._total else f"{self._done:,} of {self._total:,} clips"

    def _failures(self, most: int) -> str:
        """`37 failed: truncated 25, timeout 12`, the most frequent first."""
        reasons = sorted(self._snapshot.reasons.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join([f"{reason} {count:,}" for reason, count in reasons[:most]] + (["..."] if most < len(reasons) else []))
        return f"{self._snapshot.failed:,} failed{f': {named}' if most and reasons else ''}"

    def _pace(self, now: float) -> list[str]:
        """Rate and time left, or what to say in their place."""
        if self._done == self._total:
            return ["writing the last shards"]
        rate = self._rate.per_second(now)
        if silent := self._rate.silent_seconds(now):
            return [f"no clip for {duration_text(silent)}"]
        return [rate_text(rate), f"ETA {duration_text((self._total - self._done) / rate)}"] if rate else ["starting"]

    def _parts(self, now: float) -> list[str]:
        failures = [self._failures(len(self._snapshot.reasons))] if self._snapshot.failed else []
        return [f"{self._counts()} ({_percent(self._done, self._total)})", *self._pace(now), *failures]

    def _draw(self) -> None:
        width = terminal_width(self._out) - 1  # the last column would wrap on some terminals
        line = self._fitted(width, _encodes(self._out, "█▏"))
        self._out.write(f"\r{line}\x1b[K")
        self._out.flush()

    def _fitted(self, width: int, blocks: bool) -> str:
        """The line with as much detail as fits: fewer reasons first, then no bar, then no rate."""
        pace, failed = self._pace(self._clock()), bool(self._snapshot.failed)
        head, counts = f"{self._stage} {_percent(self._done, self._total):>5}", f"{self._done:,}/{self._total:,}"
        failures = [[self._failures(most)] for most in range(len(self._snapshot.reasons), -1, -1)] if failed else [[]]
        for tail in ("  ".join([counts, *pace, *parts]) for parts in failures):
            if (room := width - len(head) - len(tail) - 5) >= 8:
                return f"{head} |{bar(self._done / self._total, min(room, 30), blocks)}|  {tail}"
        for parts in ([*pace, *failures[-1]], pace, pace[-1:]):
            if len(line := "  ".join([head, counts, *parts])) <= width:
                return line
        return f"{head}  {counts}"[: max(1, width)]

    def _print(self, line: str) -> None:
        self._out.write(line.encode(self._out.encoding or "utf-8", "backslashreplace").decode(self._out.encoding or "utf-8") + "\n")
        self._out.flush()


class RecentRate:
    """Clips per second over the recent past, from counts that are looked at now and then."""

    def __init__(self, now: float) -> None:
        self._points: deque[tuple[float, int]] = deque([(now, 0)])
        self._last_change = now

    def update(self, now: float, done: int) -> None:
        """Take the count at an instant."""
        points = self._points
        if done < points[-1][1]:  # who counts began again
            points.clear()
            points.append((now, done))
        if done > points[-1][1]:
            self._last_change = now
            # Half a second apart, so that a minute of them is a bounded number.
            if len(points) > 1 and now - points[-2][0] < 0.5:
                points.pop()
            points.append((now, done))
        while len(points) > 1 and now - points[1][0] >= RECENT_SECONDS and points[-1][1] - points[1][1] >= RECENT_CLIPS:
            points.popleft()

    def per_second(self, now: float) -> float:
        """The rate since the oldest count that is looked back to; it falls while nothing comes."""
        then, done = self._points[0]
        return (self._points[-1][1] - done) / (now - then) if now > then else 0.0

    def silent_seconds(self, now: float) -> float:
        """For how long nothing came, if that is unusually long; else 0."""
        (then, first), (_, last) = self._points[0], self._points[-1]
        silent = now - self._last_change
        usual = (self._last_change - then) / (last - first) if last > first else 0.0
        return silent if silent >= max(RECENT_SECONDS, 4 * usual) and last else 0.0


class Metrics:
    """A stage's ticks as Ray metrics, which every node exports for Prometheus and the dashboard (as `ray_soundshard_...`).

    Belongs into a process of Ray's (an actor); what is observed shows after Ray's report interval, ten seconds by default.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._clips = metrics.Counter("soundshard_clips_total", "Clips that came to their end.", ("stage", "outcome"))
        self._failures = metrics.Counter("soundshard_failures_total", "Failed clips by reason.", ("stage", "reason"))
        self._bytes = metrics.Counter("soundshard_bytes_total", "Bytes written.", ("stage",))
        self._busy = metrics.Counter("soundshard_busy_seconds_total", "Seconds spent, summed over workers.", ("stage", "work"))
        bounds = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
        self._per_clip = metrics.Histogram("soundshard_seconds_per_clip", "Seconds spent on a clip.", bounds, ("stage", "work"))
        self._in_flight = metrics.Gauge("soundshard_shards_in_flight", "Shards that are worked on.", ("stage",))
        self._to_do = metrics.Gauge("soundshard_shards_to_do", "Shards that are not committed yet, those in flight included.", ("stage",))

    def observe(self, tick: Tick) -> None:
        """Count a tick."""
        stage = {"stage": self._stage}
        # Ray's counters refuse zero.
        for outcome, clips in (("ok", tick.clips - len(tick.failures)), ("failed", len(tick.failures))):
            if clips > 0:
                self._clips.inc(clips, {**stage, "outcome": outcome})
        for reason, clips in Counter(reason for _, reason, _ in tick.failures).items():
            self._failures.inc(clips, {**stage, "reason": reason})
        if tick.bytes > 0:
            self._bytes.inc(tick.bytes, stage)
        for work, seconds in tick.seconds.items():
            if seconds > 0:
                self._busy.inc(seconds, {**stage, "work": work})
            if seconds > 0 and tick.clips:
                self._per_clip.observe(seconds / tick.clips, {**stage, "work": work})

    def shards(self, *, in_flight: int, to_do: int) -> None:
        """Set how many shards are open, and how many are not committed yet."""
        self._in_flight.set(in_flight, {"stage": self._stage})
        self._to_do.set(to_do, {"stage": self._stage})


def bar(fraction: float, width: int, blocks: bool = True) -> str:
    """A bar of `width` characters, in eighths of one where the terminal can show blocks."""
    if not blocks:
        return ("#" * int(fraction * width)).ljust(width, "-")
    whole, eighths = divmod(int(fraction * width * 8), 8)
    return ("█" * whole + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")).ljust(width)


def terminal_width(out: Screen) -> int:
    """Columns of the terminal that `out` writes to; 80 where it does not say."""
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except OSError:
        return shutil.get_terminal_size().columns


def duration_text(seconds: float) -> str:
    """`45 s`, `12 min 05 s`, `4 h 29 min`, `3 d 4 h`; below ten seconds with a tenth."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} d {hours % 24} h"


def rate_text(clips_per_second: float) -> str:
    """Clips per second, or per minute or hour where they are rare."""
    for factor, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if clips_per_second * factor >= 0.2 or clips_per_second == 0 or unit == "h":
            rate = clips_per_second * factor
            return f"{rate:,.0f} clips/{unit}" if rate >= 99.95 or rate == 0 else f"{rate:.1f} clips/{unit}"
    raise AssertionError


def size_text(size: int | float) -> str:
    """Bytes in decimal units."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def _percent(part: int, whole: int) -> str:
    """Whole percents, of which 100 means all."""
    return f"{100 * part // whole if whole else 100} %"


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor or change its colours."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]+", " ", text)


def _encodes(out: Screen, text: str) -> bool:
    try:
        text.encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
