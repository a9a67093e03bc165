"""Evaluations of small networks on clips made by program, from media and from the features of the same clips."""

import csv
import json
import random
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from configs import storage
from model.avclip import Avclip, save_avclip, shifted_windows
from model.segments import OFFSET, SEGMENT_SAMPLES, Cut, SegmentGrid, cut_at, draw_cut, draw_offset, offset_class
from model.synchformer import MODULE_KIND, SyncConfig, Synchformer, save_synchformer
from model.synchformer_audio import AudioTower, AudioTowerConfig, LogMel
from model.synchformer_visual import VisualTower, VisualTowerConfig, normalise
from model.weights import save_state, sha256_file
from pipeline import evaluate_sync
from pipeline.decode import decode
from pipeline.discover import Clip
from pipeline.evaluate_sync import EvaluateSyncConfig, Evaluation, main, run, stage_of
from pipeline.features import AudioOptions, CodecOptions, Decoded, FeatureOptions, Featuriser, TowerOptions
from pipeline.featurise import feature_entry, feature_info
from pipeline.sync_answers import StoredGrid, tight
from pipeline.sync_score import SyncScorer
from pipeline.views import view_crop
from shards.dataset import create_or_check, new_info
from shards.write import Entry, write_manifest, write_shard
from tests.model.fill import fill_module
from tests.pipeline.clips import make_clip
from tests.s3 import S3

SMALL_VISUAL = VisualTowerConfig(image_size=28, patch_size=14, tubelet=2, width=22, depth=1, heads=2)
SMALL_AUDIO = AudioTowerConfig(width=22, depth=1, heads=2)
SMALL = SyncConfig(visual_width=22, audio_width=22, width=21, depth=2, heads=3)
CLIPS = {"one": (250, "dog"), "two": (271, "axe"), "three": (250, "dog"), "short": (150, "axe"), "fourth": (247, "tap")}
"""Frames and label of each clip."""
FIXED = (
    "path,offset_sec,vstart_sec\none,0.4,0.24\none,-1.0,2.16\nthree,2.0,3.0\ntwo,0.0,2.32\nabsent,0.2,1.0\nbroken,0.0,1.0\nshort,-0.2,3.0\nlost,0,0\n"
)
"""Of `one`, the first segments start at frames 8 and 56, where some are stored."""


