"""`soundshard score`: columns of numbers about a dataset's good clips, beside it in `scores.parquet`.

Processes on Ray open the dataset, decode clips where a scorer looks at pictures or sound (once for all of them, in a process of its own), and score
a few clips in a call. Knows no scorer, and not how the table is put together.
"""

import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from jaxtyping import Bool
from ray.exceptions import RayError

from configs import storage
from configs.load import JobError, job_main
from pipeline.isolate import Limits, call
from pipeline.media import MediaError
from pipeline.media_scores import decoded
from pipeline.progress import Progress, Tally, Tick
from pipeline.ray_loop import RayConfig, cluster
from pipeline.score_store import Made, ScoreStore
from pipeline.scorers import Item, Kind, ScoreOptions, Scorer, Scores, Scoring, registered
from pipeline.scores import KEY, scores_path
from pipeline.workers import root_cause
from shards.facts import ERROR
from shards.read import Index

UNIT_CLIPS: Mapping[Kind, int] = {"media": 8, "features": 64}
"""Clips that a call of a process takes, and that are lost with it: a second of work or so."""
RETRIES = 3
"""Times that Ray repeats a call whose process is lost."""


@dataclass(frozen=True)
class ScoreConfig(ScoreOptions, Limits):
    """Options of `soundshard score`."""

    data: str = "???"
    """A media or feature dataset, or a view of one."""
    scorers: list[str] = field(default_factory=list)
    """Which, such as [loudness,cuts,speech]; empty takes those that need no weights. A name that is none lists all there are."""
    split: str | None = None
    """Only clips of this split."""
    out: str = ""
    """The table, a parquet file; empty takes scores.parquet in the dataset's or view's own folder, where other jobs find it."""
    actors: int = 0
    """Processes that score; 0 takes one for each GPU if networks run on one, else one for each processor."""
    decode_threads: int = 2
    """Clips decoded at the same time in each process: while one is scored, the next is decoded."""
    part_clips: int = 2000
    """Rows that are kept in memory before they are written as a part; a run that dies loses no more."""
    retry_failed: bool = False
    """Try clips again that a scorer failed on."""
    overwrite: bool = False
    """Do anew what was made with other options, weights or versions of a scorer."""
    max_failed_fraction: float = 1.0
    """Largest fraction of clips with an error that still counts as success (exit status 0). The table is written either way."""
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batch_clips, self.decode_threads, self.part_clips) < 1 or self.actors < 0:
            given = f"batch_clips is {self.batch_clips}, decode_threads {self.decode_threads}, part_clips {self.part_clips}, actors {self.actors}"
            raise ValueError(f"{given}; expected at least 1, and 0 or more actors")
        if self.out and not self.out.endswith(".parquet"):
            raise ValueError(f"out is {self.out!r}; expected a file that ends in .parquet, or nothing for the dataset's own folder")


def run(config: ScoreConfig) -> pa.Table:
    """Add columns of scores to the table beside a dataset: a row for every good clip. What an earlier run has done is not done again."""
    root = storage.absolute(config.data)
    index = Index.open(root)
    scorers = choose(config.scorers, index)
    options = score_options(config)
    wanted = {scorer.name: Made(scorer.version(options), scorer.columns, index.info.fingerprint) for scorer in scorers}
    store = ScoreStore(config.out or scores_path(root), index, wanted, overwrite=config.overwrite)
    asked = in_split(index, config.split)
    units = list(find_units(store, scorers, asked, retry_failed=config.retry_failed))
    to_do = sum(len(unit.rows) for unit in units)
    print(f"score: {', '.join(wanted)}: {int(asked.sum()) - to_do} clips done, {to_do} to do", flush=True)
    if units:
        with cluster(config.ray) as ray_cluster, store.writing(config.part_clips):
            ray_cluster.start()
            _score_all(config, index, scorers, units, store)
    table = store.finish()
    print(f"score: {summary(table, scorers)}\nscore: {table.num_rows} clips -> {config.out or scores_path(root)}", flush=True)
    _check_failures(config, store, asked)
    return table


