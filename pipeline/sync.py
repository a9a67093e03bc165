"""`soundshard sync`: by how much a video's sound and pictures are apart; along the video, for many videos, and put right.

One video is judged in this process; many go through Ray (`pipeline.sync_clips`).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs import storage
from configs.load import job_main
from model.segments import class_seconds
from pipeline.isolate import Limits, call
from pipeline.media import MediaError, fetched
from pipeline.progress import bar
from pipeline.shift import CONTAINERS, move_sound
from pipeline.sync_clips import ClipsConfig, judge_clips, judge_options, resolved
from pipeline.sync_judge import Judge
from pipeline.sync_page import clips_html, timeline_html
from pipeline.timeline import CERTAIN, IN_SYNC_SECONDS, Estimate, Timeline, words

BAR_COLUMNS = 40


@dataclass(frozen=True)
class VideoOptions:
    """What becomes of one video's answer."""

    video: str = ""
    """The video to judge: any file or object with pictures and sound."""
    top: int = 5
    """Most probable offsets to print."""
    html: str = ""
    """Also write a page with the timeline (for `source`: with all clips' offsets); it needs no network and runs no script."""
    json: str = ""
    """Also write what was found along one video, as JSON."""
    fix: bool = False
    """Write the video to out=FILE with its sound moved by the offset found. The pictures are copied as they are; `out` keeps the source's ending, or
    takes another container's."""


@dataclass(frozen=True)
class SyncConfig(ClipsConfig, VideoOptions):
    """Options of `soundshard sync`."""


def run(config: SyncConfig) -> Timeline | list[dict[str, Any]]:
    """Say by how much the sound and the pictures of a video are apart. Above 0, the sound is ahead: it comes too early."""
    if bool(config.video) == bool(config.source):
        raise ValueError("give video=FILE, or source=FOLDER (a list, a media dataset) for many; one of the two")
    return one(config) if config.video else many(config)


def many(config: SyncConfig) -> list[dict[str, Any]]:
    """The offsets of many clips, as a parquet file."""
    if config.fix or config.json:
        raise ValueError(f"{'fix=true' if config.fix else 'json=FILE'} takes one video; give video=FILE")
    rows = judge_clips(config)
    if config.html:
        storage.write_bytes(config.html, clips_html(rows, title=f"Sync of {config.source}").encode("utf-8", "backslashreplace"))
        print(f"sync: page in {config.html}", flush=True)
    return rows


def one(config: SyncConfig) -> Timeline:
    """The offset of one video, its timeline, and the video put right."""
    out = _fixed_path(config)
    judge = Judge(replace(judge_options(config), **resolved(config)), Limits(config.clip_seconds, config.clip_memory_mb))
    try:
        source = fetched(config.video)
        timeline = _judged(judge, source)
    except MediaError as error:
        raise ValueError(f"{config.video}: {error}") from None
    estimate = timeline.estimate()
    print("\n".join(report(config.video, timeline, estimate, config.top)), flush=True)
    if config.html:
        storage.write_bytes(config.html, timeline_html(storage.basename(config.video), timeline, estimate).encode("utf-8", "backslashreplace"))
        print(f"sync: page in {config.html}", flush=True)
    if config.json:
        storage.write_bytes(config.json, json.dumps(as_json(config.video, timeline, estimate), indent=1).encode("utf-8", "backslashreplace"))
    if out:
        _fix(source, out, timeline, estimate)
    return timeline


def _judged(judge: Judge, source: str | bytes) -> Timeline:
    """The timeline; on a terminal, a line shows how far it is."""
    with tqdm(desc="sync", unit="s", disable=not sys.stderr.isatty(), leave=False) as line:

        def tell(done: float, of: float) -> None:
            line.total = round(of)
            line.update(round(done) - line.n)

        return judge.judge(source, tell=tell)


