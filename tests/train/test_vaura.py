"""The job: what it derives and refuses, that it learns, that resuming changes nothing, and what it leaves in the run folder."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.load import JobError, load
from model.generate import Sampling, generate
from model.run_folder import read_config, read_model, read_run_folder
from model.vaura import Vaura, VauraConfig, forward_flops
from shards.dataset import fingerprint
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from shards.windows import Batch
from tests.train.data import CARD, CODEBOOKS, TEN_STEPS, WIDTH, small_config, write_features
from train.callbacks import read_metrics
from train.optim import build_optimiser
from train.trainer import TrainerConfig
from train.vaura import ModelOptions, TrainConfig, VauraModule, derive_model, main, run

ENCODEC = {"tower": {"config": {"width": 768}}, "codec": {"sample_rate_hz": 24000, "hop_samples": 320, "codebooks": 8, "card": 1024}}
DAC = {"tower": {"config": {"width": 768}}, "codec": {"sample_rate_hz": 44100, "hop_samples": 512, "codebooks": 9, "card": 1024}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("data") / "features", clips=23, validation=7)


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_same_weights(left: Path, right: Path, name: str = "model") -> None:
    one, other = weights(left, name), weights(right, name)
    assert one.keys() == other.keys()
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    assert not differing


# --- configuration --------------------------------------------------------------------------------------------------------------------


def test_published_recipe_is_the_default_and_the_yaml() -> None:
    default, published = load(TrainConfig, ["data=d", "out=o"]), load(TrainConfig, ["config=train_vaura", "data=d", "out=o"])
    assert default.schedule.total_steps is None and published.schedule.total_steps == 200_000 == default.trainer.max_steps
    assert (published.optimiser, published.stream, published.model) == (default.optimiser, default.stream, default.model)
    assert (published.schedule.warmup_steps, published.schedule.floor, published.trainer.precision) == (1000, 0.1, "16-mixed")
    assert (default.embeddings, published.embeddings) == ("auto", "codec")
    assert (published.ema.decay, published.preview.clips, published.trainer.accumulate, published.trainer.strategy) == (0, 0, 1, "auto")


def test_published_hyper_parameters() -> None:
    """Those in the released checkpoint's `hyper_parameters` and in its optimiser's state, by their values there."""
    published = load(TrainConfig, ["config=train_vaura", "data=d", "out=o"])
    model, optimiser, stream = published.model, published.optimiser, published.stream
    assert (model.layers, model.width, model.heads, model.dropout, model.max_steps) == (24, 1536, 16, 0.1, 0)
    assert (model.width - model.visual_width, model.width / model.visual_width) == (1024, 3)  # d_codebook, cond_feature_channel_scaler
    assert derive_model(model, DAC, stream.segments).max_steps == 256 and VauraConfig().feed_forward_width == 4096
    assert (optimiser.learning_rate, optimiser.weight_decay, optimiser.beta1, optimiser.beta2) == (1.08e-4, 1.08e-5, 0.9, 0.95)
    assert (optimiser.clip, optimiser.clip_by) == (1.0, "value")
    assert (stream.batch_size, stream.segments, published.schedule.total_steps) == (12 * 4, 4, 200_000)
    with torch.device("meta"):
        groups = build_optimiser(Vaura(VauraConfig()).parameters(), optimiser, fused=False).param_groups
    assert [(len(group["params"]), sum(p.numel() for p in group["params"])) for group in groups] == [(159, 694_445_640), (58, 84_480)]
    assert [(group["weight_decay"], group["betas"], group["eps"]) for group in groups] == [(1.08e-5, (0.9, 0.95), 1e-8), (0, (0.9, 0.95), 1e-8)]


def test_half_precision_only_where_it_pays() -> None:
    assert TrainerConfig(accelerator="cpu").resolved_precision == "32-true"
    assert TrainerConfig(accelerator="gpu").resolved_precision == "bf16-mixed"
    assert TrainerConfig(accelerator="cpu", precision="bf16-mixed").resolved_precision == "bf16-mixed"


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)])
def test_a_gradient_scaler_gets_an_optimiser_whose_gradients_are_unscaled_before_they_are_clipped(
    precision: str, fused: bool, straight: Path
) -> None:
    config = TrainConfig(data="", out="", trainer=TrainerConfig(precision=precision))
    assert VauraModule(read_config(straight), config).configure_optimizers().defaults["fused"] is fused


def test_model_follows_the_dataset() -> None:
    assert derive_model(ModelOptions(), ENCODEC, 4) == VauraConfig(codebooks=8, steps_per_token=6)
    assert derive_model(ModelOptions(), DAC, 4) == VauraConfig(steps_per_token=441, steps_per_token_divisor=64)
    assert derive_model(ModelOptions(layers=3), ENCODEC, 8) == VauraConfig(layers=3, codebooks=8, steps_per_token=6, window_tokens=64, max_steps=392)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebooks": 9}, r"model.codebooks=9, the dataset has 8"),
        ({"feature_width": 512}, r"model.feature_width=512, the dataset has 768"),
        ({"steps_per_token": 7}, r"model.steps_per_token=7, the dataset has 6"),
        ({"window_tokens": 24}, r"model.window_tokens=24, the dataset has 32"),
        ({"max_steps": 199}, r"model.max_steps=199, a window takes 200 positions"),
    ],
)
def test_model_that_contradicts_the_dataset_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        derive_model(ModelOptions(**options), ENCODEC, 4)


def test_a_value_that_agrees_is_taken() -> None:
    assert derive_model(ModelOptions(codebooks=8, feature_width=768, max_steps=200), ENCODEC, 4).max_steps == 200


# --- learning -------------------------------------------------------------------------------------------------------------------------


def test_overfits_one_shard_and_generates_its_codes(tmp_path: Path) -> None:
    data = write_features(tmp_path / "data", clips=3, lengths=(1,))
    model = ["model.width=64", "model.visual_width=32", "model.heads=2", "model.dropout=0", "model.guidance_dropout=0", "model.feed_last_step=true"]
    options = ["stream.segments=1", "stream.batch_size=3", "trainer.max_steps=60", "trainer.log_every=20", "schedule.warmup_steps=10"]
    run(small_config(data, tmp_path / "run", *model, *options))
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(CARD), abs=1e-6)
    assert losses[-1] < 0.1 * math.log(CARD)
    trained, windows = read_model(tmp_path / "run"), first_windows(data, "train", 3, 1)
    tokens, sampling = windows["features"].flatten(1, 2).float(), Sampling(greedy=True, guidance=1.0)
    assert torch.equal(generate(trained, tokens, steps=48, sampling=sampling), windows["codes"])
    # From the pictures, and not from the place in the batch: another clip's pictures give another clip's codes.
    assert torch.equal(generate(trained, tokens.flip(0), steps=48, sampling=sampling), windows["codes"].flip(0))


def first_windows(data: Path, split: str, clips: int, segments: int) -> Batch:
    return next(iter(FeatureStream(Index.open(data, split), StreamConfig(batch_size=clips, segments=segments), 0, 1, shuffle=False)))


def test_windows_longer_than_those_published(tmp_path: Path) -> None:
    """8 segments, 5.12 s: 6 steps of EnCodec to a video token throughout, and as many positions as that takes."""
    data = write_features(tmp_path / "data", clips=3, lengths=(9,))
    folder = run(small_config(data, tmp_path / "run", "stream.segments=8", "stream.batch_size=2", "trainer.max_steps=4"))
    config, model = read_run_folder(folder)
    assert (model.config.window_tokens, model.config.max_steps, config.codec_clock.steps_in(8)) == (64, 8 * 48 + CODEBOOKS, 384)
    features = torch.randn(1, 64, WIDTH)
    aligned = model.align(features, 384 + CODEBOOKS - 1)
    tokens = model.cls_embeddings.projection(features)
    assert torch.equal(aligned[:, :384], tokens.repeat_interleave(6, dim=1))
    assert torch.equal(aligned[:, 384:], model.empty_video_emb.expand(1, CODEBOOKS - 1, -1))
    assert generate(model, features, steps=384, sampling=Sampling(guidance=2.0), seeds=[1]).shape == (1, CODEBOOKS, 384)


def test_recomputed_activations_train_the_same(data: Path, straight: Path, tmp_path: Path) -> None:
    run(small_config(data, tmp_path, *TEN_STEPS, "trainer.checkpoint_activations=true"))
    assert_same_weights(straight, tmp_path)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [row["loss"] for row in read_metrics(straight)]


def test_the_unconditional_embedding_trains_if_asked_to(data: Path, straight: Path, tmp_path: Path) -> None:
    name, seed = "cls_embeddings.uncond_embedding", ["trainer.max_steps=10", "schedule.total_steps=10", "model.guidance_dropout=0.5"]
    learning = run(small_config(data, tmp_path / "learning", *seed, "model.train_unconditional=true"))
    fixed = run(small_config(data, tmp_path / "fixed", *seed))
    assert weights(learning).keys() == weights(fixed).keys() == weights(straight).keys()
    assert torch.equal(weights(fixed)[name], weights(straight)[name]) and not torch.equal(weights(learning)[name], weights(fixed)[name])
    with pytest.raises(ValueError, match=r"model.train_unconditional: False there, True here"):
        run(small_config(data, fixed, *seed, "model.train_unconditional=true", "trainer.ckpt_path=last", "trainer.max_steps=12"))


def test_lightning_still_has_what_is_replaced() -> None:
    """`train.trainer` overrides a private method and private options; another version of Lightning might ignore that without a word."""
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert isinstance(DDPStrategy()._ddp_kwargs, dict)


# --- resuming -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in one go, over two and a half epochs of 23 clips, with dropout, guidance dropout and two validations."""
    folder = tmp_path_factory.mktemp("straight")
    return run(small_config(data, folder, *TEN_STEPS))


