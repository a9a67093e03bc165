import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio.functional
from torch import Tensor

from model.segments import OFFSET, SEGMENT_SAMPLES, SYNCHRONISABLE, Cut, SegmentGrid, cut_at, draw_cut
from model.synchformer import Synchformer
from model.synchformer_audio import AudioTower, LogMel
from model.synchformer_visual import VisualTower, normalise
from pipeline.media import decode
from pipeline.sync_score import Follower, Layout, SyncScorer, best_of, synchrony
from pipeline.views import view_crop
from tests.model.fill import fill_module
from tests.pipeline.sync_networks import network, small_sync

RATE = 16000


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_sync(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def scorer(weights: str) -> SyncScorer:
    return SyncScorer(weights, "cpu", batch_segments=5)


def pictures(frames: int, height: int = 32, width: int = 41, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def sound(frames: float, seed: int = 0, channels: int = 1) -> np.ndarray:
    """Noise that swells and fades, as long as so many pictures, at 16 kHz."""
    rng, samples = np.random.default_rng(seed), round(frames * 640)
    swell = np.sin(np.arange(samples) / rng.uniform(300, 9000)) ** 2
    return (rng.standard_normal((channels, samples)) * swell / 5).astype(np.float32)


def oracle(frames: np.ndarray, wave: np.ndarray) -> Tensor:
    """Logits of one window: every segment cut out and sent through the whole network, nothing shared and nothing batched."""
    cut = torch.from_numpy(frames[:, 2:30, 6:34].copy())  # the middle 28 of 32 and of 41, rounded down from 6.5
    pixels = torch.stack([normalise(cut[8 * i : 8 * i + 16]) for i in range(14)])
    heard = torch.stack([LogMel()(torch.from_numpy(wave[0, 5120 * i : 5120 * i + 10240])) for i in range(14)])
    return network()(pixels[None], heard[None])[0]


# --- which segments and windows ---


def test_a_clip_of_one_window_is_fourteen_segments() -> None:
    for frames in (120, 125, 127):
        layout = Layout.of(frames, 14)
        assert layout.starts == tuple(range(0, 105, 8)) and layout.windows.tolist() == [[*range(14)]]


def test_windows_of_a_long_clip_overlap_by_half_and_reach_its_end() -> None:
    layout = Layout.of(250, 14)
    assert len(layout.starts) == 30 and layout.starts[-1] + 16 <= 250 < layout.starts[-1] + 16 + 8
    assert layout.windows[:, 0].tolist() == [0, 7, 14, 16]
    assert layout.windows.diff(dim=1).eq(1).all() and layout.windows.max() == 29
    assert Layout.of(128, 14).windows[:, 0].tolist() == [0, 1]
    assert set(Layout.of(1000, 14).windows.flatten().tolist()) == set(range(124))


def test_a_short_clip_goes_round_and_no_segment_is_there_twice() -> None:
    assert Layout.of(64, 14).starts == tuple(range(0, 64, 8))
    assert Layout.of(64, 14).windows.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5]]
    odd = Layout.of(61, 14)
    assert [odd.starts[i] for i in odd.windows[0].tolist()] == [8 * i % 61 for i in range(14)]
    with pytest.raises(ValueError, match=r"15 frames at 25 fps; .* is 16"):
        Layout.of(15, 14)


# --- the network's answer ---


@torch.inference_mode()
def test_one_window_is_what_the_network_says(scorer: SyncScorer) -> None:
    frames, wave = pictures(120), sound(120)
    found = scorer.offsets(frames, wave, RATE)
    assert found.shape == (21,) and found.sum().item() == pytest.approx(1)
    torch.testing.assert_close(found, oracle(frames, wave).softmax(-1), atol=1e-5, rtol=1e-4)
    assert found.max() > 2 / 21


