"""Commands one after another, each a `soundshard` job in a process of its own: shown as typed, timed, and not run again once done.

Knows nothing of what the jobs do. A job's own resume is what makes an interrupted step cheap to take up again.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.load import JobError

PATIENCE_SECONDS = 30
"""For a command that was interrupted to put down what it holds."""


@dataclass(frozen=True)
class Step:
    """One command and the folder that it fills."""

    job: str
    arguments: tuple[str, ...]
    product: Path

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(["soundshard", self.job, *self.arguments])


@dataclass(frozen=True)
class Ran:
    """A step that is done, and the seconds that it took when it ran."""

    step: Step
    seconds: float


def make_step(job: str, options: Mapping[str, Any], *, product: Path) -> Step:
    """The command of a job with these options; nested sections become dotted keys."""
    return Step(job, tuple(f"{key}={as_argument(value)}" for key, value in flatten(options).items()), product)


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def as_argument(value: Any) -> str:
    """A value as it is written after `key=`."""
    if isinstance(value, str | Path):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def run_steps(steps: Sequence[Step], stamps: Path) -> list[Ran]:
    """Run the commands that are not done. A command is done if the same one ended well here, and none before it has run again since."""
    stamps.mkdir(parents=True, exist_ok=True)
    ran, untouched = [], True
    for number, step in enumerate(steps, 1):
        stamp = _Stamp(stamps / f"{step.job}.json", step)
        untouched = untouched and stamp.done
        print(f"\n[{number}/{len(steps)}] {step.command}{'   (done)' if untouched else ''}", flush=True)
        if not untouched:
            stamp.run()
        ran.append(Ran(step, stamp.seconds))
    return ran


class _Stamp:
    """What is known of a step's last run, in a file."""

    def __init__(self, path: Path, step: Step) -> None:
        self._path, self._step = path, step
        known = json.loads(path.read_text()) if path.is_file() else {}
        same = known.get("command") == step.command
        self.done = same and known["done"] and step.product.exists()
        self.seconds: float = known["seconds"] if same else 0.0

    def run(self) -> None:
        """Run the step. One that is taken up again after an interruption has taken the time of both parts."""
        before = 0.0 if self.done else self.seconds
        start, self.done = time.perf_counter(), False
        try:
            run_command(self._step)
            self.done = True
        finally:
            self.seconds = before + time.perf_counter() - start
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps({"command": self._step.command, "seconds": self.seconds, "done": self.done}))
            part.replace(self._path)


def run_command(step: Step) -> None:
    """Run one command, its output where this one's goes. Ctrl-C reaches the command too, and it is waited for."""
    process = subprocess.Popen([sys.executable, "-m", "configs.cli", step.job, *step.arguments])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        _wait_or_end(process)
        raise
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise JobError(f"`{step.command}` ended with status {status}; its own message is above. Run the same command again to go on from there")


def _wait_or_end(process: subprocess.Popen) -> None:
    try:
        process.wait(PATIENCE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()
        process.wait()
