"""The report is true to the dataset, and the command says what is wrong in one line."""

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from shards import facts, inspect, ledger
from shards.dataset import create_or_check, new_info
from shards.inspect import size_text
from shards.read import Index
from shards.view import write_view
from shards.write import Entry, json_bytes, write_shard
from tests.made_ledgers import clips_of, made_up_keys, write_dataset


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


def test_scores(root, capsys):
    known = {"key": ["same", "clip_1", "elsewhere"], "loudness": [-20.0, -31.5, 0.0], "cuts": [3, None, 7], "speech": [True, False, True]}
    said = {"speech.error": [None, "ValueError: odd", "ValueError: not of this dataset"], "speech.shard_sha256": ["a", "b", "c"]}
    pq.write_table(pa.table(known | said), root / "scores.parquet")
    status, out, _ = report(capsys, root)
    assert status == 0 and cells(out, "loudness") == ["loudness", "2", "-31.5", "-25.75", "-20"]
    assert cells(out, "cuts") == ["cuts", "1", "3", "3", "3"] and cells(out, "speech") == ["speech", "2", "50.0% true"]
    assert "speech failed on 1 clips, for example: ValueError: odd" in out and "shard_sha256" not in out
    _, out, _ = report(capsys, root, "split=val")
    assert cells(out, "loudness")[1] == "1" and cells(out, "cuts")[1:] == ["1", "3", "3", "3"]
    (root / "scores.parquet").write_bytes(b"no parquet")
    status, _, err = report(capsys, root)
    assert status == 2 and "scores.parquet is not readable" in err


def test_a_view_shows_its_own_rows_and_how_they_were_chosen(root, tmp_path, capsys):
    index = Index.open(root)
    lost = {field.name: None for field in index.table.schema} | {"key": "lost", "split": "val", "status": "failed", "reason": "missing"}
    kept = index.table.filter(pc.field("key") == "clip_1")
    write_view(tmp_path / "view", index, pa.concat_tables([kept, pa.Table.from_pylist([lost], schema=kept.schema)]), selection=["list=a.txt"])
    pq.write_table(pa.table({"key": ["clip_1"], "loudness": [-31.5], "cuts": [2]}), root / "scores.parquet")
    pq.write_table(pa.table({"key": ["clip_1"], "cuts": [5]}), tmp_path / "view" / "scores.parquet")
    status, out, _ = report(capsys, tmp_path / "view")
    assert status == 0 and "view" in cells(out, "view")[0] and str(root) in out and "  list=a.txt" in out
    size = sum(int(members.size[index.row("clip_1")]) for members in index.members.values())
    assert cells(out, "train")[1:] == ["1", "0", "0.500", size_text(size), size_text(size)]
    assert cells(out, "val")[1:3] == ["0", "1"] and cells(out, "missing")[1] == "1"
    assert cells(out, "loudness")[2] == "-31.5" and cells(out, "cuts")[2] == "5"  # its own before its parent's
    assert cells(out, "train-000001")[1:3] == ["1", "0"] and "train-000000" not in out
    assert report(capsys, tmp_path / "view", "key=clip_1")[0] == 0


def test_facts_are_those_of_the_rows_counted_one_by_one(tmp_path):
    write_dataset(tmp_path, clips_of(made_up_keys(997)), width=3, clips_per_shard=64)
    index, found = Index.open(tmp_path), ledger.listing(tmp_path)
    rows = list(index.rows())
    assert 0 < index.failed < 100 and len(rows) == 997

    def counts(name, status):
        return Counter(row[name] for row in rows if row["status"] == status)

    ok, failed = counts("split", "ok"), counts("split", "failed")
    seconds, shards = Counter(), {}
    for row in rows:
        seconds[row["split"]] += row["duration_seconds"] or 0
        shards.setdefault(row["split"], set()).add(row["shard"])
    *parts, whole = facts.splits(index, found)
    assert [part.name for part in parts] == sorted(ok)
    for part in parts:
        size = sum((tmp_path / f"{shard}.tar").stat().st_size for shard in shards[part.name])
        assert (part.ok, part.failed, part.bytes) == (ok[part.name], failed[part.name], size) and abs(part.seconds - seconds[part.name]) < 1e-6
    assert (whole.name, whole.ok, whole.failed) == ("all", index.ok, index.failed) and whole.bytes == sum(part.bytes for part in parts)

    ok, failed = counts("label", "ok"), counts("label", "failed")
    classes = facts.classes(index)
    assert {fact.label: (fact.ok, fact.failed) for fact in classes} == {label: (ok[label], failed[label]) for label in {*ok, *failed}}
    assert [fact.ok for fact in classes] == sorted((fact.ok for fact in classes), reverse=True)

    reasons = counts("reason", "failed")
    failures = facts.failures(index, examples=3)
    assert {fact.reason: fact.clips for fact in failures} == dict(reasons) and [fact.clips for fact in failures] == sorted(
        reasons.values(), reverse=True
    )
    for fact in failures:
        assert fact.examples == tuple((row["source"], row["message"]) for row in rows if row["reason"] == fact.reason)[:3]

    ok, failed, size = counts("shard", "ok"), counts("shard", "failed"), Counter()
    for row in rows:
        size[row["shard"]] += sum(row[name] or 0 for name in row if name.endswith(".size"))
    told = facts.shards(index, found)
    assert [fact.name for fact in told] == list(dict.fromkeys(row["shard"] for row in rows))
    assert all((fact.ok, fact.failed, fact.bytes) == (ok[fact.name], failed[fact.name], size[fact.name]) for fact in told)
    assert {(fact.name, fact.sha256) for fact in told} == {(row["shard"], row["shard_sha256"]) for row in rows}


def test_as_a_command(root):
    done = subprocess.run([sys.executable, "-m", "shards.inspect", root, "key=lost_0"], capture_output=True, text=True, check=True)
    assert "missing" in done.stdout
