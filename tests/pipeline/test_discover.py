"""Discovery from made folders, lists and csvs, on disk and in object storage, and from the heads of the published lists where they are."""

import gzip
import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import storage
from pipeline import inputs
from pipeline.discover import Clip, DiscoverConfig, discover, discovery, key_of
from pipeline.job import Summary, finish, listed_text
from pipeline.plan import Options, Plan, settle_here
from tests.s3 import S3


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


AUDIOSET = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=20371, num_segs=20371, num_unique_labels=527, num_positive_labels=51804
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_,/m/0bt9lr,/m/0jbk"
--BfvyPmVMo, 20.000, 30.000, "/m/03l9g"
-0BIyqJj9ZU, 30.000, 38.290, "/t/dd00125"
-0Gj8-vB1q4, 30.000, 40.000, "/g/122z_qxw"
"""


def test_audiosets_csv(tmp_path: Path) -> None:
    names = ["--4gqARaEJE_0_10000", "--BfvyPmVMo_000020", "-0BIyqJj9ZU_30000_38289"]
    _touch(tmp_path / "clips", *(f"eval_segments/{name}.mp4" for name in names), "eval_segments/unlisted.mp4")
    (tmp_path / "eval.csv").write_text(AUDIOSET)
    clips = discover(DiscoverConfig(str(tmp_path / "clips"), listing=str(tmp_path / "eval.csv"), split="test"))
    assert [(clip.key, clip.split, clip.label, clip.reason) for clip in clips] == [
        ("--4gqARaEJE_0_10000", "test", "/m/068hy,/m/07q6cd_,/m/0bt9lr,/m/0jbk", None),
        ("--BfvyPmVMo_20000_30000", "test", "/m/03l9g", None),
        ("-0BIyqJj9ZU_30000_38289", "test", "/t/dd00125", None),  # 38.29 s is 38289 ms by truncation of the product
        ("-0Gj8-vB1q4_30000_40000", "test", "/g/122z_qxw", "missing"),
    ]
    assert [Path(clip.source).stem for clip in clips[:3]] == names
    # Synchformer's own list of AudioSet: no comments, the part before the id, numbers for labels.
    rows = 'eval/--4gqARaEJE,0,10,"7,74",x\nunbalanced/--BfvyPmVMo,20.0,30.0,"3",x\nbalanced/-0BIyqJj9ZU,30,38.29,"9",x\n'
    (tmp_path / "audioset.csv").write_text(rows)
    clips = discover(DiscoverConfig(str(tmp_path / "clips"), listing=str(tmp_path / "audioset.csv")))
    assert [(clip.key[:11], clip.split, clip.label, clip.reason) for clip in clips] == [
        ("--4gqARaEJE", "test", "7,74", None),
        ("--BfvyPmVMo", "train", "3", None),
        ("-0BIyqJj9ZU", "validation", "9", None),
    ]


LRS3 = ["pretrain/0Fi83BHQsMA/00002.mp4", "trainval/0Fi83BHQsMA/50001.mp4", "pretrain/a_b-cdefghi/00002.mp4", "test/zzXawbbEGRw/00001.mp4"]


def test_lrs3s_folders(tmp_path: Path) -> None:
    _touch(tmp_path / "lrs3", *LRS3, "pretrain/0Fi83BHQsMA/00002.txt")
    clips = discover(DiscoverConfig(str(tmp_path / "lrs3"), layout="lrs3"))
    assert [(clip.key, clip.split, clip.reason) for clip in clips] == [
        ("0Fi83BHQsMA_00002", "pretrain", None),
        ("a_b-cdefghi_00002", "pretrain", None),
        ("zzXawbbEGRw_00001", "test", None),
        ("0Fi83BHQsMA_50001", "trainval", None),
    ]
    only = discover(DiscoverConfig(str(tmp_path / "lrs3/pretrain"), layout="lrs3"))
    assert [clip.key for clip in only] == ["0Fi83BHQsMA_00002", "a_b-cdefghi_00002"]
    (tmp_path / "lrs3_test.txt").write_text("pretrain/a_b-cdefghi/00002\npretrain/a_b-cdefghi/00003\n")
    listed = discover(DiscoverConfig(str(tmp_path / "lrs3"), layout="lrs3", listing=str(tmp_path / "lrs3_test.txt"), split="test"))
    assert [(clip.key, clip.split, clip.reason) for clip in listed] == [("a_b-cdefghi_00002", "test", None), ("a_b-cdefghi_00003", "test", "missing")]


def test_no_speaker_of_lrs3_is_in_two_splits(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"pretrain/speaker{n % 11:03d}_/{n:05d}.mp4" for n in range(77)))
    clips = discover(DiscoverConfig(str(tmp_path), layout="lrs3", split="pretrain", validation_fraction=0.2, test_fraction=0.3))
    of: dict[str, set[str]] = {}
    for clip in clips:
        of.setdefault(clip.key[:11], set()).add(clip.split)
    assert len(of) == 11 and all(len(splits) == 1 for splits in of.values())
    assert sorted(split for splits in of.values() for split in splits) == ["pretrain"] * 6 + ["test"] * 3 + ["validation"] * 2


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
        ({"source": "clips", "layout": "lrs3"}, r"a\.mp4: not a place for a clip of LRS3"),
        ({"source": "clips/a.mp4", "layout": "lrs3"}, "no folder; layout=lrs3 reads"),
        ({"source": "lrs3", "layout": "lrs3", "listing": "ids.txt"}, r"ids\.txt: 'spk/1'; expected pretrain"),
    ],
)
def test_user_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    _touch(tmp_path, "clips/a.mp4", "lrs3/test/spk/1.mp4")
    Path("ids.txt").write_text("spk/1\n")
    Path("empty").mkdir()
    Path("bad.csv").write_text("aaaaaaaaaaa,1,x,train\nbbbbbbbbbbb,two,x,train\n")
    Path("noise.bin").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=says):
        discover(DiscoverConfig(**options))


def test_size_and_version_of_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "in/a.mp4", "in/deep/b.mp4", "elsewhere/d.mp4")
    (tmp_path / "in/a.mp4").write_bytes(b"12345")
    os.utime(tmp_path / "in/a.mp4", ns=(7, 1234567890123456789))
    (tmp_path / "in/dangling.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "in/loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "in/linked.mp4").symlink_to(tmp_path / "in/a.mp4")
    (tmp_path / "in/folder.mp4").symlink_to(tmp_path / "elsewhere")  # a link to a folder is not followed
    monkeypatch.chdir(tmp_path)
    five = (5, "mtime:1234567890123456789")
    clips = discover(DiscoverConfig("./in"))
    assert {clip.key: (clip.size, clip.version) for clip in clips if clip.key != "b"} == {
        "a": five,
        "linked": five,
        "dangling": (None, None),
        "loop": (None, None),
    }
    assert all(clip.source.startswith(f"{tmp_path}/in/") and clip.reason is None for clip in clips)
    (tmp_path / "list.txt").write_text("in/a.mp4\nin/dangling.mp4\nin/none.mp4\n")
    assert [(clip.size, clip.version, clip.reason) for clip in discover(DiscoverConfig("list.txt"))] == [
        (*five, None),
        (None, None, None),
        (None, None, "missing"),
    ]
    (single,) = discover(DiscoverConfig("in/a.mp4"))
    assert (single.source, single.size, single.version) == (f"{tmp_path}/in/a.mp4", *five)


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "a.mp4", "closed/b.mp4")
    scandir = os.scandir

    def refuse(path: str):
        if path.endswith("closed"):  # as root every folder can be listed
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot list .*closed: Permission denied"):
        discover(DiscoverConfig(str(tmp_path)))


@dataclass(frozen=True)
class WiderConfig(DiscoverConfig):
    out: str = "???"


def test_the_options_of_a_wider_configuration() -> None:
    config = discovery(WiderConfig(out="out", source="somewhere", split="test"))
    assert type(config) is DiscoverConfig and config == DiscoverConfig("somewhere", split="test")


def _put(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(f"{root}/{name}", name.encode())


def _relative(clips: list[Clip], root: str) -> list[tuple[str, str, int | None, str | None]]:
    assert all(clip.source.startswith(f"{root}/") for clip in clips)
    assert all((clip.version or "").startswith("etag:") == (clip.size is not None) for clip in clips)
    return [(clip.key, clip.source.removeprefix(f"{root}/"), clip.size, clip.reason) for clip in clips]


def test_clips_under_a_prefix(s3: S3) -> None:
    root = f"{s3.url}/clips"
    _put(root, "b.MP4", "deep/er/c d.mkv", "notes.txt", "._b.mp4", ".cache/g.mp4", "x/b.mp4")
    _put(s3.url, "clips2/other.mp4", "texts/notes.txt")
    expected = [("b", "b.MP4", 5, None), ("b", "x/b.mp4", 7, "duplicate_key"), ("c_d", "deep/er/c d.mkv", 15, None)]
    assert _relative(discover(DiscoverConfig(root)), root) == expected
    assert _relative(discover(DiscoverConfig(f"{s3.url}//clips/")), root) == expected
    (single,) = discover(DiscoverConfig(f"{root}/x/b.mp4"))
    assert (single.key, single.source, single.size) == ("b", f"{root}/x/b.mp4", 7)
    with pytest.raises(ValueError, match="no file and no folder"):
        discover(DiscoverConfig(f"{s3.url}/nothing"))
    with pytest.raises(ValueError, match="no clips in s3://"):
        discover(DiscoverConfig(f"{s3.url}/texts"))


def test_vggsound_csv_and_ids_of_remote_clips(s3: S3, tmp_path: Path) -> None:
    root = f"{s3.url}/clips"
    _put(root, "a/-0BIyqJj9ZU_30000_40000.mp4", "---g-f_I2yQ_000001.mp4", "ZYc410CE4Rg_0_4000.webm", "unlisted.mp4")
    storage.write_bytes(f"{root}/vggsound.csv", CSV.encode())
    expected = [
        ("---g-f_I2yQ_1000_11000", "---g-f_I2yQ_000001.mp4", 22, None),
        ("---g-f_I2yQ_1000_11000", "---g-f_I2yQ_000001.mp4", 22, "duplicate_key"),
        ("ZYc410CE4Rg_0_4000", "ZYc410CE4Rg_0_4000.webm", 23, None),
        ("-0BIyqJj9ZU_30000_40000", "a/-0BIyqJj9ZU_30000_40000.mp4", 29, None),
        ("ab_cdefg_-1_242000_252000", "ab_cdefg_-1_242000_252000.mp4", None, "missing"),
    ]
    assert _relative(discover(DiscoverConfig(root)), root) == expected
    assert len(discover(DiscoverConfig(root, listing="none"))) == 4
    (tmp_path / "local.csv").write_text(CSV)
    assert _relative(discover(DiscoverConfig(root, listing=str(tmp_path / "local.csv"))), root) == expected
    _put(s3.url, "lists/ids.txt")
    storage.write_bytes(f"{s3.url}/lists/ids.txt", b"ZYc410CE4Rg_0_4000\n")
    assert len(discover(DiscoverConfig(root, listing=f"{s3.url}/lists/ids.txt"))) == 1


class Counted:
    """How often storage was asked, and for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stats, self.scans = 0, []
        stat, scan = storage.stat, storage.scan

        def counted_stat(path):
            self.stats += 1
            return stat(path)

        def counted_scan(root, *, recursive=True):
            self.scans.append((root, recursive))
            return scan(root, recursive=recursive)

        monkeypatch.setattr(storage, "stat", counted_stat)
        monkeypatch.setattr(storage, "scan", counted_scan)


