"""`soundshard app`: a page on which a video gets new sound. Drop it, choose how, listen while it is made; the video as it was is beside the new one.

The page is Gradio's, which is imported only when the job runs; its queue lets one visitor at a time to the networks. What a request makes lies in a
folder of its own under one temporary folder, from which old files are swept and which is gone when the job ends. Nothing is loaded from elsewhere:
the page works without a network. Knows how to ask a `Sounder` and what to show; the sound is `pipeline.sounder`'s matter.
"""

import contextlib
import copy
import os
import secrets
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from configs.clock import FRAME_RATE_HZ, SEGMENT_SECONDS
from configs.load import JobError, job_main
from model.generate import Sampling
from pipeline import page
from pipeline.features import TowerOptions
from pipeline.isolate import Limits, call
from pipeline.media import EncodeConfig, MediaError, WavWriter, decode_audio, mux_wav, transcode_original, video_frames
from pipeline.sounder import Sound, Sounder, SoundOptions, find_networks
from pipeline.stretch import Stretch

INSTALL = "the page needs Gradio: pip install 'soundshard[app]'"
SWEEP_SECONDS = 30.0
POLL_SECONDS = 0.05
"""How often a listener looks for the next piece of sound."""
MADE = {"new.mp4": "video/mp4", "own.mp4": "video/mp4", "copied.mp4": "video/mp4", "copied.mkv": "video/x-matroska", "new.wav": "audio/wav"}
"""The files of a request that a browser may ask for. `new` and `own` have pictures that any browser plays, `copied` the upload's own, untouched."""
PREVIEW = EncodeConfig(crf=20.0, preset="veryfast")
"""How the pictures beside each other are encoded."""
T = TypeVar("T")


@dataclass(frozen=True)
class AppConfig:
    """Options of `soundshard app`."""

    run: str = "???"
    """Run folder of `soundshard train` or `soundshard weights get=vaura`."""
    weights: str = "model"
    """Which weights of the run: `model` (the latest) or `best` (the smallest validation loss)."""
    tower_weights: str = ""
    """The visual tower's weights file; empty takes the one that the run was trained on."""
    codec_weights: str = ""
    """The codec's weights file; empty takes the one that the run was trained on."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`: a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the decoder."""
    threads: int = 0
    """CPU threads; 0 takes all cores."""
    host: str = "127.0.0.1"
    """Address to listen at. The default is reached from this machine only; 0.0.0.0 lets in everyone who can reach the machine."""
    port: int = 7860
    """Port to listen at."""
    share: bool = False
    """Also make the page public for a few days through Gradio's relay, which needs the network."""
    max_seconds: float = 64.0
    """The longest sound that one request makes. Of a longer video the first part gets sound."""
    max_upload_mb: int = 500
    """The largest file that is taken."""
    max_waiting: int = 20
    """Requests that may wait while another is worked on."""
    keep_minutes: float = 60.0
    """Uploads and results older than this are removed."""
    sampling: Sampling = field(default_factory=Sampling)
    """What the page's controls begin with."""
    seed: int = 666
    """The seed that the page begins with. The same seed, video and settings give the same sound."""

    def __post_init__(self) -> None:
        if self.max_seconds < SEGMENT_SECONDS:
            raise ValueError(f"max_seconds={self.max_seconds:g}: expected at least a segment, {float(SEGMENT_SECONDS):g}")
        if self.max_upload_mb < 1 or self.max_waiting < 1 or self.keep_minutes <= 0 or self.threads < 0:
            raise ValueError(
                f"max_upload_mb={self.max_upload_mb}, max_waiting={self.max_waiting}, keep_minutes={self.keep_minutes:g}, threads={self.threads}: "
                "expected numbers above 0 (threads: 0 takes all cores)"
            )


