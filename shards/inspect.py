"""What a dataset or view holds, as text: from its ledgers, and one sample of it, from its shard. Reads only; knows no meaning of a member."""

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from configs.load import job_main
from shards import facts, ledger
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
    """Show what a dataset or view holds: counts, failures by reason, sizes, scores, spec and provenance; or one sample by its key."""
    index = Index.open(config.dataset, config.split)
    lines = overview(index) if config.key is None else sample(index, config.key)
    print("\n".join(line.rstrip() for line in lines))


def overview(index: Index) -> Iterator[str]:
    """The report on a dataset, line by line."""
    info, found = index.info, ledger.listing(index.root)
    if index.view is None:
        yield f"{info.kind} dataset {index.root}"
    else:
        yield f"view {index.view} of the {info.kind} dataset {index.root}"
    yield f"fingerprint {info.fingerprint}, schema version {info.schema_version}"
    if info.view is not None:
        yield from ("", "selection", *(f"  {line}" for line in info.view["selection"]))
    yield from ("", "splits", *_table("lrrrrr", _splits(index, found)))
    if index.failed:
        yield from ("", "failures", *_table("lrl", _failures(index)))
    yield from ("", "members of the good clips", *_table("lrrrl", _members(index)))
    scores = facts.scores(index)
    if scores is not None:
        yield from ("", "scores of the good clips", *_table("lrrrr", _scores(scores)))
        for name, clips, message in scores.errors:
            yield f"  {name} failed on {clips} clips, for example: {textwrap.shorten(message, 120)}"
    shards = _shards(index, found)
    yield from ("", "shards", *_table("lrrrl", shards[: SHOWN_SHARDS + 1]))
    if len(shards) > SHOWN_SHARDS + 1:
        yield f"  ... and {len(shards) - SHOWN_SHARDS - 1} more"
    unfinished = sorted(found.tars.keys() - found.ledgers.keys())
    if unfinished:
        yield f"  without a ledger, so not finished: {', '.join(unfinished)}; the job writes them again when it is run again"
    for title, values in (("spec", info.spec), ("provenance", info.provenance)):
        lines = [(name, json.dumps(value, ensure_ascii=False)) for name, value in leaves(values)] if values else [("(empty)", "")]
        yield from ("", title, *_table("ll", lines))


def sample(index: Index, key: str) -> Iterator[str]:
    """The report on one key, line by line: every ledger row with that key, and the members of the good one."""
    found = index.table.filter(pc.field("key") == key).to_pylist()
    if not found:
        index.row(key)  # which says that there is none
    for row in found:
        named = ("key", "status", "reason", "message", "split", "label", "source", "duration_seconds", "shard", "shard_sha256")
        yield from _table("ll", [(name, str(row[name])) for name in named if row[name] is not None])
        if row["status"] == "ok":
            number = index.row(key)
            yield from ("", "members", *_table("lrrll", _sample_members(index, number)))
            if row.get("json.offset") is not None:
                described = json.dumps(json.loads(index.bytes(number, "json")), indent=2, ensure_ascii=False)
                yield from ("", "json", textwrap.indent(described, "  "))
        yield ""


def _splits(index: Index, found: ledger.Listing) -> list[tuple]:
    """ok, failed, hours of good clips, size of the tars (of a view's clips) and of a good clip, by split and in total."""
    lines: list[tuple] = [("", "ok", "failed", "hours", "tars" if index.view is None else "members", "per clip")]
    for split in facts.splits(index, found):
        each = size_text(split.bytes / split.ok) if split.ok else "-"
        lines.append((split.name, split.ok, split.failed, f"{split.seconds / 3600:.3f}", size_text(split.bytes), each))
    return lines


def _failures(index: Index) -> list[tuple]:
    """Failed clips by reason, most frequent first, with the first one's source and message."""
    lines: list[tuple] = [("reason", "clips", "for example")]
    for failure in facts.failures(index):
        source, message = failure.examples[0]
        lines.append((failure.reason, failure.clips, textwrap.shorten(f"{source}: {message or '(no message)'}", 150)))
    return lines


def _members(index: Index) -> list[tuple]:
    lines: list[tuple] = [("extension", "clips", "size", "per clip", "arrays")]
    for member in facts.members(index):
        lines.append((member.extension, member.clips, size_text(member.bytes), size_text(member.bytes / member.clips), array_text(member)))
    return lines


def array_text(member: facts.MemberFacts) -> str:
    """`float16 [1, 3 to 4, 8, 768]`; nothing for what is no array."""
    bounds = zip(member.least, member.most, strict=True)
    return f"{member.dtype} [{', '.join(str(low) if low == high else f'{low} to {high}' for low, high in bounds)}]" if member.dtype else ""


def _scores(scores: facts.Scores) -> list[tuple]:
    lines: list[tuple] = [("", "clips", "least", "median", "most")]
    for score in scores.columns:
        known = score.known
        if score.is_flag and len(known):
            lines.append((score.name, len(known), "", f"{known.mean():.1%} true", ""))
        else:
            quantiles = np.quantile(known, (0, 0.5, 1)).tolist() if len(known) else []
            lines.append((score.name, len(known), *map(score_text, quantiles), *("-",) * (3 - len(quantiles))))
    return lines


def score_text(value: float) -> str:
    """Four digits; large numbers whole, without an exponent."""
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _shards(index: Index, found: ledger.Listing) -> list[tuple]:
    lines: list[tuple] = [("", "ok", "failed", "tar", "sha256")]
    for shard in facts.shards(index, found):
        lines.append((shard.name, shard.ok, shard.failed, "no tar" if shard.tar_bytes is None else size_text(shard.tar_bytes), shard.sha256))
    return lines


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


def size_text(count: int | float) -> str:
    """Bytes in decimal units, three digits of them."""
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
