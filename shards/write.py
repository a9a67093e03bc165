"""Writing: plain ustar shards, their ledgers and the manifest, each whole or not at all, with the same bytes for the same entries.

Knows tars, npy and ledgers. Knows no media and no models: members are bytes and arrays. Which entries go to which shard is the caller's plan.

A shard is committed by its ledger, which is written last: a tar without one is what a killed writer left, and is written again. Whoever removes or
replaces a ledger removes the manifest first, which holds its rows.
"""

import errno
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import storage
from shards import ledger
from shards.dataset import INFO, json_bytes, read_info
from shards.ledger import SHARD_NAME

__all__ = [
    "Entry",
    "Outcome",
    "TarWriter",
    "Totals",
    "check_key",
    "clear",
    "committed_sha256",
    "discard",
    "done_shards",
    "json_bytes",
    "npy_bytes",
    "read_outcome",
    "safe_key",
    "shard_done",
    "stored_entries",
    "totals",
    "uncommit",
    "write_manifest",
    "write_shard",
]

MAX_NAME_BYTES = 100
"""A member's name in plain ustar; longer ones would need an extra header per member."""
PLAN = "plan.parquet"
"""Which clip goes to which shard: the planning job's file, removed with the dataset."""
REMOVERS = 16
"""Threads that remove a dataset's files."""
FIRST_LEDGERS = 8
EXTENSION = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


