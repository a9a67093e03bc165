"""Which clips there are: a folder, a list of files or VGGSound's csv becomes one row per input, with its key, split and label.

Rows are decided from names alone: no video is opened, so 200,000 clips take seconds. This module knows no media, no dataset and no Ray.
"""

import csv
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
KEY_BYTES = 80
"""Longest key in UTF-8: with the longest member name after it, it fits the 100 bytes of a ustar header."""
VGGSOUND_SECONDS = 10
YOUTUBE_ID = r"([\w-]{11})"


@dataclass(frozen=True)
class Clip:
    """One input: where it is and what it is called, or why it has already failed."""

    key: str
    source: str
    split: str
    label: str | None = None
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class DiscoverConfig:
    """Where the clips come from and how they are split."""

    source: str = "???"
    """Clips: a folder (searched recursively for mp4, webm, mkv, mov and avi; names that begin with a dot are passed over), one video file, or a
    text file that lists video files, one a line, relative to itself."""
    listing: str = ""
    """For a folder: which of its clips to take. VGGSound's csv (`youtube id,start second,label,split`) or a text file of clip ids, one a line; files
    are called `<youtube id>_<start ms>_<end ms>` or `<youtube id>_<start second in six digits>`. Empty takes the folder's own vggsound.csv if it
    has one, else every video; `none` takes every video."""
    split: str = "train"
    """Split of clips for which no csv says it."""
    validation_fraction: float = 0.0
    """Part of the clips of `split` that becomes the split `validation`: those whose keys have the next smallest hashes after the test clips'."""
    test_fraction: float = 0.0
    """Part of the clips of `split` that becomes the split `test`: those whose keys have the smallest hashes."""


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


def key_of(stem: str) -> str:
    """A clip's key from its file's stem.

    Letters of any script, digits, '_' and '-' stay; anything else becomes '_', above all dots, at which webdataset splits. A key longer than
    80 bytes is cut and gets a hash of the whole stem.
    """
    key = re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", stem))
    if len(key.encode()) > KEY_BYTES:
        digest = hashlib.sha256(stem.encode(errors="surrogateescape")).hexdigest()[:12]
        key = key.encode()[: KEY_BYTES - 13].decode(errors="ignore") + "-" + digest
    return key


def _found(config: DiscoverConfig) -> Iterator[Clip]:
    """Every input, in any order, with duplicates."""
    source = Path(config.source)
    if source.is_dir():
        listing = source / "vggsound.csv" if not config.listing else Path(config.listing)
        if config.listing == "none" or (not config.listing and not listing.is_file()):
            return (_clip(path, config.split) for path in _videos(source))
        return _listed_ids(listing, source, config.split)
    if not source.is_file():
        raise ValueError(f"source is {config.source!r}, which is no file and no folder; give a folder of videos, a video or a list of videos")
    if config.listing and config.listing != "none":
        raise ValueError(f"listing is {config.listing!r}, but source is the file {config.source!r}; expected a folder with the listed clips")
    if source.suffix.lower() in VIDEO_SUFFIXES:
        return iter([_clip(str(source), config.split)])
    return _listed_files(source, config.split)


def _clip(path: str, split: str) -> Clip:
    return Clip(key_of(Path(path).stem), path, split)


def _videos(folder: Path) -> Iterator[str]:
    """Video files under a folder. A folder that cannot be listed is an error: its clips must not go missing without a word."""

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot list {error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def _listed_files(listing: Path, split: str) -> Iterator[Clip]:
    """Clips of a text file of paths."""
    for line in _lines(listing):
        clip = _clip(str(listing.parent / line), split)
        yield clip if os.path.lexists(clip.source) else replace(clip, reason="missing", message=f"listed in {listing} but not there")


def _listed_ids(listing: Path, folder: Path, split: str) -> Iterator[Clip]:
    """Clips of VGGSound's csv or of a text file of clip ids, found in a folder by their names."""
    if not listing.is_file():
        raise ValueError(f"listing is {str(listing)!r}, which is no file; expected VGGSound's csv or a text file of clip ids")
    rows = _csv_rows(listing, split) if listing.suffix.lower() == ".csv" else ((line, line, None, split) for line in _lines(listing))
    found: dict[str, str] = {}
    for path in sorted(_videos(folder), reverse=True):  # of files for the same clip, the first in sorted order stays
        found |= dict.fromkeys(_ids(Path(path).stem), path)
    for clip_id, default_key, label, row_split in rows:
        path = found.get(clip_id) or next((found[other] for other in _ids(clip_id) if other in found), None)
        if path is None:
            key = key_of(default_key)
            yield Clip(key, str(folder / f"{default_key}.mp4"), row_split, label, "missing", f"listed in {listing} but not in {folder}")
        else:
            stem = Path(path).stem
            yield Clip(key_of(stem if re.fullmatch(YOUTUBE_ID + r"_\d+_\d+", stem) else default_key), path, row_split, label)


def _ids(stem: str) -> list[str]:
    """Names under which a file can be listed: its stem, and its youtube id with the start in milliseconds."""
    if match := re.fullmatch(YOUTUBE_ID + r"_(\d+)_\d+", stem):
        return [stem, f"{match[1]}_{int(match[2])}"]
    if match := re.fullmatch(YOUTUBE_ID + r"_(\d{6})", stem):
        return [stem, f"{match[1]}_{int(match[2]) * 1000}"]
    return [stem]


def _csv_rows(path: Path, split: str) -> Iterator[tuple[str, str, str | None, str]]:
    """VGGSound's rows: youtube id with start, key, label, split. A first row whose second column is no number is a header."""
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            if len(row) not in (3, 4) or not row[1].strip().isdigit():
                if number == 1 and len(row) in (3, 4):
                    continue
                raise ValueError(f"{path}, line {number}: {row!r}; expected `youtube id,start second,label,split`")
            start_ms = int(row[1]) * 1000
            row_split = row[3].strip() if len(row) == 4 else split
            yield f"{row[0]}_{start_ms}", f"{row[0]}_{start_ms}_{start_ms + VGGSOUND_SECONDS * 1000}", row[2].strip() or None, row_split


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file (byte {error.start} is not UTF-8); expected one video or clip id a line") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _without_duplicates(clips: Iterable[Clip]) -> list[Clip]:
    """The first file of a key, in sorted order, keeps it; the others are failed rows."""
    winners: dict[str, Clip] = {}
    rows = []
    for clip in sorted(clips, key=lambda clip: (clip.key, clip.reason is not None, clip.source, clip.split)):
        winner = winners.setdefault(clip.key, clip)
        rows.append(clip if clip is winner else replace(clip, reason="duplicate_key", message=f"{winner.source} has this key already"))
    return rows


def _split(clips: list[Clip], config: DiscoverConfig) -> list[Clip]:
    """Move the wanted fractions of the clips of `config.split` to validation and test, by the rank of a hash of their keys."""
    if min(config.validation_fraction, config.test_fraction) < 0 or config.validation_fraction + config.test_fraction > 1:
        given = f"validation_fraction is {config.validation_fraction} and test_fraction {config.test_fraction}"
        raise ValueError(f"{given}; expected parts of 1 that add up to at most 1")
    keys = sorted({clip.key for clip in clips if clip.split == config.split}, key=lambda key: hashlib.sha256(key.encode()).digest())
    test = round(len(keys) * config.test_fraction)
    validation = round(len(keys) * config.validation_fraction)
    moved = dict.fromkeys(keys[:test], "test") | dict.fromkeys(keys[test : test + validation], "validation")
    return [replace(clip, split=moved.get(clip.key, clip.split)) if clip.split == config.split else clip for clip in clips]