def network(head: str = "offset", segments: int = 14) -> Synchformer:
    model = Synchformer(VisualTower(SMALL_VISUAL), AudioTower(SMALL_AUDIO), SyncConfig(**{**vars(SMALL), "head": head, "segments": segments})).eval()
    fill_module(model)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media dataset, the feature dataset of it, networks and a list, all small."""
    folder = tmp_path_factory.mktemp("sync")
    save_synchformer(folder / "sync.safetensors", network())
    save_synchformer(folder / "synchability.safetensors", network("synchronisable", 13))
    stage1 = Avclip(VisualTower(SMALL_VISUAL), AudioTower(SMALL_AUDIO)).eval()
    fill_module(stage1)
    for tower, prefix in ((stage1.v_encoder, "vfeat_extractor."), (stage1.a_encoder, "afeat_extractor.")):
        fill_module(tower, prefix)
    save_avclip(folder / "avclip.safetensors", stage1)
    entries = [_entry(folder, number, key, *CLIPS[key]) for number, key in enumerate(CLIPS)]
    entries.append(Entry("broken", "test", None, "broken.mp4", reason="truncated", message="half of it"))
    create_or_check(folder / "media", new_info("media", {"made": "by program"}))
    write_shard(folder / "media", "test-000000", entries[:3])
    write_shard(folder / "media", "test-000001", entries[3:])
    write_manifest(folder / "media")
    _featurise(folder, folder / "features", entries)
    (folder / "fixed.csv").write_text(FIXED)
    return folder


def _entry(folder: Path, number: int, key: str, frames: int, label: str) -> Entry:
    path = folder / f"{key}.mp4"
    make_clip(
        path,
        seconds=Fraction(frames, 25),
        width=48,
        height=32,
        audio_rate_hz=16000,
        layout="mono",
        flash_picture=40 + 31 * number,
        amplitude=0.05 + 0.03 * number,
        video_options=(("preset", "ultrafast"),),
    )
    return Entry(key, "test", label, path.name, frames / 25, {"mp4": path.read_bytes(), "json": b"{}"})


def _featurise(folder: Path, out: Path, entries: list[Entry], hop_frames: int = 8, hop_samples: int = 640) -> None:
    weights = str(folder / "avclip.safetensors")
    options = FeatureOptions(
        hop_frames=hop_frames, tower=TowerOptions(weights, device="cpu"), codec=CodecOptions("none"), audio=AudioOptions(weights, hop_samples)
    )
    create_or_check(out, feature_info(options, {"media_fingerprint": "0" * 64}))
    featuriser, members = Featuriser(options), {entry.key: entry.members for entry in entries if entry.members}

    def read(clip: Clip) -> Decoded:
        mp4 = members[clip.key]["mp4"]
        assert isinstance(mp4, bytes)
        decoded = decode(mp4, sample_rate_hz=16000, channels=1)
        return Decoded(decoded.frames, None, heard=decoded.audio[0])

    clips = [Clip(entry.key, entry.source, entry.split, entry.label) for entry in entries if entry.ok]
    stored = [feature_entry(clip, features, featuriser) for clip, features in featuriser.run(clips, read)]
    write_shard(out, "test-000000", [*stored, *(entry for entry in entries if not entry.ok)])
    write_manifest(out)


def config(world: Path, data: str = "media", weights: str = "sync", **changes: object) -> EvaluateSyncConfig:
    named = {name: str(world / f"{value}.safetensors") for name, value in changes.items() if name == "synchronisability_weights"}
    return EvaluateSyncConfig(**{"data": str(world / data), "weights": str(world / f"{weights}.safetensors"), "device": "cpu", **changes, **named})


@pytest.fixture(scope="module")
def decoded(world: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    clips = {key: decode((world / f"{key}.mp4").read_bytes(), sample_rate_hz=16000, channels=1) for key in CLIPS}
    return {key: (clip.frames, clip.audio[0]) for key, clip in clips.items()}


# --- offsets ---


def test_fixed_offsets_from_media(world: Path, decoded: dict, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config(world, list=str(world / "fixed.csv")))
    scorer = SyncScorer(str(world / "sync.safetensors"), "cpu")
    cuts = {("one", 0): (0.24, 0.4), ("one", 1): (2.16, -1.0), ("three", 0): (3.0, 2.0), ("two", 0): (2.32, 0.0)}
    assert [(answer.key, answer.repeat) for answer in found.answers] == [("one", 0), ("one", 1), ("three", 0), ("two", 0)]
    hits = []
    for answer in found.answers:
        start, offset = cuts[answer.key, answer.repeat]
        (expected,) = scorer.cut_logits(*decoded[answer.key], [cut_at(start, offset)], OFFSET)
        torch.testing.assert_close(torch.tensor(answer.logits), expected, atol=1e-5, rtol=1e-5)
        assert (answer.offset_seconds, answer.moved_frames, answer.offset_error_samples) == (offset, 0, 0)
        hits.append(int(expected.argmax()) == offset_class(offset))
    assert next(answer.start_frame for answer in found.answers if answer.key == "two") == 57  # 2.32 s, truncated as published
    rows = {(row.measure, row.label): row for row in found.rows}
    assert rows["offset Acc@1", None].value == sum(hits) / 4 and rows["offset Acc@1", None].clips == 3
    assert rows["offset Acc@1", "axe"].answers == 1
    assert {(item.key, item.reason) for item in found.missing} == {
        ("absent", "absent"),
        ("lost", "absent"),
        ("broken", "truncated"),
        ("short", "too_short"),
    }
    out = capsys.readouterr().out
    assert "stage II, offsets" in out and "cuts lie exactly" in out
    assert "4 of 7 clips are missing: 2 absent, 1 truncated, 1 too_short: absent, broken, lost, short" in out


def test_stored_segments_where_the_cut_lies_on_them_answer_as_media(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media, features = (run(config(world, data, list=str(world / "fixed.csv"))) for data in ("media", "features"))
    assert cuts_of(features) == cuts_of(media)
    by_media = {(a.key, a.repeat): torch.tensor(a.logits) for a in media.answers}
    moved = {(a.key, a.repeat): (a.moved_frames, a.offset_error_samples) for a in features.answers}
    # `one` twice lies on the grid of 8 frames; 3.0 s + 2 is frame 77, 2.32 s + 2 is 59. Offsets of 0.2 s are whole hops of 640 samples. Products
    # of floats are truncated in samples too: 2.32 s is sample 37119, a sample before frame 58 and 639 after frame 57.
    assert moved["one", 0] == moved["one", 1] == (0, 0) and moved["three", 0] == (3, 0)
    assert moved["two", 0][0] == -3 and abs(moved["two", 0][1]) <= 320
    for answer in features.answers:
        difference = (torch.tensor(answer.logits) - by_media[answer.key, answer.repeat]).abs().max()
        assert difference < 0.02 if moved[answer.key, answer.repeat] == (0, 0) else difference > 0
    assert features.missing == media.missing or {m.key for m in features.missing} == {m.key for m in media.missing}
    assert "stored segments nearest to the cuts: these begin up to 0.12 s" in capsys.readouterr().out


def cuts_of(found: Evaluation) -> list[tuple]:
    return [(a.key, a.repeat, a.offset_seconds, a.start_frame, a.start_sample) for a in found.answers]


def test_drawn_cuts_are_the_same_for_media_and_features_and_depend_on_the_clip_alone(world: Path, tmp_path: Path) -> None:
    media, features = (run(config(world, data, iter_times=3, seed=5)) for data in ("media", "features"))
    asked = cuts_of(media)
    assert asked == cuts_of(features) and len(asked) == 12 == len(set(asked))
    assert [(item.key, item.reason) for item in media.missing] == [("short", "too_short")] and "needs their sum" in media.missing[0].message
    (tmp_path / "ids.txt").write_text("three\n")
    alone = run(config(world, "features", iter_times=2, seed=5, list=str(tmp_path / "ids.txt")))
    assert cuts_of(alone) == [cut for cut in asked if cut[0] == "three"][:2]
    together = [a.logits for a in features.answers if a.key == "three"]
    torch.testing.assert_close(torch.tensor([a.logits for a in alone.answers]), torch.tensor(together[:2]), atol=1e-5, rtol=1e-5)
    assert cuts_of(run(config(world, "features", iter_times=3, seed=6))) != asked


def test_of_a_longer_clip_the_first_ten_seconds(world: Path) -> None:
    found = run(config(world, "features", iter_times=200))
    ends = [max(a.start_frame + 125, -(-(a.start_sample + 80000) // 640)) for a in found.answers if a.key == "two"]
    assert 240 < max(ends) <= 250  # of 271
    offsets = [a.offset_seconds for a in found.answers]
    assert {round(offset / 0.2) for offset in offsets} == set(range(-10, 11))


def test_classes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.csv").write_text("class\tis_sparse\ndog\ty\naxe\tn\ntap\ty\n")
    found = run(config(world, "features", classes=str(tmp_path / "classes.csv")))
    assert [a.key for a in found.answers] == ["fourth", "one", "three"] and not found.missing
    assert "offset Acc@1, dog" in capsys.readouterr().out


# --- stage III ---


def test_synchronisability_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media, features = (run(config(world, data, weights="synchability", iter_times=9)) for data in ("media", "features"))
    assert media.stage == 3
    true = [(a.key, a.offset_seconds, a.synchronisable) for a in media.answers]
    assert true == [(a.key, a.offset_seconds, a.synchronisable) for a in features.answers]
    assert all((abs(offset) == 4.48) != positive for _, offset, positive in true) and 0.2 < sum(p for *_, p in true) / len(true) < 0.8
    assert [row.measure for row in media.rows] == ["synchronisable Acc@1", "synchronisable AUC-ROC"]
    share = np.mean([(a.synchronisable_probability > 0.5) == a.synchronisable for a in media.answers])
    assert media.rows[0].value == pytest.approx(share)
    assert "stage III" in capsys.readouterr().out


def test_both_networks_see_the_same_cuts(world: Path, decoded: dict) -> None:
    found = run(config(world, synchronisability_weights="synchability", iter_times=4))
    offset, synchronisable = (SyncScorer(str(world / f"{name}.safetensors"), "cpu") for name in ("sync", "synchability"))
    for answer in found.answers[:5]:
        assert answer.start_frame is not None and answer.start_sample is not None
        cut = Cut(answer.start_frame, 120, answer.start_sample, 76800, answer.offset_seconds)
        (logits,) = offset.cut_logits(*decoded[answer.key], [cut], SegmentGrid(4.8, 14, 8))
        (said,) = synchronisable.cut_logits(*decoded[answer.key], [cut], SegmentGrid(4.48, 13, 8))  # the first 13 of the same segments
        torch.testing.assert_close(torch.tensor(answer.logits), logits, atol=1e-5, rtol=1e-5)
        assert answer.synchronisable_probability == pytest.approx(float(said.softmax(0)[1]), abs=1e-5)
    assert {abs(a.offset_seconds) for a in found.answers if not a.synchronisable} == {4.8}
    measures = [row.measure for row in found.rows if row.label is None]
    assert "synchronisable AUC-ROC" in measures and "offset Acc@1, synchronisable with more than 0.95" in measures
    features = run(config(world, "features", synchronisability_weights="synchability", iter_times=4))
    assert [a.start_frame for a in features.answers] == [a.start_frame for a in found.answers]


def test_fixed_offsets_by_synchronisability(world: Path, decoded: dict) -> None:
    for data in ("media", "features"):
        found = run(config(world, data, synchronisability_weights="synchability", list=str(world / "fixed.csv")))
        scorer = SyncScorer(str(world / "synchability.safetensors"), "cpu")
        first = found.answers[0]  # pictures of the 5 s cut from frame 6, its segments from frame 8 on
        (said,) = scorer.cut_logits(*decoded["one"], [Cut(8, 112, 8 * 640 + 6400, 71680, 0.4)], SegmentGrid(4.48, 13, 8))
        assert first.synchronisable_probability == pytest.approx(float(said.softmax(0)[1]), abs=1e-5 if data == "media" else 5e-3)
        assert not any("AUC" in row.measure for row in found.rows) and any(row.threshold == 0.5 for row in found.rows)


# --- stage I ---


@torch.inference_mode()
def test_shifted_windows(world: Path, decoded: dict, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config(world, weights="avclip", batch_segments=5))
    assert found.stage == 1 and [a.key for a in found.answers] == ["fourth", "one", "three", "two"] and found.missing[0].key == "short"
    model = Avclip(VisualTower(SMALL_VISUAL), AudioTower(SMALL_AUDIO)).eval()
    for tower, prefix in ((model.v_encoder, "vfeat_extractor."), (model.a_encoder, "afeat_extractor.")):
        fill_module(tower, prefix)
    for answer, first in zip(found.answers, (11, 13, 13, 13), strict=True):  # in the middle of 247 and of 250 frames
        frames, wave = decoded[answer.key]
        shown = torch.from_numpy(view_crop("", 0, 32, 48, 28).apply(frames).copy())
        starts = [first + 16 * i for i in range(14)]
        pixels = torch.stack([normalise(shown[s : s + 16]) for s in starts])
        heard = LogMel()(torch.stack([torch.from_numpy(wave[640 * s : 640 * s + SEGMENT_SAMPLES]) for s in starts]))
        expected = shifted_windows(*model.embed(pixels[None], heard[None]))
        assert answer.precision_audio == pytest.approx(float(expected.precision_audio)), answer.key
        assert answer.precision_visual == pytest.approx(float(expected.precision_visual))
    values = [(a.precision_audio + a.precision_visual) / 2 for a in found.answers]
    assert found.rows[0].value == pytest.approx(np.mean(values))
    features = run(config(world, "features", weights="avclip"))
    assert {a.key: a.moved_frames for a in features.answers} == {"fourth": -3, "one": 3, "three": 3, "two": 3}
    assert len(run(config(world, weights="avclip", segments=9, window=3)).answers) == 5  # the short one too
    assert "shifted windows, both ways" in capsys.readouterr().out


# --- run folders ---


def write_run(folder: Path, world: Path, sha256: str) -> None:
    """What training stage II leaves: what is above the towers, and which files hold these."""
    whole, tower = network(), {"path": str(world / "avclip.safetensors"), "sha256": sha256}
    state = {name: tensor for name, tensor in whole.state_dict().items() if "feat_extractor" not in name}
    settings = {"kind": MODULE_KIND, "visual": None, "audio": None, "sync": asdict(whole.config), "towers": {"visual": tower, "audio": tower}}
    folder.mkdir()
    save_state(folder / "best.safetensors", state, settings)


def test_a_run_folder_answers_as_the_whole_network(world: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", world, sha256_file(world / "avclip.safetensors"))
    for data in ("media", "features"):
        listed = str(world / "fixed.csv")
        whole, found = (run(replace(config(world, data, list=listed), weights=name)) for name in (str(world / "sync.safetensors"), f"{tmp_path}/run"))
        assert cuts_of(found) == cuts_of(whole)
        torch.testing.assert_close(torch.tensor([a.logits for a in found.answers]), torch.tensor([a.logits for a in whole.answers]))
    write_run(tmp_path / "other", world, "7" * 64)
    with pytest.raises(ValueError, match="was trained on other towers than those of the features"):
        run(replace(config(world, "features"), weights=f"{tmp_path}/other"))


# --- the folder ---


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of two clips; collects how many segments of pictures go through the tower at a time."""
    monkeypatch.setattr(evaluate_sync, "PART_CLIPS", 2)
    passes: list[int] = []
    seen = SyncScorer._visual_tokens

    def counted(self: SyncScorer, pictures: torch.Tensor, starts: list[int]) -> torch.Tensor:
        passes.append(len(starts))
        return seen(self, pictures, starts)

    monkeypatch.setattr(SyncScorer, "_visual_tokens", counted)
    return passes


