"""`train.sync`: what the stages read and leave, that the published recipes are the defaults, that resuming changes nothing, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.load import load
from model.avclip import Avclip, load_avclip, save_avclip
from model.motion_tower import MotionTower, MotionTowerConfig
from model.sync_run import read_config
from model.synchformer import load_synchformer
from model.synchformer_audio import AudioTower, AudioTowerConfig
from model.weights import sha256_file
from pipeline.features import AudioOptions, CodecOptions, Decoded, FeatureOptions, Features, Featuriser, TowerOptions, networks_spec
from pipeline.media import decode
from shards.dataset import create_or_check, json_bytes, new_info
from shards.write import Entry, write_manifest, write_shard
from tests.pipeline.clips import make_clip
from train.callbacks import read_metrics
from train.sync import main
from train.sync_contrast import ContrastJob
from train.sync_pairs import PairJob, SynchronisableJob

WIDTH, SIZE = 12, 28
SMALL = [
    "model.width=16", "model.depth=2", "model.heads=2", "stream.batch_size=4", "schedule.warmup_steps=2", "optimiser.learning_rate=0.003",
    "trainer.accelerator=cpu", "trainer.progress=false", "trainer.log_every=1", "trainer.val_check_interval=4",
]  # fmt: skip
SMALL_TOWERS = [
    "model.visual=motion", f"model.motion.image_size={SIZE}", "model.motion.reduce=2", "model.motion.channels=4", f"model.motion.width={WIDTH}",
    f"model.audio.width={WIDTH}", "model.audio.depth=1", "model.audio.heads=2", "stream.batch_size=2", "stream.workers=0", "cut.segments=4",
    "contrast.window=2", "schedule.warmup_steps=1", "optimiser.learning_rate=0.003", "trainer.accelerator=cpu", "trainer.progress=false",
    "trainer.log_every=1", "trainer.val_check_interval=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("towers") / "avclip.safetensors"
    visual = MotionTower(MotionTowerConfig(image_size=SIZE, reduce=2, channels=4, width=WIDTH))
    save_avclip(path, Avclip(visual, AudioTower(AudioTowerConfig(width=WIDTH, depth=1, heads=2))))
    return path


def options_of(towers: Path) -> FeatureOptions:
    tower = TowerOptions(weights=str(towers), device="cpu")
    return FeatureOptions(tower=tower, audio=AudioOptions(weights=str(towers)), codec=CodecOptions(name="none"))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 8 s, each with its flash and its click at another time: 4 for training, 2 for validation."""
    root = tmp_path_factory.mktemp("media") / "media"
    create_or_check(root, new_info("media", {"made": "by a test"}))
    for split, numbers in (("train", range(4)), ("validation", range(4, 6))):
        entries = []
        for number in numbers:
            path = root.parent / f"{number}.mp4"
            make_clip(path, seconds=8.0, width=40, height=32, audio_rate_hz=16000)
            entries.append(Entry(f"clip_{number}", split, None, str(path), 8.0, {"mp4": path.read_bytes(), "json": b"{}"}))
        write_shard(root, f"{split}-000000", entries)
    write_manifest(root)
    return root


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, media: Path, towers: Path) -> Path:
    """The features of these clips, as `featurise` stores them."""
    root, options = tmp_path_factory.mktemp("features") / "features", options_of(towers)
    reference = {"path": str(towers), "sha256": sha256_file(towers)}
    create_or_check(root, new_info("features", networks_spec(options), {"weights": {"tower": reference, "audio": reference}}))
    featuriser = Featuriser(options)

    def decoded(path: Path) -> Decoded:
        clip = decode(path, sample_rate_hz=16000, channels=1)
        return Decoded(clip.frames, None, heard=clip.audio[0])

    for split, numbers in (("train", range(4)), ("validation", range(4, 6))):
        entries = []
        for path, made in featuriser.run([media.parent / f"{number}.mp4" for number in numbers], decoded):
            assert isinstance(made, Features) and made.audio is not None
            members = {"avclip.npy": made.avclip, "avclip_audio.npy": made.audio, "json": json_bytes({})}
            entries.append(Entry(f"clip_{path.stem}", split, None, str(path), made.frames / 25, members))
        write_shard(root, f"{split}-000000", entries)
    write_manifest(root)
    return root


