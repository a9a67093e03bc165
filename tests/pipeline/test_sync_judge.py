"""A video judged along its length: the same answer from any container and rate, and no answer where there can be none."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from model.segments import OFFSET, cut_at
from pipeline.isolate import Limits
from pipeline.media import MediaError, decode
from pipeline.sync_judge import Judge, JudgeOptions, window_starts
from pipeline.sync_score import SyncScorer
from pipeline.timeline import Timeline
from tests.pipeline import clips
from tests.pipeline.clips import Recipe, make_clip
from tests.pipeline.sync_networks import small_sync

RATE = 48000
NTSC = Fraction(30000, 1001)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_sync(tmp_path_factory.mktemp("weights"))


def judged(weights: str, source: Path | bytes, **options) -> Timeline:
    return Judge(JudgeOptions(weights=weights, device="cpu", **options), Limits()).judge(source)


def world(ahead: float) -> np.ndarray:
    """Ten seconds of tones that come and go each in its own time, from `ahead` seconds on: what AAC keeps, wherever its packets begin."""
    time = np.arange(round((1 + ahead) * RATE), round((11 + ahead) * RATE)) / RATE
    tones = [np.sin(2 * np.pi * 170 * 1.7**n * time) * np.clip(8 * np.sin(time * (2.6 + 1.4 * n) + n) + 0.5, 0, 1) for n in range(6)]
    return (np.sum(tones, axis=0) / 12).astype(np.float32)


def slow_picture(recipe: Recipe, time: Fraction) -> np.ndarray:
    """Waves of light that move so slowly that half a picture's time makes little difference."""
    (y, x), t = np.mgrid[: recipe.height, : recipe.width], float(time)
    red, green = 128 + 50 * np.sin(x / 9 + 1.1 * t) + 50 * np.sin(y / 11 - 0.7 * t), 128 + 80 * np.sin(t * 0.9 + x / 30)
    return np.stack([red, green, np.full_like(red, 128 + 60 * np.sin(t * 1.3))], axis=-1).clip(0, 255).astype(np.uint8)


def shifted_clip(path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, frame_rate: Fraction = Fraction(25)) -> Path:
    """A clip of 6.2 s whose sound is `ahead` seconds too early."""
    monkeypatch.setattr(clips, "wave", lambda recipe: world(ahead)[: round(recipe.seconds * RATE)])
    monkeypatch.setattr(clips, "picture", slow_picture)
    make_clip(path, container=path.suffix[1:], seconds=Fraction(31, 5), frame_rate=frame_rate, width=64, height=48, audio_rate_hz=RATE)
    return path


def distance(found: Timeline, other: Timeline) -> float:
    """The largest difference of probabilities, in parts of the largest."""
    return float(np.abs(found.probabilities - other.probabilities).max() / other.probabilities.max())


