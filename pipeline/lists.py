"""Lists of clips as they are published, told apart by their ending and header: each format a small function that turns a row into a `ListedClip`.

Csvs of VGGSound, VisualSound, AudioSet and Greatest Hits, fixed offsets and VGGSound-Sparse (clean, and with starts), tables with a path or url
column (csv, parquet, jsonl as V-AURA's VAS has it), json lists and scores, text files of clip ids or paths, and folders of split files. Knows names
and rows: whether a clip's file is there, and where, is `pipeline.discover`'s matter. Imports neither torch nor Ray.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import re
import unicodedata
import urllib.parse
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from configs import storage
from pipeline import greatest_hits, web

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
NAME_SUFFIXES = (*VIDEO_SUFFIXES, ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".wav")
"""Endings that no name of a clip has: a list may hold other files than a folder is searched for."""
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json")
"""Endings of lists that are no plain text; all but parquet also with `.gz`."""
KEY_BYTES = 80
"""Longest key in UTF-8: with the longest member name after it, it fits the 100 bytes of a ustar header."""
VGGSOUND_SECONDS = 10
YOUTUBE_ID = r"([\w-]{11})"
PLAIN_KEY = re.compile(rf"[\w-]{{1,{KEY_BYTES}}}", re.ASCII)
MILLISECONDS_NAME = re.compile(YOUTUBE_ID + r"_(\d+)_\d+")
SECONDS_NAME = re.compile(YOUTUBE_ID + r"_(\d{6})")
AUDIOSET_LABELS = re.compile(r"/[mgt]/")
"""How AudioSet's labels begin: no class of VGGSound does."""
AUDIOSET_SPLITS = {"unbalanced": "train", "balanced": "validation", "eval": "test"}
"""Which of AudioSet's parts Synchformer trains, validates and tests on."""
LRS3_NAME = re.compile(r"(?:^|/)(pretrain|trainval|test)/([^/]+)/([^/]+)$")
LRS3_PLACE = re.compile(r"(?:^|/)(?:pretrain|trainval|test)/[\w-]{11}/\d{5}$")
"""What in a list can be nothing but a place in LRS3's folders."""
VAS_PLACE = re.compile(r"(?:^|/)(baby|cough|dog|drum|fireworks|gun|hammer|sneeze)/(?:videos/)?(video_\d{5})$")
"""VAS counts its videos anew in every class."""
SPLITS = {"train": "train", "valid": "validation", "val": "validation", "validation": "validation", "test": "test"}
"""How split files are called at the end of their names, and the split that it means."""
LARGEST_OFFSET_SECONDS = 2.1
"""Fixed offsets are of Synchformer's 21 classes: from -2 to 2 s, give or take half a class."""
PATHS = ("path", "file", "filepath", "file_path", "filename", "url", "video_id", "video")
LABELS = ("label", "desc", "description", "class", "category", "positive_labels", "labels")
VGGSOUND_IDS = ("filename", "youtube_id", "ytid", "video_id", "id")


class ListedClip(NamedTuple):
    """A row of a list of clips."""

    clip_id: str
    """What its file is found by: youtube id and start in milliseconds, or the name that the list has for it."""
    key: str
    """The key that it has where the data set is complete."""
    label: str | None
    split: str
    start_seconds: float | None = None
    """Where in the clip a test set begins to look."""
    offset_seconds: float | None = None
    """By how much later in the file the sound of a list of fixed offsets starts."""
    path: str | None = None
    """Where the list says that its file lies, or for a part of a video, the video; None where it only names the clip."""
    cut: tuple[float, float | None] | None = None
    """The part [start, end) of the video that is the clip, in seconds, the end None for the video's; None for the whole file."""


# --- names ----------------------------------------------------------------------------------------------------------------------------


def key_of(stem: str) -> str:
    """A clip's key from its file's stem.

    Letters of any script, digits, '_' and '-' stay; anything else becomes '_', above all dots, at which webdataset splits. A key longer than
    80 bytes is cut and gets a hash of the whole stem.
    """
    if PLAIN_KEY.fullmatch(stem):
        return stem
    key = re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", stem))
    if len(key.encode()) > KEY_BYTES:
        digest = hashlib.sha256(stem.encode(errors="surrogateescape")).hexdigest()[:12]
        key = key.encode()[: KEY_BYTES - 13].decode(errors="ignore") + "-" + digest
    return key