def stop_after(data: Path, folder: Path, step: int, *options: str) -> Path:
    return run(small_config(data, folder, *TEN_STEPS, f"trainer.max_steps={step}", *options))


def test_resuming_mid_epoch_changes_nothing(data: Path, straight: Path, tmp_path: Path) -> None:
    stop_after(data, tmp_path, 6)
    run(small_config(data, tmp_path, *TEN_STEPS, "trainer.ckpt_path=last"))
    assert_same_weights(straight, tmp_path)
    assert_same_weights(straight, tmp_path, "best")
    rows, expected = read_metrics(tmp_path), read_metrics(straight)
    assert [(r["step"], r["split"], r["loss"]) for r in rows] == [(r["step"], r["split"], r["loss"]) for r in expected]


@pytest.mark.parametrize("name", ["step-000000003", "best"])
def test_resuming_from_an_earlier_checkpoint_drops_what_came_after(data: Path, straight: Path, tmp_path: Path, name: str) -> None:
    stop_after(data, tmp_path, 8)
    run(small_config(data, tmp_path, *TEN_STEPS, f"trainer.ckpt_path={tmp_path / 'checkpoints' / name}.ckpt"))
    assert_same_weights(straight, tmp_path)
    expected = [(r["step"], r["split"], r["loss"]) for r in read_metrics(straight)]
    assert [(r["step"], r["split"], r["loss"]) for r in read_metrics(tmp_path)] == expected


