"""Datasets of any size without a byte of media: real ledgers over tars that are nothing but holes, so that indexes, views and streams really read.

A tar of holes takes no room on the disk and is zeros when it is read: a feature is 0, a code is 0, a json member is NUL bytes. No tar reader can read
one, unless `whole=True`: then headers and json members are there, as islands in the holes, and the ledger has the tar's own hash.

Which clips are good, how long they are and which class they have follows from their keys alone.

Knows the dataset format. Knows no job and no list's own form: keys are handed in, or made up.
"""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_TOKENS
from shards import ledger
from shards.dataset import create_or_check, json_bytes, new_info

WIDTH = 768
"""Of Synchformer's features."""
CODEC = {"name": "encodec24", "sample_rate_hz": 24000, "hop_samples": 320, "channels": 1, "codebooks": 8, "card": 1024}
HOP_FRAMES = 8
STEPS_PER_FRAME = 3
"""Of EnCodec's 75 steps a second and 25 frames a second."""
CLASSES = 309
CLIP_SECONDS, SHORTEST_SECONDS = 10.0, 3.0
FAILURES = ("missing", "undecodable", "no_audio", "too_short")
JSON_BYTES = 211
BLOCK, RECORD, NPY_HEADER = 512, 10240, 128
"""Bytes of a tar's header block and of the unit that its length is a multiple of, and of an npy header."""


@dataclass(frozen=True)
class MadeClips:
    """The clips of a made dataset, one element per clip, sorted as a plan sorts them."""

    keys: list[str]
    splits: list[str]
    chance: np.ndarray
    """64 bits of each key's hash, from which the rest is decided."""

    @property
    def failed(self) -> np.ndarray:
        """Whether a clip failed: one in 29."""
        return self.chance % np.uint64(29) == 0

    @property
    def frames(self) -> np.ndarray:
        """Of 25 in a second: those of 10 s, and of one clip in 13 fewer."""
        short = (self.chance >> np.uint64(8)) % np.uint64(13) == 0
        least, most = int(SHORTEST_SECONDS * FRAME_RATE_HZ), int(CLIP_SECONDS * FRAME_RATE_HZ)
        return np.where(short, least + ((self.chance >> np.uint64(16)) % np.uint64(most - least)).astype(np.int64), most)

    @property
    def labels(self) -> list[str]:
        """Of as many classes as VGGSound has, some with a comma as there."""
        return [f"sound, number {number}" if number % 7 == 0 else f"sound number {number}" for number in (self.chance % np.uint64(CLASSES)).tolist()]

    def good_keys(self, split: str | None = None) -> list[str]:
        """The keys of the clips that did not fail, of one split or of all, in order."""
        return [key for key, of, failed in zip(self.keys, self.splits, self.failed, strict=True) if not failed and split in (None, of)]


def clips_of(keys: Mapping[str, Sequence[str]]) -> MadeClips:
    """Clips with these keys, by split."""
    found = sorted((split, key) for split, members in keys.items() for key in members)
    chance = np.frombuffer(b"".join(blake2b(key.encode(), digest_size=8).digest() for _, key in found), "<u8")
    return MadeClips([key for _, key in found], [split for split, _ in found], chance)


def made_up_keys(count: int) -> dict[str, list[str]]:
    """Keys of VGGSound's form that nobody uploaded, in its proportions: some begin with `-`, all have a start and an end 10 s later."""
    letters = np.frombuffer(b"-_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", np.uint8)
    rng = np.random.default_rng(count)
    ids = letters[rng.integers(0, len(letters), (count, 11))].tobytes().decode()
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number, start in enumerate(rng.integers(0, 600, count).tolist()):
        split = "test" if number % 13 == 0 else "validation" if number % 10 == 0 else "train"
        found[split].append(f"{ids[11 * number : 11 * number + 11]}_{start * 1000}_{start * 1000 + 10000}")
    return found


def published_keys(datasets: Path) -> dict[str, list[str]]:
    """VGGSound's own keys, from the lists that V-AURA publishes."""
    return {split: (datasets / f"vggsound/vggsound_{split}.txt").read_text().split() for split in ("train", "validation", "test")}


def write_dataset(
    root: Path,
    clips: MadeClips,
    *,
    kind: str = "features",
    width: int = WIDTH,
    clips_per_shard: int = 64,
    whole: bool = False,
) -> int:
    """Writes the shards and ledgers of a `features` or `media` dataset; no manifest. Returns how many shards there are.

    `width` of the features; narrow ones where all bytes are to be read, which are in memory then. `whole` tars are
    what their ledgers say, but that all arrays are zeros.
    """
    codec = {"hop_frames": HOP_FRAMES, "views": 1, "tower": {"config": {"width": width}, "weights_sha256": "0" * 64}, "codec": CODEC}
    info = new_info(
        kind, {"clips_per_shard": clips_per_shard, **(codec if kind == "features" else {"frame_rate_hz": FRAME_RATE_HZ})}, {"made": "holes"}
    )
    create_or_check(root, info)
    columns = _columns(clips, _payloads(clips, kind, width))
    shards = list(_shards(clips, clips_per_shard))
    with mock.patch("os.fsync"):  # what is made here need not outlive a power cut, and thousands of syncs take minutes
        for name, first, last in shards:
            _write_shard(root, name, columns.slice(first, last - first), info.fingerprint, whole=whole)
    return len(shards)


