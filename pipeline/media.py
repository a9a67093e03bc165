"""Media in and out, in one place to import from: `decode.py` reads clips onto their clock, `encode.py` writes them."""

from pipeline.decode import DecodedClip, MediaError, SourceInfo, decode, decode_audio, decode_video, open_clip
from pipeline.encode import EncodeConfig, EncodedClip, Muxed, mux, reencode, write_wav

__all__ = [
    "DecodedClip",
    "EncodeConfig",
    "EncodedClip",
    "MediaError",
    "Muxed",
    "SourceInfo",
    "decode",
    "decode_audio",
    "decode_video",
    "mux",
    "open_clip",
    "reencode",
    "write_wav",
]