def train(*arguments: str) -> int:
    return main(list(arguments))


def rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder) if row["split"] == split]


# --- options --------------------------------------------------------------------------------------------------------------------------


def test_the_published_recipes_are_the_defaults_and_the_yamls():
    given = ["data=d", "out=o"]
    one, two, three = load(ContrastJob, given), load(PairJob, given), load(SynchronisableJob, given)
    assert (one.optimiser.learning_rate, one.optimiser.beta2, one.optimiser.weight_decay, one.optimiser.clip_by) == (1e-4, 0.999, 0.0, "norm")
    assert (one.stream.batch_size, one.cut.segments, one.contrast.window, one.contrast.cross_device_negatives) == (64, 14, 8, False)
    assert (one.augment.p_zoom, one.augment.p_flip, one.augment.p_colour, one.augment.p_pitch) == (0.2, 0.5, 0.2, 0.2)
    for stage in (two, three):
        optimiser, schedule = stage.optimiser, stage.schedule
        assert optimiser.learning_rate == pytest.approx(2e-6 * 32) and stage.stream.batch_size == 16 * 32
        assert (optimiser.beta1, optimiser.beta2, optimiser.eps, optimiser.weight_decay, optimiser.clip) == (0.9, 0.999, 1e-7, 0.0, 1.0)
        assert (schedule.shape, schedule.warmup_steps, schedule.start, stage.cut.jitter_seconds) == ("constant", 1000, 0.01, 0.05)
        assert [schedule.factor(step, 10**6) for step in (0, 500, 1000, 10**5)] == pytest.approx([0.01, 0.505, 1.0, 1.0])
        assert (stage.augment.p_flip, stage.augment.p_colour, stage.augment.p_zoom) == (0.5, 0.0, 0.0)
    assert (two.cut.seconds, two.cut.segments, two.head, three.cut.seconds, three.cut.segments, three.head) == (
        5.0, 14, "offset", 4.48, 13, "synchronisable",
    )  # fmt: skip
    for default, name in ((one, "train_avclip"), (two, "train_sync"), (three, "train_synchability")):
        published = load(type(default), [f"config={name}", *given])
        assert published.stage == default.stage and published.trainer.precision == "16-mixed"
        assert (published.optimiser, published.stream, published.augment) == (default.optimiser, default.stream, default.augment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=4"], "stage=4; expected 1, 2 or 3"),
        (["stage=2", "trainer.strategy=fsdp"], "trainer.strategy=fsdp: what stages 2 and 3 train is small"),
        (["stage=2", "cut.seconds=2.0"], "cut.segments=14 take 4.80 s; expected a longer cut.seconds than 2.0"),
        (["stage=1", "contrast.window=14"], "contrast.window=14: expected at least 1 and fewer than cut.segments=14"),
        (["stage=3", "listing=x.csv"], "listing=x.csv: "),
        (["stage=1"], "is a features dataset; expected a media dataset"),
        (["stage=2", "init=TOWERS"], "expected a Synchformer"),
        (["stage=2", "start=aligned", "model.width=16", "model.heads=2"], "is too small for the aligned start"),
        (["stage=3", "start=aligned"], "start=aligned is for stage 2 without init"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments, message, features, towers, tmp_path, capsys):
    (tmp_path / "x.csv").write_text("path,offset_sec,vstart_sec\nclip_4,0.4,0.24\n")
    arguments = [a.replace("TOWERS", str(towers)).replace("x.csv", str(tmp_path / "x.csv")) for a in arguments]
    assert train(*arguments, f"data={features}", f"out={tmp_path / 'run'}", "trainer.accelerator=cpu") == 2
    assert message.replace("x.csv", str(tmp_path / "x.csv")) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- stage 1 --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contrasted(tmp_path_factory: pytest.TempPathFactory, media: Path) -> Path:
    folder = tmp_path_factory.mktemp("stage1") / "run"
    assert train("stage=1", f"data={media}", f"out={folder}", *SMALL_TOWERS, "trainer.max_steps=4") == 0
    return folder


def test_stage_one_leaves_towers_that_featurising_and_stage_one_start_from(contrasted, media, tmp_path):
    model = load_avclip(contrasted / "model.safetensors")
    assert isinstance(model.v_encoder, MotionTower) and model.v_encoder.config.width == WIDTH
    assert networks_spec(options_of(contrasted / "best.safetensors"))["audio"]["tower"]["config"]["width"] == WIDTH
    described = read_config(contrasted)
    assert (described.stage, described.sync, described.start) == (1, None, {}) and described.audio["depth"] == 1
    assert train("stage=1", f"data={media}", f"out={tmp_path}", f"init={contrasted / 'model.safetensors'}", *SMALL_TOWERS, "trainer.max_steps=1",
                 "schedule.warmup_steps=0", "optimiser.learning_rate=0.0") == 0  # fmt: skip
    assert read_config(tmp_path).start == {"file": str(contrasted / "model.safetensors"), "sha256": sha256_file(contrasted / "model.safetensors")}
    before, after = load_file(contrasted / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stage_one_logs_its_measure_and_four_pictures(contrasted):
    measured = rows(contrasted, "validation")
    assert [row["step"] for row in measured] == [2, 4] and [row["samples"] for row in measured] == [2, 2]
    assert all(0 <= row["shifted_window_accuracy"] <= 1 and row["temperature"] == pytest.approx(0.07, abs=0.02) for row in measured)
    events = EventAccumulator(str(contrasted / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    names = {f"similarity/{name}" for name in ("visual_visual", "audio_audio", "visual_audio", "audio_visual")}
    assert set(events.Tags()["images"]) == names and {image.step for image in events.Images("similarity/visual_audio")} == {2, 4}
    picture = events.Images("similarity/visual_audio")[0]
    assert (picture.width, picture.height) == (8 * 2 * 4, 8 * 2 * 4)  # two clips of four segments


def test_stage_one_goes_on_where_it_stopped(contrasted, media, tmp_path):
    parts = ["stage=1", f"data={media}", f"out={tmp_path}", *SMALL_TOWERS]
    assert train(*parts, "trainer.max_steps=3", "schedule.total_steps=4") == 0
    assert train(*parts, "trainer.max_steps=4", "schedule.total_steps=4") == 0
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in rows(contrasted)]
    straight, resumed = load_file(contrasted / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# --- stages 2 and 3 -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offset_run(tmp_path_factory: pytest.TempPathFactory, features: Path) -> Path:
    folder = tmp_path_factory.mktemp("stage2") / "run"
    assert train("stage=2", f"data={features}", f"out={folder}", *SMALL, "trainer.max_steps=8", "iter_times=5") == 0
    return folder


def test_stage_two_leaves_a_folder_that_predicts_offsets(offset_run, towers):
    model = load_synchformer(offset_run)
    assert (model.config.head, model.config.segments, model.config.width) == ("offset", 14, 16)
    trained, own = load_file(offset_run / "best.safetensors"), model.state_dict()
    assert trained.keys() < own.keys() and all(torch.equal(trained[name], own[name]) for name in trained)
    frozen = load_file(towers)
    assert all(torch.equal(frozen[f"v_encoder.{name}"], tensor) for name, tensor in model.vfeat_extractor.state_dict().items())
    assert all(torch.equal(frozen[f"a_encoder.{name}"], tensor) for name, tensor in model.afeat_extractor.state_dict().items())
    assert len(list((offset_run / "weights").iterdir())) == 1  # one file has both towers


def test_stage_two_validates_every_clip_as_often_as_asked(offset_run):
    assert [(row["step"], row["samples"]) for row in rows(offset_run, "validation")] == [(4, 10), (8, 10)]
    for row in read_metrics(offset_run):
        assert 0 <= row["accuracy"] <= row["accuracy_within_1"] <= 1 and np.isfinite(row["loss"])


def test_stage_two_goes_on_where_it_stopped_and_further_than_was_said(offset_run, features, tmp_path):
    parts = ["stage=2", f"data={features}", f"out={tmp_path}", *SMALL, "iter_times=5"]
    assert train(*parts, "trainer.max_steps=5") == 0
    assert train(*parts, "trainer.max_steps=8") == 0
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in rows(offset_run)]
    straight, resumed = load_file(offset_run / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_media_and_features_give_the_same_loss(media, features, towers, tmp_path):
    """The published way, decoding and both towers in every step, against the cached features: the same cuts of a list, the same weights."""
    listing = tmp_path / "list.csv"
    # Cuts whose first segments begin at a stored one: frames 8 and 32.
    listing.write_text("path,offset_sec,vstart_sec\nclip_4,0.4,0.24\nclip_5,-0.8,1.2\n")
    losses = {}
    for kind, more in (("features", [f"data={features}"]), ("media", [f"data={media}", f"towers={towers}"])):
        out = tmp_path / kind
        assert train("stage=2", f"out={out}", *more, *SMALL, f"listing={listing}", "trainer.max_steps=1", "trainer.val_check_interval=1",
                     "schedule.warmup_steps=0", "optimiser.learning_rate=0.0") == 0  # fmt: skip
        (row,) = rows(out, "validation")
        assert row["samples"] == 2
        losses[kind] = row["loss"]
    assert losses["media"] == pytest.approx(losses["features"], abs=2e-3)
    assert load_synchformer(tmp_path / "media").config == load_synchformer(tmp_path / "features").config


def test_an_aligned_start_is_said_and_resumed_from(features, tmp_path, capsys):
    parts = [
        "stage=2",
        f"data={features}",
        f"out={tmp_path}",
        *SMALL,
        "start=aligned",
        "start_clips=3",
        "schedule.warmup_steps=1",
        "model.width=80",
        "model.heads=2",
        "model.depth=2",
    ]
    assert train(*parts, "trainer.max_steps=2") == 0
    assert "start  aligned, fitted to 3 clips" in capsys.readouterr().out
    assert train(*parts, "trainer.max_steps=3") == 0
    said = capsys.readouterr().out
    assert "start  aligned" not in said and "resumes at step 2" in said
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_stage_three_starts_from_stage_two_with_a_new_head(offset_run, features, tmp_path):
    parts = ["stage=3", f"data={features}", f"out={tmp_path}", f"init={offset_run}", *SMALL, "cut.seconds=2.56", "cut.segments=6"]
    assert train(*parts, "trainer.max_steps=4", "schedule.warmup_steps=3", "optimiser.learning_rate=0.0") == 0
    before, after = load_file(offset_run / "best.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {name for name in after if "_head" in name} == {"transformer.sync_head.weight", "transformer.sync_head.bias"}
    positions = "transformer.pos_emb_cfg.pos_emb"
    assert torch.equal(after[positions], before[positions][:, : 2 + 6 * 14])
    assert all(torch.equal(before[name], after[name]) for name in after if "_head" not in name and name != positions)
    row = rows(tmp_path, "validation")[-1]
    assert 0 <= row["accuracy"] <= 1 and ("auc_roc" not in row or 0 <= row["auc_roc"] <= 1) and "accuracy_within_1" not in row
    assert load_synchformer(tmp_path).config.head == "synchronisable"
    assert read_config(tmp_path).start["sha256"] == sha256_file(offset_run / "best.safetensors")


def test_a_tower_that_is_not_there_or_another_is_told(offset_run, tmp_path):
    for name in ("best.safetensors", "weights/tower.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((offset_run / name).read_bytes())
    assert load_synchformer(tmp_path).config.segments == 14
    with (tmp_path / "weights/tower.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"is another file than .* was trained with"):
        load_synchformer(tmp_path)
    (tmp_path / "weights/tower.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no towers, and the visual tower's file .* is not there"):
        load_synchformer(tmp_path)


def test_options_of_another_stage_are_unknown(features, tmp_path, capsys):
    assert train("stage=2", f"data={features}", f"out={tmp_path / 'run'}", "contrast.window=3") == 2
    assert "contrast" in capsys.readouterr().err
    assert train("stage=1", "--help") == 0
    assert "contrast.window" in capsys.readouterr().out