def test_a_run_goes_on_where_it_was_broken_off(world: Path, tmp_path: Path, in_parts: list[int]) -> None:
    out = str(tmp_path / "out")
    whole = run(config(world, out=out))
    files = sorted(path.name for path in Path(out).iterdir())
    parts = ["answers-000000.parquet", "answers-000001.parquet"]
    assert files == [*parts, "config.yaml", "evaluation.json", "missing.csv", "rows.json", "rows.parquet"]
    assert len(in_parts) == 4
    (tmp_path / "out" / parts[1]).unlink()
    in_parts.clear()
    again = run(config(world, out=out, level=0.5))
    assert len(in_parts) == 2 and again.answers == whole.answers and again.rows[0].value == whole.rows[0].value
    rows = pq.read_table(f"{out}/rows.parquet").to_pylist()
    assert [row["value"] for row in rows] == [row.value for row in whole.rows]
    stored = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert stored["stage"] == 2 and stored["missing"] == 1 and stored["rows"][0]["measure"] == "offset Acc@1"
    assert next(csv.DictReader((tmp_path / "out/missing.csv").read_text().splitlines()))["key"] == "short"
    answers = pq.read_table(f"{out}/{parts[0]}").to_pylist()
    assert answers[0]["key"] == "fourth" and answers[0]["predicted_seconds"] == pytest.approx(0.2 * (np.argmax(answers[0]["logits"]) - 10), abs=0.01)
    with pytest.raises(ValueError, match=r"something else \(seed differ\)"):
        run(config(world, out=out, seed=1))
    with pytest.raises(ValueError, match="data_content, data_fingerprint"):
        run(config(world, "features", out=out))


