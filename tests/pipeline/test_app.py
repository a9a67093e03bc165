"""The page, in a real browser on a real server with small networks; and what is behind it, without either."""

import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from model.generate import Sampling
from pipeline import app
from pipeline.app import AppConfig, Progress, Result, Studio, Wish
from pipeline.media import MediaError, decode
from pipeline.sounder import Sounder, SoundOptions
from tests.pipeline.clips import click_seconds, make_clip
from tests.pipeline.networks import small_networks, small_run

ROOT = Path(__file__).resolve().parents[2]
RATE_HZ = 24000
OPTIONS = SoundOptions(sampling=Sampling(guidance=2.0, top_k=20))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return small_run(folder, small_networks(folder))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "clip.mp4", seconds=3, width=160, height=96)
    make_clip(folder / "old.avi", container="avi", video_codec="mpeg4", audio_codec="libmp3lame", seconds=2)
    make_clip(folder / "silent.webm", container="webm", video_codec="libvpx-vp9", audio_codec=None, seconds=2)
    make_clip(folder / "sound.mp4", video_codec=None, seconds=2)
    make_clip(folder / "long.mp4", seconds=40)
    (folder / "broken.mp4").write_text("no video" * 100)
    (folder / "large.mp4").write_bytes(bytes(3 << 20))
    return folder


# Behind the page


@pytest.fixture(scope="module")
def sounder(run_folder: Path) -> Sounder:
    return Sounder.open(str(run_folder), device="cpu")


@pytest.fixture
def studio(sounder: Sounder, tmp_path: Path) -> Iterator[Studio]:
    with Studio(sounder, AppConfig(run="", max_seconds=2.0), tmp_path) as studio:
        yield studio


def samples(wav: bytes) -> np.ndarray:
    """What a 16-bit wav file holds."""
    with wave.open(io.BytesIO(wav)) as file:
        assert file.getframerate() == RATE_HZ and file.getsampwidth() == 2
        return np.frombuffer(file.readframes(1 << 30), "<i2").reshape(-1, file.getnchannels()).T / np.float32(32767)


def made(studio: Studio, wish: Wish) -> tuple[Result, bytes]:
    *progress, result = studio.make(wish)
    assert isinstance(result, Result) and all(isinstance(p, Progress) for p in progress)
    return result, (studio.made / result.token / "new.wav").read_bytes()


def test_a_request_asks_for_its_own_options(studio: Studio, clips: Path) -> None:
    wish = Wish(clips / "clip.mp4", replace(OPTIONS, duration_seconds=1.28), start_seconds=0.48)
    result, wav = made(studio, wish)
    assert result.total_seconds == 1.28 and result.name == "clip" and not result.notes
    folder = studio.made / result.token
    assert {path.name for path in folder.iterdir()} == {"new.mp4", "own.mp4", "copied.mp4", "new.wav"}
    sound = samples(wav)
    assert sound.shape == (1, round(1.28 * RATE_HZ)) and np.abs(sound).max() > 1e-3
    for name in ("new.mp4", "own.mp4"):
        assert decode(folder / name).frames.shape[0] == 32
    assert click_seconds(result.own_sound.wave, RATE_HZ) == pytest.approx(0.8 - 0.48, abs=2e-3)  # the same stretch
    assert made(studio, wish)[1] == wav
    assert made(studio, replace(wish, options=replace(wish.options, seed=1)))[1] != wav
    assert studio.sounder.options == SoundOptions()  # what is shared stays as it was


def test_the_sound_is_the_one_that_the_sounder_makes(studio: Studio, sounder: Sounder, clips: Path) -> None:
    options = replace(OPTIONS, seed=3, duration_seconds=1.92)
    _, wav = made(studio, Wish(clips / "clip.mp4", options))
    before = sounder.options
    sounder.options = options
    expected = sounder.generate(clips / "clip.mp4")
    sounder.options = before
    assert np.abs(samples(wav) - expected.clip(-1, 1)).max() < 1e-4


def test_a_long_video_gets_sound_for_its_first_part(studio: Studio, clips: Path) -> None:
    result, _ = made(studio, Wish(clips / "clip.mp4", OPTIONS))
    assert result.total_seconds == pytest.approx(1.92) and "1.92 s at most" in result.notes[0]