def choose(names: Sequence[str], index: Index) -> list[Scorer]:
    """The scorers of these names, each once. ValueError where one cannot be told of this dataset."""
    known, kind = registered(), index.info.kind
    usable = {name: scorer for name, scorer in known.items() if scorer.kind == kind}
    listed = "".join(f"\n  {name}: {scorer.summary}" for name, scorer in usable.items())
    chosen = list(dict.fromkeys(names)) or [name for name, scorer in usable.items() if scorer.usual]
    if not chosen:
        raise ValueError(f"{index.root} is a {kind} dataset, of which no score can be had without weights; give scorers=[...] of:{listed}")
    for name in chosen:
        if name not in known:
            raise ValueError(f"there is no scorer {name!r}; of a {kind} dataset these can be had:{listed}")
        if name not in usable:
            raise ValueError(f"the scorer {name!r} is of {known[name].kind} datasets, and {index.root} is a {kind} dataset; of those:{listed}")
        lacking = [member for member in usable[name].members if member not in index.members]
        if lacking:
            raise ValueError(
                f"the scorer {name!r} reads {', '.join(lacking)}, which {index.root} lacks; it has {', '.join(index.members) or 'no good clips'}"
            )
    return [usable[name] for name in chosen]


def score_options(config: ScoreOptions) -> ScoreOptions:
    """The scorers' options alone, out of the job's wider configuration."""
    return ScoreOptions(**{own.name: getattr(config, own.name) for own in fields(ScoreOptions)})


def in_split(index: Index, split: str | None) -> Bool[np.ndarray, "clips"]:
    """Which good clips are asked for. ValueError for a split that there is not."""
    splits = good_rows(index)["split"].combine_chunks()
    if split is None:
        return np.ones(len(splits), bool)
    found = pc.call_function("equal", [splits, split]).to_numpy(zero_copy_only=False)
    if not found.any():
        raise ValueError(f"{index.root} has no good clips of split {split!r}; it has {', '.join(sorted(splits.unique().to_pylist())) or 'none'}")
    return found


@dataclass(frozen=True)
class Unit:
    """A few clips for one call."""

    rows: tuple[int, ...]
    """Of the index."""
    names: tuple[str, ...]
    """Scorers that these clips lack."""


def find_units(store: ScoreStore, scorers: Sequence[Scorer], asked: Bool[np.ndarray, "clips"], *, retry_failed: bool) -> "Sequence[Unit]":
    """What is to do, in the dataset's order: neighbours that lack the same scorers."""
    missing = np.zeros((len(scorers), len(asked)), bool)
    for number, scorer in enumerate(scorers):
        rows = store.rows(scorer.name)
        missing[number] = asked & (~rows.done | (rows.failed if retry_failed else False))
    units: list[Unit] = []
    todo = np.flatnonzero(missing.any(0))
    # Where a run of clips ends: its last lacks other scorers than the next.
    ends = np.flatnonzero((np.diff(missing[:, todo].astype(np.int8), axis=1) != 0).any(0)) + 1
    for run_rows in np.split(todo, ends) if len(todo) else []:
        names = tuple(scorer.name for scorer, lacks in zip(scorers, missing[:, run_rows[0]], strict=True) if lacks)
        size = UNIT_CLIPS[scorers[0].kind]
        units += [Unit(tuple(run_rows[at : at + size].tolist()), names) for at in range(0, len(run_rows), size)]
    return units


def summary(table: pa.Table, scorers: Sequence[Scorer]) -> str:
    """What came out, a line for each column: how many clips have it, and how it is spread."""
    lines = [f"{'':24}{'clips':>8}{'no value':>10}{'failed':>8}{'mean':>10}{'5 %':>10}{'median':>10}{'95 %':>10}"]
    for scorer in scorers:
        failed = table.num_rows - table[scorer.name + ERROR].null_count
        for column in scorer.columns:
            values = table[column].drop_null().combine_chunks().cast(pa.float64()).to_numpy()
            spread = [float(values.mean()), *np.quantile(values, (0.05, 0.5, 0.95)).tolist()] if len(values) else []
            counts = f"{len(values):>8}{table[column].null_count - failed:>10}{failed:>8}"
            lines.append(f"{column:24}{counts}{''.join(f'{value:>10.4g}' for value in spread)}")
    return "\n".join(lines)


