"""The report is true to the dataset, and the command says what is wrong in one line."""

import re
import subprocess
import sys

import numpy as np
import pytest

from shards import inspect
from shards.dataset import create_or_check, new_info
from shards.write import Entry, json_bytes, write_shard


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    spec = {"hop_frames": 8, "tower": {"precision": "fp32", "config": {"width": 5}}, "codec": {"name": "encodec24"}}
    create_or_check(root, new_info("features", spec, {"weights": {"tower": "tower.pt"}}))
    for number in range(2):
        write_shard(
            root,
            f"train-{number:06d}",
            [
                Entry(
                    f"clip_{number}",
                    "train",
                    "Glocke",
                    "a.mp4",
                    1800.0,
                    {"avclip.npy": np.full((1, 3 + number, 8, 5), 0.5, np.float16), "encodec24.npy": np.arange(14, dtype=np.uint16).reshape(2, 7)},
                ),
                Entry(f"lost_{number}", "train", None, "lost.mp4", reason="missing", message="no such\nfile"),
            ],
        )
    kept = Entry("same", "val", "bell", "b/same.mp4", 2.0, {"json": json_bytes({"label": "bell", "frames": 50})})
    again = Entry("same", "val", "bell", "c/same.mp4", reason="duplicate_key", message="same key as b/same.mp4")
    write_shard(root, "val-000000", [kept, again])
    (root / "val-000001.tar").write_bytes(b"")
    return root


def report(capsys, *arguments):
    status = inspect.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def cells(text, name):
    """The columns of the line that begins with `name`."""
    return next(re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.match(rf"\s*{re.escape(name)}\b", line))


def test_overview(root, capsys):
    status, out, _ = report(capsys, root)
    assert status == 0
    assert cells(out, "features dataset")[0].endswith("set")
    assert (
        cells(out, "train")[:4] == ["train", "2", "2", "1.000"]
        and cells(out, "val")[:3] == ["val", "1", "1"]
        and cells(out, "all")[:3] == ["all", "3", "3"]
    )
    assert cells(out, "missing") == ["missing", "2", "lost.mp4: no such file"]
    assert cells(out, "duplicate_key")[1:] == ["1", "c/same.mp4: same key as b/same.mp4"]
    assert out.index("missing") < out.index("duplicate_key")
    assert cells(out, "avclip.npy")[1] == "2" and cells(out, "avclip.npy")[-1] == "float16 [1, 3 to 4, 8, 5]"
    assert cells(out, "encodec24.npy")[-1] == "uint16 [2, 7]"
    assert cells(out, "train-000001")[1:3] == ["1", "1"]
    assert "not finished: val-000001;" in out
    assert cells(out, "tower.config.width") == ["tower.config.width", "5"] and cells(out, "weights.tower") == ["weights.tower", '"tower.pt"']
    assert all(line == line.rstrip() for line in out.splitlines())


def test_one_split(root, capsys):
    status, out, _ = report(capsys, root, "split=val")
    assert status == 0 and "train-0" not in out and cells(out, "val")[:3] == ["val", "1", "1"] and "all" not in out.split()
    assert report(capsys, root, "split=test")[0] == 2


def test_many_shards_are_summed_up(root, capsys, monkeypatch):
    monkeypatch.setattr(inspect, "SHOWN_SHARDS", 1)
    _, out, _ = report(capsys, root)
    assert "train-000000" in out and "train-000001" not in out and "... and 2 more" in out


def test_one_sample(root, capsys):
    status, out, _ = report(capsys, root, "key=clip_1")
    assert status == 0 and cells(out, "status")[1] == "ok" and cells(out, "label")[1] == "Glocke"
    assert cells(out, "avclip.npy")[3:] == ["float16 [1, 4, 8, 5]", "0.5 0.5 0.5 0.5 0.5 0.5"]
    assert cells(out, "encodec24.npy")[3:] == ["uint16 [2, 7]", "0 1 2 3 4 5"]
    status, out, _ = report(capsys, root, "key=same")  # the good row and the one that lost to it
    assert status == 0 and "b/same.mp4" in out and "duplicate_key" in out and '"frames": 50' in out


def test_a_failed_key_prints_its_reason(root, capsys):
    status, out, _ = report(capsys, root, "key=lost_1")
    assert status == 0 and cells(out, "reason")[1] == "missing" and "members" not in out


def test_errors_are_one_line(root, capsys, tmp_path):
    for arguments, message in (([root, "key=nobody"], "no sample with key 'nobody'"), ([tmp_path], "no dataset.json"), ([], "dataset=")):
        status, out, err = report(capsys, *arguments)
        assert status == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_a_dataset_without_a_finished_shard(tmp_path, capsys):
    create_or_check(tmp_path / "new", new_info("media", {}))
    status, out, _ = report(capsys, tmp_path / "new")
    assert status == 0 and cells(out, "all")[:3] == ["all", "0", "0"]


def test_as_a_command(root):
    done = subprocess.run([sys.executable, "-m", "shards.inspect", root, "key=lost_0"], capture_output=True, text=True, check=True)
    assert "missing" in done.stdout