def run(config: AppConfig) -> None:
    """Serve a page on which a video gets new sound: drop it, choose how, listen while it is made. Ctrl-C ends it."""
    with tempfile.TemporaryDirectory(prefix="soundshard-app-") as folder:
        # Gradio reads these once, when it is imported.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            import gradio
        except ModuleNotFoundError as error:
            raise ValueError(f"{INSTALL} ({error})") from error
        threads = config.threads or os.cpu_count() or 1
        tower = TowerOptions(weights=config.tower_weights, device=config.device, threads=threads)
        networks = find_networks(config.run, tower=tower, codec=config.codec_weights, weights=config.weights, precision=config.precision)
        with Studio(Sounder(networks, SoundOptions(sampling=config.sampling, seed=config.seed)), config, Path(folder)) as studio:
            blocks = build(studio)
            try:
                _, local, public = blocks.launch(
                    server_name=config.host,
                    server_port=config.port,
                    share=config.share,
                    max_file_size=config.max_upload_mb << 20,
                    prevent_thread_lock=True,
                    quiet=True,
                    footer_links=[],
                    run_history=False,
                    enable_monitoring=False,
                    theme=_theme(gradio),
                    css=CSS,
                    head=f"<script>{SCRIPT}</script>",
                    app_kwargs={"routes": [_route(studio)]},
                )
            except OSError as error:
                raise JobError(f"cannot listen at {config.host}:{config.port}: {error}") from error
            try:
                print(f"app: {public or local} (Ctrl-C ends it)", flush=True)
                _until_told_to_end()
            finally:
                blocks.close(verbose=False)
    print("app: ended, temporary files are removed", flush=True)


def _until_told_to_end() -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for."""

    video: Path
    options: SoundOptions
    start_seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """How far the sound of a request is."""

    token: str
    """Name of the request's folder, and of its sound's address while it is made."""
    made_seconds: float
    total_seconds: float
    elapsed_seconds: float


@dataclass(frozen=True)
class Result:
    """What came of a request."""

    token: str
    name: str
    """What the video is called."""
    copied: str
    """File name of the new sound under the video's own pictures, untouched: for keeping."""
    new_sound: page.Sound
    own_sound: page.Sound
    notes: tuple[str, ...]
    total_seconds: float
    elapsed_seconds: float


@dataclass
class Live:
    """A sound as it is made: 16-bit pieces for listeners, who may come early or late."""

    sample_rate_hz: int
    channels: int
    samples: int
    """How many there will be."""
    pieces: list[bytes] = field(default_factory=list)
    ended: bool = False

    def header(self) -> bytes:
        """What a wav file of the whole sound begins with."""
        frame_bytes = 2 * self.channels
        form = struct.pack("<HHIIHH", 1, self.channels, self.sample_rate_hz, self.sample_rate_hz * frame_bytes, frame_bytes, 16)
        data_bytes = self.samples * frame_bytes
        return (
            b"RIFF" + struct.pack("<I", 36 + data_bytes) + b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", data_bytes)
        )

    def push(self, wave: Sound) -> None:
        """The next piece."""
        self.pieces.append(np.rint(wave.T.clip(-1, 1) * 32767).astype("<i2").tobytes())


