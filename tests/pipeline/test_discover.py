"""Discovery from made folders, lists and csvs, and from the heads of the published lists where they are."""

import os
import time
from pathlib import Path

import pytest

from pipeline.discover import Clip, DiscoverConfig, discover, key_of


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def _rows(clips: list[Clip], folder: Path) -> list[tuple[str, str, str | None]]:
    return [(clip.key, os.path.relpath(clip.source, folder), clip.reason) for clip in clips]


def test_folder_is_searched_for_videos_only(tmp_path: Path) -> None:
    _touch(tmp_path, "b.MP4", "a.webm", "deep/er/c.mkv", "deep/d.Mov", "e.avi", "notes.txt", "f.mp3", "._b.mp4", ".cache/g.mp4", "mp4")
    clips = discover(DiscoverConfig(str(tmp_path), split="everything"))
    assert _rows(clips, tmp_path) == [
        ("a", "a.webm", None),
        ("b", "b.MP4", None),
        ("c", "deep/er/c.mkv", None),
        ("d", "deep/d.Mov", None),
        ("e", "e.avi", None),
    ]
    assert {clip.split for clip in clips} == {"everything"} and {clip.label for clip in clips} == {None}


def test_a_key_that_appears_again_fails(tmp_path: Path) -> None:
    _touch(tmp_path, "x/same.mp4", "a/same.mp4", "same.webm", "other.mp4", "sa me.mp4", "sa.me.mp4")
    assert _rows(discover(DiscoverConfig(str(tmp_path))), tmp_path) == [
        ("other", "other.mp4", None),
        ("sa_me", "sa me.mp4", None),
        ("sa_me", "sa.me.mp4", "duplicate_key"),
        ("same", "a/same.mp4", None),
        ("same", "same.webm", "duplicate_key"),
        ("same", "x/same.mp4", "duplicate_key"),
    ]
    duplicate = discover(DiscoverConfig(str(tmp_path)))[4]
    assert duplicate.message and str(tmp_path / "a/same.mp4") in duplicate.message


def test_keys() -> None:
    assert key_of("---g-f_I2yQ_1000_11000") == "---g-f_I2yQ_1000_11000"
    assert key_of("Ärger über 2.0 (neu)") == "Ärger_über_2_0__neu_"
    assert key_of("u\u0308ber") == key_of("über")
    long = [key_of("犬" * 40 + ending) for ending in "ab"]
    assert long[0] != long[1] and all(key.startswith("犬" * 20) and len(f"{key}.avclip_audio.npy".encode()) <= 100 for key in long)
    assert key_of("x" * 80) == "x" * 80 and len(key_of("x" * 81)) == 80


def test_list_of_files(tmp_path: Path) -> None:
    _touch(tmp_path, "videos/one.mp4", "videos/two.mp4", "away/three.avi")
    listing = tmp_path / "lists" / "train.txt"
    listing.parent.mkdir()
    listing.write_text(f"../videos/two.mp4\n\n{tmp_path}/away/three.avi\n  ../videos/nothing.mp4\n../videos/two.mp4\n")
    assert _rows(discover(DiscoverConfig(str(listing))), tmp_path / "lists") == [
        ("nothing", "../videos/nothing.mp4", "missing"),
        ("three", "../away/three.avi", None),
        ("two", "../videos/two.mp4", None),
        ("two", "../videos/two.mp4", "duplicate_key"),
    ]
    assert [clip.key for clip in discover(DiscoverConfig(str(tmp_path / "videos/one.mp4")))] == ["one"]


CSV = """\
-0BIyqJj9ZU,30,"people eating, noodle",train
---g-f_I2yQ,1,people marching,test
ab_cdefg_-1,242,"alarm clock, ringing",train
ZYc410CE4Rg,0,dog barking,test
---g-f_I2yQ,1,people marching,test
"""


@pytest.mark.parametrize("nested", [False, True])
def test_vggsound_csv(tmp_path: Path, nested: bool) -> None:
    files = ["-0BIyqJj9ZU_30000_40000.mp4", "---g-f_I2yQ_000001.mp4", "ZYc410CE4Rg_0_4000.webm", "unlisted.mp4"]
    _touch(tmp_path / "clips", *(f"part{n}/{name}" if nested else name for n, name in enumerate(files)))
    (tmp_path / "clips/vggsound.csv").write_text(CSV)
    clips = discover(DiscoverConfig(str(tmp_path / "clips")))
    assert [(clip.key, clip.split, clip.label, clip.reason) for clip in clips] == [
        ("---g-f_I2yQ_1000_11000", "test", "people marching", None),
        ("---g-f_I2yQ_1000_11000", "test", "people marching", "duplicate_key"),
        ("ZYc410CE4Rg_0_4000", "test", "dog barking", None),
        ("-0BIyqJj9ZU_30000_40000", "train", "people eating, noodle", None),
        ("ab_cdefg_-1_242000_252000", "train", "alarm clock, ringing", "missing"),
    ]
    assert [Path(clip.source).name for clip in clips[2:4]] == ["ZYc410CE4Rg_0_4000.webm", "-0BIyqJj9ZU_30000_40000.mp4"]
    assert len(discover(DiscoverConfig(str(tmp_path / "clips"), listing="none"))) == 4
    elsewhere = tmp_path / "other.csv"
    elsewhere.write_text("filename,start,desc,split\nZYc410CE4Rg,0,dog,test\n")
    assert [clip.key for clip in discover(DiscoverConfig(str(tmp_path / "clips"), listing=str(elsewhere)))] == ["ZYc410CE4Rg_0_4000"]