def test_datasets_and_results_in_object_storage(world: Path, s3: S3) -> None:
    for path in (world / "features").iterdir():
        storage.write_bytes(f"{s3.url}/features/{path.name}", path.read_bytes())
    storage.write_bytes(f"{s3.url}/fixed.csv", FIXED.encode())
    local = run(config(world, "features", list=str(world / "fixed.csv")))
    remote = replace(config(world), data=f"{s3.url}/features", list=f"{s3.url}/fixed.csv", out=f"{s3.url}/out")
    found = run(remote)
    assert found.answers == local.answers and [row.value for row in found.rows] == [row.value for row in local.rows]
    assert run(remote).answers == found.answers
    assert json.loads(storage.read_bytes(f"{s3.url}/out/rows.json"))["missing"] == 4


def test_a_clip_that_cannot_be_decoded_is_missing_with_its_reason(world: Path, tmp_path: Path) -> None:
    create_or_check(tmp_path / "media", new_info("media", {"made": "by program"}))
    good = (world / "one.mp4").read_bytes()
    entries = [Entry("bad", "test", None, "bad.mp4", 10.0, {"mp4": b"no clip at all"}), Entry("good", "test", None, "good.mp4", 10.0, {"mp4": good})]
    entries.append(Entry("late", "test", None, "late.mp4", 10.0, {"mp4": (world / "short.mp4").read_bytes()}))  # shorter than its row says
    write_shard(tmp_path / "media", "test-000000", entries)
    found = run(config(tmp_path, weights=str(world / "sync")))
    assert [a.key for a in found.answers] == ["good"] and {m.key: m.reason for m in found.missing}["late"] == "too_short"
    assert {m.key for m in found.missing} == {"bad", "late"}


