"""What every preparation job does around the Ray loop: settle what is to do and say it, run it, merge the manifest, write the report, judge the end.

Knows datasets, plans and the loop. Which units a stage runs, and on what, is the stage's matter.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from configs import storage
from configs.load import JobError, to_plain
from pipeline.isolate import Limits
from pipeline.plan import Changes, Plan, Source, settle
from pipeline.progress import Progress
from pipeline.ray_loop import Cluster, Ran, RayConfig, Stage, Todo, run_shards
from pipeline.report import StageReport, write_report
from shards.dataset import DatasetInfo, DatasetMismatch, create_or_check, read_info
from shards.read import failed_clips
from shards.write import Totals, clear, committed_sha256, done_shards, totals, write_manifest


@dataclass(frozen=True)
class JobOptions(Limits):
    """How a preparation job runs, whatever it makes."""

    ray: RayConfig = field(default_factory=RayConfig)
    in_flight: int = 0
    """Shards worked on at the same time; 0 takes as many as keep every worker busy. More holds more clips in Ray's object store."""
    freeze_seconds: float = 25.0
    """A node that answers nothing for so long is given up: its work is started again on others, and it gets none until it answers."""
    max_failed_fraction: float = 1.0
    """Largest fraction of failed clips that still counts as success (exit status 0). The shards are kept either way."""
    overwrite: bool = False
    """Make anew what was made from other inputs (the shards that hold them) or with other settings (all shards)."""
    retry_failed: bool = False
    """Try failed clips again; only their shards are written anew, and the clips in them that were good stay as they are."""
    reasons: str = ""
    """With `retry_failed`: only clips that failed for one of these reasons, such as `timeout,io`; empty takes all."""


@dataclass
class Summary:
    """What a job ended with: counts over all shards of its plan, those done by an earlier run included."""

    ok: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    clips_now: int = 0
    seconds: float = 0.0

    def text(self) -> str:
        """One line a person reads: counts, failures by reason, size, rate."""
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        rate = f", {self.clips_now} clips now at {self.clips_now / self.seconds:.2f} clips/s" if self.clips_now and self.seconds else ""
        return f"{self.ok} ok, {self.failed} failed{f' ({why})' if why else ''}; {self.bytes / 1e6:.1f} MB{rate}"


def open_dataset(root: str, info: DatasetInfo, *, overwrite: bool) -> None:
    """Write `dataset.json`, or check that the one there agrees. With `overwrite`, a dataset made with other settings is removed."""
    try:
        create_or_check(root, info)
    except DatasetMismatch as mismatch:
        if not overwrite:
            raise DatasetMismatch(f"{mismatch}\nor remove it and make it anew with overwrite=true") from None
        before = read_info(root)
        if before.kind != info.kind:
            raise DatasetMismatch(f"{root} is a {before.kind} dataset; overwrite=true replaces a {info.kind} dataset only") from None
        print(f"overwrite=true: the dataset in {root} was made with other settings and is removed", flush=True)
        clear(root)
        create_or_check(root, info)


def settle_plan(root: str, source: Source, *arguments: object, config: JobOptions, clips_per_shard: int | None = None, derived: bool = False) -> Plan:
    """The dataset's plan file, made or brought up to date with the inputs; prints what changed.

    `derived` data (features of media shards) follows its inputs; other data whose inputs changed is refused without `overwrite`.
    """
    plan, changes = settle(
        root,
        source,
        *arguments,
        clips_per_shard=clips_per_shard,
        overwrite=config.overwrite,
        on_change="redo" if derived else "refuse",
        retry_missing=config.retry_failed,
    )
    examples = [f"  {example}" for example in changes.examples]
    for line in [*_changes_text(changes, derived, config.retry_failed), *examples]:
        print(line, flush=True)
    return plan


def _changes_text(changes: Changes, derived: bool, retried: bool) -> list[str]:
    lines = []
    if changes.added:
        lines.append(f"{changes.added} new clips are appended as new shards; the shards that are there stay as they are")
    if changes.changed:
        why = "their media shards changed" if derived else "their inputs changed (overwrite=true)"
        lines.append(f"{len(changes.changed)} shards are made again because {why}")
    if changes.gone:
        lines.append(f"{changes.gone} clips of the plan are no longer among the inputs; their rows stay")
    if changes.appeared:
        how = "and are taken in" if retried else "; retry_failed=true reasons=missing takes them in"
        lines.append(f"{changes.appeared} clips that were missing are there now{how if how[0] == ';' else f' {how}'}")
    return lines