def _check_failures(config: ScoreConfig, store: ScoreStore, asked: Bool[np.ndarray, "clips"]) -> None:
    """The last words about clips that a scorer failed on."""
    failed = {name: store.rows(name) for name in store.wanted}
    bad = np.zeros(len(asked), bool)
    for rows in failed.values():
        bad |= rows.failed & asked
    if not bad.any():
        return
    reasons = Counter(error for rows in failed.values() for error in rows.errors())
    shown = "; ".join(f"{count} x {error}" for error, count in reasons.most_common(3))
    text = f"{int(bad.sum())} of {int(asked.sum())} clips have an error of some scorer ({shown})"
    if bad.sum() == asked.sum() or bad.sum() > config.max_failed_fraction * asked.sum():
        raise JobError(
            f"score: {text}, more than max_failed_fraction={config.max_failed_fraction:g} allows; the table's columns NAME.error say why, and "
            "retry_failed=true tries them again"
        )
    print(f"score: {text}; retry_failed=true tries them again", flush=True)


# The cluster


def _score_all(config: ScoreConfig, index: Index, scorers: Sequence[Scorer], units: Sequence[Unit], store: ScoreStore) -> None:
    """Deal the units to processes that hold the scorers; what has come in goes to the store."""
    networks = any(scorer.networks for scorer in scorers)
    if networks and config.device == "auto":
        config = replace(config, device="cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")
    on_gpu, waiting, resources = networks and config.device.startswith("cuda"), deque(units), ray.cluster_resources()
    count = config.actors or max(1, int(resources.get("GPU", 1) if on_gpu else resources.get("CPU", 1)))
    calls = config.decode_threads if index.info.kind == "media" else 1
    remote = ray.remote(ScoreActor).options(num_gpus=int(on_gpu), num_cpus=1, max_concurrency=calls, max_restarts=-1, max_task_retries=RETRIES)
    actors = [remote.remote(config, index.info.kind) for _ in range(min(count, len(units)))]
    free: deque[Any] = deque(actors * calls)
    running: dict[ray.ObjectRef, tuple[Any, Unit]] = {}
    tally, good = Tally(), good_rows(index)
    with Progress("score", sum(len(unit.rows) for unit in units)) as progress:
        while running or waiting:
            while free and waiting:
                actor, unit = free.popleft(), waiting.popleft()
                running[actor.unit.remote(part_of(index, good, unit), unit.names)] = actor, unit
            for ready in ray.wait(list(running), num_returns=1)[0]:
                try:
                    table, tick = ray.get(ready)
                except RayError as error:
                    raise JobError(f"{root_cause(error)}; what is done is kept, the same command goes on") from error
                actor, unit = running.pop(ready)
                free.append(actor)
                store.add(table, unit.rows, unit.names)
                tally.add(tick)
                progress.update(tally.snapshot())


def good_rows(index: Index) -> pa.Table:
    """The ledger rows that an index numbers."""
    return index.table.filter(pc.field("status") == "ok").combine_chunks()


def part_of(index: Index, good: pa.Table, unit: Unit) -> Index:
    """The index of a unit's clips, a few kilobytes: processes need not hold that of the whole dataset."""
    return Index(index.root, index.info, good.take(pa.array(unit.rows)), view=index.view)


