import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import JobError, load
from model.codecs import LappedCodec, load_codec
from model.motion_tower import MotionTowerConfig
from model.standin import TowerFit
from model.synchformer_visual import load_tower
from pipeline.contact_sound import soundtrack
from pipeline.media import EncodeConfig, decode_audio, reencode
from pipeline.scenes import draw_scene
from pipeline.standin import Material, StandinConfig, batches, read_material, run, shifted
from pipeline.synth import SynthConfig, encode_mp4
from shards.dataset import DatasetInfo, create_or_check, fingerprint
from shards.read import Index
from shards.write import Entry, write_manifest, write_shard

TINY = MotionTowerConfig(image_size=48, reduce=4, channels=2, width=8)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips made by program as a media dataset: three for training, one to test, and a failed one."""
    root = tmp_path_factory.mktemp("media")
    config = SynthConfig("", clips=4, validation=0, test=1, seconds=2.4, width=80, height=60)
    entries: dict[str, list[Entry]] = {"train": [Entry("gone", "train", None, "gone.mp4", reason="missing", message="not there")], "test": []}
    for number in range(4):
        rng = np.random.default_rng(number)
        scene = draw_scene(rng, ("bounce", "mallet")[number % 2], seconds=2.4)
        sound = soundtrack(scene.contacts, seconds=2.4, sample_rate_hz=48000, rng=rng)
        clip = reencode(encode_mp4(scene, sound, 25, config), EncodeConfig(short_side=60, preset="ultrafast"))
        split = "test" if number == 3 else "train"
        entries[split].append(Entry(f"clip{number}", split, scene.label, "made", clip.duration_seconds, {"mp4": clip.mp4}))
    create_or_check(root, DatasetInfo("media", 1, {}, fingerprint({}), {}))
    for split, rows in entries.items():
        write_shard(root, f"{split}-000000", rows)
    write_manifest(root)
    return root


def config_of(media: Path, out: Path, **more) -> StandinConfig:
    return StandinConfig(str(media), str(out), batch_segments=3, tower=TowerFit(TINY, steps=2), codec_card=64, codec_iterations=3, threads=1, **more)


def test_fitted_networks_load_and_repeat(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = run(config_of(media, tmp_path / "a")), run(config_of(media, tmp_path / "b"))
    assert [digest(file) for file in first] == [digest(file) for file in second]
    assert load_tower(first[0]).config == TINY
    codec = load_codec(first[1])
    assert isinstance(codec, LappedCodec) and codec.card <= 64
    index = Index.open(media, "train")
    wave = torch.from_numpy(decode_audio(index.bytes(0, "mp4"), 24000, 1))[None]
    heard = codec.decode(codec.encode(wave), samples=wave.shape[-1])
    assert (heard - wave).square().mean() < 0.5 * wave.square().mean()  # it codes the sounds that it was fitted on
    before = first[0].stat().st_mtime_ns
    capsys.readouterr()
    assert run(config_of(media, tmp_path / "a")) == first
    assert first[0].stat().st_mtime_ns == before and "are there" in capsys.readouterr().out
    run(config_of(media, tmp_path / "a", seed=1))
    assert digest(first[0]) != digest(second[0]) and digest(first[1]) != digest(second[1])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_material_is_the_training_split_within_memory(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(media, "train", kind="media")
    whole = read_material(index, config_of(media, tmp_path))
    assert len(whole.frames) == len(whole.waves) == 3
    assert all(f.shape == (60, 12, 12, 3) and w.shape == (1, 57600) for f, w in zip(whole.frames, whole.waves, strict=True))
    monkeypatch.setattr("pipeline.standin.MEGABYTE", 60 * 12 * 12 * 3 * 2 + 1)
    little = read_material(index, config_of(media, tmp_path, memory_mb=1))
    assert len(little.frames) == 2 and len(little.waves) == 3
    assert len(read_material(index, config_of(media, tmp_path, clips=2)).waves) == 2
    with pytest.raises(ValueError, match="no split 'validation'"):
        run(config_of(media, tmp_path, split="validation"))


def test_pictures_and_sound_of_a_batch_are_of_the_same_time(tmp_path: Path) -> None:
    """Frames and samples that carry their own instant: clip and frame number in the pixels, clip and sample number in the wave."""
    lengths = (17, 40, 100)
    left_half = np.arange(12) < 6
    frames = tuple(
        np.stack(
            np.broadcast_arrays(np.uint8(i), np.arange(n, dtype=np.uint8)[:, None, None], left_half[None, None] & np.ones((12, 1), bool)), axis=-1
        )
        for i, n in enumerate(lengths)
    )  # red: which clip, green: which frame, blue: which side
    waves = tuple((i * 1000 + np.arange(n * 960, dtype=np.float32) / 960)[None] for i, n in enumerate(lengths))
    config = config_of(tmp_path, tmp_path)
    made = batches(Material(frames, waves), config)
    mirrored, starts = 0, set()
    for _ in range(40):
        pictures, sounds = next(made)
        assert pictures.shape == (3, 16, 12, 12, 3) and sounds.shape == (3, 15360)
        for picture, sound in zip(pictures, sounds, strict=True):
            mirrored += int(picture[0, 0, 0, 2] == 0)
            clip, first = int(picture[0, 0, 0, 0]), int(picture[0, 0, 0, 1])
            assert torch.equal(picture[:, 0, 0, 1], torch.arange(first, first + 16))
            assert sound[0] == 1000 * clip + first and sound[-1] == pytest.approx(1000 * clip + first + 16 - 1 / 960, abs=1e-3)
            starts.add((clip, first))
    assert 30 < mirrored < 90 and len(starts) > 40 and {clip for clip, _ in starts} == {0, 1, 2}
    again = batches(Material(frames, waves), config)
    assert torch.equal(next(again)[0], next(batches(Material(frames, waves), config))[0])


def test_shifts_move_pixels_and_repeat_edges() -> None:
    picture = np.zeros((1, 5, 5, 3), np.uint8)
    picture[0, 1, 2], picture[0, :, 4] = 9, 7
    moved = shifted(picture, 2, -1, mirror=False)
    assert (moved[0, 3, 1] == 9).all() and (moved[0, :, 3:] == 7).all() and moved[0, :, :3].sum() == 27
    assert np.array_equal(shifted(picture, 2, -1, mirror=True), moved[:, :, ::-1])
    assert np.array_equal(shifted(picture, 0, 0, mirror=False), picture)


def test_nothing_to_fit_on_is_said(media: Path, tmp_path: Path) -> None:
    create_or_check(tmp_path / "broken", DatasetInfo("media", 1, {}, fingerprint({}), {}))
    write_shard(tmp_path / "broken", "train-000000", [Entry("x", "train", None, "x", 1.0, {"mp4": b"no video"})])
    write_manifest(tmp_path / "broken")
    with pytest.raises(JobError, match="none of 1 clips"):
        run(config_of(tmp_path / "broken", tmp_path / "out"))
    with pytest.raises(ValueError, match="at least 1"):
        load(StandinConfig, [f"data={media}", "out=x", "batch_segments=0"])
    assert load(StandinConfig, [f"data={media}", "out=x", "tower.steps=7", "tower.tower.width=24"]).tower.tower.width == 24
