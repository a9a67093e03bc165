"""Whether a dataset is as it was written: its files by themselves, all of them against each other, and every byte of its shards.

Knows what belongs to a dataset and what must agree. Changes nothing (that is `shards.repair`) and prints nothing (`shards.verify`).
"""

import re
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from tarfile import RECORDSIZE
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from configs import storage
from shards import ledger, sealed
from shards.check_files import MOST, OLD, ByShard, Told, check_info, read_by_shard, read_file, read_ledger, read_plan
from shards.check_rows import Problem, check_columns, first, places, plain, tar_size
from shards.check_tar import Codes, check_records, check_tar
from shards.dataset import INFO, DatasetInfo
from shards.ledger import Listing
from shards.read import parent_of
from shards.write import PLAN

LEDGERS_AHEAD = 32
EMPTY_SHA256 = sha256(bytes(RECORDSIZE)).hexdigest()
"""Of a tar without members."""
SHOWN = 8
"""Names in a line."""
SCORES = "scores.parquet"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
Progress = Callable[[int, int], None]
"""Called, from several threads, with bytes that were just read and shards that were just finished."""


@dataclass(frozen=True)
class TarResult:
    """What reading a tar to its end came to."""

    sha256: str
    problems: tuple[Problem, ...]


@runtime_checkable
class Memory(Protocol):
    """Results that an interrupted run has left, and where this run leaves its own."""

    def get(self, tar: storage.Stat, ledger_file: storage.Stat | None) -> TarResult | None:
        """What is known of these two files as they are."""
        ...

    def put(self, tar: storage.Stat, ledger_file: storage.Stat | None, result: TarResult) -> None:
        """Keep a result."""
        ...


@dataclass
class Shard:
    """A shard by its name, whatever there is of it."""

    name: str
    ledger: bool = False
    """Whether its ledger can be believed."""
    tar: bool = False
    """Whether its tar is as that ledger says; without a ledger, whether it is one that a shard could have."""
    sha256: str = ""
    """Of the tar as it is; empty where there is none that can be read."""
    wanted_sha256: str = ""
    """Of the tar as it was, by the ledger; empty where that is not known."""
    size: int = 0
    ok: int = 0
    failed: int = 0

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.ledger and self.tar


@dataclass
class Verified:
    """What was found out about a dataset."""

    root: str
    info: DatasetInfo | None
    shards: dict[str, Shard]
    told: Told
    manifest: ByShard | None = None
    plan: ByShard | None = None
    files: Mapping[str, storage.Stat] = field(default_factory=dict)
    bytes: int = 0
    """Of all tars."""
    remembered: int = 0
    """Tars that were not read now, because an interrupted run had read them."""

    @property
    def redo(self) -> list[str]:
        """The shards that are broken. A view has none of its own."""
        if self.info is not None and self.info.view is not None:
            return []
        return [name for name, shard in self.shards.items() if not shard.good]

    @property
    def ok(self) -> int:
        """Good clips in the ledgers that can be believed."""
        return sum(shard.ok for shard in self.shards.values())

    @property
    def failed(self) -> int:
        """Failed clips in them."""
        return sum(shard.failed for shard in self.shards.values())


