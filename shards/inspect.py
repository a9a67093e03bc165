"""`soundshard inspect`: what a dataset holds, from its ledgers, and one sample of it, from its shard. Reads only; knows no meaning of a member."""

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.load import job_main
from shards import ledger
from shards.dataset import leaves
from shards.read import ArrayMembers, Index

SHOWN_SHARDS = 20


@dataclass(frozen=True)
class InspectConfig:
    """Options of `soundshard inspect`."""

    dataset: str = "???"
    """Folder or object-store prefix of a media or feature dataset."""
    split: str | None = None
    """Only this split."""
    key: str | None = None
    """Show the sample with this key instead: members, shapes, first values; or why it failed."""


def run(config: InspectConfig) -> None:
    """Show what a dataset holds: counts, failures by reason, sizes, spec and provenance; or one sample by its key."""
    index = Index.open(config.dataset, config.split)
    lines = overview(index) if config.key is None else sample(index, config.key)
    print("\n".join(line.rstrip() for line in lines))


def overview(index: Index) -> Iterator[str]:
    """The report on a dataset, line by line."""
    info, rows = index.info, index.table
    found = ledger.listing(index.root)
    sizes = found.tars
    yield f"{info.kind} dataset {index.root}"
    yield f"fingerprint {info.fingerprint}, schema version {info.schema_version}"
    yield from ("", "splits", *_table("lrrrrr", _splits(rows, sizes)))
    if index.failed:
        yield from ("", "failures", *_table("lrl", _failures(rows)))
    yield from ("", "members of the good clips", *_table("lrrrl", _members(index)))
    shards = _shards(rows, sizes)
    yield from ("", "shards", *_table("lrrrl", shards[: SHOWN_SHARDS + 1]))
    if len(shards) > SHOWN_SHARDS + 1:
        yield f"  ... and {len(shards) - SHOWN_SHARDS - 1} more"
    unfinished = sorted(sizes.keys() - found.ledgers.keys())
    if unfinished:
        yield f"  without a ledger, so not finished: {', '.join(unfinished)}; the job writes them again when it is run again"
    for title, values in (("spec", info.spec), ("provenance", info.provenance)):
        facts = [(name, json.dumps(value, ensure_ascii=False)) for name, value in leaves(values)] if values else [("(empty)", "")]
        yield from ("", title, *_table("ll", facts))


def sample(index: Index, key: str) -> Iterator[str]:
    """The report on one key, line by line: every ledger row with that key, and the members of the good one."""
    found = index.table.filter(pc.field("key") == key).to_pylist()
    if not found:
        index.row(key)  # which says that there is none
    for row in found:
        facts = ("key", "status", "reason", "message", "split", "label", "source", "duration_seconds", "shard", "shard_sha256")
        yield from _table("ll", [(name, str(row[name])) for name in facts if row[name] is not None])
        if row["status"] == "ok":
            number = index.row(key)
            yield from ("", "members", *_table("lrrll", _sample_members(index, number)))
            if row.get("json.offset") is not None:
                described = json.dumps(json.loads(index.bytes(number, "json")), indent=2, ensure_ascii=False)
                yield from ("", "json", textwrap.indent(described, "  "))
        yield ""


def _splits(rows: pa.Table, sizes: dict[str, int]) -> list[tuple]:
    """ok, failed, hours of good clips, size of the tars and of a good clip, by split and in total."""
    lines: list[tuple] = [("", "ok", "failed", "hours", "tars", "per clip")]
    splits = sorted(rows["split"].unique().to_pylist())
    parts = [(split, rows.filter(pc.field("split") == split)) for split in splits]
    for name, part in [*parts, *([("all", rows)] if len(splits) != 1 else [])]:
        good = part.filter(pc.field("status") == "ok")
        size = sum(sizes.get(shard, 0) for shard in part["shard"].unique().to_pylist())
        hours = sum(seconds or 0 for seconds in good["duration_seconds"].to_pylist()) / 3600
        each = _size(size / good.num_rows) if good.num_rows else "-"
        lines.append((name, good.num_rows, part.num_rows - good.num_rows, f"{hours:.3f}", _size(size), each))
    return lines


def _failures(rows: pa.Table) -> list[tuple]:
    """Failed clips by reason, most frequent first, with the first one's source and message."""
    failed = rows.filter(pc.field("status") == "failed").select(["reason", "source", "message"]).to_pylist()
    first = {row["reason"]: row for row in reversed(failed)}
    counts = sorted(Counter(row["reason"] for row in failed).items(), key=lambda item: (-item[1], item[0]))
    examples = {reason: f"{row['source']}: {row['message'] or '(no message)'}" for reason, row in first.items()}
    return [("reason", "clips", "for example"), *((reason, count, textwrap.shorten(examples[reason], 150)) for reason, count in counts)]


def _members(index: Index) -> list[tuple]:
    lines: list[tuple] = [("extension", "clips", "size", "per clip", "arrays")]
    for extension, members in index.members.items():
        present = members.offset >= 0
        if present.any():
            size = int(members.size[present].sum())
            arrays = _shape_range(members.shape[present], members.dtype) if isinstance(members, ArrayMembers) else ""
            lines.append((extension, int(present.sum()), _size(size), _size(size / present.sum()), arrays))
    return lines


def _shape_range(shapes: np.ndarray, dtype: np.dtype) -> str:
    bounds = zip(shapes.min(axis=0).tolist(), shapes.max(axis=0).tolist(), strict=True)
    return f"{dtype.name} [{', '.join(str(low) if low == high else f'{low} to {high}' for low, high in bounds)}]"


def _shards(rows: pa.Table, sizes: dict[str, int]) -> list[tuple]:
    found: dict[str, Counter] = {}
    digests: dict[str, str] = {}
    for row in rows.select(["shard", "status", "shard_sha256"]).to_pylist():
        found.setdefault(row["shard"], Counter())[row["status"]] += 1
        digests[row["shard"]] = row["shard_sha256"]
    lines = [(name, count["ok"], count["failed"], _size(sizes[name]) if name in sizes else "no tar", digests[name]) for name, count in found.items()]
    return [("", "ok", "failed", "tar", "sha256"), *lines]


def _sample_members(index: Index, row: int) -> list[tuple]:
    lines: list[tuple] = [("extension", "offset", "bytes", "array", "first values")]
    for extension, members in index.members.items():
        if members.offset[row] < 0:
            continue
        kind = values = ""
        if isinstance(members, ArrayMembers):
            array = index.member(row, extension)
            kind, values = f"{array.dtype.name} {list(array.shape)}", " ".join(f"{value:.5g}" for value in array.flat[:6])
        lines.append((extension, int(members.offset[row]), int(members.size[row]), kind, values))
    return lines


def _size(count: int | float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _table(alignment: str, rows: Sequence[tuple]) -> Iterator[str]:
    """Rows as aligned text; `alignment` has an l or r per column."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        aligned = zip(row, widths, alignment, strict=True)
        yield "  " + "  ".join(cell.ljust(width) if side == "l" else cell.rjust(width) for cell, width, side in aligned)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m shards.inspect`."""
    return job_main(InspectConfig, run, argv, command="inspect", positional="dataset")


if __name__ == "__main__":
    sys.exit(main())
