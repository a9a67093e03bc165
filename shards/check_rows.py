"""Whether the rows of a ledger can be true: columns, kinds, one shard, unique keys, and members that lie as a shard's writer puts them.

Knows ledgers and how a shard is laid out. Opens nothing: the tar itself is `shards.check_tar`'s matter.
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from tarfile import BLOCKSIZE
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from shards import ledger
from shards.write import EXTENSION, check_key, end_bytes

SHA256_DIGITS = 64


def plain(text: str) -> str:
    """A text that can be printed, without what would move a terminal's cursor."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text.encode("utf-8", "backslashreplace").decode())


@dataclass(frozen=True)
class Problem:
    """Something in a dataset that is not as it was written."""

    file: str
    """Its name in the dataset."""
    message: str
    key: str | None = None
    """The clip, where it is known."""

    def text(self) -> str:
        """A line to read."""
        return plain(f"{self.file}: {f'{self.key}: ' if self.key is not None else ''}{self.message}")


class Place(NamedTuple):
    """Where a ledger says that a member lies."""

    key: str
    extension: str
    offset: int
    size: int
    shape: tuple[int, ...] | None
    dtype: str | None
    row: int
    """Of the ledger."""

    @property
    def name(self) -> str:
        """The member's name in the tar."""
        return f"{self.key}.{self.extension}"


def check_columns(table: pa.Table, *, extra: Collection[str] = ()) -> str:
    """What is wrong with a ledger's columns; empty if nothing is. `extra`: further ones that may be there."""
    for field in ledger.ROW_FIELDS:
        if table.column_names.count(field.name) != 1 or table.schema.field(field.name).type != field.type:
            return f"it is no ledger: it has no column {field.name} of the kind {field.type}"
    members = {name for name in table.column_names if name not in extra} - {field.name for field in ledger.ROW_FIELDS}
    for name in members:
        extension, _, what = name.rpartition(".")
        if what not in ledger.MEMBER_FIELDS or not EXTENSION.fullmatch(extension):
            return f"it has a column {name}, which no ledger has"
        if table.schema.field(name).type != ledger.MEMBER_FIELDS[what]:
            return f"its column {name} is of the kind {table.schema.field(name).type}; expected {ledger.MEMBER_FIELDS[what]}"
    for extension in {name.rpartition(".")[0] for name in members}:
        needed = {"offset", "size", "shape", "dtype"} if extension.endswith("npy") else {"offset", "size"}
        if lacking := {f"{extension}.{what}" for what in needed} - members:
            return f"it has no column {', '.join(sorted(lacking))}"
    return ""


def places(table: pa.Table) -> list[Place]:
    """Where the members of the good rows lie, in the order of the rows and of the extensions: that in which they are written."""
    extensions = ledger.extensions(table)
    found = []
    for number, row in enumerate(table.to_pylist()):
        for extension in extensions if row["status"] == "ok" else ():
            offset, size, shape = row[f"{extension}.offset"], row[f"{extension}.size"], row.get(f"{extension}.shape")
            if offset is not None and size is not None:
                dimensions = None if shape is None else tuple(shape)
                found.append(Place(row["key"], extension, offset, size, dimensions, row.get(f"{extension}.dtype"), number))
    return found


def tar_size(table: pa.Table) -> int:
    """How large the tar of these rows is."""
    position = max((place.offset + _padded(place.size) for place in places(table)), default=0)
    return position + end_bytes(position)


def check_rows(name: str, table: pa.Table) -> Iterator[Problem]:
    """What cannot be true in the ledger of the shard `name`, whose columns are right."""
    file, split = f"{name}.parquet", name.rpartition("-")[0]
    shards = table["shard"].unique().to_pylist()
    if shards not in ([name], []):
        yield Problem(file, f"it is the ledger of {', '.join(str(shard) for shard in shards[:3])}, not of {name}")
        return
    digests = table["shard_sha256"].unique().to_pylist()
    if len(digests) > 1 or any(digest is None or len(digest) != SHA256_DIGITS or set(digest) - set("0123456789abcdef") for digest in digests):
        yield Problem(file, f"its rows have {len(digests)} values of shard_sha256, of which one that is a sha256 was expected")
    keys: set[str] = set()
    extensions = ledger.extensions(table)
    for row in table.to_pylist():
        problem = _row_problem(row, extensions, split)
        if not problem and row["status"] == "ok" and row["key"] in keys:
            problem = "its key is in the ledger twice"
        if problem:
            yield Problem(file, problem, row["key"])
        elif row["status"] == "ok":
            keys.add(row["key"])
    yield from _check_layout(file, table)


def _row_problem(row: dict, extensions: list[str], split: str) -> str:
    members = [extension for extension in extensions if row[f"{extension}.offset"] is not None]
    seconds = row["duration_seconds"]
    if row["key"] is None or row["source"] is None or row["split"] != split:
        return f"it has the split {row['split']!r}; the shard holds {split!r}" if row["split"] != split else "its key or source is null"
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        return f"its duration is {seconds} seconds"
    if row["status"] == "failed":
        return "it failed, and has members or no reason" if members or row["reason"] is None else ""
    if row["status"] != "ok" or row["reason"] is not None or not members:
        return f"its status is {row['status']!r}, its reason {row['reason']!r}, and it has {len(members)} members"
    try:
        check_key(row["key"])
    except ValueError as error:
        return str(error)
    return next(filter(None, (_member_problem(row, extension) for extension in members)), "")


def _member_problem(row: dict, extension: str) -> str:
    size, shape, dtype = row[f"{extension}.size"], row.get(f"{extension}.shape"), row.get(f"{extension}.dtype")
    if size is None or size < 0:
        return f"its member {extension} has the size {size}"
    if not extension.endswith("npy"):
        return ""
    if shape is None or dtype is None or any(length is None or length < 0 for length in shape):
        return f"its member {extension} has the shape {shape} and the dtype {dtype!r}"
    try:
        bytes_each = np.dtype(dtype).itemsize
    except (TypeError, ValueError, SyntaxError):
        return f"its member {extension} has the dtype {dtype!r}, which numpy does not know"
    if math.prod(shape) * bytes_each >= max(size, 1):
        return f"its member {extension} has {size} bytes, too few for {dtype} {shape}"
    return ""


def _check_layout(file: str, table: pa.Table) -> Iterator[Problem]:
    """A writer puts members side by side, from the first byte on: the first that lies elsewhere is told."""
    position = 0
    for place in places(table):
        if place.offset != position + BLOCKSIZE:
            yield Problem(file, f"its member {place.extension} is said to lie at byte {place.offset}; {position + BLOCKSIZE} comes next", place.key)
            return
        position = place.offset + _padded(place.size)


def _padded(size: int) -> int:
    return size + -size % BLOCKSIZE


def first(problems: Iterator[Problem], most: int) -> list[Problem]:
    """Not more than `most` of a file's problems; the last then says how many more there are."""
    found = []
    more = 0
    for problem in problems:
        if len(found) < most:
            found.append(problem)
        else:
            more += 1
    return list(chain(found, [Problem(found[0].file, f"and {more} more")])) if more else found