# --- nearest segments ---


def test_the_nearest_stored_segments_are_nearest() -> None:
    rng = random.Random(4)
    for hop_frames, hop_samples in ((8, 640), (4, 320), (8, 160), (2, 1280)):
        stored = StoredGrid(hop_frames, hop_samples)
        stride, sound_stride = stored.strides(OFFSET)
        for _ in range(100):
            frames = rng.randint(176, 250)
            visual, audio = (frames - 16) // hop_frames + 1, (frames * 640 - 10240) // hop_samples + 1
            cut = draw_cut(rng, draw_offset(rng), frames, frames * 640, jitter_seconds=0.05)
            first, sound = cut.start_frame + 2, cut.start_sample + 1280
            # Every stored place less than a hop away, with the sound that is nearest to the offset, by trying all.
            places = [v for v in range(visual - 13 * stride) if abs(v * hop_frames - first) < hop_frames]
            heard = {
                v: [a for a in range(audio - 13 * sound_stride) if abs(a * hop_samples - sound - (v * hop_frames - first) * 640) <= hop_samples / 2]
                for v in places
            }
            places = [v for v in places if heard[v]]
            found = stored.nearest(cut, OFFSET, visual, audio)
            if not places:
                assert found is None
                continue
            assert found is not None and found.audio in heard[found.visual]
            assert abs(found.visual * hop_frames - first) == min(abs(v * hop_frames - first) for v in places)
            moved = found.visual * hop_frames - first
            assert (found.moved_frames, found.offset_error_samples) == (moved, found.audio * hop_samples - sound - moved * 640)


