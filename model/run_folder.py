"""A run folder: what training leaves and generation reads. `config.yaml` says what was trained on what; safetensors files hold the weights.

The published V-AURA checkpoint is made into one too (`released.py`).

Knows YAML and the decoder's class. Knows no trainer, no dataset and no codec: what it records of them are plain values.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from configs import storage
from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_TOKENS, CodecClock
from model.vaura import Vaura, VauraConfig
from model.weights import load_state, load_strictly, save_state, sha256_file

CONFIG = "config.yaml"
RELEASED = "vaura"
"""The name of the published model, and of its run folder in the cache."""
LAST, BEST = "model", "best"
"""Names of the weights files, without `.safetensors`: the latest step's, and those of the smallest validation loss."""


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run but its weights: enough to generate with them, and to repeat the run."""

    model: VauraConfig
    """The decoder's sizes and rates."""
    window_segments: int
    """Segments of a training window, and the longest that generation makes at once."""
    data: dict[str, Any]
    """The feature dataset's `fingerprint` and `spec` (tower, codec, hop), as its dataset.json has them."""
    train: dict[str, Any] = field(default_factory=dict)
    """The training job's configuration, resolved."""
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`tower` and `codec`: where the networks' weights are (`path`, relative to the run folder if copied into it; `sha256`)."""
    released: bool = False
    """Whether this is the published model. In its windows a token is always seen by 7 codec steps, though its codec has 441/64 in a token's time
    (`codec_clock`); generation may then also take the published sliding window."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the weights of a converted checkpoint came from: `file` and its `sha256`, `archive`, `epoch`, `step` and `val_loss` where known."""

    @property
    def codec_clock(self) -> CodecClock:
        """Steps of the codec that the model was trained on."""
        return CodecClock(self.data["spec"]["codec"]["sample_rate_hz"], self.data["spec"]["codec"]["hop_samples"])

    def weights_path(self, folder: str | os.PathLike, name: str) -> Path | None:
        """The weights file of `tower` or `codec`: an absolute path, or None where nothing was recorded."""
        path = self.weights.get(name, {}).get("path")
        return None if path is None else Path(folder).absolute() / path

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed from: the data's spec and the network's sizes. Plain values."""
        data = {"fingerprint": self.data["fingerprint"], "spec": self.data["spec"]}
        return {**data, "model": dict(vars(self.model)), "window_segments": self.window_segments}

    @staticmethod
    def completed(identity: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's identity of an earlier version: sizes that it does not name came after it, and have their defaults there."""
        return {**identity, "model": dict(vars(VauraConfig(**identity["model"])))}


def write_config(folder: str | os.PathLike, config: RunConfig) -> None:
    """Write `config.yaml`, whole or not at all."""
    clock = config.codec_clock
    plain = {
        "kind": "vaura",
        "model": asdict(config.model),
        "window_segments": config.window_segments,
        "clock": {
            "frame_rate_hz": FRAME_RATE_HZ,
            "segment_frames": SEGMENT_FRAMES,
            "segment_tokens": SEGMENT_TOKENS,
            "codec_sample_rate_hz": clock.sample_rate_hz,
            "codec_hop_samples": clock.hop_samples,
            "window_steps": clock.steps_in(config.window_segments),
        },
        "data": config.data,
        "weights": config.weights,
        "released": config.released,
        "origin": config.origin,
        "train": config.train,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    writer = "weights" if config.released else "train"
    text = f"# What was trained, on what, and how. Written by `soundshard {writer}`; `soundshard generate run=THIS_FOLDER` reads it.\n"
    temporary = Path(folder) / f".{CONFIG}.tmp"
    temporary.write_text(text + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120))
    os.replace(temporary, Path(folder) / CONFIG)


