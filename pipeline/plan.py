"""Which clip goes to which shard: `plan.parquet`, written before any shard, from which resuming, appending and noticing changed inputs work.

Knows clips by name, size and version, and that a shard is committed by its ledger. Knows no media, no networks and no Ray.

Planning runs in a process of its own that ends when the plan is written, so the job that follows never holds a million clips: it reads the plan a
few thousand rows at a time.
"""

import ctypes
import gc
import importlib
import io
import operator
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from types import FunctionType
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from configs import storage
from configs.load import JobError
from pipeline.discover import Clip, DiscoverConfig, discover, discovery
from pipeline.tars import tar_of
from shards import ledger
from shards.read import Index
from shards.write import discard, done_shards

PLAN = "plan.parquet"
COLUMNS = {
    "shard": pa.string(),
    "key": pa.string(),
    "source": pa.string(),
    "split": pa.string(),
    "label": pa.string(),
    "reason": pa.string(),
    "message": pa.string(),
    "size": pa.int64(),
    "version": pa.string(),
    "offset": pa.int64(),
    "start_seconds": pa.float64(),
    "end_seconds": pa.float64(),
}
GROUP_ROWS = 4096
"""Rows that are read at once, in whole shards: what a driver holds of the plan."""
PART = ("start_seconds", "end_seconds")
"""Which part of its video a clip is."""
PLACE = ("source", "size", "version", "offset", *PART)
"""Where a clip is, and as what."""
EXAMPLES = 3
REMOVING_THREADS = 16
MISSING, DUPLICATE = "missing", "duplicate_key"
DOWNLOAD_BYTES = 8 << 20
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ShardPlan:
    """The clips of one shard, decided before anything runs so that the bytes do not depend on the cluster."""

    name: str
    split: str
    clips: tuple[Clip, ...]


Source = Callable[..., Sequence[Clip] | Sequence[ShardPlan]]
"""What lists the inputs: a function at the top level of its module, since the planning process finds it by its name."""


class Plan:
    """A dataset's plan file. Holds the shards' names and counts; their clips are read when they are asked for."""

    names: list[str]
    counts: dict[str, int]
    """Clips of each shard, good and bad."""
    clips: int

    def __init__(self, root: str | os.PathLike) -> None:
        """Reads the plan of the dataset at `root`. FileNotFoundError if there is none."""
        self.path = storage.join(root, PLAN)
        self._file = _opened(self.path)
        self.counts, self._groups = {}, []
        for group in range(self._file.num_row_groups):
            column = self._file.read_row_group(group, columns=["shard"], use_threads=False).column(0)
            counts = Counter(column.to_pylist())  # in order of first appearance; a shard's rows lie together, and in one group
            self._groups.append(frozenset(counts))
            self.counts |= counts
        self.names, self.clips = list(self.counts), sum(self.counts.values())

    def shards(self, wanted: Collection[str] | None = None) -> Iterator[ShardPlan]:
        """The shards in the plan's order, or those whose names are in `wanted`; a few thousand clips are in memory at a time."""
        chosen = None if wanted is None else frozenset(wanted)
        for group, names in enumerate(self._groups):
            if chosen is None or names & chosen:
                yield from (shard for shard in _shards(self._file.read_row_group(group, use_threads=False)) if chosen is None or shard.name in chosen)

    def missing(self) -> int:
        """How many inputs a list named that were not there when the plan was made."""
        groups = (self._file.read_row_group(group, columns=["reason"], use_threads=False) for group in range(self._file.num_row_groups))
        return sum(group.column(0).to_pylist().count(MISSING) for group in groups)


