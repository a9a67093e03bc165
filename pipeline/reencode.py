"""`soundshard reencode`: clips -> media shards. Decides what a media record holds; how a clip is decoded and encoded is `pipeline.media`'s matter."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import av
import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from configs.load import job_main, to_plain
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.media import EncodeConfig, EncodedClip, MediaError, reencode
from pipeline.ray_loop import Actor, RayConfig, ShardPlan, Summary, cluster, finish, inputs_sha256, plan_shards, run_shards
from shards.dataset import DatasetInfo, new_info
from shards.write import Entry, Outcome, json_bytes, write_shard


@dataclass(frozen=True)
class MediaOptions:
    """What decides the media shards' bytes."""

    encode: EncodeConfig = field(default_factory=EncodeConfig)
    clips_per_shard: int = 64
    """Input clips in one shard, good and bad: the unit of commit and resume. 64 VGGSound clips are about 100 MB."""


@dataclass(frozen=True)
class JobOptions:
    """How a preparation job runs, whatever it makes."""

    ray: RayConfig = field(default_factory=RayConfig)
    in_flight: int = 4
    """Shards worked on at the same time; more keeps a larger cluster busy and holds more clips in Ray's object store."""
    max_failed_fraction: float = 1.0
    """Largest fraction of failed clips that still counts as success (exit status 0). The shards are kept either way."""


@dataclass(frozen=True)
class ReencodeConfig(MediaOptions, JobOptions, DiscoverConfig):
    """Options of `soundshard reencode`."""

    out: str = "???"
    """Folder of the media dataset."""


def run(config: ReencodeConfig) -> Summary:
    """Re-encode clips into media shards: H.264 and AAC on one clock, one ledger row per input."""
    plans = plan_shards(discover(config), config.clips_per_shard)  # one row per input from here to the end
    with cluster(config.ray):
        summary = run_shards(  # one encode task per clip, one write per shard
            config.out,
            media_info(config, plans),
            plans,
            lambda plan, ticker: submit(plan, ticker, config),
            in_flight=config.in_flight,
            stage="reencode",
        )
    finish(summary, stage="reencode", out=config.out, max_failed_fraction=config.max_failed_fraction)
    return summary


def media_info(config: MediaOptions, plans: Sequence[ShardPlan]) -> DatasetInfo:
    """dataset.json of the media dataset: the encoder's settings and library versions decide the bytes."""
    encode = {name: value for name, value in to_plain(config.encode).items() if name != "decode_threads"}  # the bytes do not depend on it
    spec = {"encode": encode, "clips_per_shard": config.clips_per_shard, "libraries": media_libraries()}
    inputs = {"clips": sum(len(plan.clips) for plan in plans), "sha256": inputs_sha256(plans)}
    return new_info("media", spec, {"inputs": inputs})


def media_libraries() -> dict[str, str]:
    """Versions of the libraries that decode and encode; another version may give other bytes."""
    return {"av": av.__version__, **{name: ".".join(map(str, version)) for name, version in sorted(av.library_versions.items())}}


def submit(plan: ShardPlan, ticker: Actor, config: ReencodeConfig) -> ray.ObjectRef:
    """Start one task per clip and the task that writes their shard."""
    encode = ray.remote(encode_task).options(num_cpus=1, max_retries=2)
    encoded = [None if clip.reason else encode.remote(clip, config.encode, ticker) for clip in plan.clips]
    return ray.remote(write_task).options(num_cpus=0, max_retries=10).remote(config.out, plan, encoded, ticker)


@dataclass(frozen=True)
class Encoded:
    """What a clip's task returns: the clip, or why there is none. A fault of the clip is a value; Ray retries only faults of the machines."""

    clip: EncodedClip | None
    reason: str | None = None
    message: str | None = None


def encode_clip(clip: Clip, config: EncodeConfig, *, keep_frames: bool = False) -> Encoded:
    """Re-encode one clip; a clip that cannot be becomes its reason."""
    try:
        return Encoded(reencode(clip.source, config, keep_frames=keep_frames))
    except MediaError as error:
        return Encoded(None, error.reason, error.message)


def encode_task(clip: Clip, config: EncodeConfig, ticker: Actor) -> Encoded:
    """One clip's task."""
    encoded = encode_clip(clip, config)
    ticker.tick.remote(1, int(encoded.clip is None))
    return encoded


def write_task(root: str, plan: ShardPlan, encoded: list[ray.ObjectRef | None], ticker: Actor) -> Outcome:
    """Write the shard as its clips come in. Repeating it after a fault writes the same bytes."""

    def entries() -> Iterator[Entry]:
        for clip, ref in zip(plan.clips, encoded, strict=True):
            if ref is None:
                ticker.tick.remote(1, 1)
            yield media_entry(clip, Encoded(None, clip.reason, clip.message) if ref is None else _result(ref))

    return write_shard(root, plan.name, entries())


def _result(ref: ray.ObjectRef) -> Encoded:
    """A clip's result; a process that dies over a clip again and again costs that clip a row, not the job."""
    try:
        return ray.get(ref)
    except OutOfMemoryError as error:
        return Encoded(None, "out_of_memory", str(error).splitlines()[0])
    except WorkerCrashedError as error:
        return Encoded(None, "crashed", f"the process that decoded this clip died each time it was tried: {str(error).splitlines()[0]}")


def media_entry(clip: Clip, encoded: Encoded) -> Entry:
    """The ledger row and, for a good clip, the members `KEY.mp4` and `KEY.json`."""
    if encoded.clip is None:
        return Entry(clip.key, clip.split, clip.label, clip.source, reason=encoded.reason, message=encoded.message)
    described = json_bytes({"key": clip.key, "split": clip.split, "label": clip.label, **encoded.clip.record()})
    return Entry(clip.key, clip.split, clip.label, clip.source, encoded.clip.duration_seconds, {"mp4": encoded.clip.mp4, "json": described})


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.reencode`."""
    return job_main(ReencodeConfig, run, argv, command="reencode")


if __name__ == "__main__":
    sys.exit(main())
