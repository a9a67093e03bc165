"""What cached features buy Synchformer's stage II: its steps from feature shards against the published way, decoding and both towers in every step.

    python -m tests.benchmarks.sync_stage2 [size=small|full] [clips=4] [batch=0] [steps=0] [rounds=3] [device=cpu] [precision=fp32|bf16|fp16]
        [workers=2] [threads=0]

The same clips of 10 s (made by program, 342x256) are there as media shards and as feature shards of the default hops, whose values are random: time
does not depend on them. Each way runs in a process of its own, in turn, `rounds` times: the stream that training reads, then forward, backward,
clipping and AdamW as training takes them. Each tower's seconds for a segment are measured too: what featurising a clip once costs. `size=full` is
the published network (batch=1 on a CPU: 14 segments of pictures take about a minute there). Memory is the process's largest resident size; on a GPU
also its largest allocation there.

From the rates: how long the published stage II (326 epochs of VGGSound's 154,000 training clips) takes each way on one such device, featurising once
included. Results are medians over rounds. Last line: JSON.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from configs.clock import segment_count
from configs.load import load
from model.avclip import Avclip, save_avclip
from model.motion_tower import MotionTower, MotionTowerConfig
from model.sync_run import SyncRun
from model.synchformer_audio import AudioTower, AudioTowerConfig, audio_config
from model.synchformer_visual import VisualTower, VisualTowerConfig, normalise, tower_config
from pipeline.synth import SynthConfig, make_clip, plan
from shards.dataset import create_or_check, new_info
from shards.read import Index
from shards.write import Entry, write_manifest, write_shard
from train.data import Clips, Pairs
from train.optim import build_optimiser, clip_gradients
from train.sync_pairs import DTYPES, PairJob, PairModule, Towers, feature_openers, media_openers, new_module, resolved, stored_shapes
from train.trainer import step_options

EPOCHS, VGGSOUND_CLIPS = 326, 154_000
PUBLISHED_DAYS, PUBLISHED_DEVICES = 8, 32
SECONDS, HOP_FRAMES, HOP_SAMPLES = 10, 8, 640


def networks(size: str) -> tuple[VisualTower | MotionTower, AudioTower, dict[str, int]]:
    """Both towers, and the options of what is above them."""
    if size == "full":
        return VisualTower(VisualTowerConfig()), AudioTower(AudioTowerConfig()), {"width": 768, "depth": 3, "heads": 8}
    return MotionTower(MotionTowerConfig()), AudioTower(AudioTowerConfig(width=96, depth=2, heads=4)), {"width": 96, "depth": 2, "heads": 4}


def make(folder: Path, size: str, clips: int) -> None:
    """The towers' weights, media shards and feature shards of the same clips."""
    torch.manual_seed(0)
    visual, audio, _ = networks(size)
    save_avclip(folder / "towers.safetensors", Avclip(visual, audio))
    synth = SynthConfig(out=str(folder), clips=clips + 2, validation=1, test=0, seconds=float(SECONDS), width=342, height=256, frame_rates_hz=[25])
    towers = {"tower": {"config": tower_config(visual)}, "audio": {"hop_samples": HOP_SAMPLES, "tower": {"config": audio_config(audio)}}}
    create_or_check(str(folder / "media"), new_info("media", {"made": "by program"}))
    create_or_check(str(folder / "features"), new_info("features", {"hop_frames": HOP_FRAMES, "codec": None, **towers}))
    frames = SECONDS * 25
    shapes = {
        "avclip.npy": (1, segment_count(frames, HOP_FRAMES), 8, visual.config.width),
        "avclip_audio.npy": (1, (frames * 640 - 10240) // HOP_SAMPLES + 1, audio.config.tokens, audio.config.width),
    }
    rng = np.random.default_rng(0)
    entries: dict[str, list[Entry]] = {"media": [], "features": []}
    for clip in plan(synth)[:clips]:
        make_clip(clip, synth)
        mp4 = (folder / f"{clip.key}.mp4").read_bytes()
        entries["media"].append(Entry(clip.key, "train", None, clip.key, float(SECONDS), {"mp4": mp4, "json": b"{}"}))
        members: dict[str, Any] = {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}
        entries["features"].append(Entry(clip.key, "train", None, clip.key, float(SECONDS), {**members, "json": b"{}"}))
    for kind, rows in entries.items():
        write_shard(str(folder / kind), "train-000000", rows)
        write_manifest(str(folder / kind))


def measure(options: Any) -> dict[str, float]:
    """One way, in this process: seconds of a step, samples a second, memory."""
    folder, device = Path(options.folder), torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    _, _, sizes = networks(options.size)
    values = [f"model.{name}={value}" for name, value in sizes.items()]
    workers = options.workers if options.way == "media" else 0
    job = load(PairJob, [f"data={folder / options.way}", "out=x", f"stream.batch_size={options.batch}", f"stream.workers={workers}", *values])
    index = Index.open(job.roots[0], "train")
    if options.way == "media":
        towers = Towers.load(str(folder / "towers.safetensors"), DTYPES[options.precision]).to(device)
        opener = media_openers(job, job.cut.grid, [index], [], None, towers.visual.config.image_size)
        shapes, of = (tower_config(towers.visual), audio_config(towers.audio)), Clips.of
    else:
        towers, opener, shapes, of = None, feature_openers(job, job.cut.grid, [index], [], None), stored_shapes(index), Pairs.of
    model, _ = new_module(job, shapes)
    described = SyncRun(2, *shapes, model.config, {"fingerprint": "", "spec": {}}, resolved(job))
    module = PairModule(step_options(job), described, model.to(device), towers)
    optimiser = build_optimiser(module.model.parameters(), job.optimiser)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    batches, seconds = iter(opener[0](0, 1)), []
    for _ in range(options.steps + 1):
        wait()
        began = time.perf_counter()
        batch = of(next(batches))
        batch = type(batch)(*(part.to(device, non_blocking=True) if isinstance(part, torch.Tensor) else part for part in batch))
        with torch.autocast(device.type, DTYPES[options.precision], enabled=options.precision != "fp32"):
            loss = module.training_step(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        clip_gradients(module.model.parameters(), job.optimiser)
        optimiser.step()
        wait()
        seconds.append(time.perf_counter() - began)
    batches.close()
    found = {"step_seconds": statistics.mean(seconds[1:]), "samples_per_second": options.batch / statistics.mean(seconds[1:])}
    if towers is not None:
        found |= segment_seconds(towers, device)
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["peak_rss_children_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    if device.type == "cuda":
        found["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return found


@torch.no_grad()
def segment_seconds(towers: Towers, device: torch.device) -> dict[str, float]:
    """What a segment costs in each tower."""
    size, wait = towers.visual.config.image_size, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    many = 64 if device.type == "cuda" else 2
    pixels = torch.zeros(1, many, 16, size, size, 3, dtype=torch.uint8, device=device)
    sound = torch.zeros(1, 16 * many, 10240, device=device)
    found = {}
    with torch.autocast(device.type, towers.precision, enabled=towers.precision != torch.float32):
        for name, work, count in (
            ("visual_segment_seconds", lambda: towers.visual(normalise(pixels)), many),
            ("audio_segment_seconds", lambda: towers.audio(towers.log_mel(sound)), 16 * many),
        ):
            work()
            wait()
            began = time.perf_counter()
            work()
            wait()
            found[name] = (time.perf_counter() - began) / count
    return found


def main() -> None:
    defaults = {
        "size": "small", "clips": 4, "batch": 0, "steps": 0, "rounds": 3, "device": "cpu", "precision": "fp32", "workers": 2, "threads": 0,
        "way": "", "folder": "",
    }  # fmt: skip
    options = OmegaConf.merge(OmegaConf.create(defaults), OmegaConf.from_cli())
    options.batch = options.batch or (64 if options.device != "cpu" else 1 if options.size == "full" else 4)
    options.steps = options.steps or (20 if options.device != "cpu" else 1 if options.size == "full" else 5)
    if options.way:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, float]]] = {"features": [], "media": []}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.size, max(options.clips, options.batch))
        for number in range(options.rounds):
            for way in found:
                # A step from features takes so little that more of them are needed to time one.
                steps = options.steps * (20 if way == "features" else 1)
                given = {**dict(options.items()), "way": way, "folder": folder, "steps": steps}
                command = [sys.executable, "-m", "tests.benchmarks.sync_stage2", *(f"{name}={value}" for name, value in given.items())]
                line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
                found[way].append(json.loads(line))
                print(f"round {number + 1}, from {way}: {found[way][-1]['samples_per_second']:.3f} samples/s, "
                      f"{found[way][-1]['peak_rss_mb']:.0f} MB", flush=True)  # fmt: skip
    result = {way: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]} for way, rounds in found.items()}
    print(json.dumps({**asdict_of(options), **summary(result)}))


