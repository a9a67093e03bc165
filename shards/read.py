"""Reading by index: the ledgers say where every member lies, so a sample is a view into a mapped tar, with nothing parsed and nothing copied.
In an object store it is one request for a range of bytes.

Knows the dataset format. Knows no order of samples (that is `shards.stream`) and no meaning of a member.
"""

import builtins
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from mmap import ACCESS_READ, mmap

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import storage
from shards import ledger
from shards.dataset import DatasetInfo, DatasetMismatch, differences, read_info

START = "start_seconds"
"""Where in its clip the stretch that is meant begins: a column that only views have."""
log = logging.getLogger(__name__)
MAX_MAPPED = 256
"""Shards kept mapped at a time: each holds a file descriptor, of which a process commonly has 1,024. A view keeps its own map alive."""

GROUPS_READ = 16
"""Row groups of a manifest that are read at once. One by one takes longer, and memory that is cut into smaller pieces."""


@dataclass(frozen=True)
class Members:
    """Where one member of every good sample lies: flat arrays, one element per sample."""

    offset: np.ndarray
    """Of the payload in its tar; -1 where the sample has no such member."""
    size: np.ndarray


@dataclass(frozen=True)
class ArrayMembers(Members):
    """The same for an npy member, which is viewed in place. Shapes may differ, the dtype and the number of dimensions may not."""

    shape: np.ndarray
    """[samples, dimensions]."""
    dtype: np.dtype

    @cached_property
    def data_offset(self) -> np.ndarray:
        """Of the array's first byte: an npy payload is a header and then the array, to its end."""
        return self.offset + self.size - self.shape.prod(axis=1) * self.dtype.itemsize


