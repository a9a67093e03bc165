"""The table of scores while it is being made: what earlier runs left, parts written now and then, and all of it merged at the end.

For each scorer a clip counts as done where a row says from which shard it was scored (its sha256), and the clip is still in that shard: what was
prepared anew is scored anew. Scores are merged scorer by scorer, so that adding some later keeps the others. Knows neither Ray nor how a score comes
about.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool

from configs import storage
from pipeline.scores import KEY, SCORER, SHARD, rows_of, scores_path
from shards import ledger
from shards.facts import ERROR
from shards.read import Index

PART_SECONDS = 30.0
"""What has come in is written at least so often."""
SHARD_DIGITS = 16
"""Of a shard's sha256, that tell it from others."""
PART = ".part-"
"""What the parts' names have after the table's, before a number."""


@dataclass(frozen=True)
class Made:
    """What a scorer's columns are: in a table's metadata, and what they are to be now."""

    version: str
    columns: Mapping[str, pa.DataType]
    fingerprint: str
    """The dataset's."""

    @property
    def told(self) -> str:
        """As JSON for the metadata."""
        return json.dumps({"version": self.version, "columns": list(self.columns), "fingerprint": self.fingerprint}, sort_keys=True)


def made_in(table: pa.Table) -> dict[str, Made]:
    """What a table of scores says of the scorers that it was made with."""
    found = {}
    for name, value in (table.schema.metadata or {}).items():
        if name.startswith(SCORER):
            told = json.loads(value)
            types = {column: table.schema.field(column).type for column in told["columns"]}
            found[name.removeprefix(SCORER).decode()] = Made(told["version"], types, told["fingerprint"])
    return found


class ScorerRows:
    """All rows of one scorer, whichever run they come from: the last of a clip counts."""

    def __init__(self, made: Made, tables: list[pa.Table], name: str, keys: pa.Array, shards: pa.Array) -> None:
        self._name = name
        schema = pa.schema([(KEY, pa.string()), *made.columns.items(), (name + ERROR, pa.string()), (name + SHARD, pa.string())])
        parts = [table.select(schema.names).filter(pc.field(name + SHARD).is_valid()).cast(schema) for table in tables]
        self.table = pa.concat_tables([schema.empty_table(), *parts]).combine_chunks()
        places = rows_of(self.table[KEY].combine_chunks(), pa.chunked_array([keys])).fill_null(-1).to_numpy()
        self.last = np.full(len(keys), -1, np.int64)
        self.last[places[places >= 0]] = np.flatnonzero(places >= 0)  # numpy takes the last of those that are given twice
        current = pc.call_function("equal", [self._taken(name + SHARD), shards]).fill_null(False)
        self.done: np.ndarray = current.to_numpy(zero_copy_only=False)
        """Of each clip, whether it has been scored as it is now."""
        self.failed: np.ndarray = self.done & self._taken(name + ERROR).is_valid().to_numpy(zero_copy_only=False)
        """And whether the scorer failed on it."""

    def errors(self) -> list[str]:
        """Why clips have no scores of it."""
        return [error for error in self.columns()[self._name + ERROR].to_pylist() if error is not None]

    def _taken(self, column: str, where: Bool[np.ndarray, "clips"] | None = None) -> pa.Array:
        there = self.last >= 0 if where is None else where & (self.last >= 0)
        return self.table[column].combine_chunks().take(pa.array(self.last, mask=~there))

    def columns(self) -> dict[str, pa.Array]:
        """What goes into the merged table: null where a clip is not done."""
        return {column: self._taken(column, self.done) for column in self.table.column_names if column != KEY}


