"""Ledgers: a parquet file per shard with one row per input clip, good or bad, and for a good one where each member lies in the tar.

Knows parquet, the columns, and which files of a dataset are shards. Opens no tar and no `dataset.json`; the dataset's fingerprint is handed in and
kept in the file's metadata.
"""

import hashlib
import io
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs import storage
from shards.dataset import DatasetMismatch
from shards.sealed import Writer

MANIFEST = "manifest.parquet"
SHARD_NAME = re.compile(r"(?P<split>[\w-]+)-\d{6,}", re.ASCII)
FINGERPRINT = b"soundshard.fingerprint"
MERGED = b"soundshard.merged"
"""In a manifest's metadata: `Listing.digest` of the ledgers that it was made of."""
READERS = 16
"""Threads that read ledgers ahead; each ledger is small, and reading it from afar is mostly waiting."""
MANIFEST_GROUP_ROWS = 1 << 13
"""Rows after which a row group of a manifest or view ends; a manifest's with the shard that it is in. Ledgers in memory are mostly overhead, 60 KB
for 14 rows; groups are not, and rows can be chosen from them one after the other."""
ROW_FIELDS = [
    pa.field("key", pa.string()),
    pa.field("split", pa.string()),
    pa.field("label", pa.string()),
    pa.field("source", pa.string()),
    pa.field("status", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("message", pa.string()),
    pa.field("duration_seconds", pa.float64()),
    pa.field("shard", pa.string()),
    pa.field("shard_sha256", pa.string()),
]
MEMBER_FIELDS = {"offset": pa.int64(), "size": pa.int64(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
"""Columns `EXT.offset` and `EXT.size` (of the payload in the tar) for a member; `EXT.shape` and `EXT.dtype` (numpy's, `<f2`) for npy members."""


def extensions(table: pa.Table) -> list[str]:
    """The member extensions that a ledger describes, sorted."""
    return sorted(name.removesuffix(".offset") for name in table.column_names if name.endswith(".offset"))


def to_table(rows: Sequence[dict], fingerprint: str) -> pa.Table:
    """Rows (column name -> value, absent for null) as a ledger, members' columns sorted by extension."""
    names = sorted({name for row in rows for name in row} - {field.name for field in ROW_FIELDS})
    members = [pa.field(name, MEMBER_FIELDS[name.rpartition(".")[2]]) for name in _member_order(names)]
    return pa.Table.from_pylist(list(rows), schema=pa.schema([*ROW_FIELDS, *members], metadata={FINGERPRINT: fingerprint.encode()}))


def _member_order(names: Iterable[str]) -> list[str]:
    order = list(MEMBER_FIELDS)
    return sorted(names, key=lambda name: (name.rpartition(".")[0], order.index(name.rpartition(".")[2])))


@dataclass(frozen=True)
class Listing:
    """The shards of a dataset by one look at its folder or prefix: sizes in bytes, by shard name, sorted."""

    ledgers: dict[str, int]
    tars: dict[str, int]
    manifest: bool
    """Whether there is one, up to date or not."""

    @property
    def done(self) -> set[str]:
        """Shards that are committed: the ledger is there, and nobody removed the tar."""
        return self.ledgers.keys() & self.tars.keys()

    @property
    def digest(self) -> str:
        """A hash over the ledgers' names and sizes.

        Whoever replaces a ledger removes the manifest first, so times, which copying changes, need not be compared.
        """
        return hashlib.sha256("".join(f"{name} {size}\n" for name, size in self.ledgers.items()).encode()).hexdigest()


def listing(root: str | os.PathLike) -> Listing:
    """What shards there are. A folder that does not exist has none."""
    return listing_of(storage.scan(root, recursive=False) if storage.is_remote(root) or storage.is_folder(root) else [])


def listing_of(files: Iterable[storage.Stat]) -> Listing:
    """What shards there are among the files of a dataset."""
    found: dict[str, dict[str, int]] = {"parquet": {}, "tar": {}}
    manifest = False
    for file in files:
        name, _, kind = storage.basename(file.path).rpartition(".")
        manifest |= f"{name}.{kind}" == MANIFEST
        if kind in found and SHARD_NAME.fullmatch(name):
            found[kind][name] = file.size
    return Listing(dict(sorted(found["parquet"].items())), dict(sorted(found["tar"].items())), manifest)


def path_of(root: str | os.PathLike, name: str) -> str:
    """Where the ledger of a shard is."""
    return storage.join(root, f"{name}.parquet")


def write(path: str | os.PathLike, table: pa.Table) -> None:
    """Writes a ledger atomically. The same table and pyarrow version give the same bytes."""
    storage.write_bytes(path, content(table))


def content(table: pa.Table) -> memoryview:
    """The file that a ledger is."""
    buffer = io.BytesIO()
    with writer(buffer, table.schema) as file:
        file.write_table(table, row_group_size=MANIFEST_GROUP_ROWS)
    return buffer.getbuffer()


def writer(file: Any, schema: pa.Schema, *, dictionary: Sequence[str] | None = None) -> Writer:
    """What writes a ledger, manifest or plan into an open file, by row groups, with a hash over its bytes. `dictionary`: columns of few values."""
    return Writer(file, schema, dictionary=dictionary)


def read(path: str | os.PathLike, *, fingerprint: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """A ledger or manifest; refuses one that belongs to a dataset of another fingerprint."""
    file = open_file(path, fingerprint=fingerprint)
    return file.read(columns=None if columns is None else list(columns), use_threads=False)


def open_file(path: str | os.PathLike, *, fingerprint: str | None = None) -> pq.ParquetFile:
    """A ledger or manifest, open: locally by what is read of it, from afar whole. Refuses another fingerprint, as `read` does."""
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(path)) if storage.is_remote(path) else os.fspath(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not readable as parquet ({error}); remove it and run the job again") from error
    found = (file.schema_arrow.metadata or {}).get(FINGERPRINT, b"").decode()
    if fingerprint is not None and found != fingerprint:
        raise DatasetMismatch(
            f"{path} belongs to a dataset with fingerprint {found[:12] or '(none)'}; the dataset.json beside it has {fingerprint[:12]}"
        )
    return file


def open_manifest(root: str | os.PathLike, found: Listing, fingerprint: str) -> pq.ParquetFile | None:
    """The manifest, if there is one that was made of exactly the ledgers that are there."""
    if not found.manifest:
        return None
    try:
        file = open_file(storage.join(root, MANIFEST))
    except FileNotFoundError:  # removed since
        return None
    metadata = file.schema_arrow.metadata or {}
    current = metadata.get(FINGERPRINT) == fingerprint.encode() and metadata.get(MERGED) == found.digest.encode()
    return file if current else None


def read_ahead(root: str | os.PathLike, names: Iterable[str], fingerprint: str) -> Iterator[pa.Table]:
    """The ledgers of these shards, in this order, read ahead by a few threads: a few are in memory."""
    ahead: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="soundshard-ledgers") as pool:
        try:
            for name in names:
                ahead.append(pool.submit(read, path_of(root, name), fingerprint=fingerprint))
                if len(ahead) > 2 * READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def merge(tables: Sequence[pa.Table], fingerprint: str) -> pa.Table:
    """Ledgers of one dataset, one after the other; columns that one of them lacks are null there."""
    return conform(tables, unified([table.schema for table in tables], fingerprint))


def unified(schemas: Iterable[pa.Schema], fingerprint: str) -> pa.Schema:
    """The columns of all these ledgers, in the order of a ledger's columns."""
    fields = {field.name: field for schema in schemas for field in schema}
    base = [field.name for field in ROW_FIELDS]
    members = [fields[name] for name in _member_order(set(fields) - set(base))]
    return pa.schema([*ROW_FIELDS, *members], metadata={FINGERPRINT: fingerprint.encode()})


def conform(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """Ledgers, one after the other, with the columns of `schema`, which are all of theirs or more."""
    together = pa.concat_tables([schema.empty_table(), *tables], promote_options="default")
    return together.select(schema.names).replace_schema_metadata(schema.metadata)
