"""A view (or a dataset) written out as shards of its own: members are copied by ranges of bytes, nothing is decoded or computed.

What is written is what preparing only those clips would have written: the rows by split, key and source, cut into shards of as many; the same tars to
the byte. A record's `KEY.json` says the clip's split and label, so it is written anew where the view gives it others.

Knows the dataset format. Knows no meaning of a member but for that of `json`.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa

from configs import storage
from shards import ledger
from shards.dataset import DatasetMismatch, create_or_check, json_bytes, read_info
from shards.read import Index
from shards.write import Entry, Totals, done_shards, write_manifest, write_shard

PIECE_BYTES = 8 << 20
"""What is read at once, of clips that lie side by side."""
WIDEST_GAP_BYTES = 1 << 18
"""Between two clips that are read at once."""
PIECES_AHEAD = 3
Row = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with the clips that are done and those of all shards, whenever a shard is."""


def materialise(
    view: str | os.PathLike, out: str | os.PathLike, *, clips_per_shard: int | None = None, workers: int = 4, progress: Progress | None = None
) -> Totals:
    """Writes the rows of a view, good and bad, to the dataset `out`, and returns what it holds. Finished shards of an earlier run stay.

    `clips_per_shard` is by default what the parent was cut by. `workers` shards are written at a time. DatasetMismatch where `out` holds other rows.
    """
    index = Index.open(view)
    size = clips_per_shard or _clips_per_shard(index)
    rows = index.table.sort_by([("split", "ascending"), ("key", "ascending"), ("source", "ascending")])
    shards = _cut(rows, size)
    _open(storage.absolute(out), index, rows, size)
    done = done_shards(out)
    finished = sum(len(part) for name, part in shards.items() if name in done)

    def write(name: str) -> int:
        write_shard(out, name, _entries(index.root, shards[name]))
        return len(shards[name])

    with ThreadPoolExecutor(workers, thread_name_prefix="soundshard-copy") as pool:
        try:
            for count in pool.map(write, [name for name in shards if name not in done]):
                finished += count
                if progress is not None:
                    progress(finished, rows.num_rows)
        finally:
            pool.shutdown(cancel_futures=True)
    storage.sweep(out)
    return write_manifest(out)


def _clips_per_shard(index: Index) -> int:
    """What the dataset was cut by: as its description says, or the most rows that one of its shards has."""
    told = index.info.spec.get("clips_per_shard")
    if isinstance(told, int):
        return told
    whole = Index.open(index.root).table["shard"].value_counts()
    return max((count["counts"].as_py() for count in whole), default=1)


def _cut(rows: pa.Table, size: int) -> dict[str, pa.Table]:
    """The rows of every shard, which are sorted."""
    if size < 1:
        raise ValueError(f"clips_per_shard is {size}; expected at least 1")
    shards: dict[str, pa.Table] = {}
    counts = {count["values"].as_py(): count["counts"].as_py() for count in rows["split"].value_counts()}
    start = 0
    for split in sorted(counts):
        for number, first in enumerate(range(0, counts[split], size)):
            shards[f"{split}-{number:06d}"] = rows.slice(start + first, min(size, counts[split] - first))
        start += counts[split]
    return shards


def _open(out: str, index: Index, rows: pa.Table, size: int) -> None:
    """Writes `dataset.json`, or checks that the one there is for these rows."""
    digest = hashlib.sha256(json_bytes([size, *(rows[name].to_pylist() for name in ("split", "key", "source", "status", "shard_sha256"))]))
    made = {"of": index.root, "selection": (index.info.view or {}).get("selection", []), "rows": digest.hexdigest()}
    info = replace(index.info, view=None, provenance={**index.info.provenance, "materialised": made})
    create_or_check(out, info)
    there = read_info(out).provenance.get("materialised", {})
    if there.get("rows") != made["rows"]:
        raise DatasetMismatch(f"{out} holds {'other clips' if there else 'a dataset that was not copied from a view'}; write to another folder")


def _entries(root: str, rows: pa.Table) -> Iterator[Entry]:
    """A shard's entries, read ahead."""
    extensions = ledger.extensions(rows)
    pieces = _pieces(rows.to_pylist(), extensions)
    with ThreadPoolExecutor(PIECES_AHEAD, thread_name_prefix="soundshard-read") as pool:
        ahead: deque[tuple[list[Row], Future[tuple[bytes, int]]]] = deque()
        try:
            for piece in pieces:
                ahead.append((piece, pool.submit(_read, root, piece, extensions)))
                if len(ahead) > PIECES_AHEAD:
                    yield from _made(*ahead.popleft(), extensions)
            while ahead:
                yield from _made(*ahead.popleft(), extensions)
        finally:
            pool.shutdown(cancel_futures=True)


def _made(rows: list[Row], reading: Future[tuple[bytes, int]], extensions: Sequence[str]) -> Iterator[Entry]:
    data, begin = reading.result()
    yield from (_entry(row, data, begin, extensions) for row in rows)


def _pieces(rows: list[Row], extensions: Sequence[str]) -> Iterator[list[Row]]:
    """Rows that are read at once: neighbours in one shard of the parent, in its order. Failed rows, of which nothing is read, go along."""
    piece: list[Row] = []
    shard, start, stop = "", 0, 0
    for row in rows:
        if row["status"] != "ok":
            piece.append(row)
            continue
        first, last = _extent(row, extensions)
        apart = row["shard"] != shard or not 0 <= first - stop <= WIDEST_GAP_BYTES or last - start > PIECE_BYTES
        if shard and apart:
            yield piece
            piece = []
        if not shard or apart:
            shard, start = row["shard"], first
        stop = last
        piece.append(row)
    if piece:
        yield piece


def _extent(row: Row, extensions: Sequence[str]) -> tuple[int, int]:
    """Where a clip's members begin and end in their tar."""
    places = [(row[f"{name}.offset"], row[f"{name}.size"]) for name in extensions if row[f"{name}.offset"] is not None]
    return min(offset for offset, _ in places), max(offset + size for offset, size in places)


def _read(root: str, rows: list[Row], extensions: Sequence[str]) -> tuple[bytes, int]:
    """The bytes of these clips, and where in their tar they begin."""
    extents = [_extent(row, extensions) for row in rows if row["status"] == "ok"]
    if not extents:
        return b"", 0
    start, stop = extents[0][0], extents[-1][1]
    path = storage.join(root, f"{next(row['shard'] for row in rows if row['status'] == 'ok')}.tar")
    data = storage.read_bytes(path, start, stop)
    if len(data) < stop - start:
        raise ValueError(f"{path} ends before byte {stop}, to which its ledger leads; `soundshard verify {root}` tells what is broken")
    return data, start


def _entry(row: Row, data: bytes, begin: int, extensions: Sequence[str]) -> Entry:
    members = None
    if row["status"] == "ok":
        places = {name: (row[f"{name}.offset"], row[f"{name}.size"]) for name in extensions}
        members = {name: data[at - begin : at - begin + size] for name, (at, size) in places.items() if at is not None}
        if "json" in members:
            members["json"] = _retold(members["json"], row)
    return Entry(
        key=row["key"],
        split=row["split"],
        label=row["label"],
        source=row["source"],
        duration_seconds=row["duration_seconds"],
        members=members,
        reason=row["reason"],
        message=row["message"],
    )


def _retold(data: bytes, row: Row) -> bytes:
    """A clip's description with the view's split and label, where it says others."""
    described = json.loads(data)
    changed = {name: row[name] for name in ("split", "label") if name in described and described[name] != row[name]}
    return json_bytes(described | changed) if changed else data