def clip_ids(stem: str) -> list[str]:
    """Names under which a file can be listed: its stem, and its youtube id with the start in milliseconds."""
    if match := MILLISECONDS_NAME.fullmatch(stem):
        return [stem, f"{match[1]}_{int(match[2])}"]
    if match := SECONDS_NAME.fullmatch(stem):
        return [stem, f"{match[1]}_{int(match[2]) * 1000}"]
    return [stem]


def by_name(keys: Collection[str]) -> dict[str, int]:
    """The row of each key, also by youtube id and start: one data set's clip ends at 10 s, another's where its file does."""
    exact = {key: row for row, key in enumerate(keys)}
    return {name: row for key, row in exact.items() for name in clip_ids(key)} | exact


def present(key: str, rows: Mapping[str, int]) -> str | None:
    """What a listed clip is called in a dataset whose keys `by_name` prepared; None where it is not there."""
    return next((name for name in (key, *clip_ids(key)) if name in rows), None)


def without_ending(path: str) -> str:
    """A path without the ending of a video; any other dot is part of a name."""
    stem, dot, ending = path.rpartition(".")
    return stem if dot and f".{ending}".lower() in NAME_SUFFIXES else path


def name_of(path: str) -> str:
    """How a clip is called, from where a list or a folder has it: its file's stem, with the folder where that is a part of the name (VAS, LRS3)."""
    if ".tar::" in path:
        path = path.partition(".tar::")[2]
    if "/" not in path:
        return without_ending(path)
    if web.is_web(path):
        path = urllib.parse.unquote(urllib.parse.urlsplit(path).path)
    path = without_ending(path)
    if (match := VAS_PLACE.search(path)) is not None:
        return f"{match[1]}_{match[2]}"
    if LRS3_PLACE.search(path):
        return "_".join(path.rsplit("/", 2)[1:])
    return path.rpartition("/")[2]


def label_of_place(path: str) -> str | None:
    """The class of a video of VAS, which is its folder."""
    match = VAS_PLACE.search(without_ending(path)) if "/" in path else None
    return match[1] if match else None


def lrs3_name(path: str) -> tuple[str, str] | None:
    """Folder (pretrain, trainval or test) and key of a clip of LRS3, from its path with or without an ending; None for another path."""
    match = LRS3_NAME.search(without_ending(path))
    return (match[1], key_of(f"{match[2]}_{match[3]}")) if match else None


def split_of(path: str) -> str | None:
    """The split that a split file's name ends with, such as `visualsound_validation.txt`; None for another name."""
    name = storage.basename(path).lower().removesuffix(".gz")
    stem = name.rpartition(".")[0]
    return SPLITS.get(re.split(r"[_.-]", stem)[-1]) if name.endswith((".txt", *TABLE_SUFFIXES)) else None


# --- reading --------------------------------------------------------------------------------------------------------------------------


def read_listing(path: str, *, split: str = "train") -> list[ListedClip]:
    """The rows of a list in its order, with what is listed twice; those that do not say their split have `split`.

    Of a folder, its split files: those whose names end with train, valid(ation), val or test, which says the split. Of VGGSound-Sparse's clean lists,
    the rows that are in sync and not missing, as published. Raises ValueError, with the line, for what is no list or has a row that cannot be read.
    """
    if not storage.is_file(path):
        if storage.is_folder(path):
            return _split_files(path)
        raise ValueError(
            f"listing is {path!r}, which is no file and no folder; expected a csv of VGGSound, AudioSet or another data set, a table with a path "
            "column (csv, parquet, jsonl), or a text file of clip ids, one a line"
        )
    if path.lower().endswith(".parquet"):
        return list(_records(path, _parquet_rows(path), split, first=0, unit="row"))
    kind, text = path.lower().removesuffix(".gz"), read_text(path)
    if kind.endswith((".csv", ".tsv")):
        return list(_csv_rows(path, text, split, "\t" if kind.endswith(".tsv") else ","))
    if kind.endswith(".jsonl"):
        return list(_records(path, _json_lines(path, text), split, first=1, unit="line"))
    if kind.endswith(".json"):
        return list(_json_rows(path, text, split))
    plain = PLAIN_KEY.fullmatch
    return [ListedClip(line, line, None, split) if plain(line) else _named(line, split) for line in lines_of(text)]


