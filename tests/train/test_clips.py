"""Examples against pictures and samples that say where they are: pictures have their number as brightness, the sound its position."""

import hashlib
import pickle
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.parts import media_decoder
from model.segments import CONTRAST, OFFSET, SYNCHRONISABLE, SegmentGrid, cut_at, offset_class
from model.synchformer_audio import LogMel
from shards.clips import SkipClip
from train.augment import CONTRAST_AUGMENT, PAIR_AUGMENT, AugmentOptions
from train.clips import ContrastClip, PairClip, fitted, opened

SIZE = 7
STILL = AugmentOptions(
    p_zoom=0.0, p_flip=0.0, p_colour=0.0, p_grey=0.0, p_reverb=0.0, p_volume=0.0, p_pitch=0.0, p_low_pass=0.0, p_noise=0.0, random_crop=False
)
"""Random places in the clip, and nothing else."""


@dataclass(frozen=True)
class Numbered:
    """Decodes anything to so many pictures, each of its number's brightness, and so many samples that are their position."""

    frames: int = 250
    samples: int = 160000
    height: int = 8
    width: int = 11

    def __call__(self, mp4: bytes) -> tuple[np.ndarray, np.ndarray]:
        assert mp4 == b"clip"
        pictures = np.broadcast_to(np.arange(self.frames, dtype=np.uint8)[:, None, None, None], (self.frames, self.height, self.width, 3))
        return pictures, np.arange(self.samples, dtype=np.float32)


@dataclass(frozen=True)
class Noise:
    """Random pictures and sound, the same each time."""

    def __call__(self, mp4: bytes) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - any clip
        generator = torch.Generator().manual_seed(3)
        frames = torch.randint(0, 256, (250, 8, 11, 3), dtype=torch.uint8, generator=generator)
        return frames, torch.randn(160000, generator=generator) * 0.1


