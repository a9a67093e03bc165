"""A simulated cluster to break: several Ray nodes on this machine, the job's driver as a process of its own, and ways to hurt both.

Linux only: processes are found through /proc.
"""

import contextlib
import hashlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from configs import storage
from tests.pipeline.clips import make_clip

POISON = Path(__file__).parent / "poison"
CLUSTER = {
    # Nodes and driver meet on the loopback address, to which Ray otherwise prefers the machine's own.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own check for dead nodes, as the cluster recipes set it.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
NOT_WORKING = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::Sentinel")
BAD = ("truncated", "text", "empty", "silent", "segfault", "hang", "hog")


def make_inputs(folder: Path, count: int, *, bad: int, seed: int = 0, kinds: Sequence[str] = BAD, distinct: int = 12) -> dict[str, str]:
    """`count` clips, of which `bad` are bad in turn in the given ways; returns the expected reason of every bad key.

    Only `distinct` good clips are encoded; the others are their copies under other names, which is all that a job can tell apart.
    """
    folder.mkdir(parents=True)
    originals = folder.parent / f"{folder.name}-originals"
    originals.mkdir()
    for number in range(distinct):
        make_clip(originals / f"{number}.mp4", flash_picture=10 + 2 * number, seconds=2 if number % 3 else 3)
    make_clip(originals / "silent.mp4", audio_codec=None)
    whole = (originals / "0.mp4").read_bytes()
    places = sorted(random.Random(seed).sample(range(count), bad))
    reasons = {
        "truncated": "truncated",
        "text": "undecodable",
        "empty": "empty",
        "silent": "no_audio",
        "segfault": "crashed",
        "hang": "timeout",
        "hog": "out_of_memory",
    }
    expected = {}
    for number in range(count):
        if number not in places:
            shutil.copy(originals / f"{number % distinct}.mp4", folder / f"good{number:05d}.mp4")
            continue
        kind = kinds[places.index(number) % len(kinds)]
        path = folder / f"{kind}{number:05d}.mp4"
        path.write_bytes({"truncated": whole[: len(whole) // 3], "text": b"no video\n" * 99, "empty": b""}.get(kind, whole))
        if kind == "silent":
            shutil.copy(originals / "silent.mp4", path)
        expected[path.stem] = reasons[kind]
    shutil.rmtree(originals)
    return expected


@dataclass
class Nodes:
    """A cluster whose head has no processors (the driver's place) and whose other nodes do the work."""

    environment: Mapping[str, str] = field(default_factory=dict)
    count: int = 3
    cpus: int = 1

    def __enter__(self) -> "Nodes":
        self._before = dict(os.environ)
        os.environ.update({**CLUSTER, **self.environment})
        common = {"include_dashboard": False, "node_ip_address": "127.0.0.1"}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20, **common})
        self.nodes: list[Any] = []
        for _ in range(self.count):
            self.add()
        self.cluster.wait_for_nodes()
        return self

    def add(self) -> None:
        """Start another node."""
        self.nodes.append(self.cluster.add_node(num_cpus=self.cpus, object_store_memory=80 << 20, node_ip_address="127.0.0.1", wait=False))

    def remove(self, number: int) -> None:
        """A node goes away without a word."""
        self.cluster.remove_node(self.nodes.pop(number), allow_graceful=False)

    def kill_raylet(self, number: int) -> None:
        """The node's own process dies; what it started notices by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(raylet_of(self.nodes[number]), signal.SIGKILL)
        self.nodes.pop(number)

    def freeze(self, number: int) -> list[int]:
        """Stop every process of a node, as a machine does that swaps or hangs on a file system; returns them."""
        raylet = raylet_of(self.nodes[number])
        frozen = [raylet, *descendants(raylet)]
        for process in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        return frozen

    def workers(self, name: str = "ray::") -> list[int]:
        """The nodes' worker processes that do something of that name now."""
        found = [process for node in self.nodes for process in descendants(raylet_of(node))]
        return [process for process in found if (command := command_of(process)).startswith(name) and not command.startswith(NOT_WORKING)]

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:  # a stopped process does not hear that it should end
            for process in descendants(raylet_of(node)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
        self.cluster.shutdown()
        os.environ.clear()
        os.environ.update(self._before)


def raylet_of(node: Any) -> int:
    """The process number of a node's raylet."""
    return node.all_processes["raylet"][0].process.pid


def descendants(process: int) -> list[int]:
    """All processes below one, found through their parents."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError):
            if entry.isdigit():
                children.setdefault(int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]), []).append(int(entry))
    found, queue = [], [process]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def command_of(process: int) -> str:
    """A process's command line; empty once it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


@contextlib.contextmanager
def marking() -> Iterator[str]:
    """All that is started within, and all that this starts, has the mark in its environment: `started` knows it from what other tests run."""
    mark = f"SOUNDSHARD_TEST={secrets.token_hex(8)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*mark.split("="))
        yield mark


def started(mark: str) -> list[int]:
    """Every living process that has this mark, whoever its parent is by now."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and mark.encode() in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


def decoders(mark: str) -> list[int]:
    """The isolated decoding processes that have this mark."""
    return [process for process in started(mark) if "-m pipeline.isolate" in command_of(process)]


class Driver:
    """A `soundshard` command in a process of its own."""

    def __init__(self, job: str, *arguments: str, environment: Mapping[str, str] | None = None, poison: bool = False) -> None:
        path = [str(POISON)] if poison else []
        inherited = {**os.environ, **(environment or {})}
        paths = [*path, *filter(None, [inherited.get("PYTHONPATH")])]
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self.process = subprocess.Popen(
            [sys.executable, "-m", "configs.cli", job, *arguments],
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            env={**inherited, "PYTHONPATH": os.pathsep.join(paths), "RAY_AUTH_MODE": "disabled"},
        )
        self.text = ""

    def wait(self, seconds: float = 600.0) -> int:
        """The exit status; what was printed is in `text`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {seconds:.0f} s; it printed:\n{self.text[-4000:]}") from None
        self._read()
        return self.process.returncode

    def kill(self) -> None:
        """As a machine that loses its power."""
        self.process.kill()
        self.process.wait()
        self._read()

    def _read(self) -> None:
        self._printed.seek(0)
        self.text = self._printed.read().decode(errors="replace")


def sha256s(root: str) -> dict[str, str]:
    """Every shard's own sha256, from the tars' bytes."""
    found = {}
    for name in storage.names(root):
        if name.endswith(".tar"):
            found[name] = hashlib.sha256(storage.read_bytes(storage.join(root, name))).hexdigest()
    return found


def rows(root: str) -> list[dict]:
    """The manifest's rows."""
    return pq.read_table(storage.local_copy(storage.join(root, "manifest.parquet"))).to_pylist()


def check(root: str, inputs: Path, expected: Mapping[str, str]) -> list[str]:
    """What is wrong with a finished dataset: every good clip once, every bad one a row with its reason, nothing stray. Empty if all is well."""
    wrong, table = [], rows(root)
    keys = Counter(row["key"] for row in table)
    there = {path.stem for path in inputs.iterdir()}
    wrong += [f"{key} has {count} rows" for key, count in keys.items() if count != 1]
    wrong += [f"{key} has no row" for key in there - set(keys)] + [f"{key} was never an input" for key in set(keys) - there]
    found = {row["key"]: row["reason"] for row in table if row["status"] == "failed"}
    wrong += [
        f"{key}: {found.get(key, 'ok')}, expected {expected.get(key, 'ok')}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    wrong += [f"no message for {row['key']}" for row in table if row["status"] == "failed" and not row["message"]]
    shards = {row["shard"] for row in table}
    usual = {"dataset.json", "manifest.parquet", "plan.parquet", "report.html", *(f"{s}.tar" for s in shards), *(f"{s}.parquet" for s in shards)}
    stray = set(storage.names(root)) - usual
    if not storage.is_remote(root):
        stray |= {name for name in os.listdir(root) if name.startswith(".")}
    return wrong + [f"stray {name}" for name in sorted(stray)]


@contextlib.contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[bool]:
    """A small file system of its own at `folder`; False where this user may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not hold within {seconds:.0f} s"
        time.sleep(0.05)
