"""Every form of list, made small here; the published ones, with exact counts, where they are."""

import gzip
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import storage
from pipeline.lists import ListedClip, by_name, key_of, name_of, present, read_listing, split_of
from tests.s3 import S3

LISTS = Path(__file__).parents[3] / "shared/datasets"


def _write(folder: Path, text: str, name: str = "list.csv") -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode())
    return str(folder / name)


VGGSOUND = [
    ListedClip("-0BIyqJj9ZU_30000", "-0BIyqJj9ZU_30000_40000", "people eating, noodle", "train"),
    ListedClip("---g-f_I2yQ_1000", "---g-f_I2yQ_1000_11000", "people marching", "test"),
]
ROWS = '-0BIyqJj9ZU,30,"people eating, noodle",train\n---g-f_I2yQ,1,people marching,test\n'


@pytest.mark.parametrize(
    "text",
    [
        ROWS,
        ROWS.replace("\n", "\r\n"),
        "\ufeff" + ROWS,
        "filename,start,desc,split\n" + ROWS,
        "\ufeffFilename, Start, Desc, Split\r\n\r\n" + ROWS.replace("\n", "\r\n"),
        '# a comment\nsplit,label,start,youtube_id\ntrain,"people eating, noodle",30,-0BIyqJj9ZU\ntest,people marching,1,---g-f_I2yQ\n',
        ROWS.rstrip(),
    ],
)
def test_vggsounds_csv_with_and_without_a_header(tmp_path: Path, text: str) -> None:
    assert read_listing(_write(tmp_path, text)) == VGGSOUND
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert read_listing(str(tmp_path / "packed.csv.gz")) == VGGSOUND


def test_rows_that_do_not_say_their_split_have_the_one_that_is_given(tmp_path: Path) -> None:
    without = "aaaaaaaaaaa,1,x\nbbbbbbbbbbb,2,y,\nccccccccccc,3,z,test\n"
    assert [row.split for row in read_listing(_write(tmp_path, without), split="else")] == ["else", "else", "test"]
    assert [row.split for row in read_listing(_write(tmp_path, "filename,start\naaaaaaaaaaa,1\n"), split="else")] == ["else"]


def test_audiosets_csv_and_split_files(tmp_path: Path) -> None:
    rows = '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n-0BIyqJj9ZU, 30.000, 38.290, "/t/x"\n'
    text = f"# YTID, start_seconds, end_seconds, positive_labels\n{rows}"
    assert read_listing(_write(tmp_path, text), split="test") == [
        ListedClip("--4gqARaEJE_0", "--4gqARaEJE_0_10000", "/m/068hy,/m/07q6cd_", "test"),
        ListedClip("-0BIyqJj9ZU_30000", "-0BIyqJj9ZU_30000_38290", "/t/x", "test"),
    ]
    headed = read_listing(_write(tmp_path, "YTID,start_seconds,end_seconds,positive_labels\n" + rows), split="test")
    assert headed == read_listing(_write(tmp_path, text), split="test")
    (row,) = read_listing(_write(tmp_path, "youtube_id,start_seconds,label\n-0BIyqJj9ZU,30,x\n"))
    assert row == ListedClip("-0BIyqJj9ZU_30000", "-0BIyqJj9ZU_30000_40000", "x", "train")
    (row,) = read_listing(_write(tmp_path, "eval_segments/q8Gkn9hvejY_0_8000\n", "audioset_test.txt"))
    assert (row.clip_id, row.key, row.path) == ("q8Gkn9hvejY_0_8000", "q8Gkn9hvejY_0_8000", "eval_segments/q8Gkn9hvejY_0_8000")


def test_starts_and_offsets(tmp_path: Path) -> None:
    starts = read_listing(_write(tmp_path, "file,start_sec\n-7tYmeOmsRg_58000_68000,4.64\nab.mp4,0\n"))
    assert [(row.key, row.start_seconds, row.cut, row.path) for row in starts] == [
        ("-7tYmeOmsRg_58000_68000", 4.64, None, "-7tYmeOmsRg_58000_68000"),
        ("ab", 0.0, None, "ab.mp4"),
    ]
    fixed = read_listing(_write(tmp_path, "path,offset_sec,v_start_sec\neval/--BfvyPmVMo_20000_30000,-0.8,1.04\n"))
    assert [(row.key, row.start_seconds, row.offset_seconds) for row in fixed] == [("--BfvyPmVMo_20000_30000", 1.04, -0.8)]
    clean = "dataset_name,video_id,start_sec,vid_is_missing,is_sync,is_sync_by_cls_obj\nv,-7tYmeOmsRg,58,0,1,0\nv,b,1,1,1,1\nv,c,1,0,0,1\n"
    assert read_listing(_write(tmp_path, clean)) == [ListedClip("-7tYmeOmsRg_58000", "-7tYmeOmsRg_58000_68000", None, "train")]


