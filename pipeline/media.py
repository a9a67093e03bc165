"""Media in and out, in one place to import from: `decode.py` reads clips onto their clock, `encode.py` writes them, storage hands them over."""

import numpy as np
from jaxtyping import Float32, UInt8

from configs import storage
from configs.clock import SYNCHFORMER_RATE_HZ
from configs.storage import StorageError
from pipeline import tars, web
from pipeline.decode import DecodedClip, MediaError, SourceInfo, decode, decode_audio, decode_video, open_clip, picture_pieces, video_frames
from pipeline.discover import Clip
from pipeline.encode import (
    EncodeConfig,
    EncodedClip,
    Muxed,
    WavFormat,
    WavWriter,
    mux,
    mux_wav,
    reencode,
    transcode_original,
    wav_format,
    wav_pieces,
    write_wav,
)

__all__ = [
    "DecodedClip",
    "EncodeConfig",
    "EncodedClip",
    "MediaError",
    "Muxed",
    "SourceInfo",
    "WavFormat",
    "WavWriter",
    "decode",
    "decode_audio",
    "decode_video",
    "fetched",
    "mux",
    "mux_wav",
    "open_clip",
    "picture_pieces",
    "reencode",
    "training_clip",
    "transcode_original",
    "video_frames",
    "wav_format",
    "wav_pieces",
    "write_wav",
]


def fetched(clip: Clip | str) -> str | bytes:
    """A clip, or a video by its path, as the decoder takes it: a local file's path, the bytes of an object or of a member of a tar.

    Raises MediaError: `missing`, `empty`, `truncated` (a tar that ends inside it), `unreadable` (also a tar that was replaced since its videos were
    listed), `io` if storage fails.
    """
    source = clip if isinstance(clip, str) else clip.source
    offset = None if isinstance(clip, str) else clip.offset
    if offset is None and not web.is_web(source) and not storage.is_remote(source):
        return source
    try:
        if web.is_web(source):
            return web.read(source)
        if isinstance(clip, str) or offset is None:
            return storage.read_bytes(source)
        if not clip.size:
            raise MediaError("empty", f"{source} has 0 bytes")
        return tars.member_bytes(source, offset, clip.size)
    except FileNotFoundError as error:
        raise MediaError("missing", f"{source} is not there") from error
    except StorageError as error:
        raise MediaError("io", str(error)) from error
    except tars.TruncatedTar as error:
        raise MediaError("truncated", str(error)) from error
    except tars.ReplacedTar as error:
        raise MediaError("unreadable", str(error)) from error
    except OSError as error:
        raise MediaError("unreadable", f"{source}: {error.strerror or error}") from error


def training_clip(data: bytes) -> tuple[UInt8[np.ndarray, "frames height width 3"], Float32[np.ndarray, "samples"]]:
    """A media shard's clip as Synchformer is trained on it: pictures at 25 fps and one channel of sound at 16 kHz, both from time 0.

    In the caller's process: what is in a media shard was written by this project. Raises MediaError for what cannot be decoded.
    """
    clip = decode(data, mono_rate_hz=SYNCHFORMER_RATE_HZ)
    assert clip.mono is not None
    return clip.frames, clip.mono
