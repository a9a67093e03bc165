"""Scores from stored segments: what is compared with what, and that sound that fits and sound that does not are told apart."""

import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from model.avclip import Avclip
from model.segments import OFFSET
from model.synchformer import MODULE_KIND, Head
from model.synchformer_audio import AudioTower
from model.synchformer_visual import VisualTower
from model.weights import save_state
from pipeline.feature_scores import AVCLIP, SCORERS, SYNC, SyncJudge, Tokens, avclip_scores, offset_scores, similarities, windows
from pipeline.media import MediaError
from pipeline.scorers import Item, ScoreOptions, registered
from pipeline.sync_answers import StoredGrid, TokenScorer
from shards.dataset import create_or_check, new_info
from shards.read import Index
from shards.write import Entry, write_shard
from tests.model.fill import fill_module
from tests.pipeline.sync_networks import SMALL_AUDIO, SMALL_VISUAL, network, small_sync


def tokens(seed: int, visual: int = 27, audio: int = 210, width: tuple[int, int] = (22, 26)) -> Tokens:
    draw = np.random.default_rng(seed)
    return Tokens(draw.normal(size=(visual, 8, width[0])).astype(np.float16), draw.normal(size=(audio, 6, width[1])).astype(np.float16))


# --- how alike ---


@pytest.mark.parametrize(("hop_frames", "hop_samples"), [(8, 640), (4, 320), (16, 640), (8, 3000)])
def test_pictures_are_compared_with_the_sound_that_begins_when_they_do(hop_frames: int, hop_samples: int) -> None:
    frames = 91
    visual, audio = (frames - 16) // hop_frames + 1, (frames * 640 - 10240) // hop_samples + 1
    clip = tokens(3, visual, audio, (21, 21))
    found = similarities(clip, StoredGrid(hop_frames, hop_samples))
    for i in range(len(found)):
        for j in range(len(found)):
            begins = [abs(a * hop_samples - j * hop_frames * 640) for a in range(audio)]
            near = [a for a in range(audio) if begins[a] == min(begins)]
            v = clip.visual[i].astype(np.float64).mean(0)
            cosines = []
            for a in near:
                heard = clip.audio[a].astype(np.float64).mean(0)
                cosines.append(v @ heard / np.linalg.norm(v) / np.linalg.norm(heard))
            assert min(abs(found[i, j] - cosine) for cosine in cosines) < 1e-5
    assert len(found) == visual or hop_samples == 3000


@torch.inference_mode()
def test_similarity_is_what_segment_avclip_compares() -> None:
    model = Avclip(VisualTower(SMALL_VISUAL), AudioTower(replace(SMALL_AUDIO, width=22))).eval()
    fill_module(model)
    pixels, spectrograms = torch.randn(1, 5, 3, 16, 28, 28), torch.randn(1, 5, 128, 66)
    expected = model(pixels, spectrograms)
    visual, audio = model.v_encoder(pixels)[0], model.a_encoder(spectrograms)[0]
    found = similarities(Tokens(visual.half().numpy(), audio.half().numpy()), StoredGrid(16, 10240))
    torch.testing.assert_close(torch.from_numpy(found), expected.similarity * model.logit_scale, atol=2e-3, rtol=0)
    assert float((expected.similarity * model.logit_scale).std()) > 0.01


def test_similarity_is_of_the_same_time_and_contrast_what_it_is_above_others() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(11, 1, 21)).astype(np.float16)
    clip = Tokens(np.repeat(shared, 8, axis=1), np.repeat(np.repeat(shared, 8, axis=0), 6, axis=1)[: 10 * 8 + 1])
    found = avclip_scores(clip, StoredGrid(8, 640))
    assert found["avclip_similarity"] == pytest.approx(1, abs=1e-3)
    units = shared[:, 0].astype(np.float32) / np.linalg.norm(shared[:, 0].astype(np.float32), axis=1, keepdims=True)
    others = [float(units[i] @ units[j]) for i in range(11) for j in range(11) if abs(i - j) >= 2]  # neighbours share 8 of 16 frames
    assert found["avclip_contrast"] == pytest.approx(1 - np.mean(others), abs=1e-3)
    late = Tokens(clip.visual[:-3], clip.audio[24:])
    other = avclip_scores(late, StoredGrid(8, 640))
    assert other["avclip_similarity"] is not None and other["avclip_similarity"] < 0.5
    assert other["avclip_contrast"] is not None and other["avclip_contrast"] < 0.5


