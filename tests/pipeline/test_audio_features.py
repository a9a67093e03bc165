"""Features of the sound in shards: where their segments lie, that they are the tower's own, that datasets without them stay as they were."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from model.avclip import Avclip, save_avclip
from model.segments import SAMPLES_PER_FRAME, SEGMENT_SAMPLES
from model.synchformer_audio import AudioTower, AudioTowerConfig, LogMel, load_audio_tower, save_audio_tower
from model.synchformer_visual import VisualTower
from pipeline.discover import Clip
from pipeline.encode import EncodeConfig
from pipeline.features import (
    AUDIO_MEMBER,
    AudioOptions,
    CodecOptions,
    Decoded,
    FeatureOptions,
    Features,
    Featuriser,
    TowerOptions,
    find_weights,
    networks_spec,
    sound_segments,
)
from pipeline.featurise import FeaturiseActor, FeaturiseConfig, feature_entry, feature_info
from pipeline.media import MediaError, decode, decode_audio
from pipeline.prepare import FusedActor, PrepareConfig
from pipeline.reencode import media_info
from shards import inspect
from shards.dataset import create_or_check
from shards.read import Index
from shards.write import Entry, write_shard
from tests.model.fill import fill_module, inp
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import SMALL_TOWER, small_networks
from train.vaura import ModelOptions, derive_model

GOLDENS = Path(__file__).parents[1] / "model" / "goldens"
SMALL_AUDIO = AudioTowerConfig(mels=29, frames=66, patch_size=7, stride=17, width=SMALL_TOWER.width, depth=2, heads=2)
HOP = 1120
"""Neither a frame's samples nor a divisor of a segment's."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights files: small networks as `tower` and `codec`, an audio tower as `audio`, both towers in one file as `avclip`."""
    folder = tmp_path_factory.mktemp("networks")
    files = small_networks(folder)
    torch.manual_seed(3)
    avclip = Avclip(VisualTower(SMALL_TOWER), AudioTower(SMALL_AUDIO))
    fill_module(avclip.a_encoder)  # as made, it hardly tells one sound from another
    save_avclip(folder / "avclip.safetensors", avclip)
    save_audio_tower(folder / "audio.safetensors", avclip.a_encoder)
    return files | {"avclip": str(folder / "avclip.safetensors"), "audio": str(folder / "audio.safetensors")}


def options(networks: dict[str, str], *, audio: str = "audio", codec: str = "codec") -> FeatureOptions:
    """Of small networks; empty names are none."""
    return FeatureOptions(
        tower=TowerOptions(weights=networks["tower"], device="cpu", batch_segments=5),
        codec=CodecOptions(weights=networks[codec]) if codec else CodecOptions(name="none"),
        audio=AudioOptions(weights=networks[audio] if audio else "", hop_samples=HOP, batch_segments=13),
    )


