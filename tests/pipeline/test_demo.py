import importlib
import json
import os
import signal
import subprocess
import sys
import time
import typing
from functools import partial
from pathlib import Path

import pytest
import yaml

from configs.cli import JOBS
from configs.load import find_yaml, load
from pipeline import demo
from pipeline.demo import DemoConfig, plan_steps
from pipeline.demo_results import hear
from pipeline.onsets import total_score
from pipeline.steps import Step

SECTIONS = ["synth", "reencode", "standin", "featurise", "train", "generate"]


def read(*arguments: str) -> DemoConfig:
    return load(DemoConfig, ["config=demo", *arguments])


def schema_of(job: str) -> type:
    """The configuration that a job's `run` takes."""
    module = importlib.import_module(JOBS[job][0])
    return typing.get_type_hints(module.run)["config"]


@pytest.mark.parametrize("arguments", [[], ["weights=published"], ["train.trainer.max_steps=7", "generate.sampling.temperature=0.5"]])
def test_every_command_is_one_that_the_job_takes(arguments: list[str]) -> None:
    steps = plan_steps(read(*arguments))
    assert [s.job for s in steps] == [job for job in SECTIONS if job != "standin" or "weights=published" not in arguments]
    for step in steps:
        config = load(schema_of(step.job), step.arguments)
        if arguments[:1] == ["train.trainer.max_steps=7"] and step.job == "train":
            assert config.trainer.max_steps == 7


def test_demo_yaml_holds_only_what_differs_from_the_jobs_defaults() -> None:
    plain = yaml.safe_load(find_yaml("demo").read_text())
    assert set(plain) <= set(SECTIONS)
    assert [name for name in SECTIONS if getattr(read(), name) != plain.get(name, {})] == []


def test_steps_hand_each_other_their_folders(tmp_path: Path) -> None:
    options = {s.job: dict(a.split("=", 1) for a in s.arguments) for s in plan_steps(read(f"out={tmp_path}"))}
    assert options["synth"]["out"] == options["reencode"]["source"]
    assert options["reencode"]["out"] == options["standin"]["data"] == options["featurise"]["data"] == options["generate"]["data"]
    assert options["featurise"]["tower.weights"] == options["standin"]["out"] + "/tower.safetensors"
    assert options["featurise"]["codec.weights"] == options["standin"]["out"] + "/codec.safetensors"
    assert options["featurise"]["out"] == options["train"]["data"] and options["train"]["out"] == options["generate"]["run"]
    assert options["generate"]["data_split"] == "test"


def test_published_weights_must_be_there_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="soundshard weights get=avclip"):
        demo.run(read(f"out={tmp_path / 'demo'}", "weights=published"))
    assert not (tmp_path / "demo").exists()


def own_splits(steps: list[Step]) -> dict[str, str]:
    reencode = next(s for s in steps if s.job == "reencode")
    return {k: v for k, v in (a.split("=", 1) for a in reencode.arguments) if k.endswith("_fraction")}


def test_own_clips_are_split_unless_they_say_how(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").touch()
    steps = plan_steps(read(f"source={tmp_path}"))
    assert [s.job for s in steps] == SECTIONS[1:]
    fractions = own_splits(steps)
    assert round(3 * float(fractions["test_fraction"])) == 1 and round(3 * float(fractions["validation_fraction"])) == 1
    for number in range(40):
        (tmp_path / f"clip{number}.mp4").touch()
    fractions = own_splits(plan_steps(read(f"source={tmp_path}")))
    assert round(43 * float(fractions["test_fraction"])) == 4
    (tmp_path / "vggsound.csv").write_text('abcdefghijk,0,"x",train\nabcdefghijk,1,"x",test\n')
    assert own_splits(plan_steps(read(f"source={tmp_path}"))) == {}
    (tmp_path / "vggsound.csv").unlink()
    for file in list(tmp_path.glob("*.mp4"))[1:]:
        file.unlink()
    with pytest.raises(ValueError, match="3 clips or more"):
        plan_steps(read(f"source={tmp_path}"))


@pytest.mark.slow
def test_the_whole_path(tmp_path: Path, capfd: pytest.CaptureFixture, ray_address: str) -> None:
    """Every job as its own process on a few small clips, to the page; and again, when nothing runs."""
    arguments = [
        f"out={tmp_path / 'demo'}",
        "page_clips=2",
        "synth={clips: 7, validation: 1, test: 3, seconds: 2.6, width: 96, height: 72}",
        f"reencode={{clips_per_shard: 2, encode: {{short_side: 72, preset: ultrafast}}, ray: {{address: '{ray_address}'}}}}",
        "standin={tower: {steps: 3, tower: {image_size: 64, width: 16, channels: 4}}, codec_card: 32, batch_segments: 4}",
        f"featurise.ray.address={ray_address}",
        "train={model: {layers: 1, width: 32, visual_width: 16, heads: 2}, stream: {segments: 2, batch_size: 4}, schedule: {warmup_steps: 1}, "
        "trainer: {max_steps: 4, val_check_interval: 2, log_every: 1, precision: 32-true, accelerator: cpu}}",
        f"generate={{data_split: test, ray: {{address: '{ray_address}'}}}}",
    ]
    assert demo.main(arguments) == 0
    out = capfd.readouterr().out
    for job in SECTIONS:
        assert f"soundshard {job} " in out
    page = (tmp_path / "demo" / "page.html").read_text()
    assert f"page: {tmp_path / 'demo' / 'page.html'}" in out
    assert "results: 3 held-out clips, onset F1 " in out and "validation loss " in out
    assert page.count("<video ") == 4 and "soundshard train" in page and page.count("<polyline") >= 4
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo" / "steps").iterdir()}
    assert len(stamps) == 6 and all(json.loads(p.read_text())["done"] for p in stamps)
    assert demo.main(arguments) == 0
    again = capfd.readouterr().out
    assert again.count("(done)") == 6 and again.splitlines()[-1] == out.splitlines()[-1]
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    known = hear(tmp_path / "demo")
    contacts = json.loads((tmp_path / "demo" / "clips" / "contacts.json").read_text())
    assert [h.marks_seconds for h in known] == [tuple(c["seconds"] for c in contacts[h.key] if c["seconds"] < 2.6) for h in known]
    (tmp_path / "demo" / "clips" / "contacts.json").unlink()  # as with one's own clips
    own = hear(tmp_path / "demo")
    assert [h.marks_seconds for h in own] == [h.original.onsets_seconds for h in own]
    assert total_score([h.marks_seconds for h in own], [h.marks_seconds for h in known]).f1 > 0.8


def test_interrupted_it_keeps_what_is_done_and_leaves_no_process(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "configs.cli", "demo", f"out={tmp_path}", "synth={clips: 400, width: 96, height: 72}"]
    # Under a shell's `&` interrupts are ignored, and so by what is started from there.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heeding)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("clips/*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "soundshard demo: interrupted; what is finished is kept" in errors and "Traceback" not in errors
    assert json.loads((tmp_path / "steps" / "synth.json").read_text())["done"] is False
    assert not list(tmp_path.glob("clips/*.part"))
    assert _ends(process.pid, seconds=10)


def _ends(group: int, *, seconds: float) -> bool:
    """Whether the last process of a group ends within a time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
