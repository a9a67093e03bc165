"""CPU seconds per clip of the re-encoder, in pairs with Debian's ffmpeg doing the published command, and what other x264 settings cost and give.

    python -m tests.benchmarks.reencode [CLIPS...] [--sweep] [--pairs N]

Without clips, three are made: a textured, panned and noisy scene in three sizes and rates. CPU time (user and system, of the process and its
children) is what is compared, so a busy machine changes little; a pair's two runs follow each other, and medians are taken over pairs. The sweep
measures size, CPU, SSIM and PSNR against the scaled source (by ffmpeg's filters) of presets and settings, each also at the CRF that gives back
medium's SSIM.
Prints one JSON line last.
"""

import argparse
import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import mean, median

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.filter import Graph
from av.video.frame import VideoFrame

from pipeline.media import EncodeConfig, open_clip, reencode

SCALE = "fps=25,scale=iw*256/'min(iw,ih)':ih*256/'min(iw,ih)',crop='trunc(iw/2)'*2:'trunc(ih/2)'*2"
SETTINGS: dict[str, dict[str, str]] = {
    "medium": {},
    "fast": {"preset": "fast"},
    "faster": {"preset": "faster"},
    "veryfast": {"preset": "veryfast"},
    "superfast": {"preset": "superfast"},
    "faster tune=ssim ref=1": {"preset": "faster", "tune": "ssim", "x264_params": "ref=1"},
    "the same, no P partitions": {"preset": "faster", "tune": "ssim", "x264_params": "ref=1:partitions=i8x8,i4x4"},
    "medium subme=4": {"x264_params": "subme=4"},
    "medium subme=2": {"x264_params": "subme=2"},
    "medium ref=1": {"x264_params": "ref=1"},
    "medium trellis=0": {"x264_params": "trellis=0"},
    "medium bframes=0": {"x264_params": "bframes=0"},
    "medium aq-mode=0": {"x264_params": "aq-mode=0"},
    "medium no-mbtree": {"x264_params": "no-mbtree=1"},
    "medium gop=50": {"x264_params": "keyint=50"},
    "medium no-psy": {"x264_params": "no-psy=1"},
    "medium tune=ssim": {"tune": "ssim"},
    "faster tune=ssim": {"preset": "faster", "tune": "ssim"},
    "veryfast tune=ssim": {"preset": "veryfast", "tune": "ssim"},
    "veryfast tune=ssim bframes=0": {"preset": "veryfast", "tune": "ssim", "x264_params": "bframes=0"},
    "superfast mbtree tune=ssim": {"preset": "superfast", "tune": "ssim", "x264_params": "mbtree=1:rc-lookahead=10"},
}


def run(clips: list[Path], *, pairs: int, sweep: bool) -> dict:
    """Measure, print a table, return the figures."""
    result: dict = {"clips": len(clips)}
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg:
        result |= compare(clips, ffmpeg, pairs)
    else:
        print("no ffmpeg on the PATH: no pairs", file=sys.stderr)
    if sweep:
        result["sweep"] = sweep_settings(clips)
    return result


def compare(clips: list[Path], ffmpeg: str, pairs: int) -> dict:
    """Our re-encoder, at ffmpeg's preset and at its own, and ffmpeg, one after the other on each clip."""
    rows = []
    for path in clips:
        for _ in range(pairs):
            same = cpu_of(lambda path=path: reencode(path, EncodeConfig(preset="medium")))
            own = cpu_of(lambda path=path: reencode(path))
            rows.append((same, own, cpu_of(lambda path=path: subprocess.run(published_command(ffmpeg, path), check=True))))
        same, own, other = (median(column) for column in zip(*rows[-pairs:], strict=True))
        print(
            f"{path.name:36} medium {same:5.2f} s  default {own:5.2f} s  ffmpeg {other:5.2f} s  ratios {same / other:.3f}, {own / other:.3f}",
            flush=True,
        )
    same, own, other = (round(mean(column), 3) for column in zip(*rows, strict=True))
    ratios = {"ratio_same_preset": median(row[0] / row[2] for row in rows), "ratio_default": median(row[1] / row[2] for row in rows)}
    seconds = {"cpu_seconds_same_preset": same, "cpu_seconds_default": own, "cpu_seconds_ffmpeg": other}
    return seconds | {name: round(ratio, 3) for name, ratio in ratios.items()}


