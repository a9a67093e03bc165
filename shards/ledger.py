"""Ledgers: a parquet file per shard with one row per input clip, good or bad, and for a good one where each member lies in the tar.

Knows parquet and the columns. Opens no tar and no `dataset.json`; the dataset's fingerprint is handed in and kept in the file's metadata.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.dataset import DatasetMismatch, replacing

MANIFEST = "manifest.parquet"
FINGERPRINT = b"soundshard.fingerprint"
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


def merge(tables: Sequence[pa.Table], fingerprint: str) -> pa.Table:
    """Ledgers of one dataset, one after the other; columns that one of them lacks are null there."""
    merged = pa.concat_tables([to_table([], fingerprint), *tables], promote_options="default")
    base = [field.name for field in ROW_FIELDS]
    merged = merged.select([*base, *_member_order(set(merged.column_names) - set(base))])
    return merged.replace_schema_metadata({FINGERPRINT: fingerprint.encode()})


def write(path: Path, table: pa.Table) -> None:
    """Writes a ledger or manifest atomically. The same table and pyarrow version give the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=3, row_group_size=1 << 20)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def read(path: Path, *, fingerprint: str | None = None) -> pa.Table:
    """A ledger or manifest; refuses one that belongs to a dataset of another fingerprint."""
    try:
        table = pq.ParquetFile(path).read()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not readable as parquet ({error}); remove it and run the job again") from error
    found = (table.schema.metadata or {}).get(FINGERPRINT, b"").decode()
    if fingerprint is not None and found != fingerprint:
        raise DatasetMismatch(
            f"{path} belongs to a dataset with fingerprint {found[:12] or '(none)'}; the dataset.json beside it has {fingerprint[:12]}"
        )
    return table


def paths(root: Path) -> list[Path]:
    """The ledgers of a dataset, sorted by shard name."""
    return sorted((path for path in root.glob("*.parquet") if path.name != MANIFEST and not path.name.startswith(".")), key=lambda path: path.stem)