def test_a_list_of_remote_files_lists_their_folders(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(s3.url, *(f"{'ab'[n % 2]}/clip{n:02d}.mp4" for n in range(20)), "a/deeper/clip50.mp4")
    _touch(tmp_path, "here.mp4")
    lines = [f"../{'ab'[n % 2]}/clip{n:02d}.mp4" for n in range(22)]
    storage.write_bytes(f"{s3.url}/lists/train.txt", "\n".join([*lines, f"{s3.url}/a/deeper/clip50.mp4", f"{tmp_path}/here.mp4"]).encode())
    asked = Counted(monkeypatch)
    clips = discover(DiscoverConfig(f"{s3.url}/lists/train.txt"))
    assert [(clip.key, clip.reason, clip.size) for clip in clips] == [
        *((f"clip{n:02d}", None, 12) for n in range(20)),
        *((f"clip{n:02d}", "missing", None) for n in range(20, 22)),
        ("clip50", None, 19),
        ("here", None, 1),
    ]
    assert clips[7].source == f"{s3.url}/b/clip07.mp4" and sorted(asked.scans) == [(f"{s3.url}/{name}", False) for name in ("a", "a/deeper", "b")]
    assert asked.stats < 5  # the list itself
    # The same from a list on disk, whose lines are addresses.
    (tmp_path / "list.txt").write_text("\n".join(f"{s3.url}/{line[3:]}" for line in lines))
    assert discover(DiscoverConfig(str(tmp_path / "list.txt")))[:20] == clips[:20]


@pytest.mark.parametrize("listed_always", [1000, 5])
def test_a_list_of_files_in_many_folders_lists_what_they_have_in_common(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed_always: int
) -> None:
    _put(s3.url, *(f"in/clip{n:02d}/video.mp4" for n in range(15)), "in/clip03/other.mp4", "around/x.mp4")
    (tmp_path / "list.txt").write_text("\n".join(f"{s3.url}/in/clip{n:02d}/video.mp4" for n in range(17)))
    monkeypatch.setattr(inputs, "LISTED_ALWAYS", listed_always)
    monkeypatch.setattr(inputs, "LISTED_PER_WANTED", 0)
    asked = Counted(monkeypatch)
    clips = discover(DiscoverConfig(str(tmp_path / "list.txt")))
    # All have one key, and are told apart by their paths; those that are not there come last.
    assert [(clip.source, clip.size, clip.reason) for clip in clips[:15]] == [
        (f"{s3.url}/in/clip{n:02d}/video.mp4", 19, "duplicate_key" if n else None) for n in range(15)
    ]
    assert [clip.size for clip in clips[15:]] == [None, None]
    assert asked.scans == [(f"{s3.url}/in", True)]
    # A listing that is given up leaves the rest to be asked for one by one.
    assert (asked.stats > 5) == (listed_always == 5)


def test_thousands_of_rows(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"id{n:09d}_{n * 1000}_{n * 1000 + 10000}.mp4" for n in range(500)))
    (tmp_path / "vggsound.csv").write_text("".join(f'id{n:09d},{n},"a, b",train\n' for n in range(5_000)))
    clips = discover(DiscoverConfig(str(tmp_path), test_fraction=0.01))
    assert len(clips) == 5_000 and sum(clip.reason is None for clip in clips) == 500 and sum(clip.split == "test" for clip in clips) == 50


