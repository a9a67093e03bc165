"""`soundshard verify`: whether a dataset is, to the last byte, what was written; and what of it can be put right.

Knows options, how far it is, and how to say what was found. What is looked at, `shards.check_dataset` knows; what is put right, `shards.repair`.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs import storage
from configs.load import JobError, job_main
from shards.check_dataset import TarResult, Verified, check_dataset
from shards.check_rows import Problem
from shards.repair import redo, repair

LOG_SECONDS = 30.0
"""Between two lines of progress in a log."""
SHOWN = 50
"""Problems that are printed; the report has all."""
MOST_WORKERS = 8
OLDEST_SECONDS = 7 * 24 * 3600.0
"""An interrupted run goes on from what one of so long ago has read, not from older."""


@dataclass(frozen=True)
class VerifyConfig:
    """Options of `soundshard verify`."""

    dataset: str = "???"
    """Folder or object-store prefix of a media or feature dataset, or of a view."""
    repair: bool = False
    """Put right what can be: the manifest from the ledgers, a ledger from the manifest or its tar, a tar's headers from its ledger, tars that were
    exchanged. Nothing that is good is touched, and nothing is guessed where a hash can prove it."""
    redo: bool = False
    """Remove the shards that are broken (after `repair`, if that is asked for too), so that the job that made the dataset makes them again."""
    report: str = ""
    """Also write what was found to this file, as JSON."""
    workers: int = 0
    """Tars read at a time; 0 takes as many as there are processors, up to 8."""
    resume: bool = True
    """After an interrupted run, leave out the tars that it had read, if they are the same files still."""


def run(config: VerifyConfig) -> None:
    """Read every byte of a dataset and compare it with what was written; tell what is broken, and put right what can be.

    Exit status 1 where something is (still) broken. Of a view the rows are compared with its parent's ledgers. An interrupted run goes on.
    """
    root = config.dataset.rstrip("/") or config.dataset
    workers = config.workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    if workers < 1:
        raise ValueError(f"workers is {config.workers}; expected at least 1, or 0 for as many as there are processors")
    started, done = time.monotonic(), []
    with State.of(root, resume=config.resume) as state:
        verified = _checked(root, workers, state)
        if config.repair and verified.told.problems:
            done = repair(verified)
            if done:
                print("\n".join(["repaired:", *(f"  {line}" for line in done)]), flush=True)
                verified = _checked(root, workers, state)
        state.finished()
    broken = verified.redo
    for line in _text(verified, time.monotonic() - started, repaired=bool(done)):
        print(line)
    if config.report:
        storage.write_bytes(config.report, _report(verified, done, time.monotonic() - started))
    if config.redo and broken:
        redo(verified)
        print(f"{len(broken)} broken shards are removed; run the job that made them again", flush=True)
    if verified.told.problems:
        raise JobError(_advice(verified, config))


def _checked(root: str, workers: int, state: "State") -> Verified:
    with Progress() as progress:
        return check_dataset(root, workers=workers, memory=state, progress=progress.add, begin=progress.begin)


# --- what an interrupted run leaves ---------------------------------------------------------------------------------------------------


class State:
    """Results of one dataset's tars in a file of the cache folder, a line for each, until a run is finished."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path, self._known, self._file = path, {}, None
        if resume:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime < OLDEST_SECONDS:
                    self._known = dict(_lines(path))
        else:
            path.unlink(missing_ok=True)

    @classmethod
    def of(cls, root: str, *, resume: bool) -> "State":
        """That of the dataset at `root`, on this machine."""
        name = sha256(storage.absolute(root).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return cls(storage.cache_dir() / "verify" / f"{name}.jsonl", resume=resume)

    def __enter__(self) -> "State":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, tar: storage.Stat, ledger_file: storage.Stat | None) -> TarResult | None:
        """What is known of these two files as they are."""
        return self._known.get(_identity(tar, ledger_file))

    def put(self, tar: storage.Stat, ledger_file: storage.Stat | None, result: TarResult) -> None:
        """Keep a result."""
        identity = _identity(tar, ledger_file)
        self._known[identity] = result
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a")  # noqa: SIM115 - open until the run ends
        problems = [dataclasses.astuple(problem) for problem in result.problems]
        self._file.write(json.dumps({"of": identity, "sha256": result.sha256, "problems": problems}) + "\n")
        self._file.flush()

    def finished(self) -> None:
        """The next run begins anew."""
        self._path.unlink(missing_ok=True)