class Index:
    """The good samples of a dataset, or of one split, in ledger order; and the ledger rows, good and bad, that they come from.

    Rows are numbered from 0 over the good samples. Can be pickled: maps are opened anew where it arrives.
    """

    def __init__(self, root: str, info: DatasetInfo, table: pa.Table, *, view: str | None = None) -> None:
        self.root, self.info, self.table = root, info, table
        """Of a view (`shards.view`): the parent's root, where the shards are; the view's description; its rows."""
        self.view = view
        """Where the view is; None if this is no view."""
        good = _Good(table)
        self.start_seconds: np.ndarray | None = good.column(START).fill_null(0.0).to_numpy() if START in table.column_names else None
        """Where in each good clip the stretch that a list means begins; None but for a view that was made with such a list."""
        self.ok, self.failed = good.count, table.num_rows - good.count
        self.keys: pa.Array = good.column("key")
        encoded = good.column("shard").dictionary_encode()
        self.shards: list[str] = encoded.dictionary.to_pylist()
        self.shard_of: np.ndarray = encoded.indices.to_numpy()
        self.members = {extension: _members(good, extension) for extension in ledger.extensions(table)}
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._told = False

    @classmethod
    def open(cls, root: str | os.PathLike, split: str | None = None, *, kind: str | None = None, fingerprint: str | None = None) -> "Index":
        """The index of the dataset or view at `root`, from its manifest, or from the ledgers if the manifest is absent, older or incomplete.

        `kind` and `fingerprint` are what the caller expects; another one raises DatasetMismatch, as does a view whose parent is not any more what it
        was made of.
        """
        root = os.fspath(root)
        info = read_info(root)
        if kind is not None and info.kind != kind:
            raise DatasetMismatch(f"{root} is a {info.kind} dataset; expected a {kind} dataset")
        if fingerprint is not None and info.fingerprint != fingerprint:
            raise DatasetMismatch(f"{root} has fingerprint {info.fingerprint[:12]}; expected {fingerprint[:12]}: it was made with another spec")
        table = _load(root, info, split)
        return cls(root, info, table) if info.view is None else cls(parent_of(root, info), info, table, view=root)

    @classmethod
    def of_shard(cls, root: str | os.PathLike, name: str) -> "Index":
        """The index of one committed shard, from its ledger: for a process that works through a shard and need not know the others."""
        info = read_info(root)
        return cls(os.fspath(root), info, ledger.read(ledger.path_of(root, name), fingerprint=info.fingerprint))

    def subset(self, keys: Iterable[str] | None = None, *, rows: Iterable[int] | None = None) -> "Index":
        """The index of some of the good samples, given by key or by row, in ledger order: they are read where they lie, and nothing is copied.

        ValueError for a key that there is not, with its reason if it failed.
        """
        assert (keys is None) != (rows is None)
        chosen = np.unique(np.array([self.row(key) for key in keys] if keys is not None else list(rows or []), np.int64))
        if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < self.ok:
            raise ValueError(f"{self.root} has good samples 0 to {self.ok - 1}; asked for {chosen[0]} to {chosen[-1]}")
        return Index(self.root, self.info, self.table.filter(pc.field("status") == "ok").take(pa.array(chosen)), view=self.view)

    def __len__(self) -> int:
        return self.ok

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": OrderedDict()}

    def rows(self) -> Iterator[dict]:
        """Every ledger row, good and bad, as a dict."""
        for batch in self.table.to_batches():
            yield from batch.to_pylist()

    def row(self, key: str) -> int:
        """The number of the good sample `key`. ValueError, with the reason if it failed, where there is none."""
        found = self._rows_by_key.get(key)
        if found is None:
            failures = [row for row in self.table.filter(pc.field("key") == key).to_pylist() if row["status"] == "failed"]
            why = "; ".join(f"{row['source']} failed ({row['reason']}: {row['message']})" for row in failures)
            raise ValueError(f"{self.root} has no sample with key {key!r}" + (f": {why}" if why else f" among its {self.ok} good samples"))
        return found

    def member(self, row: int, extension: str) -> np.ndarray:
        """The npy member of a sample as a read-only view: into the mapped tar, or of what one request to an object store brought."""
        members = self._members_of(row, extension)
        if not isinstance(members, ArrayMembers):
            raise ValueError(f"member {extension!r} is no npy array; read it with Index.bytes")
        shape, start = tuple(members.shape[row]), int(members.data_offset[row])
        if storage.is_remote(self.root):
            data = self._range(row, start, int(members.offset[row] + members.size[row]))
            return np.ndarray(shape, members.dtype, buffer=data)
        return np.ndarray(shape, members.dtype, buffer=self.mapped(int(self.shard_of[row])), offset=start)

    def mapped(self, shard: int) -> np.ndarray:
        """The bytes of the shard with this number, mapped, not read. A shard in an object store is copied to the cache folder first, whole."""
        found = self._maps.get(shard)
        if found is not None:
            self._maps.move_to_end(shard)  # what was used longest ago is given up first
        else:
            path = self._tar(shard)
            if storage.is_remote(path) and not self._told:
                log.warning("%s: reading samples in bulk from object storage copies its shards to %s", self.root, storage.cache_dir() / "objects")
                self._told = True
            try:
                found = _map(storage.local_copy(path) if storage.is_remote(path) else path)
            except FileNotFoundError as error:
                raise self._missing(path) from error
            if found.size < self._ends[shard]:
                raise ValueError(
                    f"{path} has {found.size} bytes, and its ledger leads to byte {self._ends[shard]}: the file is cut short or not its own"
                )
            self._maps[shard] = found
            if len(self._maps) > MAX_MAPPED:
                self._maps.popitem(last=False)
        return found

    def _tar(self, shard: int) -> str:
        return storage.join(self.root, f"{self.shards[shard]}.tar")

    def _missing(self, path: str) -> ValueError:
        return ValueError(f"{path} is missing, though its ledger is there: copy it back, or remove the ledger and run the job again")

    def _range(self, row: int, start: int, end: int) -> builtins.bytes:
        """Bytes of the tar of a row, from an object store."""
        path = self._tar(int(self.shard_of[row]))
        try:
            data = storage.read_bytes(path, start, end)
        except FileNotFoundError as error:
            raise self._missing(path) from error
        if len(data) < end - start:
            raise ValueError(f"{path} ends before byte {end}, to which its ledger leads: the file is cut short or not its own")
        return data

    @cached_property
    def content(self) -> str:
        """A hash of which samples these are and where they lie: with the fingerprint, what a position in an order of them means."""
        digest = hashlib.sha256("\n".join([*self.shards, *self.keys.to_pylist()]).encode())
        digest.update(self.shard_of.astype("<i8").tobytes())
        for members in self.members.values():
            digest.update(members.offset.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def _rows_by_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys.to_pylist())}

    @cached_property
    def _ends(self) -> np.ndarray:
        ends = np.zeros(len(self.shards), np.int64)
        for members in self.members.values():
            np.maximum.at(ends, self.shard_of, members.offset + members.size)
        return ends

    def _members_of(self, row: int, extension: str) -> Members:
        members = self.members.get(extension)
        if members is None or members.offset[row] < 0:
            there = [name for name, other in self.members.items() if other.offset[row] >= 0]
            raise ValueError(f"sample {self.keys[row]} has no member {extension!r}; it has {', '.join(there)}")
        return members

    def bytes(self, row: int, extension: str) -> builtins.bytes:
        """The payload of any member of a sample, copied."""
        members = self._members_of(row, extension)
        start, end = int(members.offset[row]), int(members.offset[row] + members.size[row])
        if storage.is_remote(self.root):
            return self._range(row, start, end)
        return self.mapped(int(self.shard_of[row]))[start:end].tobytes()


