"""`soundshard prepare`: clips -> media shards -> feature shards, both stages one after the other or fused into one."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import TypeVar

import av
import numpy as np

from configs import storage
from configs.load import job_main
from pipeline import featurise, reencode
from pipeline.decode import channel_layout
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.features import Decoded, Featuriser, find_weights
from pipeline.job import JobOptions, Summary, carry_out, finish, open_dataset, settle_plan
from pipeline.media import MediaError
from pipeline.progress import Tick
from pipeline.ray_loop import Cluster, Stage, cluster
from pipeline.report import StageReport
from pipeline.workers import Payload, UnitActor
from shards.write import Entry

T = TypeVar("T")


@dataclass(frozen=True)
class PrepareConfig(featurise.FeaturiseOptions, reencode.MediaOptions, JobOptions, DiscoverConfig):
    """Options of `soundshard prepare`: those of both stages."""

    out: str = "???"
    """Where both datasets go, OUT/media and OUT/features: a folder or a prefix in an object store."""
    fused: bool = False
    """Featurise the pictures that are about to be encoded, without decoding them a second time. The features then differ slightly from those of
    the stored clips, and so does the fingerprint."""


def run(config: PrepareConfig) -> Summary:
    """Prepare clips for training: re-encode into OUT/media, featurise into OUT/features."""
    find_weights(config)
    out = storage.absolute(config.out)
    media, features = storage.join(out, "media"), storage.join(out, "features")
    with cluster(config.ray) as ray_cluster:
        if config.fused:
            summary, *reports = _run_fused(config, media, features, ray_cluster)
        else:
            first, one = reencode.run_stage(_options(reencode.ReencodeConfig, config, out=media), ray_cluster)
            print(f"reencode: {first.text()} -> {media}", flush=True)
            summary, two = featurise.run_stage(_options(featurise.FeaturiseConfig, config, data=media, out=features), ray_cluster)
            reports = [one, two]
    written = [report for report in reports if report]
    finish(summary, written, stage="prepare", out=out, max_failed_fraction=config.max_failed_fraction, dataset=features)
    return summary


def _options(schema: type[T], config: PrepareConfig, **own: str) -> T:
    shared = {f.name: getattr(config, f.name) for f in fields(schema) if hasattr(config, f.name)}  # type: ignore[arg-type] - a TypeVar for a dataclass
    return schema(**{**shared, **own})


def _run_fused(config: PrepareConfig, media: str, features: str, ray_cluster: Cluster) -> tuple[Summary, StageReport | None]:
    config = replace(config, tower=featurise.settle_device(config.tower, features, ray_cluster))
    media_info = reencode.media_info(config)
    open_dataset(media, media_info, overwrite=config.overwrite)
    info = featurise.feature_info(config, {"media_fingerprint": media_info.fingerprint, "fused": True})
    open_dataset(features, info, overwrite=config.overwrite)
    settle_plan(media, discover, config, config=config, clips_per_shard=config.clips_per_shard)
    plan = settle_plan(features, discover, config, config=config, clips_per_shard=config.clips_per_shard)
    # The media shard is committed first, so the feature shard stands for both.
    stage = Stage(
        "prepare",
        (media, features),
        config.chunk_clips,
        lambda units: featurise.actor_pool(FusedActor, config, units),
        networks=True,
        device=config.tower.device,
    )
    return carry_out(stage, plan, config, ray_cluster)


class FusedActor(UnitActor):
    """A process that re-encodes clips and featurises the same pictures while it has them."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._featuriser = Featuriser(config)

    def unit(self, shard: str, clips: Sequence[Clip]) -> tuple[Tick, Payload]:
        """Media entries and feature entries of a few clips, in order."""
        del shard
        media: dict[Clip, Entry] = {}  # not by source, which a list may name twice
        features = []

        def decode(clip: Clip) -> Decoded:
            """In a decoding thread: encode the clip and hand its pictures and sound on."""
            encoded = reencode.encode_clip(clip, self._config.encode, reencode.limits_of(self._config), keep_frames=True)
            media[clip] = reencode.media_entry(clip, encoded)
            if isinstance(encoded, MediaError):
                raise encoded
            assert encoded.pictures is not None and encoded.audio is not None
            sound, rate_hz = encoded.audio, encoded.sample_rate_hz
            wanted, heard_hz = self._featuriser.decode_rates(), self._featuriser.heard_rate_hz()
            return Decoded(
                encoded.pictures,
                resampled(sound, rate_hz, *wanted) if wanted else None,
                heard=resampled(sound, rate_hz, heard_hz, sound.shape[0]).mean(0) if heard_hz else None,
            )

        for clip, found in self._featuriser.run(clips, decode):
            features.append(featurise.feature_entry(clip, found, self._featuriser))
        return reencode.tick_of(features, self._featuriser.take_seconds()), ([media[clip] for clip in clips], features)


def resampled(audio: np.ndarray, from_hz: int, to_hz: int, channels: int) -> np.ndarray:
    """float32 [channels, samples] at another rate, by the resampler that decoding uses."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio), format="fltp", layout=channel_layout(audio.shape[0]))
    frame.sample_rate = from_hz
    resampler = av.AudioResampler(format="fltp", layout=channel_layout(channels), rate=to_hz)
    wave = np.concatenate([part.to_ndarray() for part in (*resampler.resample(frame), *resampler.resample(None))], axis=1)
    wanted = round(Fraction(audio.shape[1], from_hz) * to_hz)
    return np.pad(wave, ((0, 0), (0, max(0, wanted - wave.shape[1]))))[:, :wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.prepare`."""
    return job_main(PrepareConfig, run, argv, command="prepare")


if __name__ == "__main__":
    sys.exit(main())
