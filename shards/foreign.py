"""Somebody else's WebDataset tars, which have no ledgers: indexed once by their headers, and read like any dataset from then on.

    info = new_info("features", {"hop_frames": 8, "views": 1, "codec": {...}})      # what they hold, which plain tars do not say
    stream = FeatureStream(indexed("s3://bucket/their-tars", info, names={"feats.npy": "avclip.npy"}), StreamConfig())

The index is kept in the cache folder, for as long as the tars are what they were. The first time, local tars are only looked at where their headers
are; those in an object store are read through, for a request per header would take longer.

Knows tars, npy headers and ledgers. Knows no meaning of a member.
"""

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from configs import storage
from shards import ledger
from shards.dataset import DatasetInfo, json_bytes
from shards.read import Index

READERS = 4
"""Tars read at a time."""


def indexed(root: str | os.PathLike, info: DatasetInfo, *, names: Mapping[str, str] | None = None, split: str = "train") -> Index:
    """The index of the tars directly in a folder or prefix.

    `info` says what they hold. `names` gives members other extensions than they have in the tars. All samples are taken for good, and for `split`'s.
    """
    root = os.fspath(root)
    tars = sorted((found for found in storage.scan(root, recursive=False) if found.path.endswith(".tar")), key=lambda found: found.path)
    if not tars:
        raise ValueError(f"{root} has no tars; expected WebDataset shards, named SOMETHING.tar, directly in it")
    meaning = [info.fingerprint, dict(names or {}), split, root, [[found.path, found.size, found.version] for found in tars]]
    path = storage.cache_dir() / "indexes" / f"{hashlib.sha256(json_bytes(meaning)).hexdigest()[:32]}.parquet"
    if not path.is_file():
        with ThreadPoolExecutor(READERS) as pool:
            rows = [row for found in pool.map(lambda tar: _rows(tar, names or {}, split), tars) for row in found]
        if len({row["key"] for row in rows}) < len(rows):
            raise ValueError(f"{root}: a key is in more than one tar or more than once in one; keys must be unique in a dataset")
        ledger.write(path, ledger.to_table(rows, info.fingerprint))
    return Index(root, info, ledger.read(path, fingerprint=info.fingerprint))


def _rows(found: storage.Stat, names: Mapping[str, str], split: str) -> list[dict[str, Any]]:
    """A ledger row for every sample of a tar: neighbouring members with the same name up to the first dot, as WebDataset has it."""
    rows: list[dict[str, Any]] = []
    shard = storage.basename(found.path).removesuffix(".tar")
    try:
        with _open(found) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not (member.isreg() and stem and dot):
                    continue
                key = f"{folder}{slash}{stem}"
                if not rows or rows[-1]["key"] != key:
                    rows.append({"key": key, "split": split, "source": f"{found.path}/{key}", "status": "ok", "shard": shard})
                rows[-1] |= _member(file, member, names.get(extension.lower(), extension.lower()))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{found.path} is no tar that can be read to its end ({error})") from error
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from error
    return rows


def _member(file: io.BufferedReader, member: tarfile.TarInfo, extension: str) -> dict[str, Any]:
    """A member's columns. Arrays must be as the reader views them: their numbers in C order, little endian, at the member's end."""
    columns: dict[str, Any] = {f"{extension}.offset": member.offset_data, f"{extension}.size": member.size}
    if not extension.endswith("npy"):
        return columns
    file.seek(member.offset_data)
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    except ValueError as error:
        raise ValueError(f"{member.name} is no npy array ({error})") from error
    if (fortran and len(shape) > 1) or dtype.hasobject or dtype.byteorder == ">":
        raise ValueError(f"{member.name} must hold numbers in C order, little endian; it has {dtype.str}{', Fortran order' if fortran else ''}")
    return columns | {f"{extension}.shape": list(shape), f"{extension}.dtype": dtype.str}


def _open(found: storage.Stat) -> io.BufferedReader:
    return io.BufferedReader(_Object(found), storage.PART_BYTES) if storage.is_remote(found.path) else open(found.path, "rb")


class _Object(io.RawIOBase):
    """An object as a file, each read a request."""

    def __init__(self, found: storage.Stat) -> None:
        self._found, self._position, self._stop = found, 0, threading.Event()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._found.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._found.size)
        if end <= self._position:
            return 0
        data = storage.read_range(self._found, self._position, end, stop=self._stop)
        buffer[: len(data)], self._position = data, end
        return len(data)
