"""Which clips there are: a folder, a list of files, or a data set's own csv or folders become one row per input, with its key, split, label, size
and version.

Rows are decided from names and listings alone: no video is opened, so 200,000 clips take seconds, on a disk or in an object store. This module knows
no media, no dataset and no Ray.
"""

import csv
import hashlib
import io
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

from configs import storage
from pipeline.tars import VIDEO_SUFFIXES

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
LISTED_ALWAYS = 1000
LISTED_PER_WANTED = 100
"""Objects that may be listed for one whose size is wanted: a page of 1000 costs about what asking for one object does."""
ASKING_THREADS = 32

File = tuple[str, int | None, str | None]
"""Path, size in bytes and version of an input; without the last two where there is a name but no file behind it, such as a dangling link."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One input: where it is and what it is called, or why it has already failed."""

    key: str
    source: str
    split: str
    label: str | None = None
    reason: str | None = None
    message: str | None = None
    size: int | None = None
    """Bytes, as listed when the clip was found."""
    version: str | None = None
    """What changes when the input does: `mtime:<ns>` of a file, `etag:<etag>` of an object, `sha256:<hash>` of what a clip was taken from."""
    offset: int | None = None
    """Byte at which the clip begins in a tar: `source` is then `PATH.tar::MEMBER`, `size` the member's, and `version` the tar's."""
    start_seconds: float | None = None
    """Where the clip begins in the video, on the video's own clock; None for its beginning."""
    end_seconds: float | None = None
    """Where the clip ends in the video, on the video's own clock; None for its end."""


@dataclass(frozen=True)
class DiscoverConfig:
    """Where the clips come from and how they are split."""

    source: str = "???"
    """Clips: a folder (searched recursively for mp4, webm, mkv, mov and avi; names that begin with a dot are passed over), one video file, or a
    text file that lists video files, one a line, relative to itself. All of them also in object storage: s3://BUCKET/PREFIX, gs:// or az://."""
    listing: str = ""
    """For a folder: which of its clips to take. VGGSound's csv (`youtube id,start second,label,split`), AudioSet's (`youtube id,start second,end
    second,"labels"` after lines of comment) or a text file of clip ids, one a line; files are called `<youtube id>_<start ms>_<end ms>` or
    `<youtube id>_<start second in six digits>`, wherever they lie in the folder. Empty takes the folder's own vggsound.csv if it has one, else every
    video; `none` takes every video."""
    split: str = "train"
    """Split of clips for which no csv says it."""
    validation_fraction: float = 0.0
    """Part of the clips of `split` that becomes the split `validation`: those whose keys have the next smallest hashes after the test clips'."""
    test_fraction: float = 0.0
    """Part of the clips of `split` that becomes the split `test`: those whose keys have the smallest hashes."""
    layout: Literal["any", "lrs3"] = "any"
    """How a folder is laid out. `any`: names of files are clips' keys. `lrs3`: `pretrain|trainval|test/<speaker>/<utterance>.mp4` gives the key
    `<speaker>_<utterance>` and, without a listing, the split; a listing has `pretrain/<speaker>/<utterance>`, one a line. Fractions are then of
    speakers, so that nobody is in two splits."""


def discover(config: DiscoverConfig) -> list[Clip]:
    """One row per input, sorted by split and key. Listed clips that are absent and keys that appear again are rows that have failed already.

    Raises ValueError if there is nothing to list.
    """
    clips = list(_found(config))
    if not clips:
        raise ValueError(f"no clips in {config.source}; expected {', '.join(suffix[1:] for suffix in VIDEO_SUFFIXES)} files")
    clips = _split(_without_duplicates(clips), config)
    for split in {clip.split for clip in clips}:
        if not re.fullmatch(r"[\w-]+", split):
            raise ValueError(f"split {split!r} cannot name files; expected letters, digits, '_' and '-'")
    return sorted(clips, key=lambda clip: (clip.split, clip.key, clip.source, clip.reason is not None))


def discovery(config: DiscoverConfig) -> DiscoverConfig:
    """The options of this module alone, out of a job's wider configuration: a process that is handed these imports no job."""
    return DiscoverConfig(**{field.name: getattr(config, field.name) for field in fields(DiscoverConfig)})


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