def test_a_clip_of_one_segment_has_no_other_time() -> None:
    found = avclip_scores(tokens(1, 2, 9, (21, 21)), StoredGrid(8, 640))
    assert found["avclip_contrast"] is None and found["avclip_similarity"] is not None
    with pytest.raises(MediaError, match="0 of sound are stored"):
        avclip_scores(tokens(1, 2, 0, (21, 21)), StoredGrid(8, 640))


# --- how far apart ---


def test_windows_lie_along_the_clip_and_hear_what_they_see() -> None:
    rng = random.Random(1)
    for hop_frames, hop_samples in ((8, 640), (4, 320), (8, 160), (2, 1280)):
        stored = StoredGrid(hop_frames, hop_samples)
        for _ in range(50):
            frames, cut_short = rng.randint(121, 260), rng.choice([0, 0, 5, 640])
            visual, audio = (frames - 16) // hop_frames + 1, (frames * 640 - 10240 - cut_short) // hop_samples + 1
            clip = tokens(0, visual, audio, (1, 1))
            found = windows(clip, stored, 14)
            assert found.visual.min() == 0 and found.visual.max() < visual and found.audio.max() < audio
            starts, sounds = found.visual * hop_frames, found.audio * hop_samples
            assert (np.diff(starts, axis=1) == 8).all() and (np.diff(sounds, axis=1) == 8 * 640).all()
            assert (np.abs(sounds - starts * 640) <= hop_samples / 2).all()
            assert (found.starts_seconds == starts[:, 0] / 25).all()
            assert (np.diff(starts[:, 0]) <= 16).all() and (starts[:-1, 0] % 16 == 0).all()
            unseen = (visual - 1) * hop_frames - starts[-1, -1]
            assert unseen == 0 or (cut_short and unseen <= hop_frames)
    with pytest.raises(MediaError, match=r"13 segments of pictures and 210 of sound are stored; an answer is found in 4\.8 s"):
        windows(tokens(0, 13), StoredGrid(8, 640), 14)
    with pytest.raises(ValueError, match="featurise with hops that divide these"):
        windows(tokens(0), StoredGrid(16, 640), 14)


@pytest.mark.parametrize("head", ["offset", "synchronisable"])
def test_answers_are_those_of_the_network_for_each_window(tmp_path: Path, head: Head) -> None:
    weights, stored, model = small_sync(tmp_path, head), StoredGrid(8, 640), network(head)
    clips = [tokens(1), tokens(2, 19, 145), tokens(4, 14, 110)]
    judge = SyncJudge(weights, head=head, device="cpu")
    found = judge.probabilities(clips, stored)
    for clip, (where, said) in zip(clips, found, strict=True):
        assert said.shape == (len(where.visual), 21 if head == "offset" else 2)
        for number in range(len(said)):
            v, a = (torch.from_numpy(part.astype(np.float32))[None] for part in (clip.visual[where.visual[number]], clip.audio[where.audio[number]]))
            with torch.inference_mode():
                expected = model.compare(v, a).softmax(-1)[0]
            torch.testing.assert_close(torch.from_numpy(said[number]), expected, atol=1e-5, rtol=1e-4)
    ((_, alone),) = judge.probabilities(clips[1:2], stored)
    np.testing.assert_allclose(alone, found[1][1], atol=1e-6)
    with pytest.raises(MediaError, match="5 segments of pictures"):
        judge.probabilities([clips[0], tokens(7, 5)], stored)


def test_one_answer_of_several_windows() -> None:
    where = windows(tokens(0), StoredGrid(8, 640), OFFSET.segments)
    said = np.full((len(where.visual), 21), 0.01, np.float32)
    said[:-1, 13], said[-1, 2] = 0.8, 0.8
    found = offset_scores(where, said)
    assert len(said) == 8 and found["sync_agreement"] == pytest.approx(7 / 8)
    assert found["sync_offset_seconds"] == pytest.approx(0.6, abs=0.01)
    assert found["sync_probability"] == pytest.approx((7 * 0.8 + 0.01) / 8)


