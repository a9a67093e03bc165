"""What a dataset or view holds, in numbers: counts by split, class, reason and shard, bytes, and the columns of its scores.

A pass over columns, so that a million rows take a moment. Knows ledgers and the sidecar of scores. Knows no meaning of a member or of a score, and no
text: `shards.inspect` prints these facts, a page may draw them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import storage
from shards import ledger
from shards.read import ArrayMembers, Index

SCORES = "scores.parquet"
"""In a dataset's or view's folder: a row per key that was scored, a column per score, `<scorer>.error` where a scorer failed."""
ERROR = ".error"
"""After a scorer's name: the column that says why a clip has no scores of it."""


@dataclass(frozen=True)
class SplitFacts:
    """A split, or all of them."""

    name: str
    ok: int
    failed: int
    seconds: float
    """Of the good clips."""
    bytes: int
    """Of its tars; of a view, of its clips' members."""


@dataclass(frozen=True)
class ClassFacts:
    """A label; None stands for clips without one."""

    label: str | None
    ok: int
    failed: int


@dataclass(frozen=True)
class FailureFacts:
    """A reason why clips failed."""

    reason: str
    clips: int
    examples: tuple[tuple[str, str], ...]
    """Sources and messages of the first clips."""


@dataclass(frozen=True)
class MemberFacts:
    """A member that good clips have."""

    extension: str
    clips: int
    bytes: int
    dtype: str
    """Empty for what is no array."""
    least: tuple[int, ...]
    most: tuple[int, ...]
    """Of each dimension."""


@dataclass(frozen=True)
class ShardFacts:
    """A shard, as far as these rows are in it."""

    name: str
    ok: int
    failed: int
    bytes: int
    """Of the good rows' members."""
    tar_bytes: int | None
    """Of the whole file; None if it is not there."""
    sha256: str


@dataclass(frozen=True)
class ScoreFacts:
    """A score of the good clips."""

    name: str
    values: np.ndarray
    """float64 for every good row, in the index's order; NaN where there is none."""
    is_flag: bool = False
    """Whether it is true or false, here 1 and 0."""

    @property
    def known(self) -> np.ndarray:
        """The values that there are."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Scores:
    """The sidecar of scores, as far as it is about these clips."""

    columns: tuple[ScoreFacts, ...]
    errors: tuple[tuple[str, int, str], ...]
    """Scorers that failed on clips: name, how many, and the first message."""


def splits(index: Index, found: ledger.Listing) -> list[SplitFacts]:
    """The splits, by name; and their sum under the name `all` unless there is just one."""
    rows = index.table
    names, split = _codes(rows["split"])
    good = _is_good(rows)
    ok, failed = _counts(split, good, len(names))
    seconds = np.bincount(split, np.where(good, _numbers(rows["duration_seconds"]), 0), len(names))
    if index.view is None:
        shards, shard = _codes(rows["shard"])
        pairs = np.unique(split * len(shards) + shard)
        sizes = np.array([found.tars.get(name or "", 0) for name in shards], np.int64)
        size = np.bincount(pairs // len(shards), sizes[pairs % len(shards)], len(names)) if len(shards) else np.zeros(len(names))
    else:
        size = np.bincount(split, member_bytes(rows), len(names))
    columns = zip(names, ok.tolist(), failed.tolist(), seconds.tolist(), size.astype(np.int64).tolist(), strict=True)
    facts = sorted((SplitFacts(name or "", *counts) for name, *counts in columns), key=lambda fact: fact.name)
    if len(facts) == 1:
        return facts
    return [*facts, SplitFacts("all", int(ok.sum()), int(failed.sum()), float(seconds.sum()), int(size.sum()))]


def classes(index: Index) -> list[ClassFacts]:
    """The labels, those with most good clips first."""
    names, label = _codes(index.table["label"])
    ok, failed = _counts(label, _is_good(index.table), len(names))
    facts = [ClassFacts(*fact) for fact in zip(names, ok.tolist(), failed.tolist(), strict=True)]
    return sorted(facts, key=lambda fact: (-fact.ok, -fact.failed, fact.label or ""))


def failures(index: Index, *, examples: int = 1) -> list[FailureFacts]:
    """Why clips failed, the most frequent reason first, each with the first few."""
    rows = index.table.select(["status", "reason", "source", "message"]).filter(pc.field("status") == "failed")
    counts = sorted(((row["values"] or "", row["counts"]) for row in rows["reason"].value_counts().to_pylist()), key=lambda row: (-row[1], row[0]))
    facts = []
    for reason, clips in counts:
        first = rows.filter(pc.field("reason") == reason).slice(0, examples).to_pylist()
        facts.append(FailureFacts(reason, clips, tuple((row["source"] or "", row["message"] or "") for row in first)))
    return facts


def members(index: Index) -> list[MemberFacts]:
    """The members of the good clips, by extension."""
    facts = []
    for extension, where in index.members.items():
        there = where.offset >= 0
        if there.any():
            dtype, least, most = "", (), ()
            if isinstance(where, ArrayMembers):
                shapes = where.shape[there]
                dtype, least, most = where.dtype.name, tuple(shapes.min(axis=0).tolist()), tuple(shapes.max(axis=0).tolist())
            facts.append(MemberFacts(extension, int(there.sum()), int(where.size[there].sum()), dtype, least, most))
    return facts


def shards(index: Index, found: ledger.Listing) -> list[ShardFacts]:
    """The shards that rows are in, in the ledger's order. Rows of a view that no shard has, such as missing ones, are in none."""
    rows = index.table.filter(pc.field("shard").is_valid())
    names, shard = _codes(rows["shard"])
    ok, failed = _counts(shard, _is_good(rows), len(names))
    size = np.bincount(shard, member_bytes(rows), len(names)).astype(np.int64)
    first = np.unique(shard, return_index=True)[1] if len(names) else np.zeros(0, np.int64)
    digests = rows["shard_sha256"].take(pa.array(first)).to_pylist()
    columns = zip(names, ok.tolist(), failed.tolist(), size.tolist(), digests, strict=True)
    return [ShardFacts(name or "", good, bad, held, found.tars.get(name or ""), digest or "") for name, good, bad, held, digest in columns]