def _tar(path: Path, *names: str, mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType] - the stubs want the mode spelt out
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))


MIRROR = "scratch/shared/VGGSound_final/video"


@pytest.mark.parametrize("packed", [False, True])
def test_vggsound_in_tars(tmp_path: Path, packed: bool) -> None:
    """As the mirror has it: parts of several gigabytes, compressed, with folders inside."""
    ending, mode = (".tar.gz", "w:gz") if packed else (".tar", "w")
    _tar(tmp_path / f"in/vggsound_00{ending}", f"{MIRROR}/---g-f_I2yQ_000001.mp4", f"{MIRROR}/notes.txt", f"{MIRROR}/._x.mp4", mode=mode)
    _tar(tmp_path / f"in/more/vggsound_01{ending}", "./-0BIyqJj9ZU_000030.mp4", "unlisted.mp4", mode=mode)
    _touch(tmp_path / "in", "ZYc410CE4Rg_0_4000.webm")
    (tmp_path / "in/vggsound.csv").write_text(CSV)
    config = DiscoverConfig(str(tmp_path / "in"), unpack=str(tmp_path / "in/plain") if packed else "")
    plain = tmp_path / ("in/plain" if packed else "in")
    clips = discover(config)
    for clips in (clips, discover(config)):  # noqa: B020 - the second time what was unpacked lies among the inputs
        assert [(clip.key, os.path.relpath(clip.source, plain), clip.label, clip.reason) for clip in clips if clip.size != 1] == [
            ("---g-f_I2yQ_1000_11000", f"vggsound_00.tar::{MIRROR}/---g-f_I2yQ_000001.mp4", "people marching", None),
            ("---g-f_I2yQ_1000_11000", f"vggsound_00.tar::{MIRROR}/---g-f_I2yQ_000001.mp4", "people marching", "duplicate_key"),
            ("-0BIyqJj9ZU_30000_40000", "more/vggsound_01.tar::-0BIyqJj9ZU_000030.mp4", "people eating, noodle", None),
            ("ab_cdefg_-1_242000_252000", os.path.relpath(tmp_path / "in/ab_cdefg_-1_242000_252000.mp4", plain), "alarm clock, ringing", "missing"),
        ]
    member = clips[0]
    assert member.offset is not None and member.size is not None and (member.version or "").startswith("mtime:")
    data = (plain / "vggsound_00.tar").read_bytes()[member.offset : member.offset + member.size]
    assert data.decode() == f"{MIRROR}/---g-f_I2yQ_000001.mp4"
    everything = [clip.key for clip in discover(DiscoverConfig(config.source, listing="none", unpack=config.unpack))]
    assert everything == ["---g-f_I2yQ_000001", "-0BIyqJj9ZU_000030", "ZYc410CE4Rg_0_4000", "unlisted"]
    single = discover(DiscoverConfig(str(plain / "more/vggsound_01.tar"), listing=str(tmp_path / "in/vggsound.csv"), test_fraction=1.0))
    assert [clip.key for clip in single if clip.reason is None] == ["-0BIyqJj9ZU_30000_40000"]


