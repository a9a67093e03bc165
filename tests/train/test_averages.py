"""Averaged weights: the mean itself, that nothing else changes, that resuming does not show, and that validation is of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.run_folder import read_model
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from tests.train.data import TEN_STEPS, small_config, write_features
from train.averages import EmaConfig
from train.callbacks import read_metrics
from train.vaura import run

AVERAGED = [*TEN_STEPS, "ema.decay=0.4", "trainer.keep_every=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("data") / "features", clips=23, validation=7)


@pytest.fixture(scope="module")
def averaged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(small_config(data, tmp_path_factory.mktemp("averaged"), *AVERAGED))


def same(left: Path, right: Path, name: str) -> bool:
    one, other = (load_file(folder / f"{name}.safetensors") for folder in (left, right))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def losses(folder: Path, split: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if row["split"] == split]


def test_decay_grows_until_it_is_the_one_given() -> None:
    assert [EmaConfig(decay=0.4).keeps(step) for step in (1, 2, 5, 6, 100)] == pytest.approx([2 / 11, 3 / 12, 6 / 15, 0.4, 0.4])
    with pytest.raises(ValueError, match="expected 0"):
        EmaConfig(decay=1.0)


def test_the_average_is_that_of_every_step(averaged: Path) -> None:
    steps = [torch.load(averaged / f"checkpoints/step-{step:09d}.ckpt", weights_only=True)["state_dict"] for step in range(1, 11)]
    # The first step has a learning rate of 0, so that its weights are the start.
    expected = {name: tensor.clone() for name, tensor in steps[0].items()}
    for step, state in enumerate(steps, start=1):
        for name, tensor in state.items():
            expected[name] += (1 - min(0.4, (1 + step) / (10 + step))) * (tensor - expected[name])
    found, latest = load_file(averaged / "ema.safetensors"), load_file(averaged / "model.safetensors")
    assert found.keys() == latest.keys() and not torch.equal(found["norm.weight"], latest["norm.weight"])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[f"model.{name}"], rtol=1e-5, atol=1e-6)


def test_training_does_not_notice_and_validation_is_of_the_average(data: Path, averaged: Path, tmp_path: Path) -> None:
    plain = run(small_config(data, tmp_path / "plain", *TEN_STEPS))
    apart = run(small_config(data, tmp_path / "apart", *AVERAGED, "ema.validates=false"))
    assert same(plain, averaged, "model") and same(averaged, apart, "ema") and same(plain, apart, "best")
    assert losses(plain, "validation") == losses(apart, "validation") != losses(averaged, "validation")
    windows = next(iter(FeatureStream(Index.open(data, "validation"), StreamConfig(batch_size=7, segments=2), 0, 1, shuffle=False)))
    with torch.inference_mode():
        loss = read_model(averaged, name="ema").training_loss(windows["codes"], windows["features"].flatten(1, 2).float()).total
    assert losses(averaged, "validation")[-1] == (10, pytest.approx(loss.item(), abs=1e-5))
    # The best weights are those that were validated.
    best = torch.load(averaged / "checkpoints/best.ckpt", weights_only=True)
    assert all(torch.equal(tensor, best["ema"][name]) for name, tensor in load_file(averaged / "best.safetensors").items() if name in best["ema"])


def test_resuming_and_accumulating_do_not_show(data: Path, averaged: Path, tmp_path: Path) -> None:
    run(small_config(data, tmp_path, *AVERAGED, "trainer.max_steps=6"))
    run(small_config(data, tmp_path, *AVERAGED))
    assert same(averaged, tmp_path, "ema") and same(averaged, tmp_path, "best")
    assert losses(averaged, "validation") == losses(tmp_path, "validation")


def test_an_average_can_begin_later(data: Path, tmp_path: Path) -> None:
    run(small_config(data, tmp_path, *TEN_STEPS, "trainer.max_steps=6"))
    with pytest.raises(ValueError, match=r"ema.decay: 0.0 there, 0.4 here"):
        run(small_config(data, tmp_path, *AVERAGED))
    run(small_config(data, tmp_path, *AVERAGED, "trainer.ckpt_path=last"))
    assert (tmp_path / "ema.safetensors").is_file()