def member_bytes(rows: pa.Table) -> np.ndarray:
    """Bytes of all members of each row: 0 for failed ones. Without what a tar adds to them."""
    total = np.zeros(rows.num_rows, np.int64)
    for extension in ledger.extensions(rows):
        total += rows[f"{extension}.size"].fill_null(0).to_numpy()
    return total


def scores(index: Index) -> Scores | None:
    """The scores of the good clips, from the dataset's sidecar; of a view's, from its own and, for what that lacks, its parent's. None for none."""
    paths = [storage.join(root, SCORES) for root in (index.view, index.root) if root is not None]
    tables = [read_table(path) for path in paths if storage.is_file(path)]
    return scores_of(index, tables) if tables else None


def read_table(path: str) -> pa.Table:
    """A parquet file with a column `key`. Raises ValueError for another one."""
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not readable as parquet ({error}); remove it and score the dataset again") from error
    if "key" not in table.column_names:
        raise ValueError(f"{path} has no column `key`; it has {', '.join(table.column_names)}")
    return table


def scores_of(index: Index, tables: Sequence[pa.Table]) -> Scores:
    """The columns of numbers and flags of tables with a column `key`, in the order of the good clips; the first table that has a column counts."""
    columns: dict[str, ScoreFacts] = {}
    errors: dict[str, tuple[str, int, str]] = {}
    for table in tables:
        place = pc.call_function("index_in", [index.keys], pc.SetLookupOptions(value_set=table["key"].combine_chunks()))
        for field in table.schema:
            column = table[field.name]
            if field.name.endswith(ERROR) and pa.types.is_string(field.type):
                found = column.take(place).drop_null()
                if len(found):
                    errors.setdefault(field.name, (field.name.removesuffix(ERROR), len(found), found[0].as_py()))
            elif field.name not in columns and (flag := pa.types.is_boolean(field.type)) | _is_number(field.type):
                columns[field.name] = ScoreFacts(field.name, _numbers(column.take(place), missing=np.nan), flag)
    return Scores(tuple(columns.values()), tuple(errors.values()))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _numbers(column: pa.ChunkedArray, missing: float = 0.0) -> np.ndarray:
    return column.cast(pa.float64()).fill_null(missing).to_numpy()


def _codes(column: pa.ChunkedArray) -> tuple[list[str | None], np.ndarray]:
    """The distinct values in order of appearance, null among them, and the number of each row's."""
    encoded = column.combine_chunks()
    encoded = pa.concat_arrays(encoded.chunks) if isinstance(encoded, pa.ChunkedArray) else encoded
    encoded = encoded.dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _is_good(rows: pa.Table) -> np.ndarray:
    return pc.call_function("equal", [rows["status"], pa.scalar("ok")]).to_numpy()


def _counts(codes: np.ndarray, good: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.bincount(codes[good], minlength=count), np.bincount(codes[~good], minlength=count)
