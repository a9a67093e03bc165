"""What generation can be asked for beside the sound itself: starts from a list, originals, loudness, candidates, films, the published windows."""

import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from configs import cli
from configs.load import load
from model.codecs import load_codec
from model.engine import EngineOptions
from model.sampling import Sampling
from model.synchformer import SyncConfig, Synchformer, save_synchformer
from model.synchformer_audio import AudioTower, AudioTowerConfig
from model.synchformer_visual import VisualTower, VisualTowerConfig
from pipeline.features import TowerOptions
from pipeline.generate import GenerateConfig, read_starts
from pipeline.media import decode, decode_audio, decode_video
from pipeline.normalise import Normalisation
from tests.model.fill import fill_module
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import made_here, small_dac_run, small_networks, small_run

RATE_HZ = 24000


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return small_run(folder, small_networks(folder))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of 4 s and one of 2."""
    folder = tmp_path_factory.mktemp("clips")
    for number, seconds in enumerate((4, 4, 2)):
        make_clip(folder / f"clip{number}.mp4", seconds=Fraction(seconds), flash_picture=20 + number)
    return folder


def made(run: Path, source: Path, out: Path, **changes: object) -> dict[str, dict]:
    """The rows by key, made in this process."""
    base = GenerateConfig(
        run=str(run), source=str(source), out=str(out), sampling=Sampling(guidance=2.0, top_k=20), tower=TowerOptions(weights="", device="cpu")
    )
    return made_here(replace(base, **{"short_side": 64, **changes}))


def wav(path: Path) -> np.ndarray:
    """Samples of a wav of 16 bits, as floats."""
    with av.open(str(path)) as file:
        return np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1).astype(np.float32) / 32767


def test_starts_choose_the_videos_and_where_they_begin(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    starts = tmp_path / "starts.csv"
    starts.write_text("file,start_sec\nclip0.mp4,1.49\nclip2,0.00\ngone,3.00\nclip1,2.80\n")
    options = {"starts": str(starts), "duration_seconds": 1.28}
    rows = made(run_folder, clips, tmp_path / "out", originals=True, **options)
    assert {key: (row["status"], row["reason"]) for key, row in rows.items()} == {
        "clip0": ("ok", None), "clip1": ("failed", "too_short"), "clip2": ("ok", None), "gone": ("failed", "missing")
    }  # fmt: skip
    assert rows["clip0"]["start_seconds"] == pytest.approx(1.48)  # the picture that is shown at 1.49 s
    result = decode(tmp_path / "out" / "clip0.mp4", sample_rate_hz=RATE_HZ, channels=1)
    own = decode_video(clips / "clip0.mp4")[37:69]
    np.testing.assert_array_equal(result.frames[: len(own)], own)  # copied
    original = decode(tmp_path / "out" / "clip0.original.mp4")
    assert original.frames.shape == own.shape and np.abs(original.frames.astype(int) - own).mean() < 3
    sound = decode_audio(clips / "clip0.mp4")
    begin, length = round(1.48 * 44100), original.audio.shape[1]
    expected = sound[:, begin : begin + length]
    assert np.corrcoef(original.audio[0, 2048:-2048], expected[0, 2048 : length - 2048])[0, 1] > 0.5
    assert wav(tmp_path / "out" / "clip0.wav").shape == (1, round(1.28 * RATE_HZ))


@pytest.mark.parametrize(
    ("text", "message"), [("clip0,1.0\n", "expected file,start_sec"), ("file,start_sec\na,1.0\nb,-1\n", "line 3: start_sec is '-1'")]
)
def test_a_list_of_starts_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "starts.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_starts(str(tmp_path / "starts.csv"))


def test_a_film_is_the_same_sound_as_a_clip(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    """Streamed from decoding to the file on disk, or all at once."""
    as_clips = made(run_folder, clips, tmp_path / "clips")
    as_films = made(run_folder, clips, tmp_path / "films", film_seconds=1.0)
    assert {row["status"] for row in as_films.values()} == {"ok"} and as_clips.keys() == as_films.keys()
    for key in as_clips:
        np.testing.assert_allclose(wav(tmp_path / "films" / f"{key}.wav"), wav(tmp_path / "clips" / f"{key}.wav"), atol=1e-4)
        pictures = [decode_video(tmp_path / kind / f"{key}.mp4") for kind in ("clips", "films")]
        np.testing.assert_array_equal(*pictures)
    assert as_films["clip0"]["seed"] == as_clips["clip0"]["seed"]


@pytest.mark.parametrize("film_seconds", [60.0, 1.0])
def test_sound_is_made_as_loud_as_asked(run_folder: Path, clips: Path, tmp_path: Path, film_seconds: float) -> None:
    made(run_folder, clips / "clip2.mp4", tmp_path / "plain", film_seconds=film_seconds)
    made(run_folder, clips / "clip2.mp4", tmp_path / "peak", film_seconds=film_seconds, normalisation=Normalisation(norm="peak"))
    plain, peak = wav(tmp_path / "plain" / "clip2.wav"), wav(tmp_path / "peak" / "clip2.wav")
    assert np.abs(peak).max() == pytest.approx(10 ** (-6 / 20), abs=1e-4)
    whole = np.abs(plain) < 0.99  # the plain one is too loud for 16 bits
    assert 0.5 < whole.mean() < 1 and np.corrcoef(plain[whole], peak[whole])[0, 1] > 0.9999


def test_the_candidate_that_is_best_in_sync_is_kept(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    network = Synchformer(
        VisualTower(VisualTowerConfig(image_size=28, patch_size=14, tubelet=2, width=22, depth=1, heads=2)),
        AudioTower(AudioTowerConfig(width=26, depth=1, heads=2)),
        SyncConfig(visual_width=22, audio_width=26, width=21, depth=2, heads=3),
    )
    fill_module(network)
    save_synchformer(tmp_path / "sync.safetensors", network)
    options = {"candidates": 3, "sync_weights": str(tmp_path / "sync.safetensors"), "batch_clips": 2}
    rows = made(run_folder, clips, tmp_path / "best", **options)
    plain = made(run_folder, clips, tmp_path / "plain")
    for key, row in rows.items():
        scores = row["sync_scores"]
        assert len(scores) == 3 and len(set(scores)) == 3 and row["candidate"] == int(np.argmax(scores))
        # The first candidate is what is made without candidates.
        same = np.array_equal(wav(tmp_path / "best" / f"{key}.wav"), wav(tmp_path / "plain" / f"{key}.wav"))
        assert same == (row["candidate"] == 0)
    assert plain["clip0"]["candidate"] is None


def test_the_published_evaluation(clips: Path, tmp_path: Path) -> None:
    """220 steps of DAC for 2.56 s, whose sound ends 5.8 ms early; a run on another clock cannot be asked for it."""
    run = small_dac_run(tmp_path)
    published = load(GenerateConfig, ["config=generate_published", f"run={run}", "out=o"])
    options = {name: getattr(published, name) for name in ("sampling", "seed", "stride_segments", "windows", "normalisation")}
    options["sampling"] = replace(published.sampling, guidance=2.0)
    rows = made(run, clips, tmp_path / "out", duration_seconds=1.28, **options)
    assert rows["clip0"]["status"] == "ok"
    sound = wav(tmp_path / "out" / "clip0.wav")
    assert sound.shape[1] == int(1.28 * 86) * 512 and np.abs(sound).max() <= 0.5012
    exact = made(run, clips, tmp_path / "exact", duration_seconds=1.28, sampling=options["sampling"])
    assert exact["clip0"]["status"] == "ok" and wav(tmp_path / "exact" / "clip0.wav").shape[1] == round(1.28 * 44100)


def test_a_prompt_as_long_as_the_video_leaves_nothing_to_make(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    rows = made(run_folder, clips, tmp_path / "clips", prompt_seconds=2.0) | made(
        run_folder, clips, tmp_path / "films", prompt_seconds=2.0, film_seconds=1.0
    )
    assert {key: row["reason"] for key, row in rows.items()} == {"clip0": None, "clip1": None, "clip2": "too_short"}
    codec, own = load_codec(run_folder / "codec.safetensors"), decode_audio(clips / "clip0.mp4", RATE_HZ, 1)[:, : 2 * RATE_HZ]
    coded = codec.decode(codec.encode(torch.from_numpy(own)[None]))[0, :, : -2 * codec.hop_samples].clamp(-1, 1)  # the next step reaches back
    for kind in ("clips", "films"):
        np.testing.assert_allclose(wav(tmp_path / kind / "clip0.wav")[:, : coded.shape[1]], coded.numpy(), atol=1e-4)


def test_int8_weights_are_another_request(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    rows = made(run_folder, clips / "clip2.mp4", tmp_path / "int8", engine=EngineOptions(weights="int8"))
    plain = made(run_folder, clips / "clip2.mp4", tmp_path / "plain")
    assert rows["clip2"]["status"] == "ok" and rows["clip2"]["request"] != plain["clip2"]["request"]


def test_what_does_not_go_together_is_refused(run_folder: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"run={run_folder}", str(clips), f"out={tmp_path / 'out'}"]
    for option, message in refusals():
        assert cli.main(["generate", *arguments, *option.split()]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def refusals() -> Iterator[tuple[str, str]]:
    yield "run=vaura", "`soundshard weights get=vaura` makes it"
    yield "windows=published duration_seconds=1.28", "expected DAC 44.1 kHz"
    yield "candidates=0", "expected 1 or more"
    yield "candidates=2 sync_weights=nothing.pt", "nothing.pt"
    yield "window_segments=9", "at most the 2"
    yield "normalisation.norm=loud", "expected one of"
    yield "engine.weights=int4", "expected as_is or int8"
    yield "starts=nothing.csv", "nothing.csv"
    yield "precision=int4", "expected one of"
    yield "weights=ema", "ema.safetensors does not exist"


def test_notes_are_in_the_row(run_folder: Path, tmp_path: Path) -> None:
    make_clip(tmp_path / "silent.mp4", seconds=Fraction(1), audio_codec=None, flash_picture=5)
    rows = made(run_folder, tmp_path / "silent.mp4", tmp_path / "out", originals=True)
    row = json.loads((tmp_path / "out" / "silent.json").read_text())
    assert row == rows["silent"] and "no sound" in row["message"]
