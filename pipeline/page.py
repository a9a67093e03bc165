"""One HTML page that shows what a run made: videos before and after, spectrograms with the contacts drawn in, losses, what ran.

The page needs nothing but itself: videos and pictures are inside it as data URIs, curves are inline SVG. Knows no jobs and no
datasets; what it shows is handed to it as `PageData`.
"""

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

DYNAMIC_RANGE_DB = 72
BANDS = 112
LOWEST_HZ = 60


@dataclass(frozen=True)
class Sound:
    """A mono waveform and the onsets found in it."""

    wave: Float[Array, "samples"]
    sample_rate_hz: int
    onsets_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """A held-out clip with its own sound and with the generated one (mp4 bytes)."""

    key: str
    label: str
    original_mp4: bytes
    generated_mp4: bytes
    original: Sound
    generated: Sound
    marks_seconds: tuple[float, ...]
    remark: str = ""
    """A short figure beside the key, such as its F1."""


@dataclass(frozen=True)
class Curve:
    """A loss over optimiser steps; a thin one is drawn as background (a codebook's)."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    role: str
    """`train` or `validation`: the colour."""
    thin: bool = False

    def __post_init__(self) -> None:
        assert len(self.steps) == len(self.values) and self.role in ("train", "validation")


@dataclass(frozen=True)
class Stage:
    """One line of the table of what ran."""

    name: str
    what: str
    took: str
    throughput: str
    size: str
    command: str


@dataclass(frozen=True)
class Figure:
    """A result in large type with a line of explanation."""

    value: str
    name: str


@dataclass(frozen=True)
class PageData:
    """All that the page shows, in its order."""

    title: str
    summary: str
    figures: tuple[Figure, ...]
    pairs: tuple[Pair, ...]
    marks_name: str
    """What the vertical marks are, such as `contact`."""
    curves: tuple[Curve, ...]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]


def write_page(data: PageData, path: str | Path) -> Path:
    """Write the page, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(page_html(data), encoding="utf-8")
    part.replace(path)
    return path


def page_html(data: PageData) -> str:
    """The page as one string."""
    pairs = "".join(_pair_html(pair, data.marks_name) for pair in data.pairs)
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.notes)
    sections = [
        f"<header><h1>{escape(data.title)}</h1><p class=lead>{escape(data.summary)}</p>{figures_html(data.figures)}</header>",
        f"<section><h2>Held-out clips</h2>{_legend(data.marks_name)}{pairs}</section>" if pairs else "",
        f"<section><h2>Training</h2>{curves_svg(data.curves)}</section>" if data.curves else "",
        f"<section><h2>What ran</h2>{_stages_html(data.stages)}</section>" if data.stages else "",
        f"<section><h2>Notes</h2><ul>{notes}</ul></section>" if notes else "",
    ]
    return document(data.title, sections, script=SCRIPT)