def test_compressed_tars_are_not_passed_over_without_a_word(tmp_path: Path) -> None:
    _tar(tmp_path / "in/a.tar.gz", "a.mp4", mode="w:gz")
    _touch(tmp_path / "in", "b.mp4")
    with pytest.raises(ValueError, match=r"1 tars in .*a\.tar\.gz.*unpack=FOLDER"):
        discover(DiscoverConfig(str(tmp_path / "in")))
    assert [clip.key for clip in discover(DiscoverConfig(str(tmp_path / "in"), unpack="none"))] == ["b"]
    (tmp_path / "in/c.tar").write_bytes((tmp_path / "in/a.tar.gz").read_bytes())
    with pytest.raises(ValueError, match=r"2 tars in .*are compressed"):  # whatever it is called
        discover(DiscoverConfig(str(tmp_path / "in")))


def test_tars_in_object_storage(s3: S3, tmp_path: Path) -> None:
    _tar(tmp_path / "x.tar", "deep/a.mp4", "b.mp4")
    storage.write_bytes(f"{s3.url}/in/x.tar", (tmp_path / "x.tar").read_bytes())
    _put(s3.url, "in/c.mp4")
    clips = discover(DiscoverConfig(f"{s3.url}/in"))
    assert [(clip.key, clip.source.removeprefix(s3.url), clip.offset) for clip in clips] == [
        ("a", "/in/x.tar::deep/a.mp4", 512),
        ("b", "/in/x.tar::b.mp4", 1536),
        ("c", "/in/c.mp4", None),
    ]
    assert [clip.key for clip in discover(DiscoverConfig(f"{s3.url}/in/x.tar"))] == ["a", "b"]
    # Sources of a dataset's ledger, as a list of their own.
    listed = [*(clip.source for clip in clips), f"{tmp_path}/x.tar::deep/a.mp4", f"{tmp_path}/x.tar::d.mp4", f"{tmp_path}/y.tar::e.mp4"]
    (tmp_path / "again.txt").write_text("\n".join(listed))
    again = discover(DiscoverConfig(str(tmp_path / "again.txt")))
    assert {(clip.key, clip.source, clip.offset, clip.reason) for clip in again} == {
        ("a", listed[3], 512, None),
        ("a", listed[0], 512, "duplicate_key"),
        ("b", listed[1], 1536, None),
        ("c", listed[2], None, None),
        ("d", listed[4], None, "missing"),
        ("e", listed[5], None, "missing"),
    }


