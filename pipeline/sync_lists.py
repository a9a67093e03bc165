"""Lists that say which clips Synchformer is evaluated on, and by how much their sound is shifted where: as published, by their headers.

Fixed offsets (`path,offset_sec,vstart_sec`), the clean list of VGGSound-Sparse with and without offsets, its classes; and whatever else
`pipeline.lists` reads, which leaves the offsets open. Knows no dataset, no media and no network.
"""

from dataclasses import dataclass

from configs import storage
from pipeline.lists import by_name, lines_of, lrs3_name, present, read_listing, read_text

__all__ = ["Listed", "by_name", "fixed_offsets", "present", "read_classes", "read_list"]

CLASSES = {"class", "is_sparse"}


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
    sync and not missing, as published. Other files are what `listing` of `soundshard prepare` is: any list of clips. Raises ValueError for a file
    that is none of them, or has a row that cannot be read.
    """
    if not storage.is_file(path):
        raise ValueError(f"{path}: no such file; expected a list of clips")
    rows = read_listing(path)
    if not rows:
        raise ValueError(f"{path} lists no clips that are in sync")
    found = []
    for row in rows:
        if row.start_seconds is not None and row.offset_seconds is None:
            raise ValueError(
                f"{path} says where clips begin, and no offsets; expected path, offset_sec and vstart_sec, or a list without any of them"
            )
        # A place in LRS3's folders, also one of other names than the published.
        place = lrs3_name(row.path) if row.path is not None else None
        found.append(Listed(place[1] if place is not None else row.key, row.start_seconds, row.offset_seconds))
    return list(dict.fromkeys(found))


def read_classes(path: str) -> list[str]:
    """The classes that a list of classes (`class` and `is_sparse` with y or n, separated by tabs) marks, or those of a text file, one a line."""
    if not storage.is_file(path):
        raise ValueError(f"{path}: no such file; expected a list of classes")
    lines = lines_of(read_text(path))
    names = [name.strip() for name in lines[0].split("\t")] if lines else []
    if not set(names) >= CLASSES:
        found = lines
    else:
        rows = [[cell.strip() for cell in line.split("\t")] for line in lines[1:]]
        name, mark = names.index("class"), names.index("is_sparse")
        for number, row in enumerate(rows, 2):
            if len(row) != len(names):
                raise ValueError(f"{path}, line {number}: {row!r}; expected {', '.join(names)}")
        found = [row[name] for row in rows if row[mark] == "y"]
    if not found:
        raise ValueError(f"{path} marks no classes; expected columns class and is_sparse (y or n), separated by tabs, or classes, one a line")
    return found


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
