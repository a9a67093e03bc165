"""What runs the units of a shard on Ray: tasks, or a pool of actors that hold networks; and the task that writes the shard.

A unit is a few clips that one call takes. It returns a small `Tick` (which comes to the driver) and the clips' entries (which do not: they go
from the worker's object store to the shard's writer). Knows neither media nor networks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from pipeline.discover import Clip
from pipeline.plan import ShardPlan
from pipeline.progress import Tick
from pipeline.watch import Actor
from shards.write import Entry, Outcome, committed_sha256, read_outcome, stored_entries, write_shard

Payload = tuple[list[Entry], ...]
"""The entries of a unit's clips for every dataset that the stage writes."""
MACHINE_FAULTS = (WorkerCrashedError, RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError)
"""What Ray raises when a process, a node or an object is lost. Whatever else a unit raises is a fault of the job as a whole."""
RAY_RETRIES = 3
"""Times that Ray repeats a task by itself: it needs some to make a lost result anew. The loop repeats what still fails."""


@dataclass(frozen=True, eq=False)
class Started:
    """A unit under way."""

    tick: ray.ObjectRef
    payload: ray.ObjectRef
    actor: Actor = None


class Workers(Protocol):
    """Where units run."""

    count: int
    """Units that run at the same time."""

    def start(self, shard: str, clips: Sequence[Clip], avoid: frozenset[str]) -> Started | None:
        """Start a unit of a shard on a node that is not in `avoid`; None if there is no room now."""
        ...

    def ended(self, started: Started) -> None:
        """Called once when a unit has come back, well or not."""
        ...

    def suspect(self, started: Sequence[Started]) -> None:
        """Called when a node is frozen and the loop no longer waits for the units under way, of which some are on it."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...


class Tasks:
    """A Ray task per unit; Ray decides where and when."""

    def __init__(self, function: Callable[..., tuple[Tick, Payload]], *shared: object, num_cpus: int = 1) -> None:
        self.count = max(1, int(ray.cluster_resources().get("CPU", 1)) // num_cpus)
        self._function, self._shared = function, shared
        self._num_cpus, self._avoid = num_cpus, frozenset[str]()
        self._remote = self._options()

    def _options(self) -> Any:
        return ray.remote(self._function).options(
            num_cpus=self._num_cpus, num_returns=2, max_retries=RAY_RETRIES, label_selector=not_on(self._avoid), name=self._function.__name__
        )

    def start(self, shard: str, clips: Sequence[Clip], avoid: frozenset[str]) -> Started:
        """Hand the unit to Ray."""
        if avoid != self._avoid:
            self._avoid, self._remote = avoid, None
        if self._remote is None:
            self._remote = self._options()
        tick, payload = self._remote.remote(shard, clips, *self._shared)
        return Started(tick, payload)

    def ended(self, started: Started) -> None:
        """Ray keeps count of its own tasks."""

    def suspect(self, started: Sequence[Started]) -> None:
        """A task on a frozen node holds nothing that another needs."""

    def close(self) -> None:
        """Tasks end by themselves."""


class UnitActor:
    """What every actor of the pool is: `unit(shard, clips)` returns a Tick and the Payload."""

    def ping(self) -> None:
        """Answers once the calls before it are done."""


class Actors:
    """A pool of processes that hold networks. A unit goes to whichever has room, so that a slow or restarting one holds nothing up."""

    def __init__(self, actor_class: type, *arguments: object, count: int, num_cpus: int, num_gpus: int = 0, calls: int = 1) -> None:
        """`calls` units at a time go to each actor: with 2, one decodes its first clips while the other computes its last batches."""
        remote = ray.remote(actor_class).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_concurrency=calls, max_restarts=-1, max_task_retries=RAY_RETRIES
        )
        self._actors: list[Actor] = [remote.remote(*arguments) for _ in range(count)]
        self._free = [actor for _ in range(calls) for actor in self._actors]
        self._away: list[tuple[Actor, ray.ObjectRef]] = []
        self.count = count * calls

    def start(self, shard: str, clips: Sequence[Clip], avoid: frozenset[str]) -> Started | None:
        """Call an actor that has room. `avoid` is not needed: after a node froze, an actor is not called before it answers."""
        del avoid
        self._welcome_back()
        if not self._free:
            return None
        actor = self._free.pop(0)
        tick, payload = actor.unit.options(num_returns=2).remote(shard, clips)
        return Started(tick, payload, actor)

    def ended(self, started: Started) -> None:
        """The actor has room again."""
        self._free.append(started.actor)

    def suspect(self, started: Sequence[Started]) -> None:
        """Any actor may be on the frozen node: it gets units again when it has finished, or lost, what it has, or answered."""
        self._away += [(unit.actor, unit.tick) for unit in started] + [(actor, actor.ping.remote()) for actor in self._free]
        self._free = []

    def _welcome_back(self) -> None:
        if self._away:
            back = set(ray.wait([ref for _, ref in self._away], num_returns=len(self._away), timeout=0, fetch_local=False)[0])
            self._free += [actor for actor, ref in self._away if ref in back]
            self._away = [(actor, ref) for actor, ref in self._away if ref not in back]

    def close(self) -> None:
        """End the processes: they hold memory that the next stage needs."""
        for actor in self._actors:
            ray.kill(actor)


@dataclass(frozen=True)
class Written:
    """What became of a write."""

    outcomes: tuple[Outcome, ...] = ()
    lost: tuple[int, ...] = ()
    """Units whose results were lost with a node and must run again before the shard can be written."""


@dataclass(frozen=True)
class WriteOrder:
    """All that the writer of a shard must know beside the units' results."""

    outputs: tuple[str, ...]
    """The datasets; each shard is committed in this order."""
    plan: ShardPlan
    units: tuple[tuple[int, ...], ...] = ()
    """Places in the plan of the clips that each unit holds."""
    retried: frozenset[int] | None = None
    """Clips that are tried again; the others' entries come from the shard that is there. None: the whole shard is new."""
    replaces: tuple[str | None, ...] = ()
    """sha256 of the committed shard that this one replaces, per dataset."""