def is_table(path: str) -> bool:
    """Whether a file's ending says that it is a list with columns or fields, and no plain text."""
    return path.lower().removesuffix(".gz").endswith(TABLE_SUFFIXES)


def read_text(path: str) -> str:
    """A text file, without a byte order mark, unpacked if it ends with `.gz`. ValueError for what is no text."""
    data = storage.read_bytes(path)
    try:
        text = (gzip.decompress(data) if path.lower().endswith(".gz") else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file (byte {error.start} is not UTF-8); expected a list, one video or clip id a line") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); expected what gzip writes") from error
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{path} stands for a file that Git LFS keeps elsewhere; `git lfs pull` fetches it")
    return text


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not empty, without spaces around them; only ends of lines end one, not all that Unicode might."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def _named(line: str, split: str) -> ListedClip:
    """A row of a text file: a clip id, or a path."""
    if PLAIN_KEY.fullmatch(line):
        return ListedClip(line, line, None, split)
    name = name_of(line)
    return ListedClip(name, key_of(name), label_of_place(line), split, None, None, line)


def _split_files(folder: str) -> list[ListedClip]:
    found = [(name, split) for name in storage.names(folder) if (split := split_of(name)) is not None]
    if not found:
        raise ValueError(f"{folder} holds no split files; expected names that end with train, validation or test, such as visualsound_train.txt")
    return [row for name, split in found for row in read_listing(storage.join(folder, name), split=split)]


# --- csv ------------------------------------------------------------------------------------------------------------------------------


class _ExpectedError(ValueError):
    """What a row should have been; where it stands is told by who reads the file."""


VGGSOUND_FORM = '`youtube id,start second,label,split` as VGGSound has it, or AudioSet\'s `youtube id,start second,end second,"labels"`'


def _csv_rows(path: str, text: str, split: str, separator: str) -> Iterator[ListedClip]:
    """Lines that begin with # are comments, as in AudioSet's files; the first other one is a header if it has the names of columns."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    row: list[str] = []
    reader: Callable[[list[str], str], ListedClip | None] | None = None
    try:
        for row in lines:
            if not row or row[0].startswith("#"):
                continue
            if reader is None:
                reader = _by_header(row)
                if reader is not None:
                    continue
                reader = _positional
            clip = reader(row, split)
            if clip is not None:
                yield clip
    except _ExpectedError as error:
        raise ValueError(f"{path}, line {lines.line_num}: {row!r}; expected {error}") from None
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {lines.line_num}: {error}; expected {'tabs' if separator == chr(9) else 'commas'} and closed quotes"
        ) from error


def _by_header(row: list[str]) -> Callable[[list[str], str], ListedClip | None] | None:
    """What reads the rows under a header; None if this is none."""
    names = [{"v_start_sec": "vstart_sec"}.get(name, name) for name in (cell.strip().lower() for cell in row)]
    known = set(names)
    identity = next((name for name in VGGSOUND_IDS if name in known), None)
    of_youtube = identity in ("youtube_id", "ytid")
    start = next((name for name in ("start", *(("start_seconds",) if of_youtube else ())) if name in known), None)
    if identity is not None and start is not None:
        label = next((name for name in LABELS if name in known), None)
        if "end_seconds" in known:
            return _audioset_columns(names, [identity, start, "end_seconds", *([label] if label else [])])
        return _vggsound_columns(names, names.index(identity), names.index(start), label, "split" if "split" in known else None)
    if not known & {"key", *PATHS}:
        return None

    def read(row: list[str], split: str) -> ListedClip | None:
        if len(row) != len(names):
            raise _ExpectedError(", ".join(names))
        return _record(dict(zip(names, row, strict=True)), split)

    return read


def _vggsound_columns(
    names: Sequence[str], identity: int, start: int, label: str | None, split: str | None
) -> Callable[[list[str], str], ListedClip | None]:
    """VGGSound's rows by the places of their columns, as VisualSound's csv has them under a header."""
    width, label_at, split_at = len(names), names.index(label) if label else -1, names.index(split) if split else -1

    def read(row: list[str], default: str) -> ListedClip | None:
        if len(row) != width or not row[start].strip().isdecimal():
            raise _ExpectedError(f"{', '.join(names)}, with a start in whole seconds")
        return _vggsound(
            row[identity], row[start], row[label_at] if label_at >= 0 else "", (row[split_at].strip() if split_at >= 0 else "") or default
        )

    return read


def _audioset_columns(names: Sequence[str], wanted: Sequence[str]) -> Callable[[list[str], str], ListedClip | None]:
    """AudioSet's rows under a header that is no comment."""
    places = [names.index(name) for name in wanted]

    def read(row: list[str], split: str) -> ListedClip | None:
        if len(row) != len(names):
            raise _ExpectedError(", ".join(names))
        # The fifth column marks a row as AudioSet's, whatever its labels are.
        clip = _audioset_row([*([row[place] for place in places] + [""])[:4], ""], split)
        if clip is None:
            raise _ExpectedError(f"{', '.join(names)}, with start and end in seconds")
        return clip

    return read


