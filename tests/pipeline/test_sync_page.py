"""The pages about synchronisation: what the picture shows is what was found, and nothing is fetched from elsewhere."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from pipeline.sync_page import NOT_COUNTED, clips_html, clock, heat_picture, time_ticks, timeline_html, timeline_svg
from pipeline.timeline import Timeline


def timeline(windows: int, *, silent: range = range(0), can: bool = False, start: float = 0.0) -> Timeline:
    """Windows that are sure of class 3 for the first third, of class 13 afterwards."""
    probabilities = np.full((windows, 21), 0.1 / 20, np.float32)
    probabilities[np.arange(windows), np.where(np.arange(windows) < windows // 3, 3, 13)] = 0.9
    frames = 125 + round((windows - 1) * 16)
    return Timeline(
        duration_seconds=start + frames / 25,
        window_seconds=5.0,
        starts_seconds=start + np.arange(windows) * 0.64,
        probabilities=probabilities,
        faults=tuple("silent" if i in silent else "" for i in range(windows)),
        peaks=np.linspace(0, 1, frames, dtype=np.float32),
        synchronisable=np.linspace(0.2, 0.9, windows, dtype=np.float32) if can else None,
    )


def test_columns_are_the_windows_at_their_places_and_the_sound_ahead_is_above() -> None:
    shown = timeline(12, silent=range(8, 10))
    shown.starts_seconds[11] -= 0.32  # the last window may begin earlier than the others' rhythm has it
    picture = heat_picture(shown)
    assert picture.shape == (21, 784, 3)
    middles = shown.starts_seconds + 2.5
    columns = ((middles - middles[0] + 0.32) / (middles[-1] - middles[0] + 0.64) * 784).astype(int)
    brightest = picture[:, columns].sum(axis=2).argmax(axis=0)
    assert brightest[:4].tolist() == [17] * 4 and brightest[[4, 5, 6, 7, 10, 11]].tolist() == [7] * 6
    assert (picture[:, columns[8:10]] == NOT_COUNTED).all() and not (picture[:, columns[7]] == NOT_COUNTED).all()
    many = heat_picture(timeline(9001, silent=range(300, 303)))  # one column stands for eleven windows
    assert many.sum(axis=2).argmax(axis=0)[[0, 250, 270, -1]].tolist() == [17, 17, 7, 7]
    assert (heat_picture(timeline(1)) == heat_picture(timeline(1))[:, :1]).all()


@pytest.mark.parametrize("shown", [timeline(1, can=True), timeline(12, silent=range(2), can=True, start=3.0), timeline(3000)])
def test_the_picture_lies_within_its_frame(shown: Timeline) -> None:
    svg = timeline_svg(shown, shown.estimate())
    root = ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    assert "nan" not in svg and "inf" not in re.sub(r"base64,[^\"]+", "", svg)
    _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
    for element in root.iter():
        for name, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.get(name, "0")) <= most
    image = next(element for element in root.iter() if element.tag.endswith("image"))
    assert float(image.attrib["x"]) >= 62 and float(image.attrib["x"]) + float(image.attrib["width"]) <= 846.1
    dots = [element for element in root.iter() if element.tag.endswith("circle")]
    assert len(dots) == (len(shown.counted) if len(shown.counted) <= 240 else 0)


def test_a_page_says_what_was_found_and_needs_nothing_else(tmp_path: Path) -> None:
    shown = timeline(12, silent=range(2), can=True)
    page = timeline_html("a <b>.mp4", shown, shown.estimate())
    assert "a &lt;b&gt;.mp4" in page and "<b>.mp4" not in page
    for text in ("+0.6 s", "not counted: silent", "of 10 windows agree", "12.04 s of video"):
        assert text in page
    assert not re.search(r"https?://|<script|<link|url\((?!#)", page)
    (tmp_path / "page.html").write_text(page)


def test_many_clips_in_one_page() -> None:
    def row(key: str, best: int) -> dict:
        probabilities = [0.9 if index == best else 0.005 for index in range(21)]
        found = {"offset_seconds": (best - 10) * 0.2, "best_offset_seconds": (best - 10) * 0.2, "probability": 0.9, "agreement": 1.0}
        return {"status": "ok", "reason": None, "key": key, "probabilities": probabilities, **found}

    rows = [row("far<", 2), row("near", 11), row("ahead", 13), {"status": "failed", "reason": "silent", "key": "x"}]
    page = clips_html(rows, title="Sync of clips")
    assert "33%" in page and "of 3 clips" in page and "far&lt;" in page and "silent" in page and "-1.60 s" in page
    assert not re.search(r"https?://|<script", page)
    assert "Furthest" not in clips_html(rows[3:], title="None")


def test_times_as_people_read_them() -> None:
    assert [clock(seconds) for seconds in (0, 2.5, 12.04, 65, 3725.4)] == ["0 s", "2.5 s", "12.04 s", "1:05", "1:02:05"]
    assert time_ticks(0.0, 9.0) == list(range(10)) and time_ticks(3.1, 8.1) == [3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0]
    assert len(time_ticks(0.0, 7200.0)) <= 11