def places(example: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """First frames and first samples of the segments; each segment must be whole."""
    pixels, sound = example["pixels"], example["sound"]
    assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (16, SIZE, SIZE, 3) and pixels.is_contiguous()
    assert sound.dtype == torch.float32 and sound.shape == (len(pixels), 10240) and sound.is_contiguous()
    starts, samples = pixels[:, 0, 0, 0, 0].long(), sound[:, 0].long()
    assert torch.equal(pixels.long(), (starts[:, None] + torch.arange(16))[:, :, None, None, None].expand(pixels.shape))
    assert torch.equal(sound.long(), samples[:, None] + torch.arange(10240))
    return starts.tolist(), samples.tolist()


# --- stage I ---


def test_evaluation_takes_the_published_segments_in_the_middle() -> None:
    clip = ContrastClip(Numbered(), size=SIZE)
    starts, samples = places(clip(b"clip", "key", 1))
    assert starts == list(CONTRAST.frame_starts()) == list(range(13, 222, 16))
    assert samples == [640 * start for start in starts]
    other = clip(b"clip", "key", 2)
    assert places(other) == (starts, samples)


def test_a_shorter_clip_has_its_segments_in_its_own_middle() -> None:
    # The sound ends after 235 pictures.
    clip = ContrastClip(Numbered(frames=240, samples=235 * 640 + 77), size=SIZE)
    assert places(clip(b"clip", "key", 1))[0][0] == (235 - 224) // 2
    few = replace(clip, decode=Numbered(frames=100), grid=SegmentGrid(4.0, 6, 16))
    assert places(few(b"clip", "key", 1))[0] == list(range(2, 98, 16))


def test_training_draws_the_start_and_the_jitter() -> None:
    clip = ContrastClip(Numbered(), size=SIZE, augment=STILL)
    drawn = [places(clip(b"clip", "key", seed)) for seed in range(200)]
    starts, jitters = {s[0] for s, _ in drawn}, [a[0] - 640 * s[0] for s, a in drawn]
    assert (min(starts), max(starts)) == (0, 26) and len(starts) == 27
    assert all(s == list(range(s[0], s[0] + 14 * 16, 16)) and np.diff(a).tolist() == [10240] * 13 for s, a in drawn)
    assert max(jitters) > 700 and min(jitters) < -700 and max(map(abs, jitters)) <= 800
    assert all(a[0] == 640 * s[0] for s, a in drawn if s[0] in (0, 26))
    assert places(replace(clip, jitter_seconds=0.0)(b"clip", "key", 1))[1][0] % 640 == 0


def test_a_clip_that_is_too_short_is_left_out_and_says_why() -> None:
    clip = ContrastClip(Numbered(frames=223), size=SIZE)
    with pytest.raises(SkipClip, match=r"a clip of 8\.92 s: too short for 14 segments, which are 8\.96 s"):
        clip(b"clip", "key", 1)
    assert replace(clip, decode=Numbered(frames=224, samples=250 * 640))(b"clip", "key", 1)["pixels"].shape[0] == 14


# --- stages II and III ---


def test_fixed_cuts_are_the_published_ones() -> None:
    """2.32 s is frame 57, of a cut whose segments begin two frames in; sound 0.6 s ahead begins later."""
    clip = PairClip(Numbered(), fixed={"a": (2.32, 0.6), "b": (2.32, -1.4)}, size=SIZE)
    for key, offset in (("a", 0.6), ("b", -1.4)):
        example, cut = clip(b"clip", key, 5), cut_at(2.32, offset)
        starts, samples = places(example)
        assert starts == [57 + start for start in range(2, 107, 8)] == [cut.start_frame + start for start in OFFSET.frame_starts()]
        assert samples == [cut.start_sample + start for start in OFFSET.sample_starts()]
        assert samples[0] == int((2.32 + offset) * 16000) + 1280
        assert example["target"].item() == offset_class(offset) and example["target"].dtype == torch.int64
        assert example["offset_seconds"].item() == pytest.approx(offset)
    with pytest.raises(SkipClip, match="the list of offsets does not name it"):
        clip(b"clip", "c", 5)


def test_a_fixed_cut_that_the_clip_has_not_is_left_out() -> None:
    clip = PairClip(Numbered(frames=200), fixed={"a": (3.0, 0.0), "b": (3.0, 0.2), "c": (3.04, 0.0)}, size=SIZE)
    assert clip(b"clip", "a", 1)["target"].item() == 10
    for key in "bc":
        with pytest.raises(SkipClip, match=r"a clip of 8\.00 s: too short for what the list says"):
            clip(b"clip", key, 1)


@pytest.mark.parametrize("augment", [None, STILL])
def test_drawn_offsets_are_what_the_sound_is_off_by(augment: AugmentOptions | None) -> None:
    clip = PairClip(Numbered(), augment=augment, size=SIZE)
    classes, jitters = set(), []
    for seed in range(200):
        example = clip(b"clip", "key", seed)
        starts, samples = places(example)
        assert np.diff(starts).tolist() == [8] * 13 and np.diff(samples).tolist() == [5120] * 13
        jitter = samples[0] - 640 * starts[0] - 16000 * example["offset_seconds"].item()
        jitters.append(round(jitter))
        classes.add(int(example["target"]))
        assert int(example["target"]) == offset_class(example["offset_seconds"].item())
    assert classes == set(range(21))
    if augment is None:
        # The float product may be truncated to the sample before.
        assert set(jitters) <= {0, -1}
    else:
        assert min(jitters) < -700 and 700 < max(jitters) <= 800


def test_training_begins_anywhere_in_a_cut() -> None:
    clip = PairClip(Numbered(), augment=STILL, fixed={"key": (3.0, 0.4)}, size=SIZE)
    drawn = [places(clip(b"clip", "key", seed)) for seed in range(60)]
    assert {starts[0] for starts, _ in drawn} == set(range(75, 81))
    assert all(samples[0] == 640 * starts[0] + 6400 for starts, samples in drawn)


def test_half_of_stage_threes_pairs_have_nothing_in_common() -> None:
    clip = PairClip(Numbered(), grid=SYNCHRONISABLE, question="synchronisable", size=SIZE)
    targets = []
    for seed in range(200):
        example = clip(b"clip", "key", seed)
        starts, samples = places(example)
        off = abs(samples[0] - 640 * starts[0]) / 16000
        assert off == pytest.approx(4.48, abs=1e-4) if example["target"] == 0 else off < 2.001
        targets.append(int(example["target"]))
    assert 75 < sum(targets) < 125
    listed = replace(clip, fixed={"in": (3.0, -2.0), "out": (4.48, -4.48)})
    assert [int(listed(b"clip", key, 0)["target"]) for key in ("in", "out")] == [1, 0]


@pytest.mark.parametrize(("question", "grid", "frames"), [("offset", OFFSET, 175), ("synchronisable", SYNCHRONISABLE, 224)])
def test_clips_must_have_room_for_every_offset(question: str, grid: SegmentGrid, frames: int) -> None:
    """Else short clips would have small offsets only."""
    clip = PairClip(Numbered(frames=frames), grid=grid, question=question, size=SIZE)  # pyright: ignore[reportArgumentType] - one of the two
    for seed in range(60):
        clip(b"clip", "key", seed)
    with pytest.raises(SkipClip, match="too short for any offset"):
        replace(clip, decode=Numbered(frames=frames - 1))(b"clip", "key", 0)


# --- all of them ---


def test_examples_of_a_real_clip_are_the_published_ones_to_the_last_bit(shared: Path) -> None:
    golden = np.load(shared / "reference/golden_d_rgb.npz")
    mp4 = (shared / "clips/h264_video_25fps_256side_16000hz_aac/ZYc410CE4Rg_0_10000.mp4").read_bytes()
    decoded = media_decoder()(mp4)
    pairs = PairClip(lambda _: decoded, fixed={"start": (0.0, 0.0), "later": (1.2, -0.6)})
    examples = {"stage1": ContrastClip(lambda _: decoded)(mp4, "", 0), "sync": pairs(mp4, "start", 0), "sync_v1.2_off-0.6": pairs(mp4, "later", 0)}
    for name, example in examples.items():
        hashes = [hashlib.sha256(segment.movedim(-1, 1).contiguous().numpy()).hexdigest() for segment in example["pixels"]]
        assert hashes == golden[f"{name}_seg_u8_sha256"].tolist()
        means = LogMel()(example["sound"]).mean((1, 2))
        np.testing.assert_allclose(means, golden[f"{name}_audio_seg_mean"], atol=1e-6)


@pytest.mark.parametrize("clip", [ContrastClip(Noise(), augment=CONTRAST_AUGMENT, size=SIZE), PairClip(Noise(), augment=PAIR_AUGMENT, size=SIZE)])
def test_an_example_follows_from_its_seed_in_any_process(clip: ContrastClip | PairClip) -> None:
    random.seed(1)
    torch.manual_seed(1)
    first = clip(b"clip", "key", 2**62 + 11)
    random.seed(2)
    again, other = (pickle.loads(pickle.dumps(clip))(b"clip", "key", seed) for seed in (2**62 + 11, 12))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], other["pixels"])


