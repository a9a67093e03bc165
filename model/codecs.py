"""Codecs as files: the codec that a weights file holds, told by its contents, and our own written.

The codecs themselves are in `model/codec.py` (what all have), `model/encodec.py` and `model/lapped.py`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.codec import Codec
from model.encodec import EncodecCodec, Variant
from model.lapped import LappedCodec, LappedConfig, nearest
from model.weights import load_state, load_strictly, resolve, save_state, sha256_file

__all__ = ["Codec", "EncodecCodec", "LappedCodec", "LappedConfig", "load_codec", "nearest", "save_codec"]


def save_codec(path: str | Path, codec: LappedCodec) -> None:
    """Writes a fitted stand-in codec with its configuration to a .safetensors file."""
    save_state(path, codec.state_dict(), {"kind": "lapped_codec", **asdict(codec.config)})


def load_codec(name_or_path: str | Path, *, bandwidth_kbps: float = 6.0, device: str | torch.device = "cpu") -> Codec:
    """The codec in a weights file: EnCodec's published .th of either rate (told by its contents), or a fitted stand-in.

    `name_or_path` is a file, or `encodec24` or `encodec48` if these are in the cache. `bandwidth_kbps` chooses EnCodec's number of codebooks
    and means nothing to the stand-in. Raises ValueError if the file holds no codec.
    """
    path = resolve(name_or_path)
    tensors, config = load_state(path)
    if config is not None:
        if config.pop("kind", None) != "lapped_codec":
            raise ValueError(f"{path}: holds another kind of network; expected a codec")
        values: dict[str, Any] = {**config, "band_edges": tuple(config["band_edges"])}
        codec: Codec = LappedCodec(LappedConfig(**values))
        load_strictly(codec, tensors, source=path)
    else:
        # The causal 24 kHz network has normalised weights, the other one normalised activations.
        variant: Variant = "encodec24" if "encoder.model.0.conv.conv.weight_g" in tensors else "encodec48"
        codec = EncodecCodec(variant, bandwidth_kbps=bandwidth_kbps)
        load_strictly(codec.network, tensors, source=path)
    codec.weights_sha256 = sha256_file(path)
    return codec.to(device).eval()