@torch.inference_mode()
def test_a_long_clip_is_the_mean_of_its_windows(scorer: SyncScorer) -> None:
    frames, wave = pictures(251), sound(251)
    firsts = [0, 56, 112, 128]
    windows = [oracle(frames[i : i + 120], wave[:, i * 640 : (i + 120) * 640]).softmax(-1) for i in firsts]
    torch.testing.assert_close(scorer.offsets(frames, wave, RATE), torch.stack(windows).mean(0), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("frames", [64, 61, 17])
def test_a_short_clip_is_repeated(scorer: SyncScorer, frames: int) -> None:
    clip, wave = pictures(frames), sound(frames)
    repeated = np.tile(clip, (8, 1, 1, 1))[:120], np.tile(wave, 8)[:, : 120 * 640]
    torch.testing.assert_close(scorer.offsets(clip, wave, RATE), oracle(*repeated).softmax(-1), atol=1e-5, rtol=1e-4)


def test_the_same_clip_gives_the_same_answer_to_the_bit(scorer: SyncScorer, weights: str) -> None:
    frames, wave = pictures(139), sound(139)
    first = scorer.offsets(frames, wave, RATE)
    assert torch.equal(first, scorer.offsets(frames, wave, RATE))
    assert torch.equal(first, SyncScorer(weights, "cpu", batch_segments=5).offsets(torch.from_numpy(frames), torch.from_numpy(wave), RATE))


def test_arithmetic_in_bfloat16_is_close_and_batches_do_not_matter(weights: str, scorer: SyncScorer) -> None:
    frames, wave = pictures(139), sound(139)
    expected = scorer.offsets(frames, wave, RATE)
    torch.testing.assert_close(SyncScorer(weights, "cpu", batch_segments=3).offsets(frames, wave, RATE), expected, atol=1e-5, rtol=1e-4)
    assert 1e-6 < (SyncScorer(weights, "cpu", "bf16").offsets(frames, wave, RATE) - expected).abs().max() < 0.02


# --- pictures and sound as they come ---


def test_sound_at_other_rates_and_in_stereo(scorer: SyncScorer) -> None:
    frames = pictures(120)
    wave = torchaudio.functional.resample(torch.from_numpy(sound(120.3)), 8000, 16000)[:, : 120 * 640].numpy()  # nothing above 4 kHz
    expected = scorer.offsets(frames, wave, RATE)
    faster = torchaudio.functional.resample(torch.from_numpy(wave), RATE, 44100)
    torch.testing.assert_close(scorer.offsets(frames, faster, 44100), expected, atol=2e-2, rtol=0)
    both = np.concatenate([wave + 0.1, wave - 0.1])
    torch.testing.assert_close(scorer.offsets(frames, both, RATE), expected, atol=1e-4, rtol=1e-3)


def test_sound_that_ends_early_is_silent_then_and_what_is_too_long_is_not_heard(scorer: SyncScorer) -> None:
    frames, wave = pictures(120), sound(120)
    longer = np.concatenate([wave, sound(30, seed=1)], axis=1)
    assert torch.equal(scorer.offsets(frames, longer, RATE), scorer.offsets(frames, wave, RATE))
    shorter, silent = wave[:, :50001], wave.copy()
    silent[:, 50001:] = 0
    assert torch.equal(scorer.offsets(frames, shorter, RATE), scorer.offsets(frames, silent, RATE))
    assert not torch.equal(scorer.offsets(frames, silent, RATE), scorer.offsets(frames, wave, RATE))


@pytest.mark.parametrize(("height", "width"), [(41, 32), (32, 32), (32, 60)])
def test_pictures_of_the_networks_own_size_are_only_cut(scorer: SyncScorer, height: int, width: int) -> None:
    frames = pictures(16, height, width)
    top, left = round((height - 28) / 2), round((width - 28) / 2)
    centre = frames[:, top : top + 28, left : left + 28]
    framed = np.zeros((16, 32, 32, 3), np.uint8)
    framed[:, 2:30, 2:30] = centre
    assert torch.equal(scorer.see(frames).tokens, scorer.see(framed).tokens)


def test_larger_pictures_are_brought_to_size(scorer: SyncScorer) -> None:
    small = pictures(16)
    # Flat squares and smooth edges only: what becomes of finer detail is up to the filter.
    small = np.repeat(np.repeat(small[:, ::8, ::8], 8, axis=1), 8, axis=2)[:, :32, :41]
    large = np.repeat(np.repeat(small, 3, axis=1), 3, axis=2)
    expected, found = scorer.see(small).tokens, scorer.see(large).tokens
    assert (found - expected).std() / expected.std() < 0.2
    assert (scorer.see(pictures(16, seed=1)).tokens - expected).std() / expected.std() > 0.5
    read_only = large[:, ::-1]
    read_only.flags.writeable = False
    assert scorer.see(read_only).tokens.shape == (2, 8, 22)


# --- cuts ---


@torch.inference_mode()
def cut_oracle(model: Synchformer, frames: np.ndarray, wave: np.ndarray, cut: Cut, grid: SegmentGrid) -> Tensor:
    """Logits of one cut: its segments one by one through the whole network."""
    shown = torch.from_numpy(frames[:, 2:30, 6:34].copy())
    pixels = [shown[cut.start_frame + start : cut.start_frame + start + 16] for start in grid.frame_starts()]
    heard = [wave[cut.start_sample + start : cut.start_sample + start + SEGMENT_SAMPLES] for start in grid.sample_starts()]
    spectrograms = LogMel()(torch.from_numpy(np.stack(heard)))
    return model(torch.stack([normalise(own) for own in pixels])[None], spectrograms[None])[0]


def test_cuts_are_compared_where_they_lie_and_a_segment_goes_through_a_tower_once(scorer: SyncScorer) -> None:
    frames, wave = pictures(250), sound(250)[0]
    drawn = draw_cut(random.Random(3), -1.2, 250, 160000, jitter_seconds=0.05)
    cuts = [cut_at(0.0, 0.0), drawn, cut_at(0.64, 0.0), cut_at(0.0, 2.0), cut_at(0.0, 0.0), cut_at(2.32, -1.4)]
    passes: list[tuple[str, int]] = []
    towers = {"pictures": scorer.model.vfeat_extractor, "sound": scorer.model.afeat_extractor}
    hooks = [tower.register_forward_hook(lambda _m, _a, out, name=name: passes.append((name, len(out)))) for name, tower in towers.items()]
    found = scorer.cut_logits(frames, wave, cuts, OFFSET)
    for hook in hooks:
        hook.remove()
    expected = torch.stack([cut_oracle(network(), frames, wave, cut, OFFSET) for cut in cuts])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[0], found[4]) and (found[0] - found[3]).abs().max() > 1e-3
    for name, starts in (("pictures", OFFSET.frame_starts()), ("sound", OFFSET.sample_starts())):
        firsts = [cut.start_frame if name == "pictures" else cut.start_sample for cut in cuts]
        assert sum(n for kind, n in passes if kind == name) == len({first + start for first in firsts for start in starts}) < 14 * 6