def document(title: str, sections: Sequence[str], *, style: str = "", script: str = "") -> str:
    """A whole page around sections that are html already; `style` comes after the common one."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>{''.join(sections)}</main>"
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def figures_html(figures: Sequence[Figure]) -> str:
    """Figures side by side."""
    return f"<div class=figures>{''.join(f'<div><strong>{escape(f.value)}</strong><span>{escape(f.name)}</span></div>' for f in figures)}</div>"


def _pair_html(pair: Pair, marks_name: str) -> str:
    remark = f"<span class=remark>{escape(pair.remark)}</span>" if pair.remark else ""
    sides = "".join(
        f'<figure><figcaption>{name}</figcaption><video controls playsinline preload="metadata" src="{data_uri("video/mp4", mp4)}"></video>'
        f"{spectrogram_svg(sound, pair.marks_seconds, title=f'{name}, {marks_name} times of {pair.key}')}</figure>"
        for name, mp4, sound in (("original sound", pair.original_mp4, pair.original), ("generated sound", pair.generated_mp4, pair.generated))
    )
    return f"<article><h3>{escape(pair.label)}{remark}</h3><p class=key>{escape(pair.key)}</p><div class=sides>{sides}</div></article>"


def _legend(marks_name: str) -> str:
    return (
        f'<p class=legend><span><svg viewBox="0 0 10 14"><path class="mark" d="M5 0V14"/></svg>{escape(marks_name)}</span>'
        '<span><svg viewBox="0 0 10 14"><path class="onset" d="M1 14L5 7L9 14Z"/></svg>onset found in the sound</span>'
        f"<span>spectrograms: {LOWEST_HZ} Hz to half the sample rate, {DYNAMIC_RANGE_DB} dB</span></p>"
    )


def _stages_html(stages: Sequence[Stage]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(s.name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in (s.what, s.took, s.throughput, s.size))}</tr>"
        for s in stages
    )
    commands = "\n".join(s.command for s in stages)
    return (
        "<div class=scroll><table><thead><tr><th>stage<th>what<th>took<th>throughput<th>size</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><details><summary>The commands</summary><pre>{escape(commands)}</pre></details>"
    )


def spectrogram_svg(sound: Sound, marks_seconds: Sequence[float], *, title: str) -> str:
    """A spectrogram with a vertical line at each mark and a triangle under each onset."""
    seconds = len(sound.wave) / sound.sample_rate_hz
    width, height = 1000, 260
    lines = "".join(f"M{t / seconds * width:.1f} 0V{height}" for t in marks_seconds if t <= seconds)
    triangles = "".join(f"M{t / seconds * width - 8:.1f} {height}l8 -20l8 20z" for t in sound.onsets_seconds)
    ticks = "".join(f'<text x="{t / seconds * width:.1f}" y="{height + 26}">{t} s</text>' for t in range(0, ceil(seconds)))
    picture = data_uri("image/png", png(spectrogram_picture(sound.wave, sound.sample_rate_hz)))
    return (
        f'<svg class="spectrogram" viewBox="0 0 {width} {height + 34}" role="img" data-seconds="{seconds:.4f}"><title>{escape(title)}</title>'
        f'<image width="{width}" height="{height}" preserveAspectRatio="none" href="{picture}"/>'
        f'<path class="mark" d="{lines}"/><path class="onset" d="{triangles}"/><path class="head" d="M-9 0V{height}"/>{ticks}</svg>'
    )


def spectrogram_picture(wave: Float[Array, "samples"], sample_rate_hz: int, *, columns: int = 420) -> UInt8[Array, "bands columns 3"]:
    """Levels in bands of equal width in pitch, the highest first, as colours."""
    window = 1 << round(log10(0.032 * sample_rate_hz) / log10(2))
    padded = np.pad(wave.astype(np.float32), window // 2)
    starts = np.linspace(0, max(0, len(wave) - 1), columns).astype(int)
    frames = padded[starts[:, None] + np.arange(window)] * np.hanning(window).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.geomspace(LOWEST_HZ, sample_rate_hz / 2, BANDS + 1) / sample_rate_hz * window
    # A band narrower than a bin takes its neighbours' levels in proportion; a wider one their mean: both are differences of the running sum.
    running = np.concatenate([np.zeros((columns, 1)), np.cumsum(power, axis=1)], axis=1)
    whole = np.minimum(edges.astype(int), power.shape[1] - 1)
    at_edges = running[:, whole] + power[:, whole] * (np.minimum(edges, power.shape[1]) - whole)
    bands = np.diff(at_edges, axis=1) / np.diff(edges)
    decibels = 10 * np.log10(np.maximum(bands, 1e-12))
    # Against a fixed level and not the loudest: a quiet sound should look quiet beside its original.
    loudest = 10 * np.log10((window / 8) ** 2)
    level = np.clip(1 + (decibels - loudest) / DYNAMIC_RANGE_DB, 0, 1)
    return colours(level.T[::-1])


def colours(level: Float[Array, "rows columns"]) -> UInt8[Array, "rows columns 3"]:
    """Dark blue by violet and orange to pale yellow, evenly brighter."""
    stops = np.array([[10, 12, 28], [46, 20, 90], [122, 32, 118], [196, 58, 96], [243, 120, 70], [252, 190, 110], [253, 246, 205]], float)
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(level, places, stops[:, k]) for k in range(3)], axis=-1).round().astype(np.uint8)


def png(pixels: UInt8[Array, "height width 3"]) -> bytes:
    """An RGB picture as PNG."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * 3)], axis=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def curves_svg(curves: Sequence[Curve]) -> str:
    """Losses over steps, the thin ones behind the others."""
    width, height, left, bottom, top, right = 1000, 380, 56, 40, 12, 12
    values = [v for c in curves for v in c.values]
    last = max((s for c in curves for s in c.steps), default=1)
    low, high = round_range(min(values), max(values))

    def x(step: float | int) -> float:
        return left + step / last * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - low) / (high - low) * (height - bottom - top)

    parts = []
    for tick in ticks(low, high):
        parts.append(
            f'<path class="grid" d="M{left} {y(tick):.1f}H{width - right}"/><text x="{left - 8}" y="{y(tick) + 5:.1f}" class="end">{tick:g}</text>'
        )
    for tick in ticks(0.0, float(last)):
        parts.append(f'<text x="{x(tick):.1f}" y="{height - bottom + 24}" class="middle">{tick:g}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 2}" class="end">optimiser steps</text>')
    for curve in sorted(curves, key=lambda c: not c.thin):
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve.steps, curve.values, strict=True))
        parts.append(
            f'<polyline class="curve {curve.role}{" thin" if curve.thin else ""}" points="{points}"><title>{escape(curve.name)}</title></polyline>'
        )
        if len(curve.steps) <= 30 and not curve.thin:
            parts += [
                f'<circle class="{curve.role}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5"/>' for s, v in zip(curve.steps, curve.values, strict=True)
            ]
    names = "".join(
        f'<span><svg viewBox="0 0 20 14"><path class="curve {c.role}{" thin" if c.thin else ""}" d="M0 7H20"/></svg>{escape(c.name)}</span>'
        for c in curves
        if not c.thin
    )
    thin = "<span>thin lines: the codebooks one by one</span>" if any(c.thin for c in curves) else ""
    return (
        f'<p class=legend>{names}{thin}</p><svg class="curves" viewBox="0 0 {width} {height}" role="img"><title>Losses</title>{"".join(parts)}</svg>'
    )