def test_any_pictures_are_shown_in_a_form_that_browsers_play(studio: Studio, clips: Path) -> None:
    result, _ = made(studio, Wish(clips / "old.avi", OPTIONS))
    for name, codec in (("new.mp4", "h264"), ("own.mp4", "h264"), (result.copied, "mpeg4")):
        with av.open(str(studio.made / result.token / name)) as container:
            assert container.streams.video[0].codec_context.name == codec
    result, _ = made(studio, Wish(clips / "silent.webm", OPTIONS))
    assert any("no sound" in note for note in result.notes) and not result.own_sound.wave.any()
    assert len(result.own_sound.wave) == len(result.new_sound.wave)


def test_it_can_be_heard_while_it_is_made(studio: Studio, clips: Path) -> None:
    making = studio.make(Wish(clips / "clip.mp4", replace(OPTIONS, duration_seconds=1.92)))
    first = next(making)
    assert isinstance(first, Progress) and first.made_seconds == 0 and first.total_seconds == pytest.approx(1.92)
    live = studio.live[first.token]
    early = studio.wav(live)
    header = next(early)
    assert header is not None and next(early) is None  # the listener waits
    second = next(making)
    assert isinstance(second, Progress) and 0 < second.made_seconds < 1.92
    pieces = [next(early)]
    result = [*making][-1]
    assert isinstance(result, Result) and not studio.live
    whole = b"".join(piece for piece in [header, *pieces, *early] if piece)
    late = b"".join(piece for piece in studio.wav(live) if piece)
    assert late == whole
    file = samples((studio.made / result.token / "new.wav").read_bytes())
    assert np.array_equal(samples(whole), file) and file.shape[1] == round(1.92 * RATE_HZ)


def test_a_request_that_is_given_up_leaves_nothing(studio: Studio, clips: Path) -> None:
    making = studio.make(Wish(clips / "clip.mp4", OPTIONS))
    token = next(making).token
    next(making)
    listener = studio.wav(studio.live[token])
    making.close()
    assert not studio.live and not list(studio.made.iterdir())
    assert None not in list(listener)  # what there is, and an end
    for name, reason in (("broken.mp4", "undecodable"), ("sound.mp4", "no_video"), ("nowhere.mp4", "missing")):
        with pytest.raises(MediaError) as error:
            list(studio.make(Wish(clips / name, OPTIONS)))
        assert error.value.reason == reason
    with pytest.raises(MediaError, match="too_short"):
        list(studio.make(Wish(clips / "clip.mp4", OPTIONS, start_seconds=2.8)))
    with pytest.raises(ValueError, match="stride"):
        list(studio.make(Wish(clips / "clip.mp4", replace(OPTIONS, window_segments=1, stride_segments=2))))
    assert not list(studio.made.iterdir())


def test_old_files_are_swept_but_not_those_in_use(studio: Studio, clips: Path) -> None:
    for name in ("a", "b"):
        (studio.folder / name).mkdir()
        shutil.copy(clips / "clip.mp4", studio.folder / name / f"{name}.mp4")
    result, _ = made(studio, Wish(studio.folder / "a" / "a.mp4", OPTIONS))
    making = studio.make(Wish(studio.folder / "b" / "b.mp4", OPTIONS))
    token = next(making).token
    studio.sweep(3600.0)
    assert (studio.made / result.token).is_dir() and (studio.folder / "a" / "a.mp4").is_file()
    studio.sweep(-1.0)
    assert not (studio.made / result.token).exists() and not (studio.folder / "a" / "a.mp4").exists()
    assert (studio.made / token).is_dir() and (studio.folder / "b" / "b.mp4").is_file()
    assert isinstance([*making][-1], Result)


def test_gradio_is_wanted_only_when_the_page_is_served(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert app.main(["--help"]) == 0
    assert app.main([str(run_folder)]) == 2
    assert "pip install 'soundshard[app]'" in capsys.readouterr().err
    assert app.main([str(run_folder), "max_seconds=0.5"]) == 2
    assert "at least a segment" in capsys.readouterr().err


# The page itself


@dataclass(frozen=True)
class Server:
    """A running app."""

    url: str
    process: subprocess.Popen
    temporary: Path
    log: Path


def needed(what: str | None, name: str) -> None:
    if what is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {name} for the test in a browser")


@pytest.fixture(scope="module")
def server(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needed("gradio" if importlib.util.find_spec("gradio") else None, "gradio")
    temporary = tmp_path_factory.mktemp("temporary")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "configs.cli",
        "app",
        str(run_folder),
        f"port={port}",
        "device=cpu",
        "threads=1",
        "max_upload_mb=2",
        "max_waiting=1",
    ]
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = tmp_path_factory.mktemp("log") / "app.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        while "Ctrl-C ends it" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield Server(f"http://127.0.0.1:{port}/", process, temporary, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    needed("playwright" if importlib.util.find_spec("playwright") else None, "playwright")
    chromium = shutil.which("chromium")
    needed(chromium, "chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"])
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser: Any, server: Server) -> Iterator[Any]:
    page = visit(browser, server)
    yield page
    page.close()


