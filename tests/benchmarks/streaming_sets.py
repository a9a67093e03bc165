"""The same generated samples in every format that `tests.benchmarks.streaming` reads, and the window that every reader cuts from a sample.

Knows the formats and their own writers; those of libraries that are not installed cannot be written. Knows no reader.
"""

import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from configs.clock import SEGMENT_FRAMES, SEGMENT_TOKENS, CodecClock
from shards.dataset import create_or_check, new_info
from shards.write import Entry, json_bytes, write_shard

SEGMENTS = 4
"""Of a window: 2.56 s."""
CODEC = {"name": "encodec24", "sample_rate_hz": 24000, "hop_samples": 320, "codebooks": 8, "card": 1024}
STEPS = 750
SHARD_SAMPLES = 500
"""In a tar; the peers' shards and chunks are of their own default or documented sizes."""
TOKEN_BYTES = 184_320
"""Of a sample's features."""
CHUNK_BYTES = "64MB"
"""Of a litdata chunk and of an MDS shard: litdata's documentation and MosaicML's default."""


@dataclass(frozen=True)
class Shape:
    """What the features are cut into. 30 half-overlapping segments of 384 channels and 15 adjoining ones of 768 have as many bytes."""

    hop_frames: int

    @property
    def stride(self) -> int:
        """Stored segments from one segment of a window to the next."""
        return SEGMENT_FRAMES // self.hop_frames

    @property
    def features(self) -> tuple[int, int, int, int]:
        segments = 15 * self.stride
        return 1, segments, SEGMENT_TOKENS, TOKEN_BYTES // (segments * SEGMENT_TOKENS * 2)

    @property
    def codes(self) -> tuple[int, int]:
        return CODEC["codebooks"], STEPS

    @property
    def window_steps(self) -> int:
        return CodecClock(CODEC["sample_rate_hz"], CODEC["hop_samples"]).steps_in(SEGMENTS)

    @property
    def starts(self) -> int:
        """Places at which a window may start."""
        return self.features[1] - (SEGMENTS - 1) * self.stride

    @cached_property
    def segments(self) -> list[slice]:
        """For every start, the window's stored segments."""
        return [slice(start, start + (SEGMENTS - 1) * self.stride + 1, self.stride) for start in range(self.starts)]

    @cached_property
    def steps(self) -> list[slice]:
        """For every start, the window's codec steps."""
        clock = CodecClock(CODEC["sample_rate_hz"], CODEC["hop_samples"])
        found = [clock.window_steps(start * self.hop_frames, SEGMENTS) for start in range(self.starts)]
        return [slice(steps.start, steps.stop) for steps in found]

    def window(self, features: np.ndarray, codes: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """The window of a whole sample, as views."""
        return features[0, self.segments[start]], codes[:, self.steps[start]]


@dataclass(frozen=True)
class Sample:
    """A sample, as every format stores it."""

    key: str
    features: np.ndarray
    codes: np.ndarray
    json: bytes


def samples(shape: Shape, count: int) -> Iterator[Sample]:
    """Random bits, finite as float16."""
    random = np.random.default_rng(0)
    for number in range(count):
        bits = np.frombuffer(random.bytes(TOKEN_BYTES), np.uint16) & 0xBFFF
        codes = random.integers(CODEC["card"], size=shape.codes, dtype=np.uint16)
        about = {"source": f"clips/{number:07d}.mp4", "label": "playing bells", "duration_seconds": 10.0}
        yield Sample(f"{number:07d}", bits.view(np.float16).reshape(shape.features), codes, json_bytes(about))


def written(root: Path, name: str, shape: Shape, count: int) -> Path:
    """The folder with the set in this format, written unless it is there."""
    folder = root / f"{name}-{shape.hop_frames}-{count}"
    if not folder.is_dir():
        temporary = root / f".{folder.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        WRITERS[name](temporary, shape, samples(shape, count))
        os.replace(temporary, folder)
    return folder


def write_tar(folder: Path, shape: Shape, items: Iterable[Sample]) -> None:
    """A dataset of this project: plain tars and their ledgers."""
    create_or_check(folder, new_info("features", spec(shape)))
    held: list[Entry] = []
    shards = 0
    for item in items:
        held.append(entry(item))
        if len(held) == SHARD_SAMPLES:
            write_shard(folder, f"train-{shards:06d}", held)
            held, shards = [], shards + 1
    if held:
        write_shard(folder, f"train-{shards:06d}", held)


def spec(shape: Shape) -> dict:
    """Of a dataset of this project."""
    return {"hop_frames": shape.hop_frames, "views": 1, "codec": CODEC, "tower": {"config": {"width": shape.features[-1]}}}


def entry(item: Sample) -> Entry:
    members = {"avclip.npy": item.features, f"{CODEC['name']}.npy": item.codes, "json": item.json}
    return Entry(item.key, "train", "playing bells", f"clips/{item.key}.mp4", 10.0, members)


def write_mds(folder: Path, shape: Shape, items: Iterable[Sample]) -> None:
    """MosaicML streaming's shards; arrays of a shape and type that the index states, which is their smallest and fastest encoding."""
    columns = {
        "key": "str",
        "features": f"ndarray:float16:{','.join(map(str, shape.features))}",
        "codes": f"ndarray:uint16:{','.join(map(str, shape.codes))}",
        "json": "bytes",
    }
    with importlib.import_module("streaming").MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK_BYTES.lower()) as writer:
        for item in items:
            writer.write({"key": item.key, "features": item.features, "codes": item.codes, "json": item.json})


