"""The one Ray loop: a plan of shards in, outcomes out. The shard is the unit of work and of commit.

Plain Ray Core: a stage submits the work of one shard and the loop keeps a bounded number of shards in flight, so the driver holds no clip's bytes
and its memory does not grow with the data set. Knows neither media nor networks.
"""

import contextlib
import hashlib
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from tqdm import tqdm

from configs.load import JobError
from pipeline.discover import Clip
from shards.dataset import DatasetInfo, create_or_check, read_info
from shards.write import Outcome, shard_done, write_manifest


@dataclass(frozen=True)
class RayConfig:
    """Where the work runs."""

    address: str = "local"
    """`local` starts Ray on this machine for the job; `auto` or `host:port` joins a running cluster."""
    num_cpus: int | None = None
    """Processors that a local Ray may use; null takes all. A cluster knows its own."""
    object_store_mb: int = 400
    """Shared memory of a local Ray, in MiB; it holds the re-encoded clips of the shards in flight."""


@dataclass(frozen=True)
class ShardPlan:
    """The clips of one shard, decided before anything runs so that the bytes do not depend on the cluster."""

    name: str
    split: str
    clips: tuple[Clip, ...]


@dataclass
class Summary:
    """What a job ended with: counts over all shards of its plan, those done by an earlier run included."""

    ok: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    clips_now: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one shard's outcome."""
        self.ok, self.failed, self.bytes = self.ok + outcome.ok, self.failed + outcome.failed, self.bytes + outcome.bytes
        self.reasons.update(outcome.reasons)

    def text(self) -> str:
        """One line a person reads: counts, failures by reason, size, rate."""
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        rate = f", {self.clips_now} clips now at {self.clips_now / self.seconds:.2f} clips/s" if self.clips_now and self.seconds else ""
        return f"{self.ok} ok, {self.failed} failed{f' ({why})' if why else ''}; {self.bytes / 1e6:.1f} MB{rate}"


@contextlib.contextmanager
def cluster(config: RayConfig) -> Iterator[None]:
    """A Ray to run in: the one already initialised in this process, a local one for the job's time, or a running cluster."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers print through the driver's summary and ledgers, not into its progress line.
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if config.address == "local":
        # A token-less local Ray binds to the loopback address only and ends with the job.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            include_dashboard=False,
            object_store_memory=config.object_store_mb << 20,
            _node_ip_address="127.0.0.1",
            **common,
        )
    else:
        ray.init(address=config.address, **common)
    try:
        yield
    finally:
        ray.shutdown()


def plan_shards(clips: Sequence[Clip], clips_per_shard: int) -> list[ShardPlan]:
    """Cut the sorted clips of every split into shards. The order is that of (split, key, source), so the plan depends on the inputs alone."""
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard is {clips_per_shard}; expected at least 1")
    by_split: dict[str, list[Clip]] = {}
    for clip in sorted(clips, key=lambda c: (c.split, c.key, c.source)):
        by_split.setdefault(clip.split, []).append(clip)
    return [
        ShardPlan(f"{split}-{number:06d}", split, tuple(members[start : start + clips_per_shard]))
        for split, members in by_split.items()
        for number, start in enumerate(range(0, len(members), clips_per_shard))
    ]


def inputs_sha256(plans: Sequence[ShardPlan]) -> str:
    """A hash of which clip goes to which shard, kept with the dataset so that a rerun over other inputs is noticed."""
    digest = hashlib.sha256()
    for plan in plans:
        for clip in plan.clips:
            digest.update(f"{plan.name}\t{clip.key}\t{os.path.basename(clip.source)}\n".encode())
    return digest.hexdigest()


class Ticker:
    """Counts finished clips while their shards are still open, for the progress line. The ledgers, not this, are the record."""

    def __init__(self) -> None:
        self._done, self._failed = 0, 0

    def tick(self, done: int, failed: int) -> None:
        """Count clips that came to their end."""
        self._done, self._failed = self._done + done, self._failed + failed

    def read(self) -> tuple[int, int]:
        """(finished, of them failed) so far."""
        return self._done, self._failed


Actor = Any
"""A Ray actor's handle, for which Ray has no type that its own functions accept."""
Submit = Callable[[ShardPlan, Actor], ray.ObjectRef]