def read_config(folder: str | os.PathLike) -> RunConfig:
    """The `config.yaml` of a run folder. ValueError if there is none, or it is not one of ours."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {CONFIG}; expected one that `soundshard train` or `weights get=vaura` wrote")
    plain = yaml.safe_load(path.read_text())
    if not isinstance(plain, dict) or plain.get("kind") != "vaura":
        raise ValueError(f"{path} does not describe a V-AURA run: expected `kind: vaura` in it")
    try:
        # Folders of earlier versions lack what has a default.
        optional = {name: plain[name] for name in ("train", "weights", "released", "origin") if name in plain}
        return RunConfig(VauraConfig(**plain["model"]), plain["window_segments"], plain["data"], **optional)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run's configuration: {type(error).__name__}: {error}; was it edited?") from error


def write_model(folder: str | os.PathLike, model: Vaura, *, name: str = LAST) -> None:
    """Write the decoder's weights under the released names, with its configuration in the file's metadata; whole or not at all."""
    write_state(folder, model.state_dict(), model.config, name=name)


def write_state(folder: str | os.PathLike, state: Mapping[str, torch.Tensor], config: VauraConfig, *, name: str = LAST) -> None:
    """`write_model` for a decoder whose tensors are at hand and not in one piece."""
    save_state(Path(folder) / f"{name}.safetensors", state, asdict(config))


def named_run(name: str) -> str:
    """A run folder's absolute path or address; `vaura`, if there is no folder of that name, is the converted published model in the cache."""
    if name != RELEASED or Path(name).exists():
        return storage.absolute(name)
    path = storage.cache_dir() / RELEASED
    if not (path / CONFIG).is_file():
        raise ValueError(f"run={name}: not in the cache; `soundshard weights get=vaura` makes it, with file= from a checkpoint that you have")
    return str(path)


def local_run(folder: str | os.PathLike) -> str:
    """A run folder on this machine: the folder itself, or the cached copy of one in an object store."""
    return os.fspath(storage.local_folder(folder))


def weights_file(folder: str | os.PathLike, name: str) -> Path:
    """The file of a run's weights called `name`; ValueError with the names there are."""
    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in Path(folder).glob("*.safetensors")))
        raise ValueError(f"{path} does not exist; the run folder has {there or 'no weights yet: training writes them with its first checkpoint'}")
    return path


def read_model(folder: str | os.PathLike, *, name: str = LAST) -> Vaura:
    """The decoder of a run folder, on the CPU in evaluation mode. `name`: `model` (the latest), `best` (the smallest validation loss) or `ema`."""
    path = weights_file(folder, name)
    tensors, config = load_state(path)
    if config is None:
        raise ValueError(f"{path} has no configuration in its metadata; expected a file that `soundshard train` wrote")
    with torch.device("meta"):  # without random weights, which at full size take longer to draw than these to read
        model = Vaura(VauraConfig(**config))
    load_strictly(model, {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, source=path, assign=True)
    return model.eval()


def copy_weights(folder: str | os.PathLike, config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Copy the networks' weights files into `weights/`, so that the folder needs nothing else.

    Returns the configuration with the new paths, and a line for each file that could not be copied (absent here, or with another sha256).
    """
    weights, problems = copied_weights(folder, config.weights)
    return replace(config, weights=weights), problems


def copied_weights(folder: str | os.PathLike, weights: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`copy_weights` of references by name, whatever they are of. A file that serves for several is copied once."""
    copied, problems, copies = {name: dict(reference) for name, reference in weights.items()}, [], {}
    for name, reference in weights.items():
        if reference.get("path") is None:
            continue
        source = Path(folder).absolute() / reference["path"]
        copy = copies.setdefault(reference.get("sha256"), Path(folder) / "weights" / f"{name}{source.suffix}")
        if not _holds(copy, reference):
            if not _holds(source, reference):
                problems.append(f"{name}: {source} is {'another file than the dataset was made with' if source.is_file() else 'not here'}")
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy.with_name(f".{copy.name}.tmp"))
            os.replace(copy.with_name(f".{copy.name}.tmp"), copy)
        copied[name]["path"] = str(copy.relative_to(folder))
    return copied, problems


def _holds(path: Path, reference: Mapping[str, Any]) -> bool:
    return path.is_file() and sha256_file(path) == reference.get("sha256")


def read_run_folder(folder: str | os.PathLike, *, name: str = LAST) -> tuple[RunConfig, Vaura]:
    """What generation needs: the run's configuration and its decoder, in evaluation mode."""
    return read_config(folder), read_model(folder, name=name)


def weights_references(provenance: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The `weights` of a dataset's provenance as a run records them: `tower` and `codec`, each with `path` and `sha256` where known."""
    return {name: dict(reference) for name, reference in provenance.get("weights", {}).items() if reference}
