import base64
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.page import Curve, Figure, PageData, Pair, Sound, Stage, page_html, png, spectrogram_picture, write_page

VOID = {"meta", "br", "link", "img", "input"}
OPTIONAL_END = {"th", "td", "tr", "li", "p"}


class Checker(HTMLParser):
    """Nesting, addresses and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.count: dict[str, int] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "poster", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag and self.open[-1] in OPTIONAL_END:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_data() -> PageData:
    rng = np.random.default_rng(0)
    wave = rng.uniform(-0.5, 0.5, 7919).astype(np.float32)
    sound = Sound(wave, 8000, (0.1, 0.5))
    pair = Pair("abc-_012345_0_1000", '<b>ball</b> & floor, "indoors"', b"\x00mp4 one", b"\x01mp4 two", sound, sound, (0.1, 0.3, 0.7), "F1 0.50")
    curves = (
        Curve("training loss", (1, 3, 5), (6.9, 5.5, 5.0), "train"),
        Curve("validation loss", (5,), (5.2,), "validation"),
        Curve("codebook 0", (1, 3, 5), (6.0, 4.5, 4.1), "train", thin=True),
    )
    stages = (Stage("synth", "3 clips", "1 s", "3 clips/s", "1 MB", "soundshard synth out=a clips=3"),)
    return PageData("A <title>", "What & why.", (Figure("0.81", "F1"),), (pair, pair), "contact", curves, stages, ("a note",))


def test_page_is_well_formed_and_stands_alone(tmp_path: Path) -> None:
    html = write_page(page_data(), tmp_path / "page.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", html)
    assert len(checker.addresses) == 2 * 4 and all(a.startswith("data:") for a in checker.addresses)
    kinds = [a.split(";")[0] for a in checker.addresses]
    assert kinds.count("data:video/mp4") == 4 and kinds.count("data:image/png") == 4
    payloads = [base64.b64decode(a.partition("base64,")[2], validate=True) for a in checker.addresses]
    assert payloads[0] == b"\x00mp4 one" and payloads[2] == b"\x01mp4 two"
    assert decode_png(payloads[1]).shape == (112, 420, 3)
    assert "<b>ball</b>" not in html and '<b>ball</b> & floor, "indoors"' in checker.text
    assert checker.count["polyline"] == 3 and checker.count["tr"] == 2
    assert "soundshard synth out=a clips=3" in checker.text and "A <title>" in checker.text
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_empty_sections_are_left_out() -> None:
    html = page_html(PageData("t", "s", (), (), "contact", (), (), ()))
    assert "<section>" not in html


def test_marks_lie_at_their_times() -> None:
    html = page_html(page_data())
    seconds = 7919 / 8000
    assert f"M{0.3 / seconds * 1000:.1f} 0V260" in html and f"M{0.5 / seconds * 1000 - 8:.1f} 260l8 -20l8 20z" in html


def decode_png(content: bytes) -> np.ndarray:
    """An oracle of its own for 8-bit RGB without filters."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(content):
        size = int.from_bytes(content[place : place + 4])
        kind, body = content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(content[place + 8 + size : place + 12 + size])
        chunks[kind] = body
        place += 12 + size
    width, height = int.from_bytes(chunks[b"IHDR"][:4]), int.from_bytes(chunks[b"IHDR"][4:8])
    assert chunks[b"IHDR"][8:] == bytes([8, 2, 0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_png_keeps_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_png(png(pixels)), pixels)


@pytest.mark.parametrize("sample_rate_hz", [16000, 24000, 48000])
def test_a_tone_is_bright_at_its_pitch_and_only_while_it_sounds(sample_rate_hz: int) -> None:
    t = np.arange(2 * sample_rate_hz) / sample_rate_hz
    wave = (0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 1)).astype(np.float32)
    brightness = spectrogram_picture(wave, sample_rate_hz).astype(int).sum(axis=2)
    band = 111 - int(np.argmax(brightness[:, 300]))
    edges = np.geomspace(60, sample_rate_hz / 2, 113)
    assert edges[band - 1] < 1000 < edges[band + 2]
    assert brightness[:, :195].max() == brightness.min() < 60 < 500 < brightness[:, 300].max()
