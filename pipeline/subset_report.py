"""What a choice of clips is told as: what every criterion leaves, and what lists name that a dataset lacks, as text and as `missing.csv`.

Knows rows and counts. Does not know how they were chosen.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from configs import storage
from pipeline.select import Listing, Names, is_good
from shards.facts import member_bytes
from shards.inspect import size_text

SHOWN = 3
"""Examples of what is not there."""
SHOWN_LETTERS = 64
"""Of a criterion's name in the table."""
LACKING = "missing.csv"
"""In a view: what its lists name and the dataset lacks, and why."""


@dataclass(frozen=True)
class Step:
    """What is left after a criterion."""

    name: str
    clips: Mapping[str, int]
    """Good clips by split."""
    failed: int
    """Failed rows, missing ones included."""
    seconds: float
    bytes: int

    @property
    def total(self) -> int:
        """Good clips of all splits."""
        return sum(self.clips.values())


@dataclass(frozen=True)
class Presence:
    """How much of what lists name is there."""

    name: str
    listed: Mapping[str, int]
    """Clips that are named, by split; those whose list says none are under the split that they have, or would have."""
    present: Mapping[str, int]
    """Of these, those that are there and good."""
    lacking: list[dict[str, str]]
    """The others: key, split, list, why, reason, message."""


@dataclass(frozen=True)
class Chosen:
    """A selection, before it is written."""

    table: pa.Table
    """Ledger rows: splits and labels as in the view, with failed rows for what is missing."""
    steps: list[Step]
    presences: list[Presence]
    notes: list[str]


def presence_of(listing: Listing, table: pa.Table, names: Names, found: Int64[np.ndarray, " listed"]) -> Presence:
    """How much of a list is there, in a table that has a row for all of it: `found` are its clips among the table's names."""
    good = is_good(table)
    rows = names.rows_of(found, good)
    splits = table["split"].take(pa.array(rows)).to_pylist()
    there = good[rows]
    lacking = table.take(pa.array(rows[~there])).select(["split", "reason", "message"]).to_pylist()
    return Presence(
        listing.name,
        Counter(splits),
        Counter(split for split, is_there in zip(splits, there.tolist(), strict=True) if is_there),
        [
            {
                "key": listing.keys[number],
                "split": row["split"],
                "list": listing.name,
                "why": "not in the dataset" if row["reason"] == "missing" else "failed there",
                "reason": row["reason"],
                "message": row["message"] or "",
            }
            for number, row in zip(np.flatnonzero(~there).tolist(), lacking, strict=True)
        ],
    )


class Tally:
    """Counts, hours and bytes of rows of a table; splits are handed in, for lists change them."""

    def __init__(self, table: pa.Table) -> None:
        self._good = is_good(table)
        self._seconds = table["duration_seconds"].fill_null(0.0).to_numpy()
        self._bytes = member_bytes(table)

    def step(self, name: str, splits: pa.ChunkedArray, kept: Bool[np.ndarray, " rows"]) -> Step:
        """What these rows are."""
        good = kept & self._good
        counts = {count["values"]: count["counts"] for count in splits.filter(pa.array(good)).value_counts().to_pylist()}
        return Step(name, counts, int(kept.sum() - good.sum()), float(self._seconds[good].sum()), int(self._bytes[good].sum()))


def report(chosen: Chosen, published: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """The choice for a reader: every criterion with what it leaves, and what lists name that is not there. `published` says how many clips the splits
    of some lists should have, by the lists' name."""
    splits = sorted({split for step in chosen.steps for split in step.clips}, key=_order)
    rows: list[Sequence[str]] = [("", "clips", *(splits if len(splits) > 1 else ()), "failed", "hours", "size")]
    for step in chosen.steps:
        by_split = [f"{step.clips.get(split, 0):,}" for split in splits] if len(splits) > 1 else []
        name = step.name if len(step.name) <= SHOWN_LETTERS else f"{step.name[: SHOWN_LETTERS - 3]}..."
        rows.append((name, f"{step.total:,}", *by_split, f"{step.failed:,}", _hours(step), size_text(step.bytes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) if number == 0 else cell.rjust(width) for number, (cell, width) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()
    for presence in chosen.presences:
        yield from _told(presence, published.get(presence.name, {}))
    yield from chosen.notes


def _told(presence: Presence, published: Mapping[str, int]) -> Iterator[str]:
    """N of M, by split, and what is not there."""
    listed = presence.listed
    parts = ", ".join(f"{split} {presence.present.get(split, 0):,} of {listed[split]:,}" for split in sorted(listed, key=_order))
    lacking = presence.lacking
    total = sum(listed.values())
    yield f"{presence.name}: {total - len(lacking):,} of {total:,} listed clips are there, {len(lacking):,} missing ({parts})"
    if published and dict(listed) != dict(published):
        yield f"  published are {', '.join(f'{split} {count:,}' for split, count in published.items())}"
    if lacking:
        reasons = Counter(row["reason"] for row in lacking if row["why"] == "failed there")
        failed = (
            f", {reasons.total():,} failed there ({', '.join(f'{reason} {count:,}' for reason, count in sorted(reasons.items()))})" if reasons else ""
        )
        examples = ", ".join(row["key"] for row in lacking[:SHOWN]) + (", ..." if len(lacking) > SHOWN else "")
        yield f"  not in the dataset {len(lacking) - reasons.total():,}{failed}: {examples}; all are in {LACKING}"


def _order(split: str) -> tuple[int, str]:
    """Splits as they are named together."""
    usual = ("train", "validation", "test")
    return usual.index(split) if split in usual else len(usual), split


def _hours(step: Step) -> str:
    hours = step.seconds / 3600
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.3f}"


def summed(step: Step) -> str:
    return f"{step.total:,} clips, {_hours(step)} hours, {size_text(step.bytes)}"


def write_lacking(out: str, presences: Sequence[Presence]) -> None:
    """`missing.csv` beside the view: none where no list was given."""
    path = storage.join(out, LACKING)
    if not presences:
        if storage.is_file(path):
            storage.remove(path)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, ["key", "split", "list", "why", "reason", "message"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for presence in presences for row in presence.lacking)
    storage.write_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"))
