"""A model cut up between two processes: the same training, the same files, and a run that changes between one kind and the other."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.data import small_config, write_codec, write_features
from tests.train.test_processes import NO_DRAWS, start
from train.callbacks import read_metrics
from train.trainer import TrainerConfig
from train.vaura import run

OPTIONS = [
    *NO_DRAWS[:1], "model.guidance_dropout=1", "model.train_unconditional=true", "stream.lanes=2", "schedule.total_steps=8", "ema.decay=0.5",
    "trainer.val_check_interval=4", "trainer.log_every=1", "trainer.keep_every=2", "preview.clips=1", "preview.sampling.greedy=true",
]  # fmt: skip
SHARDED = ["trainer.strategy=fsdp", "trainer.devices=2", "trainer.checkpoint_activations=true"]


def finish(job: subprocess.Popen) -> None:
    errors = job.communicate(timeout=300)[1]
    assert job.returncode == 0, errors


def shapes(state: Any) -> Any:
    """The structure of a checkpoint, with shapes and types for tensors."""
    if isinstance(state, dict):
        return {name: shapes(value) for name, value in state.items() if name != "loops"}
    if isinstance(state, list):
        return [shapes(value) for value in state]
    return (tuple(state.shape), state.dtype) if isinstance(state, torch.Tensor) else type(state)


@pytest.mark.slow
def test_sharded_training_is_unsharded_training(tmp_path: Path) -> None:
    # 7 validation clips: one process has a sample more than the other, and with batches of 3 a batch more, in which the other must take part.
    data = write_features(tmp_path / "data", clips=23, validation=7, codec_weights=write_codec(tmp_path / "codec.safetensors"))
    finish(start(data, tmp_path / "parts", *OPTIONS, *SHARDED, "trainer.max_steps=4"))
    run(small_config(data, tmp_path / "whole", *OPTIONS))
    sharded, other = (torch.load(tmp_path / name / "checkpoints/step-000000004.ckpt", weights_only=True) for name in ("parts", "whole"))
    assert shapes(sharded) == shapes(other)
    for part in ("state_dict", "ema"):
        torch.testing.assert_close(sharded[part], other[part], rtol=0, atol=1e-4)
    means = [[state["exp_avg"] for state in each["optimizer_states"][0]["state"].values()] for each in (sharded, other)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-7)
    # On from there in one piece, and then in parts again.
    run(small_config(data, tmp_path / "parts", *OPTIONS, "trainer.max_steps=6"))
    finish(start(data, tmp_path / "parts", *OPTIONS, *SHARDED, "trainer.max_steps=8", "trainer.accumulate=3"))
    rows = [[(r["step"], r["split"], r.get("samples")) for r in read_metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert rows[0] == rows[1]
    curves = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)
    for name in ("model", "ema", "best"):
        left, right = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("parts", "whole"))
        assert {key: tensor.shape for key, tensor in left.items()} == {key: tensor.shape for key, tensor in right.items()}
    assert (tmp_path / "parts/samples/step-000000008/validation0.wav").is_file()


def test_scaled_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer.strategy=fsdp with trainer.precision=16-mixed"):
        TrainerConfig(strategy="fsdp", precision="16-mixed")