@dataclass(frozen=True)
class Changes:
    """How the inputs differ from the plan as it was; all zero for a new plan."""

    added: int = 0
    """New inputs, in new shards."""
    changed: tuple[str, ...] = ()
    """Shards to be done again because their inputs are others now; they are committed no more."""
    appeared: int = 0
    """Clips of committed shards that were missing and are there now."""
    appeared_shards: tuple[str, ...] = ()
    """With `retry_missing`: the committed shards that hold them, in whose plan they have no reason any more."""
    gone: int = 0
    """Inputs of the plan that are not found any more; their rows stay."""
    examples: tuple[str, ...] = ()
    """A few of each, a line each."""

    def text(self) -> str:
        """A line to read; empty if nothing differs."""
        parts = [
            f"{self.added} new inputs are appended in new shards" if self.added else "",
            f"{len(self.changed)} shards with changed inputs are done again" if self.changed else "",
            f"{self.appeared} clips that were missing are there now" if self.appeared else "",
            f"{self.gone} inputs are not there any more (what was made of them stays)" if self.gone else "",
        ]
        return "; ".join(part for part in parts if part)


def plan_shards(clips: Sequence[Clip], clips_per_shard: int, *, after: Mapping[str, int] | None = None) -> list[ShardPlan]:
    """Cut the sorted clips of every split into shards. The order is that of (split, key, source), so the plan depends on the inputs alone.

    `after`: the last number that a split already has.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard is {clips_per_shard}; expected at least 1")
    by_split: dict[str, list[Clip]] = {}
    for clip in sorted(clips, key=lambda c: (c.split, c.key, c.source)):
        by_split.setdefault(clip.split, []).append(clip)
    return [
        ShardPlan(f"{split}-{number:06d}", split, tuple(members[start : start + clips_per_shard]))
        for split, members in by_split.items()
        for number, start in enumerate(range(0, len(members), clips_per_shard), start=(after or {}).get(split, -1) + 1)
    ]


def settle(
    root: str | os.PathLike,
    source: Source,
    *arguments: object,
    clips_per_shard: int | None = None,
    overwrite: bool = False,
    on_change: Literal["refuse", "redo"] = "refuse",
    retry_missing: bool = False,
) -> tuple[Plan, Changes]:
    """Make the plan of the dataset at `root`, or bring it up to date with its inputs, in a process of its own.

    `source(*arguments)` lists the inputs: clips, which are cut into shards of `clips_per_shard`, or shards that are cut already. Clips in the plan
    keep their places; new ones come in new shards. Raises what `source` raises, and ValueError where inputs of committed shards have changed, unless
    `overwrite` or `on_change="redo"`: then the ledgers of those shards are removed, so that they are to do like any that never were, whatever happens
    to this run.

    The process imports the modules of `source` and of the classes of its arguments, so these should be light. Of a job's wide configuration,
    `discover` is handed what is its own.
    """
    if source is discover:
        arguments = tuple(discovery(argument) if isinstance(argument, DiscoverConfig) else argument for argument in arguments)
    options = Options(clips_per_shard, overwrite or on_change == "redo", retry_missing)
    try:
        changes = _in_child(settle_here, os.fspath(root), source, arguments, options)
    except BaseException:
        storage.remove_stale(storage.join(root, PLAN))  # of a planning process that was stopped while it wrote
        raise
    return Plan(root), changes


@dataclass(frozen=True)
class Options:
    """How `settle` was asked to plan."""

    clips_per_shard: int | None = None
    redo_changed: bool = False
    retry_missing: bool = False


def settle_here(root: str, source: Source, arguments: Sequence[object], options: Options) -> Changes:
    """`settle` in this process: the plan file is as it should be when it returns, and as it was when it raises."""
    path = storage.join(root, PLAN)
    storage.remove_stale(path)
    found, committed = source(*arguments), done_shards(root)
    cut = [item for item in found if isinstance(item, ShardPlan)]
    clips = [item for item in found if isinstance(item, Clip)]
    if clips and options.clips_per_shard is None:
        raise ValueError("clips_per_shard is not given, and the inputs are clips; only shards that are cut already need none")
    clips_per_shard = 1 if options.clips_per_shard is None else options.clips_per_shard
    if not storage.is_file(path):
        shards = sorted(cut or plan_shards(clips, clips_per_shard), key=_place)
        _check_planless(root, shards, committed)
        _write(path, shards)
        return Changes()
    before = list(Plan(root).shards())
    update = _Update(committed=committed, retry_missing=options.retry_missing)
    after = update.cut(before, cut) if cut else update.clips(before, clips, clips_per_shard)
    if update.refused and not options.redo_changed:
        raise ValueError(update.refusal(root))
    # In this order: a shard without a ledger is done again from what is found, whether or not the plan came to be written.
    with ThreadPoolExecutor(REMOVING_THREADS) as pool:
        list(pool.map(lambda name: discard(root, name), update.refused))
    if after != before:
        _write(path, after)
    return update.changes()


class _Update:
    """The plan's rows brought up to date with what was found, and what that changed."""

    def __init__(self, *, committed: Collection[str], retry_missing: bool) -> None:
        self._committed, self._retry_missing = committed, retry_missing
        self._added = self._gone = self._appeared = 0
        self._examples: defaultdict[str, list[str]] = defaultdict(list)
        self.refused: dict[str, int] = {}
        """Committed shards -> how many of their inputs have changed, which may yet be accepted."""
        self.appeared_shards: set[str] = set()

    def clips(self, before: Sequence[ShardPlan], found: Sequence[Clip], clips_per_shard: int) -> list[ShardPlan]:
        """Every old row with what is found of it now, and new shards of what is new."""
        pairs, new = _paired([clip for shard in before for clip in shard.clips], found)
        found_now = iter(pairs)
        rows = [[self._row(shard.name, clip, next(found_now)) for clip in shard.clips] for shard in before]
        # Another file may come first now, but a key is its holder's.
        holders = {clip.key: clip for clips in rows for clip in clips if clip.reason != DUPLICATE}
        after = [
            replace(shard, clips=tuple(_duplicate(clip, holders) if clip.reason == DUPLICATE else clip for clip in clips))
            for shard, clips in zip(before, rows, strict=True)
        ]
        appended = [_duplicate(clip, holders) for clip in new]
        for clip in appended:
            self._note("added", f"new: {clip.key} ({clip.source})")
        self._added += len(appended)
        return sorted([*after, *plan_shards(appended, clips_per_shard, after=_last_numbers(before))], key=_place)

    def cut(self, before: Sequence[ShardPlan], found: Sequence[ShardPlan]) -> list[ShardPlan]:
        """Shards cut elsewhere: as they are found now, those that are not found any more as they were."""
        now, known = {shard.name: shard for shard in found}, {shard.name for shard in before}
        after = []
        for shard in before:
            fresh = now.get(shard.name)
            if fresh is None:
                self._gone += sum(clip.reason is None for clip in shard.clips)
                self._note("gone", f"gone: shard {shard.name}")
            elif shard.name in self._committed:
                self._compare_cut(shard, fresh)
            after.append(fresh or shard)
        new = [shard for shard in found if shard.name not in known]
        self._added += sum(len(shard.clips) for shard in new)
        return sorted(after + new, key=_place)

    def _compare_cut(self, was: ShardPlan, now: ShardPlan) -> None:
        if [clip.key for clip in was.clips] != [clip.key for clip in now.clips]:
            self._refuse(was.name, f"shard {was.name} holds {len(now.clips)} clips, {len(was.clips)} before, or others")
            return
        for old, new in zip(was.clips, now.clips, strict=True):
            if differing := _differences(old, new) or ([("reason", old.reason, new.reason)] if old.reason != new.reason else []):
                self._refuse(was.name, _told(new, differing))

    def _row(self, shard: str, old: Clip, new: Clip | None) -> Clip:
        """A row of the plan, given what is found of its input now."""
        if old == new:
            return old
        committed = shard in self._committed
        if old.reason == DUPLICATE:
            return old if new is None else replace(old, **{name: getattr(new, name) for name in PLACE})
        if new is None or new.reason == MISSING or (new.size is None and old.size is not None):
            return self._gone_row(old, new, committed=committed)
        if old.reason == MISSING:
            if new.reason is not None:
                return old  # the key went to another file of that name
            if committed:
                self._appeared += 1
                self._note("appeared", f"there now: {old.key} ({new.source})")
                if not self._retry_missing:
                    return old
                self.appeared_shards.add(shard)
        elif committed and (differing := _differences(old, new)):
            self._refuse(shard, _told(new, differing))
        label = old.label if committed else new.label
        return replace(old, label=label, reason=None, message=None, **{name: getattr(new, name) for name in PLACE})

    def _gone_row(self, old: Clip, new: Clip | None, *, committed: bool) -> Clip:
        """An input that is not there (any more). What a committed shard says of it stays true."""
        if old.reason is None:
            self._gone += 1
            self._note("gone", f"gone: {old.key} ({old.source})")
        if new is None or committed or new.reason != MISSING:
            return old
        return replace(old, label=new.label, reason=MISSING, message=new.message, **{name: getattr(new, name) for name in PLACE})

    def _refuse(self, shard: str, what: str) -> None:
        self.refused[shard] = self.refused.get(shard, 0) + 1
        self._note("changed", what)

    def _note(self, kind: str, what: str) -> None:
        if len(self._examples[kind]) < EXAMPLES:
            self._examples[kind].append(what)

    def refusal(self, root: str) -> str:
        """Why the plan stays as it was, and what to do."""
        count, shown = sum(self.refused.values()), self._examples["changed"]
        lines = [
            f"{count} inputs of {len(self.refused)} finished shards in {root} have changed since they were read:",
            *(f"  {line}" for line in shown),
            *([f"  and {count - len(shown)} more"] if count > len(shown) else []),
            "overwrite=true does these shards again; to keep what is made of them, put the inputs back or write to another out",
        ]
        return "\n".join(lines)

    def changes(self) -> Changes:
        """What the caller is told, once the plan is written."""
        examples = tuple(chain.from_iterable(self._examples.values()))
        return Changes(self._added, tuple(sorted(self.refused)), self._appeared, tuple(sorted(self.appeared_shards)), self._gone, examples)