def test_accumulating_over_a_resume(data: Path, tmp_path: Path) -> None:
    options = ["trainer.accumulate=2", "model.dropout=0", "model.guidance_dropout=0"]
    run(small_config(data, tmp_path / "straight", *TEN_STEPS, *options))
    stop_after(data, tmp_path / "parts", 6, *options)
    run(small_config(data, tmp_path / "parts", *TEN_STEPS, *options))
    assert_same_weights(tmp_path / "straight", tmp_path / "parts")


def test_resuming_a_mixture_changes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = write_features(tmp_path / "other", clips=5, validation=2, first=100)
    options = [f"data=[{data},{other}]", "stream.weights=[1,2]"]
    straight = run(small_config(data, tmp_path / "straight", *TEN_STEPS, *options))
    assert f"data   {data}, {other}: 23 + 5 training clips, 7 + 2 validation clips" in capsys.readouterr().out
    assert [row["samples"] for row in read_metrics(straight) if row["split"] == "validation"] == [9, 9]
    stop_after(data, tmp_path / "parts", 6, *options)
    with pytest.raises(ValueError, match=r"stream.weights: \[1.0, 2.0\] there, \[2.0, 1.0\] here"):
        run(small_config(data, tmp_path / "parts", *TEN_STEPS, *options, "stream.weights=[2,1]"))
    run(small_config(data, tmp_path / "parts", *TEN_STEPS, *options, "stream.workers=1"))
    assert_same_weights(straight, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"another order of samples.*fingerprint: None there.*data\[1\].content"):
        run(small_config(data, tmp_path / "parts", *TEN_STEPS, "trainer.max_steps=12", "trainer.ckpt_path=last"))