class ScoreActor:
    """A process that holds the scorers."""

    def __init__(self, config: ScoreConfig, kind: Kind) -> None:
        import torch

        torch.set_num_threads(1)  # there is a process for every processor
        self._options, self._limits, self._kind = config, Limits(config.clip_seconds, config.clip_memory_mb), kind
        self._known = registered()
        self._made: dict[str, Scoring] = {}
        self._lock = threading.Lock()  # clips are decoded side by side, and scored one call after the other

    def unit(self, clips: Index, names: Sequence[str]) -> tuple[pa.Table, Tick]:
        """The rows of a few clips: what these scorers say of them."""
        started = time.perf_counter()
        scorers, keys = [self._known[name] for name in names], clips.keys.to_pylist()
        items = [self._item(clips, row, scorers) for row in range(len(clips))]
        seconds = {"decode": time.perf_counter() - started} if self._kind == "media" else {}
        with self._lock:
            started = time.perf_counter()
            found = {scorer.name: scored(scorer, self._scoring(scorer), items, self._options.batch_clips) for scorer in scorers}
            seconds["score"] = time.perf_counter() - started
        failures: dict[str, tuple[str, str, str]] = {}
        for name, rows in found.items():
            for key, row in zip(keys, rows, strict=True):
                if isinstance(row, str):
                    failures.setdefault(key, (key, name, row))
        return table_of(keys, scorers, found), Tick(len(keys), tuple(failures.values()), seconds, node=platform.node())

    def _item(self, clips: Index, row: int, scorers: Sequence[Scorer]) -> "Item | str":
        item = Item(clips.keys[row].as_py(), clips.info.spec, partial(clips.member, row))
        if self._kind == "features":
            return item
        needs = frozenset(need for scorer in scorers for need in scorer.needs)
        try:
            return replace(item, media=call(decoded, clips.bytes(row, "mp4"), needs, limits=self._limits))
        except MediaError as error:
            return str(error)

    def _scoring(self, scorer: Scorer) -> Scoring:
        if scorer.name not in self._made:
            self._made[scorer.name] = scorer.make(score_options(self._options))
        return self._made[scorer.name]


def scored(scorer: Scorer, scoring: Scoring, items: "Sequence[Item | str]", batch_clips: int) -> "list[Scores | str]":
    """A scorer's values of clips, or for each clip that it failed on, or that could not be decoded, why."""
    good = [number for number, item in enumerate(items) if not isinstance(item, str)]
    found: list[Scores | str] = [item if isinstance(item, str) else "" for item in items]
    for at in range(0, len(good), batch_clips):
        numbers = good[at : at + batch_clips]
        batch = [item for number in numbers if not isinstance(item := items[number], str)]
        for number, row in zip(numbers, _batch(scorer, scoring, batch), strict=True):
            found[number] = row
    return found


def _batch(scorer: Scorer, scoring: Scoring, items: Sequence[Item]) -> "list[Scores | str]":
    try:
        rows: list[Scores | str] = list(scoring(items))
    except Exception as error:  # whatever it is, it becomes the row of the clip that it is about
        return [error_text(error)] if len(items) == 1 else [row for item in items for row in _batch(scorer, scoring, [item])]
    assert len(rows) == len(items) and all(set(row) == set(scorer.columns) for row in rows), f"{scorer.name} does not give its columns"
    return rows


def error_text(error: Exception) -> str:
    """Why a clip has no score, in a line."""
    return str(error) if isinstance(error, MediaError) else f"{type(error).__name__}: {' '.join(str(error).split())}"


def table_of(keys: Sequence[str], scorers: Sequence[Scorer], found: "Mapping[str, Sequence[Scores | str]]") -> pa.Table:
    """Some clips' rows: `key`, and for each scorer its columns and `NAME.error`. What is not finite is null: it tells nothing."""
    columns: dict[str, pa.Array] = {KEY: pa.array(keys, pa.string())}
    for scorer in scorers:
        rows = found[scorer.name]
        for column, kind in scorer.columns.items():
            values = [None if isinstance(row, str) or (value := row[column]) is None or not isfinite(value) else value for row in rows]
            columns[column] = pa.array(values, kind)
        columns[scorer.name + ERROR] = pa.array([row if isinstance(row, str) else None for row in rows], pa.string())
    return pa.table(columns)


def main(argv: Sequence[str] | None = None) -> int:
    """`soundshard score`."""
    return job_main(ScoreConfig, run, argv, command="score", positional="data")


if __name__ == "__main__":
    import sys

    from pipeline.score import main as _main  # not as part of `__main__`, whose classes other processes could not unpickle

    sys.exit(_main())