def round_range(low: float, high: float) -> tuple[float, float]:
    """The range widened to whole ticks."""
    step = _tick_step(low, high)
    return floor(low / step) * step, max(ceil(high / step), floor(low / step) + 1) * step


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in the range, about five."""
    step = _tick_step(low, high)
    return [round(k * step, 10) for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _tick_step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten, so that about five ticks fit."""
    rough = max(high - low, 1e-6) / 5
    power = 10.0 ** floor(log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


STYLE = """
:root{color-scheme:light dark;--ground:#fbfaf8;--card:#fff;--ink:#1d1c1a;--soft:#6b6862;--line:#e4e0d9;
--train:#b4552d;--valid:#2c6e8f;--mark:#5ff0d0;--onset:#ffd23f}
@media(prefers-color-scheme:dark){:root{--ground:#141416;--card:#1d1d21;--ink:#ece9e3;--soft:#a09b92;--line:#33323a;--train:#f0905f;--valid:#6fc0e6}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 20px 80px}
h1{font-size:clamp(1.7rem,4vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 12px;font-weight:650}
h2{font-size:1.15rem;margin:56px 0 12px;font-weight:650}
h3{font-size:1rem;margin:0;font-weight:600;display:flex;gap:12px;justify-content:space-between;align-items:baseline}
.lead{max-width:46em;color:var(--soft);margin:0 0 28px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:1px;
background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.figures div{box-shadow:0 0 0 1px var(--line);padding:16px 18px}
.figures strong{display:block;font-size:1.55rem;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.figures span,.key,.legend,figcaption,.remark{color:var(--soft);font-size:.86rem}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px;margin:18px 0}
.key{margin:0 0 12px;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.78rem}
.remark{font-weight:400;white-space:nowrap;font-variant-numeric:tabular-nums}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:18px}
figure{margin:0;min-width:0}
figcaption{margin-bottom:6px}
video{display:block;width:100%;border-radius:6px;background:#000}
svg{display:block;overflow:visible}
.spectrogram{width:100%;margin-top:8px;overflow:hidden}
.spectrogram text,.curves text{fill:var(--soft);font-size:20px}
.curves{width:100%;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px}
.curves text{font-size:14px}
.end{text-anchor:end}.middle{text-anchor:middle}
.mark{stroke:var(--mark);stroke-width:2.5;fill:none}
.onset{fill:var(--onset)}
.head{stroke:#fff;stroke-width:3;opacity:.9}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;margin:0 0 12px}
.legend span{display:inline-flex;align-items:center;gap:7px}
.legend svg{height:14px;background:#2e145a;border-radius:2px}
.legend svg:has(.curve){background:none}
.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:2.6;stroke-linejoin:round}
.curve.thin{stroke-width:1;opacity:.38}
.curve.train{stroke:var(--train)}.curve.validation{stroke:var(--valid)}
circle.train{fill:var(--train)}circle.validation{fill:var(--valid)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:10px 14px;border-top:1px solid var(--line);vertical-align:top;font-variant-numeric:tabular-nums}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:.82rem}
tbody th{font-weight:600}
td:nth-child(n+3){white-space:nowrap}
details{margin-top:14px;color:var(--soft)}
summary{cursor:pointer}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px;color:var(--ink);
font:.8rem/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
ul{padding-left:1.2em;max-width:60em}
li{margin:6px 0}
""".strip()

# The white line in a spectrogram follows its video; a click on the spectrogram goes there.
SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const video = figure.querySelector("video"), chart = figure.querySelector(".spectrogram"), head = chart.querySelector(".head");
  const seconds = Number(chart.dataset.seconds), width = chart.viewBox.baseVal.width;
  const follow = () => {
    head.setAttribute("transform", `translate(${9 + video.currentTime / seconds * width} 0)`);
    if (!video.paused) requestAnimationFrame(follow);
  };
  video.addEventListener("play", () => {
    for (const other of document.querySelectorAll("video")) if (other !== video) other.pause();
    follow();
  });
  video.addEventListener("seeked", follow);
  chart.addEventListener("click", (event) => {
    const box = chart.getBoundingClientRect();
    video.currentTime = (event.clientX - box.left) / box.width * seconds;
  });
}
""".strip()