def check_dataset(
    root: str, *, workers: int = 4, memory: Memory | None = None, progress: Progress | None = None, begin: Callable[[int, int], None] | None = None
) -> Verified:
    """Reads all of a dataset at `root`, or a view's rows and the ledgers of its parent. `begin` is called with the bytes and shards that there are.

    ValueError where there is no dataset; StorageError where it cannot be read now.
    """
    told = Told()
    files = _files(root)
    found = ledger.listing_of(files.values())
    if INFO not in files and not found.ledgers and not found.tars:
        raise ValueError(f"{root} is not a dataset: it has neither {INFO} nor shards; expected a folder or prefix that a job wrote")
    info = check_info(root, told)
    if info is not None and info.view is not None:
        verified = Verified(root, info, {}, told, files=files)
        _check_view(verified, info, workers)
        _check_others(verified, {INFO, ledger.MANIFEST})
        return verified
    verified = Verified(root, info, {}, told, files=files)
    fingerprint = None if info is None else info.fingerprint
    verified.plan = read_plan(root, told)
    verified.manifest = _manifest(root, found, fingerprint, told)
    _check_ledgers(verified, found, fingerprint, workers)
    _check_tars(verified, found, workers, memory if info is not None else None, progress, begin)
    if PLAN not in files:
        told.notes.append(f"there is no {PLAN}: this was not written by a job, or its plan is lost; the same inputs give the same plan again")
    ours = {f"{name}.{ending}" for ending, names in (("parquet", found.ledgers), ("tar", found.tars)) for name in names}
    _check_others(verified, {INFO, PLAN, ledger.MANIFEST, *ours})
    return verified


def _files(root: str) -> dict[str, storage.Stat]:
    if not storage.is_remote(root) and not storage.is_folder(root):
        raise ValueError(f"{root} is no folder; expected a dataset's")
    return {storage.basename(file.path): file for file in storage.scan(root, recursive=False)}


# --- files against each other ---------------------------------------------------------------------------------------------------------


def _manifest(root: str, found: Listing, fingerprint: str | None, told: Told) -> ByShard | None:
    manifest = read_by_shard(root, ledger.MANIFEST, told)
    if manifest is None:
        if not found.manifest and found.ledgers:
            told.problem(ledger.MANIFEST, "it is missing; it can be made of the ledgers")
        return None
    wrong = check_columns(manifest.schema.empty_table())
    if wrong:
        told.problem(ledger.MANIFEST, wrong)
        return None
    of = manifest.metadata.get(ledger.FINGERPRINT, b"").decode("utf-8", "replace")
    if fingerprint is not None and of != fingerprint:
        told.problem(ledger.MANIFEST, f"it belongs to a dataset with the fingerprint {of[:12] or '(none)'}, and {INFO} has {fingerprint[:12]}")
        return None
    if manifest.metadata.get(ledger.MERGED) != found.digest.encode():
        told.problem(ledger.MANIFEST, "it was made of other ledgers than those that are there")
    return manifest


def _check_ledgers(verified: Verified, found: Listing, fingerprint: str | None, workers: int) -> None:
    """Every ledger by itself, and against the manifest's and the plan's rows; what there should be, and is not."""
    told, manifest, plan = verified.told, verified.manifest, verified.plan
    planned = set(plan.names) if plan is not None else set()
    listed = set(manifest.names) if manifest is not None else set()
    for name in sorted({*found.ledgers, *found.tars, *listed}):
        verified.shards[name] = Shard(name, size=found.tars.get(name, 0))
    keys: list[pa.ChunkedArray] = []
    for name, (table, problems, is_sealed) in _ledgers(verified.root, list(found.ledgers), fingerprint, workers):
        shard = verified.shards[name]
        told.problems += problems
        told.old += [] if is_sealed else [f"{name}.parquet"]
        if table is None:
            continue
        shard.ledger = not problems
        good = _good(table)
        shard.ok, shard.failed = good.num_rows, table.num_rows - good.num_rows
        if shard.ledger:
            shard.wanted_sha256 = table["shard_sha256"][0].as_py() if len(table) else EMPTY_SHA256
            keys.append(good["key"])
            _compare(verified, name, table)
    _check_keys(verified, keys)
    for name in sorted(found.tars.keys() - found.ledgers.keys()):
        told.problem(f"{name}.tar", "it has no ledger, so it counts as not finished")
    for name in sorted(found.ledgers.keys() - found.tars.keys()):
        told.problem(f"{name}.tar", "it is missing, though its ledger is there")
    lost = sorted(listed - found.ledgers.keys() - found.tars.keys())
    if lost:
        told.problem(ledger.MANIFEST, f"it has rows of {len(lost)} shards of which neither tar nor ledger is there: {_some(lost)}")
    to_make = sorted(planned - found.ledgers.keys() - found.tars.keys() - listed)
    if to_make:
        told.problem(PLAN, f"{len(to_make)} of its {len(planned)} shards are not made: {_some(to_make)}; run the job again")
    if plan is not None and (strange := sorted((found.ledgers.keys() | found.tars.keys()) - planned)):
        told.problem(PLAN, f"it does not know {len(strange)} shards that are there: {_some(strange)}")


