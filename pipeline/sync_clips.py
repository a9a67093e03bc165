"""Offsets of many clips: a folder, a list or a media dataset through processes that hold the networks, a parquet row for every clip, good or bad.

The driver writes what has come in as a part beside the result, now and then; a rerun reads the parts and the result, and does what is missing.
Knows nothing of how a clip is judged.
"""

import io
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayError

from configs import storage
from configs.load import JobError
from model.segments import SYNC_CLASS, class_seconds
from model.synchformer import synchformer_file
from model.weights import sha256_file
from pipeline.discover import Clip, DiscoverConfig, discover, discovery
from pipeline.featurise import cluster_device
from pipeline.isolate import Limits
from pipeline.media import MediaError, fetched
from pipeline.progress import Progress, Tally, Tick
from pipeline.ray_loop import RayConfig, cluster
from pipeline.sync_judge import Judge, JudgeOptions
from pipeline.timeline import NEAR_CLASSES, Timeline
from pipeline.workers import root_cause
from shards.dataset import fingerprint
from shards.read import Index

UNIT_CLIPS = 4
"""Clips that a call of a process takes, and that are lost with it."""
CALLS = 2
"""Calls at the same time in each process: while one waits for its clip's pictures, the other computes."""
PART_SECONDS = 30.0
"""What has come in is written at least so often."""
RETRIES = 3
"""Times that Ray repeats a call whose process is lost."""
PART = ".part-"
"""What the parts' names have after the result's, before a number."""


@dataclass(frozen=True)
class ClipsConfig(JudgeOptions, DiscoverConfig, Limits):
    """Options of `soundshard sync` with many clips."""

    source: str = ""
    """Instead of `video`, many: a folder, a list, a csv or a media dataset. Offsets go to out=FILE.parquet, a row for every clip."""
    data_split: str = ""
    """Split of a media dataset; empty takes all."""
    out: str = ""
    """With `source`: the parquet file of offsets, also in object storage. With `fix`: the video with its sound moved."""
    limit: int = 0
    """Clips to do at most, the first in the order of splits and keys; 0 does all."""
    actors: int = 0
    """Processes with the networks; 0 takes one for each GPU, or for each processor where there is none."""
    part_clips: int = 500
    """Rows that are kept in memory before they are written as a part; a run that dies loses no more."""
    retry_failed: bool = False
    """Try failed clips again."""
    overwrite: bool = False
    """Do anew what was made with other networks or options."""
    max_failed_fraction: float = 1.0
    """Largest fraction of failed clips that still counts as success (exit status 0). The rows are written either way."""
    ray: RayConfig = field(default_factory=RayConfig)


SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "split", "label", "source", "status", "reason", "message")]
    + [("duration_seconds", pa.float64()), ("offset_seconds", pa.float64()), ("best_offset_seconds", pa.float64()), ("probability", pa.float32())]
    + [("agreement", pa.float32()), ("synchronisable", pa.float32()), ("probabilities", pa.list_(pa.float32())), ("repeated", pa.bool_())]
    + [("window_seconds", pa.list_(pa.float64())), ("window_offsets", pa.list_(pa.float64())), ("window_faults", pa.list_(pa.string()))]
    + [("version", pa.string())]
)
"""Columns of the result. `offset_seconds` is the estimate, `best_offset_seconds` the most probable class with its `probability`; of the windows,
where their pictures begin, their own most probable offsets, and why some do not count. `version` tells a changed input."""
Row = dict[str, Any]
Name = tuple[str, str, bool]
"""What tells rows apart: key, source, and whether the key was taken already."""


def judge_clips(config: ClipsConfig) -> list[Row]:
    """Every clip's row, in the order of splits and keys; what an earlier run has done is not done again. Raises JobError if too many failed."""
    if not config.out.endswith(".parquet"):
        raise ValueError(f"out is {config.out!r}; expected a file that ends in .parquet for the offsets of source={config.source}")
    config = replace(config, out=storage.absolute(config.out), **resolved(config))
    clips = find_clips(config)
    store = _Store(config.out, request_id(config), overwrite=config.overwrite)
    todo = remaining(clips, store.rows, retry_failed=config.retry_failed)
    print(f"sync: {len(clips) - len(todo)} clips done, {len(todo)} to do", flush=True)
    if todo:
        with store.writing(config.part_clips) as add:
            bad = [clip for clip in todo if clip.reason]
            add([failed_row(clip, MediaError(clip.reason or "", clip.message or "")) for clip in bad])
            if good := [clip for clip in todo if not clip.reason]:
                with cluster(config.ray) as ray_cluster:
                    ray_cluster.start()
                    _judge_all(config, good, bad, add)
    rows = [store.rows[_name(clip)] for clip in clips]
    store.finish(rows)
    print(f"sync: {summary(rows)} -> {config.out}", flush=True)
    failed = [row for row in rows if row["status"] == "failed"]
    if rows and (len(failed) == len(rows) or len(failed) > config.max_failed_fraction * len(rows)):
        raise JobError(
            f"sync: {len(failed)} of {len(rows)} clips failed, more than max_failed_fraction={config.max_failed_fraction:g} allows; {config.out} has "
            f"the reasons, the first is: {failed[0]['reason']}: {failed[0]['message']}"
        )
    return rows


