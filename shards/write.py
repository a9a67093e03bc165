"""Writing: plain ustar shards, their ledgers and the manifest, each whole or not at all, with the same bytes for the same entries.

Knows tars, npy and ledgers. Knows no media and no models: members are bytes and arrays. Which entries go to which shard is the caller's plan.

A shard is committed by its ledger, which is written last: a tar without one is what a killed writer left, and is written again.
"""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from shards import ledger
from shards.dataset import json_bytes, read_info, remove_stale, replacing, sync_folder

__all__ = ["Entry", "Outcome", "check_key", "json_bytes", "npy_bytes", "read_outcome", "safe_key", "shard_done", "write_manifest", "write_shard"]

MAX_NAME_BYTES = 100
"""A member's name in plain ustar; longer ones would need an extra header per member."""
SHARD_NAME = re.compile(r"(?P<split>[\w-]+)-\d{6,}", re.ASCII)
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
    root, fingerprint = Path(root), read_info(root).fingerprint
    matched = SHARD_NAME.fullmatch(name)
    if not matched:
        raise ValueError(f"shard name is {name!r}; expected <split>-<six digits>, such as train-000000")
    tar_path, ledger_path = root / f"{name}.tar", root / f"{name}.parquet"
    remove_stale(tar_path)
    remove_stale(ledger_path)
    rows: list[dict] = []
    keys: set[str] = set()
    with replacing(tar_path) as file:
        tar = _Tar(file)
        for entry in entries:
            if entry.split != matched["split"]:
                raise ValueError(f"entry {entry.key!r} is of split {entry.split!r}; shard {name} holds split {matched['split']!r}")
            if entry.ok and entry.key in keys:
                raise ValueError(f"key {entry.key!r} appears twice among the good entries of shard {name}; keys must be unique")
            keys.update([entry.key] if entry.ok else [])
            rows.append(_row(entry, tar))
        tar.close()
        # From here until its new ledger is written the shard is not committed: the old ledger must never describe the new tar.
        ledger_path.unlink(missing_ok=True)
        sync_folder(root)
    for row in rows:
        row |= {"shard": name, "shard_sha256": tar.sha256}
    table = ledger.to_table(rows, fingerprint)
    ledger.write(ledger_path, table)
    return _outcome(root, name, table)


def shard_done(root: str | os.PathLike, name: str) -> bool:
    """Whether the shard is committed: its ledger is there, and nobody removed the tar."""
    return (Path(root) / f"{name}.parquet").is_file() and (Path(root) / f"{name}.tar").is_file()


def read_outcome(root: str | os.PathLike, name: str) -> Outcome:
    """The outcome of a committed shard, as `write_shard` returned it, from its ledger."""
    return _outcome(Path(root), name, ledger.read(Path(root) / f"{name}.parquet"))


def write_manifest(root: str | os.PathLike) -> list[Outcome]:
    """Merges all ledgers, sorted by shard name, into `manifest.parquet`, omitting nothing: one row per input clip. Returns every shard's outcome."""
    root = Path(root)
    remove_stale(root / ledger.MANIFEST)
    fingerprint = read_info(root).fingerprint
    tables = {path.stem: ledger.read(path, fingerprint=fingerprint) for path in ledger.paths(root)}
    ledger.write(root / ledger.MANIFEST, ledger.merge(list(tables.values()), fingerprint))
    return [_outcome(root, name, table) for name, table in tables.items()]


def _outcome(root: Path, name: str, table: pa.Table) -> Outcome:
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason is not None)
    failed = sum(reasons.values())
    size = (root / f"{name}.tar").stat().st_size
    return Outcome(shard=name, ok=table.num_rows - failed, failed=failed, reasons=dict(sorted(reasons.items())), bytes=size)


def _row(entry: Entry, tar: "_Tar") -> dict:
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


class _Tar:
    """Plain ustar: mtime, uid and gid 0, no user names. Float times would cost a PAX header, 1 KB and a parse, for every member."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.position = file, sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its payload."""
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"member name {name!r} has {len(name.encode())} bytes; plain tar headers hold {MAX_NAME_BYTES}: shorten the key")
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT, encoding="utf-8", errors="strict"))
        offset = self.position
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> None:
        """Ends the archive: two zero blocks, padded to a whole record, as tar does."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.position % tarfile.RECORDSIZE))
        self.sha256 = self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.position += len(data)
