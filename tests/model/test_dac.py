import gc
import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.codecs import load_codec, save_codec
from model.dac import Dac, DacCodec, DacConfig, Snake, dac_config
from model.weights import KNOWN, save_state
from tests.model.fill import checksum, fill_module, inp, inp_int

GOLDEN = Path(__file__).parent / "goldens" / "dac.npz"
SMALL = DacConfig(
    encoder_width=5, encoder_rates=(2, 6), latent_width=21, decoder_width=28, decoder_rates=(6, 2), codebooks=3, card=37, codebook_width=4
)
"""Numbers as coprime as the layout lets them be; a step is 12 samples."""


@pytest.fixture(scope="module")
def codec() -> DacCodec:
    codec = DacCodec(SMALL)
    fill_module(codec.network)
    return codec


def published(config: DacConfig, state: dict[str, Tensor], **changes: object) -> dict[str, Any]:
    """The object in a file as its authors wrote it."""
    kwargs = {
        "encoder_dim": config.encoder_width,
        "encoder_rates": list(config.encoder_rates),
        "latent_dim": None,
        "decoder_dim": config.decoder_width,
        "decoder_rates": list(config.decoder_rates),
        "n_codebooks": config.codebooks,
        "codebook_size": config.card,
        "codebook_dim": config.codebook_width,
        "quantizer_dropout": 0.5,
        "sample_rate": config.sample_rate_hz,
    }
    return {"state_dict": dict(state), "metadata": {"kwargs": kwargs | changes}}


# --- the layers, against torch's own, a clip at once ---