def _map(path: str | os.PathLike) -> np.ndarray:
    """A file's bytes, mapped, as a plain array: an np.memmap takes several times as long to make, and twice as long to index."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return np.frombuffer(mmap(file.fileno(), size, access=ACCESS_READ), np.uint8) if size else np.zeros(0, np.uint8)


@dataclass(frozen=True)
class FailedClip:
    """A ledger row of an input that failed."""

    shard: str
    key: str
    source: str
    reason: str


def failed_clips(root: str | os.PathLike) -> Iterator[FailedClip]:
    """The failed inputs of all committed shards, in ledger order, a few ledgers' rows in memory at a time."""
    fingerprint, found = read_info(root).fingerprint, ledger.listing(root)
    manifest = ledger.open_manifest(root, found, fingerprint)
    columns = ["shard", "key", "source", "reason", "status"]
    tables = ledger.read_ahead(root, found.ledgers, fingerprint) if manifest is None else map(pa.Table.from_batches, _each(manifest, columns))
    for table in tables:
        for row in table.select(columns).filter(pc.field("status") == "failed").to_pylist():
            yield FailedClip(row["shard"], row["key"], row["source"], row["reason"])


def _each(manifest: pq.ParquetFile, columns: list[str]) -> Iterator[list[pa.RecordBatch]]:
    for batch in manifest.iter_batches(columns=columns, use_threads=False):
        yield [batch]