def test_padded_clips_count_the_same_however_a_batch_is_shared_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_features(tmp_path / "data", clips=23, validation=5, lengths=(1, 5, 2, 3))
    run(small_config(data, tmp_path / "one", *NO_DRAWS, "stream.segments=3", "stream.short_clips=pad"))
    out = capsys.readouterr().out
    assert "12 training clips are shorter than a window and padded" in out and "3 validation clips are shorter" in out
    run(small_config(data, tmp_path / "three", *NO_DRAWS, "stream.segments=3", "stream.short_clips=pad", "trainer.accumulate=3"))
    assert_same_gradients(tmp_path / "one", tmp_path / "three")
    first = read_metrics(tmp_path / "one")[0]
    assert first["loss"] == pytest.approx(math.log(CARD), abs=1e-6)
    capsys.readouterr()
    run(small_config(data, tmp_path / "dropped", *NO_DRAWS, "stream.segments=3", "trainer.max_steps=1", "schedule.warmup_steps=0"))
    assert "12 training clips are shorter than a window and left out" in capsys.readouterr().out


def test_epochs_that_end_are_followed_by_the_next(data: Path, tmp_path: Path) -> None:
    """With stream.run_on=false, each epoch of 23 clips is 3 steps of 6 and drops 5."""
    options = ["stream.run_on=false", "trainer.keep_every=1"]
    run(small_config(data, tmp_path / "straight", *TEN_STEPS, *options))
    states = [torch.load(tmp_path / f"straight/checkpoints/step-{step:09d}.ckpt", weights_only=True) for step in (2, 3, 4, 7)]
    assert [state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["consumed"] for state in states] == [12, 23, 29, 52]
    stop_after(data, tmp_path / "parts", 6, *options)
    run(small_config(data, tmp_path / "parts", *TEN_STEPS, *options))
    assert_same_weights(tmp_path / "straight", tmp_path / "parts")


def assert_same_gradients(left: Path, right: Path) -> None:
    """AdamW's means of the gradients, which show their scale; its steps do not, and blow up what is nothing but rounding."""
    one, other = (torch.load(f / "checkpoints/step-000000002.ckpt", weights_only=True)["optimizer_states"][0]["state"] for f in (left, right))
    means, others = ([state["exp_avg"] for state in states.values()] for states in (one, other))
    assert max(mean.abs().max() for mean in means) > 1e-3
    torch.testing.assert_close(means, others, rtol=1e-4, atol=1e-7)