@dataclass(frozen=True)
class Entry:
    """What became of one input clip: members to store (ok), or the reason why there are none (failed)."""

    key: str
    split: str
    label: str | None
    source: str
    duration_seconds: float | None = None
    members: Mapping[str, bytes | np.ndarray] | None = None
    """Extension without its leading dot -> payload; an array (extension `....npy`) is stored as npy. Stored sorted by extension."""
    reason: str | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        if (self.members is None) == (self.reason is None):
            raise ValueError(f"entry {self.key!r} needs members (it is ok) or a reason (it failed), and not both")
        for extension, payload in (self.members or {}).items():
            if not EXTENSION.fullmatch(extension):
                raise ValueError(
                    f"entry {self.key!r} has the member extension {extension!r}; expected lower-case parts joined by dots, such as avclip.npy"
                )
            if isinstance(payload, np.ndarray) and not extension.endswith("npy"):
                raise ValueError(f"entry {self.key!r} has an array as {extension!r}; arrays are stored as npy, so name it {extension}.npy")

    @property
    def ok(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Outcome:
    """What a shard holds: counts of its entries, failures by reason, and the size of its tar."""

    shard: str
    ok: int
    failed: int
    reasons: dict[str, int]
    bytes: int


@dataclass(frozen=True)
class Totals:
    """What a dataset's committed shards hold: counts of their entries, failures by reason, and the size of their tars."""

    shards: int = 0
    ok: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    bytes: int = 0


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a standard npy file, version 1.0, C order, little endian."""
    ordered = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, ordered, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def check_key(key: str) -> str:
    """The key itself, if `KEY.ext` is a plain tar member that any WebDataset reader splits back into KEY and ext. ValueError otherwise."""
    if not key or re.search(r"[./\\\x00-\x1f\x7f]", key) or not key.isprintable():
        raise ValueError(
            f"key {key!r} cannot name a member: it must not be empty nor hold dots, slashes or control characters; safe_key makes one that can"
        )
    return key


def safe_key(stem: str) -> str:
    """A file's stem as a key: what a key cannot hold becomes `_`, undecodable bytes included. Two stems may give the same key."""
    text = "".join(character if character.isprintable() else "_" for character in re.sub(r"[./\\]", "_", stem))
    return text or "_"


def write_shard(root: str | os.PathLike, name: str, entries: Iterable[Entry]) -> Outcome:
    """Writes the shard `<split>-000000` and then its ledger, which commits it. Replaces a shard of that name.

    Entries are streamed: one at a time is in memory. An exception leaves neither a temporary file nor a committed shard in its place;
    a shard that was already there stays as it was.
    """
    fingerprint = read_info(root).fingerprint
    matched = SHARD_NAME.fullmatch(name)
    if not matched:
        raise ValueError(f"shard name is {name!r}; expected <split>-<six digits>, such as train-000000")
    tar_path, ledger_path = _tar_path(root, name), ledger.path_of(root, name)
    storage.remove_stale(tar_path)
    storage.remove_stale(ledger_path)
    rows: list[dict] = []
    keys: set[str] = set()
    with storage.writing(tar_path) as file:
        tar = TarWriter(file)
        for entry in entries:
            if entry.split != matched["split"]:
                raise ValueError(f"entry {entry.key!r} is of split {entry.split!r}; shard {name} holds split {matched['split']!r}")
            if entry.ok and entry.key in keys:
                raise ValueError(f"key {entry.key!r} appears twice among the good entries of shard {name}; keys must be unique")
            keys.update([entry.key] if entry.ok else [])
            rows.append(_row(entry, tar))
        tar.close()
        # From here until its new ledger is written the shard is not committed: the old ledger must never describe the new tar.
        if storage.is_file(ledger_path) or storage.is_file(tar_path):
            uncommit(root, name)
    for row in rows:
        row |= {"shard": name, "shard_sha256": tar.sha256}
    table = ledger.to_table(rows, fingerprint)
    ledger.write(ledger_path, table)
    return _outcome(name, table, tar.position)


def uncommit(root: str | os.PathLike, name: str) -> None:
    """Removes a shard's ledger, so that the shard counts as not done, and the manifest, which holds its rows."""
    storage.remove(storage.join(root, ledger.MANIFEST))
    storage.remove(ledger.path_of(root, name))


def discard(root: str | os.PathLike, name: str) -> None:
    """Removes a shard, tar and ledger, so that it is made again.

    A tar that was left without its ledger could be taken for one whose ledger was lost, which `soundshard verify repair=true` makes anew.
    """
    storage.remove(storage.join(root, ledger.MANIFEST))
    storage.remove(_tar_path(root, name))
    storage.remove(ledger.path_of(root, name))


def clear(root: str | os.PathLike) -> None:
    """Removes a dataset: ledgers first, so that no shard counts as done, and `dataset.json` last. Other files in the folder stay."""
    found = ledger.listing(root)
    storage.sweep(root)
    with ThreadPoolExecutor(REMOVERS) as pool:
        for paths in ([ledger.path_of(root, name) for name in found.ledgers], [_tar_path(root, name) for name in found.tars]):
            list(pool.map(lambda path: storage.remove(path, durable=False), paths))
            if paths:
                storage.sync_folder(root)
    for name in (ledger.MANIFEST, PLAN, INFO):
        storage.remove(storage.join(root, name))


def shard_done(root: str | os.PathLike, name: str) -> bool:
    """Whether the shard is committed: its ledger is there, and nobody removed the tar."""
    return storage.is_file(ledger.path_of(root, name)) and storage.is_file(_tar_path(root, name))


def done_shards(root: str | os.PathLike) -> set[str]:
    """The shards that are committed, by one listing."""
    return ledger.listing(root).done


def committed_sha256(root: str | os.PathLike, name: str) -> str | None:
    """The sha256 of a committed shard's tar, from its ledger; None if there is no ledger, empty if it has no rows."""
    try:
        found = ledger.read(ledger.path_of(root, name), columns=["shard_sha256"])["shard_sha256"]
    except FileNotFoundError:
        return None
    return found[0].as_py() if len(found) else ""


def read_outcome(root: str | os.PathLike, name: str) -> Outcome:
    """The outcome of a committed shard, as `write_shard` returned it, from its ledger."""
    found = storage.stat(_tar_path(root, name))
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "the shard's tar is missing, though its ledger may be there", _tar_path(root, name))
    return _outcome(name, ledger.read(ledger.path_of(root, name)), found.size)


