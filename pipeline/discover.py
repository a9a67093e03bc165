"""Which clips there are: a folder, tars, a list of files, or a data set's own lists or folders become one row per input, with its key, split, label,
size and version.

Rows are decided from names and listings alone: no video is opened, so 200,000 clips take seconds, on a disk or in an object store. What lists look
like is `pipeline.lists`' matter, where files lie `pipeline.inputs`'. This module knows no media, no dataset and no Ray.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from configs import storage
from pipeline import greatest_hits, tars, web
from pipeline.inputs import File, Folder, file_at, members_at, normal, objects_at, videos_in
from pipeline.lists import (
    MILLISECONDS_NAME,
    VGGSOUND_SECONDS,
    VIDEO_SUFFIXES,
    YOUTUBE_ID,
    ListedClip,
    clip_ids,
    is_table,
    key_of,
    label_of_place,
    lrs3_name,
    name_of,
    read_listing,
    read_text,
    split_of,
    without_ending,
)

__all__ = [
    "VGGSOUND_SECONDS",
    "VIDEO_SUFFIXES",
    "Clip",
    "DiscoverConfig",
    "ListedClip",
    "clip_ids",
    "discover",
    "discovery",
    "key_of",
    "listed_rows",
    "lrs3_name",
]

NAMED_BY_START = re.compile(YOUTUBE_ID + r"_\d+(_\d+)?")
"""Keys of which a file says the end: in one copy clips are ten seconds long, in another as long as their videos went on."""


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
    """Clips: a folder (searched recursively for mp4, webm, mkv, mov and avi, also inside tars; names that begin with a dot are passed over), one
    video, one tar, a text file that lists videos, one a line, relative to itself, or a table (parquet, csv or jsonl) with a path, file or url column
    and, if at all, key, label, split, start_seconds and end_seconds. All of them also in object storage: s3://BUCKET/PREFIX, gs:// or az://; what a
    list or table names may also be an http(s) address."""
    listing: str = ""
    """For a folder: which of its clips to take. A csv of VGGSound or VisualSound (`youtube id,start second,label,split`) or AudioSet (`youtube
    id,start second,end second,"labels"` after lines of comment), with or without a header; VGGSound-Sparse's lists; any table as for `source`; a
    text file of clip ids or paths, one a line; or a folder of split files (`visualsound_train.txt`, ..._validation, ..._test). Files are found by
    name, wherever they lie in the folder: `<youtube id>_<start ms>_<end ms>` or `<youtube id>_<start second in six digits>`. Empty takes the
    folder's own vggsound.csv if it has one, else every video; `none` takes every video."""
    split: str = "train"
    """Split of clips for which no list says it."""
    validation_fraction: float = 0.0
    """Part of the clips of `split` that becomes the split `validation`: those whose keys have the next smallest hashes after the test clips'."""
    test_fraction: float = 0.0
    """Part of the clips of `split` that becomes the split `test`: those whose keys have the smallest hashes."""
    layout: Literal["any", "lrs3", "greatest_hits"] = "any"
    """How a folder is laid out. `any`: names of files are clips' keys. `lrs3`: `pretrain|trainval|test/<speaker>/<utterance>.mp4` gives the key
    `<speaker>_<utterance>` and, without a listing, the split; a listing has `pretrain/<speaker>/<utterance>`, one a line. `greatest_hits`:
    `<video>_denoised.mp4` with `<video>_times.txt`, of which every hit becomes a clip; a listing has videos or parts of them, and where it is empty,
    the folder's own train.txt and test.txt are taken if it has them. Fractions are then of speakers and of videos, so that none is in two splits."""
    cut_seconds: float = 2.0
    """Greatest Hits: how much of the video a clip is, half of it before the hit; 0 takes whole videos."""
    recording: Literal["denoised", "mic"] = "denoised"
    """Greatest Hits: with which sound, without noise or as the microphone had it."""
    unpack: str = ""
    """Where compressed tars (.tar.gz, ...) among the inputs are unpacked to, once: a folder or prefix with room for the plain tars, which are then
    read. `none` passes over them."""
    salvage: bool = False
    """Take of damaged tars what can be read, and say how much in a warning, instead of refusing them. What a list names and they have lost is a row
    `missing`; without a list it is not known."""


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


