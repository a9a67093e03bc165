"""Tables of scores: the sidecar `scores.parquet` of a dataset, and what others wrote down.

Knows parquet, csv and json. Imports neither torch nor Ray, and does not know what a score means.
"""

import csv
import io
import json
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from configs import storage
from shards.facts import SCORES

KEY = "key"
SCORER = b"soundshard.scorer."
"""In the metadata of `scores.parquet`, before a scorer's name: JSON of the `version` that its `columns` are of, and the dataset's `fingerprint`."""
SHARD = ".shard"
"""After a scorer's name: the column that says from which shard a clip was scored, by the beginning of its sha256; null where it was not. No score:
`read_scores` drops it."""
KEY_COLUMNS = ("key", "file", "filename", "path", "video_id", "ytid", "id")
"""What the column with clips' names may be called in a csv."""


def scores_path(root: str) -> str:
    """Where a dataset's or view's scores are."""
    return storage.join(root, SCORES)


def read_scores(path: str) -> pa.Table:
    """A table with the column `key` and one column for each score; a scorer's errors in `<scorer>.error`.

    `path` is a dataset or view with scores, a parquet with a column `key` (its own scores.parquet, or that of `soundshard sync`), a csv whose header
    names a column key or file, or a json `{name: score}` as ImageBind scores are published (column `score`; or `{name: {column: score}}`). Keys that
    are paths to videos become their stems. Raises ValueError for anything else, and for a key that comes twice.
    """
    if path.endswith(".json"):
        table = _from_json(path)
    elif path.endswith((".csv", ".tsv")):
        table = _from_csv(path)
    else:
        table = _from_parquet(path)
    keys = table[KEY]
    if keys.null_count:
        raise ValueError(f"{path} has {keys.null_count} rows without a key")
    if len(keys.unique()) < len(keys):
        twice = next(count["values"] for count in keys.value_counts().to_pylist() if count["counts"] > 1)
        raise ValueError(f"{path} has scores for {twice!r} more than once; expected one row for a clip")
    return table


def score_columns(table: pa.Table) -> list[str]:
    """The columns of `read_scores` that hold numbers or yes and no."""
    return [
        field.name for field in table.schema if pa.types.is_floating(field.type) or pa.types.is_integer(field.type) or pa.types.is_boolean(field.type)
    ]


def stem(name: str) -> str:
    """The key of a clip that is named by a path to its video: `videos/KEY.mp4` is KEY. A key is its own stem."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.stem if path.suffix.lower() in (".mp4", ".webm", ".mkv", ".mov", ".avi", ".wav") else path.name


def _from_parquet(path: str) -> pa.Table:
    file = path if path.endswith(".parquet") else scores_path(path)
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(file)))
    except (FileNotFoundError, NotADirectoryError):
        made = "" if path.endswith(".parquet") else f"; `soundshard score data={path}` makes it"
        raise ValueError(f"{file} is not there: expected a table of scores{made}") from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not readable as parquet: {error}") from error
    if KEY not in table.column_names:
        raise ValueError(f"{file} has the columns {', '.join(table.column_names)}; expected a column `key`")
    return table.select([name for name in table.column_names if not name.endswith(SHARD)])


def _from_json(path: str) -> pa.Table:
    try:
        scores = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(scores, dict) or not scores:
        raise ValueError(f'{path} holds no scores; expected {{"video.mp4": 0.31, ...}}')
    rows = [value if isinstance(value, dict) else {"score": value} for value in scores.values()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    for key, row in zip(scores, rows, strict=True):
        for name, value in row.items():
            if not isinstance(value, int | float | None):
                raise ValueError(f"{path}: {name} of {key!r} is {value!r}; expected a number")
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    return pa.table({KEY: pa.array(map(stem, scores), pa.string()), **columns})


def _from_csv(path: str) -> pa.Table:
    text = _text(path)
    delimiter = "\t" if path.endswith(".tsv") else ","
    header = next(csv.reader(io.StringIO(text), delimiter=delimiter), [])
    names = [name.strip().lower() for name in header]
    found = [name for name in KEY_COLUMNS if name in names]
    if not found:
        raise ValueError(f"{path} begins with {','.join(header) or 'nothing'!r}; expected a header with one of {', '.join(KEY_COLUMNS)}")
    at = names.index(found[0])
    options = pyarrow.csv.ConvertOptions(column_types={header[at]: pa.string()}, strings_can_be_null=True)
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter)
    try:
        table = pyarrow.csv.read_csv(pa.BufferReader(text.encode()), convert_options=options, parse_options=parse)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as csv: {error}") from error
    return _keyed(table, header[at])


def _keyed(table: pa.Table, column: str) -> pa.Table:
    keys = pa.array([None if name is None else stem(name) for name in table[column].to_pylist()], pa.string())
    others = [name for name in table.column_names if name != column]
    return table.select(others).add_column(0, KEY, keys)


def _text(path: str) -> str:
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not there; expected a file of scores") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error


def rows_of(keys: pa.Array, among: pa.ChunkedArray) -> pa.Array:
    """In which row of `among` each key is; null for none."""
    return pc.call_function("index_in", [keys], pc.SetLookupOptions(among.combine_chunks()))
