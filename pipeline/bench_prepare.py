"""`soundshard bench-prepare`: what preparing a clip costs on this machine, measured on a sample; `soundshard plan` reckons with it.

Runs the real re-encode, decode, visual tower and codec, bare and one after the other in this process, so the rates are those of one core (or of
one GPU) with nothing in the way: a clip that brings down its decoder ends it. Knows no cluster, no Ray and no shards. The times are as good as
the machine is idle.
"""

import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import Float16

from configs import storage
from configs.load import JobError, job_main, to_plain
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.features import Decoded, FeatureOptions, Features, Featuriser, Listener, find_weights, sound_segments
from pipeline.isolate import Child, Limits, peak_bytes
from pipeline.media import EncodeConfig, EncodedClip, MediaError, decode, fetched, reencode
from pipeline.rates import Cost, Rates

TAR_BLOCK_BYTES = 512
"""A tar member is a header of one block and its bytes, rounded up to whole blocks."""
NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class BenchPrepareConfig(FeatureOptions, DiscoverConfig):
    """Options of `soundshard bench-prepare`: those of `prepare` that decide how much work a clip is."""

    encode: EncodeConfig = field(default_factory=EncodeConfig)
    clips: int = 16
    """Most clips to measure, spread evenly over the sample. A 10 s clip is about 10 CPU seconds of encoding and decoding, and without a GPU minutes
    of the full-size tower."""
    out: str = "rates.json"
    """File for the rates, which `soundshard plan` reads."""


def run(config: BenchPrepareConfig) -> Rates:
    """Measure what preparing clips costs on this machine: runs re-encode, decode, tower and codec on a sample and writes the rates to a file."""
    if config.clips < 1:
        raise ValueError(f"clips is {config.clips}; expected at least 1")
    find_weights(config)
    sample = choose([clip for clip in discover(config) if not clip.reason], config.clips)
    rates = measure(sample, config)
    storage.write_bytes(config.out, json.dumps(asdict(rates), indent=1).encode())
    print(f"{table(rates)}\n-> {config.out}", flush=True)
    return rates