def _paired(before: Sequence[Clip], found: Sequence[Clip]) -> tuple[list[Clip | None], list[Clip]]:
    """For every row of the plan what is found of its input, and what belongs to no row. One row of a key, at most, is no duplicate, in both."""
    by_key: dict[str, list[Clip]] = {}
    for clip in found:
        by_key.setdefault(clip.key, []).append(clip)
    rows: dict[str, list[int]] = {}
    for number, clip in enumerate(before):
        rows.setdefault(clip.key, []).append(number)
    pairs: list[Clip | None] = [None] * len(before)
    for key, numbers in rows.items():
        left = by_key.pop(key, [])
        left.sort(key=lambda clip: clip.reason == DUPLICATE)
        numbers.sort(key=lambda number: before[number].reason == DUPLICATE)
        for same in (_same_path, _same_name, _was_missing):
            for number in numbers:
                if pairs[number] is None and left:
                    pairs[number] = next((clip for clip in left if same(before[number], clip)), None)
                    left = [clip for clip in left if clip is not pairs[number]]
        if left:
            by_key[key] = left
    return pairs, list(chain.from_iterable(by_key.values()))


def _same_path(old: Clip, new: Clip) -> bool:
    return old.source == new.source


def _same_name(old: Clip, new: Clip) -> bool:
    """A file that was moved with its folder, or with the tar that it is in."""
    return _own_name(old) == _own_name(new)