class ScoreStore:
    """The scores of a dataset's or view's good clips, at `path`."""

    def __init__(self, path: str, index: Index, wanted: Mapping[str, Made], *, overwrite: bool) -> None:
        """Reads what is there. ValueError where a wanted scorer's scores were made otherwise, and `overwrite` does not say that they may go."""
        self._path, self.wanted = path, dict(wanted)
        good = index.table.filter(pc.field("status") == "ok")
        self._keys = good[KEY].combine_chunks()
        self._shards = pc.call_function("utf8_slice_codeunits", [good["shard_sha256"].combine_chunks()], pc.SliceOptions(0, SHARD_DIGITS))
        self._pending: list[pa.Table] = []
        self._written = time.monotonic()
        beside, prefix = storage.parent(path), f"{storage.basename(path)}{PART}"
        # A folder may be one that is yet to be made.
        there = storage.names(beside) if storage.is_remote(beside) or storage.is_folder(beside) else []
        self._parts = sorted(storage.join(beside, name) for name in there if name.startswith(prefix))
        self._number = 1 + max((int(part.rpartition("-")[2]) for part in self._parts), default=-1)
        self._merged = _read(path) if storage.is_file(path) else None
        self._tables = ([] if self._merged is None else [(path, self._merged)]) + [(part, _read(part)) for part in self._parts]
        self._check(overwrite)
        if index.view is not None and storage.is_file(scores_path(index.root)):  # what the parent's clips have need not be done again
            self._tables.insert(0, (path, _read(scores_path(index.root))))

    def _check(self, overwrite: bool) -> None:
        for path, table in self._tables:
            for name, made in made_in(table).items():
                now = self.wanted.get(name)
                if now is None or made.told == now.told or overwrite:
                    continue
                what, there, here = (
                    ("the dataset's fingerprint", made.fingerprint[:12], now.fingerprint[:12])
                    if made.fingerprint != now.fingerprint
                    else ("the version", made.version, now.version)
                )
                raise ValueError(
                    f"{path} has scores of {name} that were made otherwise: {what} was {there!r}, now it is {here!r}; overwrite=true makes them anew"
                )

    def rows(self, name: str) -> ScorerRows:
        """All that is known of one wanted scorer."""
        return self._rows(name, self.wanted[name])

    def _rows(self, name: str, made: Made) -> ScorerRows:
        tables = [table for _, table in self._tables if (there := made_in(table).get(name)) is not None and there.told == made.told]
        return ScorerRows(made, tables, name, self._keys, self._shards)

    @contextmanager
    def writing(self, part_clips: int) -> "Iterator[ScoreStore]":
        """At the end of the block, also if it comes early, nothing is only in memory."""
        self._part_clips = part_clips
        try:
            yield self
        finally:
            self._write_part()

    def add(self, table: pa.Table, rows: Sequence[int], names: Sequence[str]) -> None:
        """What some clips, given as rows of the index, have: `key`, and of each of these scorers the columns and the error. Written when there is
        enough."""
        shards = self._shards.take(pa.array(rows))
        for name in names:
            table = table.append_column(name + SHARD, shards)
        self._pending.append(table.replace_schema_metadata(self._metadata({name: self.wanted[name] for name in names})))
        if sum(table.num_rows for table in self._pending) >= self._part_clips or time.monotonic() - self._written > PART_SECONDS:
            self._write_part()

    def _write_part(self) -> None:
        if self._pending:
            path = f"{self._path}{PART}{self._number:06d}"
            names = sorted({name for table in self._pending for name in made_in(table)})
            table = pa.concat_tables(self._pending, promote_options="default")
            table = table.replace_schema_metadata(self._metadata({name: self.wanted[name] for name in names}))
            _write(path, table)
            self._parts.append(path)
            self._tables.append((path, table))
            self._number += 1
            self._pending = []
        self._written = time.monotonic()

    def finish(self) -> pa.Table:
        """Everything as one table, a row for each clip that has any score, in the dataset's order; the parts are no longer needed."""
        made = {} if self._merged is None else made_in(self._merged)
        for _, table in self._tables:  # parts of other scorers, which another run has not merged
            made |= {name: other for name, other in made_in(table).items() if name not in made and name not in self.wanted}
        made = dict(sorted((made | self.wanted).items()))
        rows = {name: self._rows(name, other) for name, other in made.items()}
        scored = np.zeros(len(self._keys), bool)
        columns: dict[str, pa.Array] = {KEY: self._keys}
        for name in rows:
            scored |= rows[name].done
            columns |= rows[name].columns()
        for column, values in self._foreign(set(columns)).items():
            scored |= values.is_valid().to_numpy(zero_copy_only=False)
            columns[column] = values
        table = pa.table(columns).filter(pa.array(scored)).replace_schema_metadata(self._metadata(made)).combine_chunks()
        _write(self._path, table)
        for part in self._parts:
            storage.remove(part)
        return table

    def _foreign(self, ours: set[str]) -> dict[str, pa.Array]:
        """Columns of the table that no scorer claims: somebody's own, kept."""
        if self._merged is None:
            return {}
        rows = rows_of(self._keys, self._merged[KEY])
        return {name: self._merged[name].combine_chunks().take(rows) for name in self._merged.column_names if name not in ours}

    @staticmethod
    def _metadata(made: Mapping[str, Made]) -> dict[bytes, bytes]:
        return {SCORER + name.encode(): made[name].told.encode() for name in sorted(made)}


def _read(path: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(storage.read_bytes(path)))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not readable as parquet ({error}); remove it and run the job again") from error


def _write(path: str, table: pa.Table) -> None:
    with storage.writing(path) as file, ledger.writer(file, table.schema) as writer:  # with a hash that `soundshard verify` compares
        writer.write_table(table)