@dataclass(frozen=True)
class _Payload:
    """One member of every clip."""

    size: np.ndarray
    """Bytes."""
    shape: np.ndarray | None = None
    """Of an npy member: [clips, dimensions]."""
    dtype: str | None = None


def _payloads(clips: MadeClips, kind: str, width: int) -> dict[str, _Payload]:
    """Of each member, by extension, sorted."""
    frames = clips.frames
    ones = np.ones_like(frames)
    json = {"json": _Payload(ones * JSON_BYTES)}
    if kind == "media":
        return json | {"mp4": _Payload(frames * 2971 + (clips.chance % np.uint64(50021)).astype(np.int64))}
    segments = (frames - SEGMENT_FRAMES) // HOP_FRAMES + 1
    features = _npy([ones, segments, ones * SEGMENT_TOKENS, ones * width], "<f2")
    return {"avclip.npy": features, f"{CODEC['name']}.npy": _npy([ones * CODEC["codebooks"], frames * STEPS_PER_FRAME], "<u2")} | json


def _npy(shape: list[np.ndarray], dtype: str) -> _Payload:
    return _Payload(NPY_HEADER + np.prod(shape, axis=0) * np.dtype(dtype).itemsize, np.stack(shape, axis=1), dtype)


def _columns(clips: MadeClips, payloads: Mapping[str, _Payload]) -> pa.Table:
    """The columns of all ledgers, but for those of shards; offsets are as if each clip began its tar. `taken`: the bytes that it takes there."""
    failed, keys = clips.failed, clips.keys
    reasons = np.array(FAILURES)[((clips.chance >> np.uint64(40)) % np.uint64(len(FAILURES))).astype(np.int64)]
    columns: dict[str, pa.Array] = {
        "key": pa.array(keys),
        "split": pa.array(clips.splits),
        "label": pa.array(clips.labels),
        "source": pa.array([f"/made/{key}.mp4" for key in keys]),
        "status": pa.array(np.where(failed, "failed", "ok")),
        "reason": pa.array(reasons, mask=~failed),
        "message": pa.array(np.full(len(keys), "made to fail"), mask=~failed),
        "duration_seconds": pa.array(clips.frames / FRAME_RATE_HZ, mask=failed),
    }
    at = np.zeros(len(keys), np.int64)
    for extension, payload in payloads.items():
        columns |= {f"{extension}.offset": pa.array(at + BLOCK, mask=failed), f"{extension}.size": pa.array(payload.size, mask=failed)}
        at = at + BLOCK + -(-payload.size // BLOCK) * BLOCK
        if payload.shape is not None:
            ends = np.concatenate([[0], np.cumsum(np.where(failed, 0, payload.shape.shape[1]))]).astype(np.int32)
            shapes = pa.ListArray.from_arrays(pa.array(ends), pa.array(payload.shape[~failed].reshape(-1)), mask=pa.array(failed))
            columns |= {f"{extension}.shape": shapes, f"{extension}.dtype": pa.array(np.full(len(keys), payload.dtype), mask=failed)}
    return pa.table(columns | {"taken": pa.array(np.where(failed, 0, at))})


def _shards(clips: MadeClips, clips_per_shard: int) -> Iterator[tuple[str, int, int]]:
    """The name of each shard and its range of clips."""
    splits = np.array(clips.splits)
    bounds = [0, *(np.flatnonzero(splits[1:] != splits[:-1]) + 1).tolist(), len(splits)]
    for first, last in pairwise(bounds):
        for number, start in enumerate(range(first, last, clips_per_shard)):
            yield f"{clips.splits[first]}-{number:06d}", start, min(last, start + clips_per_shard)


def _write_shard(root: Path, name: str, rows: pa.Table, fingerprint: str, *, whole: bool) -> None:
    taken = rows["taken"].to_numpy()
    before, failed, end = np.cumsum(taken) - taken, taken == 0, int(taken.sum()) + 2 * BLOCK
    with open(root / f"{name}.tar", "wb") as file:
        file.truncate(-(-end // RECORD) * RECORD)
    columns = {field: rows[field] for field in rows.column_names if field != "taken"}
    for field in [field for field in columns if field.endswith(".offset")]:
        columns[field] = pa.chunked_array([pa.array(columns[field].fill_null(0).to_numpy() + before, mask=failed)])
    if whole:
        _write_islands(root / f"{name}.tar", pa.table(columns).filter(pa.array(~failed)))
    sha256 = _hash(root / f"{name}.tar") if whole else blake2b(name.encode(), digest_size=32).hexdigest()
    table = pa.table(columns | {"shard": pa.array([name] * len(rows)), "shard_sha256": pa.array([sha256] * len(rows))})
    schema = ledger.unified([table.schema], fingerprint)
    ledger.write(ledger.path_of(root, name), table.select(schema.names).cast(schema))


def _write_islands(path: Path, rows: pa.Table) -> None:
    """What of a tar is not zeros: its headers, those of arrays, and json members."""
    with open(path, "r+b") as file:
        for row in rows.to_pylist():
            for extension in ledger.extensions(rows):
                info = tarfile.TarInfo(f"{row['key']}.{extension}")
                info.size, info.mode = row[f"{extension}.size"], 0o644
                file.seek(row[f"{extension}.offset"] - BLOCK)
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                if extension == "json":
                    file.write(json_bytes({name: row[name] for name in ("key", "split", "label")}).ljust(JSON_BYTES))
                elif extension.endswith("npy"):
                    shape, dtype = tuple(row[f"{extension}.shape"]), row[f"{extension}.dtype"]
                    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
