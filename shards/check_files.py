"""The files of a dataset that say what it is and what it holds, each by itself: dataset.json, a ledger, the manifest, the plan.

Knows these files' forms and hashes. What they say is compared with each other, and with the tars, by `shards.check_dataset`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import storage
from shards import ledger, sealed
from shards.check_rows import Problem, check_columns, check_rows, first
from shards.dataset import INFO, DatasetInfo, info_bytes, read_info
from shards.write import PLAN

MOST = 20
"""Problems that are told of one file."""
OLD = "were written before such files held a hash over their bytes: what their rows say is not protected"


@dataclass
class Told:
    """What is said about a dataset, in the order in which it was found."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and wrong with nothing."""
    old: list[str] = field(default_factory=list)
    """Files without a hash of their own."""

    def problem(self, file: str, message: str, key: str | None = None) -> None:
        """Say that something is wrong."""
        self.problems.append(Problem(file, message, key))


class ByShard:
    """The rows of a manifest or a plan, read shard by shard: rows of a shard lie together."""

    def __init__(self, file: pq.ParquetFile, columns: Sequence[str] | None = None) -> None:
        """Raises Damaged where the file cannot be read. `columns`: only these."""
        self._file, self._columns = file, None if columns is None else list(columns)
        self._runs: dict[str, list[tuple[int, int, int]]] = {}
        self._held: tuple[int, pa.Table] | None = None
        try:
            for number in range(file.num_row_groups):
                self._add(number, file.read_row_group(number, columns=["shard"], use_threads=False).column(0).combine_chunks())
        except sealed.UNREADABLE as error:
            raise sealed.Damaged(f"it cannot be read as parquet ({sealed.first_line(error)})") from error

    def _add(self, number: int, column: pa.Array) -> None:
        column.validate(full=True)
        encoded = column.dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        names = encoded.dictionary.to_pylist()
        bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)] if len(codes) else []
        for start, stop in pairwise(bounds):
            if codes[start] >= 0:
                self._runs.setdefault(names[codes[start]], []).append((number, start, stop))

    @property
    def names(self) -> list[str]:
        """The shards, in the file's order."""
        return list(self._runs)

    @property
    def metadata(self) -> dict[bytes, bytes]:
        return self._file.schema_arrow.metadata or {}

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    def counts(self) -> dict[str, int]:
        """Rows of every shard."""
        return {name: sum(stop - start for _, start, stop in runs) for name, runs in self._runs.items()}

    def rows(self, name: str) -> pa.Table | None:
        """The rows of a shard; None if there are none. Raises Damaged."""
        parts = []
        for number, start, stop in self._runs.get(name, []):
            if self._held is None or self._held[0] != number:
                self._held = number, self._group(number)
            parts.append(self._held[1].slice(start, stop - start))
        return pa.concat_tables(parts) if parts else None

    def _group(self, number: int) -> pa.Table:
        try:
            group = self._file.read_row_group(number, columns=self._columns, use_threads=False)
            group.validate(full=True)
        except sealed.UNREADABLE as error:
            raise sealed.Damaged(f"it cannot be read as parquet ({sealed.first_line(error)})") from error
        return group


def check_info(root: str, told: Told) -> DatasetInfo | None:
    """dataset.json: whether it is byte for byte what was written. None where it cannot be read."""
    try:
        data = read_file(storage.join(root, INFO))
    except FileNotFoundError:
        told.problem(INFO, "it is missing; copy it back, or run the job that made the dataset again, which writes it")
        return None
    except sealed.Damaged as error:
        told.problem(INFO, str(error))
        return None
    try:
        info, fields = read_info(root), json.loads(data)
        as_written = info_bytes(info) if "sha256" in fields else _old_info_bytes(info)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        told.problem(INFO, f"it cannot be read: {sealed.first_line(error)}")
        return None
    if not isinstance(info.spec, dict):
        told.problem(INFO, f"its spec is {info.spec!r}; expected an object")
        return None
    if info.view is not None and not (isinstance(info.view, dict) and isinstance(info.view.get("parent"), str) and "selection" in info.view):
        told.problem(INFO, f"its view is {info.view!r}; expected a parent and a selection")
        return None
    if data != as_written:
        told.problem(INFO, "it is not as it was written: its bytes are others than those that its contents give")
    elif "sha256" not in fields:
        told.notes.append(f"{INFO} was written before it held a hash of itself: its spec is protected by the fingerprint, its provenance by nothing")
    return info


def read_file(path: str) -> bytes:
    """All of a file. FileNotFoundError if there is none, Damaged where the disk does not give it."""
    try:
        return storage.read_bytes(path)
    except (FileNotFoundError, storage.StorageError):
        raise
    except OSError as error:
        raise sealed.Damaged(f"it cannot be read: {error.strerror}") from error


def _old_info_bytes(info: DatasetInfo) -> bytes:
    fields = {name: value for name, value in asdict(info).items() if name != "view"}
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_ledger(root: str, name: str, fingerprint: str | None) -> tuple[pa.Table | None, list[Problem], bool]:
    """The rows of a ledger, if they can be used; what is wrong with it; and whether it holds a hash of itself."""
    file = f"{name}.parquet"
    try:
        data = read_file(ledger.path_of(root, name))
        is_sealed = sealed.check(data)
        table = sealed.rows(data)
    except FileNotFoundError:
        return None, [Problem(file, "it is missing")], True
    except sealed.Damaged as error:
        return None, [Problem(file, str(error))], True
    if wrong := check_columns(table):
        return None, [Problem(file, wrong)], is_sealed
    problems = first(check_rows(name, table), MOST)
    of = (table.schema.metadata or {}).get(ledger.FINGERPRINT, b"").decode("utf-8", "replace")
    if fingerprint is not None and of != fingerprint:
        problems.insert(0, Problem(file, f"it belongs to a dataset with the fingerprint {of[:12] or '(none)'}, and {INFO} has {fingerprint[:12]}"))
    return table, problems, is_sealed


def read_by_shard(root: str, name: str, told: Told, columns: Sequence[str] | None = None) -> ByShard | None:
    """The manifest or plan, if it is there and whole; tells what is wrong with it."""
    try:
        data = read_file(storage.join(root, name))
        is_sealed = sealed.check(data)
        file = sealed.parsed(data)
        needed: list[Any] = list(columns or [field.name for field in ledger.ROW_FIELDS])
        if lacking := [column for column in needed if column not in file.schema_arrow.names]:
            raise sealed.Damaged(f"it has no column {', '.join(lacking)}")
        found = ByShard(file, columns)
    except FileNotFoundError:
        return None
    except sealed.Damaged as error:
        told.problem(name, f"{error}{'; remove it, and the job makes it again of the same inputs' if name == PLAN else ''}")
        return None
    if not is_sealed:
        told.old.append(name)
    return found


def read_plan(root: str, told: Told) -> ByShard | None:
    """Which clip goes to which shard."""
    plan = read_by_shard(root, PLAN, told, ["shard", "key", "source", "split", "label", "reason", "message"])
    if plan is not None and "shard_sha256" in plan.schema.names:
        told.problem(PLAN, "it is a ledger or a manifest, and no plan")
        return None
    return plan