def test_a_listed_clip_of_another_length_in_a_tar(tmp_path: Path) -> None:
    _tar(tmp_path / "in.tar", "ZYc410CE4Rg_0_4000.webm", "deep/-0BIyqJj9ZU_30000_39000.mp4")
    (tmp_path / "list.csv").write_text(CSV)
    clips = discover(DiscoverConfig(str(tmp_path / "in.tar"), listing=str(tmp_path / "list.csv")))
    assert [clip.key for clip in clips if clip.reason is None] == ["ZYc410CE4Rg_0_4000", "-0BIyqJj9ZU_30000_39000"]


def test_lrs3_in_a_tar(tmp_path: Path) -> None:
    _tar(tmp_path / "lrs3.tar", *LRS3)
    assert [(clip.key, clip.split) for clip in discover(DiscoverConfig(str(tmp_path), layout="lrs3"))] == [
        ("0Fi83BHQsMA_00002", "pretrain"),
        ("a_b-cdefghi_00002", "pretrain"),
        ("zzXawbbEGRw_00001", "test"),
        ("0Fi83BHQsMA_50001", "trainval"),
    ]


def test_vas_counts_its_videos_anew_in_every_class(tmp_path: Path) -> None:
    _touch(tmp_path / "vas", "dog/videos/video_00001.mp4", "gun/videos/video_00001.mp4")
    expected = [("dog_video_00001", "dog", None), ("gun_video_00001", "gun", None)]
    assert [(clip.key, clip.label, clip.reason) for clip in discover(DiscoverConfig(str(tmp_path / "vas")))] == expected
    (tmp_path / "vas_train.txt").write_text("dog/video_00001\ngun/video_00001\n")
    (tmp_path / "vas_test.txt").write_text("dog/video_00002\n")
    clips = discover(DiscoverConfig(str(tmp_path / "vas"), listing=str(tmp_path)))
    assert [(clip.key, clip.label, clip.reason) for clip in clips] == [("dog_video_00002", "dog", "missing"), *expected]
    lines = [json.dumps({"filepath": f"{tmp_path}/vas/{name}/videos/video_00001.mp4", "duration": 3.5}) for name in ("gun", "dog", "baby")]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    clips = discover(DiscoverConfig(str(tmp_path / "data.jsonl")))
    assert [(clip.key, clip.label, clip.reason) for clip in clips] == [("baby_video_00001", "baby", "missing"), *expected]
    elsewhere = discover(DiscoverConfig(str(tmp_path / "vas"), listing=str(tmp_path / "data.jsonl")))
    assert [(clip.key, clip.reason) for clip in elsewhere] == [(clip.key, clip.reason) for clip in clips]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_table_of_files(tmp_path: Path, kind: str) -> None:
    _touch(tmp_path, "in/a.mp4", "in/b.mp4")
    rows = [
        {"path": "in/a.mp4", "key": "first", "label": "x, y", "split": "test", "start_seconds": None, "end_seconds": None},
        {"path": f"{tmp_path}/in/b.mp4", "key": None, "label": None, "split": None, "start_seconds": 1.5, "end_seconds": 4.0},
        {"path": "in/b.mp4", "key": None, "label": None, "split": None, "start_seconds": 4.0, "end_seconds": None},
        {"path": "in/c.mp4", "key": None, "label": "z", "split": None, "start_seconds": None, "end_seconds": None},
    ]
    table = tmp_path / f"clips.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    elif kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        cells = [[f'"{value}"' if value is not None else "" for value in row.values()] for row in rows]
        table.write_text("\n".join(",".join(row) for row in [list(rows[0]), *cells]))
    clips = discover(DiscoverConfig(str(table), split="else"))
    assert [(clip.key, clip.split, clip.label, clip.start_seconds, clip.end_seconds, clip.reason) for clip in clips] == [
        ("b_1500_4000", "else", None, 1.5, 4.0, None),
        ("b_4000", "else", None, 4.0, None, None),
        ("c", "else", "z", None, None, "missing"),
        ("first", "test", "x, y", None, None, None),
    ]
    assert clips[0].source == clips[1].source == str(tmp_path / "in/b.mp4")
    # The same table of a folder whose files lie elsewhere.
    moved = discover(DiscoverConfig(str(tmp_path / "in"), listing=str(table), split="else"))
    assert [(clip.key, clip.start_seconds, clip.reason) for clip in moved] == [(clip.key, clip.start_seconds, clip.reason) for clip in clips]