def listed_rows(path: str, split: str) -> Iterator[ListedClip]:
    """The rows of a list; those that do not say their split have `split`. Raises ValueError for what is no list."""
    return iter(read_listing(path, split=split))


def _found(config: DiscoverConfig) -> Iterator[Clip]:
    """Every input, in any order, with duplicates."""
    # Workers may run in another directory or on another machine, so a local source is kept by its absolute path.
    source = normal(storage.join(config.source)) if storage.is_remote(config.source) else os.path.abspath(config.source)
    if config.layout == "lrs3":
        return _lrs3(source, config)
    if config.layout == "greatest_hits":
        return _greatest_hits(source, config)
    is_file = storage.is_file(source)
    if (is_file and tars.is_tar(source)) or (not is_file and storage.is_folder(source)):
        own = storage.join(source, "vggsound.csv")
        if config.listing == "none" or (not config.listing and (is_file or not storage.is_file(own))):
            return (_clip(file, config.split) for file in videos_in(source, config.unpack, salvage=config.salvage))
        return _listed_ids(config.listing or own, source, config)
    if not is_file:
        raise ValueError(f"source is {config.source!r}, which is no file and no folder; give a folder of videos, a video or a list of videos")
    if config.listing and config.listing != "none":
        raise ValueError(f"listing is {config.listing!r}, but source is the file {config.source!r}; expected a folder with the listed clips")
    if source.lower().endswith(VIDEO_SUFFIXES):
        return iter([_clip(file_at(source), config.split)])
    return _listed_files(source, config.split)


def _clip(file: File, split: str) -> Clip:
    place = file.place
    return Clip(key_of(name_of(place)), file.path, split, label_of_place(place), size=file.size, version=file.version, offset=file.offset)


def _listed_files(listing: str, split: str) -> Iterator[Clip]:
    """Clips of a list of paths, or of a table that has them."""
    parent, rows = storage.parent(listing), read_listing(listing, split=split)
    if rows and is_table(listing) and not any(row.path for row in rows):
        raise ValueError(f"{listing} names clips and does not say where they are; give their folder as source, and this as listing")
    paths = [_resolved(parent, row.path or row.clip_id) for row in rows]
    files = members_at({path for path in paths if f".tar{tars.INSIDE}" in path and not web.is_web(path)})
    files |= objects_at({path for path in paths if path not in files and not web.is_web(path) and storage.is_remote(path)})
    for row, path in zip(rows, paths, strict=True):
        if web.is_web(path):  # asked for when it is read
            yield _of(row, File(path), row.key)
            continue
        if (file := files.get(path)) is None:
            file = files[path] = File(path) if storage.is_remote(path) else file_at(path)
        absent = file.size is None and (storage.is_remote(path) or not os.path.lexists(path))
        yield _missing(row, path, f"listed in {listing} but not there") if absent else _of(row, file, row.key)


def _of(row: ListedClip, file: File, key: str, *, cut: bool = True) -> Clip:
    """A listed clip that is there. `cut`: its file is the video that it is a part of, where the list says so."""
    start, end = row.cut if cut and row.cut is not None else (None, None)
    label = row.label if row.label is not None else label_of_place(file.place)
    return Clip(key, file.path, row.split, label, None, None, file.size, file.version, file.offset, start, end)


def _missing(row: ListedClip, path: str, message: str) -> Clip:
    return Clip(row.key, path, row.split, row.label, "missing", message)


def _resolved(parent: str, line: str) -> str:
    """A line of a list of files as a path of its own."""
    if web.is_web(line):
        return web.check(line)
    if storage.is_remote(line):
        return normal(line)
    if not storage.is_remote(parent):
        return os.path.join(parent, line)
    return line if line.startswith("/") else normal(f"{parent}/{line}")


