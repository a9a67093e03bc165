"""`soundshard generate`: a run folder and videos -> the videos with generated sound. The pictures are copied, not encoded again."""

import csv
import hashlib
import io
import json
import math
import shutil
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from jaxtyping import Float32
from ray.exceptions import RayError
from tqdm import tqdm

from configs import storage
from configs.clock import FRAME_RATE_HZ
from configs.load import JobError, job_main, to_plain
from model.engine import EngineOptions
from model.run_folder import local_run, named_run, read_config, weights_file
from model.synchformer import synchformer_file
from model.weights import sha256_file
from pipeline.discover import VIDEO_SUFFIXES, Clip, DiscoverConfig, discover, key_of
from pipeline.features import Decoded, Features, TowerOptions
from pipeline.featurise import cluster_device
from pipeline.isolate import Limits, call
from pipeline.media import MediaError, WavWriter, fetched, mux_wav, transcode_original, video_frames
from pipeline.normalise import Meter, Normalisation, normalise_wav
from pipeline.ray_loop import RayConfig, cluster
from pipeline.sounder import Networks, Sound, Sounder, SoundOptions, clip_seed, find_networks
from pipeline.stretch import Stretch, clip_pictures, whole_segments
from pipeline.sync_score import SyncScorer
from pipeline.workers import root_cause
from shards.dataset import fingerprint
from shards.read import Index


@dataclass(frozen=True)
class GenerateConfig(SoundOptions, DiscoverConfig):
    """Options of `soundshard generate`."""

    source: str = ""
    """Videos: a file, a folder, a list or a csv. Give this or `data`."""
    data: str = ""
    """A media dataset to take the videos from instead."""
    data_split: str = ""
    """Split of `data`; empty takes all."""
    starts: str = ""
    """A csv with the header `file,start_sec` (the published test sets): takes these videos only, each from its start; those not there are rows
    that have failed. Empty takes the start times of `data` where it is a view that has them (`soundshard subset starts=`)."""
    run: str = "???"
    """Run folder of `soundshard train`; `vaura` is the one that `soundshard weights get=vaura` makes."""
    weights: str = "model"
    """Which weights of the run: `model` (the latest), `best` (the smallest validation loss) or `ema` (their moving average)."""
    out: str = "???"
    """Where KEY.mp4, KEY.wav, KEY.json and ledger.parquet go: a folder or a prefix in an object store."""
    limit: int = 0
    """Videos to do at most, the first in the order of keys; 0 does all."""
    normalisation: Normalisation = field(default_factory=lambda: Normalisation(norm="none"))
    originals: bool = False
    """Write KEY.original.mp4 beside: the same stretch with the video's own sound, compressed."""
    candidates: int = 1
    """Sounds to make for each video, of which the one that is best in sync is kept; needs sync_weights. Films get one."""
    sync_weights: str = "sync"
    """Synchformer's weights that judge the candidates: a file, or the name of published ones (`soundshard weights`)."""
    batch_clips: int = 8
    """Videos generated together."""
    film_seconds: float = 60.0
    """Videos longer than this are done one at a time as a stream, in memory that does not depend on their length."""
    short_side: int = 256
    """Size to which videos (not those of a media dataset) are brought before the tower's centre crop, as the re-encoder did for training."""
    actors: int = 1
    """Processes with a model each; one per GPU is usual."""
    tower: TowerOptions = field(default_factory=lambda: TowerOptions(weights=""))
    """The visual tower; without weights, the one that the run was trained on."""
    codec_weights: str = ""
    """The codec's weights file; empty takes the one that the run was trained on."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the decoder."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True)
class Job:
    """What every process must know beside the options: where videos start, and what is asked for."""

    starts: dict[str, float]
    """Seconds at which a video's stretch starts, by key; 0 for those not in it."""
    request: str
    """Identifies the run's weights and the options that decide the sound; kept in KEY.json, so that a rerun knows what is done."""


@dataclass(frozen=True)
class Progress:
    """What a batch has done since it last said so."""

    sound_seconds: float = 0.0
    row: dict[str, Any] | None = None


class Film(MediaError):  # noqa: N818 - not an error
    """Not an error: the video is too long to be taken at once."""