def test_a_table_of_objects(s3: S3, tmp_path: Path) -> None:
    _put(s3.url, "in/a.mp4", "in/b.mp4")
    urls = [f"{s3.url}/in/{name}.mp4" for name in "abc"]
    pq.write_table(pa.table({"url": urls}), tmp_path / "clips.parquet")
    storage.write_bytes(f"{s3.url}/lists/clips.parquet", (tmp_path / "clips.parquet").read_bytes())
    for source in (str(tmp_path / "clips.parquet"), f"{s3.url}/lists/clips.parquet"):
        clips = discover(DiscoverConfig(source))
        assert [(clip.key, clip.source, clip.size, clip.reason) for clip in clips] == [
            ("a", urls[0], 8, None),
            ("b", urls[1], 8, None),
            ("c", urls[2], None, "missing"),
        ]


def test_names_by_place_where_they_alone_do_not_tell(tmp_path: Path) -> None:
    _touch(tmp_path / "in", "x/same.mp4", "y/same.mp4", "eval_segments/-7tYmeOmsRg_0_10000.mp4")
    (tmp_path / "list.txt").write_text("y/same\n./eval_segments/-7tYmeOmsRg_0_10000\nelsewhere/-7tYmeOmsRg_0_9000.mp4\n")
    clips = discover(DiscoverConfig(str(tmp_path / "in"), listing=str(tmp_path / "list.txt")))
    assert _rows(clips, tmp_path / "in") == [
        ("-7tYmeOmsRg_0_10000", "eval_segments/-7tYmeOmsRg_0_10000.mp4", None),
        ("-7tYmeOmsRg_0_10000", "eval_segments/-7tYmeOmsRg_0_10000.mp4", "duplicate_key"),
        ("same", "y/same.mp4", None),
    ]