VAS = {"filepath": "/somewhere/VAS/dog/videos/video_02677.mp4", "duration": 6.4, "audio_fps": 44100, "video_fps": 21.5, "pix_fmt": "yuv420p"}


def test_vas_by_jsonl_and_by_lines(tmp_path: Path) -> None:
    jsonl = json.dumps(VAS) + "\n\n" + json.dumps({**VAS, "filepath": "a/baby/video_00001.mp4"}) + "\r\n"
    expected = [("dog_video_02677", "dog"), ("baby_video_00001", "baby")]
    assert [(row.key, row.label) for row in read_listing(_write(tmp_path, jsonl, "test/data.jsonl"))] == expected
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    assert [(row.key, row.label) for row in read_listing(str(tmp_path / "data.jsonl.gz"))] == expected
    lines = "dog/video_02677\nbaby/video_00001\n"
    assert [(row.key, row.label) for row in read_listing(_write(tmp_path, lines, "vas_valid.txt"))] == expected
    described = {"filepath": "/x/ab_cdefg_-1_0_10000.mp4", "description": "dog, barking"}
    (row,) = read_listing(_write(tmp_path, json.dumps(described), "one.jsonl"))
    assert row == ListedClip("ab_cdefg_-1_0_10000", "ab_cdefg_-1_0_10000", "dog, barking", "train", path="/x/ab_cdefg_-1_0_10000.mp4")


def test_greatest_hits_csv(tmp_path: Path) -> None:
    text = (
        "filename,start_time,occurring_time,end_time,material,action_type,effect\n"
        "2015-09-29-14-34-21-197_denoised_35.mp4,0.387520999,1.387521,2.387521001,grass,scratch,scatter\n"
        "2015-03-25-01-01-53_denoised_56.mp4,1.2,2.2,3.2,None,hit,None\n"
    )
    name = "2015-09-29-14-34-21-197_denoised"
    found = read_listing(_write(tmp_path, text))
    assert found[0] == ListedClip(f"{name}_35", f"{name}_35", "grass scratch", "train", path=f"{name}.mp4", cut=(0.387521, 2.387521))
    assert found[1].label == "hit"


def test_tables_with_paths(tmp_path: Path) -> None:
    columns = {
        "url": ["s3://b/x/one.mp4", "two.webm", "three.mp4", "four.mp4"],
        "label": ["a, b", None, "", "c"],
        "split": ["test", None, "train", "train"],
        "start_seconds": [None, None, 1.5, 2.0],
        "end_seconds": [None, None, None, 4.25],
        "video_bytes": [b"not read"] * 4,
    }
    pq.write_table(pa.table(columns), tmp_path / "clips.parquet")
    expected = [
        ListedClip("one", "one", "a, b", "test", path="s3://b/x/one.mp4"),
        ListedClip("two", "two", None, "else", path="two.webm"),
        ListedClip("three", "three_1500", None, "train", 1.5, path="three.mp4", cut=(1.5, None)),
        ListedClip("four", "four_2000_4250", "c", "train", 2.0, path="four.mp4", cut=(2.0, 4.25)),
    ]
    assert read_listing(str(tmp_path / "clips.parquet"), split="else") == expected
    text = 'url,label,split,start_seconds,end_seconds\ns3://b/x/one.mp4,"a, b",test,,\ntwo.webm,,,,\nthree.mp4,,train,1.5,\nfour.mp4,c,train,2,4.25\n'
    assert read_listing(_write(tmp_path, text), split="else") == expected
    (keyed,) = read_listing(_write(tmp_path, "file\tkey\tend_seconds\nx/a b.mp4\tmine.2\t3\n", "list.tsv"))
    assert keyed == ListedClip("a b", "mine_2", None, "train", path="x/a b.mp4", cut=(0.0, 3.0))
    assert read_listing(_write(tmp_path, "key\n-x\n")) == [ListedClip("-x", "-x", None, "train")]


