"""Which rows of a ledger meet a criterion: that a list names them, that they are of a class, that a number lies between bounds.

A criterion answers for every row 1: met, 0: not met, -1: cannot be told. A good clip stays where it is met; a failed one, of which little is known,
where it is not certain that it is not met, so that a subset tells what it lacks. Knows tables and names; opens no file and no dataset.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int8, Int64

from pipeline.lists import AUDIOSET_LABELS, clip_ids
from shards.read import START

MET, NOT_MET, UNKNOWN = np.int8(1), np.int8(0), np.int8(-1)
Answer = Int8[np.ndarray, " rows"]
ID_LETTERS = 11
"""Of a YouTube id, with which names of another form for the same clip begin."""


def is_good(table: pa.Table) -> Bool[np.ndarray, " rows"]:
    """Which rows of a ledger are of good clips."""
    return pc.call_function("equal", [table["status"], pa.scalar("ok")]).to_numpy()


def remaining(answer: Answer, good: Bool[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    """Whether a row stays: a good one whose criterion is met, a failed one whose criterion is met or cannot be told."""
    return np.where(good, answer == MET, answer != NOT_MET)


class Names:
    """The clips of a table, found by the names that lists and scores have for them."""

    def __init__(self, keys: pa.ChunkedArray | pa.Array) -> None:
        whole = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
        encoded = (pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole).dictionary_encode()
        self._keys: pa.Array = encoded.dictionary
        self.number_of: np.ndarray = encoded.indices.to_numpy()
        """The number of every row's key, from 0 on in the order in which they come first. A key may have failed rows beside its good one."""

    def find(self, names: Sequence[str]) -> Int64[np.ndarray, " names"]:
        """The number of each name's clip among the table's different keys; -1 where it is not there.

        A name is a key; or it agrees with one in its YouTube id and start: one data set's clip ends after 10 s, another's where its file does.
        """
        found = (
            pc.call_function("index_in", [pa.array(names, pa.string())], pc.SetLookupOptions(self._keys)).fill_null(-1).to_numpy().astype(np.int64)
        )
        open_names = np.flatnonzero(found < 0).tolist()
        if open_names:
            ids = self._by_id({names[number][:ID_LETTERS] for number in open_names})
            for number in open_names:
                found[number] = next((ids[name] for name in clip_ids(names[number]) if name in ids), -1)
        return found

    def places(self, found: Int64[np.ndarray, " names"]) -> Int64[np.ndarray, " rows"]:
        """For every row of the table the first of the found names that is its clip's; -1 where none is."""
        place = np.full(len(self._keys) + 1, -1, np.int64)
        place[found[::-1]] = np.arange(len(found))[::-1]
        place[-1] = -1  # where names that are not there went
        return place[self.number_of]

    def rows_of(self, numbers: Int64[np.ndarray, " found"], good: Bool[np.ndarray, " rows"]) -> Int64[np.ndarray, " found"]:
        """For every clip a row of the table: its good one where there is one, else its first."""
        row = np.zeros(len(self._keys), np.int64)
        row[self.number_of[::-1]] = np.arange(len(self.number_of))[::-1]
        row[self.number_of[good]] = np.flatnonzero(good)
        return row[numbers]

    def _by_id(self, beginnings: set[str]) -> dict[str, int]:
        """The clips whose keys begin so, by youtube id and start."""
        begin = pc.call_function("utf8_slice_codeunits", [self._keys], pc.SliceOptions(0, ID_LETTERS))
        rows = np.flatnonzero(
            pc.call_function("is_in", [begin], pc.SetLookupOptions(pa.array(sorted(beginnings), pa.string()))).to_numpy(zero_copy_only=False)
        )
        found: dict[str, int] = {}
        for row, key in zip(rows.tolist(), self._keys.take(pa.array(rows)).to_pylist(), strict=True):
            for name in clip_ids(key):
                found.setdefault(name, row)
        return found


@dataclass(frozen=True)
class Listing:
    """The clips that lists name, each once."""

    name: str
    """What the lists are called."""
    keys: Sequence[str]
    splits: Sequence[str | None]
    """None where a list does not say it."""
    labels: Sequence[str | None]
    start_seconds: Sequence[float | None]
    """Where in the clip the stretch that is meant begins, where a list says so."""

    def __post_init__(self) -> None:
        assert len(self.keys) == len(self.splits) == len(self.labels) == len(self.start_seconds)