def test_another_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="like `sync`"):
        TokenScorer(small_sync(tmp_path, "synchronisable"), "cpu", head="offset")
    with pytest.raises(ValueError, match="like `synchability`"):
        SyncJudge(small_sync(tmp_path), head="synchronisable", device="cpu")


# --- as scorers ---


def dataset(folder: Path, audio_width: int = 22, **changes: object) -> Index:
    """Two clips that can be compared and one that is too short for a window."""
    tower = {"weights_sha256": "ab" * 32}
    info = new_info("features", {"hop_frames": 8, "tower": tower, "audio": {"hop_samples": 640, "tower": tower}} | changes)
    create_or_check(folder, info)
    entries = []
    for number, (visual, audio) in enumerate(((27, 210), (5, 34), (19, 145))):
        clip = tokens(number, visual, audio, (22, audio_width))
        members = {"avclip.npy": clip.visual[None], "avclip_audio.npy": clip.audio[None]}
        entries.append(Entry(f"clip-{number}", "test", None, f"{number}.mp4", 9.0, members))
    write_shard(folder, "test-000000", entries)
    return Index.open(folder)


def items(index: Index) -> list[Item]:
    return [Item(str(index.keys[row]), index.info.spec, partial(index.member, row)) for row in range(len(index))]


def test_scorers_read_stored_members_and_give_their_columns(tmp_path: Path) -> None:
    alike, different = (items(dataset(tmp_path / f"features-{width}", width)) for width in (22, 26))
    options = ScoreOptions(sync_weights=small_sync(tmp_path), synchronisability_weights=small_sync(tmp_path, "synchronisable"), device="cpu")
    for scorer in SCORERS:
        long, short, other = alike if scorer is AVCLIP else different
        score = scorer.make(options)
        rows = score([long, other])
        assert registered()[scorer.name] is scorer and len(scorer.version(options)) >= 1
        assert all(row.keys() == scorer.columns.keys() and all(type(value) is float for value in row.values()) for row in rows)
        assert rows[0] != rows[1]
        for item, row in zip((long, other), rows, strict=True):
            assert score([item])[0] == pytest.approx(row, abs=1e-5)
        if scorer is not AVCLIP:
            with pytest.raises(MediaError, match="too_short"):
                score([long, short])
    assert AVCLIP.make(options)([alike[1]])[0]["avclip_similarity"] is not None


def test_features_of_towers_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    audio = {"hop_samples": 640, "tower": {"weights_sha256": "cd" * 32}}
    (first, *_) = items(dataset(tmp_path / "mixed", audio=audio))
    with pytest.raises(ValueError, match="of pictures are of weights abababababab, those of sound of cdcdcdcdcdcd"):
        AVCLIP.make(ScoreOptions())([first])
    (bare, *_) = items(dataset(tmp_path / "bare", audio=None))
    with pytest.raises(ValueError, match="featurise with audio"):
        AVCLIP.make(ScoreOptions())([bare])
    module = network()
    weights = str(tmp_path / "model.safetensors")
    state = {name: tensor for name, tensor in module.state_dict().items() if "feat_extractor" not in name}
    towers = {"visual": {"sha256": "ef" * 32}, "audio": {"sha256": "ab" * 32}}
    save_state(weights, state, {"kind": MODULE_KIND, "sync": asdict(module.config), "towers": towers})
    (good, *_) = items(dataset(tmp_path / "features"))
    with pytest.raises(ValueError, match=r"another tower \(of pictures: efefefefefef\)"):
        SYNC.make(ScoreOptions(sync_weights=weights, device="cpu"))([good])


def test_a_version_names_what_decides_the_scores_and_refuses_other_networks(tmp_path: Path) -> None:
    sync, can = small_sync(tmp_path), small_sync(tmp_path, "synchronisable")
    options = ScoreOptions(sync_weights=sync)
    assert SYNC.version(options) == SYNC.version(replace(options, batch_clips=3, device="cpu")) != SYNC.version(replace(options, precision="bf16"))
    with pytest.raises(ValueError, match="expected a Synchformer that predicts offsets, like `sync`"):
        SYNC.version(ScoreOptions(sync_weights=can))
    with pytest.raises(ValueError, match="neither a file nor one of the published weights"):
        SYNC.version(ScoreOptions(sync_weights=str(tmp_path / "absent.safetensors")))