def stored_entries(root: str | os.PathLike, name: str) -> Iterator[Entry]:
    """The entries of a committed shard, as they were written: one at a time in memory, members as bytes. Also while the same shard is replaced."""
    columns = ledger.read(ledger.path_of(root, name), fingerprint=read_info(root).fingerprint)
    extensions = ledger.extensions(columns)
    with _Tarball(_tar_path(root, name)) as tar:
        for batch in columns.to_batches(max_chunksize=256):
            for row in batch.to_pylist():
                members = [(extension, row[f"{extension}.offset"], row[f"{extension}.size"]) for extension in extensions]
                members = [(extension, start, start + size) for extension, start, size in members if start is not None]
                yield Entry(
                    key=row["key"],
                    split=row["split"],
                    label=row["label"],
                    source=row["source"],
                    duration_seconds=row["duration_seconds"],
                    members=dict(tar.members(members)) if row["status"] == "ok" else None,
                    reason=row["reason"],
                    message=row["message"],
                )


class _Tarball:
    """Reads members of a tar by their places; a local one stays open, so that what is read is one file, whatever takes its place meanwhile."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> "_Tarball":
        self._file = None if storage.is_remote(self._path) else open(self._path, "rb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def members(self, places: list[tuple[str, int, int]]) -> Iterator[tuple[str, bytes]]:
        """Each of (extension, start, end) with its bytes; all of them, which lie side by side, by one read."""
        start, end = min((place[1] for place in places), default=0), max((place[2] for place in places), default=0)
        data = storage.read_bytes(self._path, start, end) if self._file is None else os.pread(self._file.fileno(), end - start, start)
        if len(data) < end - start:
            raise ValueError(f"{self._path} ends before byte {end}, to which its ledger leads: remove the ledger and run the job again")
        for extension, first, last in places:
            yield extension, data[first - start : last - start]


def totals(root: str | os.PathLike) -> Totals:
    """What the committed shards hold, from the manifest if it is up to date; otherwise it is written anew."""
    found, fingerprint = ledger.listing(root), read_info(root).fingerprint
    manifest = ledger.open_manifest(root, found, fingerprint)
    if manifest is None:
        return _merge(root, found, fingerprint)
    batches = manifest.iter_batches(batch_size=ledger.MANIFEST_GROUP_ROWS, columns=["status", "reason"], use_threads=False)
    return _totals(found, (pa.Table.from_batches([batch]) for batch in batches))


def write_manifest(root: str | os.PathLike) -> Totals:
    """Merges all ledgers, sorted by shard name, into `manifest.parquet`, omitting nothing: one row per input clip. Returns what they hold.

    A few ledgers are in memory at a time, however many there are.
    """
    return _merge(root, ledger.listing(root), read_info(root).fingerprint)


def _merge(root: str | os.PathLike, found: ledger.Listing, fingerprint: str) -> Totals:
    if read_info(root).view is not None:  # its manifest is all there is of it
        raise ValueError(f"{root} is a view, which has no ledgers to make a manifest of; expected a dataset with shards of its own")
    path = storage.join(root, ledger.MANIFEST)
    storage.remove_stale(path)
    # Shards differ in columns only where all of a shard's clips failed: those of the first few are nearly always those of all.
    schema = ledger.unified((table.schema for table in ledger.read_ahead(root, list(found.ledgers)[:FIRST_LEDGERS], fingerprint)), fingerprint)
    while True:
        try:
            with storage.writing(path) as file:
                return _totals(found, _written(file, root, found, schema, fingerprint))
        except _NewColumnsError as more:
            schema = more.schema


class _NewColumnsError(Exception):
    """A ledger has columns that those before it have not; `schema` has all columns of all ledgers."""

    def __init__(self, schema: pa.Schema) -> None:
        super().__init__("a ledger has columns that those before it have not")
        self.schema = schema


def _written(file: BinaryIO, root: str | os.PathLike, found: ledger.Listing, schema: pa.Schema, fingerprint: str) -> Iterator[pa.Table]:
    """The row groups of a manifest, each written to `file` before it is given out."""
    tables = ledger.read_ahead(root, found.ledgers, fingerprint)
    with ledger.writer(file, schema.with_metadata({**(schema.metadata or {}), ledger.MERGED: found.digest.encode()})) as writer:
        held: list[pa.Table] = []
        for table in tables:
            if not set(table.column_names) <= set(schema.names):
                raise _NewColumnsError(ledger.unified([schema, table.schema, *(rest.schema for rest in tables)], fingerprint))
            held.append(table)
            if sum(map(len, held)) >= ledger.MANIFEST_GROUP_ROWS:
                yield _group(writer, held, schema)
                held = []
        if held:
            yield _group(writer, held, schema)


def _group(writer: pq.ParquetWriter, tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    group = ledger.conform(tables, schema)
    writer.write_table(group, row_group_size=max(1, group.num_rows))
    return group


def _totals(found: ledger.Listing, tables: Iterable[pa.Table]) -> Totals:
    """Counts over ledger rows, some at a time."""
    rows, reasons = 0, Counter[str]()
    for table in tables:
        rows += table.num_rows
        reasons.update({count["values"]: count["counts"] for count in table["reason"].drop_null().value_counts().to_pylist()})
    failed = reasons.total()
    size = sum(found.tars.get(name, 0) for name in found.ledgers)
    return Totals(len(found.ledgers), rows - failed, failed, Counter(dict(sorted(reasons.items()))), size)


def _outcome(name: str, table: pa.Table, size: int) -> Outcome:
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason is not None)
    failed = sum(reasons.values())
    return Outcome(shard=name, ok=table.num_rows - failed, failed=failed, reasons=dict(sorted(reasons.items())), bytes=size)


def _tar_path(root: str | os.PathLike, name: str) -> str:
    return storage.join(root, f"{name}.tar")


def _row(entry: Entry, tar: "TarWriter") -> dict:
    """The entry's ledger row, its members added to the tar."""
    row: dict = {
        "key": _text(entry.key),
        "split": entry.split,
        "label": _text(entry.label),
        "source": _text(entry.source),
        "status": "ok" if entry.ok else "failed",
        "reason": entry.reason,
        "message": _text(entry.message),
        "duration_seconds": entry.duration_seconds,
    }
    if entry.members is not None:
        check_key(entry.key)
        for extension, payload in sorted(entry.members.items()):
            data = npy_bytes(payload) if isinstance(payload, np.ndarray) else payload
            row |= {f"{extension}.offset": tar.add(f"{entry.key}.{extension}", data), f"{extension}.size": len(data)}
            if extension.endswith("npy"):
                shape, dtype = _npy_header(data)
                row |= {f"{extension}.shape": shape, f"{extension}.dtype": dtype}
    return row


