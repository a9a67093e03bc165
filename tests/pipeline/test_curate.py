"""What thresholds keep, against counting clip by clip; the page shows it; the commands take it."""

import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.curate import CurateConfig, main, run
from pipeline.curate_page import curation_html, kept_svg, mean_svg
from pipeline.thresholds import Sorted, correlations, span, usual
from shards.dataset import create_or_check, new_info
from shards.read import Index
from shards.write import Entry, write_manifest, write_shard

SPLITS = {"train": 13, "validation": 5, "test": 7}
FAILED = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 good clips of three splits and some failed ones, with scores of all but two."""
    root = tmp_path_factory.mktemp("curate") / "media"
    create_or_check(root, new_info("media", {"made": "by program"}))
    number, rows = 0, []
    draw = np.random.default_rng(5)
    for split, count in SPLITS.items():
        entries = []
        for _ in range(count):
            key = f"clip_{number:03d}"
            entries.append(Entry(key, split, "dog", f"{key}.mp4", 4.0 + number % 7, {"mp4": bytes(1000 + 37 * number), "json": b"{}"}))
            similarity = round(float(draw.uniform(0.1, 0.5)), 3)
            rows.append({"key": key, "imagebind": similarity, "sync_offset_seconds": float(draw.normal()), "speech": bool(number % 3 == 0)})
            number += 1
        entries += [Entry(f"{split}_bad_{n}", split, None, "bad.mp4", reason="truncated", message="half") for n in range(FAILED)]
        write_shard(root, f"{split}-000000", entries)
    write_manifest(root)
    rows[4]["imagebind"] = None
    pq.write_table(pa.Table.from_pylist([row for row in rows if row["key"] != "clip_009"]), root / "scores.parquet")
    return root


def good(dataset: Path) -> list[dict]:
    """Ledger rows of good clips with their scores."""
    scores = {row["key"]: row for row in pq.read_table(dataset / "scores.parquet").to_pylist()}
    return [row | scores.get(row["key"], {}) for row in Index.open(dataset).table.to_pylist() if row["status"] == "ok"]


def config(dataset: Path, **changes: object) -> CurateConfig:
    return CurateConfig(**{"data": str(dataset), "score": "imagebind", **changes})


# --- what is kept ---


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({}, lambda row, t: row.get("imagebind") is not None and row["imagebind"] >= t),
        ({"keep": "below"}, lambda row, t: row.get("imagebind") is not None and row["imagebind"] <= t),
        ({"score": "duration_seconds"}, lambda row, t: row["duration_seconds"] >= t),
        (
            {"score": "sync_offset_seconds", "keep": "below", "absolute": True},
            lambda row, t: "sync_offset_seconds" in row and abs(row["sync_offset_seconds"]) <= t,
        ),
    ],
)
@pytest.mark.parametrize("split", [None, "test"])
def test_thresholds_keep_what_counting_keeps(dataset: Path, changes: dict, stays, split: str | None) -> None:
    found = run(config(dataset, split=split, **changes))
    rows = [row for row in good(dataset) if split in (None, row["split"])]
    assert found.kept[0].total == len(rows) == (25 if split is None else 7)
    assert len(found.kept) > 5 and [row.total for row in found.kept] == sorted((row.total for row in found.kept), reverse=True)
    for line in found.kept[1:]:
        assert line.threshold is not None
        left = [row for row in rows if stays(row, line.threshold)]
        assert line.clips == {name: sum(row["split"] == name for row in left) for name in found.clips.splits}
        assert line.seconds == pytest.approx(sum(row["duration_seconds"] for row in left))
        assert line.bytes == sum(row["mp4.size"] + row["json.size"] for row in left)
    assert 0 < found.kept[-1].total < found.kept[1].total or len(found.kept) < 4


def test_published_and_given_thresholds(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config(dataset))
    assert found.marked is not None and 0.3 in [row.threshold for row in found.kept]
    out = capsys.readouterr().out
    assert "*0.3" in out and "* 0.3 is VisualSound's" in out and "25 good clips" in out and "the other 2 are kept by no threshold" in out
    given = run(config(dataset, thresholds=[0.4, 0.2, 0.4]))
    assert [row.threshold for row in given.kept] == [None, 0.2, 0.4]
    assert [row.threshold for row in run(config(dataset, thresholds=[0.4, 0.2], keep="below")).kept] == [None, 0.4, 0.2]
    # As published: names of files, in a file whose own name says what the scores are; one of a clip that is not here.
    scores = {f"videos/{row['key']}.mp4": row["imagebind"] for row in good(dataset) if row.get("imagebind")} | {"elsewhere.mp4": 0.9}
    (tmp_path / "vggsound_imagebind_scores.json").write_text(json.dumps(scores))
    published = run(config(dataset, score="", scores=str(tmp_path / "vggsound_imagebind_scores.json")))
    assert run(config(dataset, keep="below")).marked is None
    offsets = run(config(dataset, score="sync_offset_seconds", absolute=True, keep="below"))
    assert offsets.marked is not None and 0.2 in [row.threshold for row in offsets.kept]
    assert published.marked == found.marked and published.name == "score" and published.scored == 23
    assert [row.clips for row in published.kept] == [row.clips for row in found.kept]


def test_hours_of_machines_at_a_measured_rate(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = example_rates()
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    found = run(config(dataset, rates=str(tmp_path / "rates.json"), clips_per_gpu_second=2.5, epochs=30.0))
    featurise, train = found.hours
    line = next(row for row in found.kept if row.threshold == 0.3)
    assert featurise.of(line) == pytest.approx(line.seconds * (0.5 + 0.1 + 0.05) / 8 / 3600)
    assert train.of(line) == pytest.approx(line.total * 30 / 2.5 / 3600)
    out = capsys.readouterr().out
    assert "featurising, GPU-hours" in out and "0.65 s of one NVIDIA H100" in out and "training, GPU-hours" in out
    (tmp_path / "rates.json").write_text(json.dumps(rates | {"device": "cpu", "gpu_kind": ""}))
    (by_core,) = run(config(dataset, rates=str(tmp_path / "rates.json"))).hours
    assert by_core.name == "featurising, core-hours" and by_core.of(line) == pytest.approx(line.seconds * (9.5 + 1.5 + 2.0) / 8 / 3600)


def example_rates() -> dict:
    """As `soundshard bench-prepare` writes them."""
    costs = {name: {"wall_seconds": 1.0, "cpu_seconds": 1.0} for name in ("reencode", "reencode_fused", "decode")}
    networks = {"tower": (0.5, 9.5), "codec": (0.1, 1.5), "audio": (0.05, 2.0)}
    costs |= {name: {"wall_seconds": wall, "cpu_seconds": cpu} for name, (wall, cpu) in networks.items()}
    sizes = ("source_bytes", "media_bytes", "feature_bytes", "decoded_bytes")
    memory = ("worker_process_bytes", "decoder_process_bytes", "actor_process_bytes", "gpu_memory_bytes")
    return {
        **costs,
        **dict.fromkeys(sizes, 1000.0),
        **dict.fromkeys(memory, 1000),
        **{"clips": 3, "failed": 0, "reasons": {}, "video_seconds": 8.0, "segments": 24.0, "device": "cuda", "gpu_kind": "NVIDIA H100"},
        **{"cpu_kind": "a processor", "cpus": 2, "versions": {}, "options": {}},
    }


# --- arithmetic ---


def test_curves_over_all_thresholds_are_the_same_arithmetic() -> None:
    draw = np.random.default_rng(2)
    score, other = draw.normal(size=101).round(1), draw.normal(size=101)
    score[[3, 50]], other[[3, 7, 60]] = np.nan, np.nan
    some, at = draw.random(101) < 0.4, np.linspace(-3, 3, 37).round(1)
    for keep in ("above", "below"):
        order = Sorted.of(score, keep)
        shares, means, counts = order.share(some, at), order.mean(other, at), order.count(at)
        for t, share, mean, count in zip(at, shares, means, counts, strict=True):
            stays = score >= t if keep == "above" else score <= t
            assert count == stays.sum() and share == pytest.approx((stays & some).sum() / some.sum())
            left = other[stays & np.isfinite(other)]
            assert np.isnan(mean) if not len(left) else mean == pytest.approx(left.mean())


def test_correlations_are_of_ranks_among_clips_that_have_both() -> None:
    draw = np.random.default_rng(3)
    a = draw.normal(size=203)
    b, c, d = np.exp(3 * a), -a + 0.1 * draw.normal(size=203), np.full(203, 1.5)
    c[draw.random(203) < 0.3] = np.nan
    ties = a.round(0)
    found = correlations([a, b, c, d, ties])
    assert found[0, 1] == pytest.approx(1) and found[0, 2] < -0.97 and np.isnan(found[0, 3]) and (found.diagonal() == 1).all()
    np.testing.assert_array_equal(found, found.T)

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

    both = np.isfinite(c)
    assert found[2, 4] == pytest.approx(np.corrcoef(ranks(c[both]), ranks(ties[both]))[0, 1])
    assert found[0, 4] == pytest.approx(np.corrcoef(ranks(a), ranks(ties))[0, 1])


def test_usual_thresholds_are_round_and_spread() -> None:
    draw = np.random.default_rng(4)
    score = np.append(draw.normal(size=5000), [1e6, np.nan])
    found = usual(score, "above", also=[0.3])
    assert {-1.0, 0.0, 1.0, 0.3} <= set(found) and 8 <= len(found) <= 14 and found == sorted(found) and max(found) < 5
    assert all(len(f"{value:g}") <= 6 for value in found)
    assert usual(score, "below") == sorted(usual(score, "below"), reverse=True)
    assert usual(np.array([1.0, 0.0, 1.0, np.nan]), "above") == [0.0, 1.0]
    assert usual(np.full(9, 0.25), "above") == [0.25]
    few = usual(draw.normal(size=9), "above")
    assert all(value == round(value, 3) for value in few)
    mostly = np.append(np.zeros(99_999), 0.7)
    assert span(mostly) == (0.0, 0.7) and span(np.full(3, 2.0)) == (1.5, 2.5)


# --- the page ---


def svg_of(text: str) -> ET.Element:
    assert "nan" not in text and "inf" not in text
    return ET.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_the_page_shows_what_is_printed_and_needs_nothing_else(dataset: Path, tmp_path: Path) -> None:
    found = run(config(dataset, html=str(tmp_path / "page.html"), clips_per_gpu_second=2.0))
    page = (tmp_path / "page.html").read_text()
    assert page == curation_html(found) and "<script" not in page and not re.search(r"(src|href)=\"?https?:", page)
    rows = re.findall(r"<tr[^>]*><th scope=row>([^<]*)</th><td>([\d,]+)</td>", page)
    assert rows == [("all clips" if row.threshold is None else f"{row.threshold:g}", f"{row.total:,}") for row in found.kept]
    assert page.count("<tr class=published>") == 1 and "VisualSound" in page and "training, GPU-hours" in page
    assert "sync_offset_seconds" in page and "duration_seconds" in page and "Spearman" in page
    assert all(line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in page for line in found.commands)


@pytest.mark.parametrize("keep", ["above", "below"])
def test_curves_and_bars_lie_within_their_frame_and_say_what_was_found(dataset: Path, keep: str) -> None:
    found = run(config(dataset, keep=keep))
    for svg in (kept_svg(found), *(mean_svg(found, Sorted.of(found.score, found.keep), name) for name in found.others)):
        root = svg_of(svg)
        _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
        for element in root.iter():
            for pair in element.get("points", "").split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= width and 0 <= y <= height
            for name, most in (("x", width), ("y", height)):
                assert 0 <= float(element.get(name, "0")) <= most
    root = svg_of(kept_svg(found))
    curves = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert [curve[0].text for curve in curves] == ["test", "validation", "train", "all clips"]
    heights = [float(pair.split(",")[1]) for pair in curves[-1].attrib["points"].split()]
    assert heights == sorted(heights, reverse=keep == "below")
    top, bottom, (low, high) = 30, 310, span(found.score)
    most = (found.score >= low if keep == "above" else found.score <= high).sum()  # of 25, of which two have no score
    assert min(heights) == pytest.approx(bottom - (bottom - top) * most / 25, abs=0.1)
    bars = [element[0].text or "" for element in root.iter() if element.tag.endswith("rect")]
    assert sum(int(bar.rpartition(": ")[2].split()[0]) for bar in bars) + len(re.findall("Not drawn", curation_html(found))) >= 21


def test_names_are_shown_as_they_are_and_run_nothing(dataset: Path, tmp_path: Path) -> None:
    table = pq.read_table(dataset / "scores.parquet")
    pq.write_table(table.rename_columns(["key", "<b>loud & clear", *table.column_names[2:]]), tmp_path / "scores.parquet")
    found = run(config(dataset, score="<b>loud & clear", scores=str(tmp_path / "scores.parquet"), html=str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text()
    assert "<b>loud" not in page and "&lt;b&gt;loud &amp; clear" in page and found.commands


def test_a_dataset_with_one_split_and_one_score(dataset: Path, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(dataset / "scores.parquet").select(["key", "speech"]), tmp_path / "scores.parquet")
    found = run(config(dataset, score="", scores=str(tmp_path / "scores.parquet"), split="train", others=["speech"]))
    assert [row.threshold for row in found.kept] == [None, 0.0, 1.0] and found.names == ("speech",)
    page = curation_html(found)
    assert "Other scores" not in page and "Spearman" not in page and page.count("<polyline") == 1


# --- the commands ---


def test_commands_take_what_the_table_says(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import subset

    monkeypatch.chdir(tmp_path)
    (tmp_path / "media").symlink_to(dataset)
    local = replace(config(dataset, split="test"), data="media")
    cases = [
        run(replace(local, split=None)),
        run(replace(local, keep="below", scores="media")),
        run(replace(local, score="duration_seconds", split=None)),
        run(replace(local, score="sync_offset_seconds", absolute=True, keep="below")),
    ]
    for found in cases:
        for line, row in zip(found.commands[1:3], found.kept[2:4], strict=True):
            program, job, *arguments = shlex.split(line)
            assert (program, job) == ("soundshard", "subset")
            assert subset.main(arguments) == (0 if row.total else 2)
            if row.total:
                view = next(argument.removeprefix("out=") for argument in arguments if argument.startswith("out="))
                assert Index.open(view).ok == row.total
                again = run(replace(local, data=view, split=None, scores="media", thresholds=[0.25]))  # a view is cut like a dataset
                assert again.kept[0].clips.keys() <= row.clips.keys() and again.kept[0].total == row.total


# --- what cannot be done ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"score": "imagebnd"}, r"there is no score 'imagebnd'; did you mean imagebind\? There are imagebind, sync_offset_seconds, speech"),
        ({"score": ""}, "give score=, one of imagebind, sync_offset_seconds, speech"),
        ({"scores": "absent.json"}, r"absent\.json is not there"),
        ({"others": ["loud"]}, "there is no score 'loud'"),
        ({"split": "tset"}, "no split 'tset'"),
        ({"rates": "absent.json"}, r"bench-prepare source=SAMPLE out=absent\.json"),
        ({"clips_per_gpu_second": -1.0}, "expected numbers above 0"),
    ],
)
def test_user_errors_say_what_to_do(dataset: Path, changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(config(dataset, **changes))


def test_scores_that_are_of_other_clips_and_datasets_without_any(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"elsewhere.mp4": 0.4}')
    with pytest.raises(ValueError, match=r"none of the 25 good clips .* do their names agree"):
        run(config(dataset, score="", scores=str(tmp_path / "other.json")))
    with pytest.raises(ValueError, match="another of the scores has too"):
        run(config(dataset, scores=[str(dataset), str(dataset)]))
    create_or_check(tmp_path / "bare", new_info("media", {"made": "by program"}))
    write_shard(tmp_path / "bare", "test-000000", [Entry("a", "test", None, "a.mp4", 3.0, {"mp4": b"0"})])
    with pytest.raises(ValueError, match="there are no scores; `soundshard score data=` makes some"):
        run(config(tmp_path / "bare"))
    create_or_check(tmp_path / "bad", new_info("media", {"made": "by program"}))
    write_shard(tmp_path / "bad", "test-000000", [Entry("a", "test", None, "a.mp4", reason="truncated", message="half")])
    with pytest.raises(ValueError, match="has no good clips"):
        run(config(tmp_path / "bad"))
    assert main([str(dataset), "score=imagebnd"]) == 2 and "did you mean imagebind?" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "clips_per_gpu_second" in capsys.readouterr().out


def test_it_starts_without_torch_and_ray() -> None:
    program = "import sys, pipeline.curate; print(sorted({'torch', 'ray', 'av'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
