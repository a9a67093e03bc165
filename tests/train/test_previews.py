"""Clips generated at validation: what is left, what it sounds like, and that training does not notice."""

import struct
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import AUDIO, IMAGES, EventAccumulator

from model.codecs import load_codec
from model.generate import Sampling, generate
from model.run_folder import read_model
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from tests.train.data import TEN_STEPS, small_config, write_codec, write_features
from train.callbacks import read_metrics
from train.previews import PreviewConfig, png, spectrogram
from train.vaura import run

PREVIEWS = ["preview.clips=2", "preview.seed=3", "preview.sampling.guidance=2.0", "preview.sampling.top_k=7"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return write_features(root / "features", clips=23, validation=7, lengths=(5, 1), codec_weights=write_codec(root / "codec.safetensors"))


@pytest.fixture(scope="module")
def previewed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(small_config(data, tmp_path_factory.mktemp("previewed"), *TEN_STEPS, *PREVIEWS, "stream.short_clips=pad"))


def read_wav(path: Path) -> tuple[int, np.ndarray]:
    with wave.open(str(path)) as file:
        return file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), np.int16)


def test_training_does_not_notice(data: Path, previewed: Path, tmp_path: Path) -> None:
    run(small_config(data, tmp_path, *TEN_STEPS, "stream.short_clips=pad"))
    with_them, without = (load_file(folder / "model.safetensors") for folder in (previewed, tmp_path))
    assert all(torch.equal(with_them[name], without[name]) for name in with_them)
    figures = [[(row["step"], row["split"], row["per_codebook"]) for row in read_metrics(folder)] for folder in (previewed, tmp_path)]
    assert figures[0] == figures[1]


def test_files_are_what_the_model_makes_of_the_first_windows(data: Path, previewed: Path) -> None:
    names = ["validation0.png", "validation0.wav", "validation1.png", "validation1.wav"]
    samples = previewed / "samples"
    assert {folder.name: sorted(p.name for p in folder.iterdir()) for folder in samples.iterdir()} == dict.fromkeys(
        ("original", "step-000000005", "step-000000010"), names
    )
    codec = load_codec(data.parent / "codec.safetensors")
    stream = FeatureStream(Index.open(data, "validation"), StreamConfig(batch_size=2, segments=2, short_clips="pad"), 0, 1, shuffle=False)
    windows = next(iter(stream))
    # The second clip has one segment, and is as long as that.
    for number, (segments, seed) in enumerate([(2, 3), (1, 4)]):
        rate, original = read_wav(samples / f"original/validation{number}.wav")
        assert (rate, len(original)) == (24000, segments * 15360)
        sound = codec.decode(windows["codes"][number : number + 1, :, : segments * 48])[0, 0].clamp(-1, 1)
        assert np.abs(original / 32767 - sound.numpy()).max() < 1e-4
        features = windows["features"][number : number + 1, :segments].flatten(1, 2).float()
        sampling = Sampling(guidance=2.0, top_k=7)
        codes = generate(read_model(previewed), features, steps=segments * 48, sampling=sampling, seeds=[seed])
        made = read_wav(samples / f"step-000000010/validation{number}.wav")[1]
        assert np.abs(made / 32767 - codec.decode(codes)[0, 0].clamp(-1, 1).numpy()).max() < 1e-4


def test_tensorboard_has_sound_and_pictures(previewed: Path) -> None:
    events = EventAccumulator(str(previewed / "tensorboard"), size_guidance={AUDIO: 0, IMAGES: 0})
    events.Reload()
    for key, samples in (("validation0", 30720), ("validation1", 15360)):
        made, original = (events.Audio(f"preview/{key}/{kind}") for kind in ("generated", "original"))
        assert [event.step for event in made] == [5, 10] and [event.step for event in original] == [5]
        assert made[0].sample_rate == 24000 and made[0].length_frames == samples
        pictures = events.Images(f"preview/{key}/generated_spectrogram")
        assert [(event.step, event.height, event.width) for event in pictures] == [(5, 160, 1 + samples // 240), (10, 160, 1 + samples // 240)]


def test_clips_of_the_average_at_every_second_validation(data: Path, tmp_path: Path) -> None:
    options = [*TEN_STEPS, *PREVIEWS, "preview.clips=1", "preview.every=2", "ema.decay=0.5", "preview.sampling.greedy=true"]
    run(small_config(data, tmp_path, *options))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["original", "step-000000010"]
    windows = next(iter(FeatureStream(Index.open(data, "validation"), StreamConfig(batch_size=1, segments=2), 0, 1, shuffle=False)))
    sampling = Sampling(guidance=2.0, greedy=True)
    codes = generate(read_model(tmp_path, name="ema"), windows["features"].flatten(1, 2).float(), steps=96, sampling=sampling)
    sound = load_codec(data.parent / "codec.safetensors").decode(codes)[0, 0].clamp(-1, 1)
    assert np.abs(read_wav(tmp_path / "samples/step-000000010/validation0.wav")[1] / 32767 - sound.numpy()).max() < 1e-4


def test_what_they_need_is_asked_for(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preview.clips=2: clips are generated at validation, and there is none"):
        run(small_config(data, tmp_path / "run", *TEN_STEPS, *PREVIEWS, "validation_split=null"))
    bare = write_features(tmp_path / "bare", validation=3)
    with pytest.raises(ValueError, match=r"preview.clips=2: the codec's weights are needed.*the dataset does not say which file"):
        run(small_config(bare, tmp_path / "run", *TEN_STEPS, *PREVIEWS))
    with pytest.raises(ValueError, match=r"preview.every=0"):
        PreviewConfig(every=0)


def test_a_spectrogram_shows_a_tone_where_it_is() -> None:
    time = torch.arange(24000) / 24000
    picture = spectrogram(torch.sin(2 * torch.pi * 1000 * time) * (time >= 0.5), 24000)
    assert picture.shape == (160, 101, 3)
    brightness = picture.astype(int).sum(-1)
    assert (brightness[:, :40] == brightness.min()).all() and tuple(picture[0, 0]) == (68, 1, 84)
    # 1000 Hz lies at 1000 of 3266 mel: 0.31 of the height from the bottom.
    loudest = brightness[:, 75].argmax()
    assert abs((160 - loudest) / 160 - 0.31) < 0.02 and brightness[loudest, 75] > 0.8 * sum((253, 231, 37))


def test_png_holds_the_picture() -> None:
    picture = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    data, chunks = png(picture), {}
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks[data[at + 4 : at + 8]] = data[at + 8 : at + 8 + size]
        assert zlib.crc32(data[at + 4 : at + 8 + size]) == struct.unpack_from(">I", data, at + 8 + size)[0]
        at += 12 + size
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (7, 5, 8, 2, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, 22)
    assert not rows[:, 0].any() and np.array_equal(rows[:, 1:].reshape(5, 7, 3), picture)
