"""Putting a broken dataset right, where what is left of it proves how it was; and removing what is to be made again.

A file takes its place only when a sha256 proves it; only where every record of that is lost is a ledger made from a tar whose form is right, and then
it is said that nothing proves its bytes. What is good is not touched. Decides by what `shards.check_dataset` found; knows no job and no media.
"""

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from configs import storage
from configs.clock import FRAME_RATE_HZ
from shards import ledger, sealed
from shards.check_dataset import EMPTY_SHA256, Shard, Verified
from shards.check_files import read_ledger
from shards.check_rows import Place, check_columns, check_rows, places
from shards.check_tar import Codes, Found, check_tar, npy_header
from shards.dataset import INFO, info_bytes
from shards.write import TarWriter, discard, write_manifest

COPY_BYTES = 8 << 20
LOST_REASON = "io"
"""Of a clip whose ledger row is lost and that its tar does not hold: `retry_failed=true reasons=io` tries it again."""
LOST_MESSAGE = "the shard's ledger was lost, and with it why this clip failed"
ASIDE = ".repaired"
"""What follows the name of a tar that is kept beside while another has its place."""
ALIKE_DIGITS = 48
"""Two sha256 that have so many of 64 digits in common are one that was damaged: by chance they have four."""


def repair(verified: Verified) -> list[str]:
    """Puts right what can be, and says what it did, a line each. Of a view nothing can be: it is made again in a second."""
    if verified.info is None or verified.info.view is not None:
        return []
    repairs = _Repairs(verified, verified.info.fingerprint)
    return [*repairs.info(), *repairs.exchanged(), *repairs.shards(), *repairs.manifest()]


def redo(verified: Verified) -> None:
    """Removes the broken shards, so that the job that made them makes them again. ValueError where it is not known what this dataset is."""
    if verified.info is None:
        raise ValueError(f"{verified.root}: {INFO} cannot be read, so nothing is removed; put it right first")
    for name in verified.redo:
        discard(verified.root, name)


class _NotProvenError(Exception):
    """What was made is not what was there; nothing takes its place."""