def clip_of(frames: int, seconds: float, seed: int) -> Decoded:
    """Pictures and sound of chance, the sound not as long as the pictures."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.choice([0.003, 0.03, 0.3], round(10 * seconds) + 1), 1600)[: round(16000 * seconds)]
    wave = (rng.standard_normal(len(loudness)) * loudness).astype(np.float32)
    codec_wave = rng.standard_normal((1, frames * 960)).astype(np.float32) / 5
    return Decoded(rng.integers(0, 256, (frames, 50, 60, 3), np.uint8), codec_wave, heard=wave)


CLIPS = {
    "long": clip_of(61, 2.44, 1),
    "short": clip_of(16, 0.64, 2),
    "cut": clip_of(31, 0.9, 3),
    "over": clip_of(23, 1.7, 4),
    "bad": clip_of(15, 0.6, 5),
}


def featurised(given: FeatureOptions) -> dict[str, Features | MediaError]:
    return dict(Featuriser(given).run(CLIPS, CLIPS.__getitem__))


def oracle(path: str, wave: np.ndarray, frames: int, hop: int) -> torch.Tensor:
    """The tower over one segment after the other, by the definition."""
    tower, log_mel = load_audio_tower(path), LogMel(SMALL_AUDIO)
    samples = frames * SAMPLES_PER_FRAME
    fitted = np.concatenate([wave, np.zeros(samples, np.float32)])[:samples]
    starts = range(0, samples - SEGMENT_SAMPLES + 1, hop)
    with torch.inference_mode():
        return torch.cat([tower(log_mel(torch.from_numpy(fitted[start : start + SEGMENT_SAMPLES])[None, None]))[0] for start in starts])


# --- segments ---


@pytest.mark.parametrize(("frames", "samples", "hop"), [(16, 10240, 640), (250, 160000, 640), (250, 7, 320), (17, 99999, 640), (61, 30000, HOP)])
def test_segments_of_sound_cover_the_pictures_time(frames: int, samples: int, hop: int) -> None:
    wave = np.arange(1, samples + 1, dtype=np.float32)
    segments = sound_segments(wave, frames, hop)
    assert segments.shape == ((frames * 640 - 10240) // hop + 1, 10240)
    for number in {0, len(segments) // 2, len(segments) - 1}:
        at = number * hop + np.arange(10240)
        assert np.array_equal(segments[number], np.where(at < samples, at + 1, 0))


def test_stored_features_are_the_audio_towers(networks: dict[str, str]) -> None:
    found = featurised(options(networks))
    assert list(found) == list(CLIPS)
    failed = found.pop("bad")
    assert isinstance(failed, MediaError) and failed.reason == "too_short"
    seen: set[bytes] = set()
    for key, features in found.items():
        assert isinstance(features, Features) and features.audio is not None
        clip = CLIPS[key]
        assert clip.heard is not None
        expected = oracle(networks["audio"], clip.heard, len(clip.frames), HOP)
        assert features.audio.shape == (1, (len(clip.frames) - 16) * 640 // HOP + 1, 4, 24) and features.audio.dtype == np.float16
        assert len(expected) == 1 or expected.std(0).mean() > 0.05  # segments differ, so that the order is shown
        torch.testing.assert_close(torch.from_numpy(features.audio[0]).float(), expected, atol=2e-3, rtol=2e-3)
        seen.add(features.audio.tobytes())
    assert len(seen) == len(found)


def test_one_file_may_hold_both_towers(networks: dict[str, str]) -> None:
    apart = featurised(options(networks))
    both = replace(options(networks, audio="avclip"), tower=TowerOptions(weights=networks["avclip"], device="cpu", batch_segments=5))
    for key, features in featurised(both).items():
        other = apart[key]
        if isinstance(features, Features) and isinstance(other, Features):
            assert features.audio is not None and other.audio is not None
            assert np.array_equal(features.audio, other.audio) and not np.array_equal(features.avclip, other.avclip)
    assert set(find_weights(both)) == {"tower", "codec", "audio"} and networks_spec(both)["audio"]["tower"]["config"]["mels"] == SMALL_AUDIO.mels


def test_arithmetic_is_an_option(networks: dict[str, str]) -> None:
    given = options(networks)
    exact, coarse = (featurised(replace(given, audio=replace(given.audio, precision=p)))["long"] for p in ("fp32", "bf16"))
    assert isinstance(exact, Features) and isinstance(coarse, Features) and exact.audio is not None and coarse.audio is not None
    difference = np.abs(exact.audio.astype(np.float32) - coarse.audio.astype(np.float32)).mean()
    assert 1e-4 < difference < 0.1 * exact.audio.astype(np.float32).std()


@pytest.mark.slow
def test_the_published_tower_gives_the_published_features(networks: dict[str, str], tmp_path: Path) -> None:
    """At full size, from a file laid out as Segment AVCLIP's own: front end and tower are the reference's, and what is stored is theirs, rounded."""
    with torch.device("meta"):
        tower = AudioTower()
    fill_module(tower.to_empty(device="cpu"), "afeat_extractor.")
    torch.save({"state_dict": {f"module.a_encoder.{name}": tensor for name, tensor in tower.state_dict().items()}}, tmp_path / "epoch_best.pt")
    small = options(networks, codec="")
    featuriser = Featuriser(replace(small, audio=AudioOptions(weights=str(tmp_path / "epoch_best.pt"), hop_samples=640, batch_segments=2)))
    assert featuriser.listener is not None
    spectrogram, tokens = np.load(GOLDENS / "logmel.npz")["out"], np.load(GOLDENS / "audio.npz")["feats"]
    wave = inp("wave", (1, SEGMENT_SAMPLES), 0.1)
    np.testing.assert_allclose(featuriser.listener.log_mel(wave).numpy(), spectrogram, atol=2e-4)
    with torch.inference_mode():
        np.testing.assert_allclose(featuriser.listener.tower(inp("spec", (1, 2, 1, 128, 66))[:, :, 0]).numpy(), tokens, atol=1e-4)
        expected = tower.eval()(torch.from_numpy(spectrogram)[None])[0, 0]
    clip = Decoded(CLIPS["long"].frames[:18], None, heard=torch.cat([wave[0], wave[0]]).numpy())
    ((_, found),) = featuriser.run(["clip"], lambda _: clip)
    assert isinstance(found, Features) and found.audio is not None and found.audio.shape == (1, 3, 6, 768)
    np.testing.assert_allclose(found.audio[0, 0].astype(np.float32), expected.numpy(), atol=4e-3)
    assert np.abs(found.audio[0, 1].astype(np.float32) - expected.numpy()).max() > 0.05


# --- what is stored, and what is said about it ---


def members(given: FeatureOptions, key: str) -> dict[str, np.ndarray | bytes]:
    featuriser = Featuriser(given)
    ((_, found),) = featuriser.run([Clip(key, key, "train")], lambda clip: CLIPS[clip.key])
    return dict(feature_entry(Clip(key, key, "train"), found, featuriser).members or {})


def test_without_the_sound_nothing_changes(networks: dict[str, str]) -> None:
    plain, with_sound = options(networks, audio=""), options(networks)
    infos = [feature_info(given, {"media_fingerprint": "m"}) for given in (plain, with_sound)]
    assert set(infos[0].spec) == {"hop_frames", "views", "chunk_clips", "tower", "codec", "media_fingerprint", "libraries"}
    assert {"torch", "encodec"} <= set(infos[0].spec["libraries"]) and "torchaudio" not in infos[0].spec["libraries"]
    assert set(infos[0].provenance["weights"]) == {"tower", "codec"}
    # Whatever the section holds, without weights it decides nothing.
    assert feature_info(replace(plain, audio=AudioOptions(hop_samples=77)), {"media_fingerprint": "m"}) == infos[0]
    rest = {name: value for name, value in infos[1].spec.items() if name not in ("audio", "libraries")}
    assert rest == {name: value for name, value in infos[0].spec.items() if name != "libraries"}
    a, b = members(plain, "long"), members(with_sound, "long")
    assert set(b) - set(a) == {AUDIO_MEMBER}
    assert json.loads(bytes(b.pop("json"))) == json.loads(bytes(a.pop("json"))) | {"audio_segments": 26}
    assert all(np.array_equal(b[name], a[name]) for name in a)


def test_the_spec_says_where_a_segment_lies_and_who_made_it(networks: dict[str, str]) -> None:
    info = feature_info(options(networks), {})
    audio = info.spec["audio"]
    assert {name: audio[name] for name in audio if name != "tower"} == {
        "sample_rate_hz": 16000,
        "segment_samples": 10240,
        "hop_samples": HOP,
        "views": 1,
    }
    assert audio["tower"]["config"]["width"] == 24 and (audio["tower"]["precision"], audio["tower"]["device"]) == ("fp32", "cpu")
    assert info.provenance["weights"]["audio"] == {"path": networks["audio"], "sha256": audio["tower"]["weights_sha256"]}
    assert "torchaudio" in info.spec["libraries"]
    other = options(networks)
    assert feature_info(replace(other, audio=replace(other.audio, hop_samples=640)), {}).fingerprint != info.fingerprint


def test_a_dataset_may_hold_features_alone(networks: dict[str, str]) -> None:
    given = options(networks, codec="")
    info = feature_info(given, {})
    assert info.spec["codec"] is None and "encodec" not in info.spec["libraries"] and set(info.provenance["weights"]) == {"tower", "audio"}
    stored = members(given, "cut")
    assert set(stored) == {"avclip.npy", AUDIO_MEMBER, "json"} and "steps" not in json.loads(bytes(stored["json"]))
    assert set(members(options(networks, codec="", audio=""), "cut")) == {"avclip.npy", "json"}
    with pytest.raises(ValueError, match=r"codec\.name=none.*featurise the clips with a codec"):
        derive_model(ModelOptions(), info.spec, 4)


def test_what_cannot_be_is_refused(networks: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stores no tokens.*x\.pt"):
        CodecOptions(name="none", weights="x.pt")
    with pytest.raises(ValueError, match=r"audio\.hop_samples is 0"):
        AudioOptions(hop_samples=0)
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="weights get=avclip") as missing:
        find_weights(replace(options(networks), audio=AudioOptions(weights="avclip")))
    assert "standin" not in str(missing.value)  # which fits no audio tower
    with pytest.raises(ValueError, match="expected an audio tower"):
        Featuriser(replace(options(networks), audio=AudioOptions(weights=networks["tower"])))


# --- decoding ---


@pytest.mark.parametrize("changes", [{}, {"layout": "mono"}, {"container": "mkv", "audio_hole": (Fraction(1, 2), Fraction(3, 4))}])
def test_one_reading_gives_the_codecs_sound_and_the_mean_of_the_channels(tmp_path: Path, changes: dict) -> None:
    make_clip(path := tmp_path / "clip", seconds=Fraction(3, 2), flash_picture=13, **changes)
    alone, both = decode(path, sample_rate_hz=24000, channels=1), decode(path, sample_rate_hz=24000, channels=1, mono_rate_hz=16000)
    assert alone.mono is None and both.mono is not None
    assert np.array_equal(both.audio, alone.audio) and np.array_equal(both.frames, alone.frames) and both.source == alone.source
    assert np.array_equal(both.mono, decode_audio(path, 16000).mean(0)) and len(both.mono) == len(both.frames) * 640
    assert both.source.audio_gaps == (1 if "audio_hole" in changes else 0)


# --- the jobs' processes ---


def test_the_jobs_store_it_fused_or_not(networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        make_clip(tmp_path / f"clip{number}.mp4", seconds=Fraction(9 + number, 8), flash_picture=11 + number, layout="mono")
    clips = [Clip(f"clip{number}", str(tmp_path / f"clip{number}.mp4"), "train") for number in range(2)]
    given = options(networks)
    chosen = {"tower": given.tower, "codec": given.codec, "audio": given.audio, "encode": EncodeConfig(short_side=64, preset="ultrafast")}
    fused = PrepareConfig(source="s", out="o", fused=True, **{**chosen, "codec": CodecOptions(name="none")})
    _, (media, at_once) = FusedActor(fused).unit("train-000000", clips)
    roots = {"media": str(tmp_path / "media"), "features": str(tmp_path / "features")}
    create_or_check(roots["media"], media_info(fused))
    write_shard(roots["media"], "train-000000", media)
    later = FeaturiseConfig(data=roots["media"], out=roots["features"], **{name: chosen[name] for name in ("tower", "codec", "audio")})
    tick, (stored,) = FeaturiseActor(later).unit("train-000000", clips)
    assert set(tick.seconds) == {"decode", "tower", "audio", "codec"}
    for a, b, frames in zip(at_once, stored, (28, 31), strict=True):
        assert a.members is not None and b.members is not None
        one, other = (np.asarray(entry[AUDIO_MEMBER], np.float32) for entry in (a.members, b.members))
        assert one.shape == other.shape == (1, (frames - 16) * 640 // HOP + 1, 4, 24)
        assert 0 < np.abs(one - other).mean() < 0.2 * one.std()  # AAC is all that lies between them
    create_or_check(roots["features"], feature_info(later, {}))
    write_shard(roots["features"], "train-000000", [*stored, Entry("bad", "train", None, "x", reason="missing", message="m")])
    index = Index.open(roots["features"])
    sound = decode(Index.open(roots["media"]).bytes(1, "mp4"), mono_rate_hz=16000).mono
    assert sound is not None
    expected = oracle(networks["audio"], sound, 31, HOP)
    torch.testing.assert_close(torch.from_numpy(index.member(1, AUDIO_MEMBER)[0].copy()).float(), expected, atol=2e-3, rtol=2e-3)
    samples = list(webdataset.WebDataset(f"{roots['features']}/train-000000.tar", shardshuffle=False).decode())
    assert [sample["avclip_audio.npy"].shape[1] for sample in samples] == [7, 9] == [sample["json"]["audio_segments"] for sample in samples]
    inspect.main([roots["features"]])
    report = capsys.readouterr().out
    assert "float16 [1, 7 to 9, 4, 24]" in report and "audio.hop_samples" in report and "weights.audio.path" in report