def asdict_of(options: Any) -> dict[str, Any]:
    """The options that say what was measured."""
    return {name: value for name, value in options.items() if name not in ("way", "folder")}


def summary(result: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The figures, and what they mean for the published stage II."""
    features, media = result["features"], result["media"]
    frames = SECONDS * 25
    segments = segment_count(frames, HOP_FRAMES), (frames * 640 - 10240) // HOP_SAMPLES + 1
    once = VGGSOUND_CLIPS * (segments[0] * media["visual_segment_seconds"] + segments[1] * media["audio_segment_seconds"])
    samples = EPOCHS * VGGSOUND_CLIPS
    days = {"published_way": samples / media["samples_per_second"] / 86400, "featurise_once": once / 86400,
            "from_features": samples / features["samples_per_second"] / 86400}  # fmt: skip
    ratio = days["published_way"] / (days["featurise_once"] + days["from_features"])
    return {
        **{way: {name: round(value, 6) for name, value in figures.items()} for way, figures in result.items()},
        "samples_per_second_ratio": round(features["samples_per_second"] / media["samples_per_second"], 1),
        "one_device_days": {name: round(value, 2) for name, value in days.items()},
        "whole_stage_ratio": round(ratio, 1),
        "published_days_on_32_devices": PUBLISHED_DAYS,
        "the_same_devices_days_from_features": round(PUBLISHED_DAYS / ratio, 4),
    }


if __name__ == "__main__":
    main()
