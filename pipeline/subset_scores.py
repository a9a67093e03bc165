"""Numbers about clips that are not in the ledger: scores, from tables beside a dataset or elsewhere, and offsets of `soundshard sync`; by row.

Knows tables, and how clips are named in them. Does not know what a score means.
"""

from collections.abc import Sequence
from difflib import get_close_matches

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import storage
from pipeline.lists import key_of
from pipeline.scores import read_scores, score_columns, scores_path
from pipeline.select import Answer, Names, all_of, within
from shards.read import Index

NO_MORE_SECONDS = 1e-6
"""An offset of 0.2 s is a sum of steps, and may be that much more."""


class Scores:
    """The columns of some tables of scores, a value for every row of the ledger; read when one is wanted."""

    def __init__(self, index: Index, paths: Sequence[str], names: Names) -> None:
        self._index, self._names = index, names
        self._paths = list(paths) or self._own()
        self._given = bool(paths)
        self._tables: list[tuple[str, pa.Table]] = []

    def _own(self) -> list[str]:
        """A view's and its parent's, or a dataset's."""
        return [root for root in (self._index.view, self._index.root) if root is not None and storage.is_file(scores_path(root))]

    @property
    def tables(self) -> list[tuple[str, pa.Table]]:
        """The tables with their names."""
        if not self._tables:
            self._tables = [(path, read_scores(path)) for path in self._paths]
        return self._tables

    @property
    def schema(self) -> dict[str, pa.DataType]:
        """All columns of all tables."""
        return {field.name: field.type for _, table in reversed(self.tables) for field in table.schema if field.name != "key"}

    def only(self) -> str:
        """The one column of numbers that there is. ValueError where there are several."""
        found = self._numeric()
        if len(found) != 1:
            raise ValueError(f"score= must say which score is meant: {self._what(found)}")
        return found[0]

    def column(self, name: str) -> pa.Array | pa.ChunkedArray:
        """A score of every row; null where there is none. Of a view's own scores and its parent's, its own are meant."""
        holders = [(path, table) for path, table in self.tables if name in table.column_names]
        if not holders:
            found = list(self.schema)
            near = get_close_matches(name, found, n=1)
            raise ValueError(f"there is no score {name!r}{f', did you mean {near[0]}?' if near else ''}: {self._what(found)}")
        if len(holders) > 1 and self._given:
            raise ValueError(f"{' and '.join(path for path, _ in holders)} both have a score {name!r}; give one of them")
        path, table = holders[0]
        places = self._names.places(self._names.find([key_of(key) for key in table["key"].to_pylist()]))
        if not (places >= 0).any():
            raise ValueError(f"{path} has scores of no clip that is here; for example of {table['key'][0] if table.num_rows else 'nothing'}")
        return table[name].take(pa.array(places, mask=places < 0))

    def numbers(self, name: str) -> pa.Array | pa.ChunkedArray:
        """The same for a score that can be compared. ValueError for one that is text."""
        column = self.column(name)
        if name not in score_columns(pa.table({name: column})):
            raise ValueError(f"{name} is {column.type}, and no number: {self._what(self._numeric())}")
        return column

    def _numeric(self) -> list[str]:
        return list(dict.fromkeys(name for _, table in self.tables for name in score_columns(table)))

    def _what(self, found: Sequence[str]) -> str:
        if not self._paths:
            return f"{self._index.view or self._index.root} has no scores; make them with `soundshard score`, or give scores=FILE"
        return f"{' and '.join(self._paths)} {'have' if len(self._paths) > 1 else 'has'} {', '.join(found) or 'no numbers'}"


def in_sync(path: str, names: Names, *, max_offset_seconds: float | None, min_probability: float | None, min_synchronisable: float | None) -> Answer:
    """Rows whose sound is in sync by the bounds that are given, from the parquet of `soundshard sync`; those it has no answer for cannot be told."""
    found = _read_sync(path)
    if min_synchronisable is not None and found["synchronisable"].null_count == found.num_rows:
        raise ValueError(f"sync={path} does not say what can be synchronised; make it with `soundshard sync synchronisable=true`")
    places = names.places(names.find(found["key"].to_pylist()))
    if not (places >= 0).any():
        raise ValueError(f"sync={path} has an offset of no clip that is here")

    def of_rows(name: str) -> pa.ChunkedArray:
        return found[name].take(pa.array(places, mask=places < 0))

    most = None if max_offset_seconds is None else max_offset_seconds + NO_MORE_SECONDS
    answers = [
        within(pc.call_function("abs", [of_rows("offset_seconds")]), None, most),
        within(of_rows("probability"), min_probability, None),
    ]
    if min_synchronisable is not None:
        answers.append(within(of_rows("synchronisable"), min_synchronisable, None))
    return all_of(*answers)


def _read_sync(path: str) -> pa.Table:
    """The clips that `soundshard sync` has an answer for."""
    columns = ["key", "status", "offset_seconds", "probability", "synchronisable"]
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
    except FileNotFoundError:
        raise ValueError(f"sync={path}: no such file; expected the parquet of `soundshard sync source=`") from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"sync={path} is not readable as parquet ({error}); expected that of `soundshard sync source=`") from error
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise ValueError(f"sync={path} has no column {', '.join(absent)}; expected the parquet of `soundshard sync source=`")
    return table.filter(pc.field("status") == "ok").select(columns)
