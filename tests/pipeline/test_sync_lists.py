"""Lists by their headers, made small here; the published ones where they are."""

from pathlib import Path

import pytest

from pipeline.sync_lists import Listed, by_name, present, read_classes, read_list


def _write(folder: Path, text: str, name: str = "list.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_fixed_offsets_by_the_names_of_their_columns(tmp_path: Path) -> None:
    rows = "---g-f_I2yQ_1000_11000,0.4,3.44\neval/--BfvyPmVMo_20000_30000,-0.8,1.04\npretrain/0Fi83BHQsMA/00002,2.0,0.0\n"
    found = [
        Listed("---g-f_I2yQ_1000_11000", 3.44, 0.4),
        Listed("--BfvyPmVMo_20000_30000", 1.04, -0.8),
        Listed("0Fi83BHQsMA_00002", 0.0, 2.0),
    ]
    assert read_list(_write(tmp_path, "path,offset_sec,vstart_sec\n" + rows)) == found
    assert read_list(_write(tmp_path, "\ufeffvstart_sec,path,offset_sec,more\n3.44,a/---g-f_I2yQ_1000_11000.mp4,0.4,x\n\n")) == found[:1]
    assert read_list(_write(tmp_path, "path,offset_sec,v_start_sec\n" + rows)) == found
    assert all(listed.fixed for listed in found)


def test_one_clip_at_several_places(tmp_path: Path) -> None:
    rows = "path,offset_sec,vstart_sec\na,0.4,1.0\na,-0.4,1.0\na,0.4,1.0\n"
    assert read_list(_write(tmp_path, rows)) == [Listed("a", 1.0, 0.4), Listed("a", 1.0, -0.4)]


def test_of_the_sparse_lists_what_is_in_sync_and_there(tmp_path: Path) -> None:
    with_offsets = "dataset_name,video_id,vstart_sec,offset_sec,is_sync\nv,-7tYmeOmsRg_58000_68000,4.64,-1.0,1\nv,ab_cdefg_-1_0_10000,0,0,0\n"
    assert read_list(_write(tmp_path, with_offsets)) == [Listed("-7tYmeOmsRg_58000_68000", 4.64, -1.0)]
    clean = "dataset_name,video_id,start_sec,vid_is_missing,is_sync,is_sync_by_cls_obj\nv,-7tYmeOmsRg,58,0,1,0\nv,b,1,1,1,1\nv,c,1,0,0,1\n"
    assert read_list(_write(tmp_path, clean)) == [Listed("-7tYmeOmsRg_58000_68000")]


def test_lists_that_leave_the_offsets_open(tmp_path: Path) -> None:
    assert read_list(_write(tmp_path, "b\na\npretrain/0Fi83BHQsMA/00002\n", "ids.txt")) == [Listed("b"), Listed("a"), Listed("0Fi83BHQsMA_00002")]
    assert read_list(_write(tmp_path, 'ab_cdefg_-1,242,"alarm clock, ringing",test\n')) == [Listed("ab_cdefg_-1_242000_252000")]
    assert read_list(_write(tmp_path, '# comment\n--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0jbk"\n')) == [Listed("--4gqARaEJE_0_10000")]


def test_a_listed_clip_is_found_by_its_start() -> None:
    keys = by_name(["ZYc410CE4Rg_0_4000", "plain", "ZYc410CE4Rg_30000_40000"])
    assert [present(key, keys) for key in ("plain", "ZYc410CE4Rg_0_10000", "ZYc410CE4Rg_30000_40000", "ZYc410CE4Rg_1000_11000", "plai")] == [
        "plain",
        "ZYc410CE4Rg_0",
        "ZYc410CE4Rg_30000_40000",
        None,
        None,
    ]
    assert keys["ZYc410CE4Rg_0"] == 0 and keys["plain"] == 1


def test_classes(tmp_path: Path) -> None:
    assert read_classes(_write(tmp_path, "class\tis_sparse\nbee, wasp, etc. buzzing\tn\nchopping wood\ty\n")) == ["chopping wood"]
    assert read_classes(_write(tmp_path, "dog barking\nbee, wasp, etc. buzzing\n\n", "classes.txt")) == ["dog barking", "bee, wasp, etc. buzzing"]
    with pytest.raises(ValueError, match="marks no classes"):
        read_classes(_write(tmp_path, "class\tis_sparse\na\tn\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,offset_sec,vstart_sec\na,0.4,1.0\nb,0.4\n", "line 3: .*expected path, offset_sec, vstart_sec"),
        ("path,offset_sec,vstart_sec\na,later,1.0\n", "line 2: .*expected offset_sec in seconds"),
        ("path,offset_sec,vstart_sec\na,0.4,-0.2\n", "line 2: .*at least 0"),
        ("path,offset_sec,vstart_sec\na,4.48,0.0\n", "line 2: .*from -2 to 2"),
        ("path,offset_sec,vstart_sec\n", "lists no clips"),
        ("file,start_sec\na,4.64\n", "no offsets; expected path, offset_sec"),
        ("dataset_name,video_id,start_sec,vid_is_missing,is_sync\nv,b,1.5,0,1\n", "line 2: .*whole seconds"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_list(_write(tmp_path, text))


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_list(str(tmp_path / "nothing.csv"))
    (tmp_path / "noise.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="not a text file"):
        read_list(str(tmp_path / "noise.csv"))


def test_the_published_lists(shared: Path) -> None:
    folder = shared / "datasets/synchformer"
    fixed = read_list(str(folder / "fixed_offsets_vggsound_test_size21_crop5.csv"))
    assert len(fixed) == 14022 and fixed[0] == Listed("---g-f_I2yQ_1000_11000", 3.44, 0.4) and len({listed.key for listed in fixed}) == 14022
    sparse = read_list(str(folder / "vggsound_sparse_clean_fixed_offsets.csv"))
    assert len(sparse) == len({listed.key for listed in sparse}) == 444 and all(listed.fixed for listed in sparse)
    clean = read_list(str(folder / "vggsound_sparse_clean.csv"))
    assert len(clean) == 457 and {listed.key for listed in sparse} < {listed.key for listed in clean}
    assert len(read_classes(str(folder / "picked_sparse_classes.csv"))) == 12
    assert len(read_list(str(shared / "datasets/vggsound/vggsound_test.txt"))) == 14511