def test_list_of_ids(tmp_path: Path) -> None:
    _touch(tmp_path / "clips", "a/-0BIyqJj9ZU_30000_40000.mp4", "---g-f_I2yQ_000001.mp4", "b.mp4")
    ids = tmp_path / "ids.txt"
    ids.write_text("---g-f_I2yQ_1000_11000\n-0BIyqJj9ZU_30000_40000\nZYc410CE4Rg_0_10000\nb\n")
    clips = discover(DiscoverConfig(str(tmp_path / "clips"), listing=str(ids)))
    assert [(clip.key, clip.reason) for clip in clips] == [
        ("---g-f_I2yQ_1000_11000", None),
        ("-0BIyqJj9ZU_30000_40000", None),
        ("ZYc410CE4Rg_0_10000", "missing"),
        ("b", None),
    ]


def test_splits_are_fractions_that_do_not_depend_on_order(tmp_path: Path) -> None:
    names = [f"clip{n:03d}" for n in range(101)]
    listing = tmp_path / "list.txt"
    splits = []
    for order in (names, names[::-1]):
        listing.write_text("".join(f"{name}.mp4\n" for name in order))
        clips = discover(DiscoverConfig(str(listing), validation_fraction=0.1, test_fraction=0.2))
        assert [clip.split for clip in clips] == ["test"] * 20 + ["train"] * 71 + ["validation"] * 10
        splits.append({clip.key: clip.split for clip in clips})
    assert splits[0] == splits[1]
    moved = [name for name in names if splits[0][name] == "test"]
    assert moved != sorted(names)[:20] and moved != sorted(names)[-20:]
    smaller = {clip.key: clip.split for clip in discover(DiscoverConfig(str(listing), test_fraction=0.1))}
    assert {key for key in names if smaller[key] == "test"} < set(moved)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "nowhere"}, "no file and no folder"),
        ({"source": "empty"}, "no clips in .*expected mp4, webm"),
        ({"source": "clips", "listing": "nowhere.csv"}, "no file"),
        ({"source": "clips", "listing": "bad.csv"}, "line 2: .*expected `youtube id"),
        ({"source": "clips", "validation_fraction": 0.7, "test_fraction": 0.7}, "add up to at most 1"),
        ({"source": "clips", "split": "a/b"}, "cannot name files"),
        ({"source": "noise.bin"}, "not a text file"),
        ({"source": "clips/a.mp4", "listing": "bad.csv"}, "expected a folder"),
    ],
)
def test_user_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    _touch(tmp_path, "clips/a.mp4")
    Path("empty").mkdir()
    Path("bad.csv").write_text("aaaaaaaaaaa,1,x,train\nbbbbbbbbbbb,two,x,train\n")
    Path("noise.bin").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=says):
        discover(DiscoverConfig(**options))


def test_twenty_thousand_rows_take_no_time(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"id{n:09d}_{n * 1000}_{n * 1000 + 10000}.mp4" for n in range(500)))
    (tmp_path / "vggsound.csv").write_text("".join(f'id{n:09d},{n},"a, b",train\n' for n in range(20_000)))
    start = time.process_time()
    clips = discover(DiscoverConfig(str(tmp_path), test_fraction=0.01))
    assert time.process_time() - start < 3
    assert len(clips) == 20_000 and sum(clip.reason is None for clip in clips) == 500 and sum(clip.split == "test" for clip in clips) == 200


def test_heads_of_the_published_lists(shared: Path, tmp_path: Path) -> None:
    rows = (shared / "datasets/visualsound/visualsound.csv").read_text().splitlines()[:200]
    (tmp_path / "head.csv").write_text("\n".join(rows))
    present = [row.split(",") for row in rows[1:50:7]]
    _touch(tmp_path / "clips", *(f"{row[0]}_{int(row[1]) * 1000}_{int(row[1]) * 1000 + 10000}.mp4" for row in present))
    clips = discover(DiscoverConfig(str(tmp_path / "clips"), listing=str(tmp_path / "head.csv")))
    assert len(clips) == 199 and sum(clip.reason is None for clip in clips) == len(present) and all(clip.label for clip in clips)
    ids = (shared / "datasets/vggsound/vggsound_test.txt").read_text().split()[:300]
    (tmp_path / "head.txt").write_text("\n".join(ids))
    clips = discover(DiscoverConfig(str(tmp_path / "clips"), listing=str(tmp_path / "head.txt"), split="test"))
    assert [clip.key for clip in clips] == sorted(ids) and {clip.reason for clip in clips} <= {"missing", None}
    clips = discover(DiscoverConfig(str(shared / "clips")))
    assert [(clip.key, clip.reason) for clip in clips] == [
        ("3qesirWAGt4_20000_30000", None),
        ("ZYc410CE4Rg_0_10000", None),
        ("ZYc410CE4Rg_0_10000", "duplicate_key"),
    ]