def test_a_clip_without_the_segments_is_too_short() -> None:
    stored = StoredGrid(8, 640)
    assert stored.nearest(cut_at(0.0, 0.0), OFFSET, 13, 235) is None
    assert stored.nearest(cut_at(5.0, 0.0), OFFSET, 30, 235) is not None and stored.nearest(cut_at(5.6, 0.0), OFFSET, 30, 235) is None


def test_tight_grids_hold_their_segments() -> None:
    for segments in range(1, 40):
        for hop in (8, 16):
            grid = tight(segments, hop)
            assert grid.frame_starts()[0] == 0 and grid.crop_frames == grid.span_frames and abs(grid.crop_samples - grid.span_frames * 640) <= 1
    assert tight(14, 8) == SegmentGrid(4.8, 14, 8) and tight(13, 8).crop_seconds == 4.48


# --- what cannot be done ---


def test_stages_are_told_apart(world: Path) -> None:
    assert [stage_of(str(world / f"{name}.safetensors")) for name in ("avclip", "sync", "synchability")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"list": "fixed.csv", "iter_times": 2}, "every time would be the same; give 1"),
        ({"list": "fixed.csv", "weights": "synchability"}, "is of stage III, which has no use"),
        ({"list": "fixed.csv", "weights": "avclip"}, "is of stage I, which"),
        ({"weights": "synchability", "synchronisability_weights": "synchability"}, "goes with a network for offsets"),
        ({"synchronisability_weights": "sync"}, "like `synchability`"),
        ({"split": "train"}, "no split 'train'"),
        ({"iter_times": 0}, "expected at least 1"),
        ({"level": 95.0}, "such as 0.95"),
        ({"data": "bare"}, "featurise with audio.weights=avclip"),
        ({"data": "coarse"}, "hop_frames=8 audio.hop_samples=640"),
        ({"data": "features", "weights": "other"}, "did not make the features"),
    ],
)
def test_user_errors_say_what_to_do(world: Path, changes: dict, says: str) -> None:
    if changes.get("data") == "bare" and not (world / "bare").exists():
        create_or_check(world / "bare", new_info("features", {"hop_frames": 8}))
        write_shard(world / "bare", "test-000000", [Entry("a", "test", None, "a.mp4", 10.0, {"avclip.npy": np.zeros((1, 30, 8, 22), np.float16)})])
    if changes.get("data") == "coarse" and not (world / "coarse").exists():
        info = new_info("features", {"hop_frames": 16, "audio": {"hop_samples": 640}})
        create_or_check(world / "coarse", info)
        members = {"avclip.npy": np.zeros((1, 15, 8, 22), np.float16), "avclip_audio.npy": np.zeros((1, 235, 6, 22), np.float16)}
        write_shard(world / "coarse", "test-000000", [Entry("a", "test", None, "a.mp4", 10.0, members)])
    if changes.get("weights") == "other":
        save_avclip(world / "other.safetensors", Avclip(VisualTower(SMALL_VISUAL), AudioTower(SMALL_AUDIO)))
    changes = {name: str(world / value) if name == "list" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=says):
        run(config(world, **changes))


def test_nothing_to_ask_about_is_an_error_after_the_report(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.txt").write_text("absent\n")
    arguments = [f"data={world}/features", f"weights={world}/sync.safetensors", "device=cpu", f"list={tmp_path}/ids.txt"]
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert "1 of 1 clips are missing: 1 absent: absent (all of them with out=)" in told.out and "none of the 1 clips" in told.err
    assert main(["--help"]) == 0 and "shifted-window accuracy" in capsys.readouterr().out
