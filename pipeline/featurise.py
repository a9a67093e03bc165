"""`soundshard featurise`: media shards -> feature shards. Each media clip is decoded once; what runs on it is `pipeline.features`' matter."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import encodec
import ray
import torch

from configs.load import job_main
from pipeline.discover import Clip
from pipeline.features import Decoded, FeatureOptions, Features, Featuriser, TowerOptions, find_weights, networks_spec
from pipeline.media import MediaError, decode
from pipeline.ray_loop import Actor, ShardPlan, Summary, cluster, finish, inputs_sha256, run_shards
from pipeline.reencode import JobOptions, media_libraries
from shards.dataset import DatasetInfo, json_bytes, new_info
from shards.read import Index
from shards.write import Entry, Outcome, write_shard


@dataclass(frozen=True)
class ActorOptions:
    """The processes that hold the networks."""

    actors: int = 0
    """Processes with a tower and a codec each; 0 takes one per GPU, or on the CPU one per `tower.threads` processors."""


@dataclass(frozen=True)
class FeaturiseOptions(FeatureOptions, ActorOptions):
    """What an actor that holds the networks must know."""


@dataclass(frozen=True)
class FeaturiseConfig(FeaturiseOptions, JobOptions):
    """Options of `soundshard featurise`."""

    data: str = "???"
    """Folder of the media dataset."""
    out: str = "???"
    """Folder of the feature dataset."""


def run(config: FeaturiseConfig) -> Summary:
    """Run the visual tower and the codec over media shards: features and tokens, one ledger row per row of the media dataset."""
    find_weights(config)
    media = Index.open(config.data, kind="media")
    plans = plans_of(media)  # feature shard N holds the clips of media shard N
    with cluster(config.ray):
        config = replace(config, tower=settle_device(config.tower))
        info = feature_info(config, {"media_fingerprint": media.info.fingerprint}, plans)
        pool = actor_pool(FeaturiseActor, config)
        summary = run_shards(  # a few clips per call of an actor, one write per shard
            config.out, info, plans, lambda plan, ticker: submit(plan, ticker, pool, config), in_flight=config.in_flight, stage="featurise"
        )
    finish(summary, stage="featurise", out=config.out, max_failed_fraction=config.max_failed_fraction)
    return summary


def plans_of(media: Index) -> list[ShardPlan]:
    """The media dataset's own cut into shards, failed rows included."""
    shards: dict[str, list[Clip]] = {}
    for row in media.rows():
        shards.setdefault(row["shard"], []).append(Clip(row["key"], row["source"], row["split"], row["label"], row["reason"], row["message"]))
    return [ShardPlan(name, clips[0].split, tuple(clips)) for name, clips in sorted(shards.items())]


def feature_info(options: FeatureOptions, source: dict, plans: Sequence[ShardPlan]) -> DatasetInfo:
    """dataset.json of the feature dataset: networks, their weights and arithmetic, and what the features were made from decide the bytes."""
    libraries = {**media_libraries(), "torch": torch.__version__, "encodec": encodec.__version__}
    spec = {**networks_spec(options), **source, "libraries": libraries}
    tower, codec = find_weights(options)
    weights = {
        "tower": {"path": str(tower.resolve()), "sha256": spec["tower"]["weights_sha256"]},
        "codec": {"path": str(codec.resolve()), "sha256": spec["codec"]["weights_sha256"]},
    }
    inputs = {"clips": sum(len(plan.clips) for plan in plans), "sha256": inputs_sha256(plans)}
    return new_info("features", spec, {"weights": weights, "inputs": inputs})


def submit(plan: ShardPlan, ticker: Actor, pool: "ActorPool", config: FeaturiseConfig) -> ray.ObjectRef:
    """Start the calls for a shard's clips and the task that writes them."""
    chunks = [pool.call("chunk", chunk, ticker) for chunk in chunks_of(plan.clips, config.chunk_clips)]
    return ray.remote(write_task).options(num_cpus=0, max_retries=10).remote(config.out, plan.name, chunks)


