"""A dataset in an object store: the same files, byte for byte, and the same answers as on a local file system, also where storage misbehaves."""

from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from configs import storage
from shards import inspect, ledger
from shards.dataset import DatasetMismatch, create_or_check, new_info, read_info
from shards.read import FailedClip, Index, failed_clips
from shards.stream import FeatureStream, StreamConfig
from shards.write import (
    Entry,
    Totals,
    clear,
    committed_sha256,
    done_shards,
    read_outcome,
    shard_done,
    stored_entries,
    totals,
    uncommit,
    write_manifest,
    write_shard,
)
from tests.s3 import FAULTS, Faults
from tests.shards.test_write import bad, good

CODEC = {"name": "encodec24", "sample_rate_hz": 24000, "hop_samples": 320, "codebooks": 2}
INFO = new_info("features", {"hop_frames": 8, "views": 2, "codec": CODEC})
SHARDS = {
    "train-000000": [good(1), bad(2), good(3)],
    "train-000001": [bad(4)],
    "train-000002": [replace(good(5), members={"mp4": bytes(range(256)) * 100_000, "json": b"{}"})],  # 26 MB: uploaded in parts
    "val-000000": [good(6, "val"), bad(7, "val")],
}


def make(root) -> None:
    create_or_check(root, INFO)
    for name, entries in SHARDS.items():
        write_shard(root, name, entries)


def files(root) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(root, name)) for name in storage.names(root)}


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A dataset's place, of either kind."""
    return str(tmp_path / "set") if request.param == "local" else request.getfixturevalue("s3").url


def test_the_same_bytes_and_answers_as_locally(tmp_path, s3):
    there, here, before = s3.url, str(tmp_path), s3.unfinished_uploads()
    for place in (here, there):
        make(place)
        assert write_manifest(place) == totals(place)
    assert files(there) == files(here) and len(files(there)) == 10 and s3.unfinished_uploads() == before
    assert read_info(there) == INFO
    with pytest.raises(DatasetMismatch, match="hop_frames: 8 there, 4 here"):
        create_or_check(there, new_info("features", INFO.spec | {"hop_frames": 4}))
    for name in SHARDS:
        assert shard_done(there, name) and read_outcome(there, name) == read_outcome(here, name)
        assert committed_sha256(there, name) == committed_sha256(here, name)
    assert done_shards(there) == done_shards(here) == set(SHARDS)
    assert list(failed_clips(there)) == list(failed_clips(here))
    remote, local = Index.open(there), Index.open(here)
    assert remote.content == local.content and list(remote.rows()) == list(local.rows())
    for row in range(len(local)):
        for extension, members in local.members.items():
            if members.offset[row] >= 0:
                assert remote.bytes(row, extension) == local.bytes(row, extension)
                if extension.endswith("npy"):
                    np.testing.assert_array_equal(remote.member(row, extension), local.member(row, extension))
    shown = ["\n".join(inspect.overview(index)).replace(place, "ROOT") for index, place in ((remote, there), (local, here))]
    assert shown[0] == shown[1] and "train-000002" in shown[0]


def test_a_member_is_one_request_for_its_bytes(flaky_s3):
    proxy = flaky_s3(Faults())
    make(proxy.s3.url)
    index = Index.open(proxy.s3.url)
    proxy.requests.clear()
    index.member(index.row("-clip_1"), "avclip.npy")
    index.bytes(index.row("-clip_5"), "json")
    assert [method for method, _ in proxy.requests] == ["GET", "GET"]
    storage.remove(f"{proxy.s3.url}/train-000002.tar")
    with pytest.raises(ValueError, match="is missing, though its ledger is there"):
        index.bytes(index.row("-clip_5"), "json")
    storage.write_bytes(f"{proxy.s3.url}/train-000002.tar", bytes(600))
    with pytest.raises(ValueError, match="cut short"):
        index.bytes(index.row("-clip_5"), "mp4")


def test_a_whole_shard_is_mapped_from_the_cache_folder(tmp_path, s3, monkeypatch, caplog):
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    make(s3.url)
    index = Index.open(s3.url)
    for _ in range(2):
        for number, name in enumerate(index.shards):
            assert index.mapped(number).tobytes() == storage.read_bytes(f"{s3.url}/{name}.tar")
    assert sorted(path.name.partition("-")[2] for path in (tmp_path / "cache" / "objects").glob("*.tar")) == [f"{name}.tar" for name in index.shards]
    assert sum("copies its shards" in record.message for record in caplog.records) == 1