def visit(browser: Any, server: Server) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)  # for a machine that does other things too
    page.asked, page.broke = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.broke.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#go")
    # Every value that the bar shows, however briefly.
    page.evaluate(
        """() => { window.shown = []; new MutationObserver(() => {
        const bar = document.querySelector("#status progress"); if (bar) window.shown.push(bar.value);
        }).observe(document.body, {childList: true, subtree: true, attributes: true, characterData: true}); }"""
    )
    return page


def drop(page: Any, clip: Path) -> None:
    page.set_input_files("#upload input[type=file]", str(clip))
    page.wait_for_selector("#upload video")


def fill(page: Any, name: str, value: float) -> None:
    page.fill(f"#{name} input[type=number]", str(value))
    page.press(f"#{name} input[type=number]", "Tab")


def press(page: Any) -> None:
    page.evaluate("() => document.querySelectorAll('#status .card').forEach((card) => card.classList.add('before'))")
    page.click("#go:enabled")


def wait_done(page: Any) -> None:
    page.wait_for_selector("#status .good:not(.before)")
    page.wait_for_selector("#result figure.new video")


# What an element plays, decoded by the browser: its bytes' hash, its duration, how loud it is.
HEAR = """async (element) => {
  const data = await (await fetch(element.currentSrc)).arrayBuffer();
  const hash = Array.from(new Uint8Array(await crypto.subtle.digest("SHA-256", data))).join();
  const sound = await new OfflineAudioContext(1, 1, 24000).decodeAudioData(data);
  const wave = sound.getChannelData(0);
  return {hash, seconds: sound.duration, loudness: Math.sqrt(wave.reduce((sum, x) => sum + x * x, 0) / wave.length)};
}"""
PLAYS = """async (video) => {
  if (video.readyState < 2) await new Promise((ready, broken) => { video.onloadeddata = ready; video.onerror = () => broken(video.error); });
  const canvas = document.createElement("canvas"); canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const context = canvas.getContext("2d"); context.drawImage(video, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  return {seconds: video.duration, width: video.videoWidth, light: pixels.reduce((sum, x) => sum + x, 0) / pixels.length};
}"""


@pytest.mark.slow
def test_a_video_gets_new_sound(visitor: Any, server: Server, clips: Path, tmp_path: Path) -> None:
    page = visitor
    drop(page, clips / "clip.mp4")
    fill(page, "guidance", 2.5)
    fill(page, "seed", 7)
    press(page)
    wait_done(page)
    heard = page.eval_on_selector("#live audio", HEAR)
    assert heard["seconds"] == pytest.approx(3.0, abs=1e-3) and heard["loudness"] > 1e-3
    page.wait_for_function("() => document.querySelector('#live audio').currentTime > 0")  # it plays by itself
    for kind in ("new", "own"):
        seen = page.eval_on_selector(f"#result figure.{kind} video", PLAYS)
        assert seen["seconds"] == pytest.approx(3.0, abs=0.1) and seen["width"] == 160 and seen["light"] > 20
    sounds = [page.eval_on_selector(f"#result figure.{kind} video", HEAR) for kind in ("new", "own")]
    assert all(sound["seconds"] == pytest.approx(3.0, abs=0.1) and sound["loudness"] > 1e-3 for sound in sounds)
    assert sounds[0]["hash"] != sounds[1]["hash"]
    # It went on before the eyes of the visitor, and never backwards.
    shown = page.evaluate("window.shown")
    assert len(set(shown)) >= 3 and max(shown) == 3.0 and all(a <= b for a, b in pairwise(shown))
    assert "x real time" in page.inner_text("#status")
    # The same seed again, and another.
    hashes = [heard["hash"]]
    for seed in (7, 8):
        fill(page, "seed", seed)
        press(page)
        wait_done(page)
        hashes.append(page.eval_on_selector("#live audio", HEAR)["hash"])
    assert hashes[0] == hashes[1] != hashes[2]
    # What there is to keep.
    with page.expect_download() as download:
        page.click("#result a[download$='.wav']")
    assert download.value.suggested_filename == "clip.wav"
    download.value.save_as(tmp_path / "kept.wav")
    assert samples((tmp_path / "kept.wav").read_bytes()).shape == (1, 3 * RATE_HZ)
    # The line in the spectrogram goes with the video, and a click on it moves the video.
    assert page.eval_on_selector_all("#result .spectrogram image", "images => images.length") == 2
    page.click("#result figure.new .spectrogram", position={"x": 100, "y": 20})
    page.wait_for_function("() => document.querySelector('#result figure.new video').currentTime > 0.3")
    page.wait_for_function("() => document.querySelector('#result figure.new .head').getAttribute('transform') > 'translate(1'")
    # It needs nothing from elsewhere, and fits a narrow window.
    assert [url for url in page.asked if not url.removeprefix("blob:").startswith((server.url, "data:"))] == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.broke == []