def _ledgers(
    root: str, names: Iterable[str], fingerprint: str | None, workers: int
) -> Iterator[tuple[str, tuple[pa.Table | None, list[Problem], bool]]]:
    """Every ledger, read ahead."""
    ahead: deque[tuple[str, Future]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="soundshard-ledgers") as pool:
        try:
            for name in names:
                ahead.append((name, pool.submit(read_ledger, root, name, fingerprint)))
                if len(ahead) > LEDGERS_AHEAD:
                    yield ahead[0][0], ahead.popleft()[1].result()
            while ahead:
                yield ahead[0][0], ahead.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)


def _good(table: pa.Table) -> pa.Table:
    """The rows of good clips. By a mask: an expression costs milliseconds, and there are thousands of small ledgers."""
    return table.filter(pc.call_function("equal", [table["status"], pa.scalar("ok")]))


def _compare(verified: Verified, name: str, table: pa.Table) -> None:
    """A ledger that can be believed against what the manifest and the plan say of its shard."""
    told = verified.told
    try:
        if verified.manifest is not None:
            rows = verified.manifest.rows(name)
            if rows is None:
                if len(table):
                    told.problem(ledger.MANIFEST, f"it has no rows of {name}, whose ledger is there")
            elif not _same_rows(rows, table):
                told.problem(ledger.MANIFEST, f"its rows of {name} are not those of the shard's ledger")
    except sealed.Damaged as error:
        told.problem(ledger.MANIFEST, str(error))
        verified.manifest = None
    try:
        if verified.plan is not None and (planned := verified.plan.rows(name)) is not None and planned["key"].to_pylist() != table["key"].to_pylist():
            told.problem(f"{name}.parquet", f"it has other clips than {PLAN} has for it")
    except sealed.Damaged as error:
        told.problem(PLAN, str(error))
        verified.plan = None


def _same_rows(rows: pa.Table, table: pa.Table) -> bool:
    """Whether a manifest's rows are a ledger's; the columns that the ledger lacks must be empty."""
    more = [name for name in rows.column_names if name not in table.column_names]
    if any(rows[name].null_count < len(rows) for name in more) or not set(table.column_names) <= set(rows.column_names):
        return False
    return rows.select(table.column_names).combine_chunks().equals(table.combine_chunks())


def _check_keys(verified: Verified, keys: list[pa.ChunkedArray]) -> None:
    chunks = [chunk for column in keys for chunk in column.chunks]
    together = pa.chunked_array(chunks, pa.string())
    if len(together.unique()) == len(together):
        return
    twice = [count["values"] for count in together.value_counts().to_pylist() if count["counts"] > 1]
    verified.told.problem("(all ledgers)", f"{len(twice)} keys are good in more than one place: {_some(twice)}")


def _check_others(verified: Verified, ours: Collection[str]) -> None:
    """What is there beside the dataset's own files."""
    told, others = verified.told, sorted(set(verified.files) - set(ours))
    if told.old:
        told.notes.append(f"{len(told.old)} files {OLD}: {_some(sorted(told.old))}")
    if SCORES in others:
        others.remove(SCORES)
        try:
            if not sealed.check(read_file(verified.files[SCORES].path)):
                told.notes.append(f"{SCORES} holds no hash of itself: it is not protected")
        except sealed.Damaged as error:
            told.problem(SCORES, str(error))
    if left := [name for name in others if TEMPORARY.fullmatch(name)]:
        told.notes.append(f"{len(left)} files were left by writers that were killed, which the next job removes: {_some(left)}")
    if strays := [name for name in others if not TEMPORARY.fullmatch(name)]:
        told.notes.append(f"{len(strays)} other files, which nothing protects: {_some(strays)}")