def _positional(row: list[str], split: str) -> ListedClip:
    """VGGSound's and AudioSet's rows without a header."""
    clip = _vggsound_row(row, split) or _audioset_row(row, split)
    if clip is None:
        raise _ExpectedError(VGGSOUND_FORM)
    return clip


def _vggsound_row(row: list[str], split: str) -> ListedClip | None:
    if len(row) not in (3, 4) or not row[1].strip().isdecimal() or (len(row) == 4 and AUDIOSET_LABELS.match(row[3])):
        return None
    return _vggsound(row[0], row[1], row[2], (row[3].strip() if len(row) == 4 else "") or split)


def _vggsound(youtube_id: str, start: str, label: str, split: str) -> ListedClip:
    start_ms = int(start) * 1000
    clip_id = f"{youtube_id}_{start_ms}"
    key = f"{clip_id}_{start_ms + VGGSOUND_SECONDS * 1000}"
    return ListedClip(clip_id, key if PLAIN_KEY.fullmatch(key) else key_of(key), label.strip() or None, split)


def _audioset_row(row: list[str], split: str) -> ListedClip | None:
    """Also as Synchformer's lists have it: a fifth column, and the part of AudioSet before the id (`unbalanced/<id>`), which says the split."""
    if len(row) not in (4, 5) or (len(row) == 4 and not AUDIOSET_LABELS.match(row[3])):
        return None
    try:
        start_ms, end_ms = (int(float(seconds) * 1000) for seconds in row[1:3])  # truncated, as its files are named
    except (ValueError, OverflowError):
        return None
    part, _, youtube_id = row[0].rpartition("/")
    split = AUDIOSET_SPLITS.get(part.removesuffix("_segments").removesuffix("_train"), split)
    return ListedClip(f"{youtube_id}_{start_ms}", key_of(f"{youtube_id}_{start_ms}_{end_ms}"), row[3].strip() or None, split)


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def _records(path: str, rows: Iterable[Mapping[str, Any]], split: str, *, first: int, unit: str) -> Iterator[ListedClip]:
    for number, row in enumerate(rows, first):
        try:
            clip = _record(row, split)
        except _ExpectedError as error:
            raise ValueError(f"{path}, {unit} {number}: {dict(row)!r}; expected {error}") from None
        if clip is not None:
            yield clip


def _record(row: Mapping[str, Any], split: str) -> ListedClip | None:
    """A row by the names of its columns; None for one that VGGSound-Sparse's clean lists mark as out of sync or missing."""
    get = row.get
    if get("is_sync", "1") not in ("1", 1) or get("vid_is_missing", "0") not in ("0", 0):
        return None
    place = _text_of(row, PATHS)
    given = _text_of(row, ("key",))
    if place is None and given is None:
        raise _ExpectedError(f"a column key, or one of {', '.join(PATHS)}")
    split = _text_of(row, ("split",)) or split
    label = _text_of(row, LABELS) or greatest_hits.label_of(get("material"), get("action_type"))
    if place is not None and "offset_sec" in row:
        start, offset = _seconds(row, "vstart_sec"), _seconds(row, "offset_sec")
        if start is None or offset is None or start < 0 or abs(offset) > LARGEST_OFFSET_SECONDS:
            raise _ExpectedError("vstart_sec of at least 0 and offset_sec from -2 to 2, in seconds")
        return _placed(place, given, label, split)._replace(start_seconds=start, offset_seconds=offset)
    if place is not None and "video_id" in row and "start_sec" in row:
        if not str(row["start_sec"]).strip().isdecimal():
            raise _ExpectedError("start_sec in whole seconds")
        return _vggsound(place, str(row["start_sec"]), label or "", split)
    if place is not None and "start_time" in row and "occurring_time" in row:
        return _hit(place, row, label, split)
    if "start_sec" in row:
        start = _seconds(row, "start_sec")
        if start is None or start < 0:
            raise _ExpectedError("start_sec of at least 0, in seconds")
        return _placed(place, given, label, split)._replace(start_seconds=start)
    return _cut(_placed(place, given, label, split), given, _seconds(row, "start_seconds"), _seconds(row, "end_seconds"))