def test_segments_are_changed_apart_or_together() -> None:
    """A flip is seen in the first column: of the clip as a whole all segments have it or none."""
    flips = replace(STILL, p_flip=0.5, p_volume=0.5)
    decoded = torch.arange(11, dtype=torch.uint8)[None, None, :, None].expand(250, 8, 11, 3), torch.full((160000,), 0.1)
    for each, kinds in (("segment", {True, False}), ("clip", None)):
        clip = ContrastClip(lambda mp4: decoded, augment=replace(flips, each=each), size=SIZE)  # noqa: ARG005 - any clip
        seen = [clip(b"", "key", seed) for seed in range(12)]
        flipped = [{bool(s[0, 0, 0, 0] > s[0, 0, -1, 0]) for s in example["pixels"]} for example in seen]
        louder = [set((example["sound"] > 0.15).any(1).tolist()) for example in seen]
        if kinds is not None:
            assert flipped.count(kinds) >= 11 and louder.count(kinds) >= 11
        else:
            assert {True} in flipped and {False} in flipped and all(len(kind) == 1 for kind in flipped + louder)


def test_the_clip_is_as_long_as_what_is_shorter() -> None:
    frames, sound = opened(Numbered(frames=240, samples=250 * 640)(b"clip"), 10.0)
    assert (len(frames), len(sound)) == (240, 240 * 640)
    frames, sound = opened(Numbered(frames=300, samples=300 * 640)(b"clip"), 10.0)
    assert (len(frames), len(sound)) == (250, 160000)
    # As published: 203 / 25 * 25 is less than 203 in floating point.
    frames, sound = opened(Numbered(frames=203, samples=300 * 640)(b"clip"), 10.0)
    assert (len(frames), len(sound)) == (202, 202 * 640)


def test_pictures_of_another_size_are_scaled_to_the_published_proportion() -> None:
    frames = torch.randint(0, 256, (3, 48, 66, 3), dtype=torch.uint8)
    assert fitted(frames, 14).shape == (3, 16, 22, 3)
    assert fitted(frames.movedim(1, 2), 14).shape == (3, 22, 16, 3)
    assert fitted(frames, 42) is frames
    expected = frames.float().reshape(3, 16, 3, 22, 3, 3).mean((2, 4))
    inside = (slice(None), slice(2, -2), slice(2, -2))
    assert (fitted(frames, 14).float() - expected)[inside].abs().mean() < 20