def with_missing(table: pa.Table, listing: Listing, *, split: str, of: str) -> pa.Table:
    """The table of the dataset `of` with a failed row for every listed clip that it has not. They have the list's split, or `split`."""
    absent = np.flatnonzero(Names(table["key"]).find(listing.keys) < 0).tolist()
    rows = [
        {
            "key": listing.keys[number],
            "split": listing.splits[number] or split,
            "label": listing.labels[number],
            "source": listing.keys[number],
            "status": "failed",
            "reason": "missing",
            "message": f"listed in {listing.name} but not in {of}",
        }
        for number in absent
    ]
    return pa.concat_tables([table, pa.Table.from_pylist(rows, schema=table.schema)]) if rows else table


def told_by(table: pa.Table, listing: Listing, places: Int64[np.ndarray, " rows"]) -> pa.Table:
    """The table with what the lists say of the rows at these places in them: their split, their start, and a label for those that have none."""

    def said(values: Sequence[str | None] | Sequence[float | None], kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind).take(pa.array(places, mask=places < 0))

    column = table.column_names.index
    table = table.set_column(column("split"), "split", pc.call_function("coalesce", [said(listing.splits, pa.string()), table["split"]]))
    table = table.set_column(column("label"), "label", pc.call_function("coalesce", [table["label"], said(listing.labels, pa.string())]))
    if any(start is not None for start in listing.start_seconds):
        starts = said(listing.start_seconds, pa.float64())
        if START not in table.column_names:
            return table.append_column(START, starts)
        table = table.set_column(column(START), START, pc.call_function("coalesce", [starts, table[START]]))
    return table


def of_classes(labels: pa.ChunkedArray, classes: Sequence[str]) -> Answer:
    """Rows whose label is one of the classes, or, where a clip has several as in AudioSet (`/m/068hy,/m/0jbk`), has one of them among its own."""
    different = labels.unique()
    wanted = set(classes)
    chosen = [label for label in different.drop_null().to_pylist() if not wanted.isdisjoint(classes_of(label))]
    return _answer(pc.call_function("is_in", [labels], pc.SetLookupOptions(pa.array(chosen, pa.string()))), known=labels.is_valid())


def classes_of(label: str) -> list[str]:
    """The classes that a label says: itself, and AudioSet's each by itself."""
    return [label, *label.split(",")] if AUDIOSET_LABELS.match(label) else [label]


def within(values: pa.ChunkedArray | pa.Array, least: float | None, most: float | None) -> Answer:
    """Rows whose number lies between the bounds, which count; without one where it is None. Nulls and what is no number cannot be told."""
    numbers = pc.cast(values, pa.float64())
    numbers = numbers.to_numpy(zero_copy_only=False) if isinstance(numbers, pa.Array) else numbers.to_numpy()  # null is NaN
    met = np.ones(len(numbers), bool)
    if least is not None:
        met &= numbers >= least
    if most is not None:
        met &= numbers <= most
    return np.where(np.isnan(numbers), UNKNOWN, met.astype(np.int8)).astype(np.int8)


def all_of(*answers: Answer) -> Answer:
    """Met where all are met, not met where one is not."""
    together = np.stack(answers)
    return np.where((together == NOT_MET).any(axis=0), NOT_MET, np.where((together == UNKNOWN).any(axis=0), UNKNOWN, MET)).astype(np.int8)


def as_answer(met: Bool[np.ndarray, " rows"]) -> Answer:
    """An answer that is known for every row."""
    return met.astype(np.int8)


def check_splits(listing: Listing) -> None:
    """ValueError for a split that cannot name shards."""
    for split in {split for split in listing.splits if split is not None}:
        if not re.fullmatch(r"[\w-]+", split, re.ASCII):
            raise ValueError(f"{listing.name}: split {split!r} cannot name files; expected letters, digits, '_' and '-'")


def _answer(met: pa.ChunkedArray, *, known: pa.ChunkedArray) -> Answer:
    return np.where(known.to_numpy(), met.to_numpy().astype(np.int8), UNKNOWN).astype(np.int8)
