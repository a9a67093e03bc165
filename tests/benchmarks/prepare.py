"""How near `soundshard prepare` comes to the work itself, and how far it is from the published way of doing it.

    python -m tests.benchmarks.prepare [source=FOLDER] [clips=24] [cores=2] [rounds=2] [tower=FILE codec=FILE] [preset=fast]

Three ways over the same clips, one after the other in every round:

- bare: one process per core, each a loop that does its share of the same encodes, forward passes and tar bytes, and nothing else;
- soundshard: the two stages as the job runs them, on a Ray that is up. `start` is what a stage takes however many clips there are (planning, starting
  workers, the manifest), found by running half of the clips too; the rates are those of the clips beyond that half, which is what a long job sees;
- published: an ffmpeg process per clip with the published command; then, a clip at a time, decode the pictures, decode the sound, tower, codec (a
  process per core too), with nothing batched across clips and nothing decoded ahead.

`source` holds at least one clip; copies of its files under other names make up the number. Without it small clips are made; without `tower` and
`codec` small networks are, so that decoding is a large part of featurising. Seconds are of wall time. The last line is JSON.
"""

import functools
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import featurise, reencode
from pipeline.features import CodecOptions, Decoded, FeatureOptions, Features, Featuriser, TowerOptions
from pipeline.media import EncodeConfig, decode, decode_audio, decode_video
from pipeline.media import reencode as encode
from pipeline.ray_loop import RayConfig, cluster
from shards.dataset import create_or_check, new_info
from shards.read import Index
from shards.write import Entry, json_bytes, write_shard
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import small_networks

PUBLISHED = (
    "-vf",
    "fps=25,scale='if(gt(iw,ih),-2,256)':'if(gt(iw,ih),256,-2)'",
    "-c:v",
    "libx264",
    "-crf",
    "10",
    "-c:a",
    "aac",
    "-ar",
    "44100",
    "-ac",
    "1",
)

Share = Sequence[str]


def bare_encode(share: Share, name: str, *, root: str, options: EncodeConfig) -> None:
    """One process's share of the encodes, into a shard."""

    def entries() -> Iterator[Entry]:
        for path in share:
            clip = encode(path, options)
            yield Entry(Path(path).stem, "train", None, path, clip.duration_seconds, {"mp4": clip.mp4, "json": json_bytes(clip.record())})

    write_shard(root, name, entries())


def bare_features(share: Share, name: str, *, media: str, root: str, options: FeatureOptions) -> None:
    """One process's share of the features: decode, tower, codec, tar."""
    featuriser, index = Featuriser(options), Index.open(media)
    rate, channels = featuriser.decode_rates() or (0, 0)

    def decoded(key: str) -> Decoded:
        clip = decode(index.bytes(index.row(key), "mp4"), sample_rate_hz=rate, channels=channels)
        return Decoded(clip.frames, clip.audio)

    def entries() -> Iterator[Entry]:
        for key, found in featuriser.run(share, decoded):
            assert isinstance(found, Features) and found.codes is not None
            yield Entry(key, "train", None, key, found.frames / 25, {"avclip.npy": found.avclip, "codes.npy": found.codes, "json": b"{}"})

    write_shard(root, name, entries())


def published_features(share: Share, name: str, *, folder: str, options: FeatureOptions) -> None:
    """One process's share, a clip at a time: pictures and sound are decoded by themselves, and each clip is its own batches."""
    del name
    featuriser = Featuriser(options)
    rate, channels = featuriser.decode_rates() or (0, 0)
    for path in share:
        ((_, found),) = featuriser.run([path], lambda path: Decoded(decode_video(path), decode_audio(path, rate, channels)))
        assert isinstance(found, Features) and found.codes is not None
        np.savez(Path(folder, Path(path).stem), avclip=found.avclip, codes=found.codes)