def _some(names: list[str]) -> str:
    shown = plain(", ".join(map(str, names[:SHOWN])))
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


# --- every byte of the tars -----------------------------------------------------------------------------------------------------------


def _check_tars(
    verified: Verified,
    found: Listing,
    workers: int,
    memory: Memory | None,
    progress: Progress | None,
    begin: Callable[[int, int], None] | None,
) -> None:
    known: dict[str, TarResult] = {}
    stats = {name: (verified.files[f"{name}.tar"], verified.files.get(f"{name}.parquet")) for name in found.tars}
    if memory is not None:
        known = {name: result for name, pair in stats.items() if (result := memory.get(*pair)) is not None}
        verified.remembered = len(known)
    if begin is not None:
        left = [name for name in found.tars if name not in known]
        begin(sum(found.tars[name] for name in left), len(left))
    stop = threading.Event()
    with ThreadPoolExecutor(workers, thread_name_prefix="soundshard-verify") as pool:
        running: dict[Future[TarResult], str] = {}
        todo = iter(name for name in found.tars if name not in known)
        try:
            while True:
                for name in todo:
                    running[pool.submit(_tar_result, verified, verified.shards[name], stats[name][0], stop, progress)] = name
                    if len(running) > 2 * workers:
                        break
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(done)
                    known[name] = done.result()
                    if memory is not None:
                        memory.put(*stats[name], known[name])
                    if progress is not None:
                        progress(0, 1)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    for name in found.tars:
        shard, result = verified.shards[name], known[name]
        shard.sha256, shard.tar = result.sha256, not result.problems
        verified.told.problems += result.problems
        verified.bytes += shard.size
    _tell_swapped(verified)


def _tar_result(verified: Verified, shard: Shard, found: storage.Stat, stop: threading.Event, progress: Progress | None) -> TarResult:
    """A tar against its ledger, if that can be believed, else by itself."""
    table = read_ledger(verified.root, shard.name, None)[0] if shard.ledger else None
    codes = Codes.of(verified.info.spec) if verified.info is not None else None
    file = f"{shard.name}.tar"
    told = None if progress is None else partial(_told_bytes, progress)
    try:
        checked = check_tar(found, None if table is None else places(table), codes, stop=stop, told=told)
    except FileNotFoundError:
        return TarResult("", (Problem(file, "it was removed meanwhile"),))
    problems = checked.problems
    if table is not None:
        if checked.sha256 and checked.sha256 != shard.wanted_sha256:
            what = f"its sha256 is {checked.sha256[:12]}, and its ledger has {shard.wanted_sha256[:12]}"
            size = tar_size(table)
            what += f"; it has {found.size} bytes, and {size} were written" if found.size != size else ""
            problems.insert(0, Problem(file, what))
        problems += first(check_records(file, table.to_pylist(), checked.members, codes), MOST)
    return TarResult(checked.sha256, tuple(problems))


def _told_bytes(progress: Progress, count: int) -> None:
    progress(count, 0)


def _tell_swapped(verified: Verified) -> None:
    """Say of a broken tar that it is another shard's."""
    by_sha256 = {shard.wanted_sha256: shard.name for shard in verified.shards.values() if shard.wanted_sha256 not in ("", EMPTY_SHA256)}
    for shard in verified.shards.values():
        other = by_sha256.get(shard.sha256)
        if other is not None and other != shard.name:
            verified.told.problem(f"{shard.name}.tar", f"it is the tar of {other}")
            shard.tar = False


# --- views ----------------------------------------------------------------------------------------------------------------------------