def _own_name(clip: Clip) -> str:
    return storage.basename(clip.source if clip.offset is None else tar_of(clip.source)[1])


def _was_missing(old: Clip, new: Clip) -> bool:
    """A clip that is missing may turn up under any of the names that its key has."""
    return old.reason == MISSING and new.reason is None


def _duplicate(clip: Clip, holders: Mapping[str, Clip]) -> Clip:
    """The clip as a failed one, if its key belongs to another."""
    holder = holders.get(clip.key)
    return clip if holder is None else replace(clip, reason=DUPLICATE, message=f"{holder.source} has this key already")


def _place(shard: ShardPlan) -> tuple[str, int]:
    """Where a shard stands in the plan: its split and number."""
    split, _, number = shard.name.rpartition("-")
    return split, int(number)


def _last_numbers(shards: Sequence[ShardPlan]) -> dict[str, int]:
    last: dict[str, int] = {}
    for split, number in map(_place, shards):
        last[split] = max(last.get(split, -1), number)
    return last


def _differences(old: Clip, new: Clip) -> list[tuple[str, object, object]]:
    """(field, before, now) of what says that an input is another one. A time or an etag belongs to a place: after a move only sizes are compared."""
    found: list[tuple[str, object, object]] = []
    if old.size is not None and new.size is not None and old.size != new.size:
        found.append(("size", old.size, new.size))
    if old.version and new.version and old.version != new.version:
        (kind, _, was), (kind_now, _, now) = old.version.partition(":"), new.version.partition(":")
        if kind == kind_now and (old.source == new.source or kind == "sha256"):
            found.append((kind, _time(was), _time(now)) if kind == "mtime" else (kind, was, now))
    return found + [(name, was, now) for name in PART if (was := getattr(old, name)) != (now := getattr(new, name))]


