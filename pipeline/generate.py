"""`soundshard generate`: a run folder and videos -> the videos with generated sound. The pictures are copied, not encoded again."""

import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from jaxtyping import Float16, Float32
from tqdm import tqdm

from configs import storage
from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_SECONDS
from configs.load import JobError, job_main, to_plain
from model.generate import Sampling, generate_windows
from model.run_folder import RunConfig, local_run, read_config, read_run_folder
from model.weights import resolve, sha256_file
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.features import DTYPES, CodecOptions, Decoded, FeatureOptions, Featuriser, TowerOptions, open_codec
from pipeline.featurise import cluster_device
from pipeline.isolate import Limits, call
from pipeline.media import MediaError, decode_video, fetched, mux, write_wav
from pipeline.ray_loop import RayConfig, cluster
from shards.dataset import fingerprint
from shards.read import Index


@dataclass(frozen=True)
class GenerateConfig(DiscoverConfig):
    """Options of `soundshard generate`."""

    source: str = ""
    """Videos: a file, a folder, a list or a csv. Give this or `data`."""
    data: str = ""
    """A media dataset to take the videos from instead."""
    data_split: str = ""
    """Split of `data`; empty takes all."""
    run: str = "???"
    """Run folder of `soundshard train`."""
    weights: str = "model"
    """Which weights of the run: `model` (the latest) or `best` (the smallest validation loss)."""
    out: str = "???"
    """Where KEY.mp4, KEY.wav, KEY.json and ledger.parquet go: a folder or a prefix in an object store."""
    limit: int = 0
    """Videos to do at most, the first in the order of keys; 0 does all."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 666
    """Each clip samples from a generator seeded by this and its key, whatever clips share its batch."""
    duration_seconds: float = 0.0
    """Length to generate, in whole segments of 0.64 s; 0 covers the video."""
    stride_segments: int = 1
    """Segments by which the window moves over a video longer than the training window; the codes already there are the prompt."""
    batch_clips: int = 8
    """Videos generated together."""
    short_side: int = 256
    """Size to which videos (not those of a media dataset) are brought before the tower's centre crop, as the re-encoder did for training."""
    actors: int = 1
    """Processes with a model each; one per GPU is usual."""
    tower: TowerOptions = field(default_factory=lambda: TowerOptions(weights=""))
    """The visual tower; without weights, the one that the run was trained on."""
    codec_weights: str = ""
    """The codec's weights file; empty takes the one that the run was trained on."""
    precision: str = "fp32"
    """Arithmetic of the decoder: fp32, bf16 or fp16."""
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True)
class Job:
    """What every process must know beside the options: where the networks are, what is asked of them."""

    tower: str
    codec: str
    segments: int
    """Segments to generate; 0 covers the video."""
    request: str
    """Identifies the run's weights and the options that decide the sound; kept in KEY.json, so that a rerun knows what is done."""


def run(config: GenerateConfig) -> list[dict[str, Any]]:
    """Put generated sound under videos: for each an mp4 with the original pictures, a wav and a ledger row."""
    local = local_run(config.run)
    trained = read_config(local)
    segments = whole_segments(config.duration_seconds)
    config = replace(config, run=storage.absolute(config.run), data=storage.absolute(config.data) if config.data else "")
    job = Job(*find_networks(config, trained, local), segments, request_id(config, segments, local))
    clips, out = videos(config), storage.absolute(config.out)
    config = replace(config, out=out)
    todo = [clip for clip in clips if not _is_done(out, clip, job)]
    print(f"generate: {len(clips) - len(todo)} videos done, {len(todo)} to do", flush=True)
    if todo:
        with cluster(config.ray) as ray_cluster:
            ray_cluster.start()
            _generate_all(config, job, todo)
    rows = [json.loads(storage.read_bytes(_row_path(out, clip))) for clip in clips]
    ledger = storage.join(out, "ledger.parquet")
    write_table(ledger, rows)
    reasons = Counter(row["reason"] for row in rows if row["status"] == "failed")
    why = f" ({', '.join(f'{reason} {count}' for reason, count in sorted(reasons.items()))})" if reasons else ""
    print(f"generate: {len(rows) - reasons.total()} ok, {reasons.total()} failed{why} -> {out}", flush=True)
    if rows and reasons.total() == len(rows):
        raise JobError(f"generate: none of {len(rows)} videos could be done; {ledger} has the reasons, the first is: {rows[0]['message']}")
    return rows