NO_DRAWS = ["model.dropout=0", "model.guidance_dropout=0", "stream.lanes=6", "trainer.keep_every=2", "trainer.log_every=1"]


def test_accumulated_passes_make_the_step_of_one_batch(data: Path, tmp_path: Path) -> None:
    run(small_config(data, tmp_path / "one", *NO_DRAWS))
    run(small_config(data, tmp_path / "three", *NO_DRAWS, "trainer.accumulate=3"))
    assert_same_gradients(tmp_path / "one", tmp_path / "three")
    assert [r["loss"] for r in read_metrics(tmp_path / "one")] == pytest.approx([r["loss"] for r in read_metrics(tmp_path / "three")], abs=2e-4)


# --- what the folder allows -----------------------------------------------------------------------------------------------------------


def test_finished_run_does_nothing_again(data: Path, straight: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    run(small_config(data, straight, *TEN_STEPS))
    assert "is finished: step 10" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()} == before


def test_unfinished_run_goes_on_by_itself(data: Path, straight: Path, tmp_path: Path) -> None:
    stop_after(data, tmp_path, 6)
    run(small_config(data, tmp_path, *TEN_STEPS))
    assert_same_weights(straight, tmp_path)


def test_other_options_need_to_be_meant(data: Path, tmp_path: Path) -> None:
    stop_after(data, tmp_path, 4)
    changed = [*TEN_STEPS, "optimiser.weight_decay=0.5", "optimiser.learning_rate=0.001"]
    with pytest.raises(ValueError, match=r"(?s)optimiser.learning_rate: 0.01 there, 0.001 here.*optimiser.weight_decay: 1.08e-05 there, 0.5 here"):
        run(small_config(data, tmp_path, *changed))
    run(small_config(data, tmp_path, *changed, "trainer.ckpt_path=last"))
    optimiser = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["weight_decay"] for group in optimiser["param_groups"]] == [0.5, 0]
    assert [r["learning_rate"] < 0.001 for r in read_metrics(tmp_path) if r["step"] > 1 and r["split"] == "train"] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]


def test_longer_schedule_needs_to_be_meant(data: Path, tmp_path: Path) -> None:
    run(small_config(data, tmp_path))
    with pytest.raises(ValueError, match=r"schedule.total_steps: 8 there, 9 here"):
        run(small_config(data, tmp_path, "trainer.max_steps=9"))


def test_other_data_or_network_is_refused(data: Path, tmp_path: Path) -> None:
    stop_after(data, tmp_path / "run", 4)
    other = write_features(tmp_path / "other", clips=23, views=1, tower={"config": {"width": WIDTH}, "weights_sha256": "1" * 64})
    for more in ([], ["trainer.ckpt_path=last"]):
        with pytest.raises(ValueError, match=r"spec.tower.weights_sha256: '0{64}' there, '1{64}' here"):
            run(small_config(other, tmp_path / "run", *TEN_STEPS, *more))
    with pytest.raises(ValueError, match=r"model.layers: 2 there, 3 here"):
        run(small_config(data, tmp_path / "run", *TEN_STEPS, "model.layers=3", "trainer.ckpt_path=last"))