class _Repairs:
    """One dataset's repairs, in the order in which one needs the other."""

    def __init__(self, verified: Verified, fingerprint: str) -> None:
        self._verified, self._root, self._fingerprint = verified, verified.root, fingerprint
        self._misplaced = self._find_misplaced()
        self._broken = [shard for shard in verified.shards.values() if not shard.good]
        self._tables = {shard.name: self._table(shard) for shard in self._broken}
        self._good = {shard.name for shard in verified.shards.values() if shard.ledger}
        """Shards whose ledgers can be believed, in the course of the repair."""

    # what is known of a shard

    def _table(self, shard: Shard) -> pa.Table | None:
        """The rows of a shard, by its ledger, by the manifest, or by a ledger that bears another's name."""
        if shard.ledger:
            return read_ledger(self._root, shard.name, self._fingerprint)[0]
        try:
            rows = self._verified.manifest.rows(shard.name) if self._verified.manifest is not None else None
        except sealed.Damaged:
            rows = None
        table = self._misplaced.get(shard.name) if rows is None else self._as_ledger(rows)
        return None if table is None or any(check_rows(shard.name, table)) else table

    def _as_ledger(self, rows: pa.Table) -> pa.Table:
        """Rows of the manifest, which has columns that a ledger may lack, as the ledger that they came from."""
        return ledger.to_table([{name: value for name, value in row.items() if value is not None} for row in rows.to_pylist()], self._fingerprint)

    def _find_misplaced(self) -> dict[str, pa.Table]:
        """Whole ledgers that bear another shard's name."""
        found = {}
        for shard in self._verified.shards.values():
            if not shard.ledger and f"{shard.name}.parquet" in self._verified.files:
                table, _, is_sealed = read_ledger(self._root, shard.name, self._fingerprint)
                names = table["shard"].unique().to_pylist() if table is not None else []
                if table is not None and is_sealed and len(names) == 1 and names != [shard.name] and not any(check_rows(names[0], table)):
                    found[names[0]] = self._as_ledger(table)
        return found

    # dataset.json

    def info(self) -> Iterator[str]:
        """Writes dataset.json anew where its own hash proves its contents, or its contents its hash."""
        info = self._verified.info
        assert info is not None
        if not any(problem.file == INFO for problem in self._verified.told.problems):
            return
        data = storage.read_bytes(storage.join(self._root, INFO))
        as_written = info_bytes(info)
        kept, proper = json.loads(data).get("sha256"), json.loads(as_written)["sha256"]
        if isinstance(kept, str) and sum(one == other for one, other in zip(kept, proper, strict=False)) >= ALIKE_DIGITS:
            storage.write_bytes(storage.join(self._root, INFO), as_written)
            yield f"{INFO}: written anew; its contents are proven"

    # tars

    def exchanged(self) -> Iterator[str]:
        """Puts tars where they belong that stand under another's name.

        What another shard needs and would be overwritten is kept beside until all are in their places; a repair that was cut off goes on from that.
        """
        sources = self._find_elsewhere()
        aside: dict[str, str] = {}
        for name, source in sources.items():
            if source in map(self._path, sources):
                aside[name] = self._path(name) + ASIDE
                self._put(source, aside[name], self._wanted(self._verified.shards[name]))
        for name, source in sources.items():
            shard = self._verified.shards[name]
            if self._put(aside.get(name, source), self._path(name), self._wanted(shard)):
                shard.sha256, shard.tar = self._wanted(shard), True
                yield f"{name}.tar: its bytes were in {storage.basename(source)}"
        left = {file.removesuffix(f".tar{ASIDE}") for file in self._verified.files if file.endswith(f".tar{ASIDE}")}
        for name in left | aside.keys():
            if name in self._verified.shards and self._verified.shards[name].tar:
                storage.remove(self._path(name) + ASIDE)

    def _find_elsewhere(self) -> dict[str, str]:
        """Broken shards whose tars are under another's name, and where."""
        holders = {shard.sha256: self._path(shard.name) for shard in self._verified.shards.values() if shard.sha256 not in ("", EMPTY_SHA256)}
        found = {}
        for shard in self._broken:
            wanted = self._wanted(shard)
            if not wanted or wanted == shard.sha256:
                continue
            if f"{shard.name}.tar{ASIDE}" in self._verified.files:
                found[shard.name] = self._path(shard.name) + ASIDE
            elif wanted in holders:
                found[shard.name] = holders[wanted]
        return found

    def _put(self, source: str, path: str, wanted: str) -> bool:
        """Copies a file to its place, if it has this sha256."""
        try:
            with storage.writing(path) as file:
                if _copy(source, file) != wanted:
                    raise _NotProvenError
        except _NotProvenError:
            return False
        return True

    def _wanted(self, shard: Shard) -> str:
        """The sha256 that the shard's tar had; empty if nothing tells."""
        table = self._tables.get(shard.name)
        return "" if table is None else table["shard_sha256"][0].as_py() if len(table) else EMPTY_SHA256

    def _path(self, name: str) -> str:
        return storage.join(self._root, f"{name}.tar")

    def _rebuild_tar(self, shard: Shard, table: pa.Table) -> bool:
        """Writes a tar anew from its ledger and the payloads that lie where they should: right, if only what is between these was damaged."""
        found = storage.stat(self._path(shard.name))
        wanted = places(table)
        end = max((place.offset + place.size for place in wanted), default=0)
        if end > (found.size if found is not None else 0):
            return False
        try:
            with storage.writing(self._path(shard.name)) as file:
                tar = TarWriter(file)
                for place in wanted:
                    tar.add(place.name, self._payload(shard.name, place))
                tar.close()
                if tar.sha256 != self._wanted(shard):
                    raise _NotProvenError
        except _NotProvenError:
            return False
        shard.sha256, shard.tar = tar.sha256, True
        return True

    def _payload(self, name: str, place: Place) -> bytes:
        """A member's bytes, an array's header as it must have been."""
        data = storage.read_bytes(self._path(name), place.offset, place.offset + place.size)
        if place.shape is None or place.dtype is None:
            return data
        header = npy_header(place.shape, place.dtype)
        return header + data[len(header) :] if len(header) <= len(data) else data

    # ledgers

    def shards(self) -> Iterator[str]:
        """Tars whose headers or ends are damaged, and ledgers."""
        for shard in self._broken:
            table = self._tables[shard.name]
            if table is not None and shard.sha256 != self._wanted(shard) and self._rebuild_tar(shard, table):
                yield f"{shard.name}.tar: headers, padding and end written anew; the sha256 is as it was"
            if shard.ledger:
                continue
            if table is not None and shard.sha256 == self._wanted(shard):
                ledger.write(ledger.path_of(self._root, shard.name), table)
                self._good.add(shard.name)
                yield f"{shard.name}.parquet: the ledger is made again; its tar is the one that it belongs to"
            elif table is None and shard.tar and (made := self._from_tar(shard)) is not None:
                proof = self._proof(shard)
                ledger.write(ledger.path_of(self._root, shard.name), made)
                self._good.add(shard.name)
                lost = made.filter(pc.field("message") == LOST_MESSAGE).num_rows
                failed = f"; {lost} clips that it does not hold are failed ones ({LOST_REASON})" if lost else ""
                yield f"{shard.name}.parquet: the ledger is made from the tar, {proof}{failed}"

    def _proof(self, shard: Shard) -> str:
        """What is left that proves a tar's bytes. Parquet keeps the smallest and largest text of a column as they are."""
        path = ledger.path_of(self._root, shard.name)
        old = storage.read_bytes(path) if f"{shard.name}.parquet" in self._verified.files else b""
        return (
            "whose sha256 the damaged one still tells"
            if shard.sha256.encode() in old
            else "whose form is right; nothing is left that proves its bytes"
        )

    def _from_tar(self, shard: Shard) -> pa.Table | None:
        """The ledger of a tar, as far as the tar and the plan tell; None where these do not agree."""
        info, found = self._verified.info, storage.stat(self._path(shard.name))
        if info is None or found is None:
            return None
        checked = check_tar(found, None, Codes.of(info.spec))
        groups = _grouped(checked.members)
        planned = self._planned(shard.name)
        if checked.problems or groups is None or not self._known_nowhere(shard.name, list(groups)):
            return None
        rows = _rows_of(shard.name, checked.sha256, groups, planned)
        if rows is None:
            return None
        table = ledger.to_table(rows, self._fingerprint)
        return None if check_columns(table) or any(check_rows(shard.name, table)) else table

    def _planned(self, name: str) -> list[dict[str, Any]] | None:
        try:
            rows = self._verified.plan.rows(name) if self._verified.plan is not None else None
        except sealed.Damaged:
            return None
        return None if rows is None else rows.to_pylist()

    def _known_nowhere(self, name: str, keys: list[str]) -> bool:
        """Whether no other shard has one of these clips, and the plan, if there is one, knows the shard."""
        if self._verified.plan is not None and name not in self._verified.plan.names:
            return False
        others = [shard.name for shard in self._verified.shards.values() if shard.ledger]
        tables = ledger.read_ahead(self._root, others, self._fingerprint)
        mine = set(keys)
        return not any(mine.intersection(table.filter(pc.field("status") == "ok")["key"].to_pylist()) for table in tables)

    # the manifest

    def manifest(self) -> Iterator[str]:
        """Makes the manifest of the ledgers, once all of these are good, unless it alone knows how a shard was."""
        manifest, plan, found = self._verified.manifest, self._verified.plan, ledger.listing(self._root)
        if not any(problem.file == ledger.MANIFEST for problem in self._verified.told.problems) or not found.ledgers.keys() <= self._good:
            return
        to_make = set(plan.names) - found.tars.keys() if plan is not None else set()
        if manifest is not None and not set(manifest.names) <= self._good | to_make:
            return
        totals = write_manifest(self._root)
        yield f"{ledger.MANIFEST}: made of {totals.shards} ledgers"