def _time(nanoseconds: str) -> str:
    seconds, fraction = divmod(int(nanoseconds), 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def _told(clip: Clip, differing: Sequence[tuple[str, object, object]]) -> str:
    return f"{clip.key} ({clip.source}): " + ", ".join(f"{name} {was} before, {now} now" for name, was, now in differing)


def media_plans(data: str) -> list[ShardPlan]:
    """A media dataset's own cut into shards, failed rows included: what another dataset that is made of it is planned from. A view has no shards of
    its own and is cut anew, as those of its clips alone would be.

    A clip's version is its shard's hash, so that whatever changes the shard is a change of its clips.
    """
    index = Index.open(data, kind="media")
    names = ["shard", "shard_sha256", "key", "source", "split", "label", "reason", "message"]
    shards: dict[str, list[Clip]] = {}
    for shard, sha256, *values in zip(*(index.table.column(name).to_pylist() for name in names), strict=True):
        shards.setdefault(shard, []).append(Clip(*values, version=sha256 and f"sha256:{sha256}"))
    if index.view is not None:
        return plan_shards(list(chain.from_iterable(shards.values())), index.info.spec["clips_per_shard"])
    return [ShardPlan(name, clips[0].split, tuple(clips)) for name, clips in shards.items()]


# --- the file -------------------------------------------------------------------------------------------------------------------------


def _write(path: str, shards: Iterable[ShardPlan]) -> None:
    """Writes the plan, in row groups of whole shards. The same plan gives the same bytes."""
    schema = pa.schema(list(COLUMNS.items()))
    with storage.writing(path) as file, ledger.writer(file, schema, dictionary=["shard", "split", "label", "reason"]) as writer:
        open_shards: list[ShardPlan] = []
        for shard in shards:
            if open_shards and sum(len(other.clips) for other in open_shards) + len(shard.clips) > GROUP_ROWS:
                writer.write_table(_table(open_shards, schema), row_group_size=1 << 30)
                open_shards = []
            open_shards.append(shard)
        if open_shards:
            writer.write_table(_table(open_shards, schema), row_group_size=1 << 30)


def _table(shards: Sequence[ShardPlan], schema: pa.Schema) -> pa.Table:
    clips = [clip for shard in shards for clip in shard.clips]
    columns: list[list[Any]] = [[shard.name for shard in shards for _ in shard.clips]]
    columns += [list(map(operator.attrgetter(name), clips)) for name in COLUMNS if name != "shard"]
    return pa.table([_array(values, kind) for values, kind in zip(columns, COLUMNS.values(), strict=True)], schema=schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        # File names may hold bytes that are no UTF-8, which Python keeps as surrogates: the file has them as `\\udcff`.
        return pa.array([value and value.encode("utf-8", "backslashreplace").decode() for value in values], kind)


def _shards(table: pa.Table) -> Iterator[ShardPlan]:
    """The shards of one row group."""
    # A plan that was written before there were clips in tars, or parts of videos, has no columns for these.
    columns = {name: table.column(name).to_pylist() if name in table.column_names else [None] * table.num_rows for name in COLUMNS}
    names, clips = columns.pop("shard"), []
    for row, values in enumerate(zip(*(columns[name] for name in CLIP_FIELDS), strict=True)):
        clips.append(Clip(*values) if "\\udc" not in values[1] else replace(Clip(*values), source=_path_of(values[1])))
        if row + 1 == len(names) or names[row + 1] != names[row]:
            yield ShardPlan(names[row], clips[0].split, tuple(clips))
            clips = []


CLIP_FIELDS = tuple(Clip.__dataclass_fields__)


def _path_of(text: str) -> str:
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), text)