def _listed_ids(listing: str, folder: str, config: DiscoverConfig) -> Iterator[Clip]:
    """Clips of a list, found in a folder by their names, or by their places in it where the list has those."""
    rows = read_listing(listing, split=config.split)
    here = Folder(
        videos_in(folder, config.unpack, salvage=config.salvage), folder, places=any(row.path is not None and "/" in row.path for row in rows)
    )
    return _looked_up(rows, here, folder, listing)


def _looked_up(rows: Iterable[ListedClip], here: Folder, folder: str, listing: str) -> Iterator[Clip]:
    """Listed clips where they are, or as missing."""
    message, beginning = f"listed in {listing} but not in {folder}", folder.rstrip("/")
    for row in rows:
        file, cut = here.find(row)
        if file is None:
            yield _missing(row, f"{beginning}/{row.key}.mp4", message)
            continue
        stem = without_ending(file.place.rpartition("/")[2])
        yield _of(row, file, stem if NAMED_BY_START.fullmatch(row.key) and MILLISECONDS_NAME.fullmatch(stem) else row.key, cut=cut)


# --- LRS3 -----------------------------------------------------------------------------------------------------------------------------


def _lrs3(source: str, config: DiscoverConfig) -> Iterator[Clip]:
    """Clips in LRS3's folders, all or those that are listed."""
    if not storage.is_folder(source):
        raise ValueError(
            f"source is {config.source!r}, which is no folder; layout=lrs3 reads pretrain|trainval|test/<speaker>/<utterance>.mp4 in one"
        )
    found: dict[str, tuple[str, str, File]] = {}
    for file in sorted(videos_in(source, config.unpack, salvage=config.salvage)):
        name = lrs3_name(file.place)
        if name is None:
            raise ValueError(
                f"{file.path}: not a place for a clip of LRS3; expected pretrain|trainval|test/<speaker>/<utterance>.mp4, or give layout=any"
            )
        folder, key = name
        found[f"{folder}/{key}"] = folder, key, file
    if config.listing in ("", "none"):
        yield from (Clip(key, file.path, folder, size=file.size, version=file.version, offset=file.offset) for folder, key, file in found.values())
        return
    for listed in read_listing(config.listing, split=config.split):
        place = listed.path or listed.clip_id
        name = lrs3_name(place)
        if name is None:
            raise ValueError(f"{config.listing}: {place!r}; expected pretrain|trainval|test/<speaker>/<utterance>, one a line")
        there = found.get("/".join(name))
        if there is None:
            path = storage.join(source, place)
            yield Clip(name[1], path, listed.split, None, "missing", f"listed in {config.listing} but not in {source}")
        else:
            _, key, file = there
            yield Clip(key, file.path, listed.split, size=file.size, version=file.version, offset=file.offset)


# --- Greatest Hits --------------------------------------------------------------------------------------------------------------------


def _greatest_hits(source: str, config: DiscoverConfig) -> Iterator[Clip]:
    """Parts of Greatest Hits' videos, one for every hit, of all videos or those that are listed; whole videos where `cut_seconds` is 0."""
    if config.cut_seconds < 0:
        raise ValueError(f"cut_seconds is {config.cut_seconds}; expected the length of a part, or 0 for whole videos")
    if not storage.is_folder(source):
        raise ValueError(
            f"source is {config.source!r}, which is no folder; layout=greatest_hits reads <video>_denoised.mp4 and <video>_times.txt in one"
        )
    files = list(videos_in(source, config.unpack, salvage=config.salvage))
    stems = sorted(without_ending(file.place.rpartition("/")[2]) for file in files)
    listing = config.listing or (source if any(split_of(name) for name in storage.names(source)) else "none")
    if listing == "none":
        whole = [match for match in map(greatest_hits.WHOLE_NAME.fullmatch, stems) if match and match[2] == config.recording]
        rows = [ListedClip(match[1], match[1], None, config.split) for match in whole]
    else:
        rows = read_listing(listing, split=config.split)
    here = Folder(files, source, places=False)
    parts, wanted = _HitParts(here, stems, config), list[ListedClip]()
    for part in (part for row in rows for part in parts.of(row, listing)):
        if config.cut_seconds and part.cut is None and (file := parts.uncut(part)) is not None:
            told = "<video>_times.txt beside it does not say when it is hit; put that there, or take whole videos with cut_seconds=0"
            yield _missing(part, file.path, told)
        else:
            wanted.append(part)
    yield from _looked_up(wanted, here, source, listing)


