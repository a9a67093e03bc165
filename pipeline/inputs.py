"""Where inputs lie: the videos of a folder, a prefix, or tars in either, with size and version; and objects that a list names, looked for together.

Knows names, files and listings: no list's form, no clips. No video is opened.
"""

import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from configs import storage
from pipeline import greatest_hits, tars
from pipeline import unpack as unpacking
from pipeline.lists import VIDEO_SUFFIXES, ListedClip, clip_ids, name_of, without_ending

LISTED_ALWAYS = 1000
LISTED_PER_WANTED = 100
"""Objects that may be listed for one whose size is wanted: a page of 1000 costs about what asking for one object does."""
ASKING_THREADS = 32


class File(NamedTuple):
    """An input where it lies."""

    path: str
    """Of a member of a tar: `PATH.tar::MEMBER`."""
    size: int | None = None
    """Bytes; None where there is a name but no file behind it, such as a dangling link."""
    version: str | None = None
    offset: int | None = None
    """Byte at which a member of a tar begins."""

    @property
    def place(self) -> str:
        """Its path as far as that says what it is called: in a tar, the member's."""
        return self.path if self.offset is None else tars.tar_of(self.path)[1]


def videos_in(folder: str, unpack: str, *, salvage: bool = False) -> Iterator[File]:
    """Videos under a folder or prefix, but for those behind a name that begins with a dot, and those in its tars; or those in one tar.

    `salvage` takes of damaged tars what can be read.
    """
    found_tars: list[str] = []
    if tars.is_tar(folder) and storage.is_file(folder):
        found_tars.append(folder)
    elif storage.is_remote(folder):
        for found in storage.scan(folder):
            if found.path.lower().endswith((*VIDEO_SUFFIXES, *tars.TAR_SUFFIXES)) and "/." not in found.path[len(folder) :]:
                if tars.is_tar(found.path):
                    found_tars.append(found.path)
                else:
                    yield File(found.path, found.size, found.version)
    else:
        yield from _local_videos(folder, found_tars)
    yield from _tarred(sorted(found_tars), folder, unpack, salvage=salvage)


def _tarred(paths: Sequence[str], folder: str, unpack: str, *, salvage: bool = False) -> Iterator[File]:
    """The videos in tars, which are unpacked first where they are compressed."""
    packed = unpacking.compressed(paths)
    if packed and not unpack:
        raise ValueError(
            f"{len(packed)} tars in {folder} are compressed, such as {packed[0]}, and a video in one cannot be reached without unpacking all before "
            "it; unpack=FOLDER writes the plain tars there, once, and unpack=none passes over them"
        )
    if packed:
        # What is unpacked may lie in the folder itself, where the next run finds it.
        plain = set(paths).difference(packed)
        paths = sorted(plain.union([] if unpack == "none" else unpacking.unpacked(packed, storage.absolute(unpack), salvage=salvage)))
    for tar, members in tars.listed(paths, salvage=salvage) if paths else ():
        for video in members:
            yield File(tars.source_of(tar.path, video.member), video.size, tar.version, video.offset)


def _local_videos(folder: str, found_tars: list[str]) -> Iterator[File]:
    """A folder that cannot be listed is an error: its clips must not go missing without a word. Links to folders are not followed.
    Tars are noted."""
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
                    elif tars.is_tar(entry.name) and entry.is_file():
                        found_tars.append(entry.path)
        except OSError as error:
            raise ValueError(f"cannot list {error.filename}: {error.strerror}") from error


def file_at(path: str) -> File:
    """A file's size and version, if there is more than a name."""
    if not storage.is_remote(path):
        return _local_file(path)
    found = storage.stat(path)
    return File(path, found.size, found.version) if found else File(path)


def _local_file(path: str) -> File:
    try:
        status = os.stat(path)
    except OSError:
        return File(path)
    return File(path, status.st_size, f"mtime:{status.st_mtime_ns}")


def members_at(sources: Iterable[str]) -> dict[str, File]:
    """Those of `PATH.tar::MEMBER` that are there."""
    there = [path for path in sorted({tars.tar_of(source)[0] for source in sources}) if storage.is_file(path)]
    return {file.path: file for file in _tarred(there, "the list", "")} if there else {}


def normal(url: str) -> str:
    """An address without `.`, `..` and empty parts, as listings have it."""
    scheme, _, path = url.partition("://")
    return f"{scheme}://{posixpath.normpath(path)}"


def objects_at(wanted: Collection[str]) -> dict[str, File]:
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
            found[entry.path] = File(entry.path, entry.size, entry.version)
        if number >= LISTED_ALWAYS + LISTED_PER_WANTED * len(wanted):
            break
    else:
        return found
    with ThreadPoolExecutor(ASKING_THREADS) as pool:
        return found | {file.path: file for file in pool.map(file_at, [path for path in wanted if path not in found]) if file.size is not None}


class Folder:
    """A folder's videos by their names and places; of several for one name, the first in sorted order."""

    def __init__(self, files: Iterable[File], folder: str, *, places: bool) -> None:
        self._names: dict[str, File] = {}
        self._places: dict[str, File] = {}
        for file in sorted(files, key=lambda file: file.path, reverse=True):
            place = file.place
            for name in clip_ids(name_of(place)):
                self._names[name] = file
            if places:
                self._places[without_ending(place.removeprefix(f"{folder}/"))] = file

    def find(self, row: ListedClip) -> tuple[File | None, bool]:
        """The file of a listed clip, and whether the clip is still to be cut from it: Greatest Hits' parts may be there under their own names."""
        if row.cut is not None and greatest_hits.HIT_NAME.fullmatch(row.clip_id) and (part := self.named(row.clip_id)) is not None:
            return part, False
        return self.named(row.clip_id) if row.path is None else self.placed(row.path), True

    def named(self, name: str) -> File | None:
        """The file for a name, whichever of its forms the file has."""
        return self._names.get(name) or next((self._names[other] for other in clip_ids(name) if other in self._names), None)

    def placed(self, path: str) -> File | None:
        """The file at a path in the folder, else the one of its name."""
        return self._places.get(without_ending(posixpath.normpath(path))) or self.named(name_of(path))