class Sum(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.block = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Block(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def plain_coder(config: DacConfig) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of torch's padded, weight-normed convolutions, in the published layout."""

    def conv(wide: int, narrow: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Module:
        padding = math.ceil(stride / 2) if stride > 1 else (kernel - 1) * dilation // 2
        return nn.utils.weight_norm(nn.Conv1d(wide, narrow, kernel, stride, padding, dilation))

    def residuals(c: int) -> list[nn.Module]:
        return [Sum(nn.Sequential(Snake(c), conv(c, c, 7, dilation=d), Snake(c), conv(c, c, 1))) for d in (1, 3, 9)]

    def raised(wide: int, narrow: int, rate: int) -> nn.Module:
        return nn.utils.weight_norm(nn.ConvTranspose1d(wide, narrow, 2 * rate, rate, math.ceil(rate / 2)))

    up = [config.encoder_width * 2**i for i in range(len(config.encoder_rates) + 1)]
    down = [config.decoder_width // 2**i for i in range(len(config.decoder_rates) + 1)]
    encoder = [
        Block(*residuals(a), Snake(a), conv(a, b, 2 * r, stride=r)) for (a, b), r in zip(itertools.pairwise(up), config.encoder_rates, strict=True)
    ]
    decoder = [Block(Snake(a), raised(a, b, r), *residuals(b)) for (a, b), r in zip(itertools.pairwise(down), config.decoder_rates, strict=True)]
    return (
        Block(conv(1, up[0], 7), *encoder, Snake(up[-1]), conv(up[-1], config.latent_width, 3)),
        nn.Sequential(conv(config.latent_width, down[0], 7), *decoder, Snake(down[-1]), conv(down[-1], 1, 7), nn.Tanh()),
    )


@pytest.fixture(scope="module")
def plain(codec: DacCodec) -> tuple[nn.Module, nn.Module]:
    encoder, decoder = plain_coder(SMALL)
    encoder.load_state_dict(codec.network.encoder.state_dict())
    decoder.load_state_dict(codec.network.decoder.model.state_dict())
    return encoder, decoder


@pytest.mark.parametrize("steps", [1, 2, 3, 11, 47])
@pytest.mark.parametrize("piece_steps", [1, 2, 5, 100])
def test_pieces_are_torchs_convolutions_over_the_whole(codec: DacCodec, plain: tuple[nn.Module, nn.Module], steps: int, piece_steps: int) -> None:
    own = DacCodec(SMALL, piece_steps=piece_steps)
    own.network.load_state_dict(codec.network.state_dict())
    wave, codes = 0.3 * torch.randn(1, 1, steps * 12), torch.randint(0, 37, (1, 3, steps))
    with torch.no_grad():
        latents = plain[0](wave)
        torch.testing.assert_close(own.latents(wave[0]), latents, atol=1e-5, rtol=1e-5)
        assert torch.equal(own.encode(wave)[0], codec.network.quantizer.encode(latents))
        torch.testing.assert_close(own.decode(codes)[0], plain[1](codec.network.quantizer.decode(codes[0]))[0], atol=1e-5, rtol=1e-5)
    assert own.decode(codes).std() > 0.01


def test_quantisation_goes_by_direction_and_takes_off_the_entry_itself(codec: DacCodec) -> None:
    latents = torch.randn(1, SMALL.latent_width, 13)
    codes, left = codec.network.quantizer.encode(latents), latents.clone()
    for number, stage in enumerate(codec.network.quantizer.stages()):
        with torch.no_grad():
            wanted, entries = stage.in_proj(left)[0].T, stage.codebook.weight
            angles = torch.cosine_similarity(wanted[:, None], entries[None], dim=-1)
            assert torch.equal(codes[number], angles.argmax(1))
            left = left - stage.out_proj(entries[codes[number]].T[None])
    torch.testing.assert_close(latents - codec.network.quantizer.decode(codes), left)


def test_a_clip_is_filled_up_to_whole_steps_and_the_clock_is_exact(codec: DacCodec) -> None:
    with torch.device("meta"):
        assert DacCodec().clock.rate == Fraction(44100, 512)
    for samples in (1, 11, 12, 13, 12 * 7 + 5):
        wave = torch.randn(1, 1, samples)
        codes = codec.encode(wave)
        assert codes.shape == (1, 3, math.ceil(samples / 12))
        assert torch.equal(codes, codec.encode(nn.functional.pad(wave, (0, -samples % 12))))
        assert codec.decode(codes, samples=samples).shape == (1, 1, samples)


def test_a_minute_keeps_its_time() -> None:
    """60 s are 5168 steps, as of 512 samples each; what is heard at the end gets the latents that it gets at the start."""
    codec = DacCodec(DacConfig(encoder_width=2, latent_width=8, decoder_width=32, codebooks=2, card=16, codebook_width=3))
    fill_module(codec.network)
    wave = torch.zeros(1, 60 * 44_100)
    sound = torch.randn(9 * 512)
    early, late = 40, 5_100
    for step in (early, late):
        wave[0, step * 512 : step * 512 + len(sound)] = sound
    latents = codec.latents(wave)[0]
    assert latents.shape[1] == 5_168 == math.ceil(60 * codec.clock.rate)
    torch.testing.assert_close(latents[:, early - 5 : early + 14], latents[:, late - 5 : late + 14], atol=1e-5, rtol=1e-4)
    assert (latents[:, early] - latents[:, early - 30]).abs().max() > 0.1
    codes = codec.network.quantizer.encode(latents[None])[None]
    assert codec.decode(codes, samples=60 * 44_100).shape == (1, 1, 60 * 44_100)


# --- memory ---


class Largest(TorchDispatchMode):
    """How many numbers the largest result of an operation has."""

    count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.count = max(self.count, made.numel())
        return made


def test_memory_does_not_grow_with_the_clip_but_for_what_goes_in_and_out(codec: DacCodec) -> None:
    own = DacCodec(SMALL, piece_steps=16)
    own.network.load_state_dict(codec.network.state_dict())
    largest = []
    for steps in (64, 128):
        with Largest() as encoding:
            codes = own.encode(torch.randn(1, 1, steps * 12))
        with Largest() as decoding:
            own.decode(codes)
        largest.append((encoding.count, decoding.count))
    assert largest[0] == largest[1] and largest[0][0] > 128 * 12


def test_what_a_stream_keeps_does_not_grow(codec: DacCodec) -> None:
    def kept() -> int:
        gc.collect()
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if isinstance(t, Tensor)}.values())

    stream, held = codec.stream(), []
    for _ in range(2):
        for _ in range(20):
            stream.push(torch.randint(0, 37, (3, 5)))
        held.append(kept())
    assert held[0] == held[1]


# --- files ---


@pytest.fixture
def weights(codec: DacCodec, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(published(SMALL, codec.network.state_dict()), path)
    return path


def test_the_published_layout_loads_and_keeps_its_names(codec: DacCodec, weights: Path) -> None:
    loaded = load_codec(weights)
    assert isinstance(loaded, DacCodec) and loaded.config == SMALL
    wave = torch.randn(2, 1, 500)
    assert torch.equal(loaded.encode(wave), codec.encode(wave))
    state = codec.network.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in loaded.network.state_dict().items()) and not set(state) - set(loaded.network.state_dict())
    assert loaded.spec() == {
        "name": "dac44",
        "sample_rate_hz": 44_100,
        "hop_samples": 12,
        "channels": 1,
        "codebooks": 3,
        "card": 37,
        "weights_sha256": loaded.weights_sha256,
    }
    assert len(loaded.weights_sha256) == 64


def test_dac44_is_found_in_the_cache(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(weights.parent))
    with pytest.raises(FileNotFoundError, match="soundshard weights get=dac44"):
        load_codec("dac44")
    weights.rename(weights.parent / KNOWN["dac44"].file)
    assert load_codec("dac44").name == "dac44"


def test_files_that_do_not_fit_say_why(codec: DacCodec, tmp_path: Path) -> None:
    state, path = codec.network.state_dict(), tmp_path / "weights.pth"

    def load(file: dict[str, Any]) -> None:
        torch.save(file, path)
        load_codec(path)

    with pytest.raises(ValueError, match=r"metadata says n_codebooks 9, its parameters have 3; decoder_rates \[8, 8, 4, 2\]"):
        load({**published(SMALL, state, decoder_rates=[8, 8, 4, 2]), "metadata": {"kwargs": {"n_codebooks": 9, "decoder_rates": [8, 8, 4, 2]}}})
    with pytest.raises(ValueError, match=r"1 missing \(quantizer.quantizers.1.in_proj.weight_g\)"):
        load(published(SMALL, {name: t for name, t in state.items() if name != "quantizer.quantizers.1.in_proj.weight_g"}))
    with pytest.raises(ValueError, match=r"1 unexpected \(encoder.extra\)"):
        load(published(SMALL, {**state, "encoder.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"decoder.model.3.alpha \(1, 9, 1\) instead of \(1, 7, 1\)"):
        load(published(SMALL, {**state, "decoder.model.3.alpha": torch.zeros(1, 9, 1)}))
    with pytest.raises(ValueError, match=r"not a DAC network: it has no encoder\.block\.0\.weight_v"):
        load(published(SMALL, {name: t for name, t in state.items() if not name.startswith("encoder.block.0.")}))
    save_state(tmp_path / "odd.safetensors", state, {"kind": "dac_codec", "widths": 3})
    with pytest.raises(ValueError, match="its configuration is not a codec's"):
        load_codec(tmp_path / "odd.safetensors")


def test_rates_that_break_the_clock_are_refused() -> None:
    with pytest.raises(ValueError, match="expected even rates"):
        DacConfig(encoder_rates=(2, 4, 5, 8), decoder_rates=(8, 5, 4, 2))
    with pytest.raises(ValueError, match="different products"):
        DacConfig(encoder_rates=(2, 4), decoder_rates=(4, 4))


def test_half_precision_is_for_storage(codec: DacCodec, tmp_path: Path) -> None:
    save_codec(tmp_path / "half.safetensors", codec, dtype=torch.float16)
    save_codec(tmp_path / "full.safetensors", codec)
    half, full = load_codec(tmp_path / "half.safetensors"), load_codec(tmp_path / "full.safetensors")
    assert isinstance(half, DacCodec) and isinstance(full, DacCodec) and half.config == full.config == SMALL
    rounded = DacCodec(SMALL)
    rounded.network.load_state_dict({name: t.half() for name, t in codec.network.state_dict().items()})
    codes = torch.randint(0, 37, (1, 3, 29))
    assert torch.equal(full.decode(codes), codec.decode(codes))
    assert torch.equal(half.decode(codes), rounded.decode(codes)) and half.decode(codes).dtype == torch.float32
    assert not torch.equal(half.decode(codes), codec.decode(codes))


# --- the released network ---


@pytest.mark.slow
def test_dac_44_is_the_published_one() -> None:
    """Names, codes and sound as the reference has them, whatever the pieces, and with parameters that were stored in half precision."""
    golden = np.load(GOLDEN)
    codec = DacCodec()
    fill_module(codec.network, "audio_encoder.model.")
    state = codec.network.state_dict()
    assert [f"{name} {'x'.join(map(str, t.shape))}" for name, t in sorted(state.items())] == sorted(golden["names"].tolist())
    assert dac_config(state) == DacConfig() and codec.clock.steps_in(4) == 220
    wave, given = inp("dac_wave", (1, 1, 8820), 0.3), inp_int("dac_codes", (1, 9, 18), 1024)
    codes = codec.encode(wave)
    assert np.array_equal(codes, golden["codes"])
    quantised = codec.network.quantizer.decode(codes[0])
    np.testing.assert_allclose(quantised[0, :32].numpy(), golden["quantised"], atol=1e-4)
    np.testing.assert_allclose(checksum(quantised.numpy()), golden["quantised_sum"], atol=1e-5)
    np.testing.assert_allclose(codec.decode(given)[0, 0].numpy(), golden["from_codes"], atol=1e-4)
    books = codec.codebook_tables()
    assert books.biases is not None and [tuple(t.shape) for t in books.tables] == [(1024, 8)] * 9
    assert torch.equal(torch.stack(books.biases)[4], state["quantizer.quantizers.4.out_proj.bias"])
    codec.piece_steps = 11
    latents = codec.latents(wave[0])
    np.testing.assert_allclose(latents[0, :32].numpy(), golden["latents"], atol=1e-4)
    np.testing.assert_allclose(checksum(latents.numpy()), golden["latents_sum"], atol=1e-5)
    assert np.array_equal(codec.network.quantizer.encode(latents)[None], golden["codes"])
    np.testing.assert_allclose(codec.decode(codes)[0, 0].numpy(), golden["roundtrip"], atol=1e-4)
    codec.network.load_state_dict({name: t.half() for name, t in state.items()})
    np.testing.assert_allclose(codec.decode(given)[0, 0].numpy(), golden["half_from_codes"], atol=1e-4)


def test_the_layout_can_be_made_without_memory() -> None:
    with torch.device("meta"):
        network = Dac(DacConfig())
    assert sum(t.numel() for t in network.state_dict().values()) == 76_651_890
    assert dac_config(network.state_dict()) == DacConfig()
    assert len(network.state_dict()) == 301
