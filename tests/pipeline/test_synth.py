import csv
import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.onsets import onset_times, score_onsets
from pipeline.render import Renderer
from pipeline.scenes import KINDS, MARGIN_SECONDS, MIN_GAP_SECONDS, draw_scene
from pipeline.synth import SynthConfig, plan, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SynthConfig]:
    config = SynthConfig(str(tmp_path_factory.mktemp("synth")), clips=9, validation=1, test=2, seconds=2.6, width=162, height=118, seed=3, workers=2)
    run(config)
    return Path(config.out), config


def test_bytes_repeat_whatever_the_workers_and_length_of_the_set(made: tuple[Path, SynthConfig], tmp_path: Path) -> None:
    out, _ = made
    run(SynthConfig(str(tmp_path), clips=5, validation=1, test=0, seconds=2.6, width=162, height=118, seed=3, workers=1))
    again = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.glob("*.mp4")}
    assert len(again) == 5
    assert again == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in again}


def test_folder_reads_as_vggsound_does(made: tuple[Path, SynthConfig]) -> None:
    out, config = made
    with (out / "vggsound.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[3] for row in rows] == ["train"] * 6 + ["validation"] + ["test"] * 2
    keys = [clip.key for clip in plan(config)]
    assert {path.stem for path in out.glob("*.mp4")} == set(keys) == set(json.loads((out / "contacts.json").read_text()))
    for (name, start, label, _), key in zip(rows, keys, strict=True):
        assert len(name) == 11 and key == f"{name}_{int(start) * 1000}_{int(start) * 1000 + 2600}"
        assert label
    assert any("," in row[2] for row in rows)


def test_running_again_keeps_clips_and_another_set_is_refused(made: tuple[Path, SynthConfig]) -> None:
    out, config = made
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.mp4")}
    one = next(iter(before))
    content = one.read_bytes()
    one.unlink()
    run(config)
    assert one.read_bytes() == content
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p != one)
    with pytest.raises(ValueError, match="seed=3 there, 4 asked"):
        run(SynthConfig(str(out), clips=9, validation=1, test=2, seconds=2.6, width=162, height=118, seed=4))


def test_sound_begins_at_the_contacts(made: tuple[Path, SynthConfig]) -> None:
    out, _ = made
    errors = []
    for key, contacts in json.loads((out / "contacts.json").read_text()).items():
        sound = decode_sound(out / f"{key}.mp4")[: round(2.6 * 48000)]
        onsets, times = onset_times(sound, 48000), [c["seconds"] for c in contacts]
        assert score_onsets(onsets, times).f1 > 0.9, key
        errors += [min(abs(o - t) for o in onsets) for t in times]
        first = round(times[0] * 48000)  # before the first contact there is next to nothing; from it on there is sound
        assert np.abs(sound[: first - 240]).max() < 0.1 * np.abs(sound[first : first + 240]).max(), key
    assert np.mean(np.array(errors) < 0.005) > 0.95


def decode_sound(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    assert frames[0].pts == 0 and frames[0].sample_rate == 48000
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def test_ball_is_lowest_in_the_picture_at_the_contact(made: tuple[Path, SynthConfig]) -> None:
    """From the decoded pictures alone: against the empty scene (their median over time), the lowest row of what moves."""
    out, config = made
    checked = 0
    for clip in (c for c in plan(config) if c.kind == "bounce"):
        contacts = json.loads((out / f"{clip.key}.mp4").with_name("contacts.json").read_text())[clip.key]
        with av.open(str(out / f"{clip.key}.mp4")) as container:
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(int)
        assert len(frames) == round(2.6 * clip.frame_rate_hz)
        first = contacts[0]["seconds"]
        until = contacts[1]["seconds"] if len(contacts) > 1 else first + 0.3
        frame_of = first * clip.frame_rate_hz
        window = range(max(0, round(frame_of) - 5), min(round(frame_of) + 6, round((first + until) / 2 * clip.frame_rate_hz)))
        # The ball's centre falls and rises; its shadow does neither, so the mean row of what differs is lowest at the contact.
        moving = np.abs(frames - np.median(frames, axis=0)).sum(axis=3) > 90
        rows = np.array([np.average(np.arange(moving.shape[1]), weights=moving[i].sum(axis=1)) for i in window])
        lowest = window[int(np.argmax(rows))]
        assert abs(lowest - frame_of) <= 1, (clip.key, frame_of, dict(zip(window, rows.round(1), strict=True)))
        checked += 1
    assert checked == 3


@pytest.mark.parametrize("kind", KINDS)
def test_bodies_touch_exactly_at_contacts(kind: str) -> None:
    """Geometry alone: at every contact some body touches a box, the floor or another ball, and no body ever sinks in by more than a hair."""
    for number in range(5):
        scene = draw_scene(np.random.default_rng([7, number]), kind, seconds=3.1)
        times = [c.seconds for c in scene.contacts]
        assert min(np.diff(times)) >= MIN_GAP_SECONDS
        assert times[0] >= MARGIN_SECONDS and times[-1] < 3.1 - MARGIN_SECONDS
        gaps = [smallest_gap(scene, t) for t in times]
        assert max(map(abs, gaps)) < 1e-6, gaps
        assert min(smallest_gap(scene, t) for t in np.linspace(0, 3.0999, 157)) > -1e-6


def smallest_gap(scene, seconds: float) -> float:
    balls = [b for b in scene.bodies_at(seconds) if b.start == b.end]
    gaps = [np.linalg.norm(np.subtract(a.start, b.start)) - a.radius_m - b.radius_m for i, a in enumerate(balls) for b in balls[:i]]
    for ball in balls:
        solids = [(np.array(box.low), np.array(box.high)) for box in scene.stage.boxes]
        gaps += [np.linalg.norm(np.maximum(np.maximum(low - ball.start, ball.start - high), 0)) - ball.radius_m for low, high in solids]
        if scene.kind != "bumper":  # balls that roll touch the floor all the time
            gaps.append(ball.start[1] - ball.radius_m)
    return min(gaps, default=1.0)


def test_a_frame_depends_on_its_instant_alone() -> None:
    scene = draw_scene(np.random.default_rng(5), "mallet", seconds=2.5)
    renderer = Renderer(scene, width=86, height=64)
    first = renderer.frame(0.7)
    renderer.frame(1.3)
    assert np.array_equal(first, renderer.frame(0.7))
    assert not np.array_equal(first, renderer.frame(0.9))
    assert first.shape == (64, 86, 3) and first.std() > 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"clips": 16}, "leaves no clip"), ({"width": 161}, "even sides"), ({"seconds": 1.0}, "2 or more"), ({"frame_rates_hz": []}, "positive rates")],
)
def test_what_cannot_be_made_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthConfig("x", **changed)