def _check_view(verified: Verified, info: DatasetInfo, workers: int) -> None:
    """A view's rows against the ledgers of its parent. The parent's bytes are not read: it is a dataset that can be verified itself."""
    told, parent = verified.told, parent_of(verified.root, info)
    try:
        data = read_file(storage.join(verified.root, ledger.MANIFEST))
        is_sealed = sealed.check(data)
        table = sealed.rows(data)
    except FileNotFoundError:
        told.problem(ledger.MANIFEST, "it is missing, and is all that there is of a view: make the view again")
        return
    except sealed.Damaged as error:
        told.problem(ledger.MANIFEST, f"{error}; make the view again")
        return
    told.old += [] if is_sealed else [ledger.MANIFEST]
    of = (table.schema.metadata or {}).get(ledger.FINGERPRINT, b"").decode("utf-8", "replace")
    wrong = check_columns(table, extra=("start_seconds",)) or ("" if of == info.fingerprint else f"it has the fingerprint {of[:12] or '(none)'}")
    if wrong:
        told.problem(ledger.MANIFEST, wrong)
        return
    _check_keys(verified, [_good(table)["key"]])
    of_parent = Told()
    there = check_info(parent, of_parent)
    told.problems += [Problem(f"{parent}/{problem.file}", problem.message) for problem in of_parent.problems]
    if there is not None and there.fingerprint != info.fingerprint:
        told.problem(INFO, f"its parent {parent} has the fingerprint {there.fingerprint[:12]}, and the view {info.fingerprint[:12]}: make it again")
        return
    _check_view_rows(verified, table, parent, info.fingerprint, workers)
    told.notes.append(f"this is a view: the bytes that it shows are verified by `soundshard verify {parent}`")


def _check_view_rows(verified: Verified, table: pa.Table, parent: str, fingerprint: str, workers: int) -> None:
    told, found = verified.told, ledger.listing(parent)
    table = table.sort_by([("shard", "ascending")])
    counts = {count["values"].as_py(): count["counts"].as_py() for count in table["shard"].value_counts()}
    names = [name for name in counts if name is not None]
    for name in sorted(set(names) - found.done):
        told.problem(ledger.MANIFEST, f"it has rows of {name}, which {parent} does not have whole")
    start, parts = 0, {}
    for name in sorted(names):
        parts[name] = table.slice(start, counts[name])
        start += counts[name]
    _check_rows_of_no_shard(told, table.slice(start))
    for name, (rows, problems, _) in _ledgers(parent, sorted(set(names) & found.done), fingerprint, workers):
        told.problems += [Problem(f"{parent}/{problem.file}", problem.message, problem.key) for problem in problems]
        shard = verified.shards[name] = Shard(name, ledger=rows is not None and not problems, tar=True)
        if rows is not None and not problems:
            differing = first(_differing(parts[name].to_pylist(), rows.to_pylist()), MOST)
            told.problems += differing
            good = _good(parts[name]).num_rows
            shard.ok, shard.failed = good, len(parts[name]) - good


def _check_rows_of_no_shard(told: Told, rows: pa.Table) -> None:
    for row in rows.to_pylist():
        if row["status"] != "failed" or row["reason"] is None:
            told.problem(ledger.MANIFEST, "it lies in no shard, and is not among the failed", row["key"])


def _differing(rows: list[dict[str, Any]], parents: list[dict[str, Any]]) -> Iterator[Problem]:
    """Rows of a view that are not the parent's, but for what a view may change."""
    by_name = {(row["key"], row["source"], row["status"]): row for row in parents}
    for row in rows:
        of_parent = by_name.get((row["key"], row["source"], row["status"]))
        if of_parent is None:
            yield Problem(ledger.MANIFEST, f"{row['shard']} of its parent has no such row", row["key"])
            continue
        names = ({*row} | {*of_parent}) - {"split", "label", "start_seconds"}
        if wrong := sorted(name for name in names if row.get(name) != of_parent.get(name)):
            yield Problem(ledger.MANIFEST, f"its {', '.join(wrong)} differ from those in its parent's ledger of {row['shard']}", row["key"])