def _placed(place: str | None, given: str | None, label: str | None, split: str) -> ListedClip:
    """A clip by its path, its given key, or both."""
    if place is None:
        assert given is not None
        return ListedClip(given, key_of(given), label, split)
    name = name_of(place)
    return ListedClip(name, key_of(given or name), label or label_of_place(place), split, None, None, place)


def _cut(clip: ListedClip, given: str | None, start: float | None, end: float | None) -> ListedClip:
    """With the part of the video that is the clip; without a key of its own it is called by it."""
    if start is None and end is None:
        return clip
    begin = start or 0.0
    if begin < 0 or (end is not None and end <= begin):
        raise _ExpectedError("start_seconds of at least 0 and, if at all, a greater end_seconds")
    if given is None:
        clip = clip._replace(key=key_of(f"{clip.clip_id}_{round(begin * 1000)}" + (f"_{round(end * 1000)}" if end is not None else "")))
    return clip._replace(start_seconds=start, cut=(begin, end))


def _hit(name: str, row: Mapping[str, Any], label: str | None, split: str) -> ListedClip:
    """A row of V-AURA's csv of Greatest Hits: a part that is called by its video, with where it was cut."""
    stem = without_ending(name)
    match = greatest_hits.HIT_NAME.fullmatch(stem)
    start, end = _seconds(row, "start_time"), _seconds(row, "end_time")
    if match is None or start is None or end is None or not 0 <= start < end:
        raise _ExpectedError("a filename `<video>_denoised_<frame>.mp4`, and its start_time and end_time in seconds")
    return ListedClip(stem, stem, label, split, None, None, f"{match[1]}_{match[2]}.mp4", (round(start, 6), round(end, 6)))


def _text_of(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the named columns that holds a text."""
    for name in names:
        value = row.get(name)
        if value is not None and (text := str(value).strip()):
            return text
    return None


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _ExpectedError(f"{name} in seconds")
    return seconds


# --- parquet and json -----------------------------------------------------------------------------------------------------------------


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows of the columns that say something of a clip; others, such as the videos themselves, are not read."""
    wanted = {"key", "split", "start_seconds", "end_seconds", "start_sec", "vstart_sec", "offset_sec", *PATHS, *LABELS}
    source = path if not storage.is_remote(path) else pa.BufferReader(storage.read_bytes(path))
    try:
        file = pq.ParquetFile(source)
        columns = [name for name in file.schema_arrow.names if name in wanted]
        if not {"key", *PATHS} & set(columns):
            raise ValueError(f"{path} has the columns {', '.join(file.schema_arrow.names)}; expected key, or one of {', '.join(PATHS)}")
        for batch in file.iter_batches(columns=columns, batch_size=1 << 16):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not readable as parquet ({error})") from error


def _json_lines(path: str, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no json ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: {line[:80]!r}; expected an object with a path, such as {{"filepath": ...}}')
        yield row


def _json_rows(path: str, text: str, split: str) -> Iterator[ListedClip]:
    """A list of names or objects, or an object whose names are clips, such as ImageBind's scores."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no json ({error})") from error
    if not isinstance(found, list | dict):
        raise ValueError(f"{path} is neither a list nor an object; expected names of clips")
    for number, row in enumerate(found, 1):
        if isinstance(row, str):
            yield _named(row, split)
        elif isinstance(row, dict):
            yield from _records(path, [row], split, first=number, unit="entry")
        else:
            raise ValueError(f"{path}, entry {number}: {row!r}; expected the name of a clip, or an object with its path")
