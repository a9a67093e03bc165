"""From pictures to sound: a stream is the same sound as one shot, of exactly the pictures' length, whatever the codec's clock."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.clock import SEGMENT_FRAMES
from model.generate import Sampling
from model.schedule import windows
from pipeline.media import MediaError, decode_video
from pipeline.sounder import Sounder, SoundOptions, clip_seed, find_networks, whole_segments
from pipeline.stretch import Stretch
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import small_dac_run, small_networks, small_run

OPTIONS = SoundOptions(sampling=Sampling(guidance=2.0, top_k=20))
MINUTE_SECONDS = 60


@pytest.fixture(scope="module", params=["encodec_clock", "dac"])
def run_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return small_dac_run(folder) if request.param == "dac" else small_run(folder, small_networks(folder))


@pytest.fixture(scope="module")
def sounder(run_folder: Path) -> Sounder:
    return Sounder.open(str(run_folder), OPTIONS, device="cpu")


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "minute.mp4"
    make_clip(path, seconds=Fraction(MINUTE_SECONDS) + Fraction(3, 25), width=48, height=32)
    return path


def test_a_minute_has_sound_to_the_sample(sounder: Sounder, minute: Path) -> None:
    pieces = list(sounder.generate(minute, stream=True))
    samples = Fraction(MINUTE_SECONDS * 25 + 3, 25) * sounder.sample_rate_hz
    assert sum(piece.shape[1] for piece in pieces) == round(samples)
    assert len(pieces) > 60  # it came as it was made
    assert all(np.isfinite(piece).all() for piece in pieces)
    assert np.abs(pieces[-1]).max() > 1e-4


def test_windows_keep_to_the_codecs_clock(sounder: Sounder) -> None:
    """At the end of a minute, the step at which a window begins is that of its first video token to half a step."""
    rate = sounder.codec.clock.rate
    clock = rate * Fraction(2, 25)
    schedule = windows(MINUTE_SECONDS * 25 // 2, clock, window_tokens=16, stride_tokens=8)
    for window in schedule:
        assert abs(window.steps.start - window.tokens[0] * clock) <= Fraction(1, 2)
    assert schedule[-1].steps.stop == -(-MINUTE_SECONDS * rate // 1)


def test_streamed_and_at_once_are_the_same_sound(sounder: Sounder, minute: Path) -> None:
    """Through other pieces of pictures, codes and sound, and as a batch."""
    options = replace(OPTIONS, duration_seconds=5.12)
    sounder.options = options
    streamed = np.concatenate(list(sounder.generate(minute, stream=True)), axis=1)
    sounder.options = replace(options, piece_seconds=0.0)
    tokens = torch.cat(list(sounder.tokens(np.split(whole_pictures(minute, 8), 8))), dim=1)
    codes = torch.cat(list(sounder._codes([tokens.repeat(2, 1, 1)], [clip_seed(666, "minute"), 5], None)), dim=-1)
    at_once = sounder.codec.decode(codes)[..., : streamed.shape[1]].numpy()
    sounder.options = OPTIONS
    np.testing.assert_allclose(at_once[0], streamed, atol=1e-4)
    assert not np.allclose(at_once[1], streamed, atol=1e-2)


def whole_pictures(path: Path, segments: int) -> np.ndarray:
    return decode_video(path, short_side=256)[: segments * SEGMENT_FRAMES]


def test_a_prompt_is_the_videos_own_sound(sounder: Sounder, minute: Path) -> None:
    sounder.options = replace(OPTIONS, duration_seconds=3.2, prompt_seconds=2.0)
    made = sounder.generate(minute, start_seconds=4.0)
    own = sounder.prompt(minute, Stretch.of(4.0, 5), 80)
    sounder.options = OPTIONS
    assert own is not None and own.shape[1] == 2 * sounder.sample_rate_hz
    coded = sounder.codec.decode(sounder.encode(own)[None])[0].numpy()
    whole = coded.shape[1] - 12 * sounder.codec.hop_samples  # the codec hears what follows
    np.testing.assert_allclose(made[:, :whole], coded[:, :whole], atol=1e-4)
    assert made.shape[1] == round(3.2 * sounder.sample_rate_hz)


def test_what_cannot_be_is_refused(run_folder: Path, sounder: Sounder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.64 or 1\.28"):
        whole_segments(1.0)
    for options, message in [
        ({"window_segments": 3}, "at most the 2"),
        ({"stride_segments": 3}, "between 1 and"),
        ({"prompt_seconds": 2.0, "duration_seconds": 1.28}, "leaves nothing"),
        ({"windows": "published"}, "windows=published"),
        ({"piece_seconds": -1.0}, "0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sounder(find_networks(str(run_folder), tower=replace(sounder.featuriser.options.tower, weights="")), replace(OPTIONS, **options))
    make_clip(tmp_path / "short.mp4", seconds=Fraction(1, 2), flash_picture=3)
    with pytest.raises(MediaError, match="too_short"):
        sounder.generate(tmp_path / "short.mp4")