def _some(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """All rows of a manifest, some row groups at a time."""
    for start in range(0, file.num_row_groups, GROUPS_READ):
        yield file.read_row_groups(list(range(start, min(start + GROUPS_READ, file.num_row_groups))), use_threads=False)


def _load(root: str, info: DatasetInfo, split: str | None) -> pa.Table:
    """The rows of a dataset or view, or those of one split. Keys are unique among all of them."""
    kept, keys, splits = [], [], set[str]()
    for rows in _rows(root, info):
        here = rows["split"].unique().to_pylist()
        splits |= set(here)
        keys.append(_Good(rows).column("key"))
        if split is None or here == [split]:
            kept.append(rows)
        elif split in here:
            kept.append(rows.filter(pc.field("split") == split))
    _check_keys(root, info, pa.chunked_array(keys, pa.string()))
    if split is not None and split not in splits:
        raise ValueError(f"{root} has no split {split!r}; it has {', '.join(sorted(splits)) or 'no rows at all: no shard of it is finished'}")
    alike = kept and all(rows.schema == kept[0].schema for rows in kept)
    return pa.concat_tables(kept) if alike else ledger.merge(kept, info.fingerprint)


def _rows(root: str, info: DatasetInfo) -> Iterator[pa.Table]:
    """A dataset's rows, some at a time: with all in one place, choosing from them would take them twice."""
    if info.view is not None:
        yield from _view_rows(root, info)
        return
    found = ledger.listing(root)
    manifest = ledger.open_manifest(root, found, info.fingerprint)
    if manifest is not None:
        yield from _some(manifest)
        return
    held: list[pa.Table] = []
    for rows in ledger.read_ahead(root, found.ledgers, info.fingerprint):
        held.append(rows)
        if sum(map(len, held)) >= ledger.MANIFEST_GROUP_ROWS:
            yield ledger.merge(held, info.fingerprint).combine_chunks()
            held = []
    if held:
        yield ledger.merge(held, info.fingerprint).combine_chunks()


def parent_of(root: str, info: DatasetInfo) -> str:
    """The dataset whose shards a view shows. Its name is relative where both lie in one folder."""
    assert info.view is not None
    parent = info.view["parent"]
    return storage.join(storage.parent(storage.absolute(root)), parent.removeprefix("../")) if parent.startswith("../") else parent


def _view_rows(root: str, info: DatasetInfo) -> Iterator[pa.Table]:
    """A view's rows, once it is certain that the parent's shards are those that they were taken from."""
    parent = parent_of(root, info)
    try:
        there = read_info(parent)
    except ValueError as error:
        raise ValueError(f"{root} is a view of {parent}, which cannot be read ({error}); put it back, or make the view again") from error
    if there.fingerprint != info.fingerprint:
        differing = "".join(f"\n  {name}: {was!r} in the view, {now!r} there" for name, was, now in differences(info, there))
        raise DatasetMismatch(f"{root} is a view of {parent}, which was made anew with another spec; make the view again{differing}")
    try:
        file = ledger.open_file(storage.join(root, ledger.MANIFEST), fingerprint=info.fingerprint)
    except FileNotFoundError as error:
        raise ValueError(f"{root} is a view, and its {ledger.MANIFEST} is missing; make the view again") from error
    used = _shards_of(map(pa.Table.from_batches, _each(file, ["shard", "shard_sha256"])))
    now = _shards_now(parent, info.fingerprint, used.keys())
    changed = sorted(name for name, digest in used.items() if now.get(name) != digest)
    if changed:
        raise DatasetMismatch(
            f"{root} is a view of {parent}, in which {len(changed)} of its {len(used)} shards are gone or were written anew since, for example "
            f"{changed[0]}; make the view again ({'; '.join(info.view['selection']) if info.view else ''})"
        )
    yield from _some(file)


def _shards_now(root: str, fingerprint: str, wanted: Collection[str]) -> dict[str, str]:
    """sha256 of those of the wanted shards that a dataset has, from its manifest, or from their ledgers."""
    found = ledger.listing(root)
    manifest = ledger.open_manifest(root, found, fingerprint)
    if manifest is None:
        return _shards_of(ledger.read_ahead(root, [name for name in wanted if name in found.ledgers], fingerprint))
    return _shards_of(map(pa.Table.from_batches, _each(manifest, ["shard", "shard_sha256"])))


def _shards_of(tables: Iterable[pa.Table]) -> dict[str, str]:
    """sha256 of every shard that these rows lie in."""
    shards: dict[str, str] = {}
    for table in tables:
        pairs = table.select(["shard", "shard_sha256"]).group_by(["shard", "shard_sha256"]).aggregate([])
        shards |= {name: digest for name, digest in zip(*(pairs[name].to_pylist() for name in pairs.column_names), strict=True) if name is not None}
    return shards


def _check_keys(root: str, info: DatasetInfo, keys: pa.ChunkedArray) -> None:
    """ValueError if a key is twice among those of the good rows."""
    if len(keys.unique()) < len(keys):
        twice = next(count["values"] for count in keys.value_counts().to_pylist() if count["counts"] > 1)
        good = pc.field("status") == "ok"
        shards = [row for rows in _rows(root, info) for row in rows.filter(good & (pc.field("key") == twice))["shard"].to_pylist()]
        raise ValueError(f"{root}: key {twice!r} is good in more than one place ({', '.join(shards)}); keys must be unique in a dataset")


class _Good:
    """The good rows of a table, column by column: all at once they would be most of the table once more."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._rows = pc.call_function("equal", [_whole(table["status"]), pa.scalar("ok")])
        self.columns = table.column_names
        self.count: int = self._rows.true_count

    def column(self, name: str) -> pa.Array:
        return _whole(self._table[name].filter(self._rows))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return pa.concat_arrays(found.chunks) if isinstance(found, pa.ChunkedArray) else found


def _members(good: _Good, extension: str) -> Members:
    offset, size = (good.column(f"{extension}.{name}").fill_null(fill).to_numpy() for name, fill in (("offset", -1), ("size", 0)))
    if f"{extension}.shape" not in good.columns:
        return Members(offset, size)
    shapes, dtypes = good.column(f"{extension}.shape").drop_null(), good.column(f"{extension}.dtype").drop_null().unique().to_pylist()
    ranks = np.unique(np.diff(shapes.offsets.to_numpy())).tolist()
    if not ranks:
        return Members(offset, size)
    if len(ranks) > 1 or len(dtypes) > 1:
        raise ValueError(f"member {extension!r} is not of one kind in this dataset: dtypes {dtypes}, numbers of dimensions {ranks}")
    shape = np.zeros((good.count, ranks[0]), np.int64)
    shape[offset >= 0] = shapes.flatten().to_numpy().reshape(-1, ranks[0])
    return ArrayMembers(offset, size, shape, np.dtype(dtypes[0]))