def test_json_lists_and_scores(tmp_path: Path) -> None:
    names = ["2015-09-12-04-38-02-78_19844", "a/b c.mp4"]
    expected = [("2015-09-12-04-38-02-78_19844", "2015-09-12-04-38-02-78_19844"), ("b c", "b_c")]
    for text in (json.dumps(names), json.dumps(dict.fromkeys(names, 0.25)), json.dumps([{"path": name} for name in names])):
        assert [(row.clip_id, row.key) for row in read_listing(_write(tmp_path, text, "list.json"))] == expected


def test_a_folder_of_split_files(tmp_path: Path) -> None:
    for name, text in {
        "x_train.txt": "a\nb\n",
        "x_valid.txt": "c\r\n",
        "x-test.csv": "aaaaaaaaaaa,1,x\n",
        "x_predict.txt": "a\n",
        "x.csv": "no\n",
    }.items():
        _write(tmp_path, text, f"splits/{name}")
    _write(tmp_path, "", "splits/a_test.mp4")
    assert {(row.key, row.split) for row in read_listing(str(tmp_path / "splits"))} == {
        ("a", "train"),
        ("b", "train"),
        ("c", "validation"),
        ("aaaaaaaaaaa_1000_11000", "test"),
    }
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no split files"):
        read_listing(str(tmp_path / "none"))
    assert [split_of(name) for name in ("s3://b/greatesthit_val.txt", "train.txt", "2015-03-25-01-01-53_times.txt", "atrain.txt", "test")] == [
        "validation",
        "train",
        None,
        None,
        None,
    ]


def test_a_list_in_object_storage(s3: S3) -> None:
    storage.write_bytes(f"{s3.url}/lists/x_train.txt", b"\xef\xbb\xbf-a\n")
    storage.write_bytes(f"{s3.url}/lists/x_test.csv", ROWS.encode())
    assert read_listing(f"{s3.url}/lists/x_train.txt") == [ListedClip("-a", "-a", None, "train")]
    assert [(row.key, row.split) for row in read_listing(f"{s3.url}/lists")] == [
        ("-0BIyqJj9ZU_30000_40000", "train"),
        ("---g-f_I2yQ_1000_11000", "test"),
        ("-a", "train"),
    ]


def test_names() -> None:
    assert [
        name_of(path) for path in ("a.b.mp4", "x/y.WEBM", "x.y/z", "test/abcdefghijk/00001.mp4", "a/test/dog/video_00001", "z/gun/video_00001.mp4")
    ] == [
        "a.b",
        "y",
        "z",
        "abcdefghijk_00001",
        "dog_video_00001",
        "gun_video_00001",
    ]