def test_a_network_of_the_other_head_answers_with_two_logits(tmp_path: Path) -> None:
    model, scorer = network("synchronisable"), SyncScorer(small_sync(tmp_path, "synchronisable"), "cpu", batch_segments=4)
    assert (scorer.head, scorer.grid) == ("synchronisable", SYNCHRONISABLE)
    frames, wave = pictures(130), sound(130)[0]
    cuts = [cut_at(0.0, 0.0, SYNCHRONISABLE), cut_at(0.6, 0.1, SYNCHRONISABLE)]
    expected = torch.stack([cut_oracle(model, frames, wave, cut, SYNCHRONISABLE) for cut in cuts])
    torch.testing.assert_close(scorer.cut_logits(frames, wave, cuts, SYNCHRONISABLE), expected, atol=1e-5, rtol=1e-4)
    assert scorer.cut_logits(frames, wave, [], SYNCHRONISABLE).shape == (0, 2)
    with pytest.raises(ValueError, match="14 segments in a cut; this network compares 13"):
        scorer.cut_logits(frames, wave, [cut_at(0.0, 0.0)], OFFSET)


def test_a_cut_beyond_the_clip_is_refused(scorer: SyncScorer) -> None:
    frames, wave = pictures(125), sound(125)[0]
    for cut in (cut_at(0.2, 0.0), cut_at(0.0, 0.2), Cut(start_frame=0, frames=125, start_sample=-1, samples=80000, offset_seconds=0.0)):
        with pytest.raises(ValueError, match="beyond a clip of 125 frames and 80000 samples"):
            scorer.cut_logits(frames, wave, [cut_at(0.0, 0.0), cut], OFFSET)


# --- along a video ---


@pytest.mark.parametrize("piece_frames", [31, 400])
def test_a_video_in_pieces_is_answered_as_a_whole_and_little_of_it_is_kept(scorer: SyncScorer, piece_frames: int) -> None:
    frames, wave, starts = pictures(397), sound(397)[0], [0, 16, 24, 112, 208, 271]
    follower, found, answered = Follower(scorer, starts, OFFSET), [], []
    for at in range(0, 397, piece_frames):
        found.append(follower.push(frames[at : at + piece_frames], wave[at * 640 : (at + piece_frames) * 640]))
        answered.append(sum(map(len, found)))
        assert len(follower._pictures) < 16 and len(follower._wave) == 640 * len(follower._pictures)
        assert len(follower._tokens) <= 30  # two windows' segments, on two grids: not the video's
    expected = scorer.cut_logits(frames, wave, [cut_at(start / 25 + 1e-6, 0.0) for start in starts], OFFSET)
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-4)
    last = OFFSET.frame_starts()[-1] + 16  # a window is answered with the piece that completes it
    assert answered == [sum(start + last <= min(at + piece_frames, 397) for start in starts) for at in range(0, 397, piece_frames)]
    with pytest.raises(ValueError, match="639 samples for 1 pictures"):
        follower.push(frames[:1], wave[:639])