def _generate_all(config: GenerateConfig, job: Job, todo: list[Clip]) -> None:
    """Deal batches of videos to the processes that hold the networks."""
    if config.tower.device == "auto":
        config = replace(config, tower=replace(config.tower, device=cluster_device()))
    batches = [todo[start : start + config.batch_clips] for start in range(0, len(todo), config.batch_clips)]
    on_gpu = config.tower.device.startswith("cuda")
    remote = ray.remote(Generator).options(num_gpus=int(on_gpu), num_cpus=1 if on_gpu else config.tower.threads, max_restarts=2, max_task_retries=2)
    pool = ray.util.ActorPool([remote.remote(config, job) for _ in range(min(config.actors, len(batches)))])
    failed = 0
    with tqdm(total=len(todo), desc="generate", unit="video") as bar:
        for rows in pool.map_unordered(lambda actor, batch: actor.batch.remote(batch), batches):
            failed += sum(row["status"] == "failed" for row in rows)
            bar.update(len(rows))
            bar.set_postfix(failed=failed)


class Generator:
    """A process that holds tower, decoder and codec, and puts sound under batches of videos."""

    def __init__(self, config: GenerateConfig, job: Job) -> None:
        self.config, self.job = config, job
        trained, model = read_run_folder(local_run(config.run), name=config.weights)
        self.window_segments = trained.window_segments
        # Contiguous segments from the start: V-AURA's own grid.
        options = FeatureOptions(hop_frames=SEGMENT_FRAMES, tower=replace(config.tower, weights=job.tower))
        self.featuriser = Featuriser(options, with_codec=False)
        self.model = model.to(self.featuriser.device, DTYPES[config.precision]).eval()
        bandwidth = trained.data["spec"]["codec"].get("bandwidth_kbps", CodecOptions.bandwidth_kbps)
        self.codec = open_codec(CodecOptions(weights=job.codec, name=trained.data["spec"]["codec"]["name"], bandwidth_kbps=bandwidth))
        self.codec.to(self.featuriser.device)
        self.media = Index.open(config.data, kind="media") if config.data else None

    def batch(self, clips: list[Clip]) -> list[dict[str, Any]]:
        """Do a batch of videos; a row for each. Videos of equal length go through the decoder together."""
        rows, by_length = [], {}
        for clip, features in self.featuriser.run(clips, self._decode):
            if isinstance(features, MediaError):
                rows.append(self._finish(clip, {"status": "failed", "reason": features.reason, "message": features.message}))
            else:
                by_length.setdefault(features.avclip.shape[1], []).append((clip, features))
        for segments, members in sorted(by_length.items()):
            waves = self._sounds([clip for clip, _ in members], np.stack([features.avclip[0] for _, features in members]))
            for (clip, features), wave in zip(members, waves, strict=True):
                # The last segment may have been filled up with a held picture; the sound ends with the pictures.
                frames = min(features.frames, segments * SEGMENT_FRAMES)
                rows.append(self._write(clip, wave[:, : round(Fraction(frames, FRAME_RATE_HZ) * self.codec.sample_rate_hz)], frames))
        return rows

    @torch.inference_mode()
    def _sounds(self, clips: list[Clip], avclip: Float16[np.ndarray, "b segments tokens width"]) -> Float32[np.ndarray, "b channels samples"]:
        """Sound for videos of equal length."""
        tokens = torch.from_numpy(avclip).flatten(1, 2).to(self.featuriser.device, DTYPES[self.config.precision])
        codes = generate_windows(
            self.model,
            tokens,
            sampling=self.config.sampling,
            window_segments=self.window_segments,
            stride_segments=self.config.stride_segments,
            seeds=[clip_seed(self.config.seed, clip.key) for clip in clips],
        )
        return self.codec.decode(codes).float().clamp(-1, 1).cpu().numpy()

    def _source(self, clip: Clip) -> str | bytes:
        return fetched(clip.source) if self.media is None else self.media.bytes(self.media.row(clip.key), "mp4")

    def _decode(self, clip: Clip) -> Decoded:
        """Pictures of whole segments: cut to the duration asked for, or the last one filled up by holding the last picture."""
        if clip.reason:
            raise MediaError(clip.reason, clip.message or "")
        frames = call(partial(decode_video, short_side=None if self.media else self.config.short_side), self._source(clip), limits=Limits())
        wanted = self.job.segments or -(-len(frames) // SEGMENT_FRAMES)
        if len(frames) < SEGMENT_FRAMES or len(frames) < self.job.segments * SEGMENT_FRAMES:
            raise MediaError(
                "too_short", f"{len(frames) / FRAME_RATE_HZ:.2f} s of pictures; wanted {float(max(1, self.job.segments) * SEGMENT_SECONDS):.2f} s"
            )
        held = np.repeat(frames[-1:], max(0, wanted * SEGMENT_FRAMES - len(frames)), axis=0)
        return Decoded(np.concatenate([frames, held])[: wanted * SEGMENT_FRAMES], None, own_frames=len(frames))

    def _write(self, clip: Clip, wave: np.ndarray, frames: int) -> dict[str, Any]:
        seconds = frames / FRAME_RATE_HZ
        with tempfile.TemporaryDirectory() as folder:
            wav, mp4 = Path(folder, f"{clip.key}.wav"), Path(folder, f"{clip.key}.mp4")
            write_wav(wav, wave, self.codec.sample_rate_hz)
            try:
                made = call(partial(mux, duration_seconds=seconds), self._source(clip), wave, self.codec.sample_rate_hz, mp4, limits=Limits())
            except MediaError as error:
                return self._finish(clip, {"status": "failed", "reason": error.reason, "message": error.message})
            for path in (wav, made.path):
                storage.write_bytes(storage.join(self.config.out, path.name), path.read_bytes())
        return self._finish(clip, {"status": "ok", "duration_seconds": seconds, "mp4": made.path.name, "wav": wav.name})

    def _finish(self, clip: Clip, result: dict[str, Any]) -> dict[str, Any]:
        """Write the clip's row last: its presence says that the clip is done."""
        empty = {"status": None, "reason": None, "message": None, "duration_seconds": None, "mp4": None, "wav": None}
        seed = clip_seed(self.config.seed, clip.key)
        row = {"key": clip.key, "source": clip.source, **empty, **result, "seed": seed, "request": self.job.request}
        storage.write_bytes(_row_path(self.config.out, clip), json.dumps(row, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        return row


def videos(config: GenerateConfig) -> list[Clip]:
    """The videos to do, in the order of their keys."""
    if bool(config.source) == bool(config.data):
        raise ValueError("give source=VIDEOS or data=MEDIA_DATASET, one of the two")
    if config.data:
        rows = Index.open(config.data, kind="media", split=config.data_split or None).rows()
        clips = [Clip(row["key"], row["source"], row["split"], row["label"], row["reason"], row["message"]) for row in rows]
    else:
        clips = discover(config)
    clips.sort(key=lambda clip: (clip.key, clip.source))
    return clips[: config.limit] if config.limit else clips


def whole_segments(duration_seconds: float) -> int:
    """A duration in segments; 0 stays 0 (the whole video). Raises ValueError with the nearest valid durations."""
    segments = round(duration_seconds / float(SEGMENT_SECONDS))
    if duration_seconds < 0 or abs(segments * float(SEGMENT_SECONDS) - duration_seconds) > 1e-6:
        below = max(1, int(duration_seconds / float(SEGMENT_SECONDS)))
        near = f"{float(below * SEGMENT_SECONDS):g} or {float((below + 1) * SEGMENT_SECONDS):g}"
        raise ValueError(f"duration_seconds is {duration_seconds:g}; expected a multiple of a segment's 0.64 s, such as {near}")
    return segments


def find_networks(config: GenerateConfig, trained: RunConfig, run: str) -> tuple[str, str]:
    """Weights files of tower and codec: the given ones, else those recorded with the run. Refuses others than the run was trained on."""
    found = []
    for name, given in (("tower", config.tower.weights), ("codec", config.codec_weights)):
        path = resolve(given) if given else trained.weights_path(run, name)
        if path is None or not path.is_file():
            option = "tower.weights" if name == "tower" else "codec_weights"
            raise ValueError(f"the {name}'s weights that {config.run} was trained on are not at {path}; give {option}=FILE")
        expected, sha256 = trained.data["spec"][name]["weights_sha256"], sha256_file(path)
        if sha256 != expected:
            raise ValueError(
                f"{name} weights {path} have sha256 {sha256[:12]}...; the run was trained on features of {expected[:12]}...: give that file"
            )
        found.append(str(path.resolve()))
    return found[0], found[1]


def request_id(config: GenerateConfig, segments: int, run: str) -> str:
    """A hash of what decides the sound: the decoder's weights and the options."""
    decides = {
        "model": sha256_file(Path(run) / f"{config.weights}.safetensors"),
        "sampling": to_plain(config.sampling),
        "options": [config.seed, segments, config.stride_segments, config.precision],
    }
    return fingerprint(decides)[:16]


def clip_seed(seed: int, key: str) -> int:
    """A clip's own seed, so that its sound does not depend on which clips share its batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:7], "little")


def write_table(path: str, rows: list[dict[str, Any]]) -> None:
    """The rows as parquet, whole or not at all."""
    schema = pa.schema(
        [(name, pa.string()) for name in ("key", "source", "status", "reason", "message")]
        + [("duration_seconds", pa.float64()), ("mp4", pa.string()), ("wav", pa.string()), ("seed", pa.int64()), ("request", pa.string())]
    )
    with storage.writing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)


def _row_path(out: str, clip: Clip) -> str:
    # A second input of the same key is a failed row of its own.
    suffix = f".{hashlib.sha256(clip.source.encode()).hexdigest()[:8]}" if clip.reason == "duplicate_key" else ""
    return storage.join(out, f"{clip.key}{suffix}.json")


def _is_done(out: str, clip: Clip, job: Job) -> bool:
    path = _row_path(out, clip)
    return storage.is_file(path) and json.loads(storage.read_bytes(path))["request"] == job.request


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.generate`."""
    return job_main(GenerateConfig, run, argv, command="generate", positional="source")


if __name__ == "__main__":
    sys.exit(main())