GREATEST = ["2015-02-16-16-49-06", "2015-09-29-14-34-21-197", "2015-03-25-01-01-53"]


@pytest.fixture
def greatest_hits(tmp_path: Path) -> Path:
    """Videos of Greatest Hits, of which the last lacks its times, with the lists that are published with them."""
    root = tmp_path / "vis-data"
    _touch(root, *(f"{name}_{sound}.mp4" for name in GREATEST for sound in ("denoised", "mic")))
    (root / f"{GREATEST[0]}_times.txt").write_text("0.5 wood hit static\n\n1.387521 None scratch None\n1.39 cloth hit deform\n")
    (root / f"{GREATEST[1]}_times.txt").write_text("7.059 grass hit rigid-motion\r\n")
    (root / "train.txt").write_text(f"{GREATEST[0]}\n2016-01-01-00-00-00\n")
    (root / "test.txt").write_text(f"{GREATEST[1]}\n")
    return root


def test_greatest_hits_is_cut_at_its_hits(greatest_hits: Path) -> None:
    clips = discover(DiscoverConfig(str(greatest_hits), layout="greatest_hits"))
    first, second = (f"{name}_denoised" for name in GREATEST[:2])
    assert [(clip.key, clip.split, clip.label, clip.start_seconds, clip.end_seconds, clip.reason) for clip in clips] == [
        (f"{second}_177", "test", "grass hit", 6.059, 8.059, None),
        (f"{first}_13", "train", "wood hit", 0.0, 1.5, None),
        (f"{first}_35", "train", "scratch", 0.387521, 2.387521, None),
        (f"{first}_35", "train", "cloth hit", 0.39, 2.39, "duplicate_key"),
        ("2016-01-01-00-00-00_denoised", "train", None, None, None, "missing"),
    ]
    assert {Path(clip.source).name for clip in clips[1:4]} == {f"{first}.mp4"}
    longer = discover(DiscoverConfig(str(greatest_hits), layout="greatest_hits", listing="none", cut_seconds=5.0, recording="mic"))
    assert [(clip.key, clip.start_seconds, clip.end_seconds, clip.reason, Path(clip.source).name) for clip in longer][-2:] == [
        (f"{GREATEST[2]}_mic", None, None, "missing", f"{GREATEST[2]}_mic.mp4"),
        (f"{GREATEST[1]}_mic_177", 4.559, 9.559, None, f"{GREATEST[1]}_mic.mp4"),
    ]
    assert "_times.txt beside it does not say" in (longer[-2].message or "")
    whole = discover(DiscoverConfig(str(greatest_hits), layout="greatest_hits", listing="none", cut_seconds=0.0, test_fraction=0.34))
    assert (
        sorted(clip.key for clip in whole) == sorted(f"{name}_denoised" for name in GREATEST) and Counter(clip.split for clip in whole)["test"] == 1
    )


def test_greatest_hits_by_the_lists_of_those_who_cut_it(greatest_hits: Path, tmp_path: Path) -> None:
    header = "filename,start_time,occurring_time,end_time,material,action_type,effect\n"
    (tmp_path / "greatesthit.csv").write_text(f"{header}{GREATEST[2]}_denoised_56.mp4,1.217687999,2.217688,3.217688001,cloth,hit,None\n")
    wanted = (f"{GREATEST[2]}_denoised_56", "cloth hit", 1.217688, 3.217688)
    layouts: list[Literal["any", "greatest_hits"]] = ["any", "greatest_hits"]
    for layout in layouts:
        (clip,) = discover(DiscoverConfig(str(greatest_hits), layout=layout, listing=str(tmp_path / "greatesthit.csv")))
        assert (clip.key, clip.label, clip.start_seconds, clip.end_seconds) == wanted and clip.source.endswith("53_denoised.mp4")
    # By sample at 22.05 kHz and by seconds, as CondFoleyGen names two seconds of a video.
    (tmp_path / "test.json").write_text(json.dumps([f"{GREATEST[2]}_19844", f"{GREATEST[0]}_7.5333", f"{GREATEST[0]}_denoised_13"]))
    clips = discover(DiscoverConfig(str(greatest_hits), layout="greatest_hits", listing=str(tmp_path / "test.json")))
    assert [(clip.key, clip.start_seconds, clip.end_seconds) for clip in clips] == [
        (f"{GREATEST[0]}_7_5333", 7.5333, 9.5333),
        (f"{GREATEST[0]}_denoised_13", 0.0, 1.5),
        (f"{GREATEST[2]}_19844", 0.899955, 2.899955),
    ]
    (tmp_path / "bad.txt").write_text("video_1\n")
    with pytest.raises(ValueError, match="'video_1' names no video of Greatest Hits"):
        discover(DiscoverConfig(str(greatest_hits), layout="greatest_hits", listing=str(tmp_path / "bad.txt")))