def test_checkpoint_of_another_folder_or_none(data: Path, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of another run"):
        run(small_config(data, tmp_path, *TEN_STEPS, f"trainer.ckpt_path={straight / 'checkpoints/last.ckpt'}"))
    with pytest.raises(ValueError, match=r"last.ckpt does not exist"):
        run(small_config(data, tmp_path, *TEN_STEPS, "trainer.ckpt_path=last"))


def test_loss_that_is_not_a_number_ends_the_run_with_nothing_saved(data: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"the loss is nan at step"):
        run(small_config(data, tmp_path, "optimiser.learning_rate=1e30", "trainer.log_every=100"))
    assert not (tmp_path / "model.safetensors").exists()


def test_errors_are_one_line_and_status_2(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([f"data={data}", f"out={tmp_path}", "model.codebooks=9"]) == 2
    assert f"model.codebooks=9, the dataset has {CODEBOOKS}" in capsys.readouterr().err


# --- what is left ---------------------------------------------------------------------------------------------------------------------


def test_run_folder_gives_the_same_network(straight: Path) -> None:
    config, model = read_run_folder(straight)
    assert config.model == model.config and not model.training
    assert config.data["fingerprint"] == fingerprint(config.data["spec"])
    assert (config.window_segments, config.codec_clock.steps_in(2)) == (2, 96)
    state = torch.load(straight / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    fresh = read_model(straight)
    fresh.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    codes, features = torch.randint(CARD, (2, CODEBOOKS, 13)), torch.randn(2, 16, WIDTH)
    assert torch.equal(model(codes, features), fresh(codes, features))


def test_resolved_configuration_repeats_the_run(data: Path, straight: Path) -> None:
    recorded = read_config(straight).train
    assert recorded["data"] == str(data) and recorded["schedule"]["total_steps"] == 10 and recorded["model"]["layers"] == 2


def test_weights_are_copied_once_they_are_the_right_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tower = tmp_path / "tower.pt"
    tower.write_bytes(b"weights")
    data = write_features(tmp_path / "data", weights=tower)
    folder = stop_after(data, tmp_path / "run", 2)
    assert read_config(folder).weights["tower"]["path"] == "weights/tower.pt"
    assert read_config(folder).weights_path(folder, "tower").read_bytes() == b"weights"
    tower.write_bytes(b"other")
    run(small_config(data, folder, *TEN_STEPS, "trainer.max_steps=3"))
    assert read_config(folder).weights_path(folder, "tower").read_bytes() == b"weights" and "not copied" not in capsys.readouterr().err
    elsewhere = stop_after(data, tmp_path / "elsewhere", 2)
    assert read_config(elsewhere).weights["tower"]["path"] == str(tower) and "tower.pt is another file" in capsys.readouterr().err


def test_metrics_rows(straight: Path) -> None:
    rows = read_metrics(straight)
    assert [(r["step"], r["split"]) for r in rows] == [
        *[(s, "train") for s in (1, 3, 5)], (5, "validation"), *[(s, "train") for s in (6, 9, 10)], (10, "validation")
    ]  # fmt: skip
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row["per_codebook"]) / CODEBOOKS) and len(row["per_codebook"]) == CODEBOOKS
    assert all(0 <= r["data_wait_fraction"] <= 1 and r["samples_per_second"] > 0 for r in rows if r["split"] == "train")
    operations = 3 * forward_flops(read_config(straight).model, 96 + CODEBOOKS - 1, 16) / 1e12
    assert all(r["model_teraflops_per_second"] == pytest.approx(r["samples_per_second"] * operations) for r in rows if r["split"] == "train")
    assert [r["samples"] for r in rows if r["split"] == "validation"] == [7, 7]
    # The rate of the step that made the row: steps are counted from 1, the schedule from 0.
    assert [r["learning_rate"] for r in rows if r["split"] == "train"][:2] == pytest.approx([0, 0.01 * 2 / 3])


def test_tensorboard_goes_on_after_a_resume(data: Path, tmp_path: Path) -> None:
    stop_after(data, tmp_path, 8)
    run(small_config(data, tmp_path, *TEN_STEPS, f"trainer.ckpt_path={tmp_path}/checkpoints/step-000000003.ckpt"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [row["step"] for row in read_metrics(tmp_path) if row["split"] == "train"]
    for tag in ("train/loss", f"train/loss_codebook_{CODEBOOKS - 1}", "train/learning_rate", "train/samples_per_second", "train/data_wait_fraction"):
        assert [event.step for event in events.Scalars(tag)] == expected
    assert [event.step for event in events.Scalars("validation/loss")] == [5, 10]


def test_reading_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config.yaml"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"no weights yet"):
        read_model(tmp_path)