class Studio:
    """The networks, the one thread that they run on, and the folder where requests' files lie. A context manager: at its end all of it is gone."""

    def __init__(self, sounder: Sounder, config: AppConfig, folder: Path) -> None:
        self.sounder, self.config, self.folder = sounder, config, folder
        self.made = folder / "made"
        self.made.mkdir()
        self.live: dict[str, Live] = {}
        self._in_use: set[Path] = set()
        # One thread for whatever touches the networks: torch keeps inference mode, and CUDA its graphs, by thread.
        self._thread = ThreadPoolExecutor(1, "networks")
        self._ended = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_on, name="sweeper", daemon=True)

    def __enter__(self) -> "Studio":
        self._sweeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.shutdown(cancel_futures=True)
        self._sweeper.join()

    def plan(self, wish: Wish) -> tuple[Stretch, int, tuple[str, ...]]:
        """The stretch that gets sound, how many frames it has, and what there is to say of it. Raises MediaError where the video does not do."""
        frames = call(video_frames, wish.video, limits=Limits())
        stretch = Stretch.of(wish.start_seconds, wish.options.segments)
        most = int(self.config.max_seconds / SEGMENT_SECONDS)
        if stretch.frames_of(frames) <= most * SEGMENT_SECONDS * FRAME_RATE_HZ:
            return stretch, stretch.frames_of(frames), ()
        stretch = replace(stretch, segments=most)
        return stretch, stretch.frames_of(frames), (f"sound is made for {float(most * SEGMENT_SECONDS):g} s at most here",)

    def make(self, wish: Wish) -> Generator[Progress | Result]:
        """New sound for a video: progress, sound by sound, and then the result. When it is closed early, what it began is removed.

        Raises ValueError for options that do not go with the run, MediaError where the video is at fault.
        """
        began = time.monotonic()
        wish.options.check(self.sounder.trained)
        stretch, frames, notes = self.plan(wish)
        sounder = copy.copy(self.sounder)  # the networks are shared, the options are this request's
        sounder.options = replace(wish.options, duration_seconds=float(stretch.segments * SEGMENT_SECONDS))
        token, total = secrets.token_urlsafe(12), frames / FRAME_RATE_HZ
        folder = self.made / token
        live = Live(sounder.sample_rate_hz, sounder.codec.channels, sounder.samples_of(frames))
        self.live[token] = live
        self._in_use |= {wish.video, folder}
        folder.mkdir()
        mono: list[np.ndarray] = []
        finished = False
        try:
            with WavWriter(folder / "new.wav", sounder.sample_rate_hz, live.channels) as wav:
                yield Progress(token, 0.0, total, time.monotonic() - began)
                pieces = partial(sounder.generate, wish.video, stream=True, start_seconds=wish.start_seconds, key=wish.video.stem)
                for piece in self._on_thread(pieces):
                    wav.write(piece)
                    live.push(piece)
                    mono.append(piece.mean(axis=0))
                    yield Progress(token, wav.samples / sounder.sample_rate_hz, total, time.monotonic() - began)
            live.ended = True
            copied, own_sound, more = self._videos(wish.video, folder, stretch.start_seconds, Fraction(frames, FRAME_RATE_HZ))
            new_sound = page.Sound(np.concatenate(mono), sounder.sample_rate_hz, ())
            finished = True
            yield Result(token, wish.video.stem, copied, new_sound, own_sound, (*notes, *more), total, time.monotonic() - began)
        finally:
            live.ended = True
            del self.live[token]
            self._in_use -= {wish.video, folder}
            if not finished:
                shutil.rmtree(folder, ignore_errors=True)

    def _videos(self, video: Path, folder: Path, start: Fraction, duration: Fraction) -> tuple[str, page.Sound, tuple[str, ...]]:
        """The stretch with its own sound and with the new one, to see side by side, and the video to keep. Its name, the own sound, what to say."""
        wav = folder / "new.wav"
        own = call(
            partial(transcode_original, start_seconds=start, duration_seconds=duration, config=PREVIEW), video, folder / "own.mp4", limits=Limits()
        )
        call(mux_wav, own.path, wav, folder / "new.mp4", limits=Limits())
        copied = call(partial(mux_wav, start_seconds=start, duration_seconds=duration), video, wav, folder / "copied.mp4", limits=Limits())
        rate_hz = self.sounder.sample_rate_hz
        if own.note:
            own_wave = np.zeros((1, round(duration * rate_hz)), np.float32)
        else:
            own_wave = call(partial(decode_audio, sample_rate_hz=rate_hz, channels=1), own.path, limits=Limits())
        return copied.path.name, page.Sound(own_wave[0], rate_hz, ()), tuple(note for note in (own.note, copied.note) if note)

    def _on_thread(self, begin: Callable[[], Iterator[T]]) -> Iterator[T]:
        """An iterator that is made, moved on and closed on the networks' thread."""
        iterator, end = self._thread.submit(begin).result(), object()
        try:
            while (item := self._thread.submit(next, iterator, end).result()) is not end:
                yield item  # pyright: ignore[reportReturnType]  # not the sentinel
        finally:
            if close := getattr(iterator, "close", None):
                self._thread.submit(close).result()

    def wav(self, live: Live) -> Iterator[bytes | None]:
        """A sound while it is made, as a wav file; None where the next piece is not there yet. One that is given up ends early."""
        yield live.header()
        sent = 0
        while sent < len(live.pieces) or not live.ended:
            if sent < len(live.pieces):
                yield live.pieces[sent]
                sent += 1
            else:
                yield None

    def _sweep_on(self) -> None:
        while not self._ended.wait(SWEEP_SECONDS):
            self.sweep(self.config.keep_minutes * 60)

    def sweep(self, older_than_seconds: float) -> None:
        """Remove uploads and results that are older, but for what is being worked on."""
        oldest = time.time() - older_than_seconds
        for path in [*self.folder.glob("*/*")]:
            with contextlib.suppress(FileNotFoundError):  # a request that has just been given up removes its own
                if path in self._in_use or path.stat().st_mtime > oldest:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def build(studio: Studio) -> Any:
    """The page, as Gradio Blocks."""
    import gradio as gr

    config, trained = studio.config, studio.sounder.trained
    window, step = trained.window_segments, float(SEGMENT_SECONDS)
    with gr.Blocks(title="soundshard", analytics_enabled=False) as blocks:
        gr.HTML(HEADER, padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                video = gr.Video(label="Video", sources=["upload"], elem_id="upload", height=240)
                with gr.Row():
                    go = gr.Button("Make sound", variant="primary", elem_id="go")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", visible=False)
                with gr.Group():
                    guidance = gr.Slider(
                        1,
                        max(15.0, config.sampling.guidance),
                        config.sampling.guidance,
                        step=0.1,
                        label="Guidance",
                        elem_id="guidance",
                        info="How closely the sound follows the pictures. 1 is the model as it is.",
                    )
                    temperature = gr.Slider(
                        0.05,
                        max(2.0, config.sampling.temperature),
                        config.sampling.temperature,
                        step=0.05,
                        label="Temperature",
                        elem_id="temperature",
                        info="Lower is safer, higher more varied.",
                    )
                    top_k = gr.Slider(
                        0,
                        trained.model.card,
                        min(config.sampling.top_k, trained.model.card),
                        step=1,
                        label="Top-k",
                        elem_id="top-k",
                        info="Draw among so many most likely codes; 0 for all.",
                    )
                    seed = gr.Number(config.seed, label="Seed", precision=0, elem_id="seed", info="The same seed gives the same sound again.")
                with gr.Accordion("Stretch and window", open=False, elem_id="more"):
                    start = gr.Number(0.0, label="Start (s)", minimum=0.0, step=0.1, elem_id="start", info="Where in the video the sound begins.")
                    duration = gr.Slider(
                        0.0,
                        int(config.max_seconds / SEGMENT_SECONDS) * step,
                        0.0,
                        step=step,
                        label="Duration (s)",
                        elem_id="duration",
                        info="In segments of 0.64 s; 0 goes to the end.",
                    )
                    window_segments = gr.Slider(
                        1,
                        max(2, window),
                        window,
                        step=1,
                        label="Window (segments)",
                        elem_id="window",
                        interactive=window > 1,
                        info="What the model sees at once. Fewer cost less and see less.",
                    )
                    stride = gr.Slider(
                        1,
                        max(2, window),
                        1,
                        step=1,
                        label="Stride (segments)",
                        elem_id="stride",
                        interactive=window > 1,
                        info="How far the window moves on over a longer video. More is faster.",
                    )
            with gr.Column(scale=7, min_width=320):
                status = gr.HTML(WELCOME, elem_id="status", padding=False)
                live = gr.HTML("", elem_id="live", padding=False)
                result = gr.HTML("", elem_id="result", padding=False)
                ticket = gr.State("")

        running: set[str] = set()
        given_up: set[str] = set()
        ended = {go: gr.update(interactive=True), stop: gr.update(visible=False)}
        stopped = {status: said("Stopped", "What had been made is gone."), live: "", **ended}

        def begin() -> dict:
            card = said("Waiting", "Another video is being worked on; this one's turn comes.") if running else said("Starting", "")
            stoppable = gr.update(visible=True, interactive=True, value="Stop")
            return {ticket: secrets.token_hex(8), status: card, live: "", result: "", go: gr.update(interactive=False), stop: stoppable}

        def make(mine, path, guidance, temperature, top_k, seed, start, duration, window_segments, stride) -> Iterator[dict]:
            if mine in given_up:  # while it waited, and the page has said so
                given_up.discard(mine)
                return
            if not path:
                yield {status: failed("There is no video yet", "Drop one on the left, or click there to choose one."), **ended}
                return
            try:
                options = SoundOptions(
                    sampling=replace(config.sampling, guidance=float(guidance), temperature=float(temperature), top_k=int(top_k)),
                    seed=int(seed or 0),
                    duration_seconds=round(float(duration) / step) * step,
                    window_segments=int(window_segments),
                    stride_segments=int(stride),
                )
                options.check(trained)
            except ValueError as error:
                yield {status: failed("These settings do not go together", _sentence(str(error))), **ended}
                return
            running.add(mine)
            heard = False
            try:
                with contextlib.closing(studio.make(Wish(Path(path), options, float(start or 0)))) as events:
                    for event in events:
                        if isinstance(event, Result):
                            yield {status: done(event), result: result_html(event), **ended}
                        elif mine in given_up:
                            yield stopped
                            return
                        elif event.made_seconds and not heard:
                            heard = True
                            yield {status: working(event), live: live_html(event.token)}
                        else:
                            yield {status: working(event)}
            except MediaError as error:
                message = error.message.replace(str(path), Path(path).name)
                yield {status: failed(BLAMES.get(error.reason, BLAME), _sentence(message)), live: "", **ended}
            except Exception:  # a visitor's page must end in words; the log has all of it, and the next visitor is served
                traceback.print_exc()
                yield {status: failed("Something went wrong here", "It is not the video's fault; the server's log tells more."), live: "", **ended}
            finally:
                running.discard(mine)
                given_up.discard(mine)

        def refused() -> dict:
            many, old = f"{config.max_waiting} videos wait already", f"the upload is older than {config.keep_minutes:g} minutes and gone"
            why = f"Either {many}, which is as many as may, or {old}. Try again in a while."
            return {status: failed("This could not be begun", why), **ended}

        def give_up(mine: str) -> dict:
            given_up.add(mine)
            # One that runs says itself that it has stopped, after the sound that it is at: two answers could overtake each other.
            return {stop: gr.update(interactive=False, value="Stopping")} if mine in running else stopped

        wishes = [ticket, video, guidance, temperature, top_k, seed, start, duration, window_segments, stride]
        everything, hidden, private = [ticket, status, live, result, go, stop], "hidden", "private"
        clicked = go.click(begin, None, everything, queue=False, js=SHOW_STATUS, show_progress=hidden, api_visibility=private)
        making = clicked.then(make, wishes, everything, concurrency_limit=1, show_progress=hidden, api_visibility=private)
        making.failure(refused, None, everything, queue=False, show_progress=hidden, api_visibility=private)
        stop.click(give_up, ticket, everything, queue=False, show_progress=hidden, api_visibility=private)
    blocks.queue(max_size=config.max_waiting, api_open=False)
    return blocks


BLAME = "This video does not work"
BLAMES = {
    "no_video": "This file has no pictures",
    "too_short": "This is too short",
    "undecodable": "This file cannot be read as a video",
    "unreadable": "This file cannot be read",
    "truncated": "This file is cut off",
    "empty": "This file is empty",
    "timeout": "This video takes too long to read",
    "out_of_memory": "This video needs too much memory",
    "crashed": "This video made the decoder crash",
}
"""What the page says for a MediaError's reason; its message follows."""


def said(title: str, text: str, *, kind: str = "calm") -> str:
    """A card with a title and a line."""
    return f'<div class="card {kind}" role="status"><h3>{escape(title)}</h3><p>{escape(text)}</p></div>'


def failed(title: str, text: str) -> str:
    """A card that says what was wrong."""
    return f'<div class="card wrong" role="alert"><h3>{escape(title)}</h3><p>{escape(text)}</p></div>'


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def working(progress: Progress) -> str:
    """A card with a bar: how far the sound is and how fast it is made."""
    made, total = progress.made_seconds, progress.total_seconds
    title = "Looking at the pictures" if not made else "Making sound" if made < total else "Putting the sound under the pictures"
    rate = f"{made / progress.elapsed_seconds:.2f} x real time" if made else "the first sound takes the longest"
    return (
        f'<div class="card" role="status"><h3>{title}</h3><progress max="{total:.2f}" value="{made:.2f}"></progress>'
        f'<p class="row"><span>{made:.2f} of {total:.2f} s</span><span>{rate}</span></p></div>'
    )


def done(result: Result) -> str:
    """A card that says what it took."""
    total, elapsed = result.total_seconds, result.elapsed_seconds
    notes = "".join(f"<p>{escape(_sentence(note))}</p>" for note in result.notes)
    figures = f"{total:.2f} s of sound in {elapsed:.1f} s: {total / elapsed:.2f} x real time, videos included"
    return f'<div class="card good" role="status"><h3>Done</h3><p>{figures}</p>{notes}</div>'


def live_html(token: str) -> str:
    """A player of the sound as it is made; afterwards it plays the whole."""
    return (
        f'<div class="card"><h3>The new sound</h3><p>Can be heard while it is made; it waits where playing is faster.</p>'
        f'<audio controls autoplay src="{ADDRESS}/{token}/new.wav"></audio></div>'
    )


def result_html(result: Result) -> str:
    """Both videos with their spectrograms, and what there is to keep."""
    name, base = escape(result.name, quote=True), f"{ADDRESS}/{result.token}"
    sides = "".join(
        f'<figure class="side {kind}"><figcaption>{title}</figcaption><video controls playsinline preload="auto" src="{base}/{kind}.mp4"></video>'
        f"{page.spectrogram_svg(sound, (), title=f'Spectrogram of the {title.lower()}')}</figure>"
        for kind, title, sound in (("new", "New sound", result.new_sound), ("own", "Original sound", result.own_sound))
    )
    suffix = Path(result.copied).suffix
    links = (
        f'<a class="keep" href="{base}/{result.copied}" download="{name}{suffix}">Video, pictures untouched ({suffix[1:]})</a>'
        f'<a class="keep" href="{base}/new.wav" download="{name}.wav">Sound (wav)</a>'
    )
    return f'<div class="sides">{sides}</div><p class="keeps">{links}</p>'


def _route(studio: Studio) -> Any:
    """Where the browser finds the files of a request, and its sound while it is made."""
    import asyncio

    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def as_it_is_made(live: Live) -> AsyncIterator[bytes]:
        for piece in studio.wav(live):
            if piece is None:
                await asyncio.sleep(POLL_SECONDS)
            else:
                yield piece

    async def answer(request: Request) -> Response:
        token, name = request.path_params["token"], request.path_params["name"]
        live = studio.live.get(token)
        if live is not None and name == "new.wav" and not live.ended:
            return StreamingResponse(as_it_is_made(live), media_type=MADE[name])
        # Names of folders are drawn by chance and long; only names that are known lead to a file.
        path = next((path for path in studio.made.glob(f"*/{name}") if path.parent.name == token), None) if name in MADE else None
        if path is None:
            return PlainTextResponse("removed, or never there", status_code=404)
        return FileResponse(path, media_type=MADE[name])

    return Route(f"/{ADDRESS}/{{token}}/{{name}}", answer)


def _theme(gradio: Any) -> Any:
    """Gradio's plain theme in the colours and with the system's letters of this project's pages: nothing is fetched for them."""
    letters = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
    fixed = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    return gradio.themes.Base(primary_hue="orange", neutral_hue="stone", radius_size="lg", font=letters, font_mono=fixed)


ADDRESS = "made"
HEADER = """<header class="top"><h1>soundshard</h1><p>New sound for a video, made from its pictures.</p></header>"""
WELCOME = said("Ready", "Drop a video, then press the button. It can be heard while it is made.")

CSS = """
.gradio-container{max-width:1240px!important;width:100%;margin:0 auto!important}
.html-container{padding:0!important}
.top h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:8px 0 2px}
.top p{color:var(--body-text-color-subdued);margin:0}
.card{background:var(--block-background-fill);border:1px solid var(--border-color-primary);border-radius:10px;padding:14px 18px;box-shadow:none}
.card h3{font-size:1rem;font-weight:600;margin:0 0 4px}
.card p{margin:4px 0 0;color:var(--body-text-color-subdued);font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.card .row{display:flex;justify-content:space-between;gap:12px;flex-wrap:wrap}
.card.good h3::before,.card.wrong h3::before{content:"";display:inline-block;
width:10px;height:10px;border-radius:50%;margin-right:9px;background:#2f9e6e}
.card.wrong h3::before{background:#d0443e}
.card.wrong{border-color:#d0443e}
.card progress{width:100%;height:10px;accent-color:var(--primary-500,#f97316);margin:8px 0 2px;display:block}
.card audio{width:100%;margin-top:10px;display:block}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px}
.side{margin:0;min-width:0;background:var(--block-background-fill);border:1px solid var(--border-color-primary);border-radius:10px;padding:12px}
.side figcaption{font-weight:600;margin-bottom:8px}
.side video{display:block;width:100%;max-height:420px;border-radius:6px;background:#000}
.spectrogram{display:block;width:100%;margin-top:10px;overflow:hidden;cursor:pointer}
.spectrogram text{fill:var(--body-text-color-subdued);font-size:30px}
.spectrogram .head{stroke:#fff;stroke-width:3;opacity:.9}
.keeps{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0 0}
.keep{border:1px solid var(--border-color-primary);border-radius:8px;padding:8px 14px;text-decoration:none;color:var(--body-text-color)}
.keep:hover{background:var(--background-fill-secondary)}
""".strip()

# On a narrow window what comes out is below the controls.
SHOW_STATUS = """() => { document.querySelector("#status").scrollIntoView({behavior: "smooth", block: "nearest"}); return []; }"""

# The white line in a spectrogram follows its video, a click on the spectrogram goes there, and one thing plays at a time. The elements come and go.
SCRIPT = """
{
  const chartOf = (video) => video.closest("figure")?.querySelector(".spectrogram");
  const follow = (video) => {
    const chart = chartOf(video);
    if (!chart || !video.isConnected) return;
    const at = video.currentTime / Number(chart.dataset.seconds) * chart.viewBox.baseVal.width;
    chart.querySelector(".head").setAttribute("transform", `translate(${9 + at} 0)`);
    if (!video.paused) requestAnimationFrame(() => follow(video));
  };
  document.addEventListener("play", ({target}) => {
    for (const other of document.querySelectorAll("video, audio")) if (other !== target) other.pause();
    follow(target);
  }, true);
  document.addEventListener("seeked", ({target}) => follow(target), true);
  document.addEventListener("click", ({target, clientX}) => {
    const chart = target.closest?.(".spectrogram");
    if (!chart) return;
    const box = chart.getBoundingClientRect();
    chart.closest("figure").querySelector("video").currentTime = (clientX - box.left) / box.width * Number(chart.dataset.seconds);
  });
}
""".strip()


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.app`."""
    return job_main(AppConfig, run, argv, command="app", positional="run")


if __name__ == "__main__":
    sys.exit(main())
