"""A run folder of Synchformer's training: `config.yaml` says what was trained on what; safetensors files hold the weights.

Stage I leaves both towers (`avclip.py` reads the file). Stages II and III leave what is above the towers, which stay as they were: their files are
copied into `weights/`, and the weights file says so, so that `load_synchformer` puts the whole network together.

Knows YAML and the networks' configurations. Knows no trainer and no dataset: what it records of them are plain values.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from model import avclip, synchformer
from model.run_folder import CONFIG, copied_weights
from model.synchformer import SyncConfig
from model.weights import save_state

Stage = Literal[1, 2, 3]
TOWERS = {"tower": "visual", "audio": "audio"}
"""Names of the towers' weights in a dataset's provenance, and in the network's configuration."""


@dataclass(frozen=True)
class SyncRun:
    """Everything about a run but its weights."""

    stage: Stage
    """1: both towers; 2: the offset; 3: whether there is one."""
    visual: dict[str, Any]
    """The visual tower's configuration, with its `kind`."""
    audio: dict[str, Any]
    """The audio tower's configuration."""
    sync: SyncConfig | None
    """What is above the towers, in stages 2 and 3."""
    data: dict[str, Any]
    """The dataset's `fingerprint` and `spec`, as its dataset.json has them."""
    train: dict[str, Any] = field(default_factory=dict)
    """The training job's configuration, resolved."""
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`tower` and `audio` in stages 2 and 3: where the towers' weights are (`path`, relative to the run folder if copied into it; `sha256`)."""
    start: dict[str, Any] = field(default_factory=dict)
    """`file` and `sha256` of the weights that training started from; empty: from random ones."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed from. Plain values."""
        towers = {name: reference.get("sha256") for name, reference in self.weights.items()}
        network = {"stage": self.stage, "visual": self.visual, "audio": self.audio, "sync": asdict(self.sync) if self.sync else None}
        return {**network, "towers": towers, "fingerprint": self.data["fingerprint"], "spec": self.data["spec"]}

    @staticmethod
    def completed(identity: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's identity of an earlier version."""
        return dict(identity)


class SyncFiles:
    """What the run folder gets beside checkpoints."""

    def __init__(self, folder: Path, run: SyncRun, *, copies_weights: bool) -> None:
        self._folder, self._run, self._copies_weights = folder, run, copies_weights

    def begin(self) -> list[str]:
        """Writes the configuration and copies the towers' weights; a line for each file that could not be copied."""
        weights, problems = copied_weights(self._folder, self._run.weights) if self._copies_weights else (self._run.weights, [])
        self._run = replace(self._run, weights=weights)
        write_config(self._folder, self._run)
        return problems

    def write(self, state: Mapping[str, Tensor], name: str) -> None:
        """Weights, as the file `name`.safetensors; whole or not at all."""
        run = self._run
        if run.sync is None:
            settings = {"kind": avclip.KIND, "visual": run.visual, "audio": run.audio}
        else:
            towers = {TOWERS[tower]: reference for tower, reference in run.weights.items()}
            settings = {"kind": synchformer.MODULE_KIND, "visual": run.visual, "audio": run.audio, "sync": asdict(run.sync), "towers": towers}
        save_state(self._folder / f"{name}.safetensors", state, settings)


def write_config(folder: Path, run: SyncRun) -> None:
    """Write `config.yaml`, whole or not at all."""
    plain = {"kind": synchformer.KIND, "clock": {"frame_rate_hz": FRAME_RATE_HZ, "segment_frames": SEGMENT_FRAMES}, **asdict(run)}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{CONFIG}.tmp"
    reader = "tower.weights= and audio.weights=" if run.stage == 1 else "`soundshard sync weights=THIS_FOLDER`"
    text = f"# What was trained, on what, and how. Written by `soundshard train.sync stage={run.stage}`; {reader} takes its weights.\n"
    temporary.write_text(text + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120))
    os.replace(temporary, folder / CONFIG)


def read_config(folder: Path) -> SyncRun:
    """The `config.yaml` of a run folder of `soundshard train.sync`. ValueError if there is none, or it is another job's."""
    path = folder / CONFIG
    plain = yaml.safe_load(path.read_text()) if path.is_file() else None
    if not isinstance(plain, dict) or plain.get("kind") != synchformer.KIND:
        raise ValueError(f"{folder} is no run folder of Synchformer's training: expected one that `soundshard train.sync` wrote, with {CONFIG}")
    sync = None if plain["sync"] is None else SyncConfig(**plain["sync"])
    optional = {name: plain[name] for name in ("train", "weights", "start") if name in plain}
    return SyncRun(plain["stage"], plain["visual"], plain["audio"], sync, plain["data"], **optional)
