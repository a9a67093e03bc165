import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from encodec.model import EncodecModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.codecs import Codec, DacCodec, DacConfig, EncodecCodec, LappedCodec, LappedConfig, load_codec, nearest, save_codec
from model.standin import fit_codec
from model.weights import save_state
from tests.model.fill import fill_module

SAMPLE_RATE_HZ = 24_000


def impacts(clips: int, seconds: float, seed: int) -> Tensor:
    """Things that strike and ring: noise bursts and decaying partials over silence. One clip a row."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    waves = torch.zeros(clips, len(time))
    for wave in waves:
        pitch, decay, noise = torch.rand(3, generator=generator).tolist()
        for contact in (0.1 + 0.3 * torch.rand(round(3 * seconds), generator=generator)).cumsum(0).tolist():
            since = (time - contact).clamp(min=0)
            partials = [torch.sin(2 * math.pi * 200 * 2 ** (2 * pitch) * ratio * since) / ratio for ratio in (1, 2.76, 5.4, 8.93)]
            burst = noise * torch.randn(len(time), generator=generator) * torch.exp(-since / 0.006)
            wave += 0.2 * (time >= contact) * (sum(partials) * torch.exp(-since / (0.02 + 0.1 * decay)) + burst)
    return waves


# --- EnCodec, with its architecture and our weights ---


@pytest.fixture(scope="module")
def package() -> EncodecModel:
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    fill_module(model)
    model.set_target_bandwidth(6.0)
    return model


@pytest.fixture(scope="module")
def weights(package: EncodecModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "encodec_24khz.th"
    torch.save(package.state_dict(), path)
    return path


@pytest.mark.parametrize("samples", [1, 319, 24_000, 24_001, 30_007])
def test_encodec_24_codes_and_audio_are_those_of_the_package(package: EncodecModel, weights: Path, samples: int) -> None:
    codec, wave = load_codec(weights), impacts(1, 2, seed=1)[:, 2_000 : 2_000 + samples]
    with torch.no_grad():
        [(expected, _)] = package.encode(wave[None])
        decoded = package.decode([(expected, None)])
    codes = codec.encode(wave[None])
    assert codes.shape == (1, 8, math.ceil(samples / 320))
    assert torch.equal(codes, expected)
    assert torch.equal(codec.decode(codes), decoded)
    assert codec.decode(codes, samples=samples).shape == (1, 1, samples)
    if samples > 20_000:
        assert len(codes.unique()) > 20


def test_encodec_24_in_windows_is_encodec_24_of_the_whole(package: EncodecModel) -> None:
    windowed, wave = EncodecCodec("encodec24", window_steps=17), impacts(1, 2, seed=2)[None, :, :47_111]
    windowed.network.load_state_dict(package.state_dict())
    whole = EncodecCodec("encodec24")
    whole.network.load_state_dict(package.state_dict())
    codes = whole.encode(wave)
    assert torch.equal(windowed.encode(wave), codes)
    torch.testing.assert_close(windowed.decode(codes), whole.decode(codes), atol=1e-6, rtol=1e-5)


def test_encodec_clocks_and_bandwidths(weights: Path) -> None:
    codec = load_codec(weights, bandwidth_kbps=1.5)
    assert (codec.codebooks, codec.card, codec.channels, codec.clock.rate) == (2, 1024, 1, Fraction(75))
    assert codec.clock.steps_in(1) == 48
    assert codec.spec()["name"] == "encodec24" and len(codec.spec()["weights_sha256"]) == 64
    with pytest.raises(ValueError, match=r"encodec24 has 1\.5, 3, 6, 12, 24"):
        load_codec(weights, bandwidth_kbps=5.0)
    with pytest.raises(ValueError, match=r"expects \[clips, 1, samples > 0\]"):
        codec.encode(torch.zeros(1, 2, 320))
    with pytest.raises(ValueError, match=r"in \[0, 1024\)"):
        codec.decode(torch.full((1, 2, 3), 1024))


@pytest.fixture(scope="module")
def stereo(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncodecModel, Codec]:
    model = EncodecModel.encodec_model_48khz(pretrained=False)
    fill_module(model)
    path = tmp_path_factory.mktemp("weights") / "encodec_48khz.th"
    torch.save(model.state_dict(), path)
    model.set_target_bandwidth(6.0)
    return model, load_codec(path)


def test_encodec_48_codes_seconds_with_the_clips_scale(stereo: tuple[EncodecModel, Codec]) -> None:
    model, codec = stereo
    wave = impacts(2, 5, seed=3)[None, :, : 2 * 48_000 + 3_300]
    codes = codec.encode(wave)
    assert (codec.codebooks, codec.clock.rate, codes.shape) == (4, Fraction(150), (1, 4, 311))
    scale = wave.mean(1).square().mean().sqrt() + 1e-8
    with torch.no_grad():
        for start in (0, 1, 2):
            chunk = wave[..., start * 48_000 : (start + 1) * 48_000] / scale
            expected = model.quantizer.encode(model.encoder(chunk), 150, 6.0)[:, 0]
            assert torch.equal(codes[0, :, start * 150 : (start + 1) * 150], expected)
        # A clip of one chunk is the published use, but for the loudness, which the package sends beside the codes.
        [(published, volume)] = model.encode(wave[..., :40_000])
        assert volume is not None
        own = codec.encode(wave[..., :40_000])
        assert torch.equal(own, published)
        torch.testing.assert_close(codec.decode(own) / 0.1, model.decode([(published, volume)]) / volume, atol=1e-5, rtol=1e-4)


def test_encodec_48_fades_its_seconds_into_each_other(stereo: tuple[EncodecModel, Codec]) -> None:
    model, codec = stereo
    codes = torch.randint(0, 1024, (1, 4, 301))
    wave = codec.decode(codes)[0] / 0.1
    assert wave.shape == (2, 301 * 320)
    with torch.no_grad():
        first, second, third = (model.decoder(model.quantizer.decode(codes[0, :, None, a : a + 151]))[0] for a in (0, 150, 300))
    torch.testing.assert_close(wave[:, :48_000], first[:, :48_000])
    torch.testing.assert_close(wave[:, 48_320:96_000], second[:, 320:48_000])
    fade = (torch.arange(320) + 0.5) / 320
    torch.testing.assert_close(wave[:, 48_000:48_320], first[:, 48_000:] * (1 - fade) + second[:, :320] * fade)
    torch.testing.assert_close(wave[:, 96_000:], second[:, 48_000:] * (1 - fade) + third * fade)


# --- the stand-in ---


@pytest.fixture(scope="module")
def lapped() -> LappedCodec:
    return fit_codec(impacts(40, 3, seed=4)[:, None], iterations=15)


def test_the_transform_is_orthonormal_up_to_the_clips_edges() -> None:
    codec, wave = LappedCodec(), torch.randn(7 * 320 - 111)
    coefficients = codec.analyse(wave)
    assert coefficients.shape == (7, 320)
    assert coefficients.square().sum().item() == pytest.approx(wave.square().sum().item(), rel=1e-6)
    torch.testing.assert_close(codec.synthesise(coefficients)[: len(wave)], wave, atol=1e-6, rtol=0)
    one = codec.analyse(wave[:100])
    torch.testing.assert_close(codec.synthesise(one)[:100], wave[:100], atol=1e-6, rtol=0)


def test_a_click_stays_where_it_was(lapped: LappedCodec) -> None:
    """Through the transform to the sample; and its energy falls on the step that covers it, or on a neighbour near the border."""
    for at in (0, 1_000, 3_359, 3_360, 6_399):
        click = torch.zeros(6_400)
        click[at] = 1
        coefficients = lapped.analyse(click)
        assert abs(int(coefficients.square().sum(1).argmax()) - at // 320) <= (0 if 80 < at % 320 < 240 else 1)
        assert int(lapped.synthesise(coefficients).abs().argmax()) == at


def test_impacts_come_out_in_time_and_with_their_spectrum(lapped: LappedCodec) -> None:
    waves = impacts(8, 3, seed=5)
    decoded = lapped.decode(lapped.encode(waves[:, None]), samples=waves.shape[1])[:, 0]
    spectra = [torch.stft(x, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs() for x in (waves, decoded)]
    for wave, other in zip(waves, decoded, strict=True):
        correlation = torch.fft.irfft(torch.fft.rfft(other, 2 * len(wave)) * torch.fft.rfft(wave, 2 * len(wave)).conj())
        lag = int(correlation.argmax())
        assert min(lag, 2 * len(wave) - lag) < 24, "more than 1 ms off"
    loud = spectra[0].square().sum(1) > 1e-2
    levels = [20 * torch.log10(s.unfold(1, 16, 16).square().mean(-1).sqrt().transpose(1, 2)[loud] + 3e-3) for s in spectra]
    assert (levels[0] - levels[1]).square().mean().sqrt() < 8, "dB, over bands of 375 Hz and 43 ms"
    assert (levels[0] - levels[1]).mean(0)[18:].abs().max() < 2, "dB: the noise above 7 kHz is as loud as it was"
    signal_to_noise_db = 10 * torch.log10(waves.square().sum() / (waves - decoded).square().sum())
    assert signal_to_noise_db > 3


def test_silence_is_all_zeros_and_stays_silence(lapped: LappedCodec) -> None:
    codes = lapped.encode(torch.zeros(2, 1, 3_333))
    assert codes.shape == (2, 8, 11) and not codes.any()
    assert not lapped.decode(codes).any()


def test_the_first_codes_decide_the_loudness_whatever_the_shapes(lapped: LappedCodec) -> None:
    codes = lapped.encode(impacts(1, 3, seed=6)[:, None])
    other = codes.clone()
    other[:, 2:] = torch.randint(0, lapped.card, other[:, 2:].shape)
    energies = [lapped.decode(c)[0, 0].unfold(0, 4_800, 4_800).square().mean(1) for c in (codes, other)]
    difference_db = 10 * torch.log10(energies[0] / energies[1])[energies[0] > 1e-6]
    assert len(difference_db) > 5 and difference_db.abs().max() < 6


def test_codes_do_not_depend_on_the_batch(lapped: LappedCodec) -> None:
    waves = impacts(3, 1, seed=7)[:, None]
    together = lapped.encode(waves)
    assert torch.equal(together, torch.cat([lapped.encode(wave[None]) for wave in waves]))
    assert torch.equal(lapped.decode(together)[1:2], lapped.decode(together[1:2]))


def test_the_stand_in_comes_back_from_its_file(lapped: LappedCodec, tmp_path: Path) -> None:
    save_codec(tmp_path / "codec.safetensors", lapped)
    loaded, waves = load_codec(tmp_path / "codec.safetensors"), impacts(1, 1, seed=8)[:, None]
    assert isinstance(loaded, LappedCodec) and loaded.config == lapped.config
    assert torch.equal(loaded.encode(waves), lapped.encode(waves))
    assert len(loaded.weights_sha256) == 64
    save_state(tmp_path / "tower.safetensors", {"a": torch.zeros(1)}, {"kind": "visual_tower"})
    with pytest.raises(ValueError, match="expected a codec"):
        load_codec(tmp_path / "tower.safetensors")


def test_nearest_is_nearest() -> None:
    x, book, weights = torch.randn(23, 5), torch.randn(11, 5), torch.rand(23, 5)
    weights[3] = 0
    distances = ((x[:, None] - book) ** 2 * weights[:, None]).sum(-1)
    assert torch.equal(nearest(x, book, weights, block=7), distances.argmin(1))
    assert torch.equal(nearest(x, book, block=7), (x[:, None] - book).square().sum(-1).argmin(1))


def test_bands_must_cover_the_coefficients() -> None:
    with pytest.raises(ValueError, match="band_edges"):
        LappedConfig(band_edges=(0, 10, 320, 330))


# --- streams, of every codec ---


@pytest.fixture(scope="module")
def codecs(lapped: LappedCodec, package: EncodecModel, stereo: tuple[EncodecModel, Codec]) -> dict[str, Codec]:
    causal = EncodecCodec("encodec24", window_steps=17)
    causal.network.load_state_dict(package.state_dict())
    dac = DacCodec(DacConfig(encoder_width=2, encoder_rates=(2, 6), latent_width=9, decoder_width=12, decoder_rates=(6, 2), codebooks=2, card=5))
    fill_module(dac.network)
    return {"lapped": lapped, "encodec24": causal, "encodec48": stereo[1], "dac44": dac}


@pytest.mark.parametrize("name", ["lapped", "encodec24", "encodec48", "dac44"])
@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(0, 19), max_size=7))
@example(sizes=[])
@example(sizes=[1] * 9)
@example(sizes=[0, 6, 0])
@example(sizes=[3, 4])
@example(sizes=[23, 1])
def test_a_stream_is_the_clip_in_pieces(codecs: dict[str, Codec], name: str, sizes: list[int]) -> None:
    codec, steps = codecs[name], sum(sizes)
    codes = torch.randint(0, codec.card, (codec.codebooks, steps))
    stream, other = codec.stream(), codec.stream()
    pieces = []
    for piece in codes.split(sizes, dim=1):
        pieces.append(stream.push(piece))
        other.push(torch.zeros_like(piece))
    sound = torch.cat([*pieces, stream.finish()], dim=-1)
    assert sound.shape == (codec.channels, steps * codec.hop_samples)
    if steps:
        torch.testing.assert_close(sound, codec.decode(codes[None])[0], atol=2e-6, rtol=0)


def test_a_stream_of_seconds_fades_like_the_clip(codecs: dict[str, Codec]) -> None:
    codec = codecs["encodec48"]
    for steps in (150, 151, 307):
        codes, stream = torch.randint(0, 1024, (4, steps)), codec.stream()
        sound = [stream.push(piece) for piece in codes.split(101, dim=1)]
        assert torch.equal(torch.cat([*sound, stream.finish()], dim=-1), codec.decode(codes[None])[0])


def test_a_stream_is_behind_by_no_more_than_its_codec_looks_ahead(codecs: dict[str, Codec]) -> None:
    """Samples still owed after 40 steps: none where the network is causal, half a step of overlap, a chunk, what DAC's convolutions see."""
    owed = {}
    for name, codec in codecs.items():
        stream = codec.stream()
        owed[name] = 40 * codec.hop_samples - stream.push(torch.zeros(codec.codebooks, 40, dtype=torch.long)).shape[1]
        assert stream.finish().shape[1] == owed[name]
    # DAC's small network from its start: half a kernel of 7; twice a rate, half of it and the residuals' half kernels; half a kernel of 7.
    dac = ((3 * 6 + 3 + 39) * 2 + 1 + 39) + 3
    assert owed == {"lapped": 160, "encodec24": 0, "encodec48": 40 * 320, "dac44": dac}