def member_header(name: str, size: int) -> bytes:
    """The block before a member's payload."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, encoding="utf-8", errors="strict")


def end_bytes(position: int) -> int:
    """How many zeros end an archive whose last member ends, padded, at `position`: two blocks, and what fills the record."""
    return 2 * tarfile.BLOCKSIZE + -(position + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE


def _text(text: str | None) -> str | None:
    """File names may hold bytes that are no UTF-8 (Python keeps them as surrogates); a ledger shows them as `\\udcff`."""
    return text if text is None else text.encode("utf-8", "backslashreplace").decode()


def _npy_header(data: bytes) -> tuple[list[int], str]:
    """Shape and dtype of an npy payload. The reader views the last bytes of the member as the array, so it must be version 1.0 and in C order."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an npy member must be of npy version 1.0; npy_bytes writes it")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if (fortran_order and len(shape) > 1) or dtype.hasobject or dtype.byteorder == ">":
        raise ValueError(
            f"an npy member must be numbers in C order, little endian; this one is {dtype.str}{', Fortran order' if fortran_order else ''}"
        )
    return list(shape), dtype.str


class TarWriter:
    """A shard's tar, member by member.

    Plain ustar: mtime, uid and gid 0, no user names. Float times would cost a PAX header, 1 KB and a parse, for every member.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.position = file, sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its payload."""
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"member name {name!r} has {len(name.encode())} bytes; plain tar headers hold {MAX_NAME_BYTES}: shorten the key")
        self._write(member_header(name, len(data)))
        offset = self.position
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> None:
        """Ends the archive: two zero blocks, padded to a whole record, as tar does."""
        self._write(bytes(end_bytes(self.position)))
        self.sha256 = self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.position += len(data)
