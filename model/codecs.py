"""Codecs as files: the codec that a weights file holds, told by its contents, and our own written.

The codecs themselves are in `model/codec.py` (what all have), `model/encodec.py`, `model/dac.py` and `model/lapped.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import storage
from model.codec import Codebooks, Codec, StreamDecoder
from model.dac import DacCodec, DacConfig, check_settings, dac_config, dac_from, is_dac
from model.encodec import EncodecCodec, Variant
from model.lapped import LappedCodec, LappedConfig, nearest
from model.weights import load_state, load_strictly, read_checkpoint, resolve, save_state, sha256_file

__all__ = [
    "Codebooks",
    "Codec",
    "DacCodec",
    "DacConfig",
    "EncodecCodec",
    "LappedCodec",
    "LappedConfig",
    "StreamDecoder",
    "load_codec",
    "nearest",
    "save_codec",
]


def save_codec(path: str | Path, codec: Codec, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a codec with its configuration to a .safetensors file. `dtype` is what parameters are stored in; they are computed with in fp32."""
    if isinstance(codec, LappedCodec):
        tensors, config = codec.state_dict(), {"kind": "lapped_codec", **asdict(codec.config)}
    elif isinstance(codec, DacCodec):
        tensors, config = codec.network.state_dict(), {"kind": "dac_codec", **asdict(codec.config)}
    else:
        assert isinstance(codec, EncodecCodec)
        tensors, config = codec.network.state_dict(), {"kind": "encodec_codec", "variant": codec.name}
    save_state(path, {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, config)


def load_codec(name_or_path: str | Path, *, bandwidth_kbps: float = 6.0, device: str | torch.device = "cpu") -> Codec:
    """The codec in a weights file, told by its contents: EnCodec's published .th of either rate, DAC's published .pth, or what `save_codec` wrote.

    `name_or_path` is a file, or `encodec24`, `encodec48` or `dac44` if these are in the cache. `bandwidth_kbps` chooses EnCodec's number of
    codebooks and means nothing to the others. Raises ValueError if the file holds no codec, or one that does not fit its own description.
    """
    path = resolve(name_or_path)
    tensors, config = load_state(path)
    if config is not None:
        codec = _described(tensors, config, path, bandwidth_kbps)
    elif is_dac(tensors):
        settings = _settings(path)
        dac = dac_config(tensors, sample_rate_hz=int(settings.get("sample_rate", DacConfig.sample_rate_hz)))
        check_settings(dac, settings, source=path)
        codec = dac_from(tensors, dac, source=path)
    else:
        # The causal 24 kHz network has normalised weights, the other one normalised activations.
        codec = _encodec("encodec24" if "encoder.model.0.conv.conv.weight_g" in tensors else "encodec48", tensors, path, bandwidth_kbps)
    codec.weights_sha256 = sha256_file(path)
    return codec.to(device).eval()


def _described(tensors: Mapping[str, Tensor], config: dict[str, Any], path: Path, bandwidth_kbps: float) -> Codec:
    """The codec of a file that says itself what it is."""
    kind = config.get("kind")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key != "kind"}
    try:
        if kind == "encodec_codec":
            return _encodec(values["variant"], tensors, path, bandwidth_kbps)
        if kind == "dac_codec":
            return dac_from(tensors, DacConfig(**values), source=path)
        if kind == "lapped_codec":
            codec = LappedCodec(LappedConfig(**values))
            load_strictly(codec, tensors, source=path)
            return codec
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its configuration is not a codec's ({type(error).__name__}: {error}); was it written by another version?"
        ) from error
    raise ValueError(f"{path}: holds another kind of network; expected a codec")


def _encodec(variant: Variant, tensors: Mapping[str, Tensor], path: Path, bandwidth_kbps: float) -> EncodecCodec:
    codec = EncodecCodec(variant, bandwidth_kbps=bandwidth_kbps)
    load_strictly(codec.network, tensors, source=path)
    return codec


def _settings(path: Path) -> dict[str, Any]:
    """The constructor's arguments that DAC's published file carries, `metadata.kwargs`; none for a bare dict of parameters."""
    root = None if path.suffix == ".safetensors" else read_checkpoint(storage.local_copy(path)).root
    metadata = root.get("metadata") if isinstance(root, Mapping) else None
    settings = metadata.get("kwargs") if isinstance(metadata, Mapping) else None
    return dict(settings) if isinstance(settings, Mapping) else {}