def test_a_stream_refuses_codes_that_there_are_not(codecs: dict[str, Codec]) -> None:
    for codec in codecs.values():
        with pytest.raises(ValueError, match=r"expects \[\d, steps\] in \[0,"):
            codec.stream().push(torch.full((codec.codebooks, 2), codec.card))


def test_tables_are_what_codes_stand_for(codecs: dict[str, Codec], package: EncodecModel) -> None:
    shapes = {name: [tuple(t.shape) for t in codec.codebook_tables().tables] for name, codec in codecs.items()}
    lapped = codecs["lapped"]
    assert isinstance(lapped, LappedCodec)
    widths = [12, 12, *(hi - lo for lo, hi in lapped.config.pairs)]
    assert shapes == {
        "lapped": [(lapped.card, width) for width in widths],
        "encodec24": [(1024, 128)] * 8,
        "encodec48": [(1024, 128)] * 4,
        "dac44": [(5, 8)] * 2,
    }
    assert all((codec.codebook_tables().biases is not None) == (name == "dac44") for name, codec in codecs.items())
    codes = torch.randint(0, 1024, (8, 1, 3))
    tables = codecs["encodec24"].codebook_tables().tables
    stood_for = sum(table[code[0]] for table, code in zip(tables, codes, strict=True))
    torch.testing.assert_close(stood_for, package.quantizer.decode(codes)[0].T)


def test_every_codec_comes_back_from_its_file(codecs: dict[str, Codec], tmp_path: Path) -> None:
    for name, codec in codecs.items():
        save_codec(tmp_path / f"{name}.safetensors", codec)
        loaded, codes = load_codec(tmp_path / f"{name}.safetensors"), torch.randint(0, codec.card, (1, codec.codebooks, 9))
        assert loaded.spec() == {**codec.spec(), "weights_sha256": loaded.weights_sha256}
        torch.testing.assert_close(loaded.decode(codes), codec.decode(codes), atol=1e-6, rtol=0)