def resolved(options: JudgeOptions) -> dict[str, str]:
    """The weights as files, found before hours of work depend on them. Raises FileNotFoundError that says how to get them."""
    names = ["weights"] + (["synchronisability_weights"] if options.synchronisable else [])
    return {name: str(synchformer_file(getattr(options, name)).absolute()) for name in names}


def find_clips(config: ClipsConfig) -> list[Clip]:
    """The clips to judge."""
    if is_dataset(config.source):
        rows = Index.open(config.source, kind="media", split=config.data_split or None).rows()
        clips = [Clip(row["key"], row["source"], row["split"], row["label"], row["reason"], row["message"]) for row in rows]
        clips.sort(key=lambda clip: (clip.split, clip.key, clip.source))
    else:
        clips = discover(discovery(config))
    return clips[: config.limit] if config.limit else clips


def remaining(clips: Sequence[Clip], rows: Mapping[Name, Row], *, retry_failed: bool) -> list[Clip]:
    """The clips that have no row, or that of another version of their file; with `retry_failed` those that failed, too."""

    def is_done(clip: Clip) -> bool:
        row = rows.get(_name(clip))
        return row is not None and row["version"] == _version(clip) and not (retry_failed and row["status"] == "failed")

    return [clip for clip in clips if not is_done(clip)]


def is_dataset(source: str) -> bool:
    """Whether clips come from a dataset, not from a folder or a list."""
    return storage.is_file(storage.join(source, "dataset.json"))


def request_id(config: ClipsConfig) -> str:
    """A hash of what decides the answers: networks and options. The weights must be files."""
    names = ("start_seconds", "offset_seconds", "every_seconds", "short_videos", "precision", "synchronisable")
    files = [config.weights] + ([config.synchronisability_weights] if config.synchronisable else [])
    return fingerprint(
        {"weights": [sha256_file(synchformer_file(file)) for file in files], "options": {name: getattr(config, name) for name in names}}
    )[:16]


def judge_options(config: JudgeOptions) -> JudgeOptions:
    """The networks' options alone, out of a job's wider configuration."""
    return JudgeOptions(**{own.name: getattr(config, own.name) for own in fields(JudgeOptions)})


def ok_row(clip: Clip, timeline: Timeline) -> Row:
    """What is kept of a clip."""
    estimate = timeline.estimate()
    return _row(clip) | {
        "status": "ok",
        "message": "shorter than a window, and repeated to fill one: this ranks sounds, it is no offset" if timeline.repeated else None,
        "duration_seconds": timeline.duration_seconds,
        "offset_seconds": estimate.seconds,
        "best_offset_seconds": class_seconds(estimate.best),
        "probability": float(estimate.probabilities[estimate.best]),
        "agreement": estimate.agreement,
        "synchronisable": estimate.synchronisable,
        "probabilities": estimate.probabilities.tolist(),
        "repeated": timeline.repeated,
        "window_seconds": timeline.starts_seconds.round(3).tolist(),
        "window_offsets": timeline.best_seconds.round(2).tolist(),
        "window_faults": list(timeline.faults),
    }


def failed_row(clip: Clip, error: MediaError) -> Row:
    """What is kept of a clip that has no answer."""
    return _row(clip) | {"status": "failed", "reason": error.reason, "message": error.message}


def _row(clip: Clip) -> Row:
    own = {name: getattr(clip, name) for name in ("key", "split", "label", "source")}
    return dict.fromkeys(SCHEMA.names) | own | {"version": _version(clip)}


def _version(clip: Clip) -> str | None:
    """What changes when the clip does: its file's version, and which part of it the clip is."""
    if clip.start_seconds is None and clip.end_seconds is None:
        return clip.version
    return f"{clip.version} [{clip.start_seconds}, {clip.end_seconds})"


def _name(clip: Clip) -> Name:
    return clip.key, clip.source, clip.reason == "duplicate_key"


def _row_name(row: Row) -> Name:
    return row["key"], row["source"], row["reason"] == "duplicate_key"


def summary(rows: Sequence[Row]) -> str:
    """One line a person reads: counts, failures by reason, and how many are in sync."""
    good = [row for row in rows if row["status"] == "ok"]
    reasons = Counter(row["reason"] for row in rows if row["status"] == "failed")
    why = f" ({', '.join(f'{reason} {count}' for reason, count in sorted(reasons.items()))})" if reasons else ""
    text = f"{len(good)} ok, {reasons.total()} failed{why}"
    if good:
        best = np.array([np.argmax(row["probabilities"]) for row in good]) - SYNC_CLASS
        text += f"; {np.mean(np.abs(best) <= NEAR_CLASSES):.0%} within 0.2 s of in sync, {np.mean(best > NEAR_CLASSES):.0%} with the sound ahead, "
        text += f"{np.mean(best < -NEAR_CLASSES):.0%} behind"
    return text


