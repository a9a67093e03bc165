"""A preparation on a cluster that is being destroyed, checked against one that was left alone.

    python -m tests.chaos.run [clips=300] [bad=30] [seed=0] [nodes=3] [storage=s3|local] [kill_seconds=3] [kills=N] [node_kills=2] [job=prepare]

Makes the clips (a tenth of them bad: broken files, and ones that crash, hang or bloat the decoder), prepares them undisturbed on a local Ray into a
folder, then on a simulated cluster into an S3 server while a seeded script kills a worker process every few seconds and takes whole nodes away.
Then: every good clip exactly once, every bad one a row with its reason, shards byte-identical, nothing stray. The last line is JSON; the exit
status is 1 if anything is wrong.
"""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs import storage
from tests.chaos.harness import BAD, Driver, Nodes, check, command_of, make_inputs, marking, sha256s, started, wait_for
from tests.pipeline.networks import small_networks
from tests.s3 import server

LONGEST_SECONDS = 1500


@dataclass
class Chaos:
    """Kills workers and takes nodes away until told to stop; the choices follow from the seed, the moments from the machine."""

    nodes: Nodes
    driver: Driver
    seed: int
    kill_seconds: float
    kills: int
    """Workers at most. A slow machine starts them more slowly than they are killed."""
    node_kills: int
    killed: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        """Until the driver ends."""
        choice, began, node_times = random.Random(self.seed), time.monotonic(), [8.0 + 15 * n for n in range(self.node_kills)]
        while self.driver.process.poll() is None and time.monotonic() - began < LONGEST_SECONDS:
            time.sleep(min(4 * self.kill_seconds, choice.expovariate(1 / self.kill_seconds)))
            if self.kills > 0 and (workers := self.nodes.workers()):
                victim = choice.choice(sorted(workers))
                name = command_of(victim).split("(")[0].removeprefix("ray::").strip()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    self.killed[f"worker {name}"] += 1
                    self.kills -= 1
            if node_times and time.monotonic() - began > node_times[0] and self.driver.process.poll() is None:
                node_times.pop(0)
                number = choice.randrange(len(self.nodes.nodes))
                if choice.random() < 0.5:
                    self.nodes.remove(number)
                    self.killed["node"] += 1
                else:
                    self.nodes.kill_raylet(number)
                    self.killed["raylet"] += 1
                time.sleep(2)
                self.nodes.add()


def run(
    *, clips: int, bad: int, seed: int, nodes: int, remote: bool, kill_seconds: float, kills: int, node_kills: int, job: str, folder: Path
) -> dict:
    """The whole experiment; returns its figures, `wrong` among them."""
    expected = make_inputs(folder / "in", clips, bad=bad, seed=seed, kinds=BAD)
    networks = small_networks(folder)
    arguments = [f"source={folder / 'in'}", "encode.short_side=64", "encode.preset=ultrafast", "clips_per_shard=23", "clip_seconds=3"]
    arguments += ["clip_memory_mb=600"]
    if job == "prepare":
        arguments += [f"tower.weights={networks['tower']}", f"codec.weights={networks['codec']}", "tower.device=cpu", "actors=2", "chunk_clips=4"]
    with contextlib.ExitStack() as stack:
        mark = stack.enter_context(marking())
        calm = Driver(job, *arguments, f"out={folder / 'calm'}", "ray.num_cpus=2", poison=True)
        began = time.monotonic()
        status = calm.wait()
        calm_seconds = time.monotonic() - began
        assert status == 0, calm.text
        s3 = stack.enter_context(server()) if remote else None
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in (s3.environment if s3 else {}).items():
            patch.setenv(name, value)
        out = f"{s3.url}/chaos" if s3 else str(folder / "chaos")
        poison = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "poison"), os.environ.get("PYTHONPATH", "")])}
        cluster = stack.enter_context(Nodes({**poison, **(s3.environment if s3 else {})}, nodes))
        driver = Driver(job, *arguments, f"out={out}", f"ray.address={cluster.cluster.address}", "freeze_seconds=20")
        chaos = Chaos(cluster, driver, seed, kill_seconds, kills, node_kills)
        began = time.monotonic()
        chaos.run()
        seconds = time.monotonic() - began
        status = driver.wait()
        time.sleep(3)
        print(driver.text)
        wrong = [] if status == 0 else [f"exit status {status}: {driver.text[-2000:]}"]
        for dataset in () if wrong else ("media", "features") if job == "prepare" else ("",):
            root, reference = (storage.join(out, dataset), str(folder / "calm" / dataset)) if dataset else (out, str(folder / "calm"))
            wrong += [f"{dataset}: {line}" for line in check(root, folder / "in", expected)]
            if sha256s(root) != sha256s(reference):
                wrong.append(f"{dataset}: other bytes than in the undisturbed run")
        if s3 and (unfinished := s3.unfinished_uploads()):
            wrong.append(f"unfinished uploads {unfinished}")
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not started(mark), 10)
    if stray := [command_of(process) for process in started(mark)]:
        wrong.append(f"stray processes {stray}")
    return {
        "clips": clips,
        "bad": bad,
        "seed": seed,
        "nodes": nodes,
        "storage": "s3" if remote else "local",
        "killed": dict(chaos.killed),
        "calm_seconds": round(calm_seconds, 1),
        "chaos_seconds": round(seconds, 1),
        "wrong": wrong,
    }


def main(argv: list[str]) -> int:
    """Parse `key=value`, run, print."""
    options = dict(argument.split("=") for argument in argv)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        clips = int(options.get("clips", 300))
        figures = run(
            clips=clips,
            bad=int(options.get("bad", clips // 10)),
            seed=int(options.get("seed", 0)),
            nodes=int(options.get("nodes", 3)),
            remote=options.get("storage", "s3") == "s3",
            kill_seconds=float(options.get("kill_seconds", 3)),
            kills=int(options.get("kills", clips)),
            node_kills=int(options.get("node_kills", 2)),
            job=options.get("job", "prepare"),
            folder=Path(folder),
        )
    print(json.dumps(figures))
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