def carry_out(stage: Stage, plan: Plan, config: JobOptions, cluster: Cluster) -> tuple[Summary, StageReport | None]:
    """Do what is to do, and merge the manifest. The report is None where there was nothing to do."""
    todo = find_todo(stage.outputs, plan, config)
    retry = f", {len(todo.retry)} to write anew for {sum(map(len, todo.retry.values()))} failed clips" if todo.retry else ""
    clips = sum(plan.counts[name] for name in todo.missing)
    done = len(plan.names) - len(todo.missing)
    if (missing := plan.missing()) or getattr(config, "listing", "") not in ("", "none"):
        print(f"{stage.name}: {listed_text(plan.clips, missing)}", flush=True)
    print(f"{stage.name}: {done} shards done, {len(todo.missing)} to do ({clips} clips){retry}", flush=True)
    ran = None
    if todo.missing or todo.retry:
        cluster.start()
        progress = Progress(stage.name, clips + sum(plan.counts[name] for name in todo.retry))
        ran = run_shards(stage, todo, in_flight=config.in_flight, freeze_seconds=config.freeze_seconds, progress=progress)
    found = [_totals(root, anew=ran is not None) for root in stage.outputs][-1]
    summary = Summary(found.ok, found.failed, Counter(found.reasons), found.bytes, ran.total if ran else 0, ran.seconds if ran else 0.0)
    return summary, stage_report(stage, summary, ran, plan, config) if ran else None


def listed_text(listed: int, missing: int) -> str:
    """How much of a list is there: no public copy of a data set is complete."""
    return f"{listed - missing} of {listed} listed clips are there, {missing} missing"


def find_todo(outputs: Sequence[str], plan: Plan, config: JobOptions) -> Todo:
    """Which shards are missing, and which hold clips to try again."""
    if config.reasons and not config.retry_failed:
        raise ValueError(
            f"reasons is {config.reasons!r}, but retry_failed is false; reasons chooses which failed clips retry_failed=true tries again"
        )
    done = frozenset.intersection(*(frozenset(done_shards(root)) for root in outputs))
    missing = frozenset(name for name in plan.names if name not in done)
    retry: dict[str, dict[tuple[str, str], None]] = {}
    if config.retry_failed:
        reasons = {reason.strip() for reason in config.reasons.split(",") if reason.strip()}
        for failed in failed_clips(outputs[-1]):
            if failed.shard in done and (not reasons or failed.reason in reasons):
                retry.setdefault(failed.shard, {})[failed.key, failed.source] = None
    # A clip that the plan itself holds for failed (missing, a key that is taken) would fail again in the same way.
    for shard in plan.shards(frozenset(retry)) if retry else ():
        runs = {(clip.key, storage.basename(clip.source)): (clip.key, clip.source) for clip in shard.clips if clip.reason is None}
        tried = {runs[key, name]: None for key, source in retry[shard.name] if (key, name := storage.basename(source)) in runs}
        retry[shard.name] = tried
    retry = {name: tried for name, tried in retry.items() if tried}
    replaces = {name: tuple(committed_sha256(root, name) for root in outputs) for name in retry}
    return Todo(plan, missing, retry, replaces)


def _totals(root: str, *, anew: bool) -> Totals:
    if anew:
        storage.sweep(root)
        return write_manifest(root)
    return totals(root)


def stage_report(stage: Stage, summary: Summary, ran: Ran, plan: Plan, config: JobOptions) -> StageReport:
    """What the report page says of a stage."""
    info = read_info(stage.outputs[-1])
    return StageReport(
        name=stage.name,
        snapshot=ran.snapshot,
        total=plan.clips,
        done_before=plan.clips - ran.total,
        workers=ran.workers,
        actors=ran.workers if stage.networks else 0,
        device=stage.device,
        wall_seconds=ran.seconds,
        out=stage.outputs[-1],
        fingerprint=info.fingerprint,
        options=to_plain(config),
        ok=summary.ok,
        failed=summary.failed,
        restarted=ran.restarted_units,
    )


def finish(summary: Summary, reports: Sequence[StageReport], *, stage: str, out: str, max_failed_fraction: float, dataset: str = "") -> None:
    """Write the report page and print the last line of a job. Raises JobError if too many clips failed, or all of them.

    `dataset` is the one that shows the failures, where that is not `out` itself.
    """
    if missing := summary.reasons["missing"]:
        print(f"{stage}: {listed_text(summary.ok + summary.failed, missing)}", flush=True)
    print(f"{stage}: {summary.text()} -> {out}", flush=True)
    if reports:
        page = storage.join(out, "report.html")
        write_report(page, reports, title=f"soundshard {stage}", command=shlex.join(["soundshard", stage, *sys.argv[2:]]))
        print(f"{stage}: report in {page}", flush=True)
    total = summary.ok + summary.failed
    if total and (summary.ok == 0 or summary.failed > max_failed_fraction * total):
        raise JobError(
            f"{stage}: {summary.failed} of {total} clips failed, more than max_failed_fraction={max_failed_fraction:g} allows"
            f"{' (none is good)' if summary.ok == 0 else ''}. What is done is kept; "
            f"`soundshard inspect {dataset or out}` shows the failures by reason, and retry_failed=true tries them again."
        )
