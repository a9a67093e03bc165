"""`soundshard featurise`: media shards -> feature shards. Each media clip is decoded once; what runs on it is `pipeline.features`' matter."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import encodec
import numpy as np
import ray
import torch
import torchaudio

from configs import storage
from configs.load import job_main
from pipeline.discover import Clip
from pipeline.features import AUDIO_MEMBER, Decoded, FeatureOptions, Features, Featuriser, TowerOptions, find_weights, networks_spec
from pipeline.isolate import call
from pipeline.job import JobOptions, Summary, carry_out, finish, open_dataset, settle_plan
from pipeline.media import MediaError, decode
from pipeline.plan import media_plans
from pipeline.progress import Tick
from pipeline.ray_loop import Cluster, Stage, cluster
from pipeline.reencode import limits_of, media_libraries, tick_of
from pipeline.report import StageReport
from pipeline.workers import Actors, Payload, UnitActor, failed_entry
from shards.dataset import DatasetInfo, json_bytes, new_info, read_info
from shards.read import Index
from shards.write import Entry


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
    """The media dataset: a folder or a prefix in an object store."""
    out: str = "???"
    """The feature dataset: a folder or a prefix in an object store."""


def run(config: FeaturiseConfig) -> Summary:
    """Run the visual tower and the codec over media shards: features and tokens, one ledger row per row of the media dataset."""
    find_weights(config)
    with cluster(config.ray) as ray_cluster:
        summary, report = run_stage(config, ray_cluster)
    finish(summary, [report] if report else [], stage="featurise", out=config.out, max_failed_fraction=config.max_failed_fraction)
    return summary


def run_stage(config: FeaturiseConfig, ray_cluster: Cluster) -> tuple[Summary, StageReport | None]:
    """The job without its last words."""
    data, out = storage.absolute(config.data), storage.absolute(config.out)
    media = read_info(data)
    config = replace(config, data=data, out=out, tower=settle_device(config.tower, out, ray_cluster))
    open_dataset(out, feature_info(config, {"media_fingerprint": media.fingerprint}), overwrite=config.overwrite)
    plan = settle_plan(out, media_plans, data, config=config, derived=True)  # feature shard N holds the clips of media shard N
    stage = Stage(
        "featurise", (out,), config.chunk_clips, lambda units: actor_pool(FeaturiseActor, config, units), networks=True, device=config.tower.device
    )
    return carry_out(stage, plan, config, ray_cluster)


def feature_info(options: FeatureOptions, source: dict) -> DatasetInfo:
    """dataset.json of the feature dataset: networks, their weights and arithmetic, and what the features were made from decide the bytes."""
    networks = networks_spec(options)
    sha256 = {"tower": networks["tower"]["weights_sha256"]}
    libraries = {**media_libraries(), "torch": torch.__version__}
    if networks["codec"]:
        sha256["codec"], libraries["encodec"] = networks["codec"]["weights_sha256"], encodec.__version__
    if "audio" in networks:
        sha256["audio"], libraries["torchaudio"] = networks["audio"]["tower"]["weights_sha256"], torchaudio.__version__
    weights = {name: {"path": str(path.resolve()), "sha256": sha256[name]} for name, path in find_weights(options).items()}
    return new_info("features", {**networks, **source, "libraries": libraries}, {"weights": weights})


class FeaturiseActor(UnitActor):
    """A process that holds the networks and turns clips of the media dataset into entries of the feature dataset."""

    def __init__(self, config: FeaturiseConfig) -> None:
        self._featuriser = Featuriser(config)
        self._data, self._limits = config.data, limits_of(config)
        self._media = Index.open(config.data, kind="media") if read_info(config.data).view is not None else None
        """Of a view all of it, whose shards are not the parent's; else of one shard at a time: a million rows would be large in every process."""
        self._shard = ""

    def unit(self, shard: str, clips: Sequence[Clip]) -> tuple[Tick, Payload]:
        """Featurise a few clips of a media shard, in order."""
        if self._media is None or (self._media.view is None and shard != self._shard):
            self._media, self._shard = Index.of_shard(self._data, shard), shard
        entries = [feature_entry(clip, features, self._featuriser) for clip, features in self._featuriser.run(clips, self._decode)]
        return tick_of(entries, self._featuriser.take_seconds()), (entries,)

    def _decode(self, clip: Clip) -> Decoded:
        assert self._media is not None
        rate, channels = self._featuriser.decode_rates() or (None, None)
        stored = self._media.bytes(self._media.row(clip.key), "mp4")
        reading = partial(decode, sample_rate_hz=rate, channels=channels, mono_rate_hz=self._featuriser.heard_rate_hz())
        decoded = call(reading, stored, limits=self._limits)
        return Decoded(decoded.frames, decoded.audio, heard=decoded.mono)


def feature_entry(clip: Clip, features: Features | MediaError, featuriser: Featuriser) -> Entry:
    """The ledger row and, for a good clip, the members `KEY.avclip.npy`, `KEY.<codec>.npy`, `KEY.avclip_audio.npy` and `KEY.json`."""
    if isinstance(features, MediaError):
        return failed_entry(clip, features.reason, features.message)
    described = {
        "key": clip.key,
        "split": clip.split,
        "label": clip.label,
        "frames": features.frames,
        "segments": features.avclip.shape[1],
        "crops": [asdict(crop) for crop in features.crops],
    }
    members: dict[str, np.ndarray | bytes] = {"avclip.npy": features.avclip}
    if featuriser.codec is not None:
        assert features.codes is not None
        members[f"{featuriser.codec.name}.npy"] = features.codes
        described["steps"] = features.codes.shape[1]
    if featuriser.listener is not None:
        assert features.audio is not None
        members[AUDIO_MEMBER] = features.audio
        described["audio_segments"] = features.audio.shape[1]
    return Entry(clip.key, clip.split, clip.label, clip.source, features.frames / 25, {**members, "json": json_bytes(described)})


def settle_device(tower: TowerOptions, out: str, ray_cluster: Cluster) -> TowerOptions:
    """The options with `device=auto` decided: as the dataset in `out` was begun, else by what the cluster has."""
    if tower.device != "auto":
        return tower
    if storage.is_file(storage.join(out, "dataset.json")):
        return replace(tower, device=read_info(out).spec["tower"]["device"])
    ray_cluster.start()
    return replace(tower, device=cluster_device())


def cluster_device() -> str:
    """`cuda` if the cluster, which the driver's own machine may be the least of, has a GPU."""
    return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"


def actor_pool(actor_class: type[UnitActor], config: FeaturiseOptions, units: int) -> Actors:
    """Start the processes that hold the networks: as many as asked for, else as many as the cluster has devices for, and no more than units."""
    on_gpu = config.tower.device.startswith("cuda")
    resources = ray.cluster_resources()
    count = config.actors or max(1, int(resources.get("GPU", 1)) if on_gpu else int(resources.get("CPU", 1)) // config.tower.threads)
    return Actors(
        actor_class,
        config,
        count=min(count, units),
        num_gpus=1 if on_gpu else 0,
        num_cpus=config.decode_threads if on_gpu else config.tower.threads,
        calls=2 if on_gpu else 1,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.featurise`."""
    return job_main(FeaturiseConfig, run, argv, command="featurise")


if __name__ == "__main__":
    sys.exit(main())