# --- candidates ---


def test_candidates_together_are_as_one_by_one_and_the_pictures_are_seen_once(scorer: SyncScorer) -> None:
    frames = pictures(139)
    waves = [sound(139, seed=1), sound(100.5, seed=2, channels=2), sound(150, seed=3)]
    one_by_one = torch.stack([scorer.offsets(frames, wave, RATE) for wave in waves])
    passes: list[int] = []
    hook = scorer.model.vfeat_extractor.register_forward_hook(lambda _module, _args, out: passes.append(len(out)))
    index, scores = scorer.best(frames, waves, RATE)
    hook.remove()
    assert sum(passes) == len(Layout.of(139, 14).starts)
    torch.testing.assert_close(scorer.compare(scorer.see(frames), waves, RATE), one_by_one, atol=1e-5, rtol=1e-4)
    assert scores == pytest.approx(one_by_one[:, 9:12].sum(1).tolist(), abs=1e-5)
    assert scores[index] == max(scores) and len(set(scores)) == 3


def test_the_best_has_most_within_one_class_then_most_at_no_offset() -> None:
    probabilities = torch.zeros(5, 21)
    probabilities[0, [5, 10]] = torch.tensor([0.6, 0.4])
    probabilities[1, [9, 11]] = torch.tensor([0.5, 0.25])
    probabilities[2, [10, 9]] = torch.tensor([0.5, 0.25])
    probabilities[3, [8, 12]] = torch.tensor([0.5, 0.5])
    probabilities[4, [10, 11]] = torch.tensor([0.5, 0.25])
    assert synchrony(probabilities).tolist() == pytest.approx([0.4, 0.75, 0.75, 0, 0.75])
    assert best_of(probabilities) == 2
    assert best_of(probabilities[:2]) == 1


# --- what cannot be done ---


def test_wrong_inputs_are_refused(scorer: SyncScorer, weights: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="15 frames"):
        scorer.offsets(pictures(15), sound(15), RATE)
    with pytest.raises(ValueError, match=r"\(1, 0\); expected \[channels, samples\]"):
        scorer.offsets(pictures(16), np.zeros((1, 0), np.float32), RATE)
    with pytest.raises(ValueError, match="no sound"):
        scorer.best(pictures(16), [], RATE)
    with pytest.raises(ValueError, match="batch_segments is 0"):
        SyncScorer(weights, "cpu", batch_segments=0)
    other = small_sync(tmp_path, "synchronisable")
    with pytest.raises(ValueError, match="predicts offsets, like `sync`"):
        SyncScorer(other, "cpu", head="offset")
    with pytest.raises(ValueError, match="like `synchability`"):
        SyncScorer(weights, "cpu", head="synchronisable")


@pytest.mark.slow
@torch.inference_mode()
def test_a_real_clips_tokens_are_those_of_the_reference(shared: Path) -> None:
    """From the file through decoder, crop, front ends and both towers at full size (two of the segments of pictures; all of the sound)."""
    golden = np.load(shared / "reference" / "golden_e_sync.npz")
    clip = decode((shared / "clips/h264_video_25fps_256side_16000hz_aac/ZYc410CE4Rg_0_10000.mp4").read_bytes(), sample_rate_hz=RATE, channels=1)
    with torch.device("meta"):
        visual, audio = VisualTower().eval(), AudioTower().eval()
    fill_module(visual.to_empty(device="cpu"), "vfeat_extractor.")
    fill_module(audio.to_empty(device="cpu"), "afeat_extractor.")
    _, height, width, _ = clip.frames.shape
    frames = torch.from_numpy(view_crop("", 0, height, width, 224).apply(clip.frames).copy())
    for segment in (3, 13):
        start = OFFSET.frame_starts()[segment]
        # The reference's own arithmetic, in half precision.
        pixels = ((frames[start : start + 16].half() / 255 - 0.5) / 0.5).float().movedim(-1, 0)
        np.testing.assert_allclose(visual(pixels[None, None])[0, 0, :, :16].numpy(), golden["e2e_v0_off0_vfeat_slice"][segment], atol=1e-4)
    wave = torch.from_numpy(clip.audio[0])
    spectrograms = LogMel()(torch.stack([wave[start : start + SEGMENT_SAMPLES] for start in OFFSET.sample_starts()]))
    np.testing.assert_allclose(audio(spectrograms[None])[0, :, :, :16].numpy(), golden["e2e_v0_off0_afeat_slice"], atol=1e-4)