def published_command(ffmpeg: str, path: Path) -> list[str]:
    """The command of the published data sets, on one thread as ours."""
    codecs = ["-vcodec", "h264", "-threads", "1", "-crf", "10", "-acodec", "aac", "-ar", "44100", "-ac", "1"]
    return [
        ffmpeg,
        "-v",
        "error",
        "-nostdin",
        "-threads",
        "1",
        "-i",
        str(path),
        "-vf",
        SCALE,
        *codecs,
        "-f",
        "mp4",
        "-movflags",
        "frag_keyframe",
        os.devnull,
        "-y",
    ]


def cpu_of(job) -> float:
    """CPU seconds of this process and of children that end while `job` runs."""
    before = _cpu()
    job()
    return _cpu() - before


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def sweep_settings(clips: list[Path]) -> list[dict]:
    """Every setting at CRF 10, and at the CRF that gives medium's SSIM back."""
    scaled = {path: scaled_source(path) for path in clips}
    base, rows = measure(clips, scaled, EncodeConfig(preset="medium")), []
    for name, changes in SETTINGS.items():
        config = replace(EncodeConfig(preset="medium"), **changes)
        plain = measure(clips, scaled, config)
        crf = match_ssim(clips, scaled, config, base["ssim"], plain["ssim"])
        matched = measure(clips, scaled, replace(config, crf=crf)) if crf != config.crf else plain
        row = {"settings": name, "crf10": relative(plain, base), "crf": crf, "matched": relative(matched, base)}
        rows.append(row)
        print(
            f"{name:30} crf 10: {described(row['crf10'])}   crf {crf:5.2f}: {described(row['matched'])}",
            flush=True,
        )
    return rows


def match_ssim(clips: list[Path], scaled: dict[Path, list[VideoFrame]], config: EncodeConfig, wanted: float, at_ten: float) -> float:
    """The CRF, to a quarter, that gives the wanted SSIM: on the line through this CRF and one nearer to it."""
    probe = config.crf + (1.5 if at_ten > wanted else -1.5)
    slope = (measure(clips, scaled, replace(config, crf=probe), runs=1)["ssim"] - at_ten) / (probe - config.crf)
    return round(4 * (config.crf + (wanted - at_ten) / slope)) / 4


def measure(clips: list[Path], scaled: dict[Path, list[VideoFrame]], config: EncodeConfig, *, runs: int = 2) -> dict[str, float]:
    """CPU seconds (the least of the runs), bytes and SSIM, over all clips."""
    cpu, size, quality, noise = 0.0, 0, [], []
    for path in clips:
        encoded: list[bytes] = []

        def encode(path: Path = path, encoded: list[bytes] = encoded) -> None:
            encoded.append(reencode(path, config).mp4)

        cpu += min(cpu_of(encode) for _ in range(runs))
        size += len(encoded[0])
        quality.append(likeness("ssim", "lavfi.ssim.All", scaled[path], encoded[0]))
        noise.append(likeness("psnr", "lavfi.psnr.mse_avg", scaled[path], encoded[0]))
    return {"cpu": cpu, "size": size, "ssim": mean(quality), "psnr_db": mean(10 * math.log10(255**2 / mse) for mse in noise)}


def described(row: dict[str, float]) -> str:
    return f"cpu {row['cpu']:.2f} size {row['size']:.3f} ssim {row['ssim']:+.5f} psnr {row['psnr_db']:+.2f}"