def test_what_is_wrong_is_said_on_the_page(visitor: Any, server: Server, clips: Path) -> None:
    page = visitor

    def wrong() -> str:
        press(page)
        text = page.wait_for_selector("#status .wrong:not(.before)").inner_text()
        assert "Traceback" not in text and str(clips) not in text
        return text

    assert "no video yet" in wrong()
    drop(page, clips / "broken.mp4")
    assert "cannot be read as a video" in wrong()
    page.click("#upload button[aria-label='Clear'], #upload button[title='Clear']")
    drop(page, clips / "sound.mp4")
    assert "no pictures" in wrong()
    page.click("#upload button[aria-label='Clear'], #upload button[title='Clear']")
    drop(page, clips / "clip.mp4")
    page.click("#more button")
    fill(page, "start", 2.9)
    assert "too short" in wrong()
    fill(page, "start", 0.4)
    fill(page, "duration", 0.64)
    fill(page, "stride", 2)
    fill(page, "window", 1)
    assert "do not go together" in wrong()
    fill(page, "stride", 1)
    press(page)
    wait_done(page)
    assert page.eval_on_selector("#live audio", HEAR)["seconds"] == pytest.approx(0.64, abs=1e-3)
    page.click("#upload button[aria-label='Clear'], #upload button[title='Clear']")
    page.set_input_files("#upload input[type=file]", str(clips / "large.mp4"))
    page.get_by_text("exceed the maximum").first.wait_for()
    large = {"name": "large.mp4", "mimeType": "video/mp4", "buffer": (clips / "large.mp4").read_bytes()}
    assert page.request.post(f"{server.url}gradio_api/upload", multipart={"files": large}).status == 413  # not only by the page


def test_it_listens_where_it_was_told_to(server: Server) -> None:
    port = int(server.url.rsplit(":")[-1].strip("/"))
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))  # this machine as well, by another address


def test_visitors_wait_for_each_other_and_one_may_give_up(browser: Any, server: Server, visitor: Any, clips: Path) -> None:
    first, second, third = visitor, visit(browser, server), visit(browser, server)
    drop(first, clips / "long.mp4")
    drop(second, clips / "clip.mp4")
    press(first)
    first.wait_for_selector("#status progress")
    press(second)
    second.get_by_text("Another video is being worked on").wait_for()
    press(third)
    third.get_by_text("This could not be begun").wait_for()
    first.click("#stop")
    first.get_by_text("Stopped").wait_for()
    wait_done(second)
    assert first.query_selector("#go:enabled") and not first.query_selector("#result video")
    assert first.inner_text("#status .card").startswith("Stopped")
    results = [path for path in server.temporary.glob("soundshard-app-*/made/*") if not (path / "copied.mp4").exists()]
    assert results == []  # what was given up is gone
    second.close()
    third.close()


def app_folders(server: Server) -> list[Path]:
    return list(server.temporary.glob("soundshard-app-*"))


def test_it_ends_when_it_is_told_to_and_leaves_nothing(server: Server) -> None:
    assert len(app_folders(server)) == 1
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    deadline = time.monotonic() + 5
    while app_folders(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert app_folders(server) == []
    said = server.log.read_text()
    assert "temporary files are removed" in said and "Traceback" not in said