def test_a_trainer_gets_the_same_batches(tmp_path, s3):
    def clip(number: int) -> Entry:
        features, codes = np.full((2, 5, 8, 3), number, np.float16), np.full((2, 192), number, np.uint16)
        return Entry(f"clip_{number}", "train", None, "x.mp4", members={"avclip.npy": features, "encodec24.npy": codes})

    batches = []
    for place in (str(tmp_path / "local"), s3.url):
        create_or_check(place, INFO)
        write_shard(place, "train-000000", [clip(number) for number in range(7)])
        with closing(iter(FeatureStream(Index.open(place), StreamConfig(batch_size=3, segments=2, prefetch=0)))) as stream:
            batches.append([next(stream) for _ in range(4)])
    for local, remote in zip(*batches, strict=True):
        assert local["keys"] == remote["keys"] and torch.equal(local["features"], remote["features"]) and torch.equal(local["codes"], remote["codes"])


def test_a_shard_is_replaced_by_what_it_holds(root):
    make(root)
    before = files(root)
    entries = list(stored_entries(root, "train-000000"))
    assert [entry.ok for entry in entries] == [True, False, True] and entries[1].message == bad(2).message
    assert all(isinstance(payload, bytes) for entry in entries if entry.members for payload in entry.members.values())
    for name in SHARDS:
        write_shard(root, name, stored_entries(root, name))
    assert files(root) == before
    # What a retry does: one of the entries is new, the others are taken from the shard that is being replaced.
    kept = stored_entries(root, "train-000000")
    write_shard(root, "train-000000", [next(kept), replace(good(2), key="clip_2"), list(kept)[-1]])
    write_shard(root, "more-000000", [])
    retried = files(root)["train-000000.tar"]
    write_shard(root, "train-000000", [good(1), replace(good(2), key="clip_2"), good(3)])
    assert files(root)["train-000000.tar"] == retried


def test_an_exception_while_replacing_leaves_the_shard_as_it_was(root):
    make(root)
    before = files(root)

    def entries():
        yield from stored_entries(root, "train-000000")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shard(root, "train-000000", entries())
    assert files(root) == before and shard_done(root, "train-000000")


def test_a_stored_shard_that_was_cut_is_told(root):
    make(root)
    storage.write_bytes(f"{root}/train-000000.tar", files(root)["train-000000.tar"][:2000])
    with pytest.raises(ValueError, match="remove the ledger"):
        list(stored_entries(root, "train-000000"))


def test_totals_write_a_manifest_only_where_it_is_not_current(root):
    make(root)
    sizes = {name: len(data) for name, data in files(root).items()}
    expected = Totals(4, 4, 3, Counter(truncated=3), sum(size for name, size in sizes.items() if name.endswith(".tar")))
    assert totals(root) == expected  # there is none yet
    written = storage.stat(f"{root}/manifest.parquet")
    assert written is not None and totals(root) == expected and storage.stat(f"{root}/manifest.parquet") == written
    # A ledger of the same name and size with other contents, as a retry may leave it.
    write_shard(root, "train-000001", [replace(bad(4), reason="truncatef")])
    assert len(files(root)["train-000001.parquet"]) == sizes["train-000001.parquet"]
    assert totals(root).reasons == {"truncated": 2, "truncatef": 1}
    assert list(failed_clips(root))[1] == FailedClip("train-000001", "clip.4", "/videos/\\udcff4.mp4", "truncatef")
    storage.remove(f"{root}/manifest.parquet")
    assert list(failed_clips(root))[1].reason == "truncatef"


def test_a_manifest_stays_current_where_a_dataset_is_copied(root, tmp_path, s3):
    make(root)
    found = write_manifest(root)
    for copy in (str(tmp_path / "copy"), f"{s3.url}/copy"):
        for name, data in reversed(files(root).items()):  # the manifest before the ledgers
            storage.write_bytes(storage.join(copy, name), data)
        written = storage.stat(f"{copy}/manifest.parquet")
        assert totals(copy) == found and storage.stat(f"{copy}/manifest.parquet") == written


