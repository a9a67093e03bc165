"""The index: views equal what was written, whichever of manifest and ledgers it comes from, and what cannot be trusted is refused."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest

from shards.dataset import DatasetMismatch, create_or_check, new_info
from shards.read import Index
from shards.write import Entry, json_bytes, write_manifest, write_shard


def good(number, split="train"):
    rng = np.random.default_rng(number)
    members = {
        "json": json_bytes({"number": number}),
        "encodec24.npy": rng.integers(0, 1024, (2, 7 + number), dtype=np.uint16),
        "avclip.npy": rng.standard_normal((1, 3 + number, 8, 5)).astype(np.float16),
    }
    return Entry(f"clip_{number}", split, "bell", f"{number}.mp4", members=members)


def bad(number, split="train"):
    return Entry(f"bad.{number}", split, None, f"{number}.mp4", reason="truncated", message="ends at byte 17")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    create_or_check(root, new_info("features", {"hop_frames": 8}))
    write_shard(root, "train-000000", [good(1), bad(2), good(3)])
    write_shard(root, "train-000001", [bad(4), good(5), good(6), good(7)])
    write_shard(root, "val-000000", [bad(9, "val"), good(8, "val")])
    return root


@pytest.mark.parametrize("manifest", [False, True])
def test_views_equal_what_was_written(root, manifest):
    if manifest:
        write_manifest(root)
    index = Index.open(root, kind="features")
    assert (len(index), index.ok, index.failed) == (6, 6, 3)
    assert index.keys.to_pylist() == [f"clip_{number}" for number in (1, 3, 5, 6, 7, 8)]
    assert [row["status"] for row in index.rows()] == ["ok", "failed", "ok", "failed", "ok", "ok", "ok", "failed", "ok"]
    for row, number in enumerate((1, 3, 5, 6, 7, 8)):
        members = good(number).members
        assert members is not None
        for extension in ("avclip.npy", "encodec24.npy"):
            view = index.member(row, extension)
            np.testing.assert_array_equal(view, members[extension])
            assert view.dtype == members[extension].dtype and not view.flags.owndata and not view.flags.writeable and view.flags.aligned
        assert index.bytes(row, "json") == members["json"]
        assert index.row(f"clip_{number}") == row


def test_a_split_has_its_own_rows(root):
    index = Index.open(root, "val")
    assert (index.ok, index.failed, index.shards) == (1, 1, ["val-000000"])
    assert json.loads(index.bytes(0, "json")) == {"number": 8}
    assert Index.open(root, "train").content != index.content
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        Index.open(root, "test")


def test_a_stale_or_incomplete_manifest_is_not_trusted(root):
    write_manifest(root)
    write_shard(root, "train-000002", [good(10)])
    os.utime(root / "train-000002.parquet", ns=(0, 0))  # older than the manifest, as after a copy that keeps no times
    assert len(Index.open(root)) == 7
    write_manifest(root)
    write_shard(root, "train-000000", [good(1), good(2), good(3)])
    assert not (root / "manifest.parquet").exists()  # whoever replaces a ledger removes it
    index = Index.open(root)
    assert len(index) == 8 and index.failed == 2
    np.testing.assert_array_equal(index.member(index.row("clip_3"), "avclip.npy"), good(3).members["avclip.npy"])


def test_content_is_the_samples_not_the_place(root, tmp_path):
    before = Index.open(root).content
    root.rename(tmp_path / "elsewhere")
    assert Index.open(tmp_path / "elsewhere").content == before
    write_shard(tmp_path / "elsewhere", "train-000000", [good(1), bad(2), replace(good(3), key="clip_4")])
    assert Index.open(tmp_path / "elsewhere").content != before


def test_what_does_not_fit_is_refused(root):
    with pytest.raises(DatasetMismatch, match="is a features dataset; expected a media"):
        Index.open(root, kind="media")
    with pytest.raises(DatasetMismatch, match="expected abcd"):
        Index.open(root, fingerprint="abcd")
    index = Index.open(root)
    with pytest.raises(ValueError, match=r"has no member 'mp4'; it has avclip\.npy, encodec24\.npy, json"):
        index.bytes(0, "mp4")
    with pytest.raises(ValueError, match="no npy array"):
        index.member(0, "json")
    with pytest.raises(ValueError, match=r"failed \(truncated: ends at byte 17\)"):
        index.row("bad.2")
    with pytest.raises(ValueError, match="among its 6 good samples"):
        index.row("nobody")
    (root / "val-000000.tar").unlink()
    with pytest.raises(ValueError, match="is missing"):
        index.bytes(5, "json")
    with open(root / "train-000001.tar", "r+b") as file:
        file.truncate(2048)
    with pytest.raises(ValueError, match="cut short"):
        index.bytes(2, "json")


def test_keys_are_unique_in_the_dataset(root):
    write_shard(root, "train-000002", [good(5)])
    with pytest.raises(ValueError, match=r"'clip_5' is good in more than one place \(train-000001, train-000002\)"):
        Index.open(root)


def test_samples_may_lack_members_and_lists_may_be_empty(root):
    write_shard(root, "more-000000", [Entry("extra", "more", None, "x", members={"avclip_audio.npy": np.zeros((2, 3), np.float32)})])
    write_shard(root, "more-000001", [bad(1, "more")])
    index = Index.open(root)
    row = index.row("extra")
    assert index.member(row, "avclip_audio.npy").shape == (2, 3)
    with pytest.raises(ValueError, match=r"has no member 'avclip\.npy'"):
        index.member(row, "avclip.npy")
    assert len(Index.open(root, "more")) == 1
    create_or_check(root.parent / "none", new_info("features", {}))
    assert len(Index.open(root.parent / "none")) == 0
    with pytest.raises(ValueError, match="no shard of it is finished"):
        Index.open(root.parent / "none", "train")


def test_an_index_can_be_sent_to_another_process(root):
    index = Index.open(root)
    index.member(0, "avclip.npy")
    copy = pickle.loads(pickle.dumps(index))
    np.testing.assert_array_equal(copy.member(4, "avclip.npy"), good(7).members["avclip.npy"])


def test_maps_are_bounded(root, monkeypatch):
    monkeypatch.setattr("shards.read.MAX_MAPPED", 1)
    index = Index.open(root)
    first = index.member(0, "avclip.npy")
    for row in range(len(index)):
        index.member(row, "avclip.npy")
    assert len(index._maps) == 1
    np.testing.assert_array_equal(first, good(1).members["avclip.npy"])  # a view outlives its place in the cache