def run(config: GenerateConfig) -> list[dict[str, Any]]:
    """Put generated sound under videos: for each an mp4 with the original pictures, a wav and a ledger row."""
    config = replace(config, run=named_run(config.run))
    config.check(read_config(local_run(config.run)))
    if config.candidates < 1 or config.batch_clips < 1:
        raise ValueError(f"candidates={config.candidates}, batch_clips={config.batch_clips}: expected 1 or more")
    config = replace(
        config,
        data=storage.absolute(config.data) if config.data else "",
        out=storage.absolute(config.out),
        sync_weights=str(synchformer_file(config.sync_weights).absolute()) if config.candidates > 1 else config.sync_weights,
    )
    networks = own_networks(config)
    clips, starts = videos(config)
    ends = {clip.key: clip.end_seconds for clip in clips if clip.end_seconds is not None}
    job = Job(starts, request_id(config, networks.run, starts, ends))
    todo = [clip for clip in clips if not _is_done(config.out, clip, job)]
    print(f"generate: {len(clips) - len(todo)} videos done, {len(todo)} to do", flush=True)
    if todo:
        with cluster(config.ray) as ray_cluster:
            ray_cluster.start()
            _generate_all(config, job, todo)
    rows = [json.loads(storage.read_bytes(_row_path(config.out, clip))) for clip in clips]
    ledger = storage.join(config.out, "ledger.parquet")
    write_table(ledger, rows)
    reasons = Counter(row["reason"] for row in rows if row["status"] == "failed")
    why = f" ({', '.join(f'{reason} {count}' for reason, count in sorted(reasons.items()))})" if reasons else ""
    print(f"generate: {len(rows) - reasons.total()} ok, {reasons.total()} failed{why} -> {config.out}", flush=True)
    if rows and reasons.total() == len(rows):
        raise JobError(f"generate: none of {len(rows)} videos could be done; {ledger} has the reasons, the first is: {rows[0]['message']}")
    return rows


def own_networks(config: GenerateConfig) -> Networks:
    """The run's networks as files of the machine that this is called on."""
    return find_networks(
        config.run, tower=config.tower, codec=config.codec_weights, weights=config.weights, precision=config.precision, engine=config.engine
    )


def _generate_all(config: GenerateConfig, job: Job, todo: list[Clip]) -> None:
    """Deal batches of videos to the processes that hold the networks."""
    if config.tower.device == "auto":
        config = replace(config, tower=replace(config.tower, device=cluster_device()))
    waiting = deque(todo[start : start + config.batch_clips] for start in range(0, len(todo), config.batch_clips))
    on_gpu = config.tower.device.startswith("cuda")
    remote = ray.remote(Generator).options(num_gpus=int(on_gpu), num_cpus=1 if on_gpu else config.tower.threads, max_restarts=2, max_task_retries=2)
    idle: deque[Any] = deque(remote.remote(config, job) for _ in range(min(config.actors, len(waiting))))
    running: dict[ray.ObjectRefGenerator, Any] = {}
    with Bar(len(todo)) as bar:
        while running or waiting:
            while idle and waiting:
                actor = idle.popleft()
                running[actor.batch.options(num_returns="streaming").remote(waiting.popleft())] = actor
            ready: list[Any] = ray.wait(list(running), num_returns=1)[0]
            for batch in ready:
                try:
                    bar.update(cast(Progress, ray.get(next(batch))))
                except StopIteration:
                    idle.append(running.pop(batch))
                except RayError as error:
                    raise JobError(f"{root_cause(error)}; what is done is kept, the same command goes on") from error


class Bar:
    """One line: videos, failures, and how fast sound comes out. A log file gets it now and then instead of a line that redraws itself."""

    def __init__(self, total: int) -> None:
        # It is drawn from here alone, so that a film shows its progress too.
        self._bar = tqdm(total=total, desc="generate", unit="video", mininterval=1e9)
        self._seconds, self._failed, self._drawn = 0.0, 0, 0.0
        self._every = 0.5 if sys.stderr.isatty() else 30.0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, progress: Progress) -> None:
        """Count what a batch has done."""
        self._seconds += progress.sound_seconds
        if progress.row is not None:
            self._failed += progress.row["status"] == "failed"
            self._bar.update()
        elapsed = self._bar.format_dict["elapsed"]
        rate = self._seconds / max(elapsed, 1e-3)
        self._bar.set_postfix_str(f"failed={self._failed}, {self._seconds:.0f} s of sound, {rate:.2g} x real time", refresh=False)
        if elapsed - self._drawn >= self._every:
            self._drawn = elapsed
            self._bar.refresh()