def test_columns_that_turn_up_late_are_in_the_manifest(root):
    create_or_check(root, INFO)
    for number in range(11):
        write_shard(root, f"train-{number:06d}", [good(number + 1)])
    write_shard(root, "train-000011", [replace(good(99), members={"wav": b"1234"})])
    write_shard(root, "train-000012", [replace(good(98), members={"avclip_audio.npy": np.zeros(3)})])
    assert write_manifest(root).ok == 13
    merged = ledger.read(f"{root}/manifest.parquet")
    assert ledger.extensions(merged) == ["avclip.npy", "avclip_audio.npy", "encodec24.npy", "json", "wav"]
    assert merged["wav.size"].to_pylist() == [None] * 11 + [4, None] and merged.num_rows == 13
    assert [name for name in storage.names(root) if "tmp" in name] == []


def test_row_groups_of_a_manifest_end_with_shards(root, monkeypatch, tmp_path):
    monkeypatch.setattr(ledger, "MANIFEST_GROUP_ROWS", 3)
    make(root)
    assert write_manifest(root) == totals(root)
    groups = pq.ParquetFile(storage.local_copy(f"{root}/manifest.parquet", tmp_path)).metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [3, 4]
    assert [row["shard"] for row in Index.open(root).rows()] == ["train-000000"] * 3 + ["train-000001", "train-000002"] + ["val-000000"] * 2


def test_uncommit_and_clear(root):
    make(root)
    write_manifest(root)
    uncommit(root, "train-000001")
    assert done_shards(root) == set(SHARDS) - {"train-000001"} and not shard_done(root, "train-000001")
    assert committed_sha256(root, "train-000001") is None
    assert "manifest.parquet" not in storage.names(root) and write_manifest(root).shards == 3
    storage.write_bytes(f"{root}/plan.parquet", b"plan")
    storage.write_bytes(f"{root}/report.html", b"somebody may still want to read it")
    clear(root)
    assert storage.names(root) == ["report.html"] and done_shards(root) == set()
    storage.remove(f"{root}/report.html")
    clear(root)
    assert storage.names(root) == []
    make(root)
    assert totals(root).shards == 4


def test_storage_that_misbehaves_changes_no_byte(tmp_path, s3, flaky_s3):
    make(tmp_path)
    write_manifest(tmp_path)
    before = s3.unfinished_uploads()
    methods = ("PUT", "GET", "HEAD")
    proxy = flaky_s3(Faults(error=0.2, cut_request=0.1, cut_response=0.1, lost_response=0.1, spoilt_request=0.07, methods=methods))
    make(s3.url)
    write_manifest(s3.url)
    assert files(s3.url) == files(tmp_path)
    index = Index.open(s3.url)
    assert [index.bytes(row, "json") for row in range(len(index))] == [Index.open(tmp_path).bytes(row, "json") for row in range(4)]
    assert all(proxy.happened[fault] for fault in FAULTS), proxy.happened
    assert s3.unfinished_uploads() == before and not list(tmp_path.glob(".*"))


def test_nothing_is_committed_where_storage_gives_up(s3, flaky_s3, monkeypatch):
    make(s3.url)
    kept, before = files(s3.url), s3.unfinished_uploads()
    monkeypatch.setattr(storage, "RETRY_SECONDS", 1.0)
    flaky_s3(Faults(error=1.0, methods=("PUT",)))
    with pytest.raises(storage.StorageError, match=r"train-000002.tar: check that the store can be reached .*SlowDown"):
        write_shard(s3.url, "train-000002", SHARDS["train-000002"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert done_shards(s3.url) == set(SHARDS) - {"train-000002"} and s3.unfinished_uploads() == before
    write_shard(s3.url, "train-000002", SHARDS["train-000002"])
    assert files(s3.url) == kept


def test_no_file_is_left_in_the_folder_for_temporary_files(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    held: list[list[Path]] = []

    def entries():
        yield good(1)
        held.append(list(tmp_path.iterdir()))  # nameless while it is written, so a kill leaves nothing either

    create_or_check(s3.url, INFO)
    write_shard(s3.url, "train-000000", entries())
    assert held == [[]] and list(tmp_path.iterdir()) == []
