"""What fusing re-encoding and featurising costs in features: those of the pictures about to be encoded against those of the stored clip.

    python -m tests.benchmarks.fused tower=WEIGHTS CLIP [CLIP ...] [segments=3] [crf=10]

Relative differences are of whole feature vectors, |a - b| / |b|, per token. As a yardstick, the same for neighbouring tokens of the stored clip (what
one step of time changes). The last line is JSON.
"""

import json
import statistics
import sys
import time

import torch

from configs.clock import SEGMENT_FRAMES
from model.synchformer_visual import VisualTower, load_tower, normalise
from pipeline.encode import EncodeConfig, reencode
from pipeline.media import decode_video
from pipeline.views import view_crop


@torch.inference_mode()
def features(tower: VisualTower, frames: torch.Tensor, segments: int) -> torch.Tensor:
    """[segments * tokens, width] of the first contiguous segments, centre crop."""
    crop = view_crop("", 0, frames.shape[1], frames.shape[2], tower.config.image_size)
    cut = torch.from_numpy(crop.apply(frames.numpy())[: segments * SEGMENT_FRAMES].copy()).unflatten(0, (segments, SEGMENT_FRAMES))
    return torch.cat([tower(normalise(segment)[None, None])[0, 0] for segment in cut])


def main(argv: list[str]) -> None:
    """Compare and print."""
    options = dict(argument.split("=", 1) for argument in argv if "=" in argument)
    clips = [argument for argument in argv if "=" not in argument]
    tower, segments = load_tower(options["tower"]), int(options.get("segments", 3))
    relative, steps, decode_seconds = [], [], []
    for clip in clips:
        encoded = reencode(clip, EncodeConfig(crf=float(options.get("crf", 10))), keep_frames=True)
        assert encoded.pictures is not None
        started = time.process_time()
        stored = decode_video(encoded.mp4)
        decode_seconds.append(time.process_time() - started)
        a, b = features(tower, torch.from_numpy(encoded.pictures), segments), features(tower, torch.from_numpy(stored), segments)
        relative += ((a - b).norm(dim=1) / b.norm(dim=1)).tolist()
        steps += ((b[1:] - b[:-1]).norm(dim=1) / b[1:].norm(dim=1)).tolist()
    figures = {
        "clips": len(clips),
        "tokens": len(relative),
        "relative_difference_median": round(statistics.median(relative), 4),
        "relative_difference_max": round(max(relative), 4),
        "neighbouring_tokens_median": round(statistics.median(steps), 4),
        "decode_cpu_seconds_saved_per_clip": round(statistics.mean(decode_seconds), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
