"""`soundshard prepare`: clips -> media shards -> feature shards, both stages one after the other or fused into one."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
import ray

from configs.load import job_main
from pipeline import featurise, reencode
from pipeline.decode import channel_layout
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.features import Decoded, Featuriser, find_weights
from pipeline.media import MediaError
from pipeline.ray_loop import Actor, ShardPlan, Summary, cluster, finish, plan_shards, run_shards
from shards.dataset import create_or_check
from shards.write import Entry, Outcome, write_manifest, write_shard

T = TypeVar("T")


@dataclass(frozen=True)
class PrepareConfig(featurise.FeaturiseOptions, reencode.MediaOptions, reencode.JobOptions, DiscoverConfig):
    """Options of `soundshard prepare`: those of both stages."""

    out: str = "???"
    """Folder for both datasets: OUT/media and OUT/features."""
    fused: bool = False
    """Featurise the pictures that are about to be encoded, without decoding them a second time. The features then differ slightly from those of
    the stored clips, and so does the fingerprint."""


def run(config: PrepareConfig) -> Summary:
    """Prepare clips for training: re-encode into OUT/media, featurise into OUT/features."""
    find_weights(config)
    media, features = str(Path(config.out) / "media"), str(Path(config.out) / "features")
    if config.fused:
        return _run_fused(config, media, features)
    with cluster(config.ray):
        reencode.run(_options(reencode.ReencodeConfig, config, out=media))
        return featurise.run(_options(featurise.FeaturiseConfig, config, data=media, out=features))


def _options(schema: type[T], config: PrepareConfig, **own: str) -> T:
    shared = {f.name: getattr(config, f.name) for f in fields(schema) if hasattr(config, f.name)}  # type: ignore[arg-type] - a TypeVar for a dataclass
    return schema(**{**shared, **own})


def _run_fused(config: PrepareConfig, media: str, features: str) -> Summary:
    plans = plan_shards(discover(config), config.clips_per_shard)
    media_info = reencode.media_info(config, plans)
    with cluster(config.ray):
        config = replace(config, tower=featurise.settle_device(config.tower))
        info = featurise.feature_info(config, {"media_fingerprint": media_info.fingerprint, "fused": True}, plans)
        create_or_check(media, media_info)
        pool = featurise.actor_pool(FusedActor, config)

        def submit(plan: ShardPlan, ticker: Actor) -> ray.ObjectRef:
            chunks = [pool.call("chunk", chunk, ticker) for chunk in featurise.chunks_of(plan.clips, config.chunk_clips)]
            return ray.remote(write_both).options(num_cpus=0, max_retries=10).remote(media, features, plan.name, chunks)

        summary = run_shards(features, info, plans, submit, in_flight=config.in_flight, stage="prepare")
    write_manifest(media)
    finish(summary, stage="prepare", out=config.out, max_failed_fraction=config.max_failed_fraction)
    return summary


def write_both(media: str, features: str, name: str, chunks: list[ray.ObjectRef]) -> Outcome:
    """Write the shard of both datasets; the media shard is committed first, so the feature shard stands for both."""
    write_shard(media, name, (entry for chunk in chunks for entry in ray.get(chunk)[0]))
    return write_shard(features, name, (entry for chunk in chunks for entry in ray.get(chunk)[1]))


class FusedActor:
    """A process that re-encodes clips and featurises the same pictures while it has them."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._featuriser = Featuriser(config)

    def chunk(self, clips: Sequence[Clip], ticker: Actor) -> tuple[list[Entry], list[Entry]]:
        """Media entries and feature entries of a few clips, in order."""
        media: dict[Clip, Entry] = {}  # not by source, which a list may name twice
        features = []

        def decode(clip: Clip) -> Decoded:
            """In a decoding thread: encode the clip and hand its pictures and sound on."""
            encoded = reencode.Encoded(None, clip.reason, clip.message)
            if not clip.reason:
                encoded = reencode.encode_clip(clip, self._config.encode, keep_frames=True)
            media[clip] = reencode.media_entry(clip, encoded)
            if encoded.clip is None:
                assert encoded.reason is not None
                raise MediaError(encoded.reason, encoded.message or "")
            pictures, audio = encoded.clip.pictures, encoded.clip.audio
            assert pictures is not None and audio is not None
            rate, channels = self._featuriser.decode_rates() or (0, 0)
            return Decoded(pictures, resampled(audio, encoded.clip.sample_rate_hz, rate, channels))

        for clip, found in self._featuriser.run(clips, decode):
            ticker.tick.remote(1, int(isinstance(found, MediaError)))
            features.append(featurise.feature_entry(clip, found, self._featuriser))
        return [media[clip] for clip in clips], features


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