def _identity(tar: storage.Stat, ledger_file: storage.Stat | None) -> str:
    """Both files as they are now."""
    return json.dumps([[file.path, file.size, file.version] if file is not None else None for file in (tar, ledger_file)])


def _lines(path: Path) -> Iterator[tuple[str, TarResult]]:
    """The results in a state file; what was cut off while it was written is left out."""
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept = json.loads(line)
            yield kept["of"], TarResult(kept["sha256"], tuple(Problem(*problem) for problem in kept["problems"]))


# --- how far it is --------------------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = self._shards = self._total_bytes = self._total_shards = 0
        self._bar: Any = None
        self._told = time.monotonic()

    def begin(self, total_bytes: int, total_shards: int) -> None:
        """What there is to read."""
        self._total_bytes, self._total_shards = total_bytes, total_shards
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="verify", leave=False)

    def add(self, count: int, shards: int) -> None:
        """What was just read, and what was just finished."""
        with self._lock:
            self._bytes, self._shards = self._bytes + count, self._shards + shards
            if self._bar is not None:
                self._bar.update(count)
            elif time.monotonic() - self._told > LOG_SECONDS:
                self._told = time.monotonic()
                gigabytes = f"{self._bytes / 1e9:,.1f} of {self._total_bytes / 1e9:,.1f} GB"
                print(f"verify: {self._shards:,} of {self._total_shards:,} shards, {gigabytes}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


# --- what is said ---------------------------------------------------------------------------------------------------------------------


def _text(verified: Verified, seconds: float, *, repaired: bool) -> Iterator[str]:
    told, what = verified.told, "view" if verified.info is not None and verified.info.view is not None else "dataset"
    rate = f" in {seconds:.1f} s ({verified.bytes / 1e6 / max(seconds, 1e-9):,.0f} MB/s)" if verified.bytes and not verified.remembered else ""
    yield (
        f"{what} {verified.root}: {len(verified.shards):,} shards, {verified.ok:,} good and {verified.failed:,} failed clips, "
        f"{verified.bytes / 1e9:,.3f} GB read{rate}"
    )
    if verified.remembered and not repaired:
        yield f"  note: {verified.remembered:,} tars were read by an interrupted run"
    for note in told.notes:
        yield f"  note: {note}"
    if not told.problems:
        yield "  all is as it was written"
        return
    yield f"{len(told.problems)} problem{'s' if len(told.problems) > 1 else ''}:"
    yield from (f"  {problem.text()}" for problem in told.problems[:SHOWN])
    if len(told.problems) > SHOWN:
        yield f"  and {len(told.problems) - SHOWN} more, which report=FILE.json has"
    if verified.redo:
        yield f"shards to redo: {' '.join(verified.redo)}"


def _advice(verified: Verified, config: VerifyConfig) -> str:
    count = len(verified.told.problems)
    ways = [] if config.repair else ["repair=true puts right what can be"]
    if verified.redo and not config.redo:
        ways.append("redo=true removes the broken shards, so that the job that made them makes them again")
    left = f"{verified.root}: {count} problem{'s' if count != 1 else ''}{' left' if config.repair else ''}"
    return f"{left}; {'; '.join(ways)}" if ways else left


def _report(verified: Verified, repaired: Sequence[str], seconds: float) -> bytes:
    """What was found, for programs."""
    found = {
        "dataset": storage.absolute(verified.root),
        "fingerprint": None if verified.info is None else verified.info.fingerprint,
        "shards": len(verified.shards),
        "ok": verified.ok,
        "failed": verified.failed,
        "bytes": verified.bytes,
        "seconds": round(seconds, 3),
        "problems": [dataclasses.asdict(problem) for problem in verified.told.problems],
        "notes": verified.told.notes,
        "redo": verified.redo,
        "repaired": list(repaired),
    }
    return json.dumps(found, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m shards.verify`."""
    return job_main(VerifyConfig, run, argv, command="verify", positional="dataset")


if __name__ == "__main__":
    sys.exit(main())