class Generator:
    """A process that holds the networks and puts sound under batches of videos."""

    def __init__(self, config: GenerateConfig, job: Job) -> None:
        self.config, self.job = config, job
        self.sounder = Sounder(own_networks(config), config)
        self.media = Index.open(config.data, kind="media") if config.data else None
        device = str(self.sounder.featuriser.device)
        self.scorer = SyncScorer(config.sync_weights, device, head="offset") if config.candidates > 1 else None
        self._pictures: dict[str, np.ndarray] = {}

    def batch(self, clips: list[Clip]) -> Iterator[Progress]:
        """Do a batch of videos. Those of equal length go through the decoder together; films follow, one after the other."""
        films: list[Clip] = []
        groups: dict[tuple[int, int], list[tuple[Clip, Features]]] = {}
        for clip, features in self.sounder.featuriser.run(clips, self._decode):
            if isinstance(features, Film):
                films.append(clip)
            elif isinstance(features, MediaError):
                yield self._failed(clip, features)
            else:
                prompt_steps = 0 if features.codes is None else features.codes.shape[1]
                groups.setdefault((features.avclip.shape[1], prompt_steps), []).append((clip, features))
        for _, members in sorted(groups.items()):
            yield from self._clips([clip for clip, _ in members], [features for _, features in members])
        for clip in films:
            yield from self._film(clip)

    def _clips(self, clips: list[Clip], features: list[Features]) -> Iterator[Progress]:
        """Videos of equal length, with all their candidates, as one batch."""
        sounder, each = self.sounder, self.config.candidates
        tokens = sounder.as_tokens(np.stack([own.avclip[0] for own in features]).repeat(each, axis=0))
        codes = [own.codes for own in features if own.codes is not None]
        prompt = torch.from_numpy(np.stack(codes).astype(np.int64).repeat(each, axis=0)).to(tokens.device) if codes else None
        pieces = []
        for piece in sounder.waves([tokens], seeds=[self._seed(clip, n) for clip in clips for n in range(each)], prompt=prompt):
            pieces.append(piece)
            yield Progress(piece.shape[-1] * len(clips) / sounder.sample_rate_hz)
        sounds = np.concatenate(pieces, axis=-1).reshape(len(clips), each, *pieces[0].shape[1:-1], -1)
        for clip, own, candidates in zip(clips, features, sounds, strict=True):
            # The last segment may have been filled up with a held picture; the sound ends with the pictures.
            whole = np.concatenate(list(sounder.cut([candidates], own.frames)), axis=-1)
            yield self._best(clip, whole, own.frames)

    def _best(self, clip: Clip, candidates: Float32[np.ndarray, "n channels samples"], frames: int) -> Progress:
        """Write the candidate that is best in sync with the pictures."""
        chosen: dict[str, Any] = {}
        if self.scorer is not None:
            best, scores = self.scorer.best(self._pictures.pop(clip.key), list(candidates), self.sounder.sample_rate_hz)
            chosen = {"candidate": best, "sync_scores": [round(float(score), 6) for score in scores]}
        with Draft(clip.key, self.sounder, self.config.normalisation) as draft:
            draft.add(candidates[chosen.get("candidate", 0)])
            return self._put(clip, draft, frames, chosen)

    def _film(self, clip: Clip) -> Iterator[Progress]:
        """A long video, written while it is made."""
        sounder, stretch = self.sounder, self._stretch(clip)
        try:
            source = self._source(clip)
            frames = stretch.frames_of(call(video_frames, source, limits=Limits()))
            with Draft(clip.key, sounder, self.config.normalisation) as draft:
                for piece in sounder.film(source, stretch, seed=self._seed(clip), short_side=self._short_side):
                    draft.add(piece)
                    yield Progress(piece.shape[-1] / sounder.sample_rate_hz)
                yield self._put(clip, draft, frames, {})
        except MediaError as error:
            yield self._failed(clip, error)

    def _seed(self, clip: Clip, candidate: int = 0) -> int:
        return clip_seed(self.config.seed, f"{clip.key}#{candidate}" if candidate else clip.key)

    def _stretch(self, clip: Clip) -> Stretch:
        return Stretch.of(self.job.starts.get(clip.key, 0.0), self.config.segments, end_seconds=clip.end_seconds)

    @property
    def _short_side(self) -> int | None:
        return None if self.media else self.config.short_side

    def _source(self, clip: Clip) -> str | bytes:
        return fetched(clip) if self.media is None else self.media.bytes(self.media.row(clip.key), "mp4")

    def _decode(self, clip: Clip) -> Decoded:
        """Pictures of whole segments, the last one filled up by holding the last picture, and the prompt's sound. Raises Film for a film."""
        if clip.reason:
            raise MediaError(clip.reason, clip.message or "")
        source, stretch = self._source(clip), self._stretch(clip)
        most = round(self.config.film_seconds * FRAME_RATE_HZ)
        pictures = call(partial(clip_pictures, short_side=self._short_side, most_frames=most), source, stretch, limits=Limits())
        if isinstance(pictures, int):
            raise Film("film", f"{pictures / FRAME_RATE_HZ:.0f} s")
        if self.scorer is not None:
            self._pictures[clip.key] = pictures
        return Decoded(whole_segments(pictures), self.sounder.prompt(source, stretch, len(pictures)), own_frames=len(pictures))

    def _put(self, clip: Clip, draft: "Draft", frames: int, more: dict[str, Any]) -> Progress:
        """Put the finished sound under the pictures, and everything where it belongs; the row last: its presence says that the clip is done."""
        config, stretch, seconds = self.config, self._stretch(clip), frames / FRAME_RATE_HZ
        place = {"start_seconds": stretch.start_seconds, "duration_seconds": seconds}
        limits = Limits(clip_seconds=300.0 + seconds)
        try:
            source = self._source(clip)
            wav, note = draft.finish()
            made = call(partial(mux_wav, **place), source, wav, draft.folder / f"{clip.key}.mp4", limits=limits)
            results, notes = {"mp4": made.path, "wav": wav}, [note, made.note]
            if config.originals:
                transcoded = partial(transcode_original, **place)
                original = call(transcoded, source, draft.folder / f"{clip.key}.original.mp4", limits=limits)
                results["original"] = original.path
                notes.append(original.note)
        except MediaError as error:
            return self._failed(clip, error)
        for path in results.values():
            with path.open("rb") as file, storage.writing(storage.join(config.out, path.name)) as out:
                shutil.copyfileobj(file, out, 1 << 20)
        names = {name: path.name for name, path in results.items()}
        message = "; ".join(filter(None, notes)) or None
        result = {"status": "ok", "message": message, "start_seconds": float(stretch.start_seconds), "duration_seconds": seconds}
        return self._finish(clip, {**result, **names, **more})

    def _failed(self, clip: Clip, error: MediaError) -> Progress:
        self._pictures.pop(clip.key, None)
        return self._finish(clip, {"status": "failed", "reason": error.reason, "message": error.message})

    def _finish(self, clip: Clip, result: dict[str, Any]) -> Progress:
        row = {**dict.fromkeys(SCHEMA.names), "key": clip.key, "source": clip.source, **result, "seed": self._seed(clip), "request": self.job.request}
        storage.write_bytes(_row_path(self.config.out, clip), json.dumps(row, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        return Progress(row=row)


class Draft:
    """A sound on its way to its wav: pieces as they come, made as loud as the options say once it is known as a whole."""

    def __init__(self, key: str, sounder: Sounder, options: Normalisation) -> None:
        self._key, self._options = key, options
        self._rate_hz, self._channels = sounder.sample_rate_hz, sounder.codec.channels

    def __enter__(self) -> "Draft":
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)
        self._writer = WavWriter(self.folder / "raw.wav", self._rate_hz, self._channels, bits=32)
        self._meter = Meter(self._rate_hz, self._channels, self._options)
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def add(self, piece: Sound) -> None:
        """The next stretch of the sound."""
        self._writer.write(piece)
        self._meter.add(piece)

    def finish(self) -> tuple[Path, str | None]:
        """The wav of 16 bits, and what a listener should know."""
        self._writer.close()
        wav = self.folder / f"{self._key}.wav"
        return wav, normalise_wav(self.folder / "raw.wav", wav, self._options, meter=self._meter)


def videos(config: GenerateConfig) -> tuple[list[Clip], dict[str, float]]:
    """The videos to do, in the order of their keys, and where their stretches start, in seconds."""
    if bool(config.source) == bool(config.data):
        raise ValueError("give source=VIDEOS or data=MEDIA_DATASET, one of the two")
    starts: dict[str, float] = {}
    if config.data:
        index = Index.open(config.data, kind="media", split=config.data_split or None)
        clips = [Clip(row["key"], row["source"], row["split"], row["label"], row["reason"], row["message"]) for row in index.rows()]
        if index.start_seconds is not None:
            starts = dict(zip(index.keys.to_pylist(), index.start_seconds.tolist(), strict=True))
    else:
        clips = discover(config)
    if config.starts:
        starts = read_starts(config.starts)
        there = {clip.key for clip in clips}
        absent = [Clip(key, key, "test", None, "missing", f"{config.starts} names it, and it is not there") for key in starts if key not in there]
        clips = [clip for clip in clips if clip.key in starts] + absent
    clips.sort(key=lambda clip: (clip.key, clip.source))
    # Of a clip that is a part of its video, starts count from where that begins.
    parts = {clip.key: clip.start_seconds for clip in clips if clip.start_seconds}
    starts = {**parts, **{key: start + parts.get(key, 0.0) for key, start in starts.items()}}
    return clips[: config.limit] if config.limit else clips, starts


def read_starts(path: str) -> dict[str, float]:
    """Start seconds by key from a csv with the header `file,start_sec`. Raises ValueError with the line that is wrong."""
    rows = csv.DictReader(io.StringIO(storage.read_bytes(path).decode()))
    if not {"file", "start_sec"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{path}: the header is {','.join(rows.fieldnames or ())}; expected file,start_sec")
    starts: dict[str, float] = {}
    for number, row in enumerate(rows, 2):
        try:
            start = float(row["start_sec"])
        except (TypeError, ValueError):
            start = math.nan
        if not 0 <= start < math.inf:
            raise ValueError(f"{path}, line {number}: start_sec is {row['start_sec']!r}; expected seconds, 0 or more")
        starts[key_of(Path(row["file"]).stem if row["file"].endswith(VIDEO_SUFFIXES) else row["file"])] = start
    return starts


def request_id(config: GenerateConfig, run: str, starts: dict[str, float], ends: dict[str, float] | None = None) -> str:
    """A hash of what decides the sound: the decoder's weights, the options, and which parts of videos the clips are."""
    decides = {
        "model": sha256_file(weights_file(run, config.weights)),
        "options": {f.name: to_plain(value) if is_dataclass(value := getattr(config, f.name)) else value for f in fields(SoundOptions)},
        "made": [config.precision, config.engine.weights, config.candidates, config.originals, to_plain(config.normalisation), starts],
        **({"ends": ends} if ends else {}),
    }
    if config.candidates > 1:
        decides["sync"] = sha256_file(synchformer_file(config.sync_weights))
    return fingerprint(decides)[:16]


SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "source", "status", "reason", "message")]
    + [("start_seconds", pa.float64()), ("duration_seconds", pa.float64()), ("mp4", pa.string()), ("wav", pa.string()), ("original", pa.string())]
    + [("candidate", pa.int64()), ("sync_scores", pa.list_(pa.float64())), ("seed", pa.int64()), ("request", pa.string())]
)
"""The ledger's columns, which are the keys of KEY.json."""


def write_table(path: str, rows: list[dict[str, Any]]) -> None:
    """The rows as parquet, whole or not at all."""
    with storage.writing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)


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