def write_task(order: WriteOrder, payloads: list[ray.ObjectRef]) -> Written:
    """Write a shard into every dataset of the stage. Repeating it, also by a writer that was given up, changes nothing."""
    outcomes = []
    for number, root in enumerate(order.outputs):
        try:
            outcomes.append(write_shard(root, order.plan.name, _entries(order, payloads, number)))
        except _Superseded:
            outcomes.append(read_outcome(root, order.plan.name))
        except _Lost as lost:
            return Written(lost=lost.units)
    return Written(tuple(outcomes))


class _Superseded(Exception):  # noqa: N818 - no error
    """Somebody else committed the shard in the meantime, with the same bytes."""


class _Lost(Exception):  # noqa: N818 - no error
    def __init__(self, units: tuple[int, ...]) -> None:
        super().__init__(units)
        self.units = units


def _entries(order: WriteOrder, payloads: list[ray.ObjectRef], number: int) -> Iterator[Entry]:
    """The shard's entries in the plan's order: failed before anything ran, kept from the shard that is there, or new."""
    root, name = order.outputs[number], order.plan.name
    found = {place: (unit, at) for unit, places in enumerate(order.units) for at, place in enumerate(places)}
    kept = iter(stored_entries(root, name)) if order.retried is not None else None
    loaded, entries = -1, list[Entry]()
    for place, clip in enumerate(order.plan.clips):
        stored = next(kept) if kept is not None else None
        if clip.reason:
            yield failed_entry(clip, clip.reason, clip.message)
        elif stored is not None and order.retried is not None and place not in order.retried:
            yield stored
        else:
            unit, at = found[place]
            if unit != loaded:
                loaded, entries = unit, _payload(unit, payloads)[number]
            yield entries[at]
    there = committed_sha256(root, name)
    if there is not None and there != order.replaces[number]:
        raise _Superseded


def _payload(unit: int, payloads: list[ray.ObjectRef]) -> Payload:
    try:
        return ray.get(payloads[unit])
    except MACHINE_FAULTS as error:
        raise _Lost((unit,)) from error


def failed_entry(clip: Clip, reason: str, message: str | None) -> Entry:
    """The ledger row of a clip for which there is nothing to store."""
    return Entry(clip.key, clip.split, clip.label, clip.source, reason=reason, message=message)


def not_on(nodes: frozenset[str]) -> dict[str, str] | None:
    """Ray's label selector for any node but these."""
    return {"ray.io/node-id": f"!in({','.join(sorted(nodes))})"} if nodes else None


def root_cause(error: BaseException) -> str:
    """What went wrong in a worker, in a line: Ray's own text holds the worker's whole traceback, which ends in the error itself."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if isinstance(cause, RayError) and lines else f"{type(cause).__name__}: {cause}"