def _found(config: DiscoverConfig) -> Iterator[Clip]:
    """Every input, in any order, with duplicates."""
    # Workers may run in another directory or on another machine, so a local source is kept by its absolute path.
    source = _normal(storage.join(config.source)) if storage.is_remote(config.source) else os.path.abspath(config.source)
    if config.layout == "lrs3":
        return _lrs3(source, config)
    if storage.is_folder(source):
        own = storage.join(source, "vggsound.csv")
        if config.listing == "none" or (not config.listing and not storage.is_file(own)):
            return (_clip(file, config.split) for file in _videos(source))
        return _listed_ids(config.listing or own, source, config.split)
    if not storage.is_file(source):
        raise ValueError(f"source is {config.source!r}, which is no file and no folder; give a folder of videos, a video or a list of videos")
    if config.listing and config.listing != "none":
        raise ValueError(f"listing is {config.listing!r}, but source is the file {config.source!r}; expected a folder with the listed clips")
    if source.lower().endswith(VIDEO_SUFFIXES):
        return iter([_clip(_file(source), config.split)])
    return _listed_files(source, config.split)


def _clip(file: File, split: str) -> Clip:
    return Clip(key_of(_stem(file[0])), file[0], split, size=file[1], version=file[2])


def _stem(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def _videos(folder: str) -> Iterator[File]:
    """Video files under a folder or prefix, but for those behind a name that begins with a dot."""
    if not storage.is_remote(folder):
        yield from _local_videos(folder)
        return
    for found in storage.scan(folder):
        if found.path.lower().endswith(VIDEO_SUFFIXES) and "/." not in found.path[len(folder) :]:
            yield found.path, found.size, found.version


def _local_videos(folder: str) -> Iterator[File]:
    """A folder that cannot be listed is an error: its clips must not go missing without a word. Links to folders are not followed."""
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.name.lower().endswith(VIDEO_SUFFIXES) and not (entry.is_symlink() and os.path.isdir(entry.path)):
                        yield _local_file(entry.path)
        except OSError as error:
            raise ValueError(f"cannot list {error.filename}: {error.strerror}") from error


def _file(path: str) -> File:
    """A file's size and version, if there is more than a name."""
    if not storage.is_remote(path):
        return _local_file(path)
    found = storage.stat(path)
    return (path, found.size, found.version) if found else (path, None, None)


def _local_file(path: str) -> File:
    try:
        status = os.stat(path)
    except OSError:
        return path, None, None
    return path, status.st_size, f"mtime:{status.st_mtime_ns}"


def _listed_files(listing: str, split: str) -> Iterator[Clip]:
    """Clips of a text file of paths."""
    parent = storage.parent(listing)
    paths = [_resolved(parent, line) for line in _lines(listing)]
    objects = _objects({path for path in paths if storage.is_remote(path)})
    for path in paths:
        file = (objects.get(path) or (path, None, None)) if storage.is_remote(path) else _file(path)
        clip = _clip(file, split)
        absent = file[1] is None and (storage.is_remote(path) or not os.path.lexists(path))
        yield replace(clip, reason="missing", message=f"listed in {listing} but not there") if absent else clip


def _resolved(parent: str, line: str) -> str:
    """A line of a list of files as a path of its own."""
    if storage.is_remote(line):
        return _normal(line)
    if not storage.is_remote(parent):
        return os.path.join(parent, line)
    return line if line.startswith("/") else _normal(f"{parent}/{line}")


def _normal(url: str) -> str:
    """An address without `.`, `..` and empty parts, as listings have it."""
    scheme, _, path = url.partition("://")
    return f"{scheme}://{posixpath.normpath(path)}"


def _objects(wanted: Collection[str]) -> dict[str, File]:
    """Size and version of the wanted objects that exist.

    Folders are listed, since a page tells of a thousand objects for the price of asking for one: each folder by itself, or, where the objects lie in
    many, everything under what their paths have in common. A listing that turns out to be mostly of other objects is given up, and the objects asked
    for one by one.
    """
    found: dict[str, File] = {}
    for paths in _grouped(wanted, lambda path: "/".join(path.split("/", 3)[:3])).values():  # those of one bucket
        parents = _grouped(paths, posixpath.dirname)
        together = len(parents) > 8 + len(paths) // 100
        groups = {posixpath.commonprefix([f"{parent}/" for parent in parents]).rpartition("/")[0]: paths} if together else parents
        for folder, members in groups.items():
            found |= _listed_or_asked(folder, members, recursive=together)
    return found


def _grouped(paths: Iterable[str], key: Callable[[str], str]) -> dict[str, set[str]]:
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        groups[key(path)].add(path)
    return groups


def _listed_or_asked(folder: str, wanted: Collection[str], *, recursive: bool) -> dict[str, File]:
    found: dict[str, File] = {}
    for number, entry in enumerate(storage.scan(folder, recursive=recursive)):
        if entry.path in wanted:
            found[entry.path] = (entry.path, entry.size, entry.version)
        if number >= LISTED_ALWAYS + LISTED_PER_WANTED * len(wanted):
            break
    else:
        return found
    with ThreadPoolExecutor(ASKING_THREADS) as pool:
        return found | {file[0]: file for file in pool.map(_file, [path for path in wanted if path not in found]) if file[1] is not None}


def _listed_ids(listing: str, folder: str, split: str) -> Iterator[Clip]:
    """Clips of VGGSound's csv or of a text file of clip ids, found in a folder by their names."""
    rows = listed_rows(listing, split)
    found: dict[str, File] = {}
    for file in sorted(_videos(folder), reverse=True):  # of files for the same clip, the first in sorted order stays
        for clip_id in clip_ids(_stem(file[0])):
            found[clip_id] = file
    for row in rows:
        file = found.get(row.clip_id) or next((found[other] for other in clip_ids(row.clip_id) if other in found), None)
        if file is None:
            key, path = key_of(row.key), storage.join(folder, f"{row.key}.mp4")
            yield Clip(key, path, row.split, row.label, "missing", f"listed in {listing} but not in {folder}")
        else:
            stem = _stem(file[0])
            key = key_of(stem if MILLISECONDS_NAME.fullmatch(stem) else row.key)
            yield Clip(key, file[0], row.split, row.label, size=file[1], version=file[2])


def clip_ids(stem: str) -> list[str]:
    """Names under which a file can be listed: its stem, and its youtube id with the start in milliseconds."""
    if match := MILLISECONDS_NAME.fullmatch(stem):
        return [stem, f"{match[1]}_{int(match[2])}"]
    if match := SECONDS_NAME.fullmatch(stem):
        return [stem, f"{match[1]}_{int(match[2]) * 1000}"]
    return [stem]


class ListedClip(NamedTuple):
    """A row of a csv or list of clips."""

    clip_id: str
    """Youtube id and start in milliseconds, or the line of a list: what a file is found by."""
    key: str
    """The whole name that its file has where the data set is published."""
    label: str | None
    split: str


def listed_rows(path: str, split: str) -> Iterator[ListedClip]:
    """Rows of VGGSound's or AudioSet's csv, or of a text file of clip ids; those that do not say their split have `split`.

    Raises ValueError if there is no such file, or for a row of another form.
    """
    if not storage.is_file(path):
        raise ValueError(f"listing is {path!r}, which is no file; expected VGGSound's or AudioSet's csv or a text file of clip ids")
    if not path.lower().endswith(".csv"):
        return (ListedClip(line, line, None, split) for line in _lines(path))
    return _csv_rows(path, split)


def _csv_rows(path: str, split: str) -> Iterator[ListedClip]:
    """A first row whose second column is no number is a header; lines that begin with # are comments, as in AudioSet's files."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), skipinitialspace=True)
    for row in reader:
        if not row or row[0].startswith("#"):
            continue
        clip = _vggsound_row(row, split) or _audioset_row(row, split)
        if clip is not None:
            yield clip
        elif reader.line_num > 1 or len(row) not in (3, 4):
            raise ValueError(
                f"{path}, line {reader.line_num}: {row!r}; expected `youtube id,start second,label,split` as VGGSound has it, or AudioSet's "
                '`youtube id,start second,end second,"labels"`'
            )


def _vggsound_row(row: list[str], split: str) -> ListedClip | None:
    if len(row) not in (3, 4) or not row[1].strip().isdigit() or (len(row) == 4 and AUDIOSET_LABELS.match(row[3])):
        return None
    start_ms = int(row[1]) * 1000
    key = f"{row[0]}_{start_ms}_{start_ms + VGGSOUND_SECONDS * 1000}"
    return ListedClip(f"{row[0]}_{start_ms}", key, row[2].strip() or None, row[3].strip() if len(row) == 4 else split)


def _audioset_row(row: list[str], split: str) -> ListedClip | None:
    """Also as Synchformer's lists have it: a fifth column, and the part of AudioSet before the id (`unbalanced/<id>`), which says the split."""
    if len(row) not in (4, 5) or (len(row) == 4 and not AUDIOSET_LABELS.match(row[3])):
        return None
    try:
        start_ms, end_ms = (int(float(seconds) * 1000) for seconds in row[1:3])  # truncated, as its files are named
    except ValueError:
        return None
    part, _, youtube_id = row[0].rpartition("/")
    split = AUDIOSET_SPLITS.get(part.removesuffix("_segments").removesuffix("_train"), split)
    return ListedClip(f"{youtube_id}_{start_ms}", f"{youtube_id}_{start_ms}_{end_ms}", row[3].strip() or None, split)


# --- LRS3 -----------------------------------------------------------------------------------------------------------------------------


def lrs3_name(path: str) -> tuple[str, str] | None:
    """Folder (pretrain, trainval or test) and key of a clip of LRS3, from its path with or without an ending; None for another path."""
    stem, ending = os.path.splitext(path)
    match = LRS3_NAME.search(stem if ending.lower() in VIDEO_SUFFIXES else path)
    return (match[1], key_of(f"{match[2]}_{match[3]}")) if match else None


def _lrs3(source: str, config: DiscoverConfig) -> Iterator[Clip]:
    """Clips in LRS3's folders, all or those that are listed."""
    if not storage.is_folder(source):
        raise ValueError(
            f"source is {config.source!r}, which is no folder; layout=lrs3 reads pretrain|trainval|test/<speaker>/<utterance>.mp4 in one"
        )
    found: dict[str, tuple[str, str, File]] = {}
    for file in sorted(_videos(source)):
        name = lrs3_name(file[0])
        if name is None:
            raise ValueError(
                f"{file[0]}: not a place for a clip of LRS3; expected pretrain|trainval|test/<speaker>/<utterance>.mp4, or give layout=any"
            )
        folder, key = name
        found[f"{folder}/{key}"] = folder, key, file
    if config.listing in ("", "none"):
        yield from (Clip(key, file[0], folder, size=file[1], version=file[2]) for folder, key, file in found.values())
        return
    for listed in listed_rows(config.listing, config.split):
        name = lrs3_name(listed.clip_id)
        if name is None:
            raise ValueError(f"{config.listing}: {listed.clip_id!r}; expected pretrain|trainval|test/<speaker>/<utterance>, one a line")
        there = found.get("/".join(name))
        if there is None:
            path = storage.join(source, listed.clip_id)
            yield Clip(name[1], path, config.split, None, "missing", f"listed in {config.listing} but not in {source}")
        else:
            _, key, file = there
            yield Clip(key, file[0], config.split, size=file[1], version=file[2])


# --- lines, duplicates, splits --------------------------------------------------------------------------------------------------------


def _lines(path: str) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _text(path: str) -> str:
    try:
        return storage.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file (byte {error.start} is not UTF-8); expected a list, one video or clip id a line") from error


def _without_duplicates(clips: Sequence[Clip]) -> list[Clip]:
    """The first file of a key, in sorted order, keeps it; the others are failed rows."""
    counts = Counter(clip.key for clip in clips)
    winners: dict[str, Clip] = {}
    rows = [clip for clip in clips if counts[clip.key] == 1]
    repeated = (clip for clip in clips if counts[clip.key] > 1)
    for clip in sorted(repeated, key=lambda clip: (clip.key, clip.reason is not None, clip.source, clip.split)):
        winner = winners.setdefault(clip.key, clip)
        rows.append(clip if clip is winner else replace(clip, reason="duplicate_key", message=f"{winner.source} has this key already"))
    return rows


def _split(clips: list[Clip], config: DiscoverConfig) -> list[Clip]:
    """Move the wanted fractions of the clips of `config.split` to validation and test, by the rank of a hash of their keys."""
    if min(config.validation_fraction, config.test_fraction) < 0 or config.validation_fraction + config.test_fraction > 1:
        given = f"validation_fraction is {config.validation_fraction} and test_fraction {config.test_fraction}"
        raise ValueError(f"{given}; expected parts of 1 that add up to at most 1")
    of = _speaker if config.layout == "lrs3" else _own_key
    keys = sorted({of(clip) for clip in clips if clip.split == config.split}, key=lambda key: hashlib.sha256(key.encode()).digest())
    test = round(len(keys) * config.test_fraction)
    validation = round(len(keys) * config.validation_fraction)
    moved = dict.fromkeys(keys[:test], "test") | dict.fromkeys(keys[test : test + validation], "validation")
    return [replace(clip, split=moved[of(clip)]) if clip.split == config.split and of(clip) in moved else clip for clip in clips]


def _own_key(clip: Clip) -> str:
    return clip.key


def _speaker(clip: Clip) -> str:
    return clip.key.rpartition("_")[0]
