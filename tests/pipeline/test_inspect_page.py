"""The page about a dataset: what it says and draws is what is in the dataset, it needs nothing else, and in a browser its clips play."""

import importlib.util
import os
import re
import shutil
import xml.etree.ElementTree as ET
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torchaudio

from pipeline import inspect, inspect_clips
from pipeline.inspect import InspectConfig, page_of
from pipeline.inspect_charts import Similarity, bins, codes_svg, histogram_svg, number_text, second_ticks, shards_svg, similarity_svg, waveform_svg
from pipeline.inspect_page import page_html
from pipeline.media import decode_audio
from pipeline.page import colours
from shards.dataset import create_or_check, new_info
from shards.inspect import size_text
from shards.read import Index
from shards.view import write_view
from shards.write import Entry, json_bytes, write_shard
from tests.pipeline.clips import make_clip
from tests.pipeline.test_page import Checker, decode_png

LABELS = ("dog, barking", "bell <b>", None)
KINDS = ("quiet.mp4", "loud.mp4")
CLIPS = 7
WIDTH = 11
MEDIA_SPEC = {"encode": {"audio_rate_hz": 44100, "audio_channels": 1}, "libraries": {"av": "18"}}
BROKEN = "train_5"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips of 2 s in two splits, one of which is no video; two more are missing, one was not decodable."""
    folder = tmp_path_factory.mktemp("data")
    for name, amplitude in zip(KINDS, (0.02, 0.2), strict=True):
        make_clip(folder / name, layout="mono", amplitude=amplitude)
    kinds = [(folder / name).read_bytes() for name in KINDS]
    root = folder / "media"
    create_or_check(root, new_info("media", MEDIA_SPEC, {"made": "for a test"}))
    train = []
    for number in range(CLIPS - 1):
        mp4 = b"no video" if f"train_{number}" == BROKEN else kinds[number % 2]
        members = {"mp4": mp4, "json": json_bytes({"key": f"train_{number}"})}
        train.append(Entry(f"train_{number}", "train", LABELS[number % 3], f"/clips/train_{number}.mp4", 2.0, members))
    train += [Entry(f"-gone_{n}", "train", "bell <b>", f"/clips/-gone_{n}.mp4", reason="missing", message="is not there") for n in range(2)]
    write_shard(root, "train-000000", train)
    bad = Entry("bad", "test", None, "/clips/bad.mp4", reason="undecodable", message="no <key> frame")
    write_shard(root, "test-000000", [Entry("test_0", "test", "bell <b>", "/clips/test_0.mp4", 2.0, {"mp4": kinds[1]}), bad])
    return root


@pytest.fixture(scope="module")
def features(media: Path) -> Path:
    """Features of the same clips: the sound of a segment has the features of its pictures. Beside the media dataset."""
    rng = np.random.default_rng(0)
    spec = {
        "hop_frames": 8,
        "codec": {"name": "small", "card": 19, "codebooks": 3, "hop_samples": 320, "sample_rate_hz": 24000},
        "audio": {"hop_samples": 1280, "tower": {"weights_sha256": "ab" * 32}},
        "tower": {"weights_sha256": "ab" * 32},
        "media_fingerprint": Index.open(media).info.fingerprint,
    }
    root = media.parent / "features"
    create_or_check(root, new_info("features", spec))
    for split in ("train", "test"):
        entries = []
        for row in Index.open(media, split).rows():
            seen = rng.normal(size=(1, 5, 8, WIDTH)).astype(np.float16)
            heard = np.repeat(seen.mean(axis=2, keepdims=True).repeat(6, axis=2), 4, axis=1)[:, :17]
            members = {"avclip.npy": seen, "avclip_audio.npy": heard, "small.npy": rng.integers(0, 19, (3, 149), dtype=np.uint16)}
            if row["status"] == "ok":
                entries.append(Entry(row["key"], split, row["label"], row["source"], 2.0, members))
        write_shard(root, f"{split}-000000", entries)
    return root


def page(root: Path, **options: Any) -> tuple[inspect.DatasetPage, str]:
    data = page_of(InspectConfig(dataset=str(root), html="page.html", **options), Index.open(root))
    return data, page_html(data)


def checked(html: str) -> Checker:
    """The page, well formed and without an address outside."""
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", html)
    assert all(address.startswith("data:") for address in checker.addresses)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]+", "", html))
    return checker


# --- the page -------------------------------------------------------------------------------------------------------------------------


def test_a_media_dataset(media: Path) -> None:
    data, html = page(media, clips=20, loudness_clips=5)
    text = checked(html).text
    assert len(data.clips) == CLIPS and [clip.key for clip in data.clips if clip.mp4 is None] == [BROKEN]
    assert "no <key> frame" in text and "<key>" not in html and "bell <b>" in text and "dog, barking" in text
    assert "2 of 3" in text and "/clips/-gone_1.mp4" in text  # failures with examples
    assert "made" in text and "for a test" in text and data.fingerprint in text
    for part in ("Splits", "Classes", "Failures", "Distributions", "Clips", "Shards", "Where it comes from"):
        assert f"<h2>{part}</h2>" in html
    assert [(split.name, split.ok, split.failed) for split in data.splits] == [("test", 1, 1), ("train", 6, 2), ("all", 7, 3)]
    assert data.splits[-1].bytes == sum(path.stat().st_size for path in media.glob("*.tar")) and data.splits[-1].seconds == 14.0
    shown = next(clip for clip in data.clips if clip.key == "train_1")
    assert shown.mp4 == Index.open(media).bytes(Index.open(media).row("train_1"), "mp4") and shown.sound is not None
    assert len(shown.sound.wave) == 2 * 44100 and shown.codes is None and shown.similarity is None
    (broken,) = (clip for clip in data.clips if clip.mp4 is None)
    assert "Not played" in broken.notes[0] and broken.sound is None


def test_loudness_is_measured_where_no_score_says_it(media: Path) -> None:
    data, html = page(media, clips=0, loudness_clips=100)
    loudness = data.spreads[1]
    assert loudness.name == "loudness" and "1 not readable" in loudness.note and "<h2>Clips</h2>" not in html
    assert len(loudness.values) == CLIPS - 1
    quiet, loud = (float(torchaudio.functional.loudness(torch.from_numpy(decode_audio(media.parent / name)), 44100)) for name in KINDS)
    assert sorted(loudness.values) == pytest.approx([quiet] * 3 + [loud] * 3, abs=0.05) and loud > quiet + 15


def test_features_with_the_media_beside_them(features: Path) -> None:
    data, html = page(features, clips=20)
    text = checked(html).text
    assert "Clips are played from the media dataset beside this one" in text and "not from one file" not in text
    index = Index.open(features)
    for clip in data.clips:
        assert clip.codes is not None and clip.similarity is not None and (clip.mp4 is None) == (clip.key == BROKEN)
        assert np.array_equal(clip.codes.codes, index.member(index.row(clip.key), "small.npy")) and clip.codes.card == 19
        assert clip.codes.seconds == pytest.approx(149 / 75)
        assert clip.similarity.at_offset() == pytest.approx(1, abs=2e-3)
        assert clip.similarity.cosines.argmax(axis=1).tolist() == [0, 4, 8, 12, 16] and clip.similarity.cosines.mean() < 0.6
    assert html.count("class=matrix") == CLIPS and "cosine 1.00 at the same time" in text


def test_the_media_dataset_must_be_the_one_that_the_features_were_made_of(features: Path, media: Path, tmp_path: Path) -> None:
    other = tmp_path / "media"
    create_or_check(other, new_info("media", {"other": 1}))
    with pytest.raises(ValueError, match="these features were made of"):
        page(features, media=str(other))
    moved = tmp_path / "features"
    shutil.copytree(features, moved)
    data, html = page(moved)  # another media dataset is beside it
    assert not any(clip.mp4 for clip in data.clips) and "media=DATASET plays" in html and [spread.name for spread in data.spreads] == ["duration"]
    data, _ = page(moved, media=str(media))
    assert sum(clip.mp4 is not None for clip in data.clips) == CLIPS - 1
    shutil.copytree(media, tmp_path / "by_another_name")
    assert sum(clip.mp4 is not None for clip in page(moved)[0].clips) == CLIPS - 1


def test_towers_of_different_weights_are_told(features: Path) -> None:
    index = Index.open(features)
    spec = index.info.spec | {"tower": {"weights_sha256": "cd" * 32}}
    index.info = new_info("features", spec)
    assert "(cdcdcdcd, abababab)" in inspect_clips.similarity_note(index)


def test_large_clips_are_made_smaller_or_left_out(media: Path) -> None:
    stored = max(len(clip.mp4) for clip in page(media)[0].clips if clip.mp4)
    share = stored * 0.7
    data, html = page(media, clips=3, html_mb=share * 3 * 4 / 3 / 1e6)
    smaller = [clip for clip in data.clips if clip.mp4 and clip.notes]
    assert smaller and all(len(clip.mp4 or b"") <= share and "encoded anew" in clip.notes[0] for clip in smaller) and "encoded anew" in html
    data, html = page(media, clips=3, html_mb=0.001)
    assert not any(clip.mp4 for clip in data.clips) and "html_mb allows" in html and any(clip.sound for clip in data.clips)


def test_scores(features: Path, tmp_path: Path) -> None:
    root = tmp_path / "features"
    shutil.copytree(features, root)
    keys = Index.open(root).keys.to_pylist()
    columns = {"imagebind": [0.1 * n for n in range(6)] + [None], "speech": [True, False] * 3 + [None], "loudness": [-20.0] * 7}
    errors = [None] * 5 + ["ValueError: <odd>"] * 2
    pq.write_table(pa.table({"key": keys[::-1], **columns, "speech.error": errors}), root / "scores.parquet")
    (tmp_path / "more.json").write_text('{"clips/train_1.mp4": 0.25, "elsewhere.mp4": 0.5}')
    data, html = page(root, scores=str(tmp_path / "more.json"), media=str(features.parent / "media"))
    spreads = {spread.name: spread for spread in data.spreads}
    assert list(spreads) == ["duration", "score", "imagebind", "speech", "loudness"]  # measured nothing
    assert spreads["score"].values.tolist() == [0.25] and spreads["speech"].is_flag and len(spreads["imagebind"].values) == 6
    by_key = dict(zip(keys[::-1], columns["imagebind"], strict=True))
    assert all(value == by_key[key] for key, value in spreads["imagebind"].extremes)
    assert spreads["imagebind"].extremes[0] == (keys[-1], 0.0) and spreads["imagebind"].extremes[-1][1] == 0.5
    shown = next(clip for clip in data.clips if clip.key == "train_1")
    assert dict(shown.scores)["score"] == "0.25" and dict(shown.scores)["loudness"] == "-20"
    text = checked(html).text
    assert "true for 3 of 6 clips (50 %)" in text and "speech failed on 2 clips, for example: ValueError: <odd>" in text
    assert "6 of 7 clips have one" in text
    (tmp_path / "none.json").write_text('{"elsewhere.mp4": 0.5}')
    with pytest.raises(ValueError, match="none of its keys"):
        page(root, scores=str(tmp_path / "none.json"))


def test_a_view(features: Path, tmp_path: Path) -> None:
    index = Index.open(features)
    kept = index.table.filter(pc.field("split") == "train").slice(0, 4).append_column("start_seconds", pa.array([0.5, 1.0, None, 0.25]))
    lost = {field.name: None for field in kept.schema} | {"key": "lost", "split": "train", "status": "failed", "reason": "missing"}
    write_view(tmp_path / "view", index, pa.concat_tables([kept, pa.Table.from_pylist([lost], schema=kept.schema)]), selection=["a < b"])
    data, html = page(tmp_path / "view")
    text = checked(html).text
    assert data.parent == str(features) and "How its clips were chosen" in text and "a < b" in text
    members = sum(int(index.members[name].size[index.row(key)]) for name in index.members for key in kept["key"].to_pylist())
    assert data.splits[0].bytes == members == data.shards[0].bytes < (data.shards[0].tar_bytes or 0) and len(data.shards) == 1
    assert sum(clip.mp4 is not None for clip in data.clips) == 4 and [failure.reason for failure in data.failures] == ["missing"]
    assert [spread.values.tolist() for spread in data.spreads if spread.name == "start in the video"] == [[0.5, 1.0, 0.25]]
    assert '<rect class="pale"' in html and "darker part" in text


def test_datasets_without_good_clips(tmp_path: Path) -> None:
    root = tmp_path / "media"
    create_or_check(root, new_info("media", MEDIA_SPEC))
    data, html = page(root)
    assert data.clips == () and "No shard of it is finished" in checked(html).text
    write_shard(root, "train-000000", [Entry("a", "train", None, "a.mp4", reason="missing", message="gone")])
    (root / "train-000001.tar").write_bytes(b"")
    data, html = page(root)
    text = checked(html).text
    assert data.clips == () and "1 of 1" in text and "failed (100 %)" in text and "train-000001" in text


def test_clips_whose_shard_is_gone_are_told(media: Path, tmp_path: Path) -> None:
    root = tmp_path / "media"
    shutil.copytree(media, root)
    (root / "train-000000.tar").unlink()
    data, html = page(root, loudness_clips=3)
    assert [clip.key for clip in data.clips if clip.mp4] == ["test_0"] and "The tars of 1 shards are not there" in checked(html).text


def test_the_job(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert inspect.main([str(media), f"html={out}", "clips=2", "seed=3", "loudness_clips=0"]) == 0
    assert "7 good clips; 2 are shown" in capsys.readouterr().out
    assert f"soundshard inspect {media} html={out} clips=2 seed=3 loudness_clips=0" in checked(out.read_text()).text
    assert inspect.main([str(media), "split=test"]) == 0
    assert "media dataset" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["page.html"]
    for arguments, message in ((["html=a", "key=train_0"], "without html="), (["html=a", "html_mb=0.0"], "html_mb"), (["split=none"], "no split")):
        assert inspect.main([str(media), *arguments]) == 2
        assert message in capsys.readouterr().err


# --- which clips ----------------------------------------------------------------------------------------------------------------------


def test_clips_are_drawn_over_the_classes(tmp_path: Path) -> None:
    root = tmp_path / "media"
    create_or_check(root, new_info("media", {}))
    labels = ["common"] * 40 + ["rare"] + ["some"] * 5 + [None] * 3
    write_shard(root, "train-000000", [Entry(f"k{n:02d}", "train", label, "a.mp4", 1.0, {"json": b"{}"}) for n, label in enumerate(labels)])
    index = Index.open(root)

    def drawn(count: int, seed: int) -> list[str | None]:
        return [labels[int(index.keys[row].as_py()[1:])] for row in inspect_clips.chosen(index, count, seed)]

    for seed in range(5):
        assert set(drawn(4, seed)) == set(labels)
        assert Counter(drawn(7, seed)) == {"common": 2, "some": 2, None: 2, "rare": 1}
    assert inspect_clips.chosen(index, 9, 1) == inspect_clips.chosen(index, 9, 1) != inspect_clips.chosen(index, 9, 2)
    everyone = inspect_clips.chosen(index, 99, 0)
    assert sorted(everyone) == list(range(len(labels))) and inspect_clips.chosen(index, 0, 0) == []


# --- charts ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        np.array([]),
        np.array([10.0]),
        np.full(997, 10.0),
        np.array([0.0, 0.0]),
        np.arange(7.0),
        np.array([-70.3, -12.1, -11.9]),
        np.array([1e-9, 2e-9, 5e-9]),
        np.array([0.1, 0.2, 0.3, 0.30000000000000004]),
        np.random.default_rng(0).normal(-20, 5, 10_007),
        np.array([-1e12, 3.0, 1e12]),
    ],
)
def test_every_value_is_in_a_column(values: np.ndarray) -> None:
    found = bins(values)
    assert int(found.counts.sum()) == len(values) and len(found.edges) == len(found.counts) + 1 <= 60
    for start, stop, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        slack = 1e-9 * max(abs(start), abs(stop))
        assert count <= ((values >= start - slack) & (values <= stop + slack)).sum()
    framed(histogram_svg(values, title="a <b>", unit=" s"))


def framed(svg: str) -> ET.Element:
    """A drawing, well formed and inside its frame."""
    root = ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    assert not re.search(r"nan|inf\b", re.sub(r"base64,[^\"]+", "", svg))
    _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
    for element in root.iter():
        x, y, w, h = (float(element.get(name, "0")) for name in ("x", "y", "width", "height"))
        if not element.tag.endswith("svg"):
            assert x >= -0.1 and x + w <= width + 0.1 and y >= -0.1 and y + h <= height + 0.1
    return root


def image(svg: str) -> np.ndarray:
    found = re.search(r"data:image/png;base64,([^\"]+)", svg)
    assert found is not None
    return decode_png(b64decode(found[1]))


def test_codes_are_drawn_one_to_one() -> None:
    codes = np.random.default_rng(0).integers(0, 19, (3, 31), dtype=np.uint16)
    svg = codes_svg(codes, 2.0, 4.0, 19, title="codes")
    assert np.array_equal(image(svg), colours(codes / 18.0))
    assert framed(svg).attrib["data-seconds"] == "4.0000" and 'width="500.0"' in svg  # half of the clip has codes


def test_a_waveform_shows_where_and_how_loud() -> None:
    wave = np.zeros(7919, np.float32)
    wave[2000:2100] = 0.25
    svg = waveform_svg(wave, 1000, title="wave")
    framed(svg)
    points = [tuple(map(float, point.split())) for point in re.findall(r"L(-?[\d.]+ -?[\d.]+)", svg)]
    raised = [x for x, y in points if y < 69]
    assert min(raised) >= 2000 / 7919 * 1000 - 3 and max(raised) <= 2100 / 7919 * 1000 + 3 and "peak -12.0 dB" in svg
    assert min(y for _, y in points) == 2 and "silence" in waveform_svg(np.zeros(5, np.float32), 1000, title="none")


def test_the_matrix_lies_at_its_times() -> None:
    cosines = np.random.default_rng(0).normal(size=(3, 29)).astype(np.float32)
    svg = similarity_svg(Similarity(cosines, 0.32, 0.04, 0.64), 2.0, title="matrix")
    assert image(svg).shape == (3, 29, 3)
    element = next(part for part in framed(svg).iter() if part.tag.endswith("image"))
    x, y, width, height = (float(element.attrib[name]) for name in ("x", "y", "width", "height"))
    assert [x - 58, width] == pytest.approx([0.3 / 2 * 942, 29 * 0.04 / 2 * 942], abs=0.1)  # each column is around its segment's middle
    assert [y, height] == pytest.approx([0.16 / 2 * 560, 3 * 0.32 / 2 * 560], abs=0.1)


def test_many_shards_share_columns_and_none_is_lost() -> None:
    sizes = [(f"train-{n:06d}", 100, 400) for n in range(1009)]
    root = framed(shards_svg(sizes, size_text))
    columns = [part for part in root.iter() if part.tag.endswith("}g")]
    assert 150 <= len(columns) <= 250 and "train-001008" in "".join(columns[-1].itertext())
    framed(shards_svg(sizes[:1], size_text))
    framed(shards_svg([("a", 0, 0)], size_text))


def test_numbers_as_people_read_them() -> None:
    assert [number_text(value, 8.83) for value in (-24.3561, -0.0004, 3.0)] == ["-24.36", "0", "3"]
    assert number_text(10.0, 0.0) == "10" and number_text(123456.7, 1e6) == "123457" and number_text(2.5e-9, 5e-9) == "2.5e-09"
    assert second_ticks(10.0) == list(range(10)) and second_ticks(1.28)[-1] == pytest.approx(1.2) and len(second_ticks(7000.0)) <= 13


# --- in a browser ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None or not importlib.util.find_spec("playwright"):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no chromium or playwright for the test in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"])
        yield browser
        browser.close()


def test_in_a_browser(browser: Any, features: Path, tmp_path: Path) -> None:
    data, _ = page(features, clips=2, loudness_clips=0)
    (first, *_) = (clip for clip in data.clips if clip.mp4)
    many = tuple(replace(data.classes[0], label=f"class {n}, {'bark' if n % 5 == 0 else 'ring'}") for n in range(43))
    path = tmp_path / "page.html"
    path.write_text(page_html(replace(data, classes=many, clips=(first, first))))
    visitor = browser.new_page(viewport={"width": 1280, "height": 900})
    visitor.set_default_timeout(60_000)
    asked, broke = [], []
    visitor.on("request", lambda request: asked.append(request.url))
    visitor.on("pageerror", lambda error: broke.append(str(error)))
    visitor.goto(path.as_uri())

    visitor.click(".finder summary")
    visitor.fill(".finder input", "BARK")
    assert visitor.locator(".finder li:visible").count() == 9 and visitor.inner_text(".finder output") == "9 of 43"
    visitor.fill(".finder input", "")
    assert visitor.locator(".finder li:visible").count() == 43

    one, two = visitor.locator(".clip").nth(0), visitor.locator(".clip").nth(1)
    assert one.locator(".strip").count() == 4  # waveform, spectrogram, codes, matrix
    visitor.wait_for_function("document.querySelector('video').readyState >= 1")
    assert visitor.evaluate("document.querySelector('video').videoWidth") == 96
    assert one.locator(".head:visible").count() == 0
    box = one.locator(".waveform").bounding_box()
    one.locator(".waveform").click(position={"x": box["width"] / 2, "y": 9})
    visitor.wait_for_function("Math.abs(document.querySelector('video').currentTime - 1) < 0.05 && document.querySelector('.clip.playing')")
    moved = one.locator(".head").evaluate_all("heads => heads.map(head => head.getAttribute('transform'))")
    places = [tuple(float(part) for part in re.findall(r"-?[\d.]+", move)) for move in moved]
    expected = [(0, 280), (471, 0), (500, 0), (500, 0), (509, 0)]  # the matrix has two, the spectrogram's is drawn 9 to the left
    assert np.array(sorted(places)) == pytest.approx(np.array(expected, float), abs=12)
    one.locator("video").evaluate("video => video.play()")
    visitor.wait_for_function("document.querySelector('video').currentTime > 1.1")
    two.locator("video").evaluate("video => video.play()")
    visitor.wait_for_function("document.querySelector('video').paused")  # one at a time

    for width in (1280, 400):
        visitor.set_viewport_size({"width": width, "height": 800})
        assert visitor.evaluate("document.documentElement.scrollWidth") == width
    assert broke == [] and all(url.startswith(("data:", "file:")) for url in asked) and sum(url.startswith("file:") for url in asked) == 1
    visitor.close()
