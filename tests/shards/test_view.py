"""Views: some of a dataset's clips without their bytes; and as shards of their own, as if only those had been prepared."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import webdataset

from configs import storage
from shards.dataset import DatasetMismatch, create_or_check, new_info, read_info
from shards.materialise import materialise
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from shards.view import write_view
from shards.write import Entry, json_bytes, totals, write_manifest, write_shard

INFO = new_info(
    "features",
    {"hop_frames": 8, "views": 1, "codec": {"name": "toy", "sample_rate_hz": 24000, "hop_samples": 320, "codebooks": 3, "card": 1024}},
    {"weights": "w.safetensors"},
)


def entry(number, split="train", label="bell"):
    key = f"clip_{number:02d}"
    if number % 7 == 3:
        return Entry(key, split, label, f"{key}.mp4", reason="truncated", message="ends at byte 17")
    rng = np.random.default_rng(number)
    segments = 1 + number % 5
    members = {
        "json": json_bytes({"key": key, "split": split, "label": label, "n": number}),
        "toy.npy": rng.integers(0, 1024, (3, 24 + 24 * segments), dtype=np.uint16),
        "avclip.npy": rng.standard_normal((1, segments, 8, 5)).astype(np.float16),
    }
    return Entry(key, split, label, f"{key}.mp4", duration_seconds=0.64 + 0.32 * (segments - 1), members=members)


def prepare(root, entries, size):
    """What a preparing job writes of these entries."""
    create_or_check(root, INFO)
    by_split: dict[str, list[Entry]] = {}
    for made in sorted(entries, key=lambda made: (made.split, made.key, made.source)):
        by_split.setdefault(made.split, []).append(made)
    for split, members in by_split.items():
        for number, start in enumerate(range(0, len(members), size)):
            write_shard(root, f"{split}-{number:06d}", members[start : start + size])
    write_manifest(root)
    return root


@pytest.fixture
def parent(tmp_path):
    return prepare(tmp_path / "parent", [entry(number, "test" if number > 30 else "train") for number in range(37)], 5)


def chosen(index, numbers):
    return index.table.filter(pc.is_in(index.table["key"], pa.array([f"clip_{number:02d}" for number in numbers])))


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))


def missing_row(key, split, table):
    row = {"key": key, "split": split, "source": key, "status": "failed", "reason": "missing", "message": "listed in a.txt"}
    return pa.Table.from_pylist([{name: row.get(name) for name in table.column_names}], schema=table.schema)


def test_a_view_is_a_dataset_of_the_chosen_clips(tmp_path, parent):
    index = Index.open(parent)
    rows = chosen(index, [33, 2, 10, 1, 21, 36, 5])
    rows = with_column(rows, "split", ["validation" if k < "clip_06" else "train" for k in rows["key"].to_pylist()])
    write_view(tmp_path / "view", index, pa.concat_tables([rows.take([6, 2, 4, 0, 1, 3, 5]), missing_row("gone", "train", rows)]), selection=["a"])
    view = Index.open(tmp_path / "view", kind="features", fingerprint=INFO.fingerprint)
    assert (view.root, view.view) == (str(parent), str(tmp_path / "view"))
    assert view.keys.to_pylist() == ["clip_33", "clip_36", "clip_01", "clip_02", "clip_05", "clip_21"]  # as they lie in the shards, by name
    assert (view.ok, view.failed) == (6, 2) and [row["reason"] for row in view.rows() if row["reason"]] == ["truncated", "missing"]
    assert Index.open(tmp_path / "view", "validation").keys.to_pylist() == ["clip_01", "clip_02", "clip_05"]
    for number in (33, 1, 21):
        members = entry(number).members
        assert members is not None
        np.testing.assert_array_equal(view.member(view.row(f"clip_{number:02d}"), "avclip.npy"), members["avclip.npy"])
    # Its own two files and no other; and it can be moved together with its parent.
    assert sorted(path.name for path in (tmp_path / "view").iterdir()) == ["dataset.json", "manifest.parquet"]
    shutil.move(parent, tmp_path / "moved" / "parent")
    shutil.move(tmp_path / "view", tmp_path / "moved" / "view")
    assert Index.open(tmp_path / "moved" / "view").content == view.content
    shutil.move(tmp_path / "moved" / "view", tmp_path / "view")
    with pytest.raises(ValueError, match=r"which cannot be read .*put it back"):
        Index.open(tmp_path / "view")


def test_a_view_of_a_view_shows_the_parent(tmp_path, parent):
    index = Index.open(parent)
    write_view(tmp_path / "a", index, chosen(index, range(20)), selection=["below 20"])
    first = Index.open(tmp_path / "a")
    write_view(tmp_path / "deep" / "b", first, chosen(first, range(5, 30)), selection=["from 5"])
    second = Index.open(tmp_path / "deep" / "b")
    view = read_info(tmp_path / "deep" / "b").view
    assert view == {"parent": str(parent), "selection": ["below 20", "from 5"]}
    assert second.root == str(parent) and second.ok == sum(number % 7 != 3 for number in range(5, 20))
    shutil.rmtree(tmp_path / "a")
    assert Index.open(tmp_path / "deep" / "b").keys == second.keys


def test_a_parent_that_changed_is_refused(tmp_path, parent):
    index = Index.open(parent)
    write_view(tmp_path / "view", index, chosen(index, [1, 2, 14]), selection=["three clips"])
    write_shard(parent, "train-000007", [entry(40)])  # what the view does not use may change
    write_shard(parent, "test-000000", [entry(41, "test")])
    for manifest in (False, True):
        if manifest:
            write_manifest(parent)
        assert Index.open(tmp_path / "view").ok == 3
    before = {name: (parent / name).read_bytes() for name in ("train-000000.tar", "train-000000.parquet")}
    write_shard(parent, "train-000000", [entry(1), entry(2)])
    for manifest in (False, True):
        if manifest:
            write_manifest(parent)
        with pytest.raises(DatasetMismatch, match=r"1 of its 2 shards are gone or were written anew since, for example train-000000.*three clips"):
            Index.open(tmp_path / "view")
    for name, content in before.items():
        (parent / name).write_bytes(content)
    write_manifest(parent)
    assert Index.open(tmp_path / "view").ok == 3
    shutil.rmtree(parent)
    create_or_check(parent, new_info("features", {**INFO.spec, "hop_frames": 4}))
    with pytest.raises(DatasetMismatch, match="hop_frames: 8 in the view, 4 there"):
        Index.open(tmp_path / "view")


def test_what_cannot_be_a_view_is_refused(tmp_path, parent):
    index = Index.open(parent)
    rows = chosen(index, [1, 2])
    with pytest.raises(ValueError, match="chosen twice"):
        write_view(tmp_path / "view", index, pa.concat_tables([rows, rows]), selection=[])
    with pytest.raises(ValueError, match="split 'a/b' cannot name files"):
        write_view(tmp_path / "view", index, with_column(rows, "split", ["a/b", "a"]), selection=[])
    with pytest.raises(ValueError, match="no shards of"):
        write_view(tmp_path / "view", index, with_column(rows, "shard", ["x-000000", "train-000000"]), selection=[])
    with pytest.raises(ValueError, match="is a dataset with shards of its own"):
        write_view(parent, index, rows, selection=[])
    assert not (tmp_path / "view").exists()
    write_view(tmp_path / "view", index, rows, selection=["two"])
    with pytest.raises(ValueError, match="overwrite=true replaces it"):
        write_view(tmp_path / "view", index, chosen(index, [1]), selection=["one"])
    write_view(tmp_path / "view", index, chosen(index, [1]), selection=["one"], overwrite=True)
    assert Index.open(tmp_path / "view").keys.to_pylist() == ["clip_01"]
    # A job takes it for no dataset to write to, and nothing takes its manifest, which is all there is of it, for one that can be made again.
    with pytest.raises(DatasetMismatch, match="is a view of"):
        create_or_check(tmp_path / "view", INFO)
    for merged in (totals, write_manifest):
        with pytest.raises(ValueError, match="is a view, which has no ledgers"):
            merged(tmp_path / "view")


def test_a_trainer_sees_each_clip_of_a_view_once_per_epoch(tmp_path, parent):
    index = Index.open(parent)
    numbers = [number for number in range(37) if number % 3]
    write_view(tmp_path / "view", index, chosen(index, numbers), selection=["two of three"])
    view = Index.open(tmp_path / "view")
    stream = FeatureStream(view, StreamConfig(batch_size=3, segments=1))
    seen: list[str] = []
    for batch in stream:
        seen += batch["keys"]
        if len(seen) >= 2 * len(view):
            break
    expected = sorted(f"clip_{number:02d}" for number in numbers if number % 7 != 3)
    assert sorted(seen[: len(view)]) == sorted(seen[len(view) : 2 * len(view)]) == expected


def test_evaluation_begins_where_a_list_says(tmp_path, parent):
    """At the nearest stored segment, and not so late that no window is left."""
    starts = {0: 0.0, 1: 0.3, 2: 0.5, 4: 99.0, 9: None}  # of 1, 2, 3, 5 and 5 segments, 0.32 s apart
    index = Index.open(parent)
    rows = chosen(index, starts)
    given = [starts[int(key[5:])] for key in rows["key"].to_pylist()]
    write_view(tmp_path / "view", index, rows.append_column("start_seconds", pa.array(given, pa.float64())), selection=["starts"])
    (batch,) = FeatureStream(Index.open(tmp_path / "view"), StreamConfig(batch_size=5, segments=1), shuffle=False)
    assert batch["keys"] == [f"clip_{number:02d}" for number in starts]
    for number, first, features in zip(starts, (0, 1, 2, 4, 0), batch["features"], strict=True):
        members = entry(number).members
        assert members is not None
        np.testing.assert_array_equal(features.numpy()[0], np.asarray(members["avclip.npy"])[0, first])


def test_views_in_an_object_store(tmp_path, parent, s3):
    """A dataset there, seen from a folder and from beside it; and copied within the store."""
    remote = f"{s3.url}/parent"
    for name in storage.names(parent):
        storage.write_bytes(f"{remote}/{name}", (parent / name).read_bytes())
    expected: dict[str, bytes] = {}
    for place, out in ((str(parent), str(tmp_path / "a")), (remote, str(tmp_path / "b")), (remote, f"{s3.url}/c")):
        index = Index.open(place)
        write_view(out, index, chosen(index, range(0, 37, 2)), selection=["even"])
        view = Index.open(out)
        stream = FeatureStream(view, StreamConfig(batch_size=4, segments=2, lanes=2))
        batches = iter(stream)
        batch = next(batches)
        batches.close()
        keys = {f"clip_{number:02d}" for number in range(0, 37, 2)}
        assert view.root == place and set(batch["keys"]) <= keys
        materialise(out, f"{out}-copy", clips_per_shard=3)
        copied = {name: storage.read_bytes(f"{out}-copy/{name}") for name in storage.names(f"{out}-copy") if name != "dataset.json"}
        expected = expected or copied
        assert copied == expected and len(copied) > 5


@pytest.mark.parametrize("size", [None, 4, 100])
def test_a_materialised_view_is_what_preparing_only_those_clips_writes(tmp_path, parent, size):
    index = Index.open(parent)
    numbers = [36, 3, 0, 5, 6, 17, 9, 10, 11, 31, 24, 23]
    split = {f"clip_{number:02d}": "validation" if number in (5, 36, 17) else "train" for number in numbers}
    rows = chosen(index, numbers)
    rows = with_column(rows, "split", [split[key] for key in rows["key"].to_pylist()])
    rows = with_column(rows, "label", ["gong" if key == "clip_09" else "bell" for key in rows["key"].to_pylist()])
    write_view(tmp_path / "view", index, rows, selection=["twelve"])
    calls: list[tuple[int, int]] = []
    found = materialise(tmp_path / "view", tmp_path / "copy", clips_per_shard=size, workers=2, progress=lambda *counts: calls.append(counts))
    expected = prepare(tmp_path / "expected", [entry(n, split[f"clip_{n:02d}"], "gong" if n == 9 else "bell") for n in numbers], size or 5)
    assert (found.ok, found.failed, calls[-1]) == (7, 5, (12, 12))
    names = sorted(path.name for path in expected.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "copy").iterdir())
    for name in set(names) - {"dataset.json"}:
        assert (tmp_path / "copy" / name).read_bytes() == (expected / name).read_bytes(), name
    copied = read_info(tmp_path / "copy")
    assert replace(copied, provenance={}) == replace(read_info(expected), provenance={})
    assert copied.provenance["materialised"]["selection"] == ["twelve"]
    # Stock webdataset reads it.
    tars = [str(path) for path in sorted((tmp_path / "copy").glob("*.tar"))]
    records = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert {record["__key__"]: record["json"]["split"] for record in records} == {key: split[key] for key in sorted(split) if int(key[5:]) % 7 != 3}
    assert all(record["avclip.npy"].shape[2:] == (8, 5) for record in records)


def test_materialising_goes_on_where_it_stopped(tmp_path, parent):
    index = Index.open(parent)
    write_view(tmp_path / "view", index, chosen(index, range(23)), selection=["below 23"])
    materialise(tmp_path / "view", tmp_path / "whole", clips_per_shard=3)
    told: list[int] = []

    def stop(done: int, _: int) -> None:
        told.append(done)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise(tmp_path / "view", tmp_path / "part", clips_per_shard=3, workers=1, progress=stop)
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.tar")}
    assert 3 <= len(left) < 8
    materialise(tmp_path / "view", tmp_path / "part", clips_per_shard=3)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "part" / path.name).read_bytes() == path.read_bytes(), path.name
    assert left.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.tar")}.items()
    with pytest.raises(DatasetMismatch, match="holds other clips"):
        materialise(tmp_path / "view", tmp_path / "part", clips_per_shard=4)
    with pytest.raises(DatasetMismatch, match="not copied from a view"):
        materialise(tmp_path / "view", parent, clips_per_shard=3)
    storage.write_bytes(parent / "train-000000.tar", (parent / "train-000000.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"ends before byte .*soundshard verify"):
        materialise(tmp_path / "view", tmp_path / "cut", clips_per_shard=3)


def test_a_description_says_what_it_is(parent):
    described = json.loads((parent / "dataset.json").read_bytes())
    assert "view" not in described and len(described["sha256"]) == 64
