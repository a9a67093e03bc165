"""`where=`: a condition in SQL on the columns of a table, answered by the standard library's SQLite, in memory.

The condition can read columns, and nothing else; which ones it reads is asked before any is loaded. Knows no dataset, no scores and no files.
"""

import difflib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from jaxtyping import Int8

TABLE = "clips"
TOKEN = re.compile(
    r"""(?P<text>'(?:[^']|'')*')|(?P<name>"(?:[^"]|"")*")|`(?:[^`]|``)*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/|(?P<sign>[();'"`\[])|[^();'"`\[/-]+|.""",
    re.DOTALL,
)
"""The parts of a condition: what is quoted or a comment is one; a quote that stands alone is never closed."""


def columns_of(where: str, schema: Mapping[str, pa.DataType]) -> list[str]:
    """The columns that a condition reads, in the order of `schema`. ValueError for a condition that cannot be read, with the nearest names for a
    column that there is not."""
    _check(where, schema)
    found: set[str] = set()
    with _table(where, {name: kind for name, kind in schema.items() if _readable(kind)}) as database:
        _allow_reading(database, found)
        database.execute(f"SELECT 1 FROM {TABLE} WHERE (\n{where}\n)")
    return [name for name in schema if name in found]


def holds(where: str, columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> Int8[np.ndarray, " rows"]:
    """For every row whether the condition holds: 1, does not: 0, or cannot be told, because of what is null: -1.

    `columns`, all of one length, are those of `columns_of` or more, and one at least. ValueError for a condition that fails on these values.
    """
    rows = len(next(iter(columns.values())))
    answer = np.zeros(rows, np.int8)
    with _table(where, {name: column.type for name, column in columns.items()}) as database:
        marks = ", ".join("?" * (len(columns) + 1))
        values = [_plain(column) for column in columns.values()]
        database.executemany(
            f"INSERT INTO {TABLE} (rowid, {', '.join(map(_quoted, columns))}) VALUES ({marks})", zip(range(rows), *values, strict=True)
        )
        _allow_reading(database, set())
        for value, test in ((1, ""), (-1, " IS NULL")):
            answer[[row for (row,) in database.execute(f"SELECT rowid FROM {TABLE} WHERE (\n{where}\n){test}")]] = value
    return answer


@contextmanager
def _table(where: str, kinds: Mapping[str, pa.DataType]) -> Iterator[sqlite3.Connection]:
    """An empty table with these columns; SQLite's errors inside are the user's."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    try:
        database.execute(f"CREATE TABLE {TABLE} ({', '.join(f'{_quoted(name)} {_affinity(kind)}' for name, kind in kinds.items())})")
        yield database
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise ValueError(_told(where, str(error), kinds)) from error
    finally:
        database.close()


def _allow_reading(database: sqlite3.Connection, found: set[str]) -> None:
    """From now on the connection reads columns of the table, whose names go to `found`, and does nothing else."""

    def allow(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_READ and first == TABLE:
            found.add(second or "")
            return sqlite3.SQLITE_OK
        harmless = action == sqlite3.SQLITE_SELECT or (action == sqlite3.SQLITE_FUNCTION and second != "load_extension")
        return sqlite3.SQLITE_OK if harmless else sqlite3.SQLITE_DENY

    database.set_authorizer(allow)


def _told(where: str, said: str, names: Mapping[str, object]) -> str:
    missing = re.fullmatch(r"no such column: (.*)", said)
    if missing:
        return f"where={where}: {_unknown(missing[1], names)}"
    if "not authorized" in said or "prohibited" in said or "access to" in said:
        said = "a condition can read columns, and nothing else"
    return f"where={where}: {said}; expected a condition in SQL, such as: duration_seconds >= 9.9 AND label LIKE '%dog%'"


def _unknown(name: str, names: Mapping[str, object]) -> str:
    if name in names:
        return f'the name {name} must stand in double quotes: "{name}"'
    near = difflib.get_close_matches(name, names, n=3)
    text = f"; text stands in single quotes: '{name}'" if not near else ""
    return f"there is no column {name}; {'did you mean ' + ' or '.join(near) if near else 'there are ' + ', '.join(names)}{text}"


def _check(where: str, names: Mapping[str, object]) -> None:
    """Refuses what SQLite takes and nobody means: a name in double quotes that is no column is text to it, and a parenthesis may close its own."""
    depth = 0
    there = {name.lower() for name in (*names, TABLE)}
    for token in TOKEN.finditer(where):
        if token["name"] is not None:
            name = token["name"][1:-1].replace('""', '"')
            if name.lower() not in there:
                raise ValueError(f"where={where}: {_unknown(name, names)}")
        elif token["sign"] is not None:
            depth += {"(": 1, ")": -1}.get(token["sign"], 0)
            if token["sign"] not in "()" or depth < 0:
                wrong = {";": "expected one condition, without ';'", ")": "a parenthesis is closed that was not opened"}
                raise ValueError(f"where={where}: {wrong.get(token['sign'], 'a quote is opened and not closed')}")
    if not where.strip():
        raise ValueError("where is empty; expected a condition in SQL")


def _readable(kind: pa.DataType) -> bool:
    return not pa.types.is_binary(kind) and not pa.types.is_struct(kind)


def _affinity(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "INTEGER"
    return "REAL" if pa.types.is_floating(kind) else "TEXT"


def _plain(column: pa.Array | pa.ChunkedArray) -> list:
    """Values that SQLite knows: lists are their JSON, which its functions read; what is no number is null."""
    if pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False).tolist() if isinstance(column, pa.Array) else column.to_numpy().tolist()
    values = column.to_pylist()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        dump: Callable[[object], str] = json.dumps
        return [None if value is None else dump(value) for value in values]
    return values


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
