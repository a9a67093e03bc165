"""Lists that say which clips Synchformer is evaluated on, and by how much their sound is shifted where: as published, by their headers.

Fixed offsets (`path,offset_sec,vstart_sec`), the clean list of VGGSound-Sparse with and without offsets, its classes; and the csvs and lists of clips
that `pipeline.discover` reads, which leave the offsets open. Knows no dataset, no media and no network.
"""

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from configs import storage
from model.segments import OFFSET_STEP_SECONDS, class_seconds
from pipeline.discover import VGGSOUND_SECONDS, VIDEO_SUFFIXES, clip_ids, key_of, listed_rows, lrs3_name

FIXED = {"path", "offset_sec", "vstart_sec"}
SPARSE_FIXED = {"video_id", "vstart_sec", "offset_sec", "is_sync"}
SPARSE = {"video_id", "start_sec", "vid_is_missing", "is_sync"}
CLASSES = {"class", "is_sparse"}
LARGEST_OFFSET_SECONDS = class_seconds(0) * -1 + OFFSET_STEP_SECONDS / 2


@dataclass(frozen=True)
class Listed:
    """A clip of a list, and where it is cut if the list says so."""

    key: str
    start_seconds: float | None = None
    """Where the pictures start; None leaves it open, with the offset."""
    offset_seconds: float | None = None
    """By how much later in the file the sound starts."""

    @property
    def fixed(self) -> bool:
        """Whether the list says where the clip is cut."""
        return self.start_seconds is not None


def read_list(path: str) -> list[Listed]:
    """The clips of a list in its order, each row once; a clip may be cut at several places.

    By its header, a csv is a list of fixed offsets, or the clean list of VGGSound-Sparse with or without offsets: of those, the rows that are in
    sync and not missing, as published. Other files are what `listing` of `soundshard prepare` is: VGGSound's or AudioSet's csv, or clip ids, one a
    line. Raises ValueError for a file that is none of them, or has a row that cannot be read.
    """
    header, rows = _table(path)
    if header >= FIXED:
        found = [_fixed(path, number, row["path"], row) for number, row in rows]
    elif header >= SPARSE_FIXED:
        found = [_fixed(path, number, row["video_id"], row) for number, row in rows if row["is_sync"] == "1"]
    elif header >= SPARSE:
        found = [_sparse(path, number, row) for number, row in rows if row["is_sync"] == "1" and row["vid_is_missing"] == "0"]
    elif any(name.endswith("_sec") for name in header):
        raise ValueError(f"{path} has the columns {', '.join(sorted(header))}; expected path, offset_sec and vstart_sec, or those of VGGSound-Sparse")
    else:
        found = [Listed(_key(row.key)) for row in listed_rows(path, "")]
    if not found:
        raise ValueError(f"{path} lists no clips that are in sync")
    return list(dict.fromkeys(found))


def read_classes(path: str) -> list[str]:
    """The classes that a list of classes (`class` and `is_sparse` with y or n, separated by tabs) marks, or those of a text file, one a line."""
    header, rows = _table(path, "\t")
    found = [row["class"] for _, row in rows if row["is_sparse"] == "y"] if header >= CLASSES else [line.strip() for line in _text(path).splitlines()]
    found = [name for name in found if name]
    if not found:
        raise ValueError(f"{path} marks no classes; expected columns class and is_sparse (y or n), separated by tabs, or classes, one a line")
    return found


def present(key: str, rows: Mapping[str, int]) -> str | None:
    """What a listed clip is called in a dataset whose keys `by_name` prepared; None where it is not there."""
    return next((name for name in (key, *clip_ids(key)) if name in rows), None)


def by_name(keys: Collection[str]) -> dict[str, int]:
    """The row of each key, also by youtube id and start: one data set's clip ends at 10 s, another's where its file does."""
    exact = {key: row for row, key in enumerate(keys)}
    return {name: row for key, row in exact.items() for name in clip_ids(key)} | exact


def _table(path: str, separator: str = ",") -> tuple[set[str], Iterator[tuple[int, dict[str, str]]]]:
    """The names in a file's first line, and the rows below with their line's number, by these names."""
    lines = csv.reader(io.StringIO(_text(path), newline=""), delimiter=separator)
    names = [{"v_start_sec": "vstart_sec"}.get(name.strip(), name.strip()) for name in next(lines, [])]
    return set(names), _rows(path, names, lines)


def _rows(path: str, names: list[str], lines: Iterator[list[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, row in enumerate(lines, 2):
        if len(row) not in (0, len(names)):
            raise ValueError(f"{path}, line {number}: {row!r}; expected {', '.join(names)}")
        if row:
            yield number, {name: value.strip() for name, value in zip(names, row, strict=True)}


def _text(path: str) -> str:
    if not storage.is_file(path):
        raise ValueError(f"{path}: no such file; expected a list of clips or classes")
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file (byte {error.start} is not UTF-8)") from error


def _fixed(path: str, number: int, name: str, row: dict[str, str]) -> Listed:
    try:
        start, offset = float(row["vstart_sec"]), float(row["offset_sec"])
    except ValueError:
        start = offset = -1e9
    if start < 0 or abs(offset) > LARGEST_OFFSET_SECONDS:
        raise ValueError(f"{path}, line {number}: {row}; expected vstart_sec of at least 0 and offset_sec from -2 to 2, in seconds")
    return Listed(_key(name), start, offset)


def _sparse(path: str, number: int, row: dict[str, str]) -> Listed:
    if not row["start_sec"].isdigit():
        raise ValueError(f"{path}, line {number}: {row}; expected start_sec in whole seconds")
    start_ms = int(row["start_sec"]) * 1000
    return Listed(f"{row['video_id']}_{start_ms}_{start_ms + VGGSOUND_SECONDS * 1000}")


def _key(name: str) -> str:
    """A clip's key from how a list calls it: a key, a path such as AudioSet's `eval/<clip>`, or a place in LRS3's folders."""
    lrs3 = lrs3_name(name)
    if lrs3 is not None:
        return lrs3[1]
    last = name.rpartition("/")[2]
    stem, dot, ending = last.rpartition(".")
    return key_of(stem if dot and f".{ending}".lower() in VIDEO_SUFFIXES else last)


def fixed_offsets(path: str) -> dict[str, tuple[float, float]]:
    """For each key of a list of fixed offsets: where the pictures start, and the offset, in seconds. ValueError for a list that leaves them open, or
    that cuts a clip at several places: training's validation takes each clip once."""
    found: dict[str, tuple[float, float]] = {}
    for listed in read_list(path):
        if listed.start_seconds is None or listed.offset_seconds is None:
            raise ValueError(f"{path} leaves offsets open; expected a list of fixed offsets, with path, offset_sec and vstart_sec")
        if listed.key in found:
            raise ValueError(f"{path} cuts {listed.key} at several places; expected each clip once")
        found[listed.key] = (listed.start_seconds, listed.offset_seconds)
    return found
