"""The one Ray loop: a plan of shards in, committed shards out. The shard is the unit of commit, a few clips are the unit of work.

Plain Ray Core: the driver keeps a bounded number of shards open, starts their units, and starts the write of a shard when its units are back.
Clips' bytes go from worker to worker, never through the driver, whose memory does not grow with the data set. Whatever is lost with a process
or a node is done again. Knows neither media nor networks.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import ray
from ray._private import worker as ray_worker
from ray.exceptions import RayActorError, RayError
from ray.experimental import get_object_locations

from configs.load import JobError
from pipeline.plan import Plan, ShardPlan
from pipeline.progress import Metrics, Progress, Snapshot, Tally, Tick
from pipeline.watch import Watch
from pipeline.workers import MACHINE_FAULTS, RAY_RETRIES, Started, Workers, WriteOrder, Written, failed_entry, not_on, root_cause, write_task

TRIES = 5
"""Times that the loop starts a unit whose process is lost, each of which Ray repeats by itself too, before it gives its clips up."""
WRITE_TRIES = 20
POLL_SECONDS = 1.0
END_SECONDS = 20.0
"""What Ray's server is given to answer when it is left."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayConfig:
    """Where the work runs."""

    address: str = "local"
    """`local` starts Ray on this machine for the job; `auto` or `host:port` joins a running cluster."""
    num_cpus: int | None = None
    """Processors that a local Ray may use; null takes all. A cluster knows its own."""
    object_store_mb: int = 400
    """Shared memory of a local Ray, in MiB; it holds the re-encoded clips of the shards in flight."""


class Cluster:
    """A Ray that starts when it is first needed: the one already initialised in this process, a local one for the job's time, or a running one."""

    def __init__(self, config: RayConfig) -> None:
        self._config, self._own = config, False

    def start(self) -> None:
        """Start or join Ray; nothing if that is done."""
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._own = True
        if self._config.address == "local":
            # A token-less local Ray binds to the loopback address only and ends with the job.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            ray.init(
                address="local",
                num_cpus=self._config.num_cpus,
                include_dashboard=False,
                object_store_memory=self._config.object_store_mb << 20,
                _node_ip_address="127.0.0.1",
                # Workers speak through ledgers and the summary, Ray's deaths of nodes and workers through the loop, not into its progress line.
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        else:
            ray.init(address=self._config.address, log_to_driver=False, logging_level=logging.CRITICAL)

    def stop(self) -> None:
        """End what `start` started."""
        if self._own:
            end_ray()
            self._own = False


def end_ray() -> None:
    """Leave Ray, and end it if this process started it.

    Ray 2.60 asks its control server to forget the driver's ear for errors, and waits for the answer, which has been seen never to come.
    """
    worker: Any = ray_worker.global_worker
    if hasattr(worker, "gcs_error_subscriber"):
        worker.gcs_error_subscriber = _Closing(worker.gcs_error_subscriber)
    ray.shutdown()


class _Closing:
    """Ray's ear for errors, which is given some seconds to be closed. That it hears no more is decided here; the server need not know."""

    def __init__(self, subscriber: Any) -> None:
        self._subscriber = subscriber

    def __getattr__(self, name: str) -> Any:  # all but its end is as it was
        return getattr(self._subscriber, name)

    def close(self) -> None:
        closing = threading.Thread(target=self._subscriber.close, name="soundshard-ray-end", daemon=True)
        closing.start()
        closing.join(END_SECONDS)
        if closing.is_alive():
            log.warning("Ray's server did not answer for %g s when it was left; going on", END_SECONDS)


@contextlib.contextmanager
def cluster(config: RayConfig) -> Iterator[Cluster]:
    """A Ray to run in, ended with the block. It is not started before `start` is called."""
    found = Cluster(config)
    try:
        yield found
    finally:
        found.stop()


@dataclass(frozen=True)
class Stage:
    """What a job does with a plan."""

    name: str
    outputs: tuple[str, ...]
    """The datasets that every shard is written into, committed in this order."""
    unit_clips: int
    """Clips in one unit. One call costs about 5 ms, so a unit should take half a second or more."""
    workers: Callable[[int], Workers]
    """Starts what runs so many units. Called only if there is something to do, when Ray is up."""
    networks: bool = False
    """Whether the workers hold networks."""
    device: str = "cpu"
    """On which these run."""


@dataclass(frozen=True)
class Todo:
    """Which shards of the plan to do."""

    plan: Plan
    missing: frozenset[str]
    """Shards that are not committed."""
    retry: dict[str, dict[tuple[str, str], None]] = field(default_factory=dict)
    """Committed shards with the clips (key, source) of theirs to try again."""
    replaces: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    """sha256 of the committed shards that a retry replaces, per dataset."""


@dataclass(frozen=True)
class Ran:
    """What the loop did."""

    snapshot: Snapshot
    total: int
    """Clips in the shards that were to do."""
    workers: int
    seconds: float
    restarted_units: int
    """Units started again because a process or node was lost."""


