"""Shards: readable by stock readers, the same bytes every time, committed by their ledger and by nothing else."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from shards import ledger
from shards.dataset import create_or_check, new_info
from shards.write import Entry, Outcome, Totals, check_key, json_bytes, npy_bytes, read_outcome, safe_key, shard_done, write_manifest, write_shard


@pytest.fixture
def root(tmp_path):
    create_or_check(tmp_path / "set", new_info("features", {"hop_frames": 8}))
    return tmp_path / "set"


def good(number, split="train"):
    rng = np.random.default_rng(number)
    members = {
        "json": json_bytes({"number": number, "label": "Glocke"}),
        "encodec24.npy": rng.integers(0, 1024, (2, 7 + number), dtype=np.uint16),
        "avclip.npy": rng.standard_normal((1, 3 + number, 8, 5)).astype(np.float16),
    }
    return Entry(f"-clip_{number}", split, "bell, church", f"/videos/{number}.mp4", duration_seconds=1.25 * number, members=members)


def bad(number, split="train"):
    return Entry(f"clip.{number}", split, None, f"/videos/\udcff{number}.mp4", reason="truncated", message="ends at byte 17")


ENTRIES = [good(1), bad(2), good(3), bad(4), good(5)]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_stock_webdataset_reads_it(root):
    write_shard(root, "train-000000", ENTRIES)
    samples = list(webdataset.WebDataset(str(root / "train-000000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["-clip_1", "-clip_3", "-clip_5"]
    for sample, entry in zip(samples, [good(1), good(3), good(5)], strict=True):
        assert entry.members is not None
        for extension in ("avclip.npy", "encodec24.npy"):
            assert sample[extension].dtype == entry.members[extension].dtype
            np.testing.assert_array_equal(sample[extension], entry.members[extension])
        assert sample["json"] == json.loads(entry.members["json"])


def test_gnu_tar_lists_it_and_headers_are_plain(root):
    write_shard(root, "train-000000", ENTRIES)
    path = root / "train-000000.tar"
    if tar := shutil.which("tar"):
        listed = subprocess.run([tar, "tvf", path], check=True, capture_output=True, text=True)
        assert listed.stderr == ""
        assert listed.stdout.split("\n")[0].endswith("-clip_1.avclip.npy") and "1970-01-01" in listed.stdout
    with tarfile.open(path) as file:
        members = file.getmembers()
    assert [m.name for m in members[:3]] == ["-clip_1.avclip.npy", "-clip_1.encodec24.npy", "-clip_1.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.type) for m in members} == {(0, 0, 0, "", "", tarfile.REGTYPE)}
    assert [m.offset_data - m.offset for m in members] == [512] * 9  # one header block each: no PAX records


def test_ledger_has_a_row_per_input_and_leads_to_the_payloads(root):
    outcome = write_shard(root, "train-000000", ENTRIES)
    path = root / "train-000000.tar"
    assert (
        outcome == Outcome("train-000000", ok=3, failed=2, reasons={"truncated": 2}, bytes=path.stat().st_size) == read_outcome(root, "train-000000")
    )
    rows = pq.read_table(root / "train-000000.parquet").to_pylist()
    assert [(row["key"], row["status"], row["reason"]) for row in rows] == [
        ("-clip_1", "ok", None),
        ("clip.2", "failed", "truncated"),
        ("-clip_3", "ok", None),
        ("clip.4", "failed", "truncated"),
        ("-clip_5", "ok", None),
    ]
    assert {row["shard_sha256"] for row in rows} == {sha256(path)} and {row["shard"] for row in rows} == {"train-000000"}
    assert rows[1]["source"] == "/videos/\\udcff2.mp4" and rows[1]["message"] == "ends at byte 17" and rows[1]["avclip.npy.offset"] is None
    data = path.read_bytes()
    for row, entry in zip(rows, ENTRIES, strict=True):
        for extension, payload in (entry.members or {}).items():
            stored = data[row[f"{extension}.offset"] :][: row[f"{extension}.size"]]
            if isinstance(payload, np.ndarray):
                assert stored == npy_bytes(payload)
                assert row[f"{extension}.shape"] == list(payload.shape) and row[f"{extension}.dtype"] == payload.dtype.str
                assert stored.endswith(payload.tobytes())
            else:
                assert stored == payload


def test_the_same_entries_give_the_same_bytes(tmp_path):
    digests = []
    for name in ("one", "two"):
        root = tmp_path / name
        create_or_check(root, new_info("features", {"hop_frames": 8}))
        shuffled = [replace(e, members=dict(reversed(e.members.items()))) if e.members and name == "two" else e for e in ENTRIES]
        write_shard(root, "val-000000", [good(7, "val")])
        write_shard(root, "train-000000", iter(shuffled))
        write_manifest(root)
        digests.append({path.name: sha256(path) for path in root.iterdir()})
    assert digests[0] == digests[1] and len(digests[0]) == 6


def test_all_failed_and_empty_shards_are_valid(root):
    assert write_shard(root, "train-000000", [bad(1), bad(2)]).failed == 2
    assert write_shard(root, "train-000001", []).ok == 0
    for name in ("train-000000", "train-000001"):
        with tarfile.open(root / f"{name}.tar") as file:
            assert file.getmembers() == []
        if tar := shutil.which("tar"):
            assert subprocess.run([tar, "tf", root / f"{name}.tar"], check=True, capture_output=True).stdout == b""
    write_shard(root, "train-000002", [good(3)])
    assert write_manifest(root) == Totals(3, 1, 2, Counter(truncated=2), sum(path.stat().st_size for path in root.glob("*.tar")))
    merged = pq.read_table(root / "manifest.parquet")
    assert merged.num_rows == 3 and merged["avclip.npy.offset"].to_pylist() == [None, None, 512]


def test_manifest_is_the_ledgers_sorted_by_shard(root):
    write_shard(root, "val-000000", [good(1, "val"), bad(1, "val")])
    media = Entry("m", "train", None, "m.mp4", members={"mp4": b"\0" * 513, "json": b"{}"})
    write_shard(root, "train-000001", [media])
    write_shard(root, "train-000000", [good(2)])
    found = write_manifest(root)
    assert (found.shards, found.ok, found.failed, found.reasons) == (3, 3, 1, {"truncated": 1})
    merged = pq.read_table(root / "manifest.parquet")
    assert merged["key"].to_pylist() == ["-clip_2", "m", "-clip_1", "clip.1"]
    assert ledger.extensions(merged) == ["avclip.npy", "encodec24.npy", "json", "mp4"]
    before = sha256(root / "manifest.parquet")
    write_manifest(root)
    assert sha256(root / "manifest.parquet") == before


def test_keys_are_unique_among_good_rows(root):
    twice = replace(bad(9), key="-clip_1", reason="duplicate_key")
    assert write_shard(root, "train-000000", [good(1), twice, twice]).failed == 2
    with pytest.raises(ValueError, match="'-clip_1' appears twice"):
        write_shard(root, "train-000001", [good(1), good(1)])
    assert not shard_done(root, "train-000001") and not list(root.glob(".*"))


def test_an_exception_leaves_nothing_and_keeps_what_was_there(root):
    def broken():
        yield good(1)
        raise RuntimeError("decoder gone")

    with pytest.raises(RuntimeError, match="decoder gone"):
        write_shard(root, "train-000000", broken())
    assert [path.name for path in root.iterdir()] == ["dataset.json"]
    write_shard(root, "train-000000", [good(1)])
    before = {path.name: sha256(path) for path in root.iterdir()}
    with pytest.raises(RuntimeError, match="decoder gone"):
        write_shard(root, "train-000000", broken())
    assert {path.name: sha256(path) for path in root.iterdir()} == before and shard_done(root, "train-000000")


def test_a_crash_between_tar_and_ledger_is_not_a_commit(root, monkeypatch):
    write_shard(root, "train-000000", [good(1), good(3)])
    kept = {path.name: sha256(path) for path in root.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_shard(root, "train-000000", [good(5)])
    assert (root / "train-000000.tar").is_file() and not shard_done(root, "train-000000")  # the old ledger would describe the wrong tar
    (root / ".train-000000.tar.0123456789ab.tmp").write_bytes(b"left by a kill")
    write_shard(root, "train-000000", [good(1), good(3)])
    assert {path.name: sha256(path) for path in root.iterdir()} == kept


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        np.array(3, np.uint16),
        np.zeros((0, 2)),
    ],
)
def test_npy_bytes_are_little_endian_c_order_version_1(array, tmp_path):
    data = npy_bytes(array)
    (tmp_path / "a.npy").write_bytes(data)
    back = np.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(back, array)
    assert data[6:8] == b"\x01\x00" and back.flags.c_contiguous and back.dtype.byteorder in "<=|" and back.shape == array.shape
    assert data.endswith(back.tobytes())


def test_npy_given_as_bytes_is_checked(root):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asfortranarray(np.zeros((2, 3))), version=(1, 0))
    with pytest.raises(ValueError, match="C order"):
        write_shard(root, "train-000000", [replace(good(1), members={"avclip.npy": stream.getvalue()})])
    write_shard(root, "train-000000", [replace(good(1), members={"avclip.npy": npy_bytes(np.zeros((2, 3), np.uint8))})])
    row = pq.read_table(root / "train-000000.parquet").to_pylist()[0]
    assert row["avclip.npy.shape"] == [2, 3] and row["avclip.npy.dtype"] == "|u1"


def test_bad_arguments_say_what_is_expected(root, tmp_path):
    with pytest.raises(ValueError, match="must not be empty nor hold dots"):
        write_shard(root, "train-000000", [replace(good(1), key="a.b")])
    with pytest.raises(ValueError, match="shorten the key"):
        write_shard(root, "train-000000", [replace(good(1), key="k" * 95)])
    write_shard(root, "train-000000", [replace(good(1), key="Glöckchen")])
    with tarfile.open(root / "train-000000.tar") as file:
        assert file.getnames()[0] == "Glöckchen.avclip.npy"
    with pytest.raises(ValueError, match="holds split 'train'"):
        write_shard(root, "train-000000", [good(1, "val")])
    with pytest.raises(ValueError, match="train-000000"):
        write_shard(root, "train", [good(1)])
    with pytest.raises(ValueError, match="needs members"):
        replace(good(1), reason="empty")
    with pytest.raises(ValueError, match="lower-case"):
        replace(good(1), members={".MP4": b""})
    with pytest.raises(ValueError, match=r"avclip\.npy"):
        replace(good(1), members={"avclip": np.zeros(1)})
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        write_shard(tmp_path, "train-000000", [])


@pytest.mark.parametrize(("stem", "key"), [("a.b c", "a_b c"), ("-x_1", "-x_1"), ("x\udcff\n", "x__"), ("", "_"), ("../x", "___x")])
def test_safe_key(stem, key):
    assert check_key(safe_key(stem)) == key


def test_read_refuses_another_datasets_ledger(root):
    write_shard(root, "train-000000", [good(1)])
    with pytest.raises(ValueError, match="belongs to a dataset with fingerprint"):
        ledger.read(root / "train-000000.parquet", fingerprint="0" * 64)
    (root / "train-000001.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="not readable as parquet"):
        ledger.read(root / "train-000001.parquet")


def test_ledger_schema_is_stable(root):
    write_shard(root, "train-000000", ENTRIES)
    schema = pq.read_schema(root / "train-000000.parquet")
    assert schema.names[:10] == [field.name for field in ledger.ROW_FIELDS]
    assert schema.names[10:14] == ["avclip.npy.offset", "avclip.npy.size", "avclip.npy.shape", "avclip.npy.dtype"]
    assert schema.field("avclip.npy.offset").type == pa.int64() and schema.field("avclip.npy.shape").type == pa.list_(pa.int64())