def test_a_shift_of_the_sound_is_the_same_in_any_container_and_rate(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_sync = judged(weights, shifted_clip(tmp_path / "sync.mp4", monkeypatch, 0.0), start_seconds=0.6)
    first: Timeline | None = None
    for name, rate in (("25.mp4", Fraction(25)), ("25.mkv", Fraction(25)), ("29.97.mp4", NTSC), ("29.97.mkv", NTSC)):
        path = shifted_clip(tmp_path / f"shifted.{name}", monkeypatch, 0.6, rate)
        shifted, back = judged(weights, path, start_seconds=0.6), judged(weights, path, start_seconds=0.6, offset_seconds=-0.6)
        first = first or shifted
        # The same file in another container is the same to the bit; at 29.97 fps each picture is of an instant up to half a picture away.
        assert distance(shifted, first) <= (0.0 if rate == 25 else 0.03)
        assert shifted.estimate().best == first.estimate().best and shifted.estimate().seconds == pytest.approx(first.estimate().seconds, abs=0.01)
        # What was moved can be moved back: then it is as if nothing had been.
        assert distance(back, in_sync) <= 0.03 and back.offset_seconds == -0.6
        assert distance(shifted, in_sync) > 0.1


def test_one_cut_is_the_networks_own_answer(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The published example: 25 pictures a second, the short side 256 (here 32 for 28), 16 kHz, 14 segments of the 5 s cut."""
    path = shifted_clip(tmp_path / "clip.mkv", monkeypatch, 0.0, NTSC)
    clip = decode(path, sample_rate_hz=16000, channels=1, short_side=32)
    scorer = SyncScorer(weights, "cpu")
    for start, offset in ((0.32, 0.0), (1.16, -0.4), (0.0, 1.1)):
        found = judged(weights, path, start_seconds=start, offset_seconds=offset)
        expected = scorer.cut_logits(clip.frames, clip.audio[0], [cut_at(start, offset)], OFFSET).softmax(-1)
        torch.testing.assert_close(torch.from_numpy(found.probabilities), expected, atol=1e-5, rtol=1e-4)
        assert found.starts_seconds.tolist() == [cut_at(start, offset).start_frame / 25] and len(found.peaks) == 125


def test_a_timeline_covers_the_video_and_begins_with_the_published_cut(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = shifted_clip(tmp_path / "clip.mp4", monkeypatch, 0.0)
    whole, heard = judged(weights, path, every_seconds=0.32), []
    assert whole.starts_seconds.tolist() == [0.0, 0.32, 0.64, 0.96] and whole.duration_seconds == 6.2 and len(whole.peaks) == 155
    first = judged(weights, path, start_seconds=0.0)
    np.testing.assert_allclose(whole.probabilities[0], first.probabilities[0], atol=1e-5)
    later = Judge(JudgeOptions(weights=weights, device="cpu", offset_seconds=-0.5), Limits())
    assert later.judge(path.read_bytes(), tell=lambda *told: heard.append(told)).starts_seconds.tolist() == [0.48, 1.12]
    assert heard == [(5.12, 5.72), (5.72, 5.72)]


def test_windows_reach_the_end_on_their_common_grid() -> None:
    assert window_starts(125, 16) == window_starts(132, 16) == [0]
    assert window_starts(133, 16) == [0, 8] and window_starts(250, 16) == [*range(0, 113, 16), 120]
    assert window_starts(250, 8) == [*range(0, 121, 8)]


def test_both_networks_look_at_the_same_windows(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = shifted_clip(tmp_path / "clip.mp4", monkeypatch, 0.0)
    other = small_sync(tmp_path, "synchronisable")
    both = judged(weights, path, synchronisable=True, synchronisability_weights=other)
    assert both.synchronisable is not None and both.synchronisable.shape == (3,) and ((both.synchronisable > 0) & (both.synchronisable < 1)).all()
    scorer, clip = SyncScorer(other, "cpu"), decode(path, sample_rate_hz=16000, channels=1, short_side=32)
    cuts = [cut_at(start + 1e-6, 0.0, scorer.grid) for start in both.starts_seconds.tolist()]
    expected = scorer.cut_logits(clip.frames, clip.audio[0], cuts, scorer.grid).softmax(-1)[:, 1]
    np.testing.assert_allclose(both.synchronisable, expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="predicts offsets"):
        Judge(JudgeOptions(weights=other, device="cpu"), Limits())


# --- no answer ---

FAULTY = {
    "too_short": (
        Recipe(seconds=Fraction(49, 10), flash_picture=9),
        r"4\.88 s of pictures with sound; an offset is found in 5 s; short_videos=repeat",
    ),
    "no_video": (Recipe(seconds=Fraction(6), video_codec=None), "without a video stream"),
    "no_audio": (Recipe(seconds=Fraction(6), audio_codec=None), "without an audio stream"),
    "silent": (Recipe(seconds=Fraction(51, 10), amplitude=0.0, flash_picture=0), "nothing to hear"),
    "blank": (Recipe(seconds=Fraction(51, 10)), "nothing to see"),
}


@pytest.mark.parametrize("reason", FAULTY)
def test_where_there_is_no_answer_it_is_said_why(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str) -> None:
    recipe, message = FAULTY[reason]
    if reason == "blank":
        monkeypatch.setattr(clips, "picture", lambda recipe, _time: np.full((recipe.height, recipe.width, 3), 90, np.uint8))
    if reason == "silent":
        monkeypatch.setattr(clips, "wave", lambda recipe: np.zeros(round(recipe.seconds * recipe.audio_rate_hz), np.float32))
    make_clip(tmp_path / "clip.mp4", recipe)
    with pytest.raises(MediaError, match=message) as raised:
        judged(weights, tmp_path / "clip.mp4")
    assert raised.value.reason == reason


def test_silent_windows_of_a_video_that_is_not_are_told_apart(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quiet = np.concatenate([np.zeros(round(5.4 * RATE), np.float32), world(0.0)[: round(0.8 * RATE)]])
    monkeypatch.setattr(clips, "wave", lambda _recipe: quiet)
    make_clip(tmp_path / "clip.mkv", container="mkv", seconds=Fraction(31, 5), audio_rate_hz=RATE)
    assert judged(weights, tmp_path / "clip.mkv").faults == ("silent", "", "")


def test_a_short_video_can_be_repeated_and_says_so(weights: str, tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mp4", seconds=Fraction(5, 2))
    found = judged(weights, tmp_path / "clip.mp4", short_videos="repeat")
    clip = decode(tmp_path / "clip.mp4", sample_rate_hz=16000, channels=1, short_side=32)
    expected = SyncScorer(weights, "cpu").offsets(clip.frames, clip.audio, 16000)
    np.testing.assert_allclose(found.probabilities[0], expected.numpy(), atol=1e-5)
    assert found.repeated and found.window_seconds == 2.48 and found.synchronisable is None
    make_clip(tmp_path / "tiny.mp4", seconds=Fraction(2, 5), flash_picture=3)
    with pytest.raises(MediaError, match=r"too_short: 0\.40 s of pictures with sound; an offset is found in 5 s$"):
        judged(weights, tmp_path / "tiny.mp4", short_videos="repeat")


def test_starts_that_cannot_be_are_refused(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = shifted_clip(tmp_path / "clip.mp4", monkeypatch, 0.0)
    for start, offset in ((1.6, 0.0), (0.0, 1.6), (9.0, 0.0)):
        with pytest.raises(MediaError, match="too_short"):
            judged(weights, path, start_seconds=start, offset_seconds=offset)
    with pytest.raises(ValueError, match="begin before the clip does"):
        JudgeOptions(start_seconds=0.0, offset_seconds=-0.6)
    with pytest.raises(ValueError, match=r"multiple of 0\.32 s"):
        JudgeOptions(every_seconds=0.5)
