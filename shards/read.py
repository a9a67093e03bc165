"""Reading by index: the ledgers say where every member lies, so a sample is a view into a mapped tar, with nothing parsed and nothing copied.

Knows the dataset format on a local file system. Knows no order of samples (that is `shards.stream`) and no meaning of a member.
"""

import builtins
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards import ledger
from shards.dataset import DatasetInfo, DatasetMismatch, read_info

MAX_MAPPED = 256
"""Shards kept mapped at a time: each holds a file descriptor, of which a process commonly has 1,024. A view keeps its own map alive."""


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

    def __init__(self, root: Path, info: DatasetInfo, table: pa.Table) -> None:
        self.root, self.info, self.table = root, info, table
        good = table.filter(pc.field("status") == "ok").combine_chunks()
        self.ok, self.failed = good.num_rows, table.num_rows - good.num_rows
        self.keys: pa.Array = _column(good, "key")
        encoded = _column(good, "shard").dictionary_encode()
        self.shards: list[str] = encoded.dictionary.to_pylist()
        self.shard_of: np.ndarray = encoded.indices.to_numpy()
        self.members = {extension: _members(good, extension) for extension in ledger.extensions(good)}
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()

    @classmethod
    def open(cls, root: str | os.PathLike, split: str | None = None, *, kind: str | None = None, fingerprint: str | None = None) -> "Index":
        """The index of the dataset at `root`, from its manifest, or from the ledgers if the manifest is absent, older or incomplete.

        `kind` and `fingerprint` are what the caller expects; another one raises DatasetMismatch.
        """
        root = Path(root)
        info = read_info(root)
        if kind is not None and info.kind != kind:
            raise DatasetMismatch(f"{root} is a {info.kind} dataset; expected a {kind} dataset")
        if fingerprint is not None and info.fingerprint != fingerprint:
            raise DatasetMismatch(f"{root} has fingerprint {info.fingerprint[:12]}; expected {fingerprint[:12]}: it was made with another spec")
        table = _load(root, info.fingerprint)
        _check_keys(root, table)
        if split is not None:
            splits = sorted(table["split"].unique().to_pylist())
            if split not in splits:
                raise ValueError(f"{root} has no split {split!r}; it has {', '.join(splits) or 'no rows at all: no shard of it is finished'}")
            table = table.filter(pc.field("split") == split)
        return cls(root, info, table)

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
        """The npy member of a sample as a read-only view into the mapped tar."""
        members = self._members_of(row, extension)
        if not isinstance(members, ArrayMembers):
            raise ValueError(f"member {extension!r} is no npy array; read it with Index.bytes")
        return np.ndarray(tuple(members.shape[row]), members.dtype, buffer=self.mapped(int(self.shard_of[row])), offset=int(members.data_offset[row]))

    def mapped(self, shard: int) -> np.ndarray:
        """The bytes of the shard with this number, mapped, not read."""
        found = self._maps.get(shard)
        if found is None:
            path = self.root / f"{self.shards[shard]}.tar"
            if not path.is_file():
                raise ValueError(f"{path} is missing, though its ledger is there: copy it back, or remove the ledger and run the job again")
            found = np.memmap(path, mode="r", dtype=np.uint8)
            if found.size < self._ends[shard]:
                raise ValueError(
                    f"{path} has {found.size} bytes, and its ledger leads to byte {self._ends[shard]}: the file is cut short or not its own"
                )
            self._maps[shard] = found
            if len(self._maps) > MAX_MAPPED:
                self._maps.popitem(last=False)
        return found

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
        start = int(members.offset[row])
        return self.mapped(int(self.shard_of[row]))[start : start + int(members.size[row])].tobytes()


def _load(root: Path, fingerprint: str) -> pa.Table:
    paths, manifest = ledger.paths(root), root / ledger.MANIFEST
    if manifest.is_file():
        written = manifest.stat().st_mtime_ns
        if all(path.stat().st_mtime_ns <= written for path in paths):
            table = ledger.read(manifest, fingerprint=fingerprint)
            if not paths or set(table["shard"].unique().to_pylist()) == {path.stem for path in paths}:
                return table
    return ledger.merge([ledger.read(path, fingerprint=fingerprint) for path in paths], fingerprint)


def _check_keys(root: Path, table: pa.Table) -> None:
    good = table.filter(pc.field("status") == "ok")
    if len(good["key"].unique()) < good.num_rows:
        twice = next(count["values"] for count in good["key"].value_counts().to_pylist() if count["counts"] > 1)
        shards = good.filter(pc.field("key") == twice)["shard"].to_pylist()
        raise ValueError(f"{root}: key {twice!r} is good in more than one place ({', '.join(shards)}); keys must be unique in a dataset")


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def _members(good: pa.Table, extension: str) -> Members:
    offset, size = (_column(good, f"{extension}.{name}").fill_null(fill).to_numpy() for name, fill in (("offset", -1), ("size", 0)))
    if f"{extension}.shape" not in good.column_names:
        return Members(offset, size)
    shapes, dtypes = _column(good, f"{extension}.shape").drop_null(), _column(good, f"{extension}.dtype").drop_null().unique().to_pylist()
    ranks = np.unique(np.diff(shapes.offsets.to_numpy())).tolist()
    if not ranks:
        return Members(offset, size)
    if len(ranks) > 1 or len(dtypes) > 1:
        raise ValueError(f"member {extension!r} is not of one kind in this dataset: dtypes {dtypes}, numbers of dimensions {ranks}")
    shape = np.zeros((good.num_rows, ranks[0]), np.int64)
    shape[offset >= 0] = shapes.flatten().to_numpy().reshape(-1, ranks[0])
    return ArrayMembers(offset, size, shape, np.dtype(dtypes[0]))