def run_shards(root: str, info: DatasetInfo, plans: Sequence[ShardPlan], submit: Submit, *, in_flight: int, stage: str) -> Summary:
    """Do the shards of the plan that are not committed yet, then merge the manifest.

    `submit(plan, ticker)` starts one shard's work and returns a reference to its Outcome, which must only be ready once the shard is committed.
    Raises JobError when a shard's work fails as a whole (a full disk, a broken installation): what is committed stays.
    """
    _check_inputs(root, info, plans)
    create_or_check(root, info)
    todo = deque(plan for plan in plans if not shard_done(root, plan.name))
    total = sum(len(plan.clips) for plan in todo)
    print(f"{stage}: {len(plans) - len(todo)} shards done, {len(todo)} to do ({total} clips)", flush=True)
    started, summary = time.monotonic(), Summary(clips_now=total)
    open_refs: dict[ray.ObjectRef, ShardPlan] = {}
    ticker: Actor = ray.remote(Ticker).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    # On a terminal one line is redrawn; in a log a line every half minute is enough.
    interval = 0.2 if sys.stderr.isatty() else 30
    with tqdm(total=total, desc=stage, unit="clip", mininterval=interval, maxinterval=interval, dynamic_ncols=True, disable=not todo) as bar:
        while todo or open_refs:
            while todo and len(open_refs) < in_flight:
                plan = todo.popleft()
                open_refs[submit(plan, ticker)] = plan
            ready, _ = ray.wait(list(open_refs), timeout=0.5)
            for ref in ready:
                plan = open_refs.pop(ref)
                try:
                    ray.get(ref)
                except (RayError, OSError, ValueError) as error:
                    for other in open_refs:
                        ray.cancel(other, force=False)
                    raise JobError(
                        f"{stage} stopped at shard {plan.name}: {_root_cause(error)}\nThe {sum(shard_done(root, p.name) for p in plans)} "
                        f"finished shards in {root} are kept; mend the cause and run the same command again."
                    ) from error
            done, failed = ray.get(ticker.read.remote())
            bar.update(max(0, min(done, total) - bar.n))
            bar.set_postfix(failed=failed, refresh=False)
        bar.update(total - bar.n)
    ray.kill(ticker)
    summary.seconds = time.monotonic() - started
    for outcome in write_manifest(root):
        summary.add(outcome)
    return summary


def finish(summary: Summary, *, stage: str, out: str, max_failed_fraction: float) -> None:
    """Print the last line of a stage. Raises JobError if too many clips failed, or all of them."""
    print(f"{stage}: {summary.text()} -> {out}", flush=True)
    total = summary.ok + summary.failed
    if total and (summary.ok == 0 or summary.failed > max_failed_fraction * total):
        raise JobError(
            f"{stage}: {summary.failed} of {total} clips failed, more than max_failed_fraction={max_failed_fraction:g} allows"
            f"{' (none is good)' if summary.ok == 0 else ''}. What is done is kept; `soundshard inspect {out}` shows the failures by reason."
        )


def _check_inputs(root: str, info: DatasetInfo, plans: Sequence[ShardPlan]) -> None:
    if not os.path.exists(os.path.join(root, "dataset.json")):
        return
    before, now = read_info(root).provenance.get("inputs", {}), info.provenance.get("inputs", {})
    if before != now and any(shard_done(root, plan.name) for plan in plans):
        raise ValueError(
            f"{root} was begun with {before.get('clips')} other inputs or shards of another size ({before}), and this run has {now}: "
            "which clip goes to which shard would change. Give the same inputs, or another out="
        )


def _root_cause(error: BaseException) -> str:
    """What went wrong in a worker, in a line: Ray's own text holds the worker's whole traceback, which ends in the error itself."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if isinstance(cause, RayError) and lines else f"{type(cause).__name__}: {cause}"