def _copy(source: str, file: Any) -> str:
    """Copies a file's bytes; their sha256."""
    digest, start = sha256(), 0
    while data := storage.read_bytes(source, start, start + COPY_BYTES):
        file.write(data)
        digest.update(data)
        start += len(data)
    return digest.hexdigest()


def _grouped(members: Sequence[Found]) -> dict[str, list[Found]] | None:
    """Members by clip; None where a clip's do not lie together in the order of their extensions."""
    groups: dict[str, list[Found]] = {}
    last = ""
    for found in members:
        key = found.name.partition(".")[0]
        if key != last and key in groups:
            return None
        groups.setdefault(key, []).append(found)
        last = key
    return groups if all([f.name for f in group] == sorted({f.name for f in group}) for group in groups.values()) else None


def _rows_of(name: str, digest: str, groups: dict[str, list[Found]], planned: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Ledger rows of a tar's clips, with what the plan says of them, and of those that failed; None where the two do not agree."""
    split = name.rpartition("-")[0]
    place = {"split": split, "shard": name, "shard_sha256": digest}
    if planned is None:
        planned = [{"key": key} for key in groups]
    rows, order = [], []
    for clip in planned:
        key = clip["key"]
        if key in groups and clip.get("reason") is None and key not in order:
            order.append(key)
            described = next((found.described for found in groups[key] if found.described is not None), None) or {}
            if described.get("split", split) != split or described.get("key", key) != key:
                return None
            about = {"label": clip.get("label") or described.get("label"), "source": clip.get("source") or f"{name}.tar"}
            row = {"key": key, "status": "ok", "duration_seconds": _seconds(described), **about, **_columns(groups[key])}
        else:
            told = {"reason": clip.get("reason") or LOST_REASON, "message": clip.get("message") or LOST_MESSAGE}
            row = {"key": key, "status": "failed", "label": clip.get("label"), "source": clip["source"], **told}
        rows.append({name: value for name, value in {**row, **place}.items() if value is not None})
    return rows if order == list(groups) else None


def _seconds(described: Any) -> float | None:
    """How long the record says that the clip is: a media clip's in seconds, a feature clip's in frames."""
    seconds, frames = described.get("duration_seconds"), described.get("frames")
    if isinstance(seconds, (int, float)):
        return float(seconds)
    return frames / float(FRAME_RATE_HZ) if isinstance(frames, int) else None


def _columns(members: Sequence[Found]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for found in members:
        extension = found.name.partition(".")[2]
        columns |= {f"{extension}.offset": found.offset, f"{extension}.size": found.size}
        if found.shape is not None:
            columns |= {f"{extension}.shape": list(found.shape), f"{extension}.dtype": found.dtype}
    return columns