def choose(clips: Sequence[Clip], count: int) -> list[Clip]:
    """At most `count` of the clips, spread evenly over their order."""
    count = min(count, len(clips))
    return [clips[number * len(clips) // count] for number in range(count)]


def measure(sample: Sequence[Clip], config: BenchPrepareConfig) -> Rates:
    """The rates of the sample. Raises JobError if none of its clips is good."""
    worker_process_bytes = resident_bytes()
    stored, plain, fused, reasons = encode_all(sample, config.encode)
    if not stored:
        raise JobError(f"none of the {len(sample)} clips of the sample could be re-encoded ({dict(reasons)}); give other clips")
    decoder_process_bytes = isolated_bytes(stored[0], config.encode)
    featuriser = Featuriser(config)
    _networks_once(featuriser, stored[0])  # libraries load, and torch.compile compiles, outside the measured time
    actor_process_bytes = resident_bytes()
    decoding, tower, listening, coding = Stopwatch(), Stopwatch(), Stopwatch(), Stopwatch()
    features = frame_bytes = segments = 0
    for start in range(0, len(stored), config.chunk_clips):  # as many at a time as one call of a featurising process takes
        chunk = []
        for clip in stored[start : start + config.chunk_clips]:
            with decoding.running():
                chunk.append(_decoded(featuriser, clip))
            frame_bytes += chunk[-1].frames.nbytes
        pictures = [Decoded(clip.frames, None) for clip in chunk]
        with tower.running():
            found = [result for _, result in featuriser.run(range(len(chunk)), pictures.__getitem__)]
        for clip, result in zip(chunk, found, strict=True):
            assert isinstance(result, Features), "a stored clip has at least one segment"
            arrays = [result.avclip]
            if featuriser.codec is not None:
                with coding.running():
                    codes = featuriser.encode(clip.sound)
                assert codes is not None
                arrays.append(codes)
            if featuriser.listener is not None:
                with listening.running():
                    arrays.append(hear(featuriser.listener, clip))
            segments += result.avclip.shape[0] * result.avclip.shape[1]
            features += sum(tar_bytes(array.nbytes + NPY_HEADER_BYTES) for array in arrays) + TAR_BLOCK_BYTES * 2
    good, on_gpu = len(stored), featuriser.device.type == "cuda"
    return Rates(
        clips=len(sample),
        failed=len(sample) - good,
        reasons=dict(reasons),
        video_seconds=sum(clip.duration_seconds for clip in stored) / good,
        segments=segments / good,
        reencode=plain.cost.over(len(sample)),
        reencode_fused=fused.cost.over(len(sample)),
        decode=decoding.cost.over(good),
        tower=tower.cost.over(good),
        codec=coding.cost.over(good),
        source_bytes=sum(_size(clip) for clip in sample) / len(sample),
        media_bytes=sum(tar_bytes(len(clip.mp4)) + tar_bytes(len(json.dumps(clip.record()))) for clip in stored) / good,
        feature_bytes=features / good,
        decoded_bytes=frame_bytes / good,
        worker_process_bytes=worker_process_bytes,
        decoder_process_bytes=decoder_process_bytes,
        actor_process_bytes=actor_process_bytes,
        device=featuriser.device.type,
        gpu_kind=torch.cuda.get_device_name(featuriser.device) if on_gpu else "",
        gpu_memory_bytes=torch.cuda.max_memory_allocated(featuriser.device) if on_gpu else 0,
        cpu_kind=cpu_kind(),
        cpus=len(os.sched_getaffinity(0)),
        versions={"python": platform.python_version(), "av": av.__version__, "torch": torch.__version__},
        options=to_plain(config),
        audio=listening.cost.over(good),
    )


class Stopwatch:
    """Adds up what the work inside `running` takes."""

    def __init__(self) -> None:
        self.cost = Cost(0.0, 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time until the block is left, by an exception too."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.cost = Cost(self.cost.wall_seconds + time.perf_counter() - wall, self.cost.cpu_seconds + time.process_time() - cpu)


def encode_all(sample: Sequence[Clip], config: EncodeConfig) -> tuple[list[EncodedClip], Stopwatch, Stopwatch, Counter[str]]:
    """Every clip re-encoded, plainly and as for fused stages in turn so that both meet the same machine; the good ones, the times, the failures."""
    good: list[EncodedClip] = []
    plain, fused, reasons = Stopwatch(), Stopwatch(), Counter[str]()
    for clip in sample:
        try:
            source = fetched(clip)
            with plain.running():
                encoded = reencode(source, config, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds)
        except MediaError as error:
            reasons[error.reason] += 1
        else:
            good.append(encoded)
        with suppress(MediaError):
            source = fetched(clip)
            with fused.running():
                reencode(source, config, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds, keep_frames=True)
    return good, plain, fused, reasons


def hear(listener: Listener, clip: Decoded) -> Float16[np.ndarray, "segments tokens width"]:
    """The audio tower over one clip's sound, in batches, on the host."""
    assert clip.heard is not None
    segments = torch.from_numpy(sound_segments(clip.heard, len(clip.frames), listener.options.hop_samples).copy())
    return torch.cat([listener(part) for part in segments.split(listener.options.batch_segments)]).to("cpu", torch.float16).numpy()


def _decoded(featuriser: Featuriser, clip: EncodedClip) -> Decoded:
    rate, channels = featuriser.decode_rates() or (None, None)
    decoded = decode(clip.mp4, sample_rate_hz=rate, channels=channels, mono_rate_hz=featuriser.heard_rate_hz())
    return Decoded(decoded.frames, decoded.audio, heard=decoded.mono)


def _networks_once(featuriser: Featuriser, clip: EncodedClip) -> None:
    decoded = _decoded(featuriser, clip)
    list(featuriser.run([clip], lambda _: decoded))


def tar_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar."""
    return TAR_BLOCK_BYTES * (1 + -(-size // TAR_BLOCK_BYTES))


def _size(clip: Clip) -> int:
    if clip.offset is not None:
        return clip.size or 0
    found = storage.stat(clip.source)
    return found.size if found else 0


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def isolated_bytes(clip: EncodedClip, config: EncodeConfig) -> int:
    """Most memory of a process that re-encodes and decodes one clip as the jobs do it. The largest child that this process has had counts."""
    child = Child(Limits())
    try:
        child.call(reencode, clip.mp4, config)
        child.call(decode, clip.mp4)
        return child.call(peak_bytes)
    finally:
        child.close()


def cpu_kind() -> str:
    """The processor's name as Linux gives it."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rates: Rates) -> str:
    """The rates for a person to read: what a clip costs, and how many one core or one GPU does in an hour."""
    on_gpu = rates.device == "cuda"
    head = f"{rates.clips} clips of {rates.video_seconds:.1f} s, {rates.failed} failed; {rates.cpus} x {rates.cpu_kind}"
    lines = [head + (f", {rates.gpu_kind}" if on_gpu else ""), f"{'':<22}{'CPU s':>9}{'wall s':>9}{'clips/h':>10}  per"]
    for name, cost in (("re-encode", rates.reencode), ("re-encode, fused", rates.reencode_fused), ("decode", rates.decode)):
        lines.append(_line(name, cost, cost.cpu_seconds, "core"))
    unit = "GPU" if on_gpu else "core"
    for name, cost in (("tower", rates.tower), ("audio tower", rates.audio), ("codec", rates.codec)):
        if cost.wall_seconds:
            lines.append(_line(name, cost, cost.wall_seconds if on_gpu else cost.cpu_seconds, unit))
    tower_seconds = rates.tower.wall_seconds if on_gpu else rates.tower.cpu_seconds
    lines.append(f"tower: {rates.segments:.1f} segments a clip, {rates.segments / tower_seconds:.2f} segments/s per {unit}")
    lines.append(
        f"a clip: source {rates.source_bytes / 1e6:.2f} MB, media {rates.media_bytes / 1e6:.2f} MB, features {rates.feature_bytes / 1e6:.3f} MB"
    )
    return "\n".join(lines)


def _line(name: str, cost: Cost, seconds: float, unit: str) -> str:
    return f"{name:<22}{cost.cpu_seconds:>9.3f}{cost.wall_seconds:>9.3f}{3600 / seconds:>10.0f}  {unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.bench_prepare`."""
    return job_main(BenchPrepareConfig, run, argv, command="bench-prepare")


if __name__ == "__main__":
    sys.exit(main())