def in_processes(function: Callable[..., None], shares: Sequence[Share]) -> float:
    """Seconds that the slowest process took for its share, its imports and start not counted."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(shares) + 1)
    processes = [context.Process(target=_timed, args=(barrier, function, share, f"train-{n:06d}")) for n, share in enumerate(shares)]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return seconds


def _timed(barrier: Any, function: Callable[..., None], share: Share, name: str) -> None:
    torch.set_num_threads(1)
    barrier.wait()
    try:
        function(share, name)
    except BaseException:
        barrier.abort()  # the others and the parent wait for this one
        raise
    barrier.wait()


def published_encode(clips: Share, folder: str, cores: int) -> float:
    """An ffmpeg process per clip, as many at a time as there are cores."""

    def one(path: str) -> None:
        out = f"{folder}/{Path(path).stem}.mp4"
        subprocess.run(["ffmpeg", "-y", "-v", "error", "-threads", "1", "-i", path, *PUBLISHED, "-threads", "1", out], check=True)

    started = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(one, clips))
    return time.perf_counter() - started


def make_source(folder: Path, source: str, count: int) -> list[str]:
    """`count` clips: copies of those in `source`, or of ones made here."""
    folder.mkdir()
    given = sorted(path for path in Path(source).iterdir() if path.suffix == ".mp4") if source else []
    if not given:
        made = folder.with_name("made")
        made.mkdir()
        given = [made / f"{number}.mp4" for number in range(4)]
        for number, path in enumerate(given):
            make_clip(path, seconds=5, width=456, height=256, flash_picture=20 + number)
    return [str(shutil.copy(given[n % len(given)], folder / f"clip{n:04d}.mp4")) for n in range(count)]


def main(argv: list[str]) -> None:
    """Run the rounds and print the figures."""
    options = dict(argument.split("=", 1) for argument in argv)
    cores, rounds, count = int(options.get("cores", 2)), int(options.get("rounds", 2)), int(options.get("clips", 24))
    encoding = EncodeConfig(preset=options.get("preset", EncodeConfig.preset))
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, cluster(RayConfig(num_cpus=cores)) as ray_cluster:
        folder = Path(name)
        networks = small_networks(folder) | {key: options[key] for key in ("tower", "codec") if key in options}
        tower, codec = TowerOptions(weights=networks["tower"], device="cpu"), CodecOptions(weights=networks["codec"])
        featuring = FeatureOptions(tower=tower, codec=codec)
        clips = make_source(folder / "in", options.get("source", ""), count)
        shares = [
            clips[core * count // cores : (core + 1) * count // cores] for core in range(cores)
        ]  # of a few sources in turn: every share has each
        (folder / "in-half").mkdir()
        for path in clips[: count // 2]:
            (folder / "in-half" / Path(path).name).hardlink_to(path)
        started = time.perf_counter()
        ray_cluster.start()
        ray_seconds = time.perf_counter() - started
        for number in range(rounds + 1):  # the first warms everything up
            out = folder / f"round{number}"
            for part in ("bare", "bare-f", "published", "published-f"):
                (out / part).mkdir(parents=True)
                create_or_check(out / part, new_info("features" if part.endswith("f") else "media", {"made": part}))
            here = {
                "encode bare": in_processes(functools.partial(bare_encode, root=str(out / "bare"), options=encoding), shares),
                "encode published": published_encode(clips, str(out / "published"), cores),
            }
            for part, source in (("half", "in-half"), ("", "in")):
                config = reencode.ReencodeConfig(source=str(folder / source), out=str(out / f"media{part}"), encode=encoding, clips_per_shard=8)
                started = time.perf_counter()
                reencode.run_stage(config, ray_cluster)
                here[f"encode soundshard{part}"] = time.perf_counter() - started
            keys = [[Path(path).stem for path in share] for share in shares]
            ours = functools.partial(bare_features, media=str(out / "media"), root=str(out / "bare-f"), options=featuring)
            here["features bare"] = in_processes(ours, keys)
            stored = [[str(out / "published" / Path(path).name) for path in share] for share in shares]
            theirs = functools.partial(published_features, folder=str(out / "published-f"), options=featuring)
            here["features published"] = in_processes(theirs, stored)
            for part in ("half", ""):
                data, made = str(out / f"media{part}"), str(out / f"features{part}")
                started = time.perf_counter()
                featurise.run_stage(
                    featurise.FeaturiseConfig(data=data, out=made, tower=tower, codec=codec, actors=cores, chunk_clips=4), ray_cluster
                )
                here[f"features soundshard{part}"] = time.perf_counter() - started
            for stage in ("encode", "features"):
                whole, half = here[f"{stage} soundshard"], here.pop(f"{stage} soundshardhalf")
                here[f"{stage} soundshard"], here[f"{stage} start"] = 2 * (whole - half), max(0.0, 2 * half - whole)
            shutil.rmtree(out)
            print({way: round(value, 2) for way, value in here.items()}, flush=True)
            for way, value in here.items() if number else ():
                seconds.setdefault(way, []).append(value)
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    for way in ("bare", "soundshard", "published"):
        middle[f"both {way}"] = middle[f"encode {way}"] + middle[f"features {way}"]
    starts = {f"{stage} start seconds": round(middle.pop(f"{stage} start"), 1) for stage in ("encode", "features")}
    figures: dict[str, Any] = starts | {f"{way} clips/s": round(count / value, 3) for way, value in middle.items()}
    for part in ("encode", "features", "both"):
        figures[f"{part}: of the bare loops"] = round(middle[f"{part} bare"] / middle[f"{part} soundshard"], 3)
        figures[f"{part}: times the published way"] = round(middle[f"{part} published"] / middle[f"{part} soundshard"], 3)
    print(json.dumps({"clips": count, "cores": cores, "rounds": rounds, "ray_start_seconds": round(ray_seconds, 1), **figures}))


if __name__ == "__main__":
    main(sys.argv[1:])