def write_litdata(folder: Path, shape: Shape, items: Iterable[Sample]) -> None:  # noqa: ARG001 - as the other writers
    """Litdata's chunks, by the writer that its `optimize` uses."""
    cache = importlib.import_module("litdata.streaming.cache").Cache(str(folder), chunk_bytes=CHUNK_BYTES)
    for number, item in enumerate(items):
        cache[number] = {"key": item.key, "features": item.features, "codes": item.codes, "json": item.json}
    cache.done()
    cache.merge()


def write_npz(folder: Path, shape: Shape, items: Iterable[Sample]) -> None:  # noqa: ARG001
    """A file per sample, not compressed."""
    for item in items:
        np.savez(folder / f"{item.key}.npz", features=item.features, codes=item.codes, json=np.frombuffer(item.json, np.uint8))


def write_arrow(folder: Path, shape: Shape, items: Iterable[Sample]) -> None:
    """One Arrow IPC file of fixed-size binary columns, which a reader can map."""
    widths = (int(np.prod(shape.features)) * 2, int(np.prod(shape.codes)) * 2)
    schema = pa.schema([("key", pa.string()), ("features", pa.binary(widths[0])), ("codes", pa.binary(widths[1])), ("json", pa.binary())])
    with pa.ipc.new_file(folder / "data.arrow", schema) as writer:
        held: list[Sample] = []
        for item in items:
            held.append(item)
            if len(held) == 64:
                writer.write_batch(_record_batch(held, schema))
                held = []
        if held:
            writer.write_batch(_record_batch(held, schema))


def _record_batch(held: list[Sample], schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        [item.key for item in held],
        [item.features.tobytes() for item in held],
        [item.codes.tobytes() for item in held],
        [item.json for item in held],
    ]
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)


def write_flat(folder: Path, shape: Shape, items: Iterable[Sample]) -> None:  # noqa: ARG001
    """Features, codes and texts one after another in a file each."""
    texts = []
    with open(folder / "features", "wb") as features, open(folder / "codes", "wb") as codes:
        for item in items:
            item.features.tofile(features)
            item.codes.tofile(codes)
            texts.append([item.key, item.json.decode()])
    (folder / "texts.json").write_text(json.dumps(texts))


WRITERS: dict[str, Callable[[Path, Shape, Iterable[Sample]], None]] = {
    "tar": write_tar,
    "mds": write_mds,
    "litdata": write_litdata,
    "npz": write_npz,
    "arrow": write_arrow,
    "flat": write_flat,
}