@dataclass(eq=False)
class _Unit:
    """A few clips of an open shard on their way."""

    shard: "_Shard"
    places: tuple[int, ...]
    running: Started | None = None
    payload: ray.ObjectRef | None = None
    """The entries, once they are there."""
    tries: int = 0
    counted: bool = False


@dataclass(eq=False)
class _Shard:
    """A shard being made."""

    plan: ShardPlan
    order: WriteOrder
    units: list[_Unit]
    write: ray.ObjectRef | None = None
    tries: int = 0


def run_shards(stage: Stage, todo: Todo, *, in_flight: int, freeze_seconds: float, progress: Progress) -> Ran:
    """Do the shards. Ray must be up.

    Raises JobError when a shard's work fails as a whole (a full disk, a broken installation, storage that stays away): what is committed stays.
    """
    loop = _Loop(stage, todo, in_flight, freeze_seconds, progress)
    try:
        return loop.run()
    finally:
        loop.close()


class _Loop:
    """The state of one stage's run."""

    def __init__(self, stage: Stage, todo: Todo, in_flight: int, freeze_seconds: float, progress: Progress) -> None:
        self.stage, self.todo, self.progress = stage, todo, progress
        wanted = todo.missing | set(todo.retry)
        self.workers = stage.workers(sum(-(-todo.plan.counts[name] // stage.unit_clips) for name in wanted))
        self.clips = sum(todo.plan.counts[name] for name in wanted)
        self.left, self.plans = len(wanted), todo.plan.shards(wanted)
        per_shard = max(1, self.clips // max(1, len(wanted)))
        # Enough open shards that no worker waits for a write: two rounds of units, and a few for the ends of shards.
        self.in_flight = in_flight or 2 + -(-2 * self.workers.count * stage.unit_clips // per_shard)
        self.tally, self.metrics = Tally(), Metrics(stage.name)
        self.watch = Watch(freeze_seconds)
        self.open: list[_Shard] = []
        self.waiting: deque[_Unit] = deque()
        self.running: dict[ray.ObjectRef, _Unit] = {}
        self.writing: dict[ray.ObjectRef, _Shard] = {}
        self.restarted = 0

    def run(self) -> Ran:
        started, more = time.monotonic(), True
        while more or self.open:
            while more and len(self.open) < self.in_flight:
                plan = next(self.plans, None)
                more = plan is not None
                self.left -= more
                if plan is not None:
                    self._open(plan)
            self._start_units()
            self._collect()
            if frozen := self.watch.poll():
                self._restart_on_others(frozen)
            while self.watch.gone:
                self.progress.note(f"node {self.watch.gone.pop()[:8]} has left; what it was doing is done again on others")
            self.progress.update(self.tally.snapshot())
            self.metrics.shards(in_flight=len(self.open), to_do=self.left)
        return Ran(self.tally.snapshot(), self.clips, self.workers.count, time.monotonic() - started, self.restarted)

    def close(self) -> None:
        self.progress.close()
        if ray.is_initialized():
            self.watch.close()
            self.workers.close()

    def _open(self, plan: ShardPlan) -> None:
        """Cut a shard into units. The cut depends on the plan alone: what shares a batch on a GPU must not depend on what is tried again."""
        retry = self.todo.retry.get(plan.name)
        retried = None if retry is None else frozenset(place for place, clip in enumerate(plan.clips) if (clip.key, clip.source) in retry)
        cuts = [range(start, min(start + self.stage.unit_clips, len(plan.clips))) for start in range(0, len(plan.clips), self.stage.unit_clips)]
        # A clip that failed before it was opened is a row already.
        units = [tuple(place for place in cut if plan.clips[place].reason is None) for cut in cuts]
        wanted = tuple(unit for unit in units if unit and (retried is None or not retried.isdisjoint(unit)))
        replaces = self.todo.replaces.get(plan.name, (None,) * len(self.stage.outputs))
        shard = _Shard(plan, WriteOrder(self.stage.outputs, plan, wanted, retried, replaces), [])
        shard.units = [_Unit(shard, places) for places in wanted]
        self.open.append(shard)
        self.waiting.extend(shard.units)
        run = {place for unit in wanted for place in unit}
        rest = [clip for place, clip in enumerate(plan.clips) if place not in run]
        if rest:
            self._count(Tick(len(rest), tuple((clip.key, clip.reason, clip.message or "") for clip in rest if clip.reason)))
        if not shard.units:
            self._start_write(shard)

    def _start_units(self) -> None:
        while self.waiting:
            unit = self.waiting[0]
            unit.running = self.workers.start(
                unit.shard.plan.name, [unit.shard.plan.clips[place] for place in unit.places], frozenset(self.watch.frozen)
            )
            if unit.running is None:
                return
            self.waiting.popleft()
            self.running[unit.running.tick] = unit

    def _collect(self) -> None:
        """Take what has come back, waiting a moment if nothing has."""
        refs = [*self.running, *self.writing]
        if not refs:
            time.sleep(POLL_SECONDS / 10)
            return
        if not ray.wait(refs, timeout=POLL_SECONDS, fetch_local=False)[0]:
            return
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0]:
            if ref in self.running:
                self._unit_back(self.running.pop(ref))
            else:
                self._write_back(self.writing.pop(ref))

    def _unit_back(self, unit: _Unit) -> None:
        assert unit.running is not None
        self.workers.ended(unit.running)
        try:
            tick: Tick = ray.get(unit.running.tick)
        except MACHINE_FAULTS as error:
            self._restart(unit, error)
            return
        except (RayError, OSError, ValueError) as error:
            self._stop(unit.shard, error)
        unit.payload, unit.running = unit.running.payload, None
        self._back(unit, tick)

    def _restart(self, unit: _Unit, error: BaseException | str) -> None:
        """Queue a unit again whose process or result is lost."""
        unit.tries, unit.running, unit.payload = unit.tries + 1, None, None
        if isinstance(error, RayActorError) and "error raised in its creation task" in str(error):
            self._stop(unit.shard, error)
        if unit.tries > TRIES:
            if self.stage.networks or len(unit.places) > 1:  # a broken device or installation: no clip is to blame
                self._stop(unit.shard, error)
            self._give_up(unit)
            return
        self.restarted += 1
        self.waiting.append(unit)

    def _give_up(self, unit: _Unit) -> None:
        """A clip whose worker dies again and again costs itself a row, not the job."""
        (clip,) = (unit.shard.plan.clips[place] for place in unit.places)
        message = f"the worker that had this clip died each of the {unit.tries * (RAY_RETRIES + 1)} times that it was tried"
        unit.payload = ray.put(tuple([failed_entry(clip, "crashed", message)] for _ in self.stage.outputs))
        self._back(unit, Tick(1, ((clip.key, "crashed", message),)))

    def _back(self, unit: _Unit, tick: Tick) -> None:
        """A unit's result is there."""
        if not unit.counted:
            unit.counted = True
            self._count(tick)
        if all(other.payload is not None for other in unit.shard.units):
            self._start_write(unit.shard)

    def _start_write(self, shard: _Shard) -> None:
        payloads = [unit.payload for unit in shard.units if unit.payload is not None]
        assert len(payloads) == len(shard.units)
        writer = ray.remote(write_task).options(num_cpus=0, max_retries=0, label_selector=not_on(frozenset(self.watch.frozen)))
        shard.write = writer.remote(shard.order, payloads)
        self.writing[shard.write] = shard

    def _write_back(self, shard: _Shard) -> None:
        ref, shard.write = shard.write, None
        assert ref is not None
        try:
            written: Written = ray.get(ref)
        except MACHINE_FAULTS as error:
            shard.tries += 1
            if shard.tries > WRITE_TRIES:
                self._stop(shard, error)
            self._start_write(shard)
            return
        except (RayError, OSError, ValueError) as error:
            self._stop(shard, error)
        for number in written.lost:
            self._restart(shard.units[number], f"the result of a unit of {shard.plan.name} is lost with its node again and again")
        if not written.lost:
            self.open.remove(shard)
            self._count(Tick(0, bytes=sum(outcome.bytes for outcome in written.outcomes)))

    def _restart_on_others(self, frozen: set[str]) -> None:
        """Start again what a frozen node may hold: units and writes under way, and results whose only copy lies there."""
        self.workers.suspect([unit.running for unit in self.running.values() if unit.running is not None])
        units = [*self.running.values()]
        there = get_object_locations([unit.payload for shard in self.open for unit in shard.units if unit.payload is not None])
        for shard in self.open:
            units += [unit for unit in shard.units if unit.payload is not None and set(there[unit.payload].get("node_ids", ())) <= self.watch.frozen]
        self.running.clear()
        self.writing.clear()
        for unit in units:
            unit.running, unit.payload = None, None
        self.restarted += len(units)
        self.waiting.extendleft(reversed(units))
        shards = {unit.shard.plan.name for unit in units}
        for shard in self.open:
            if all(unit.payload is not None for unit in shard.units):
                shards.add(shard.plan.name)
                self._start_write(shard)
        names = ", ".join(sorted(node[:8] for node in frozen))
        self.progress.note(f"node {names} does not answer; {len(shards)} shards in work are continued on other nodes")

    def _count(self, tick: Tick) -> None:
        self.tally.add(tick, time.monotonic())
        self.metrics.observe(tick)

    def _stop(self, shard: _Shard, error: BaseException | str) -> NoReturn:
        why, cause = (error, None) if isinstance(error, str) else (root_cause(error), error)
        raise JobError(
            f"{self.stage.name} stopped at shard {shard.plan.name}: {why}\n"
            f"The finished shards in {self.stage.outputs[-1]} are kept; mend the cause and run the same command again."
        ) from cause