def test_greatest_hits_that_is_cut_already(tmp_path: Path) -> None:
    _touch(tmp_path / "in", *(f"{GREATEST[0]}_denoised_{frame}.mp4" for frame in (35, 9)))
    (tmp_path / "greatesthit_test.txt").write_text(f"{GREATEST[0]}\n{GREATEST[1]}\n")
    clips = discover(DiscoverConfig(str(tmp_path / "in"), layout="greatest_hits", listing=str(tmp_path)))
    assert [(clip.key, clip.start_seconds, clip.reason) for clip in clips] == [
        (f"{GREATEST[0]}_denoised_35", None, None),
        (f"{GREATEST[0]}_denoised_9", None, None),
        (f"{GREATEST[1]}_denoised", None, "missing"),
    ]


def test_no_video_of_greatest_hits_is_in_two_splits(tmp_path: Path) -> None:
    names = [f"2015-01-01-00-00-{n:02d}" for n in range(11)]
    _touch(tmp_path, *(f"{name}_denoised.mp4" for name in names))
    for name in names:
        (tmp_path / f"{name}_times.txt").write_text("".join(f"{second} wood hit static\n" for second in range(1, 8)))
    clips = discover(DiscoverConfig(str(tmp_path), layout="greatest_hits", validation_fraction=0.2, test_fraction=0.3))
    assert len(clips) == 77 and Counter(clip.split for clip in clips) == {"train": 42, "validation": 14, "test": 21}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "clips", "listing": "empty.csv.gz"}, "no clips in"),
        ({"source": "names.csv"}, "give their folder as source, and this as listing"),
        ({"source": "clips/a.mp4", "layout": "greatest_hits"}, "no folder; layout=greatest_hits reads"),
        ({"source": "clips", "layout": "greatest_hits", "cut_seconds": -1.0}, "cut_seconds is -1.0"),
        ({"source": "hits", "layout": "greatest_hits"}, r"2015-01-01-00-00-00_times\.txt, line 2: '1 wood'"),
        ({"source": "urls.csv"}, "'ftp://a/b.mp4' is no path that can be used"),
    ],
)
def test_errors_of_lists_and_layouts_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    _touch(tmp_path, "clips/a.mp4", "hits/2015-01-01-00-00-00_denoised.mp4")
    Path("empty.csv.gz").write_bytes(gzip.compress(b"filename,start,desc,split\n"))
    Path("names.csv").write_text(CSV)
    Path("hits/2015-01-01-00-00-00_times.txt").write_text("1.0 wood hit None\n1 wood\n")
    Path("urls.csv").write_text("url\nftp://a/b.mp4\n")
    with pytest.raises(ValueError, match=says):
        discover(DiscoverConfig(**options))


def test_how_much_of_a_list_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _touch(tmp_path / "clips", "---g-f_I2yQ_000001.mp4", "ZYc410CE4Rg_0_4000.webm")
    (tmp_path / "clips/vggsound.csv").write_text(CSV)
    settle_here(str(tmp_path / "out"), discover, [DiscoverConfig(str(tmp_path / "clips"))], Options(clips_per_shard=2))
    plan = Plan(tmp_path / "out")
    assert (plan.missing(), plan.clips) == (2, 5)
    assert listed_text(plan.clips, plan.missing()) == "3 of 5 listed clips are there, 2 missing"
    summary = Summary(ok=2, failed=3, reasons=Counter(missing=2, duplicate_key=1))
    finish(summary, [], stage="reencode", out="OUT", max_failed_fraction=1.0)
    assert capsys.readouterr().out.startswith("reencode: 3 of 5 listed clips are there, 2 missing\n")


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
