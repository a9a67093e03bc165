"""`soundshard reencode`: clips -> media shards. Decides what a media record holds; how a clip is decoded and encoded is `pipeline.media`'s matter."""

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import av

from configs import storage
from configs.load import job_main, to_plain
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.isolate import Limits, call
from pipeline.job import JobOptions, Summary, carry_out, finish, open_dataset, settle_plan
from pipeline.media import EncodeConfig, EncodedClip, MediaError, fetched, reencode
from pipeline.progress import Tick
from pipeline.ray_loop import Cluster, Stage, cluster
from pipeline.report import StageReport
from pipeline.workers import Payload, Tasks, failed_entry
from shards.dataset import DatasetInfo, new_info
from shards.write import Entry, json_bytes


@dataclass(frozen=True)
class MediaOptions:
    """What decides the media shards' bytes."""

    encode: EncodeConfig = field(default_factory=EncodeConfig)
    clips_per_shard: int = 64
    """Input clips in one shard, good and bad: the unit of commit and resume. 64 VGGSound clips are about 100 MB."""


@dataclass(frozen=True)
class ReencodeConfig(MediaOptions, JobOptions, DiscoverConfig):
    """Options of `soundshard reencode`."""

    out: str = "???"
    """The media dataset: a folder, or a prefix in an object store (`s3://bucket/prefix`)."""


def run(config: ReencodeConfig) -> Summary:
    """Re-encode clips into media shards: H.264 and AAC on one clock, one ledger row per input."""
    with cluster(config.ray) as ray_cluster:
        summary, report = run_stage(config, ray_cluster)
    finish(summary, [report] if report else [], stage="reencode", out=config.out, max_failed_fraction=config.max_failed_fraction)
    return summary


def run_stage(config: ReencodeConfig, ray_cluster: Cluster) -> tuple[Summary, StageReport | None]:
    """The job without its last words."""
    out = storage.absolute(config.out)
    open_dataset(out, media_info(config), overwrite=config.overwrite)
    plan = settle_plan(out, discover, config, config=config, clips_per_shard=config.clips_per_shard)
    # An encode takes seconds, a call milliseconds: one clip a task, so that a lost process costs one clip's work.
    stage = Stage("reencode", (out,), 1, lambda _: Tasks(encode_unit, config.encode, limits_of(config)))
    return carry_out(stage, plan, config, ray_cluster)


def media_info(config: MediaOptions) -> DatasetInfo:
    """dataset.json of the media dataset: the encoder's settings and library versions decide the bytes."""
    encode = {name: value for name, value in to_plain(config.encode).items() if name != "decode_threads"}  # the bytes do not depend on it
    return new_info("media", {"encode": encode, "clips_per_shard": config.clips_per_shard, "libraries": media_libraries()})


def media_libraries() -> dict[str, str]:
    """Versions of the libraries that decode and encode; another version may give other bytes."""
    return {"av": av.__version__, **{name: ".".join(map(str, version)) for name, version in sorted(av.library_versions.items())}}


def limits_of(config: Limits) -> Limits:
    """The limits alone, out of a job's options."""
    return Limits(clip_seconds=config.clip_seconds, clip_memory_mb=config.clip_memory_mb)


def encode_unit(shard: str, clips: Sequence[Clip], encode: EncodeConfig, limits: Limits) -> tuple[Tick, Payload]:
    """A unit's clips, re-encoded. A fault of a clip is an entry with its reason; Ray repeats only faults of the machines."""
    del shard
    started = time.perf_counter()
    entries = [media_entry(clip, encode_clip(clip, encode, limits)) for clip in clips]
    return tick_of(entries, {"encode": time.perf_counter() - started}), (entries,)


def encode_clip(clip: Clip, encode: EncodeConfig, limits: Limits, *, keep_frames: bool = False) -> EncodedClip | MediaError:
    """Re-encode one clip in a process of its own; a clip that cannot be becomes its reason."""
    try:
        cut = partial(reencode, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds, keep_frames=keep_frames)
        return call(cut, fetched(clip), encode, limits=limits)
    except MediaError as error:
        return error


def media_entry(clip: Clip, encoded: EncodedClip | MediaError) -> Entry:
    """The ledger row and, for a good clip, the members `KEY.mp4` and `KEY.json`."""
    if isinstance(encoded, MediaError):
        return failed_entry(clip, encoded.reason, encoded.message)
    described = json_bytes({"key": clip.key, "split": clip.split, "label": clip.label, **_part(clip), **encoded.record()})
    return Entry(clip.key, clip.split, clip.label, clip.source, encoded.duration_seconds, {"mp4": encoded.mp4, "json": described})


def _part(clip: Clip) -> dict[str, float | None]:
    """Which part of its video a clip is, if it is not all of it."""
    part = {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
    return part if any(second is not None for second in part.values()) else {}


def tick_of(entries: Sequence[Entry], seconds: dict[str, float]) -> Tick:
    """What the driver is told of a unit."""
    failures = tuple((entry.key, entry.reason, entry.message or "") for entry in entries if entry.reason)
    return Tick(len(entries), failures, seconds, node=platform.node())


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.reencode`."""
    return job_main(ReencodeConfig, run, argv, command="reencode")


if __name__ == "__main__":
    sys.exit(main())