class _HitParts:
    """Which parts of which videos a list of Greatest Hits stands for."""

    def __init__(self, here: Folder, stems: Sequence[str], config: DiscoverConfig) -> None:
        self._here, self._recording, self._length = here, config.recording, config.cut_seconds
        self._cut_already: defaultdict[str, list[str]] = defaultdict(list)
        for match in filter(None, map(greatest_hits.HIT_NAME.fullmatch, stems)):
            self._cut_already[f"{match[1]}_{match[2]}"].append(match[0])

    def of(self, row: ListedClip, listing: str) -> list[ListedClip]:
        """The rows of a video's parts for a row that names the video; a row that names a part with where that is cut."""
        name = row.clip_id
        if row.cut is not None:
            return [row]
        if (named := greatest_hits.part_of(name)) is not None:
            return [row._replace(path=f"{named.video}_{self._recording}.mp4", cut=(named.start_seconds, named.end_seconds))]
        if (hit := greatest_hits.HIT_NAME.fullmatch(name)) is not None:
            found = [part for part in self._cut(row, hit[1], hit[2]) if part.clip_id == name]
            return found or [row]
        if (video := greatest_hits.WHOLE_NAME.fullmatch(name)) is None:
            raise ValueError(f"{listing}: {name!r} names no video of Greatest Hits; expected such as 2015-02-16-16-49-06, or a part of one")
        return self._cut(row, video[1], video[2] or self._recording)

    def _cut(self, row: ListedClip, video: str, recording: str) -> list[ListedClip]:
        """A row for every hit, by its times; where these are not there, for every part that is; for the video itself if neither is there."""
        whole = f"{video}_{recording}"
        hits = self._hits(video, whole) if self._length else []
        rows = [
            ListedClip(name, name, greatest_hits.label_of(hit.material, hit.action), row.split, None, None, f"{whole}.mp4", cut)
            for hit in hits
            for name, cut in [(greatest_hits.part_name(video, recording, hit.seconds), greatest_hits.around(hit.seconds, self._length))]
        ]
        there = self._cut_already[whole] if self._length else []
        return rows or [ListedClip(name, name, None, row.split) for name in there or [whole]]

    def uncut(self, part: ListedClip) -> File | None:
        """The whole video, where a row stands for that."""
        return self._here.named(part.clip_id) if greatest_hits.WHOLE_NAME.fullmatch(part.clip_id) else None

    def _hits(self, video: str, whole: str) -> list[greatest_hits.Hit]:
        """A video's hits; none where the video or the file that tells them is not there."""
        file = self._here.named(whole)
        path = storage.join(storage.parent(file.path), f"{video}_times.txt") if file is not None else ""
        return greatest_hits.hits(read_text(path), path) if path and storage.is_file(path) else []


# --- duplicates, splits ---------------------------------------------------------------------------------------------------------------


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
    if not config.validation_fraction and not config.test_fraction:
        return clips
    of = {"lrs3": _speaker, "greatest_hits": _video}.get(config.layout, _own_key)
    keys = sorted({of(clip) for clip in clips if clip.split == config.split}, key=lambda key: hashlib.sha256(key.encode()).digest())
    test = round(len(keys) * config.test_fraction)
    validation = round(len(keys) * config.validation_fraction)
    moved = dict.fromkeys(keys[:test], "test") | dict.fromkeys(keys[test : test + validation], "validation")
    return [replace(clip, split=moved[of(clip)]) if clip.split == config.split and of(clip) in moved else clip for clip in clips]


def _own_key(clip: Clip) -> str:
    return clip.key


def _speaker(clip: Clip) -> str:
    return clip.key.rpartition("_")[0]


def _video(clip: Clip) -> str:
    """Of Greatest Hits: no video is in two splits."""
    return clip.key[: match.end(1)] if (match := re.match(f"({greatest_hits.VIDEO_NAME})", clip.key)) else clip.key