def _opened(path: str) -> pq.ParquetFile:
    """The plan file, open for as long as it is used: a remote one as a nameless local copy."""
    try:
        if not storage.is_remote(path):
            return pq.ParquetFile(pa.OSFile(path))
        return pq.ParquetFile(_fetched(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not readable as a plan ({error}); put it back, or write to another out") from error


def _fetched(path: str) -> Any:
    found = storage.stat(path)
    if found is None:
        raise FileNotFoundError(2, "no such object", path)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the plan
    for start in range(0, found.size, DOWNLOAD_BYTES):
        file.write(storage.read_bytes(path, start, min(found.size, start + DOWNLOAD_BYTES)))
    file.seek(0)
    return file


def _check_planless(root: str, shards: Sequence[ShardPlan], committed: Collection[str]) -> None:
    """A dataset whose plan is lost goes on where the same inputs are cut into the same shards. ValueError otherwise."""
    planned = {shard.name: [clip.key for clip in shard.clips] for shard in shards} if committed else {}
    for name in sorted(committed):
        if ledger.read(ledger.path_of(root, name), columns=["key"])["key"].to_pylist() != planned.get(name):
            raise ValueError(
                f"{root} has {len(committed)} finished shards but no {PLAN}, and {name} does not hold what these inputs would put there; "
                "give the inputs and the clips_per_shard that it was made with, or another out"
            )


# --- the planning process -------------------------------------------------------------------------------------------------------------


class PlanningTraceback(Exception):  # noqa: N818 - the cause of an error, not one
    """Where an error arose in the planning process, as text."""


def _in_child(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new Python, which this one's end ends too. Its exceptions come back as themselves.

    Not multiprocessing's spawn, which would first import all that the main module imports: Ray and torch, for seconds.
    """
    request = io.BytesIO()
    pickle.dump(sys.path, request)
    _ByName(request).dump((function, arguments))
    reading, writing = os.pipe()
    command = [sys.executable, "-c", BOOT, str(writing), str(os.getpid())]
    with open(reading, "rb") as answer_file:
        try:
            # In a group of its own, so that Ctrl-C reaches this process only, which ends the other.
            child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[writing], process_group=0)
        finally:
            os.close(writing)
        with child:
            assert child.stdin is not None
            try:
                with suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(request.getbuffer())
                data = answer_file.read()
            except BaseException:
                child.kill()
                raise
    if not data:
        raise JobError(f"the planning process ended with status {child.returncode} before the plan was made{_why(child.returncode)}")
    result, error, told = pickle.loads(data)
    if error is not None:
        raise error from PlanningTraceback(f"\n{told}")
    return result


def _why(status: int) -> str:
    return ": it was killed, perhaps for want of memory; it needs about 2 GB for a million clips" if status == -signal.SIGKILL else ""


BOOT = """\
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from pipeline.plan import answer
answer(int(sys.argv[1]), int(sys.argv[2]))
"""


def answer(descriptor: int, parent: int) -> None:
    """The planning process: do what is asked on standard input and send back the result or the error."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    gc.disable()  # millions of objects are made, and none in cycles
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        data = pickle.dumps((function(*arguments), None, ""))
    except Exception as error:
        data = pickle.dumps((None, _portable(error), traceback.format_exc()))
    with open(descriptor, "wb") as file:
        file.write(data)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same if it does not survive pickling."""
    try:
        return cast(Exception, pickle.loads(pickle.dumps(error)))
    except Exception:  # whatever an error's own pickling raises: the error itself must get through, if only as text
        return RuntimeError(f"{type(error).__name__}: {error}")


class _ByName(pickle.Pickler):
    """Pickles what the main module defines by the name under which another process can import it."""

    def reducer_override(self, obj: Any) -> Any:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if isinstance(obj, type | FunctionType) and obj.__module__ == "__main__" and spec is not None:
            return _imported, (spec.name, obj.__qualname__)
        return NotImplemented


def _imported(module: str, name: str) -> Any:
    return operator.attrgetter(name)(importlib.import_module(module))
