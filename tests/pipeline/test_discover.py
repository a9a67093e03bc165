"""Discovery from made folders, lists and csvs, on disk and in object storage, and from the heads of the published lists where they are."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs import storage
from pipeline import discover as discovering
from pipeline.discover import Clip, DiscoverConfig, discover, discovery, key_of
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
    monkeypatch.setattr(discovering, "LISTED_ALWAYS", listed_always)
    monkeypatch.setattr(discovering, "LISTED_PER_WANTED", 0)
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