def relative(row: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {
        "cpu": round(row["cpu"] / base["cpu"], 3),
        "size": round(row["size"] / base["size"], 4),
        "ssim": round(row["ssim"] - base["ssim"], 6),
        "psnr_db": round(row["psnr_db"] - base["psnr_db"], 3),
    }


def scaled_source(path: Path) -> list[VideoFrame]:
    """The frames that the encoder is given."""
    with open_clip(path) as clip:
        return list(clip.pictures(EncodeConfig().short_side))


def likeness(name: str, key: str, reference: list[VideoFrame], mp4: bytes) -> float:
    """Mean over frames of what one of ffmpeg's comparing filters says about an encoding and what was encoded."""
    graph, first = Graph(), reference[0]
    arguments = {"video_size": f"{first.width}x{first.height}", "pix_fmt": "yuv420p", "time_base": "1/25", "pixel_aspect": "1/1"}
    main, other = graph.add("buffer", **arguments), graph.add("buffer", **arguments)
    compare_filter, sink = graph.add(name), graph.add("buffersink")
    main.link_to(compare_filter, 0, 0)
    other.link_to(compare_filter, 0, 1)
    compare_filter.link_to(sink)
    graph.configure()
    values = []
    with av.open(io.BytesIO(mp4), "r") as container:
        for index, (frame, expected) in enumerate(zip(container.decode(video=0), reference, strict=True)):
            frame.pts = expected.pts = index
            frame.time_base = expected.time_base = Fraction(1, 25)
            main.push(frame)
            other.push(expected)
            values.append(float(sink.pull().metadata[key]))
    return mean(values)


def make_clips(folder: Path) -> list[Path]:
    """Scenes with fine texture, a pan, moving bodies and sensor noise."""
    return [
        _make(folder / f"{width}x{height}_{rate}.mp4", width, height, rate)
        for width, height, rate in ((640, 360, 30), (480, 360, 25), (1280, 720, 30))
    ]


def _make(path: Path, width: int, height: int, rate: int, seconds: int = 4) -> Path:
    random = np.random.default_rng(width)
    texture = np.zeros((height * 2, width * 2))
    for size, strength in ((32, 28), (8, 14), (2, 7)):
        coarse = random.normal(0, strength, (-(-height * 2 // size), -(-width * 2 // size)))
        texture += np.kron(coarse, np.ones((size, size)))[: height * 2, : width * 2]
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as out:
        video, sound = out.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "veryfast"}), out.add_stream("aac", rate=44100)
        video.width, video.height = width, height
        for n in range(seconds * rate):
            t = n / rate
            dx, dy = int(width / 4 * (1 + np.sin(t))), int(height / 4 * (1 + np.cos(0.7 * t)))
            luma = 110 + texture[dy : dy + height, dx : dx + width] + random.normal(0, 3, (height, width))
            for k in range(3):
                inside = (x - width * (0.5 + 0.4 * np.sin(t * (1 + k) + k))) ** 2 + (y - height * (0.5 + 0.4 * np.cos(t * 2 + k))) ** 2 < (
                    height / 10
                ) ** 2
                luma[inside] = 60 + 50 * k
            rgb = luma[..., None] + np.array([20, 0, -20])
            out.mux(video.encode(VideoFrame.from_ndarray(rgb.clip(0, 255).astype(np.uint8), format="rgb24")))
        frame = AudioFrame.from_ndarray(random.normal(0, 0.05, (2, seconds * 44100)).astype(np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        out.mux([*video.encode(None), *sound.encode(frame), *sound.encode(None)])
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", type=Path, help="videos to measure on")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side per clip")
    parser.add_argument("--sweep", action="store_true", help="also try presets and settings (minutes)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clips = arguments.clips or make_clips(Path(folder))
        print(json.dumps({"benchmark": "reencode", **run(clips, pairs=arguments.pairs, sweep=arguments.sweep)}))


if __name__ == "__main__":
    main()