def chunks_of(clips: Sequence[Clip], size: int) -> list[Sequence[Clip]]:
    """The clips in groups of `size`, the last one smaller."""
    return [clips[start : start + size] for start in range(0, len(clips), size)]


def write_task(root: str, name: str, chunks: list[ray.ObjectRef]) -> Outcome:
    """Write the shard as its chunks come in. Repeating it after a fault writes the same bytes."""
    return write_shard(root, name, (entry for chunk in chunks for entry in ray.get(chunk)))


class FeaturiseActor:
    """A process that holds the networks and turns clips of the media dataset into entries of the feature dataset."""

    def __init__(self, config: FeaturiseConfig) -> None:
        self._featuriser = Featuriser(config)
        self._media = Index.open(config.data, kind="media")

    def chunk(self, clips: Sequence[Clip], ticker: Actor) -> list[Entry]:
        """Featurise a few clips, in order."""
        entries = []
        for clip, features in self._featuriser.run(clips, self._decode):
            ticker.tick.remote(1, int(isinstance(features, MediaError)))
            entries.append(feature_entry(clip, features, self._featuriser))
        return entries

    def _decode(self, clip: Clip) -> Decoded:
        if clip.reason:
            raise MediaError(clip.reason, clip.message or "")
        rate, channels = self._featuriser.decode_rates() or (0, 0)
        decoded = decode(self._media.bytes(self._media.row(clip.key), "mp4"), sample_rate_hz=rate, channels=channels)
        return Decoded(decoded.frames, decoded.audio)


def feature_entry(clip: Clip, features: Features | MediaError, featuriser: Featuriser) -> Entry:
    """The ledger row and, for a good clip, the members `KEY.avclip.npy`, `KEY.<codec>.npy` and `KEY.json`."""
    if isinstance(features, MediaError):
        return Entry(clip.key, clip.split, clip.label, clip.source, reason=features.reason, message=features.message)
    assert featuriser.codec is not None and features.codes is not None
    described = {
        "key": clip.key,
        "split": clip.split,
        "label": clip.label,
        "frames": features.frames,
        "segments": features.avclip.shape[1],
        "steps": features.codes.shape[1],
        "crops": [asdict(crop) for crop in features.crops],
    }
    members = {"avclip.npy": features.avclip, f"{featuriser.codec.name}.npy": features.codes, "json": json_bytes(described)}
    return Entry(clip.key, clip.split, clip.label, clip.source, features.frames / 25, members)


class ActorPool:
    """Actors that take calls in turn. A call that dies with its actor is repeated on the restarted one."""

    def __init__(self, actors: Sequence[Actor]) -> None:
        self._turns = itertools.cycle(actors)

    def call(self, method: str, *arguments: object) -> ray.ObjectRef:
        """Call `method` on the actor whose turn it is."""
        return getattr(next(self._turns), method).remote(*arguments)


def settle_device(tower: TowerOptions) -> TowerOptions:
    """The options with `device=auto` decided by what the cluster has, which the driver's own machine need not have."""
    if tower.device != "auto":
        return tower
    return replace(tower, device="cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")


def actor_pool(actor_class: type, config: FeaturiseOptions, *arguments: str) -> ActorPool:
    """Start the processes that hold the networks: as many as asked for, else as many as the cluster has devices for."""
    on_gpu = config.tower.device.startswith("cuda")
    resources = ray.cluster_resources()
    count = config.actors or max(1, int(resources.get("GPU", 1)) if on_gpu else int(resources.get("CPU", 1)) // config.tower.threads)
    remote = ray.remote(actor_class).options(
        num_gpus=1 if on_gpu else 0,
        num_cpus=config.decode_threads if on_gpu else config.tower.threads,
        # On a GPU a second call decodes its first clips while the one before it computes its last batches.
        max_concurrency=2 if on_gpu else 1,
        max_restarts=-1,
        max_task_retries=2,
    )
    return ActorPool([remote.remote(config, *arguments) for _ in range(count)])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.featurise`."""
    return job_main(FeaturiseConfig, run, argv, command="featurise")


if __name__ == "__main__":
    sys.exit(main())