def report(name: str, timeline: Timeline, estimate: Estimate, top: int) -> list[str]:
    """What is printed of one video."""
    count, skipped = len(timeline.counted), [fault for fault in timeline.faults if fault]
    windows = f"{count} windows of {timeline.window_seconds:g} s, {timeline.step_seconds:g} s apart" if count > 1 else "one window"
    windows += f" from {timeline.starts_seconds[0]:g} s on" if timeline.starts_seconds[0] else ""
    lines = [f"{name}: {timeline.duration_seconds:.2f} s, {windows}"]
    if skipped:
        lines.append(f"not counted: {', '.join(f'{skipped.count(fault)} {fault}' for fault in sorted(set(skipped)))}")
    if timeline.offset_seconds:
        lines.append(f"its sound was taken {timeline.offset_seconds:+.2f} s later before it was compared (offset_seconds)")
    lines.append("   offset   probability")
    lines += [f"  {seconds:+.2f} s  {p:.4f}  {bar(p, BAR_COLUMNS, _blocks()).rstrip()}" for seconds, p in estimate.top(top)]
    lines.append(f"the sound is {words(estimate.seconds)} ({estimate.seconds:+.2f} s)")
    if count > 1:
        lines.append(f"{estimate.agreement:.0%} of the windows agree to within 0.2 s")
    if count > 1 and estimate.agreement < CERTAIN:
        lines.append("the windows do not agree on one offset: see the timeline (html=FILE)")
    if estimate.synchronisable is not None:
        lines.append(f"that it can be synchronised at all: probability {estimate.synchronisable:.4f}")
    if timeline.repeated:
        lines.append("it is shorter than the 5 s that the network was trained on and was repeated to fill them: this ranks sounds, it is no offset")
    return lines


def _blocks() -> bool:
    try:
        "█▏".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def as_json(name: str, timeline: Timeline, estimate: Estimate) -> dict[str, Any]:
    """The whole answer, for other programs."""
    return {
        "video": name,
        "duration_seconds": timeline.duration_seconds,
        "window_seconds": timeline.window_seconds,
        "offset_seconds_applied": timeline.offset_seconds,
        "repeated": timeline.repeated,
        "offset_seconds": estimate.seconds,
        "best_offset_seconds": class_seconds(estimate.best),
        "agreement": estimate.agreement,
        "synchronisable": estimate.synchronisable,
        "classes_seconds": [class_seconds(index) for index in range(len(estimate.probabilities))],
        "probabilities": estimate.probabilities.tolist(),
        "windows": [
            {
                "start_seconds": float(start),
                "fault": fault or None,
                "probabilities": probabilities.tolist(),
                "synchronisable": None if timeline.synchronisable is None else float(timeline.synchronisable[number]),
            }
            for number, (start, fault, probabilities) in enumerate(zip(timeline.starts_seconds, timeline.faults, timeline.probabilities, strict=True))
        ],
    }


# The video put right


def _fixed_path(config: SyncConfig) -> Path | None:
    """Where the video goes that is put right; None if it is not asked for."""
    if not config.fix:
        if config.out:
            raise ValueError(f"out is {config.out!r}, which a video has only with fix=true; html=FILE and json=FILE keep what was found")
        return None
    if config.short_videos == "repeat":
        raise ValueError("fix=true with short_videos=repeat: what is found in a repeated video is no offset to move its sound by")
    suffix = Path(config.video).suffix
    if not config.out:
        raise ValueError(f"fix=true needs out=FILE, the video to write, such as {Path(config.video).stem}.fixed{suffix}")
    out = storage.only_local(config.out, option="out")
    if out.suffix.lower() not in CONTAINERS:
        raise ValueError(f"out is {config.out!r}, whose ending says no container; expected one of {', '.join(CONTAINERS)}")
    if not storage.is_remote(config.video) and out.resolve() == Path(config.video).resolve():
        raise ValueError(f"out is the video itself, {config.out!r}; give another name")
    return out


def _fix(source: str | bytes, out: Path, timeline: Timeline, estimate: Estimate) -> None:
    """Move the sound by what is left of the offset in the file itself."""
    delay = round(estimate.seconds - timeline.offset_seconds, 3)
    delay = 0.0 if abs(delay) <= IN_SYNC_SECONDS else delay  # finer than the network tells apart
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        moved = call(move_sound, source, out, delay, limits=Limits(clip_seconds=300.0 + timeline.duration_seconds))
    except MediaError as error:
        raise ValueError(f"{out}: the sound cannot be moved: {error}") from None
    what = f"sound moved by {delay:+.3f} s" if delay else "it is in sync, and copied as it is"
    notes = "".join(f"; {note}" for note in moved.notes)
    print(f"sync: {what}; {moved.video_packets} packets of pictures as they were -> {moved.path}{notes}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.sync`."""
    return job_main(SyncConfig, run, argv, command="sync", positional="video")


if __name__ == "__main__":
    sys.exit(main())