# The cluster


def _judge_all(config: ClipsConfig, todo: list[Clip], failed: list[Clip], add: Callable[[list[Row]], None]) -> None:
    """Deal units of clips to the processes that hold the networks."""
    if config.device == "auto":
        config = replace(config, device=cluster_device())
    on_gpu, units = config.device.startswith("cuda"), deque(todo[at : at + UNIT_CLIPS] for at in range(0, len(todo), UNIT_CLIPS))
    config = replace(config, threads=config.threads or 1)
    resources = ray.cluster_resources()
    count = config.actors or max(1, int(resources.get("GPU", 1)) if on_gpu else int(resources.get("CPU", 1)) // config.threads)
    remote = ray.remote(JudgeActor).options(
        num_gpus=int(on_gpu), num_cpus=1 if on_gpu else config.threads, max_concurrency=CALLS, max_restarts=-1, max_task_retries=RETRIES
    )
    free: deque[Any] = deque(remote.remote(config) for _ in range(min(count, len(units))) for _ in range(CALLS))
    running: dict[ray.ObjectRef, Any] = {}
    tally = Tally()
    with Progress("sync", len(todo) + len(failed)) as progress:
        tally.add(Tick(len(failed), tuple((clip.key, clip.reason or "", clip.message or "") for clip in failed)))
        while running or units:
            while free and units:
                actor = free.popleft()
                running[actor.unit.remote(units.popleft())] = actor
            for ready in ray.wait(list(running), num_returns=1)[0]:
                try:
                    rows, tick = ray.get(ready)
                except RayError as error:
                    raise JobError(f"{root_cause(error)}; what is done is kept, the same command goes on") from error
                free.append(running.pop(ready))
                add(rows)
                tally.add(tick)
                progress.update(tally.snapshot())


class JudgeActor:
    """A process that holds the networks."""

    def __init__(self, config: ClipsConfig) -> None:
        self._judge = Judge(judge_options(config), Limits(config.clip_seconds, config.clip_memory_mb))
        self._media = Index.open(config.source, kind="media", split=config.data_split or None) if is_dataset(config.source) else None

    def unit(self, clips: Sequence[Clip]) -> tuple[list[Row], Tick]:
        """The rows of a few clips."""
        started, rows = time.perf_counter(), [self._row(clip) for clip in clips]
        failures = tuple((row["key"], row["reason"], row["message"]) for row in rows if row["status"] == "failed")
        return rows, Tick(len(rows), failures, {"judge": time.perf_counter() - started}, node=platform.node())

    def _row(self, clip: Clip) -> Row:
        try:
            source = fetched(clip) if self._media is None else self._media.bytes(self._media.row(clip.key), "mp4")
            return ok_row(clip, self._judge.judge(source, part=(clip.start_seconds, clip.end_seconds), as_stored=self._media is not None))
        except MediaError as error:
            return failed_row(clip, error)


# What is kept


class _Store:
    """The result and the parts beside it."""

    def __init__(self, out: str, request: str, *, overwrite: bool) -> None:
        self._out, self._request = out, request
        self._pending: list[Row] = []
        self._written = time.monotonic()
        self.rows: dict[Name, Row] = {}
        beside, prefix = storage.parent(out), f"{storage.basename(out)}{PART}"
        self._parts = [storage.join(beside, name) for name in storage.names(beside) if name.startswith(prefix)]
        for path in ([out] if storage.is_file(out) else []) + self._parts:
            table = pq.read_table(io.BytesIO(storage.read_bytes(path)))
            made = (table.schema.metadata or {}).get(b"request", b"").decode()
            if made != request and not overwrite:
                raise ValueError(
                    f"{path} was made with other networks or options ({made or 'unknown'}, now {request}); give another out=, or overwrite=true"
                )
            if made == request:
                self.rows |= {_row_name(row): row for row in table.to_pylist()}
        self._number = 1 + max((int(path.rpartition("-")[2]) for path in self._parts), default=-1)

    @contextmanager
    def writing(self, part_clips: int) -> Iterator[Callable[[list[Row]], None]]:
        """Gives what takes rows as they come; at the end, also if it comes early, nothing is only in memory."""

        def add(rows: list[Row]) -> None:
            self.rows |= {_row_name(row): row for row in rows}
            self._pending += rows
            if len(self._pending) >= part_clips or time.monotonic() - self._written > PART_SECONDS:
                self._write_part()

        try:
            yield add
        finally:
            self._write_part()

    def _write_part(self) -> None:
        if self._pending:
            path = f"{self._out}{PART}{self._number:06d}"
            self._write(path, self._pending)
            self._parts.append(path)
            self._number += 1
            self._pending = []
        self._written = time.monotonic()

    def finish(self, rows: list[Row]) -> None:
        """The rows as the result; the parts are no longer needed."""
        self._write(self._out, rows)
        for path in self._parts:
            storage.remove(path)

    def _write(self, path: str, rows: list[Row]) -> None:
        with storage.writing(path) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({"request": self._request})), file)
