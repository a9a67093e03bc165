"""Synchformer learns: its stages I and II on clips made by program, from nothing, and what they then say of clips that they never saw.

    python -m tests.benchmarks.sync_learning [out=] [clips=140] [held_out=20] [stage1_steps=150] [stage2_steps=150] [shift=0.6] [start=aligned]
        [control=true] [seed=0]

Runs the jobs as a user would: synth (bouncing balls, whose contacts are known), reencode, train.sync stage=1 (a small Segment AVCLIP), featurise with
both towers, train.sync stage=2 (a small sync transformer), evaluate.sync on the test split, and sync on test clips as they are and with their sound
moved by `shift` seconds. Stage II is also asked before its first step and, with `control`, after as many steps from random weights. With `out=FOLDER`
the work stays there, and what is done is not done again. Last line: JSON.

Chance: 1/7 of the shifted windows, 3 of 21 offsets within one class (14 %).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.shift import move_sound
from train.callbacks import read_metrics

TOWERS = [
    "model.visual=motion", "model.motion.image_size=56", "model.motion.reduce=2", "model.motion.channels=12", "model.motion.width=64",
    "model.audio.width=64", "model.audio.depth=2", "model.audio.heads=4",
]  # fmt: skip
# Crop and flip as published; nothing else changes in clips made by program.
AUGMENT = [f"augment.p_{name}=0.0" for name in ("zoom", "colour", "grey", "reverb", "volume", "pitch", "low_pass", "noise")]
MODULE = ["model.width=256", "model.depth=3", "model.heads=8", "model.mlp_ratio=2"]
MOST_SHIFTED = 10


def job(name: str, *arguments: str) -> float:
    """Run a job, its output on standard error; its seconds."""
    print(f"\nsoundshard {name} {' '.join(arguments)}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "configs.cli", name, *arguments], check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of the evaluation says."""
    return {"value": row["value"], "interval": [row["low"], row["high"]], "cuts": row["answers"], "clips": row["clips"]}


def main() -> None:
    defaults: dict[str, Any] = {
        "out": "", "clips": 140, "held_out": 20, "stage1_steps": 150, "stage2_steps": 150, "shift": 0.6, "start": "aligned",
        "control": True, "seed": 0,
    }  # fmt: skip
    options = OmegaConf.merge(OmegaConf.create(defaults), OmegaConf.from_cli())
    if options.out:
        run(Path(options.out), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


def run(folder: Path, options: Any) -> None:
    seconds: dict[str, float] = {}
    clips, media, features, avclip, sync = (folder / name for name in ("clips", "media", "features", "avclip", "sync"))
    seconds["synth"] = job(
        "synth", f"out={clips}", f"clips={options.clips}", f"validation={options.held_out}", f"test={options.held_out}", "kinds=[bounce]",
        "seconds=9.0", "width=112", "height=84", f"seed={options.seed}",
    )  # fmt: skip
    seconds["reencode"] = job("reencode", f"source={clips}", f"out={media}", "encode.short_side=64")
    common = ["trainer.accelerator=cpu", "trainer.progress=false", f"seed={options.seed}"]
    steps = options.stage1_steps
    seconds["stage1"] = job(
        "train.sync", "stage=1", f"data={media}", f"out={avclip}", *TOWERS, *AUGMENT, *common, "stream.batch_size=8", "stream.workers=2",
        "optimiser.learning_rate=0.002", f"schedule.warmup_steps={steps // 8}", f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={max(1, steps // 3)}",
    )  # fmt: skip
    weights = avclip / "best.safetensors"
    networks = [f"tower.weights={weights}", f"audio.weights={weights}", "codec.name=none"]
    seconds["featurise"] = job("featurise", f"data={media}", f"out={features}", *networks)
    steps = options.stage2_steps
    second = ["stage=2", f"data={features}", *MODULE, *common, "stream.batch_size=16"]
    taught = [
        "optimiser.learning_rate=0.0005", f"schedule.warmup_steps={max(1, steps // 8)}", "schedule.shape=cosine", f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={max(1, steps // 3)}", "iter_times=4",
    ]  # fmt: skip
    untaught = ["optimiser.learning_rate=0.0", "schedule.warmup_steps=0", "trainer.max_steps=1", "trainer.val_check_interval=0"]
    seconds["stage2"] = job("train.sync", *second, f"out={sync}", f"start={options.start}", *taught)
    others = {"stage2_before_its_first_step": (folder / "before", options.start, untaught)}
    if options.control:
        others["stage2_from_random_weights"] = (folder / "random", "random", taught)
    for name, (out, start, how) in others.items():
        seconds[name] = job("train.sync", *second, f"out={out}", f"start={start}", *how)
    found: dict[str, Any] = {}
    for name, data, weights_given, more in (
        ("stage1", media, avclip, []),
        ("stage2", features, sync, ["iter_times=10"]),
        *((name, features, out, ["iter_times=10"]) for name, (out, _, _) in others.items()),
    ):
        out = folder / f"evaluation_{name}"
        given = [f"data={data}", "split=test", f"weights={weights_given}", f"out={out}", "device=cpu", *more]
        seconds[f"evaluate_{name}"] = job("evaluate.sync", *given)
        rows = [row for row in json.loads((out / "rows.json").read_text())["rows"] if row["label"] is None]
        found[name] = {row["measure"]: measured(row) for row in rows}
    offsets = shifted(folder, sync, options)
    result = {
        **{name: value for name, value in options.items() if name != "out"},
        "held_out": found,
        "validation": {str(stage): read_metrics(run)[-1] for stage, run in ((1, avclip), (2, sync))},
        "sync": offsets,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
    }
    print(json.dumps(result))


def shifted(folder: Path, weights: Path, options: Any) -> dict[str, Any]:
    """What `sync` says of test clips as they are and with their sound later by `shift` seconds: behind, so its answer is lower by that."""
    csv = (folder / "clips" / "vggsound.csv").read_text().splitlines()
    test = {line.split(",")[0] for line in csv if line.rstrip().endswith(",test")}
    files = [path for path in sorted((folder / "clips").glob("*.mp4")) if path.name[:11] in test][:MOST_SHIFTED]
    answers: list[list[float]] = []
    for path in files:
        moved = folder / f"moved_{path.name}"
        move_sound(path, moved, options.shift)
        found = []
        for video in (path, moved):
            out = folder / "answer.json"
            job("sync", f"video={video}", f"weights={weights}", f"json={out}", "device=cpu")
            found.append(json.loads(out.read_text())["offset_seconds"])
        answers.append(found)
    return {
        "put_in": -options.shift,
        "as_they_are": [round(before, 2) for before, _ in answers],
        "moved": [round(after, 2) for _, after in answers],
        "moved_within_0.2_s": sum(abs(after + options.shift) <= 0.2 for _, after in answers) / len(answers),
    }


if __name__ == "__main__":
    main()