def test_a_listed_clip_is_found_by_its_start() -> None:
    keys = by_name(["ZYc410CE4Rg_0_4000", "plain", "ZYc410CE4Rg_30000_40000"])
    assert [present(key, keys) for key in ("plain", "ZYc410CE4Rg_0_10000", "ZYc410CE4Rg_000030", "ZYc410CE4Rg_1000_11000", "plai")] == [
        "plain",
        "ZYc410CE4Rg_0",
        "ZYc410CE4Rg_30000",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("l.csv", "aaaaaaaaaaa,1,x,train\nbbbbbbbbbbb,two,x,train\n", "line 2: .*expected `youtube id"),
        ("l.csv", "aaaaaaaaaaa,one,x,train\n", "line 1: .*expected `youtube id"),  # no header either
        ("l.csv", "aaaaaaaaaaa,1,people eating, noodle,train\n", "line 1: .*expected `youtube id"),
        ("l.csv", "filename,start,desc,split\naaaaaaaaaaa,1.5,x,train\n", "line 2: .*whole seconds"),
        ("l.csv", "filename,start,desc,split\naaaaaaaaaaa,1,a, b,train\n", "line 2: .*expected filename, start, desc, split"),
        ("l.csv", 'aaaaaaaaaaa,1,"x,train\nbbbbbbbbbbb,2,x,train\n', "line 2: .*closed quotes"),
        ("l.csv", "ytid,start_seconds,end_seconds\naaaaaaaaaaa,1,x\n", "line 2: .*start and end in seconds"),
        ("l.csv", "file,start_sec\na,-1\n", "line 2: .*start_sec of at least 0"),
        ("l.csv", "file,start_sec\na,nan\n", "line 2: .*start_sec in seconds"),
        ("l.csv", "path,start_seconds,end_seconds\na,2,1\n", "line 2: .*greater end_seconds"),
        ("l.csv", "path,label\n,x\n", "line 2: .*a column key, or one of path"),
        ("l.jsonl", '{"path": "a"}\n{"path": \n', "line 2 is no json"),
        ("l.jsonl", '{"duration": 3}\n', "line 1: .*one of path"),
        ("l.jsonl", "[1]\n", "line 1: .*expected an object"),
        ("l.json", "3", "neither a list nor an object"),
        ("l.json", "[3]", "entry 1: 3; expected the name"),
        ("l.parquet", "no parquet", "not readable as parquet"),
        ("l.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("l.csv.gz", "not packed", "cannot be unpacked"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_listing(_write(tmp_path, text, name))


@pytest.mark.parametrize("name", ["l.csv", "l.csv.gz", "l.jsonl", "l.json", "l.parquet", "l.txt"])
def test_damaged_lists_are_errors_of_the_user(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table({"url": ["a", "b"], "start_seconds": [1.0, None]}), tmp_path / name)
    else:
        text = {"l.jsonl": json.dumps(VAS), "l.json": '["a", {"path": "b.mp4"}]'}.get(name, ROWS).encode()
        (tmp_path / name).write_bytes(gzip.compress(text, mtime=0) if name.endswith("gz") else text)
    data, random, read = (tmp_path / name).read_bytes(), Random(3), 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[random.randrange(len(data))] ^= 1 << random.randrange(8)
        (tmp_path / name).write_bytes(damaged[: random.choice([len(data), random.randrange(len(data))])])
        with suppress(ValueError):
            read += len(read_listing(str(tmp_path / name))) >= 0
    assert read < 100


def test_columns_that_say_nothing_of_clips(tmp_path: Path) -> None:
    pq.write_table(pa.table({"score": [0.5], "name": ["a"]}), tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="has the columns score, name; expected key, or one of path"):
        read_listing(str(tmp_path / "scores.parquet"))


@pytest.fixture(scope="module")
def lists() -> Path:
    """The published lists, or a skip."""
    if not LISTS.is_dir():
        pytest.skip(f"no lists at {LISTS}")
    return LISTS


def test_the_published_lists_of_visualsound(lists: Path) -> None:
    csv = read_listing(str(lists / "visualsound/visualsound.csv"))
    assert len(csv) == len({row.key for row in csv}) == 91_047 and Counter(row.split for row in csv) == {"train": 85_619, "test": 5_428}
    assert csv[0] == ListedClip("--56QUhyDQM_185000", "--56QUhyDQM_185000_195000", "playing tennis", "train")
    split = read_listing(str(lists / "visualsound"))
    assert Counter(row.split for row in split) == {"train": 77_265, "validation": 8_357, "test": 5_425}
    assert {row.key for row in split} == {row.key for row in csv}


def test_the_published_lists_of_vggsound_and_its_test_sets(lists: Path) -> None:
    split = read_listing(str(lists / "vggsound"))
    assert Counter(row.split for row in split) == {"train": 156_487, "validation": 19_055, "test": 14_511}
    assert len({row.key for row in split}) == len(split) == 190_053
    keys = {row.key for row in split}
    for name, count in {"vggsound_sparse": 444, "vggsound_test": 14_511, "visualsound": 5_425}.items():
        starts = read_listing(str(lists / f"test_sets/{name}.csv"))
        assert len(starts) == len({row.key for row in starts}) == count and all(row.start_seconds is not None for row in starts)
        assert {row.key for row in starts} <= keys or name == "vggsound_sparse"


def test_the_published_lists_of_synchformer(lists: Path) -> None:
    clean = read_listing(str(lists / "synchformer/vggsound_sparse_clean.csv"))
    fixed = read_listing(str(lists / "synchformer/vggsound_sparse_clean_fixed_offsets.csv"))
    assert len(clean) == 457 and len(fixed) == 444 and {row.key for row in fixed} < {row.key for row in clean}
    shifted = read_listing(str(lists / "synchformer/fixed_offsets_vggsound_test_size21_crop5.csv"))
    assert len(shifted) == 14_022 and all(row.offset_seconds is not None for row in shifted)


def test_keys_are_as_webdataset_needs_them() -> None:
    assert key_of("a.b") == "a_b" and key_of("---g-f_I2yQ_1000_11000") == "---g-f_I2yQ_1000_11000"
