"""What lists and classes a subset is made by say: each clip once, and how far two lists agree on it.

Knows the forms of lists only through `pipeline.lists`. Knows no dataset.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from configs import storage
from pipeline.lists import read_listing, split_of
from pipeline.select import Listing
from pipeline.sync_lists import read_classes

Said = tuple[str | None, str | None, float | None]
"""What a list says of a clip: its split, label and start."""


def read_lists(option: str, paths: Sequence[str], *, name: str = "") -> Listing | None:
    """What the lists name, each clip once; None without a list. They are called `name`, by default as the option has them.

    ValueError for a clip that they put in two splits or let start at two places.
    """
    found: dict[str, Said] = {}
    with _uncollected():
        for path in paths:
            _read_into(found, path)
    if not paths:
        return None
    name = name or f"{option}={paths[0] if len(paths) == 1 else '[' + ','.join(paths) + ']'}"
    if not found:
        raise ValueError(f"{name} names no clips")
    splits, labels, starts = map(list, zip(*found.values(), strict=True))
    if option == "starts" and None in starts:
        example = list(found)[starts.index(None)]
        raise ValueError(f"{name} does not say where {example} starts; expected a csv with the header file,start_sec")
    return Listing(name, list(found), splits, labels, starts)


def _read_into(found: dict[str, Said], path: str) -> None:
    split = split_of(path)
    for row in read_listing(path, split=""):
        # Where a clip is a part of a video, a list's start is the part's, which the clip no longer has.
        now = (row.split or split, row.label, row.start_seconds if row.cut is None else None)
        before = found.setdefault(row.key, now)
        if before != now:
            found[row.key] = _agreed(row.key, before, now, path)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for garbage in cycles, which costs half of the time where many objects are made, and none in cycles."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _agreed(key: str, before: Said, now: Said, path: str) -> Said:
    """What two rows say of a clip, if they do not disagree. The first label stays."""
    for what, one, other in (("of split", before[0], now[0]), ("to start at", before[2], now[2])):
        if one is not None and other is not None and one != other:
            raise ValueError(f"{path} has {key} {what} {other}, after it was listed {what} {one}; expected each clip once")
    return before[0] or now[0], before[1] or now[1], now[2] if before[2] is None else before[2]


def classes_in(text: str) -> list[str]:
    """Classes as an option gives them: names with ';' between, or a file of them."""
    if storage.is_file(text):
        return read_classes(text)
    if text.lower().endswith((".txt", ".csv", ".tsv")):
        raise ValueError(f"classes={text}: no such file; expected one with a class a line, or classes themselves, with ';' between")
    return [name for name in map(str.strip, text.split(";")) if name]
